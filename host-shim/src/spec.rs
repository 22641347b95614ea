//! The VM spec: the TOML file that says what a virtual machine is made of.
//!
//! ```toml
//! [vm]
//! name = "web1"
//! memory = "512M"
//! cpus = 2
//! accel = "auto"              # or "kvm", "tcg"
//! kernel = "vmlinuz"          # direct boot; without it SeaBIOS boots from the first disk
//! initrd = "initrd.img"
//! cmdline = "root=/dev/vda console=ttyS0"
//!
//! [[disk]]
//! volume = "root.vol"
//! key-file = "root.key"       # or passphrase-file
//! serial = "vol0123456789abcdef0"
//! queues = 2
//! iops = 3000                 # provisioned; with bps, bursts and io-size
//! iops-burst = "10000:60"
//!
//! [[nic]]
//! publish = ["8080:80"]       # a port of the host's loopback that leads into the guest
//! metadata = "web1-metadata.toml"
//!
//! [run]
//! dir = "/run/offload/web1"
//! user = "nobody"
//! stop-timeout = 20           # seconds a guest gets to power itself off
//! ```
//!
//! What a file says is checked here once and for all: [`parse`] turns text into a [`VmSpec`] whose
//! fields need no second look, or into a [`SpecError`] that points at the offending place. Unknown
//! fields are refused, since a misspelt `read-only` that is silently ignored costs somebody data.
//! Relative paths are taken from the folder of the spec file, so that it can be run from anywhere.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use miette::{Diagnostic, NamedSource, SourceSpan};
use serde::{Deserialize, Serialize};
use toml::Spanned;

mod limits;
mod nic;
#[cfg(test)]
mod tests;

use limits::{Amount, Limit};
pub use nic::{FlowLog, Ipv4Net, Nic, Traffic};

/// Longest serial virtio-blk can hand to a guest (virtio 1.3, 5.2.6: `VIRTIO_BLK_T_GET_ID`).
pub const SERIAL_MAX_BYTES: usize = 20;
/// Least guest memory accepted, in bytes: below it no kernel of today starts.
pub const MEMORY_MIN_BYTES: u64 = 32 << 20;
/// Most queues a disk may ask for.
pub const QUEUES_MAX: u16 = 64;
/// Seconds a guest gets to power itself off when the spec does not say.
pub const STOP_TIMEOUT_DEFAULT_S: u64 = 20;

/// What is wrong with a spec, and where.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{message}")]
pub struct SpecError {
    /// What is wrong.
    message: String,
    /// What to do about it.
    #[help]
    help: Option<String>,
    #[source_code]
    source_code: NamedSource<String>,
    #[label("{label}")]
    at: Option<SourceSpan>,
    label: String,
}

impl SpecError {
    /// Byte range of the offending place, where it has one.
    #[must_use]
    pub fn span(&self) -> Option<Range<usize>> {
        self.at.map(|s| s.offset()..s.offset() + s.len())
    }
}

/// Which accelerator runs the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where a probe shows that it runs guests at native speed, else TCG with a warning.
    #[default]
    Auto,
    /// KVM, without a question.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// Where a volume's key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeySource {
    /// A file with 32 raw bytes or 64 hex digits.
    KeyFile(PathBuf),
    /// A file with a passphrase.
    PassphraseFile(PathBuf),
    /// Nowhere: the card makes a new volume of so many bytes with a key that it keeps to itself. When
    /// the card ends, the data are gone.
    Ephemeral(u64),
}

/// How the guest starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// QEMU loads the kernel itself.
    Kernel {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
    },
    /// Firmware boots from the first disk.
    Disk {
        /// Firmware image; QEMU's SeaBIOS without it.
        firmware: Option<PathBuf>,
    },
}

/// One disk: a sealed volume behind a block card of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Backing file or block device of the volume; of an ephemeral one, the folder that its file is
    /// made in, without a name.
    pub volume: PathBuf,
    /// Where its key comes from.
    pub key: KeySource,
    /// The guest may not write.
    pub read_only: bool,
    /// What GET_ID answers; the volume's own id without it.
    pub serial: Option<String>,
    /// Virtqueues.
    pub queues: u16,
    /// Descriptors a virtqueue, a power of two.
    pub queue_size: Option<u16>,
    /// Options of limits and their values, as the card takes them: `iops`, `3000`.
    pub limits: Vec<(&'static str, String)>,
}

