//! From a spec and what the host offers to a list of processes: pure, so that it can be printed,
//! compared and tested without starting anything.
//!
//! The order is part of the plan: cards first, since QEMU's vhost-user character device is a client
//! whose server must be there; then QEMU. Stopping goes the other way round.
//!
//! ## Who may touch what
//!
//! ```text
//! run dir             0700 the shim's user    (0711 if the cards run as another user)
//! ├── lock            held by the one shim of this VM
//! ├── qmp.sock        0700's protection is what guards it
//! ├── disk0/          0700 the card's user
//! │   ├── vhost.sock  QEMU connects here
//! │   └── control.sock
//! └── nic0/           the same
//! ```
//!
//! Cards of one private network meet in a directory that none of their VMs owns,
//! `offload-networks/NAME` beside all run directories. The first card makes it (0700, the card's user),
//! and nobody removes it: two cards that did would race with one that comes.
//!
//! When the shim is root, a card starts as root, opens its volume and its key, and gives root up
//! before it serves (`--user`). The other way, starting it as that user, would need the volume and
//! the key file to be readable by that user, and a shim that quietly changes the owner of somebody's
//! disk image is not to be trusted with it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::accel::KvmVerdict;
use crate::qemu::{self, Qemu};
use crate::spec::{AccelChoice, Disk, KeySource, Nic, VmSpec};

#[cfg(test)]
mod tests;

/// Longest path a Unix socket can have: `sun_path` is 108 bytes with its terminating zero.
pub const SOCKET_PATH_MAX_BYTES: usize = 107;

/// What a card's control socket is called in its folder.
pub const CONTROL_SOCKET: &str = "control.sock";

/// What the card of disk `index` is called, in logs and as a folder of the run directory.
#[must_use]
pub fn disk_label(index: usize) -> String {
    format!("disk{index}")
}

/// Why a spec cannot be turned into a plan on this host.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// A socket in the run directory would have too long a name.
    #[error(
        "the socket {path} would have a name of {len} bytes, Unix sockets have {SOCKET_PATH_MAX_BYTES}; \
         choose a shorter [run] dir"
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// `accel = "auto"` was not probed.
    #[error("accel is \"auto\", but the host was not probed")]
    NotProbed,
    /// There is a `[[disk]]`, and nobody said where its card is.
    #[error("the VM has a disk, but the host was not asked for its card")]
    NoBlockCard,
    /// There is a `[[nic]]`, and nobody said where its card is.
    #[error("the VM has a network interface, but the host was not asked for its card")]
    NoNetCard,
    /// A `[[nic]]` is on a network, and nobody said where networks are.
    #[error("the VM is on a private network, but the host was not asked where those are")]
    NoNetworks,
    /// A path is not UTF-8, which no command line printed as JSON could carry.
    #[error("{0:?} is not UTF-8; rename it")]
    NotUtf8(PathBuf),
}

/// A numeric user and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct UserId {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// What the host offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Env {
    /// The QEMU to run.
    pub qemu: Qemu,
    /// The block card's binary; may be missing for a VM without a disk.
    pub card: Option<PathBuf>,
    /// The network card's binary; may be missing for a VM without one.
    pub net_card: Option<PathBuf>,
    /// Run directory of this VM.
    pub run_dir: PathBuf,
    /// Where the directories of private networks are, the same for all VMs of a user; may be missing for
    /// a VM on none.
    pub networks_dir: Option<PathBuf>,
    /// What the probe of /dev/kvm said; only looked at when the spec leaves the choice.
    pub kvm: Option<KvmVerdict>,
    /// Whom cards become once their files are open; `None` if the shim is not root.
    pub card_user: Option<UserId>,
}

/// The accelerator after `auto` is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ResolvedAccel {
    /// Hardware.
    Kvm,
    /// Translation.
    Tcg,
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// What it is called in logs.
    pub label: String,
    /// Binary.
    pub program: PathBuf,
    /// Arguments, without the program itself.
    pub args: Vec<String>,
}

/// One card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CardPlan {
    /// How to start it.
    pub process: Process,
    /// Folder of its sockets.
    pub dir: PathBuf,
    /// Who owns that folder; the shim's user without it.
    pub owner: Option<UserId>,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// The control socket.
    pub control_socket: PathBuf,
}

