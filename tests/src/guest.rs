//! A VM that `host-shim run` keeps running, and conversations with what runs in it.

use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use host_shim::guest::CMDLINE;
use rustix::process::{Pid, Signal};

use crate::binaries::binary;
use crate::lab::{Lab, Volume, text};

/// Patience with anything. Far more than is needed: machines that run tests are slow and shared.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest runs to answer one connection to `port` with what it says, and to know that it
/// listens.
#[must_use]
pub fn echo_on(port: u16) -> String {
    format!(
        "nc -l -p {port} -e cat >/dev/null 2>&1 & \
         until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':{port:04X} .*:0000 0A'; do sleep 0.1; done"
    )
}

/// A disk of a VM.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What it is on.
    pub volume: Volume,
    /// Lines for its `[[disk]]` section, besides volume and key.
    pub more: &'static str,
}

impl Disk {
    /// A plain one.
    #[must_use]
    pub fn of(volume: &Volume) -> Self {
        Self::with(volume, "")
    }

    /// One that is ephemeral, as `more` has to say, in this folder.
    #[must_use]
    pub fn ephemeral(folder: &Path, more: &'static str) -> Self {
        let volume = Volume {
            path: folder.into(),
            key: PathBuf::new(),
        };
        Self { volume, more }
    }

    /// One with further settings.
    #[must_use]
    pub fn with(volume: &Volume, more: &'static str) -> Self {
        Self {
            volume: volume.clone(),
            more,
        }
    }
}

/// Text that grows, and those who wait for something in it.
#[derive(Clone, Default)]
struct Text(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    is_closed: bool,
}

impl Text {
    /// Reads `from` to its end in a thread of its own.
    fn follow(mut from: impl Read + Send + 'static) -> Self {
        let text = Self::default();
        let writer = text.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let got = from.read(&mut buffer).unwrap_or(0);
                let mut state = writer.0.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.bytes.extend_from_slice(&buffer[..got]);
                state.is_closed = got == 0;
                writer.0.1.notify_all();
                if got == 0 {
                    return;
                }
            }
        });
        text
    }

    /// Waits until `find` finds something in the text from `from` on; `None` when it is late or the
    /// text is complete without.
    fn wait<T>(
        &self,
        from: usize,
        patience: Duration,
        mut find: impl FnMut(&str) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + patience;
        let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let is_closed = state.is_closed;
            let text = String::from_utf8_lossy(state.bytes.get(from..).unwrap_or_default());
            if let Some(found) = find(&text) {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if is_closed || left.is_zero() {
                return None;
            }
            state = self
                .0
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn all(&self) -> String {
        let state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&state.bytes).into_owned()
    }

    fn len(&self) -> usize {
        let state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes.len()
    }
}

/// A shim, and what it started.
pub struct Vm {
    child: Child,
    keyboard: Option<ChildStdin>,
    console: Text,
    log: Text,
    /// Where of the console what was not yet looked at begins.
    seen: usize,
    commands: u32,
}

/// How a shim ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if a signal killed it.
    pub status: Option<i32>,
    /// What it wrote to its standard error.
    pub log: String,
    /// What the guest printed.
    pub console: String,
}

impl Vm {
    /// Starts `host-shim run` on a VM of `disks`; `more` are further lines of its `[vm]` section, `memory`
    /// first if it is among them, and sections behind it.
    /// Does not wait for anything.
    ///
    /// # Panics
    /// When the shim cannot be started.
    #[must_use]
    pub fn start(lab: &Lab, disks: &[Disk], more: &str) -> Self {
        let spec = lab.path("vm.toml");
        std::fs::write(&spec, spec_text(disks, more)).expect("room");
        let mut command = Command::new(binary("host-shim"));
        command.arg("run").arg(&spec);
        if let Some(qemu) = std::env::var_os("OFFLOAD_QEMU") {
            command.arg("--qemu").arg(qemu);
            let data = std::env::var_os("OFFLOAD_QEMU_DATA").unwrap_or_default();
            for dir in std::env::split_paths(&data).filter(|d| !d.as_os_str().is_empty()) {
                command.arg("--qemu-data").arg(dir);
            }
        }
        Self::of(command)
    }

