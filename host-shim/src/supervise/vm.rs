//! A running VM: carries out what the machine decides.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::machine::{Action, End, EndKind, Ending, Event, Failure, Limits, Machine, Outcome};
use super::process::{self, Stdio2, spawn_thread};
use super::run_dir::{RunDir, RunDirError, remove_socket};
use crate::plan::Plan;
use crate::qmp;

/// How often a starting card's socket is looked for.
const READY_POLL: Duration = Duration::from_millis(5);
/// How often the QMP thread looks for commands.
const QMP_POLL: Duration = Duration::from_millis(50);
/// QEMU's patience with QMP commands, and ours with its start.
const QMP_TIMEOUT: Duration = Duration::from_secs(5);
const QMP_CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Takes log lines: who wrote it (`shim`, `qemu`, `disk0`), and the line.
pub type LogSink = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// What a VM is connected to.
pub struct Options {
    /// Takes what the guest prints on its console.
    pub console: Box<dyn Write + Send>,
    /// Gives what is typed there; nobody types without it, except through [`Vm::type_text`].
    pub input: Option<Box<dyn Read + Send>>,
    /// Takes log lines.
    pub log: LogSink,
    /// See there. `power_off` is taken from the plan.
    pub limits: Limits,
}

/// Why a VM was not started. Everything after the first start of a process is an [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// See there.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No thread could be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

#[derive(Default)]
struct Status {
    cards: HashMap<usize, u32>,
    qemu: Option<u32>,
}

/// QEMU's standard input, which is the guest's keyboard. Apart from [`Status`], since a guest that
/// does not read may block whoever types, and nobody else must wait for that.
type Keyboard = Arc<Mutex<Option<ChildStdin>>>;

/// Asks a VM to stop, from anywhere.
#[derive(Clone)]
pub struct Stopper(Sender<Event>);

impl Stopper {
    /// Asks the guest to power off; a second time QEMU quits, a third time it is killed.
    pub fn stop(&self) {
        // A supervisor that is gone has stopped.
        let _ = self.0.send(Event::StopRequested);
    }
}

/// A VM that runs until [`Vm::wait`] returns. Dropping it kills everything.
pub struct Vm {
    events: Sender<Event>,
    status: Arc<Mutex<Status>>,
    keyboard: Keyboard,
    supervisor: Option<JoinHandle<()>>,
    outcome: Receiver<Outcome>,
}

