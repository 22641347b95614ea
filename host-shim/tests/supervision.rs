//! Supervision with toy processes: this test binary, started again, plays cards and QEMU.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use host_shim::plan::{CardPlan, Plan, Process, ResolvedAccel};
use host_shim::supervise::{
    Console, End, Limits, Options, Outcome, RunDir, RunDirError, StartError, Vm,
};

const LONG: Duration = Duration::from_secs(20);

/// Not a test: what the toy processes run. `TOY` says which one.
#[test]
fn toy() {
    let Ok(toy) = std::env::var("TOY") else {
        return;
    };
    let words: Vec<&str> = toy.split('|').collect();
    let journal = Path::new(words[1]);
    match words[0] {
        "card" => toy_card(journal, words[2], Path::new(words[3])),
        "stubborn" => {
            let term = Arc::new(std::sync::atomic::AtomicBool::new(false));
            signal_hook::flag::register(signal_hook::consts::SIGTERM, term).unwrap();
            let _listener = UnixListener::bind(words[3]).unwrap();
            std::thread::sleep(LONG * 3);
        }
        "flaky" => {
            let _listener = UnixListener::bind(words[3]).unwrap();
            note(journal, "flaky up");
            std::thread::sleep(Duration::from_millis(100));
            std::process::abort();
        }
        "deaf" => std::thread::sleep(LONG * 3),
        "wrong-key" => {
            eprintln!("opening the volume");
            eprintln!("the key does not open this volume");
            std::process::exit(3);
        }
        "qemu" => toy_qemu(journal, Path::new(words[2]), words[3]),
        other => panic!("no toy {other}"),
    }
    std::process::exit(0);
}

fn toy_card(journal: &Path, name: &str, socket: &Path) {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM]).unwrap();
    let _listener = UnixListener::bind(socket).unwrap();
    note(journal, &format!("{name} up"));
    signals.forever().next();
    note(journal, &format!("{name} down"));
}

/// `manner`: what it does on `system_powerdown`: "obeys", "ignores", or "crashes" at once.
fn toy_qemu(journal: &Path, qmp: &Path, manner: &str) {
    let listener = UnixListener::bind(qmp).unwrap();
    note(journal, "qemu up");
    println!("guest says hello");
    if manner == "crashes" {
        eprintln!("qemu: a bad thing happened");
        std::process::exit(1);
    }
    if manner == "powers-off" {
        note(journal, "qemu down");
        return;
    }
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"{\"QMP\": {}}\n").unwrap();
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let request: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        let command = request["execute"].as_str().unwrap();
        let reply = serde_json::json!({"return": {}, "id": request["id"]});
        writeln!(stream, "{reply}").unwrap();
        if command != "qmp_capabilities" {
            note(journal, command);
        }
        if command == "quit" || (command == "system_powerdown" && manner == "obeys") {
            let event = serde_json::json!({"event": "SHUTDOWN", "data": {"reason": command}});
            writeln!(stream, "{event}").unwrap();
            note(journal, "qemu down");
            return;
        }
    }
}

fn note(journal: &Path, line: &str) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(journal)
        .unwrap();
    writeln!(file, "{line}").unwrap();
}

struct Stage {
    dir: tempfile::TempDir,
    plan: Plan,
    console: Console,
    log: Arc<Mutex<Vec<String>>>,
}

fn toy_process(label: &str, words: &[&str]) -> Process {
    let exe = std::env::current_exe().unwrap();
    let exe = exe.to_str().unwrap();
    let script = format!(
        "TOY='{}' exec '{exe}' --exact toy --nocapture",
        words.join("|")
    );
    Process {
        label: label.to_owned(),
        program: "/bin/sh".into(),
        args: vec!["-c".to_owned(), script],
    }
}

/// A VM of these cards, and a QEMU of that manner.
fn stage(cards: &[&str], qemu: &str) -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let journal = dir.path().join("journal");
    File::create(&journal).unwrap();
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let cards = cards.iter().enumerate().map(|(index, kind)| {
        let card_dir = run_dir.join(format!("disk{index}"));
        let socket = card_dir.join("vhost.sock");
        let label = format!("disk{index}");
        CardPlan {
            process: toy_process(&label, &[kind, &text(&journal), &label, &text(&socket)]),
            control_socket: card_dir.join("control.sock"),
            dir: card_dir,
            owner: None,
            socket,
        }
    });
    let qmp = run_dir.join("qmp.sock");
    let plan = Plan {
        name: "toy".to_owned(),
        accel: ResolvedAccel::Tcg,
        warnings: Vec::new(),
        cards: cards.collect(),
        qemu: toy_process("qemu", &["qemu", &text(&journal), &text(&qmp), qemu]),
        qmp,
        run_dir,
        stop_timeout_s: 1,
    };
    Stage {
        dir,
        plan,
        console: Console::default(),
        log: Arc::default(),
    }
}

