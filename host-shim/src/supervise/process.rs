//! Starting a child that cannot outlive the shim, and waiting for it.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::machine::{EndKind, Ending};
use super::vm::LogSink;
use crate::plan::Process;

/// Lines of standard error kept for the report of a failure.
const LAST_WORDS: usize = 8;
/// Longest line of a child that is passed on; the rest of it is cut off.
const LINE_MAX_BYTES: u64 = 4096;
/// How long an ended child's standard error is still read. Whoever inherited it may hold it open.
const STDERR_GRACE: Duration = Duration::from_millis(300);

/// A child that was started.
pub(super) struct Started {
    /// For signals: unlike a process id it cannot come to mean another process.
    pub(super) pidfd: OwnedFd,
    /// For people and tests.
    pub(super) pid: u32,
    /// Its standard input and output, when they were asked for.
    pub(super) stdio: Option<(ChildStdin, ChildStdout)>,
}

/// Whether the child's standard input and output are piped or nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stdio2 {
    Null,
    Piped,
}

/// Starts `process` on this thread, whose death (or the process's) kills the child. `on_end` is
/// called once, on another thread, when it has ended and its last words are read.
pub(super) fn start(
    process: &Process,
    stdio: Stdio2,
    log: LogSink,
    on_end: impl FnOnce(Ending) + Send + 'static,
) -> io::Result<Started> {
    let mut command = Command::new(&process.program);
    command
        .args(&process.args)
        .process_group(0)
        .stderr(Stdio::piped());
    let piped = |yes: bool| if yes { Stdio::piped() } else { Stdio::null() };
    command.stdin(piped(stdio == Stdio2::Piped));
    command.stdout(piped(stdio == Stdio2::Piped));
    let parent = rustix::process::getpid();
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe
    // work is allowed: it makes plain system calls and allocates nothing (an error is a bare errno).
    unsafe {
        command.pre_exec(move || give_up_before_exec(parent));
    }
    let mut child = command.spawn()?;
    let pid = Pid::from_child(&child);
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(e) => {
            // Nothing may run that cannot be stopped. If the kill fails it is gone already.
            let _ = child.kill();
            let _ = child.wait();
            return Err(e.into());
        }
    };
    let piped = match (child.stdin.take(), child.stdout.take()) {
        (Some(stdin), Some(stdout)) => Some((stdin, stdout)),
        _ => None,
    };
    let (words_sender, words) = mpsc::channel();
    if let Some(stderr) = child.stderr.take() {
        let label = process.label.clone();
        spawn_thread("stderr", move || {
            read_lines(stderr, &label, &log, &words_sender)
        })?;
    }
    spawn_thread("wait", move || on_end(wait(child, &words)))?;
    Ok(Started {
        pidfd,
        pid: pid.as_raw_nonzero().get().unsigned_abs(),
        stdio: piped,
    })
}

/// Runs in the child. No core dump may hold a key or guest memory, no exec may gain rights, and the
/// child dies with its parent.
fn give_up_before_exec(parent: Pid) -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, set_parent_process_death_signal, setrlimit};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    if rustix::process::getppid() != Some(parent) {
        return Err(rustix::io::Errno::SRCH.into());
    }
    rustix::thread::set_no_new_privs(true)?;
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    Ok(())
}

/// Sends a signal; that the child has ended already is fine.
pub(super) fn signal(pidfd: &OwnedFd, signal: Signal) {
    // The only error there can be for our own child is that it is gone.
    let _ = rustix::process::pidfd_send_signal(pidfd, signal);
}

pub(super) fn spawn_thread(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
}

fn wait(mut child: Child, words: &mpsc::Receiver<String>) -> Ending {
    let kind = match child.wait() {
        Ok(status) => end_kind(status),
        Err(e) => EndKind::NotStarted(format!("waiting for it failed: {e}")),
    };
    let mut last_words = VecDeque::new();
    // Ends when the reader hangs up, which is when every copy of the pipe is closed.
    while let Ok(line) = words.recv_timeout(STDERR_GRACE) {
        if last_words.len() == LAST_WORDS {
            last_words.pop_front();
        }
        last_words.push_back(line);
    }
    Ending {
        kind,
        last_words: last_words.into(),
    }
}

fn end_kind(status: ExitStatus) -> EndKind {
    match (status.code(), status.signal()) {
        (Some(code), _) => EndKind::Exited(code),
        (None, Some(signal)) => EndKind::Signalled(signal),
        (None, None) => EndKind::NotStarted(format!("{status}")),
    }
}

fn read_lines(stderr: impl Read, label: &str, log: &LogSink, words: &mpsc::Sender<String>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader)
            .take(LINE_MAX_BYTES)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end();
                log(label, text);
                // Nobody listens any more once the child was waited for.
                let _ = words.send(text.to_owned());
            }
        }
    }
}