impl Vm {
    /// Starts a plan. Returns at once; cards and QEMU come up in the background.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(plan: Plan, options: Options) -> Result<Self, StartError> {
        let run_dir = RunDir::prepare(&plan)?;
        let (events, inbox) = mpsc::channel();
        let (outcome_sender, outcome) = mpsc::channel();
        let status = Arc::new(Mutex::new(Status::default()));
        let keyboard = Keyboard::default();
        if let Some(input) = options.input {
            let keyboard = Arc::clone(&keyboard);
            spawn_thread("stdin", move || forward_input(input, &keyboard))
                .map_err(StartError::Thread)?;
        }
        let limits = Limits {
            power_off: Duration::from_secs(plan.stop_timeout_s),
            ..options.limits
        };
        let labels = plan.cards.iter().map(|c| c.process.label.clone());
        let runner = Runner {
            machine: Machine::new(labels, limits),
            plan,
            log: options.log,
            console: Some(options.console),
            console_done: None,
            events: events.clone(),
            status: Arc::clone(&status),
            keyboard: Arc::clone(&keyboard),
            cards: HashMap::new(),
            qemu: None,
            qmp: None,
            start: Instant::now(),
            _run_dir: run_dir,
        };
        let supervisor = spawn_thread("supervisor", move || {
            let outcome = runner.run(&inbox);
            // A VM that was dropped does not want to know.
            let _ = outcome_sender.send(outcome);
        })
        .map_err(StartError::Thread)?;
        Ok(Self {
            events,
            status,
            keyboard,
            supervisor: Some(supervisor),
            outcome,
        })
    }

    /// A handle to stop it with.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.events.clone())
    }

    /// Waits until nothing runs any more.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        let outcome = self.outcome.recv().unwrap_or_else(|_| supervisor_died());
        self.join();
        outcome
    }

    /// Waits at most `timeout`; the VM is given back if it still runs then.
    ///
    /// # Errors
    /// The VM.
    pub fn wait_timeout(mut self, timeout: Duration) -> Result<Outcome, Box<Self>> {
        match self.outcome.recv_timeout(timeout) {
            Ok(outcome) => {
                self.join();
                Ok(outcome)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(supervisor_died()),
            Err(RecvTimeoutError::Timeout) => Err(Box::new(self)),
        }
    }

    /// Whether nothing runs any more, so that [`Vm::wait`] returns at once.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.supervisor.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Process id of a card, while it runs.
    #[must_use]
    pub fn card_pid(&self, index: usize) -> Option<u32> {
        lock(&self.status).cards.get(&index).copied()
    }

    /// Process id of QEMU, while it runs.
    #[must_use]
    pub fn qemu_pid(&self) -> Option<u32> {
        lock(&self.status).qemu
    }

    /// Types on the guest's console.
    ///
    /// # Errors
    /// When QEMU does not run, or not any more.
    pub fn type_text(&self, text: &str) -> io::Result<()> {
        match &mut *lock(&self.keyboard) {
            Some(stdin) => stdin.write_all(text.as_bytes()),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.supervisor.take() {
            // A panic there was reported by its hook, and is an outcome already.
            let _ = thread.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Fails if it is over, which is as good.
        let _ = self.events.send(Event::Abort);
        self.join();
    }
}

fn supervisor_died() -> Outcome {
    let failure = Failure {
        who: "shim".to_owned(),
        what: "lost its supervisor thread".to_owned(),
        last_words: Vec::new(),
    };
    Outcome {
        end: End::Failed,
        failures: vec![failure],
        restarts: 0,
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy)]
enum QmpCommand {
    PowerDown,
    Quit,
}

struct Runner {
    machine: Machine,
    plan: Plan,
    log: LogSink,
    console: Option<Box<dyn Write + Send>>,
    /// Says when all of the console was passed on.
    console_done: Option<Receiver<()>>,
    events: Sender<Event>,
    status: Arc<Mutex<Status>>,
    keyboard: Keyboard,
    cards: HashMap<usize, OwnedFd>,
    qemu: Option<OwnedFd>,
    qmp: Option<Sender<QmpCommand>>,
    start: Instant,
    _run_dir: RunDir,
}

impl Runner {
    fn run(mut self, inbox: &Receiver<Event>) -> Outcome {
        let mut event = Event::Begin;
        loop {
            if let Some(outcome) = self.take(event) {
                return outcome;
            }
            event = self.next(inbox);
        }
    }

    /// The next event: one that happened, a card that listens, or the clock.
    fn next(&mut self, inbox: &Receiver<Event>) -> Event {
        loop {
            let now = self.start.elapsed();
            let due = self.machine.next_deadline();
            if due.is_some_and(|due| due <= now) {
                return Event::Tick;
            }
            let listening = self
                .machine
                .starting()
                .find(|&i| self.cards.contains_key(&i) && is_listening(&self.plan.cards[i].socket));
            if let Some(index) = listening {
                return Event::CardListens(index);
            }
            let polls = self.machine.starting().next().is_some();
            let left = due.map_or(Duration::from_secs(3600), |due| due - now);
            let patience = if polls { left.min(READY_POLL) } else { left };
            // We hold a sender ourselves, so it is never disconnected.
            if let Ok(event) = inbox.recv_timeout(patience) {
                return event;
            }
        }
    }

    fn take(&mut self, event: Event) -> Option<Outcome> {
        match &event {
            Event::CardEnded(index, _) => {
                self.cards.remove(index);
                lock(&self.status).cards.remove(index);
            }
            Event::QemuEnded(_) => {
                self.qemu = None;
                self.qmp = None;
                lock(&self.status).qemu = None;
                // Whoever is blocked writing gets EPIPE now, so this does not wait for long.
                *lock(&self.keyboard) = None;
                if let Some(done) = self.console_done.take() {
                    // What the guest printed last comes before what is said about its end.
                    let _ = done.recv_timeout(Duration::from_secs(1));
                }
            }
            _ => {}
        }
        let now = self.start.elapsed();
        let mut outcome = None;
        for action in self.machine.handle(event, now) {
            match action {
                Action::Finish(is) => outcome = Some(is),
                Action::Note(text) => (self.log)("shim", &text),
                Action::StartCard(index) => self.start_card(index),
                Action::StartQemu => self.start_qemu(),
                Action::PowerDown => self.command(QmpCommand::PowerDown),
                Action::Quit => self.command(QmpCommand::Quit),
                Action::TerminateQemu => send(self.qemu.as_ref(), Signal::TERM),
                Action::KillQemu => send(self.qemu.as_ref(), Signal::KILL),
                Action::TerminateCard(index) => send(self.cards.get(&index), Signal::TERM),
                Action::KillCard(index) => send(self.cards.get(&index), Signal::KILL),
            }
        }
        outcome
    }

    fn emit(&self, event: Event) {
        // Never fails: the receiver lives as long as `self`.
        let _ = self.events.send(event);
    }

    fn start_card(&mut self, index: usize) {
        let card = &self.plan.cards[index];
        let events = self.events.clone();
        let on_end = move |ending| {
            // The supervisor waits for this before it ends.
            let _ = events.send(Event::CardEnded(index, ending));
        };
        let started = remove_socket(&card.socket)
            .and_then(|()| remove_socket(&card.control_socket))
            .and_then(|()| {
                process::start(&card.process, Stdio2::Null, Arc::clone(&self.log), on_end)
            });
        match started {
            Ok(child) => {
                lock(&self.status).cards.insert(index, child.pid);
                self.cards.insert(index, child.pidfd);
            }
            Err(e) => {
                let program = card.process.program.display();
                self.emit(Event::CardEnded(
                    index,
                    not_started(&format!("{program}: {e}")),
                ));
            }
        }
    }

    fn start_qemu(&mut self) {
        let events = self.events.clone();
        let on_end = move |ending| {
            // As above.
            let _ = events.send(Event::QemuEnded(ending));
        };
        match process::start(
            &self.plan.qemu,
            Stdio2::Piped,
            Arc::clone(&self.log),
            on_end,
        ) {
            Ok(child) => {
                if let Err(e) = self.attach(child.stdio) {
                    // A guest nobody hears is of no use; its end is reported by its wait thread.
                    (self.log)("shim", &format!("cannot attach to qemu: {e}"));
                    process::signal(&child.pidfd, Signal::KILL);
                }
                lock(&self.status).qemu = Some(child.pid);
                self.qemu = Some(child.pidfd);
            }
            Err(e) => {
                let program = self.plan.qemu.program.display();
                self.emit(Event::QemuEnded(not_started(&format!("{program}: {e}"))));
            }
        }
    }

    fn attach(&mut self, stdio: Option<(ChildStdin, ChildStdout)>) -> io::Result<()> {
        if let (Some((stdin, stdout)), Some(console)) = (stdio, self.console.take()) {
            let (done, console_done) = mpsc::channel();
            self.console_done = Some(console_done);
            *lock(&self.keyboard) = Some(stdin);
            spawn_thread("console", move || forward_console(stdout, console, done))?;
        }
        let (commands, inbox) = mpsc::channel();
        self.qmp = Some(commands);
        let path = self.plan.qmp.clone();
        let events = self.events.clone();
        spawn_thread("qmp", move || {
            if let Err(e) = converse(&path, &inbox, &events) {
                let _ = events.send(Event::QmpFailed(chain(&e)));
            }
        })?;
        Ok(())
    }

    fn command(&self, command: QmpCommand) {
        let sent = self
            .qmp
            .as_ref()
            .is_some_and(|qmp| qmp.send(command).is_ok());
        if !sent {
            self.emit(Event::QmpFailed("not connected".to_owned()));
        }
    }
}

fn send(process: Option<&OwnedFd>, signal: Signal) {
    if let Some(pidfd) = process {
        process::signal(pidfd, signal);
    }
}

fn not_started(why: &str) -> Ending {
    Ending {
        kind: EndKind::NotStarted(why.to_owned()),
        last_words: Vec::new(),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// Talks QMP until QEMU hangs up or the supervisor lets go of `commands`.
fn converse(
    path: &Path,
    commands: &Receiver<QmpCommand>,
    events: &Sender<Event>,
) -> Result<(), qmp::QmpError> {
    let mut client = qmp::Client::connect(path, QMP_CONNECT_TIMEOUT)?;
    loop {
        match commands.try_recv() {
            Ok(QmpCommand::PowerDown) => client.system_powerdown(QMP_TIMEOUT)?,
            Ok(QmpCommand::Quit) => client.quit(QMP_TIMEOUT)?,
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
        }
        match client.next_event(QMP_POLL) {
            Ok(Some(event)) if event.name == "SHUTDOWN" => {
                let why = event
                    .data
                    .get("reason")
                    .and_then(|r| r.as_str())
                    .unwrap_or("unknown");
                let _ = events.send(Event::ShuttingDown(why.to_owned()));
            }
            Ok(_) => {}
            // Its wait thread says how QEMU ended.
            Err(qmp::QmpError::HungUp) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

fn forward_console(mut from: ChildStdout, mut to: Box<dyn Write + Send>, done: Sender<()>) {
    let mut buffer = [0; 4096];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        // A console that nobody reads must not stop the guest: it is read on and thrown away.
        let _ = to.write_all(&buffer[..got]).and_then(|()| to.flush());
    }
    drop(done);
}

fn forward_input(mut from: Box<dyn Read + Send>, keyboard: &Mutex<Option<ChildStdin>>) {
    let mut buffer = [0; 256];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        if let Some(stdin) = &mut *lock(keyboard) {
            // QEMU that is gone is reported by its wait thread.
            let _ = stdin.write_all(&buffer[..got]);
        }
    }
}

/// Whether a Unix socket of this path accepts connections, without making one.
fn is_listening(path: &Path) -> bool {
    let Ok(table) = std::fs::read("/proc/net/unix") else {
        return false;
    };
    let Some(path) = path.to_str() else {
        return false;
    };
    listens_in(&String::from_utf8_lossy(&table), path)
}

/// Columns: number, reference count, protocol, flags, type, state, inode, path.
fn listens_in(table: &str, path: &str) -> bool {
    const SO_ACCEPTCON: u32 = 1 << 16;
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_ascii_whitespace();
        let flags = columns
            .nth(3)
            .and_then(|f| u32::from_str_radix(f, 16).ok())
            .unwrap_or(0);
        flags & SO_ACCEPTCON != 0 && line.ends_with(path) && {
            let rest = line.len() - path.len();
            line.as_bytes().get(rest.wrapping_sub(1)) == Some(&b' ')
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Num       RefCount Protocol Flags    Type St Inode Path\n\
        0000000000000000: 00000002 00000000 00010000 0001 01 18425 /run/a b/vhost.sock\n\
        0000000000000000: 00000003 00000000 00000000 0001 03 18426 /run/connected.sock\n\
        0000000000000000: 00000003 00000000 00000000 0001 03 18427\n";

    #[test]
    fn only_listening_sockets_of_exactly_that_path_count() {
        assert!(listens_in(TABLE, "/run/a b/vhost.sock"));
        assert!(
            !listens_in(TABLE, "/run/connected.sock"),
            "connected, not listening"
        );
        assert!(!listens_in(TABLE, "b/vhost"), "only part of a path");
        assert!(!listens_in(TABLE, "/vhost.sock"), "only the end of a path");
        assert!(!listens_in(TABLE, ""));
    }

    #[test]
    fn a_real_listener_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        assert!(!is_listening(&path));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path));
    }
}