/// Everything that is started for a VM, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Name of the VM.
    pub name: String,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// Accelerator.
    pub accel: ResolvedAccel,
    /// What the user should know before it starts.
    pub warnings: Vec<String>,
    /// Cards, started first: those of the disks in their order, then those of the interfaces.
    pub cards: Vec<CardPlan>,
    /// QEMU, started once every card listens.
    pub qemu: Process,
    /// QEMU's control socket.
    pub qmp: PathBuf,
    /// Seconds the guest gets to power itself off.
    pub stop_timeout_s: u64,
}

/// Makes the plan.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(spec: &VmSpec, env: &Env) -> Result<Plan, PlanError> {
    let mut warnings = Vec::new();
    let accel = match (spec.accel, &env.kvm) {
        (AccelChoice::Kvm, _) => ResolvedAccel::Kvm,
        (AccelChoice::Tcg, _) => ResolvedAccel::Tcg,
        (AccelChoice::Auto, None) => return Err(PlanError::NotProbed),
        (AccelChoice::Auto, Some(verdict)) if verdict.is_usable() => ResolvedAccel::Kvm,
        (AccelChoice::Auto, Some(verdict)) => {
            warnings.push(format!("running with TCG, which is slow: {verdict}"));
            ResolvedAccel::Tcg
        }
    };
    if !env.qemu.has_sandbox {
        warnings.push(format!(
            "{} was built without seccomp, so it runs without -sandbox",
            env.qemu.path.display()
        ));
    }
    let disks = spec.disks.iter().enumerate();
    let nics = spec.nics.iter().enumerate();
    let cards = disks
        .map(|(index, disk)| block_card(index, disk, env))
        .chain(nics.map(|(index, nic)| net_card(index, nic, env)))
        .collect::<Result<Vec<_>, _>>()?;
    let qmp = socket(&env.run_dir, "qmp.sock")?;
    let args = qemu::arguments(spec, &env.qemu, accel, &cards, &qmp);
    Ok(Plan {
        name: spec.name.clone(),
        run_dir: env.run_dir.clone(),
        accel,
        warnings,
        cards,
        qemu: Process {
            label: "qemu".to_owned(),
            program: env.qemu.path.clone(),
            args,
        },
        qmp,
        stop_timeout_s: spec.stop_timeout_s,
    })
}

fn block_card(index: usize, disk: &Disk, env: &Env) -> Result<CardPlan, PlanError> {
    let program = env.card.as_ref().ok_or(PlanError::NoBlockCard)?;
    card(disk_label(index), program, env, |line| {
        line.path("--volume", &disk.volume)?;
        match &disk.key {
            KeySource::KeyFile(path) => line.path("--key-file", path)?,
            KeySource::PassphraseFile(path) => line.path("--passphrase-file", path)?,
            KeySource::Ephemeral(bytes) => line.option("--ephemeral", bytes),
        }
        line.option("--queues", disk.queues);
        line.maybe("--queue-size", disk.queue_size);
        line.maybe("--serial", disk.serial.as_ref());
        for (option, value) in &disk.limits {
            line.option(&format!("--{option}"), value);
        }
        if disk.read_only {
            line.0.push("--read-only".to_owned());
        }
        Ok(())
    })
}