    /// Starts QEMU itself on a guest whose only disk is what a card serves at `socket`; QEMU does not
    /// come back to a card that ends. What is said of the shim here is then true of QEMU.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn on_card(lab: &Lab, socket: &Path) -> Self {
        let qemu = std::env::var_os("OFFLOAD_QEMU");
        let mut command = Command::new(qemu.unwrap_or_else(|| "qemu-system-x86_64".into()));
        let data = std::env::var_os("OFFLOAD_QEMU_DATA").unwrap_or_default();
        for dir in std::env::split_paths(&data).filter(|d| !d.as_os_str().is_empty()) {
            command.arg("-L").arg(dir);
        }
        command
            .args(["-machine", "q35,memory-backend=mem", "-accel", "tcg"])
            .args(["-cpu", "max", "-m", "256M", "-display", "none"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .arg("-kernel")
            .arg(lab.path("vmlinuz"))
            .arg("-initrd")
            .arg(lab.path("initrd"))
            .args(["-append", CMDLINE])
            .args(["-chardev", &format!("socket,id=card,path={}", text(socket))])
            .args(["-device", "vhost-user-blk-pci,chardev=card,num-queues=1"])
            .args(["-serial", "stdio"]);
        Self::of(command)
    }

    fn of(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let console = Text::follow(child.stdout.take().expect("piped"));
        let log = Text::follow(child.stderr.take().expect("piped"));
        Self {
            keyboard: child.stdin.take(),
            child,
            console,
            log,
            seen: 0,
            commands: 0,
        }
    }

    /// Starts a VM and waits until its guest takes commands.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot(lab: &Lab, disks: &[Disk]) -> Self {
        let mut vm = Self::start(lab, disks, "");
        vm.wait_ready();
        vm
    }