impl Stage {
    fn start(&self, limits: Limits) -> Vm {
        let log = Arc::clone(&self.log);
        let options = Options {
            console: Box::new(self.console.clone()),
            input: None,
            log: Arc::new(move |who, line| log.lock().unwrap().push(format!("{who}: {line}"))),
            limits,
        };
        Vm::start(self.plan.clone(), options).unwrap()
    }

    fn journal(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("journal")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn wait_for_journal(&self, line: &str) {
        let end = Instant::now() + LONG;
        while !self.journal().iter().any(|l| l == line) {
            assert!(Instant::now() < end, "no `{line}` in {:?}", self.journal());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn finish(vm: Vm) -> Outcome {
    vm.wait_timeout(LONG).map_err(|_| "still running").unwrap()
}

fn quick() -> Limits {
    Limits {
        ready: Duration::from_secs(10),
        quit: Duration::from_millis(500),
        card_stop: Duration::from_millis(500),
        ..Limits::default()
    }
}

#[test]
fn a_guest_that_powers_off_takes_its_cards_along_in_order() {
    let stage = stage(&["card"], "powers-off");
    let outcome = finish(stage.start(quick()));
    assert_eq!(
        outcome,
        Outcome {
            end: End::GuestPoweredOff,
            failures: vec![],
            restarts: 0
        }
    );
    assert_eq!(
        stage.journal(),
        ["disk0 up", "qemu up", "qemu down", "disk0 down"]
    );
    assert!(stage.console.text().contains("guest says hello"));
    assert!(
        !stage.plan.cards[0].dir.exists(),
        "nothing is left in the run directory"
    );
}

#[test]
fn a_stop_request_goes_to_the_guest_first_and_to_the_cards_last() {
    let stage = stage(&["card"], "obeys");
    let vm = stage.start(quick());
    stage.wait_for_journal("qemu up");
    vm.stopper().stop();
    let outcome = finish(vm);
    assert_eq!(
        outcome,
        Outcome {
            end: End::Stopped,
            failures: vec![],
            restarts: 0
        }
    );
    let expected = [
        "disk0 up",
        "qemu up",
        "system_powerdown",
        "qemu down",
        "disk0 down",
    ];
    assert_eq!(stage.journal(), expected);
}

#[test]
fn a_guest_that_ignores_the_button_is_quit_after_its_time() {
    let stage = stage(&["card"], "ignores");
    let vm = stage.start(quick());
    stage.wait_for_journal("qemu up");
    vm.stopper().stop();
    let outcome = finish(vm);
    assert_eq!(outcome.end, End::Stopped);
    assert!(outcome.is_success(), "{outcome:?}");
    let expected = ["system_powerdown", "quit", "qemu down", "disk0 down"];
    assert_eq!(stage.journal()[2..], expected);
}

#[test]
fn a_card_that_refuses_its_key_is_reported_in_its_own_words_and_qemu_never_starts() {
    let stage = stage(&["card", "wrong-key"], "obeys");
    let outcome = finish(stage.start(quick()));
    assert_eq!(outcome.end, End::Failed);
    let failure = outcome.failures[0].to_string();
    assert!(
        failure.starts_with("disk1 exited with status 3 before it served"),
        "{failure}"
    );
    assert!(
        failure.ends_with("| the key does not open this volume"),
        "{failure}"
    );
    assert!(!stage.journal().contains(&"qemu up".to_owned()));
    let log = stage.log.lock().unwrap().join("\n");
    assert!(
        log.contains("disk1: the key does not open this volume"),
        "{log}"
    );
}

#[test]
fn a_card_that_never_listens_is_killed() {
    let stage = stage(&["deaf"], "obeys");
    let limits = Limits {
        ready: Duration::from_millis(200),
        ..quick()
    };
    let outcome = finish(stage.start(limits));
    assert_eq!(
        outcome.failures[0].what,
        "did not listen within 200ms before it served"
    );
}

#[test]
fn a_card_that_dies_is_started_again_until_that_is_hopeless() {
    let stage = stage(&["flaky"], "obeys");
    let limits = Limits {
        restarts_max: 2,
        ..quick()
    };
    let outcome = finish(stage.start(limits));
    assert_eq!((outcome.end, outcome.restarts), (End::Failed, 2));
    assert!(
        outcome.failures[0].what.contains("was killed by SIGABRT"),
        "{outcome:?}"
    );
    let ups = stage.journal().iter().filter(|l| *l == "flaky up").count();
    assert_eq!(ups, 3);
    assert!(
        stage.journal().contains(&"quit".to_owned()),
        "the guest is not left without a disk"
    );
}

#[test]
fn a_killed_card_comes_back_under_a_guest_that_lives_on() {
    let stage = stage(&["card"], "obeys");
    let vm = stage.start(quick());
    stage.wait_for_journal("qemu up");
    let first = vm.card_pid(0).unwrap();
    kill(first);
    let end = Instant::now() + LONG;
    while vm.card_pid(0).is_none_or(|pid| pid == first) {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    while stage.journal().iter().filter(|l| *l == "disk0 up").count() < 2 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.stopper().stop();
    let outcome = finish(vm);
    assert_eq!(
        (outcome.end, outcome.restarts, outcome.failures.len()),
        (End::Stopped, 1, 0)
    );
}

#[test]
fn a_crashed_qemu_is_a_failure_with_its_words() {
    let stage = stage(&["card"], "crashes");
    let outcome = finish(stage.start(quick()));
    assert_eq!(outcome.end, End::Failed);
    let failure = outcome.failures[0].to_string();
    assert!(
        failure.starts_with("qemu exited with status 1"),
        "{failure}"
    );
    assert!(failure.contains("a bad thing happened"), "{failure}");
    assert_eq!(stage.journal().last().unwrap(), "disk0 down");
}

#[test]
fn a_card_that_ignores_sigterm_does_not_hold_up_the_end() {
    let stage = stage(&["stubborn"], "powers-off");
    let outcome = finish(stage.start(quick()));
    assert_eq!(
        outcome.failures[0].to_string(),
        "disk0 did not stop within 500ms, killed"
    );
}

#[test]
fn a_missing_program_is_named() {
    let mut stage = stage(&["card"], "obeys");
    stage.plan.cards[0].process.program = "/nonexistent/vhost-blk".into();
    let failure = finish(stage.start(quick())).failures[0].to_string();
    assert!(
        failure.contains("could not be started: /nonexistent/vhost-blk: No such"),
        "{failure}"
    );
}

#[test]
fn two_shims_do_not_run_one_vm() {
    let stage = stage(&["card"], "obeys");
    let vm = stage.start(quick());
    stage.wait_for_journal("qemu up");
    let console = Box::new(Console::default());
    let options = Options {
        console,
        input: None,
        log: Arc::new(|_, _| {}),
        limits: quick(),
    };
    let second = Vm::start(stage.plan.clone(), options);
    assert!(matches!(
        second.err(),
        Some(StartError::RunDir(RunDirError::Busy { .. }))
    ));
    drop(vm);
    RunDir::prepare(&stage.plan).expect("free again once the first is gone");
}

#[test]
fn a_run_directory_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let stage = stage(&[], "obeys");
    std::fs::create_dir(&stage.plan.run_dir).unwrap();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&stage.plan.run_dir, open).unwrap();
    let refused = RunDir::prepare(&stage.plan);
    assert!(matches!(refused, Err(RunDirError::NotOurs { .. })));
}

#[test]
fn dropping_a_vm_leaves_nothing_behind() {
    let stage = stage(&["stubborn"], "ignores");
    let vm = stage.start(Limits {
        card_stop: LONG,
        ..quick()
    });
    stage.wait_for_journal("qemu up");
    let pids = [vm.card_pid(0).unwrap(), vm.qemu_pid().unwrap()];
    drop(vm);
    assert!(pids.iter().all(|&pid| !is_alive(pid)));
}

/// A shim of our own, in a process of its own, so that it can be killed.
#[test]
fn toy_shim() {
    let Ok(dir) = std::env::var("TOY_SHIM") else {
        return;
    };
    let stage = stage(&["stubborn"], "ignores");
    let vm = stage.start(quick());
    stage.wait_for_journal("qemu up");
    let pids = format!("{} {}", vm.card_pid(0).unwrap(), vm.qemu_pid().unwrap());
    std::fs::write(Path::new(&dir).join("tmp"), pids).unwrap();
    std::fs::rename(Path::new(&dir).join("tmp"), Path::new(&dir).join("pids")).unwrap();
    let _ = vm.wait();
}

#[test]
fn a_shim_killed_with_sigkill_leaves_no_orphans() {
    let dir = tempfile::tempdir().unwrap();
    let mut shim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "toy_shim", "--nocapture"])
        .env("TOY_SHIM", dir.path())
        .env("TMPDIR", dir.path())
        .spawn()
        .unwrap();
    let end = Instant::now() + LONG;
    let pids = loop {
        if let Ok(text) = std::fs::read_to_string(dir.path().join("pids")) {
            break text;
        }
        assert!(Instant::now() < end, "the shim does not come up");
        std::thread::sleep(Duration::from_millis(5));
    };
    let pids: Vec<u32> = pids.split(' ').map(|p| p.parse().unwrap()).collect();
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    shim.kill().unwrap();
    shim.wait().unwrap();
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(Instant::now() < end, "orphans of {pids:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// A zombie that nobody reaped yet counts as dead.
fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}
