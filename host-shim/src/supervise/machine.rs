//! What to do next: a state machine without processes, sockets or clocks.
//!
//! [`Machine::handle`] takes an event and the time since the start, and gives actions to be carried
//! out in order. [`Machine::next_deadline`] says when a [`Event::Tick`] is due. After
//! [`Action::Finish`] nothing more is asked for.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

#[cfg(test)]
mod tests;

/// How long things may take and how often they may fail.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the start of a card until it listens. Deriving a key from a passphrase and recovering
    /// a volume count.
    pub ready: Duration,
    /// Restarts of one card within [`Limits::restart_window`].
    pub restarts_max: usize,
    /// See there.
    pub restart_window: Duration,
    /// Pause before the first restart; doubled for each one within the window.
    pub backoff_first: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// For the guest to power itself off.
    pub power_off: Duration,
    /// For QEMU to quit.
    pub quit: Duration,
    /// For cards to end after SIGTERM.
    pub card_stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ready: Duration::from_secs(30),
            restarts_max: 5,
            restart_window: Duration::from_secs(60),
            backoff_first: Duration::from_millis(20),
            backoff_max: Duration::from_secs(2),
            power_off: Duration::from_secs(crate::spec::STOP_TIMEOUT_DEFAULT_S),
            quit: Duration::from_secs(10),
            card_stop: Duration::from_secs(10),
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndKind {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Signalled(i32),
    /// It could not be started, and why.
    NotStarted(String),
}

/// How a process ended, and the last lines it wrote to its standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// How.
    pub kind: EndKind,
    /// Its last lines, oldest first.
    pub last_words: Vec<String>,
}

impl Ending {
    fn is_success(&self) -> bool {
        self.kind == EndKind::Exited(0)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            EndKind::Exited(status) => write!(f, "exited with status {status}"),
            EndKind::Signalled(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "was killed by {name}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
            EndKind::NotStarted(why) => write!(f, "could not be started: {why}"),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Start.
    Begin,
    /// A card's socket listens.
    CardListens(usize),
    /// A card ended.
    CardEnded(usize, Ending),
    /// QEMU ended.
    QemuEnded(Ending),
    /// QEMU says that the guest is going down, and why (QMP's `SHUTDOWN`).
    ShuttingDown(String),
    /// QEMU cannot be talked to, and why.
    QmpFailed(String),
    /// Somebody wants this to stop. Each further one is less patient.
    StopRequested,
    /// Everything is to be killed, now.
    Abort,
    /// Time went by.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start a card.
    StartCard(usize),
    /// Start QEMU.
    StartQemu,
    /// Press the guest's power button (QMP).
    PowerDown,
    /// Ask QEMU to quit (QMP).
    Quit,
    /// SIGTERM to QEMU, when QMP does not work.
    TerminateQemu,
    /// SIGKILL to QEMU.
    KillQemu,
    /// SIGTERM to a card.
    TerminateCard(usize),
    /// SIGKILL to a card.
    KillCard(usize),
    /// Tell people.
    Note(String),
    /// Nothing runs any more.
    Finish(Outcome),
}

/// Why it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    GuestPoweredOff,
    /// Somebody asked.
    Stopped,
    /// Something failed: see [`Outcome::failures`].
    Failed,
}

/// Something that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// `qemu` or a card's label.
    pub who: String,
    /// What it did.
    pub what: String,
    /// The last lines it wrote to its standard error.
    pub last_words: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.who, self.what)?;
        for line in &self.last_words {
            write!(f, "\n    | {line}")?;
        }
        Ok(())
    }
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Why it is over.
    pub end: End,
    /// What failed, in order.
    pub failures: Vec<Failure>,
    /// How often cards were started again.
    pub restarts: usize,
}

impl Outcome {
    /// Whether nothing failed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.end != End::Failed && self.failures.is_empty()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CardState {
    /// Does not run, and will not.
    Gone,
    /// Runs, does not listen yet.
    Starting { until: Duration },
    /// Took too long and is being killed.
    Late,
    /// Listens.
    Serving,
    /// Died, will be started again.
    Waiting { until: Duration },
    /// Is being stopped.
    Stopping,
}

