use super::*;

const NOW: Duration = Duration::from_secs(100);

fn limits() -> Limits {
    Limits {
        restarts_max: 3,
        power_off: Duration::from_secs(7),
        ..Limits::default()
    }
}

fn exited(status: i32) -> Ending {
    Ending {
        kind: EndKind::Exited(status),
        last_words: vec!["last words".to_owned()],
    }
}

fn signalled(signal: i32) -> Ending {
    Ending {
        kind: EndKind::Signalled(signal),
        last_words: Vec::new(),
    }
}

/// Two cards that serve, and a guest.
fn running() -> Machine {
    let mut machine = Machine::new(["disk0".to_owned(), "disk1".to_owned()], limits());
    assert_eq!(
        machine.handle(Event::Begin, Duration::ZERO),
        [Action::StartCard(0), Action::StartCard(1)]
    );
    assert_eq!(machine.handle(Event::CardListens(1), NOW), []);
    assert_eq!(
        machine.handle(Event::CardListens(0), NOW),
        [Action::StartQemu]
    );
    machine
}

/// Without what is only said to people.
fn deeds(actions: Vec<Action>) -> Vec<Action> {
    actions
        .into_iter()
        .filter(|a| !matches!(a, Action::Note(_)))
        .collect()
}

fn finish(actions: &[Action]) -> &Outcome {
    match actions.last() {
        Some(Action::Finish(outcome)) => outcome,
        other => panic!("not finished: {other:?}"),
    }
}

#[test]
fn qemu_waits_for_every_card_and_cards_go_after_it() {
    let mut machine = running();
    let stop = [Action::TerminateCard(0), Action::TerminateCard(1)];
    assert_eq!(machine.handle(Event::QemuEnded(exited(0)), NOW), stop);
    assert_eq!(machine.handle(Event::CardEnded(0, exited(0)), NOW), []);
    let last = machine.handle(Event::CardEnded(1, exited(0)), NOW);
    assert_eq!(finish(&last).end, End::GuestPoweredOff);
    assert!(finish(&last).is_success());
}

#[test]
fn a_vm_without_cards_starts_at_once() {
    let mut machine = Machine::new([], limits());
    assert_eq!(machine.handle(Event::Begin, NOW), [Action::StartQemu]);
    assert!(finish(&machine.handle(Event::QemuEnded(exited(0)), NOW)).is_success());
}

#[test]
fn a_card_that_ends_before_it_serves_is_not_tried_again() {
    let mut machine = Machine::new(["disk0".to_owned(), "disk1".to_owned()], limits());
    machine.handle(Event::Begin, NOW);
    let actions = machine.handle(Event::CardEnded(1, exited(2)), NOW);
    assert_eq!(actions, [Action::TerminateCard(0)]);
    let last = machine.handle(Event::CardEnded(0, signalled(nix::libc::SIGTERM)), NOW);
    let outcome = finish(&last);
    assert_eq!(outcome.end, End::Failed);
    assert_eq!(
        outcome.failures[0].to_string(),
        "disk1 exited with status 2 before it served\n    | last words"
    );
    assert_eq!(
        outcome.failures.len(),
        1,
        "dying of our SIGTERM is no failure"
    );
}

#[test]
fn a_card_that_never_listens_is_killed_and_named() {
    let mut machine = Machine::new(["disk0".to_owned()], limits());
    machine.handle(Event::Begin, Duration::ZERO);
    let ready = limits().ready;
    assert_eq!(machine.next_deadline(), Some(ready));
    assert_eq!(
        machine.handle(Event::Tick, ready - Duration::from_millis(1)),
        []
    );
    assert_eq!(machine.handle(Event::Tick, ready), [Action::KillCard(0)]);
    let last = machine.handle(Event::CardEnded(0, signalled(9)), ready);
    assert_eq!(
        finish(&last).failures[0].what,
        "did not listen within 30s before it served"
    );
}

#[test]
fn a_card_that_dies_under_the_guest_comes_back_with_growing_pauses() {
    let mut machine = running();
    let mut now = NOW;
    for doubling in 0..3 {
        assert_eq!(
            deeds(machine.handle(Event::CardEnded(0, signalled(9)), now)),
            []
        );
        let due = machine.next_deadline().unwrap();
        assert_eq!(due - now, limits().backoff_first * (1 << doubling));
        assert_eq!(machine.handle(Event::Tick, due), [Action::StartCard(0)]);
        assert_eq!(deeds(machine.handle(Event::CardListens(0), due)), []);
        now = due;
    }
    let gives_up = machine.handle(Event::CardEnded(0, signalled(9)), now);
    assert_eq!(gives_up, [Action::Quit]);
    assert_eq!(
        machine.handle(Event::QemuEnded(exited(0)), now),
        [Action::TerminateCard(1)]
    );
    let last = machine.handle(Event::CardEnded(1, exited(0)), now);
    let outcome = finish(&last);
    assert_eq!((outcome.end, outcome.restarts), (End::Failed, 3));
    assert!(outcome.failures[0].what.contains("was killed by SIGKILL"));
}