/// A virtual machine, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmSpec {
    /// Names the run directory and QEMU's process: letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Guest memory.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u16,
    /// Accelerator.
    pub accel: AccelChoice,
    /// How it starts.
    pub boot: Boot,
    /// End QEMU when the guest reboots, instead of starting it again.
    pub exit_on_reboot: bool,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Network interfaces, in the order the guest sees them.
    pub nics: Vec<Nic>,
    /// Run directory, when the file names one.
    pub run_dir: Option<PathBuf>,
    /// User the cards run as when the shim is root: a name or `UID:GID`.
    pub user: Option<String>,
    /// Seconds a guest gets to power itself off.
    pub stop_timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSpec {
    vm: RawVm,
    #[serde(default)]
    disk: Vec<Spanned<RawDisk>>,
    #[serde(default)]
    nic: Vec<nic::RawNic>,
    #[serde(default)]
    run: RawRun,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawVm {
    name: Spanned<String>,
    memory: Spanned<String>,
    #[serde(default = "one_cpu")]
    cpus: Spanned<u16>,
    #[serde(default)]
    accel: AccelChoice,
    kernel: Option<PathBuf>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<Spanned<String>>,
    firmware: Option<Spanned<PathBuf>>,
    #[serde(default)]
    exit_on_reboot: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawDisk {
    volume: Spanned<PathBuf>,
    key_file: Option<PathBuf>,
    passphrase_file: Option<PathBuf>,
    ephemeral: Option<Spanned<String>>,
    #[serde(default)]
    read_only: bool,
    serial: Option<Spanned<String>>,
    queues: Option<Spanned<u16>>,
    queue_size: Option<Spanned<u16>>,
    iops: Option<Spanned<Amount>>,
    iops_burst: Option<Spanned<Amount>>,
    bps: Option<Spanned<Amount>>,
    bps_burst: Option<Spanned<Amount>>,
    io_size: Option<Spanned<Amount>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawRun {
    dir: Option<PathBuf>,
    user: Option<String>,
    stop_timeout: Option<u64>,
}

fn one_cpu() -> Spanned<u16> {
    Spanned::new(0..0, 1)
}

/// Reads a spec. `file` names it in diagnostics, and its folder is where relative paths start.
///
/// # Errors
/// [`SpecError`] points at the first thing that is wrong.
pub fn parse(text: &str, file: &Path) -> Result<VmSpec, Box<SpecError>> {
    let check = Checker { text, file };
    let raw: RawSpec = toml::from_str(text)
        .map_err(|e| check.error(e.span(), e.message().to_owned(), "here", None))?;
    check.spec(raw)
}

/// Reads a size such as `512M` or `2GiB` (powers of 1024; a bare number is bytes).
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Whether a text can name a VM, which becomes a folder of the run directory.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=64).contains(&text.len()) && text.chars().all(plain) && !text.starts_with(['.', '-'])
}

struct Checker<'a> {
    text: &'a str,
    file: &'a Path,
}

