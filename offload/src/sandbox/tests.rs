//! Each test starts this program again; that forks, to have a process with one thread whatever the
//! test harness runs; and that applies a sandbox, tries things and prints what came of them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Output};

use super::*;

const SCENE: &str = "OFFLOAD_TEST_SANDBOX_SCENE";
const DIRECTORY: &str = "OFFLOAD_TEST_SANDBOX_DIRECTORY";

fn say<T>(name: &str, result: Result<T, impl fmt::Debug>) {
    match result {
        Ok(_) => println!("\nprobe {name}=ok"),
        Err(error) => println!("\nprobe {name}={error:?}"),
    }
}

/// Not a test of its own: the child.
#[test]
fn helper_child() {
    let (Ok(scene), Ok(dir)) = (std::env::var(SCENE), std::env::var(DIRECTORY)) else {
        return;
    };
    // SAFETY: the other thread, the harness's, sleeps until this one ends and holds no lock that
    // the child takes (output is not captured), and glibc makes its allocator usable after `fork`.
    // The child ends below without returning.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let played = std::panic::catch_unwind(|| play(&scene, Path::new(&dir)));
        let _ = io::stdout().flush();
        // SAFETY: ends the process; nothing is to be cleaned up.
        unsafe { libc::_exit(i32::from(played.is_err())) };
    }
    let mut status = 0;
    // SAFETY: `status` lives and is writable.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    println!(
        "\nprobe end={:?}",
        ExitStatus::from_raw(status).signal().ok_or(status)
    );
}

fn play(scene: &str, dir: &Path) {
    let open = File::options()
        .read(true)
        .write(true)
        .open(dir.join("open"))
        .unwrap();
    let listener = UnixListener::bind(dir.join("own.sock")).unwrap();
    let builder = match scene {
        "closed" => Sandbox::builder(),
        "user" => Sandbox::builder().user(User {
            uid: 65534,
            gid: 65534,
        }),
        "death-signal" => {
            let signal = Some(rustix::process::Signal::KILL);
            rustix::process::set_parent_process_death_signal(signal).unwrap();
            let user = User {
                uid: 65534,
                gid: 65534,
            };
            say(
                "apply",
                Sandbox::builder().user(user).seccomp(Seccomp::Off).apply(),
            );
            let kept = rustix::process::parent_process_death_signal();
            say("kept", (kept == Ok(signal)).then_some(()).ok_or(kept));
            return;
        }
        "paths" => Sandbox::builder()
            .read(dir.join("readable"))
            .read_write(dir.join("writable"))
            .remove_in(dir),
        "files-only" => Sandbox::builder()
            .read(dir.join("readable"))
            .seccomp(Seccomp::Off),
        "log" => Sandbox::builder().seccomp(Seccomp::Log),
        "kill" => Sandbox::builder().seccomp(Seccomp::Kill),
        "extra" => Sandbox::builder().allow_calls(&[libc::SYS_socket]),
        "missing" => Sandbox::builder().read(dir.join("missing")),
        "thread" => {
            let (_keep, wait) = std::sync::mpsc::channel::<()>();
            let _thread = std::thread::spawn(move || wait.recv());
            say("apply", Sandbox::builder().apply());
            return;
        }
        "trim" => {
            say("apply", Sandbox::builder().seccomp(Seccomp::Kill).apply());
            let shrinks = std::thread::spawn(|| {
                // Smaller than what `malloc` maps one by one, so they come from the thread's heap.
                let blocks: Vec<Vec<u8>> = (0..1000).map(|n| vec![n as u8; 60 << 10]).collect();
                let sum: usize = blocks.iter().map(Vec::len).sum();
                blocks.into_iter().rev().for_each(drop);
                sum
            });
            say("trimmed", shrinks.join());
            return;
        }
        other => panic!("{other}"),
    };
    let report = builder.apply();
    match &report {
        Ok(report) => {
            println!("\nprobe landlock={}", report.landlock);
            println!("\nprobe bounding={}", report.bounding_set_emptied);
            println!("\nprobe report={report}");
        }
        Err(error) => println!("\nprobe error={error}"),
    }
    let applied = report.is_ok();
    say("apply", report);
    if applied {
        allowed(&open, &listener);
        forbidden(dir);
        say("status", status());
    }
}