#[test]
fn old_restarts_are_forgiven() {
    let mut machine = running();
    let mut now = NOW;
    for _ in 0..20 {
        now += limits().restart_window / 2;
        assert_eq!(
            deeds(machine.handle(Event::CardEnded(0, exited(1)), now)),
            []
        );
        now = machine.next_deadline().unwrap();
        assert_eq!(machine.handle(Event::Tick, now), [Action::StartCard(0)]);
        machine.handle(Event::CardListens(0), now);
    }
}

#[test]
fn stopping_becomes_less_patient_with_each_request() {
    let mut machine = running();
    assert_eq!(
        deeds(machine.handle(Event::StopRequested, NOW)),
        [Action::PowerDown]
    );
    assert_eq!(
        deeds(machine.handle(Event::StopRequested, NOW)),
        [Action::Quit]
    );
    assert_eq!(
        deeds(machine.handle(Event::StopRequested, NOW)),
        [Action::KillQemu]
    );
    machine.handle(Event::QemuEnded(signalled(9)), NOW);
    let kill = [Action::KillCard(0), Action::KillCard(1)];
    assert_eq!(machine.handle(Event::StopRequested, NOW), kill);
    machine.handle(Event::CardEnded(0, signalled(9)), NOW);
    let last = machine.handle(Event::CardEnded(1, signalled(9)), NOW);
    assert_eq!(
        finish(&last),
        &Outcome {
            end: End::Stopped,
            failures: vec![],
            restarts: 0
        }
    );
}

#[test]
fn a_guest_that_ignores_the_power_button_is_quit_then_killed() {
    let mut machine = running();
    machine.handle(Event::StopRequested, NOW);
    let due = machine.next_deadline().unwrap();
    assert_eq!(due, NOW + Duration::from_secs(7));
    assert_eq!(deeds(machine.handle(Event::Tick, due)), [Action::Quit]);
    let due = machine.next_deadline().unwrap();
    assert_eq!(deeds(machine.handle(Event::Tick, due)), [Action::KillQemu]);
    machine.handle(Event::QemuEnded(signalled(9)), due);
    machine.handle(Event::CardEnded(0, exited(0)), due);
    let last = machine.handle(Event::CardEnded(1, exited(0)), due);
    assert_eq!(finish(&last).end, End::Failed);
    assert_eq!(
        finish(&last).failures[0].what,
        "did not quit within 10s, killed"
    );
}

#[test]
fn without_qmp_qemu_is_stopped_by_signal() {
    let mut machine = running();
    assert_eq!(
        deeds(machine.handle(Event::QmpFailed("gone".to_owned()), NOW)),
        []
    );
    machine.handle(Event::StopRequested, NOW);
    let actions = deeds(machine.handle(Event::QmpFailed("gone".to_owned()), NOW));
    assert_eq!(actions, [Action::TerminateQemu]);
}

#[test]
fn a_card_that_ignores_sigterm_is_killed_and_told() {
    let mut machine = running();
    machine.handle(Event::QemuEnded(exited(0)), NOW);
    machine.handle(Event::CardEnded(0, exited(0)), NOW);
    let due = machine.next_deadline().unwrap();
    assert_eq!(machine.handle(Event::Tick, due), [Action::KillCard(1)]);
    let last = machine.handle(Event::CardEnded(1, signalled(9)), due);
    assert_eq!(
        finish(&last).failures[0].to_string(),
        "disk1 did not stop within 10s, killed"
    );
}

#[test]
fn a_qemu_that_crashes_is_a_failure_with_its_last_words() {
    let mut machine = running();
    machine.handle(Event::QemuEnded(exited(1)), NOW);
    machine.handle(Event::CardEnded(0, exited(0)), NOW);
    let last = machine.handle(Event::CardEnded(1, exited(0)), NOW);
    let shown = finish(&last).failures[0].to_string();
    assert_eq!(shown, "qemu exited with status 1\n    | last words");
}

#[test]
fn a_card_still_restarts_while_the_guest_powers_off_but_not_while_qemu_quits() {
    let mut machine = running();
    machine.handle(Event::StopRequested, NOW);
    machine.handle(Event::CardEnded(0, signalled(9)), NOW);
    let due = machine.next_deadline().unwrap();
    assert_eq!(machine.handle(Event::Tick, due), [Action::StartCard(0)]);
    machine.handle(Event::StopRequested, due);
    machine.handle(Event::CardEnded(0, signalled(9)), due);
    assert_eq!(
        machine.handle(Event::QemuEnded(exited(0)), due),
        [Action::TerminateCard(1)]
    );
}

#[test]
fn aborting_kills_in_every_phase() {
    let mut machine = Machine::new(["disk0".to_owned()], limits());
    machine.handle(Event::Begin, NOW);
    let actions = machine.handle(Event::Abort, NOW);
    assert_eq!(actions, [Action::TerminateCard(0), Action::KillCard(0)]);
    let mut machine = running();
    assert_eq!(machine.handle(Event::Abort, NOW), [Action::KillQemu]);
    let actions = machine.handle(Event::QemuEnded(signalled(9)), NOW);
    assert_eq!(actions[2..], [Action::KillCard(0), Action::KillCard(1)]);
}