impl Checker<'_> {
    fn error(
        &self,
        at: Option<Range<usize>>,
        message: String,
        label: &str,
        help: Option<&str>,
    ) -> Box<SpecError> {
        Box::new(SpecError {
            message,
            help: help.map(str::to_owned),
            source_code: NamedSource::new(self.file.display().to_string(), self.text.to_owned())
                .with_language("TOML"),
            at: at.map(SourceSpan::from),
            label: label.to_owned(),
        })
    }

    fn path(&self, path: &Path) -> PathBuf {
        match self.file.parent() {
            Some(folder) => folder.join(path),
            None => path.to_owned(),
        }
    }

    fn spec(&self, raw: RawSpec) -> Result<VmSpec, Box<SpecError>> {
        let name = self.name(&raw.vm.name)?;
        let memory_bytes = self.memory(&raw.vm.memory)?;
        let cpus = *raw.vm.cpus.get_ref();
        if !(1..=255).contains(&cpus) {
            return Err(self.error(
                Some(raw.vm.cpus.span()),
                format!("cpus = {cpus} cannot be had"),
                "from 1 to 255",
                None,
            ));
        }
        let boot = self.boot(&raw)?;
        let mut seen = HashSet::new();
        let mut disks = Vec::with_capacity(raw.disk.len());
        for disk in &raw.disk {
            let checked = self.disk(disk, cpus)?;
            // Ephemeral ones each have a file of their own in the same folder.
            let is_shared = matches!(checked.key, KeySource::Ephemeral(_));
            if !is_shared && !seen.insert(checked.volume.clone()) {
                return Err(self.error(
                    Some(disk.get_ref().volume.span()),
                    "this volume is named twice".to_owned(),
                    "already a disk of this VM",
                    Some("one volume is served by one card; two would destroy it"),
                ));
            }
            disks.push(checked);
        }
        let nics = self.nics(&raw.nic, &name)?;
        Ok(VmSpec {
            name,
            memory_bytes,
            cpus,
            accel: raw.vm.accel,
            boot,
            exit_on_reboot: raw.vm.exit_on_reboot,
            disks,
            nics,
            run_dir: raw.run.dir.as_deref().map(|d| self.path(d)),
            user: raw.run.user,
            stop_timeout_s: raw.run.stop_timeout.unwrap_or(STOP_TIMEOUT_DEFAULT_S),
        })
    }

    fn name(&self, name: &Spanned<String>) -> Result<String, Box<SpecError>> {
        let text = name.get_ref();
        if !is_name(text) {
            return Err(self.error(
                Some(name.span()),
                format!("`{text}` cannot name a VM"),
                "1 to 64 of a-z A-Z 0-9 . _ -, and not starting with . or -",
                Some("the name becomes a folder of the run directory"),
            ));
        }
        Ok(text.clone())
    }

    fn memory(&self, memory: &Spanned<String>) -> Result<u64, Box<SpecError>> {
        let bytes = parse_size(memory.get_ref()).ok_or_else(|| {
            self.error(
                Some(memory.span()),
                format!("`{}` is not a size", memory.get_ref()),
                "a number with K, M, G or T",
                Some("for example memory = \"512M\""),
            )
        })?;
        if bytes < MEMORY_MIN_BYTES || bytes % (1 << 20) != 0 {
            return Err(self.error(
                Some(memory.span()),
                format!("{bytes} bytes of memory cannot be given to a guest"),
                "whole MiB, 32M or more",
                None,
            ));
        }
        Ok(bytes)
    }

    fn boot(&self, raw: &RawSpec) -> Result<Boot, Box<SpecError>> {
        let vm = &raw.vm;
        if let Some(kernel) = &vm.kernel {
            if let Some(firmware) = &vm.firmware {
                return Err(self.error(
                    Some(firmware.span()),
                    "kernel and firmware exclude each other".to_owned(),
                    "a kernel is already given",
                    Some("leave one of the two out"),
                ));
            }
            return Ok(Boot::Kernel {
                kernel: self.path(kernel),
                initrd: vm.initrd.as_ref().map(|p| self.path(p.get_ref())),
                cmdline: vm
                    .cmdline
                    .as_ref()
                    .map(|c| c.get_ref().clone())
                    .unwrap_or_default(),
            });
        }
        let orphan = [
            vm.initrd.as_ref().map(|s| ("initrd", s.span())),
            vm.cmdline.as_ref().map(|s| ("cmdline", s.span())),
        ];
        if let Some((field, span)) = orphan.into_iter().flatten().next() {
            return Err(self.error(
                Some(span),
                format!("{field} needs a kernel"),
                "there is no kernel it could be for",
                Some("add kernel = \"...\", or leave it out to boot from the first disk"),
            ));
        }
        if raw.disk.is_empty() {
            return Err(self.error(
                Some(vm.name.span()),
                "there is nothing to boot from".to_owned(),
                "this VM has neither a kernel nor a disk",
                Some("add kernel = \"...\" or a [[disk]]"),
            ));
        }
        Ok(Boot::Disk {
            firmware: vm.firmware.as_ref().map(|p| self.path(p.get_ref())),
        })
    }

    fn disk(&self, raw: &Spanned<RawDisk>, cpus: u16) -> Result<Disk, Box<SpecError>> {
        let disk = raw.get_ref();
        let key = match (&disk.key_file, &disk.passphrase_file, &disk.ephemeral) {
            (Some(k), None, None) => KeySource::KeyFile(self.path(k)),
            (None, Some(p), None) => KeySource::PassphraseFile(self.path(p)),
            (None, None, Some(size)) => self.ephemeral(size, disk.read_only)?,
            (_, _, Some(size)) => {
                return Err(self.error(
                    Some(size.span()),
                    "an ephemeral disk has no key of yours".to_owned(),
                    "key-file, passphrase-file and ephemeral exclude each other",
                    None,
                ));
            }
            (None, None, None) => {
                return Err(self.error(
                    Some(disk.volume.span()),
                    "this disk has no key".to_owned(),
                    "every volume is sealed",
                    Some(
                        "add key-file = \"...\" or passphrase-file = \"...\"; or ephemeral = \"10G\" for a \
                         new, empty disk that is gone when its card ends",
                    ),
                ));
            }
            (Some(_), Some(_), None) => {
                return Err(self.error(
                    Some(disk.volume.span()),
                    "this disk has two keys".to_owned(),
                    "key-file and passphrase-file exclude each other",
                    None,
                ));
            }
        };
        let serial = disk.serial.as_ref().map(|s| self.serial(s)).transpose()?;
        let queues = match &disk.queues {
            None => cpus.min(4),
            Some(q) if (1..=QUEUES_MAX).contains(q.get_ref()) => *q.get_ref(),
            Some(q) => {
                return Err(self.error(
                    Some(q.span()),
                    format!("queues = {} cannot be had", q.get_ref()),
                    &format!("from 1 to {QUEUES_MAX}"),
                    None,
                ));
            }
        };
        if let Some(size) = &disk.queue_size {
            let n = *size.get_ref();
            if !n.is_power_of_two() || !(16..=1024).contains(&n) {
                return Err(self.error(
                    Some(size.span()),
                    format!("queue-size = {n} cannot be had"),
                    "a power of two from 16 to 1024",
                    None,
                ));
            }
        }
        let mut limits = self.limits(&[
            Limit {
                name: "iops",
                amount: &disk.iops,
                burst_name: "iops-burst",
                burst: &disk.iops_burst,
            },
            Limit {
                name: "bps",
                amount: &disk.bps,
                burst_name: "bps-burst",
                burst: &disk.bps_burst,
            },
        ])?;
        if let Some(size) = &disk.io_size {
            limits.push(("io-size", self.io_size(size, disk.iops.is_some())?));
        }
        Ok(Disk {
            volume: self.path(disk.volume.get_ref()),
            key,
            read_only: disk.read_only,
            serial,
            queues,
            queue_size: disk.queue_size.as_ref().map(|s| *s.get_ref()),
            limits,
        })
    }

    fn ephemeral(
        &self,
        size: &Spanned<String>,
        is_read_only: bool,
    ) -> Result<KeySource, Box<SpecError>> {
        let text = size.get_ref();
        let bytes = parse_size(text).filter(|bytes| *bytes >= 1 << 20 && bytes % 4096 == 0);
        let Some(bytes) = bytes else {
            return Err(self.error(
                Some(size.span()),
                format!("ephemeral = \"{text}\" cannot be had"),
                "a size of 1M or more, like 10G",
                None,
            ));
        };
        if is_read_only {
            return Err(self.error(
                Some(size.span()),
                "an ephemeral disk that is read-only holds nothing, for ever".to_owned(),
                "it begins empty",
                Some("leave read-only out"),
            ));
        }
        Ok(KeySource::Ephemeral(bytes))
    }

    fn serial(&self, serial: &Spanned<String>) -> Result<String, Box<SpecError>> {
        let text = serial.get_ref();
        if !(1..=SERIAL_MAX_BYTES).contains(&text.len())
            || !text.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(self.error(
                Some(serial.span()),
                format!("`{text}` cannot be a serial"),
                "1 to 20 visible ASCII characters",
                Some("virtio-blk has room for 20 bytes"),
            ));
        }
        Ok(text.clone())
    }
}