/// What a card does all day.
fn allowed(mut open: &File, listener: &UnixListener) {
    say(
        "write",
        open.write_all(b"data").and_then(|()| open.sync_data()),
    );
    say("metadata", open.metadata());
    say(
        "thread",
        std::thread::Builder::new()
            .name("worker".into())
            .spawn(|| ())
            .map(|t| t.join()),
    );
    say(
        "memory",
        std::hint::black_box(vec![1_u8; 64 << 20]).pop().ok_or(()),
    );
    say("pipe", rustix::pipe::pipe());
    say(
        "eventfd",
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC),
    );
    let ring = io_uring::IoUring::new(8).and_then(|mut ring| {
        let entry = io_uring::opcode::Nop::new().build().user_data(7);
        // SAFETY: a Nop refers to no memory.
        unsafe { ring.submission().push(&entry).map_err(io::Error::other)? };
        ring.submit_and_wait(1)?;
        match ring.completion().next() {
            Some(entry) if entry.user_data() == 7 => Ok(()),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    });
    say("io_uring", ring);
    say("stop", crate::stop::StopSignal::new());
    say("listener", listener.set_nonblocking(true));
    let accept = listener.accept().map(|_| ());
    say(
        "accept",
        accept.or_else(|e| {
            if e.kind() == io::ErrorKind::WouldBlock {
                Ok(())
            } else {
                Err(e)
            }
        }),
    );
    say("random", getrandom());
    std::thread::sleep(std::time::Duration::from_millis(1));
    say("sleep", Ok::<_, ()>(()));
}

fn getrandom() -> io::Result<()> {
    rustix::rand::getrandom(&mut [0_u8; 16][..], rustix::rand::GetRandomFlags::empty())?;
    Ok(())
}

/// What an attacker would like to do.
fn forbidden(dir: &Path) {
    say("open_readable", File::open(dir.join("readable/file")));
    say(
        "open_writable",
        File::options().write(true).open(dir.join("writable")),
    );
    say(
        "write_readable",
        File::options().write(true).open(dir.join("readable/file")),
    );
    say("open_other", File::open("/etc/passwd"));
    say("create", File::create(dir.join("new")));
    say("remove", fs::remove_file(dir.join("own.sock")));
    say("execute", Command::new("/bin/true").status());
    say("socket", UnixDatagram::unbound());
    say("connect", UnixStream::connect(dir.join("peer.sock")));
    say(
        "kill",
        rustix::process::kill_process(
            rustix::process::getppid().unwrap(),
            rustix::process::Signal::URG,
        ),
    );
    // SAFETY: the mapping is new, refers to no object of ours and is never used.
    let executable = unsafe {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let prot = ProtFlags::READ | ProtFlags::EXEC;
        mmap_anonymous(std::ptr::null_mut(), 4096, prot, MapFlags::PRIVATE)
    };
    say("executable_memory", executable);
    say(
        "become_root",
        rustix::thread::set_thread_uid(rustix::process::Uid::ROOT),
    );
}

/// The process as it sees itself, by calls that a filter lets through.
fn status() -> Result<(), ()> {
    let limit = |resource| rustix::process::getrlimit(resource);
    println!(
        "\nprobe core_limit={:?}",
        limit(rustix::process::Resource::Core).maximum
    );
    println!(
        "\nprobe file_limit={:?}",
        limit(rustix::process::Resource::Nofile).current
    );
    println!("\nprobe uid={}", rustix::process::getuid().as_raw());
    Ok(())
}

struct Scene {
    output: Output,
    probes: BTreeMap<String, String>,
}