#[derive(Debug)]
struct Card {
    label: String,
    state: CardState,
    /// When it was started again, oldest first.
    restarts: VecDeque<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Cards start; QEMU does not run yet.
    Cards,
    /// The guest runs.
    Guest,
    /// The guest was asked to power off.
    PoweringOff { until: Duration },
    /// QEMU was asked to quit.
    Quitting { until: Duration },
    /// QEMU was sent SIGKILL.
    KillingQemu,
    /// QEMU is gone, cards were sent SIGTERM.
    StoppingCards { until: Duration },
    /// Cards were sent SIGKILL.
    KillingCards,
    /// Over.
    Done,
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    limits: Limits,
    cards: Vec<Card>,
    phase: Phase,
    end: Option<End>,
    failures: Vec<Failure>,
    restarts: usize,
    /// Cards are killed as soon as QEMU is gone.
    is_aborting: bool,
}

impl Machine {
    /// A machine for cards of these labels.
    #[must_use]
    pub fn new(cards: impl IntoIterator<Item = String>, limits: Limits) -> Self {
        let card = |label| Card {
            label,
            state: CardState::Gone,
            restarts: VecDeque::new(),
        };
        Self {
            limits,
            cards: cards.into_iter().map(card).collect(),
            phase: Phase::Cards,
            end: None,
            failures: Vec::new(),
            restarts: 0,
            is_aborting: false,
        }
    }

