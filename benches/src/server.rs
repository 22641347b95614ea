//! A server's process: started, watched, its processor time, stopped.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use thiserror::Error;

/// How long a server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a server may take to end when told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
/// Lines of a server's output that an error repeats.
const TAIL_LINES: usize = 12;

/// What went wrong with a server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The program does not start.
    #[error("{program} does not start")]
    Start {
        /// Program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended by itself.
    #[error("{program} ended by itself ({status}); the last it said:\n{tail}")]
    Ended {
        /// Program.
        program: String,
        /// How.
        status: String,
        /// Last lines of its output.
        tail: String,
    },
    /// It does not listen.
    #[error("{program} did not listen on {socket} in time; the last it said:\n{tail}")]
    NotListening {
        /// Program.
        program: String,
        /// Where it should have listened.
        socket: PathBuf,
        /// Last lines of its output.
        tail: String,
    },
    /// Its processor time cannot be read.
    #[error("the processor time of {program} cannot be read: has it ended?")]
    Clock {
        /// Program.
        program: String,
        /// Why.
        source: nix::Error,
    },
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    program: String,
    log: PathBuf,
}

impl Server {
    /// Starts a server whose output goes to `log`, and waits until `socket` exists.
    ///
    /// It gets a process group of its own, so that an interrupt from the terminal reaches only the
    /// benchmark, which then stops its servers in order.
    ///
    /// # Errors
    /// It does not start, ends, or does not listen in time.
    pub fn start(
        program: &Path,
        args: &[OsString],
        socket: &Path,
        log: PathBuf,
    ) -> Result<Self, ServerError> {
        let name = program.display().to_string();
        let start = || {
            let output = File::create(&log)?;
            Command::new(program)
                .args(args)
                .stdin(Stdio::null())
                .stdout(output.try_clone()?)
                .stderr(output)
                .process_group(0)
                .spawn()
        };
        let child = start().map_err(|source| ServerError::Start {
            program: name.clone(),
            source,
        })?;
        let mut server = Self {
            child,
            program: name,
            log,
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while !socket.exists() {
            server.check()?;
            if Instant::now() > deadline {
                return Err(ServerError::NotListening {
                    program: server.program.clone(),
                    socket: socket.to_owned(),
                    tail: server.tail(),
                });
            }
            sleep(POLL);
        }
        Ok(server)
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// [`ServerError::Ended`] if not.
    pub fn check(&mut self) -> Result<(), ServerError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(ServerError::Ended {
                program: self.program.clone(),
                status: status.to_string(),
                tail: self.tail(),
            }),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Processor time since its start: user and system, all threads, ended ones and io_uring
    /// workers included.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu_time(&self) -> Result<Duration, ServerError> {
        cpu_time(self.pid_t()).map_err(|source| ServerError::Clock {
            program: self.program.clone(),
            source,
        })
    }

    /// Memory that it holds now, and the most that it ever held, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<Memory, ServerError> {
        let read = || {
            let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
            Memory::parse(&text)
        };
        read().ok_or_else(|| ServerError::Ended {
            program: self.program.clone(),
            status: "no memory figures".to_owned(),
            tail: self.tail(),
        })
    }

    /// Ends it as a crash would: SIGKILL.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines of its output.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        lines.get(from..).unwrap_or_default().join("\n")
    }

    fn pid_t(&self) -> Pid {
        // Linux's process ids end at 2^22.
        Pid::from_raw(self.child.id().cast_signed())
    }
}

/// Resident memory of a process, in bytes (`proc(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Its own, now (RssAnon): the client's shared memory and the program's text are left out.
    pub resident: u64,
    /// The most that there was of everything (VmHWM), the client's memory included.
    pub peak: u64,
}

impl Memory {
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some(kib << 10)
        };
        Some(Self {
            resident: field("RssAnon:")?,
            peak: field("VmHWM:")?,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The child is not yet waited for, so its id is still its own.
        if self.check().is_err() || kill(self.pid_t(), Signal::SIGTERM).is_err() {
            return;
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if self.check().is_err() {
                return;
            }
            sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of a process.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: Pid) -> Result<Duration, nix::Error> {
    let now = clock_gettime(ClockId::pid_cpu_clock_id(pid)?)?;
    Ok(Duration::from(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, dir: &Path) -> Result<Server, ServerError> {
        let args = [
            "-c".into(),
            script.replace("DIR", &dir.display().to_string()).into(),
        ];
        let (socket, log) = (dir.join("socket"), dir.join("log"));
        Server::start(Path::new("/bin/sh"), &args, &socket, log)
    }

    #[test]
    fn a_server_that_dies_at_once_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let error = start("echo no such key >&2; exit 3", dir.path()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no such key"), "{text}");
        assert!(text.contains("exit status: 3"), "{text}");
    }

    #[test]
    fn memory_is_read_from_what_the_kernel_says() {
        let text = "Name:\tx\nVmHWM:\t    2048 kB\nRssAnon:\t    1024 kB\n";
        let memory = Memory::parse(text).unwrap();
        assert_eq!((memory.resident, memory.peak), (1 << 20, 2 << 20));
        assert_eq!(Memory::parse("Name:\tx\n"), None);
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, log) = (dir.path().join("s"), dir.path().join("l"));
        let error = Server::start(Path::new("/no/such/server"), &[], &socket, log).unwrap_err();
        assert!(error.to_string().contains("/no/such/server"));
    }

    #[test]
    fn a_dropped_server_is_gone_and_its_processor_time_was_counted() {
        let dir = tempfile::tempdir().unwrap();
        let busy = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; : >DIR/socket; exec sleep 60";
        let server = start(busy, dir.path()).unwrap();
        assert!(server.cpu_time().unwrap() > Duration::from_micros(100));
        let pid = server.pid_t();
        drop(server);
        assert!(kill(pid, None).is_err(), "still there");
    }
}