impl Scene {
    fn play(scene: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        fs::create_dir(path.join("readable")).unwrap();
        for file in ["open", "readable/file", "writable"] {
            fs::write(path.join(file), "").unwrap();
        }
        let _peer = UnixListener::bind(path.join("peer.sock")).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::helper_child", "--nocapture"])
            .env(SCENE, scene)
            .env(DIRECTORY, path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let probes = text
            .lines()
            .filter_map(|line| line.strip_prefix("probe ")?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Self { output, probes }
    }

    #[track_caller]
    fn get(&self, name: &str) -> &str {
        self.probes.get(name).unwrap_or_else(|| {
            panic!(
                "no {name} in {:?}\n{}",
                self.probes,
                String::from_utf8_lossy(&self.output.stderr)
            )
        })
    }

    #[track_caller]
    fn ok(&self, names: &[&str]) {
        for name in names {
            assert_eq!(self.get(name), "ok", "{name}");
        }
    }

    #[track_caller]
    fn refused(&self, names: &[&str]) {
        for name in names {
            let result = self.get(name).to_owned();
            let denied = ["code: 1,", "code: 13,", "Os { code: 1 ", "Os { code: 13 "];
            assert!(
                denied.iter().any(|text| result.contains(text)),
                "{name}: {result}"
            );
        }
    }
}

const ALLOWED: [&str; 12] = [
    "write", "metadata", "thread", "memory", "pipe", "eventfd", "io_uring", "stop", "listener",
    "accept", "random", "sleep",
];

#[test]
fn a_closed_sandbox_lets_a_card_work_and_nothing_else() {
    let scene = Scene::play("closed");
    scene.ok(&["apply"]);
    scene.ok(&ALLOWED);
    scene.refused(&[
        "open_readable",
        "open_writable",
        "write_readable",
        "open_other",
        "create",
        "remove",
        "execute",
        "socket",
        "connect",
        "kill",
        "executable_memory",
        "become_root",
    ]);
    assert_eq!(scene.get("core_limit"), "Some(0)");
    assert_eq!(scene.get("file_limit"), "Some(1024)");
    assert_eq!(scene.get("end"), "Err(0)");
}

#[test]
fn paths_kept_in_reach_can_be_opened_as_asked_and_others_cannot() {
    let scene = Scene::play("paths");
    scene.ok(&["apply"]);
    scene.ok(&ALLOWED);
    scene.ok(&["open_readable", "open_writable", "remove"]);
    scene.refused(&["execute", "socket", "connect"]);
    if scene.get("landlock") == "not at all" {
        eprintln!("partly skipped: this kernel has no Landlock");
        return;
    }
    scene.refused(&["write_readable", "open_other", "create"]);
}

#[test]
fn landlock_alone_keeps_files_out_of_reach() {
    let scene = Scene::play("files-only");
    scene.ok(&["apply"]);
    scene.ok(&ALLOWED);
    scene.ok(&["open_readable", "socket", "executable_memory"]);
    if scene.get("landlock") == "not at all" {
        eprintln!("partly skipped: this kernel has no Landlock");
        return;
    }
    scene.refused(&[
        "write_readable",
        "open_writable",
        "open_other",
        "create",
        "remove",
        "execute",
    ]);
}

#[test]
fn the_death_signal_survives_the_change_of_user() {
    if rustix::process::geteuid().is_root() {
        Scene::play("death-signal").ok(&["apply", "kept"]);
    }
}

#[test]
fn root_turns_into_the_user_asked_for_and_cannot_return() {
    let scene = Scene::play("user");
    if !rustix::process::geteuid().is_root() {
        assert!(scene.get("error").contains("not started by root"));
        return;
    }
    scene.ok(&["apply"]);
    scene.ok(&ALLOWED);
    scene.refused(&["become_root", "open_other"]);
    assert_eq!(scene.get("uid"), "65534");
    assert!(
        scene
            .get("report")
            .starts_with("user 65534, group 65534, no capabilities")
    );
    assert_eq!(scene.get("bounding"), "true");
}

#[test]
fn the_log_mode_carries_calls_out_but_the_other_steps_hold() {
    let scene = Scene::play("log");
    scene.ok(&["apply", "socket", "executable_memory"]);
    if scene.get("landlock") != "not at all" {
        scene.refused(&["open_other"]);
    }
}

#[test]
fn the_kill_mode_ends_the_process_at_the_first_foreign_call() {
    let scene = Scene::play("kill");
    scene.ok(&ALLOWED);
    assert_eq!(scene.get("end"), format!("Ok({})", libc::SIGSYS));
    // Opening is refused only: the C library tries that by itself.
    scene.refused(&["open_readable", "open_other", "create"]);
    assert!(!scene.probes.contains_key("remove"));
}

#[test]
fn a_threads_heap_that_shrinks_does_not_end_the_process_in_kill_mode() {
    let scene = Scene::play("trim");
    scene.ok(&["apply", "trimmed"]);
    assert_eq!(scene.get("end"), "Err(0)");
}

#[test]
fn a_call_can_be_added_to_the_list() {
    let scene = Scene::play("extra");
    scene.ok(&["socket"]);
    scene.refused(&["connect", "execute"]);
}

#[test]
fn a_path_that_is_not_there_is_an_error_that_names_it() {
    let scene = Scene::play("missing");
    assert!(
        scene.get("error").contains("missing"),
        "{}",
        scene.get("error")
    );
    assert!(!scene.probes.contains_key("write"));
}

#[test]
fn beside_other_threads_the_sandbox_refuses_to_apply() {
    assert_eq!(Scene::play("thread").get("apply"), "Threads(2)");
}