    /// Cards whose socket is waited for.
    pub fn starting(&self) -> impl Iterator<Item = usize> + '_ {
        let starting = |c: &Card| matches!(c.state, CardState::Starting { .. });
        self.cards
            .iter()
            .enumerate()
            .filter(move |(_, c)| starting(c))
            .map(|(i, _)| i)
    }

    /// When something is due, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let phase = match self.phase {
            Phase::PoweringOff { until }
            | Phase::Quitting { until }
            | Phase::StoppingCards { until } => Some(until),
            _ => None,
        };
        let cards = self.cards.iter().filter_map(|card| match card.state {
            CardState::Starting { until } | CardState::Waiting { until } => Some(until),
            _ => None,
        });
        cards.chain(phase).min()
    }

    /// Takes an event at `now`, time since the start.
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Begin => self.begin(now, &mut actions),
            Event::CardListens(index) => self.card_listens(index, &mut actions),
            Event::CardEnded(index, ending) => self.card_ended(index, ending, now, &mut actions),
            Event::QemuEnded(ending) => self.qemu_ended(ending, now, &mut actions),
            Event::ShuttingDown(why) => actions.push(Action::Note(format!("guest down: {why}"))),
            Event::QmpFailed(why) => self.qmp_failed(&why, now, &mut actions),
            Event::StopRequested => self.stop_requested(now, &mut actions),
            Event::Abort => self.abort(now, &mut actions),
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn begin(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.cards.len() {
            self.start_card(index, now, actions);
        }
        self.start_qemu_if_ready(actions);
    }

    fn start_card(&mut self, index: usize, now: Duration, actions: &mut Vec<Action>) {
        self.cards[index].state = CardState::Starting {
            until: now + self.limits.ready,
        };
        actions.push(Action::StartCard(index));
    }

    fn start_qemu_if_ready(&mut self, actions: &mut Vec<Action>) {
        let ready = self.cards.iter().all(|c| c.state == CardState::Serving);
        if self.phase == Phase::Cards && ready {
            self.phase = Phase::Guest;
            actions.push(Action::StartQemu);
        }
    }

    fn card_listens(&mut self, index: usize, actions: &mut Vec<Action>) {
        let card = &mut self.cards[index];
        if matches!(card.state, CardState::Starting { .. }) {
            card.state = CardState::Serving;
            if !card.restarts.is_empty() {
                actions.push(Action::Note(format!("{} is back", card.label)));
            }
            self.start_qemu_if_ready(actions);
        }
    }

    fn card_ended(
        &mut self,
        index: usize,
        ending: Ending,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let card = &mut self.cards[index];
        let before = std::mem::replace(&mut card.state, CardState::Gone);
        let what = match before {
            CardState::Late => format!("did not listen within {:?}", self.limits.ready),
            _ => ending.to_string(),
        };
        match self.phase {
            Phase::Cards => {
                let what = format!("{what} before it served");
                self.fail(index, what, ending.last_words);
                self.stop_cards(now, actions);
            }
            Phase::Guest | Phase::PoweringOff { .. } => {
                self.restart(index, &what, ending.last_words, now, actions);
            }
            Phase::Quitting { .. }
            | Phase::KillingQemu
            | Phase::StoppingCards { .. }
            | Phase::KillingCards => {
                let killed_by_us = before == CardState::Stopping
                    && (self.phase == Phase::KillingCards
                        || ending.kind == EndKind::Signalled(nix::libc::SIGTERM));
                if !ending.is_success() && !killed_by_us {
                    self.fail(index, format!("{what} while stopping"), ending.last_words);
                }
                self.finish_if_all_gone(actions);
            }
            Phase::Done => {}
        }
    }

    fn restart(
        &mut self,
        index: usize,
        what: &str,
        last_words: Vec<String>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let limits = self.limits;
        let card = &mut self.cards[index];
        while card
            .restarts
            .front()
            .is_some_and(|&at| now - at > limits.restart_window)
        {
            card.restarts.pop_front();
        }
        if card.restarts.len() >= limits.restarts_max {
            let times = card.restarts.len();
            let what = format!("{what}; it was started again {times} times already, giving up");
            self.fail(index, what, last_words);
            self.quit(now, actions);
            return;
        }
        let doublings = u32::try_from(card.restarts.len())
            .unwrap_or(u32::MAX)
            .min(16);
        let pause = (limits.backoff_first * 2_u32.pow(doublings)).min(limits.backoff_max);
        card.restarts.push_back(now);
        card.state = CardState::Waiting { until: now + pause };
        self.restarts += 1;
        let label = &card.label;
        actions.push(Action::Note(format!(
            "{label} {what}; starting it again in {pause:?}"
        )));
    }

    fn qemu_ended(&mut self, ending: Ending, now: Duration, actions: &mut Vec<Action>) {
        let killed_by_us = self.phase == Phase::KillingQemu;
        let terminated_by_us = matches!(self.phase, Phase::Quitting { .. })
            && ending.kind == EndKind::Signalled(nix::libc::SIGTERM);
        if !ending.is_success() && !killed_by_us && !terminated_by_us {
            self.failures.push(Failure {
                who: "qemu".to_owned(),
                what: ending.to_string(),
                last_words: ending.last_words,
            });
            self.end = Some(End::Failed);
        }
        self.end.get_or_insert(End::GuestPoweredOff);
        self.stop_cards(now, actions);
    }

    fn qmp_failed(&mut self, why: &str, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Guest => actions.push(Action::Note(format!("no control over qemu: {why}"))),
            Phase::PoweringOff { .. } | Phase::Quitting { .. } => {
                actions.push(Action::Note(format!(
                    "no control over qemu ({why}), terminating it"
                )));
                self.phase = Phase::Quitting {
                    until: now + self.limits.quit,
                };
                actions.push(Action::TerminateQemu);
            }
            _ => {}
        }
    }

    fn stop_requested(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Cards => {
                self.end.get_or_insert(End::Stopped);
                self.stop_cards(now, actions);
            }
            Phase::Guest => {
                self.end.get_or_insert(End::Stopped);
                let grace = self.limits.power_off;
                actions.push(Action::Note(format!(
                    "asking the guest to power off (up to {grace:?}; again to be quicker)"
                )));
                self.phase = Phase::PoweringOff { until: now + grace };
                actions.push(Action::PowerDown);
            }
            Phase::PoweringOff { .. } => self.quit(now, actions),
            Phase::Quitting { .. } => self.kill_qemu(actions),
            Phase::StoppingCards { .. } => self.kill_cards(actions),
            Phase::KillingQemu | Phase::KillingCards | Phase::Done => {}
        }
    }

    fn abort(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.is_aborting = true;
        self.end.get_or_insert(End::Stopped);
        match self.phase {
            Phase::Guest | Phase::PoweringOff { .. } | Phase::Quitting { .. } => {
                self.kill_qemu(actions);
            }
            Phase::Cards => self.stop_cards(now, actions),
            Phase::StoppingCards { .. } => self.kill_cards(actions),
            Phase::KillingQemu | Phase::KillingCards | Phase::Done => {}
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.cards.len() {
            match self.cards[index].state {
                CardState::Starting { until } if now >= until => {
                    self.cards[index].state = CardState::Late;
                    actions.push(Action::KillCard(index));
                }
                CardState::Waiting { until } if now >= until => {
                    self.start_card(index, now, actions);
                }
                _ => {}
            }
        }
        match self.phase {
            Phase::PoweringOff { until } if now >= until => {
                let grace = self.limits.power_off;
                actions.push(Action::Note(format!(
                    "the guest did not power off in {grace:?}"
                )));
                self.quit(now, actions);
            }
            Phase::Quitting { until } if now >= until => {
                self.failures.push(Failure {
                    who: "qemu".to_owned(),
                    what: format!("did not quit within {:?}, killed", self.limits.quit),
                    last_words: Vec::new(),
                });
                self.end = Some(End::Failed);
                self.kill_qemu(actions);
            }
            Phase::StoppingCards { until } if now >= until => {
                for index in 0..self.cards.len() {
                    if self.cards[index].state == CardState::Stopping {
                        let grace = self.limits.card_stop;
                        let what = format!("did not stop within {grace:?}, killed");
                        self.fail(index, what, Vec::new());
                    }
                }
                self.kill_cards(actions);
            }
            _ => {}
        }
    }

    fn quit(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Quitting {
            until: now + self.limits.quit,
        };
        self.stop_waiting();
        actions.push(Action::Quit);
    }

    fn kill_qemu(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::KillingQemu;
        self.stop_waiting();
        actions.push(Action::KillQemu);
    }

    /// Cards that wait for a restart are not started any more.
    fn stop_waiting(&mut self) {
        for card in &mut self.cards {
            if matches!(card.state, CardState::Waiting { .. }) {
                card.state = CardState::Gone;
            }
        }
    }

    fn stop_cards(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::StoppingCards {
            until: now + self.limits.card_stop,
        };
        self.stop_waiting();
        for (index, card) in self.cards.iter_mut().enumerate() {
            if matches!(card.state, CardState::Starting { .. } | CardState::Serving) {
                card.state = CardState::Stopping;
                actions.push(Action::TerminateCard(index));
            }
        }
        self.finish_if_all_gone(actions);
        if self.is_aborting {
            self.kill_cards(actions);
        }
    }

    fn kill_cards(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Done {
            return;
        }
        self.phase = Phase::KillingCards;
        for (index, card) in self.cards.iter().enumerate() {
            if card.state == CardState::Stopping {
                actions.push(Action::KillCard(index));
            }
        }
        self.finish_if_all_gone(actions);
    }

    fn finish_if_all_gone(&mut self, actions: &mut Vec<Action>) {
        let stopping = matches!(
            self.phase,
            Phase::StoppingCards { .. } | Phase::KillingCards
        );
        if stopping && self.cards.iter().all(|c| c.state == CardState::Gone) {
            self.phase = Phase::Done;
            actions.push(Action::Finish(Outcome {
                end: self.end.unwrap_or(End::Failed),
                failures: std::mem::take(&mut self.failures),
                restarts: self.restarts,
            }));
        }
    }

    fn fail(&mut self, index: usize, what: String, last_words: Vec<String>) {
        let who = self.cards[index].label.clone();
        self.failures.push(Failure {
            who,
            what,
            last_words,
        });
        self.end = Some(End::Failed);
    }
}