fn net_card(index: usize, nic: &Nic, env: &Env) -> Result<CardPlan, PlanError> {
    let program = env.net_card.as_ref().ok_or(PlanError::NoNetCard)?;
    card(format!("nic{index}"), program, env, |line| {
        if let Some(network) = &nic.network {
            let base = env.networks_dir.as_ref().ok_or(PlanError::NoNetworks)?;
            // A card's socket in it is called by twelve digits.
            let dir = base.join(network);
            socket(&dir, "000000000000")?;
            line.path("--network", &dir)?;
        }
        line.option("--mac", &nic.mac);
        line.option(
            "--ipv4",
            format_args!("{}/{}", nic.ipv4.address, nic.ipv4.prefix_len),
        );
        line.maybe("--gateway", nic.gateway);
        line.maybe("--dns", nic.dns);
        match nic.ipv6_prefix {
            Some(prefix) => line.option("--ipv6-prefix", prefix),
            None => line.0.push("--no-ipv6".to_owned()),
        }
        line.maybe("--ipv6-address", nic.ipv6_address);
        line.option("--mtu", nic.mtu);
        line.maybe("--hostname", nic.hostname.as_ref());
        line.maybe("--domain", nic.domain.as_ref());
        for server in &nic.dns_upstream {
            line.option("--dns-upstream", server);
        }
        for rule in &nic.publish {
            line.option("--publish", rule);
        }
        for address in &nic.map_host_loopback {
            line.option("--map-host-loopback", address);
        }
        if nic.queue_pairs > 1 {
            line.option("--queue-pairs", nic.queue_pairs);
        }
        line.maybe("--flows", nic.flows);
        let traffic = &nic.traffic;
        for (option, value) in &traffic.limits {
            line.option(&format!("--{option}"), value);
        }
        for (kind, seconds) in &traffic.flow_timeouts {
            line.option("--flow-timeout", format_args!("{kind}={seconds}"));
        }
        line.maybe("--tracked-flows", traffic.tracked_flows);
        for (name, addresses) in &traffic.neighbors {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            line.option("--neighbor", format_args!("{name}={}", addresses.join(",")));
        }
        if let Some(log) = &traffic.flow_log {
            line.path("--flow-log", &log.path)?;
            line.maybe("--flow-log-interval", log.interval);
            line.maybe("--flow-log-size", log.size.as_ref());
            line.maybe("--flow-log-keep", log.keep);
        }
        for (option, file) in [
            ("--security-groups", &nic.security_groups),
            ("--metadata", &nic.metadata),
            ("--user-data", &nic.user_data),
        ] {
            if let Some(file) = file {
                line.path(option, file)?;
            }
        }
        Ok(())
    })
}

/// A command line that grows.
struct Line(Vec<String>);

impl Line {
    fn option(&mut self, name: &str, value: impl fmt::Display) {
        self.0.extend([name.to_owned(), value.to_string()]);
    }

    fn maybe(&mut self, name: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.option(name, value);
        }
    }

    fn path(&mut self, name: &str, path: &Path) -> Result<(), PlanError> {
        self.option(name, utf8(path)?);
        Ok(())
    }
}

/// What every card has: a folder with two sockets, and a user; `own` adds what this one has besides.
fn card(
    label: String,
    program: &Path,
    env: &Env,
    own: impl FnOnce(&mut Line) -> Result<(), PlanError>,
) -> Result<CardPlan, PlanError> {
    let dir = env.run_dir.join(&label);
    let socket_path = socket(&dir, "vhost.sock")?;
    let control_socket = socket(&dir, CONTROL_SOCKET)?;
    let mut line = Line(vec!["serve".to_owned()]);
    line.path("--socket-path", &socket_path)?;
    own(&mut line)?;
    line.path("--control-socket", &control_socket)?;
    line.maybe("--user", env.card_user);
    Ok(CardPlan {
        process: Process {
            label,
            program: program.to_owned(),
            args: line.0,
        },
        dir,
        owner: env.card_user,
        socket: socket_path,
        control_socket,
    })
}

fn utf8(path: &Path) -> Result<&str, PlanError> {
    path.to_str()
        .ok_or_else(|| PlanError::NotUtf8(path.to_owned()))
}

fn socket(dir: &Path, name: &str) -> Result<PathBuf, PlanError> {
    let path = dir.join(name);
    let len = utf8(&path)?.len();
    if len > SOCKET_PATH_MAX_BYTES {
        return Err(PlanError::SocketPathTooLong { path, len });
    }
    Ok(path)
}

/// One command line as a shell would take it, an option and its value a line.
impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", quote(&self.program.to_string_lossy()))?;
        for arg in &self.args {
            let separator = if arg.starts_with('-') {
                " \\\n    "
            } else {
                " "
            };
            write!(f, "{separator}{}", quote(arg))?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# VM {}, run directory {}",
            self.name,
            self.run_dir.display()
        )?;
        for warning in &self.warnings {
            writeln!(f, "# warning: {warning}")?;
        }
        for (step, card) in self.cards.iter().enumerate() {
            writeln!(f, "\n# {}. {}: a card", step + 1, card.process.label)?;
            if let Some(owner) = card.owner {
                writeln!(f, "# opens its files as root, serves as {owner}")?;
            }
            writeln!(f, "{}", card.process)?;
        }
        writeln!(
            f,
            "\n# {}. qemu, once every card listens",
            self.cards.len() + 1
        )?;
        writeln!(f, "{}", self.qemu)
    }
}

fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
