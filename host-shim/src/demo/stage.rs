//! The folder with volume, key and VM spec, and boots of that VM.

use std::fs::OpenOptions;
use std::io::{Read as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use host_shim::host::{self, Binaries};
use host_shim::plan::plan;
use host_shim::supervise::{Console, End, Limits, Options, Outcome, Vm};
use host_shim::{guest, spec};

use super::show::Show;

/// How often the guest writes its secret into one file.
pub(super) const MARKERS: usize = 20_000;
/// The guest's address.
pub(super) const ADDRESS: &str = "10.0.2.15";
/// A boot under TCG takes three seconds; one that takes this long hangs.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// See the module.
pub(super) struct Stage<'a> {
    dir: &'a Path,
    card: &'a Path,
    marker: String,
    instance: String,
}

/// What came of a boot.
pub(super) struct Boot {
    outcome: Outcome,
    console: String,
    /// Log lines, each after who wrote it and a colon.
    pub(super) log: Vec<String>,
    /// Whom the card ran as.
    pub(super) card_user: Option<u32>,
}

impl Boot {
    /// Fails unless the guest ended by itself and nothing else failed.
    pub(super) fn powered_off(&self) -> anyhow::Result<()> {
        if self.outcome.end == End::GuestPoweredOff && self.outcome.is_success() {
            return Ok(());
        }
        let failures: Vec<_> = self
            .outcome
            .failures
            .iter()
            .map(ToString::to_string)
            .collect();
        bail!("{}", failures.join("; "));
    }

    pub(super) fn console_has(&self, text: &str) -> bool {
        self.console.contains(text)
    }
}

impl<'a> Stage<'a> {
    pub(super) fn new(dir: &'a Path, card: &'a Path) -> anyhow::Result<Self> {
        let mut random = [0; 8];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let random = u64::from_ne_bytes(random);
        Ok(Self {
            dir,
            card,
            marker: format!("PLAINTEXT-{random:016x}"),
            // Nothing of the marker, which must be nowhere.
            instance: format!(
                "i-{:016x}",
                random.rotate_left(23).wrapping_mul(0x9e37_79b9)
            ),
        })
    }

    pub(super) fn volume(&self) -> PathBuf {
        self.dir.join("demo.vol")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    fn key(&self) -> PathBuf {
        self.dir.join("demo.key")
    }

    /// What the guest writes, and nobody must find.
    pub(super) fn marker(&self) -> &str {
        &self.marker
    }

    /// What the metadata service says that the guest is.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    fn card(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.card);
        command
            .arg(args[0])
            .arg("--key-file")
            .arg(self.key())
            .args(&args[1..]);
        command.arg(self.volume()).stdin(Stdio::null());
        command
    }

    pub(super) fn create_volume(&self, size: &str) -> anyhow::Result<()> {
        let mut key = [0; 32];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.key())?;
        file.write_all(&key)?;
        let output = self.card(&["create", "--size", size]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "vhost-blk create failed: {}",
            said.trim()
        );
        Ok(())
    }

    /// Authenticates all of the volume. Status 0 is clean, 1 damaged.
    pub(super) fn check(&self) -> anyhow::Result<ExitStatus> {
        let mut command = self.card(&["check"]);
        Ok(command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?)
    }

    /// Boots the guest for one stage of its script, to its end.
    pub(super) fn boot(&self, show: &Show, stage: &str) -> anyhow::Result<Boot> {
        let file = self.dir.join("vm.toml");
        let text = self.spec(stage);
        std::fs::write(&file, &text)?;
        let metadata = format!("instance-id = \"{}\"\n", self.instance);
        std::fs::write(self.dir.join("metadata.toml"), metadata)?;
        let spec = spec::parse(&text, &file).map_err(|error| anyhow::Error::new(*error))?;
        let binaries = Binaries {
            card_dir: self.card.parent().map(Path::to_owned),
            ..Binaries::default()
        };
        let plan = plan(&spec, &host::look_around(&spec, &binaries)?)?;
        if stage == "write" {
            for warning in &plan.warnings {
                show.line(warning);
            }
        }
        let console = Console::default();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, sink, is_verbose) = (Arc::clone(&log), show.line_sink(), show.is_verbose);
        let options = Options {
            console: Box::new(Echo {
                kept: console.clone(),
                partial: Vec::new(),
                show: Box::new(show.line_sink()),
                is_verbose,
            }),
            input: None,
            log: Arc::new(move |who, line| {
                let line = format!("{who}: {line}");
                if is_verbose || is_telling(&line) {
                    sink(&line);
                }
                lines
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(line);
            }),
            limits: Limits::default(),
        };
        let vm = Vm::start(plan, options)?;
        let deadline = Instant::now() + BOOT_TIMEOUT;
        while !console.wait_for("demo: ", Duration::from_millis(50)) {
            ensure!(
                Instant::now() < deadline,
                "the guest says nothing:\n{}",
                console.text()
            );
            if vm.is_over() {
                break;
            }
        }
        // By now it serves, as whom it will to the end.
        let card_user = vm.card_pid(0).and_then(user_of);
        let Ok(outcome) = vm.wait_timeout(deadline.saturating_duration_since(Instant::now()))
        else {
            bail!("the guest hangs:\n{}", console.text());
        };
        let log = std::mem::take(&mut *log.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Boot {
            outcome,
            console: console.text(),
            log,
            card_user,
        })
    }

    fn spec(&self, stage: &str) -> String {
        let (cmdline, marker) = (guest::CMDLINE, &self.marker);
        format!(
            "[vm]\n\
             name = \"demo\"\n\
             memory = \"384M\"\n\
             accel = \"auto\"\n\
             kernel = \"vmlinuz\"\n\
             initrd = \"initrd\"\n\
             cmdline = \"{cmdline} STAGE={stage} SECRET={marker} MARKERS={MARKERS}\"\n\
             \n\
             [[disk]]\n\
             volume = \"demo.vol\"\n\
             key-file = \"demo.key\"\n\
             \n\
             [[nic]]\n\
             ipv4 = \"{ADDRESS}/24\"\n\
             metadata = \"metadata.toml\"\n\
             \n\
             [run]\n\
             dir = \"run\"\n"
        )
    }
}

/// The card's words about damage, and the shim's about failures.
fn is_telling(line: &str) -> bool {
    line.starts_with("shim: ") || line.contains("ERROR") || line.contains("WARN")
}

/// Effective user of a process.
fn user_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Keeps the console, and shows what the guest's script and its kernel's errors say.
struct Echo {
    kept: Console,
    partial: Vec<u8>,
    show: Box<dyn Fn(&str) + Send>,
    is_verbose: bool,
}

impl Write for Echo {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.partial).into_owned();
                    self.partial.clear();
                    if self.is_verbose || line.contains("demo: ") || line.contains("I/O error") {
                        (self.show)(&format!("guest: {}", line.trim_start_matches("demo: ")));
                    }
                }
                b'\r' => {}
                _ if self.partial.len() < 4096 => self.partial.push(byte),
                _ => {}
            }
        }
        self.kept.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