    /// Waits until the guest takes commands, at its first boot or a later one.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_ready(&mut self) {
        self.wait_for_line(|line| line.ends_with("@@ready").then_some(()));
    }

    /// Waits for a line of the console that `find` likes. What came before it counts as seen.
    ///
    /// # Panics
    /// When there is none.
    pub fn wait_for_line<T>(&mut self, mut find: impl FnMut(&str) -> Option<T>) -> T {
        let found = self.console.wait(self.seen, PATIENCE, |text| {
            let mut at = 0;
            for line in text.split_inclusive('\n') {
                at += line.len();
                if line.ends_with('\n')
                    && let Some(found) = find(line.trim_end())
                {
                    return Some((at, found));
                }
            }
            None
        });
        let Some((at, found)) = found else {
            panic!("the guest does not answer: {}", self.story());
        };
        self.seen += at;
        found
    }

    /// Takes all that the guest has printed so far as seen.
    pub fn skip_console(&mut self) {
        self.seen = self.console.len();
    }

    /// Types a command. [`Vm::answer`] waits for its end.
    ///
    /// # Panics
    /// When the shim is gone.
    pub fn type_command(&mut self, command: &str) {
        assert!(!command.contains('\n') && command.len() < 4000, "one line");
        self.commands += 1;
        let line = format!("{} {command}\n", self.commands);
        let typed = self
            .keyboard
            .as_mut()
            .map(|keyboard| keyboard.write_all(line.as_bytes()));
        assert!(matches!(typed, Some(Ok(()))), "{typed:?}: {}", self.story());
    }

    /// Waits for the end of the command typed last: what it printed that was not seen yet, and its
    /// exit status.
    ///
    /// # Panics
    /// When it does not end.
    pub fn answer(&mut self) -> (String, i32) {
        let marker = format!("@@{} ", self.commands);
        let from = self.seen;
        let status = self.wait_for_line(|line| {
            let (_, status) = line.split_once(&marker)?;
            Some(status.parse().unwrap_or(-1))
        });
        let all = self.console.all();
        let answer = all.get(from..self.seen).unwrap_or_default();
        let printed = answer
            .rsplit_once(&marker)
            .map_or("", |(printed, _)| printed);
        (printed.to_owned(), status)
    }

    /// Runs a command in the guest: what it printed, and its exit status.
    pub fn run(&mut self, command: &str) -> (String, i32) {
        self.type_command(command);
        self.answer()
    }

    /// Runs a command in the guest that must succeed; what it printed.
    pub fn ok(&mut self, command: &str) -> String {
        let (printed, status) = self.run(command);
        assert_eq!(status, 0, "`{command}`: {printed}\n{}", self.story());
        printed
    }

    /// Waits until the log has `needle`, which may be there already.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for_log(&self, needle: &str) {
        let found = self
            .log
            .wait(0, PATIENCE, |text| text.contains(needle).then_some(()));
        assert!(found.is_some(), "no `{needle}`: {}", self.story());
    }

    /// What shim, cards and QEMU logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.all()
    }

    /// Everything the guest printed so far.
    #[must_use]
    pub fn console(&self) -> String {
        self.console.all()
    }

    /// The card of disk `index`.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn card(&self, index: usize) -> Process {
        self.card_of(&format!("disk{index}"))
    }

    /// The card of network interface `index`.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn nic(&self, index: usize) -> Process {
        self.card_of(&format!("nic{index}"))
    }

    fn card_of(&self, label: &str) -> Process {
        let socket = format!("/{label}/vhost.sock");
        let is_card = |p: &Process| p.command.contains(" serve ") && p.command.contains(&socket);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(card) = self.children().into_iter().find(is_card) {
                return card;
            }
            assert!(Instant::now() < end, "no card: {}", self.story());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// QEMU's process.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn qemu(&self) -> Process {
        let is_qemu = |p: &Process| p.command.contains("vhost-user-blk-pci");
        self.children()
            .into_iter()
            .find(is_qemu)
            .unwrap_or_else(|| panic!("no QEMU: {}", self.story()))
    }

    /// What the shim started and still runs.
    #[must_use]
    pub fn children(&self) -> Vec<Process> {
        let shim = self.child.id();
        let mut all = processes();
        all.retain(|p| p.parent == shim);
        all
    }

    /// The shim's own process id.
    #[must_use]
    pub fn shim(&self) -> u32 {
        self.child.id()
    }

    /// Powers the guest off and waits for the end, which must be a success and leave no process.
    pub fn power_off(mut self) -> Ended {
        let children = self.children();
        self.type_command("sync; poweroff -f");
        let ended = self.wait();
        assert_eq!(ended.status, Some(0), "{}", ended.log);
        assert!(ended.log.contains("the guest powered off"), "{}", ended.log);
        for child in children {
            assert!(!child.lives(), "{child:?} outlived the shim");
        }
        ended
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait(mut self) -> Ended {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                break status;
            }
            assert!(Instant::now() < end, "does not end: {}", self.story());
            std::thread::sleep(Duration::from_millis(10));
        };
        // Both close when the shim is gone.
        for text in [&self.console, &self.log] {
            let _: Option<()> = text.wait(0, Duration::from_secs(5), |_| None);
        }
        Ended {
            status: status.code(),
            log: self.log.all(),
            console: self.console.all(),
        }
    }

    fn story(&self) -> String {
        format!(
            "\n--- console\n{}\n--- log\n{}",
            self.console.all(),
            self.log.all()
        )
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The shim's children die with it. Fails if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spec_text(disks: &[Disk], more: &str) -> String {
    let memory = if more.starts_with("memory = ") {
        ""
    } else {
        "memory = \"256M\"\n"
    };
    let mut spec = format!(
        "[vm]\nname = \"e2e\"\n{memory}accel = \"tcg\"\nkernel = \"vmlinuz\"\n\
         initrd = \"initrd\"\ncmdline = \"{CMDLINE}\"\n{more}\n[run]\ndir = \"run\"\n\
         stop-timeout = 1\n"
    );
    for disk in disks {
        let key = match text(&disk.volume.key) {
            "" => String::new(),
            key => format!("key-file = \"{key}\"\n"),
        };
        spec.push_str(&format!(
            "[[disk]]\nvolume = \"{}\"\n{key}{}\n",
            text(&disk.volume.path),
            disk.more
        ));
    }
    spec
}

/// A process of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent's id.
    pub parent: u32,
    /// When it started, in ticks since boot: with the id this names a process for good.
    start: u64,
    /// Its command line, with spaces.
    pub command: String,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let stat = std::fs::read_to_string(dir.join("stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        if fields.first() == Some(&"Z") {
            return None;
        }
        let command = std::fs::read(dir.join("cmdline")).ok()?;
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
            command: String::from_utf8_lossy(&command).replace('\0', " "),
        })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn lives(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.start == self.start)
    }

    /// Sends it a signal. That it is gone is no error.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Panics
    /// When it stays.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        let end = Instant::now() + PATIENCE;
        while self.lives() {
            assert!(Instant::now() < end, "{self:?} does not die");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// All processes of this host.
#[must_use]
pub fn processes() -> Vec<Process> {
    let Ok(dir) = std::fs::read_dir(Path::new("/proc")) else {
        return Vec::new();
    };
    dir.filter_map(|entry| Process::read(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .collect()
}
