//! The command line.

mod limits;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use crypto::source::KeySource;
use offload::cli::{SocketArgs, parse_size, parse_user};
use offload::sandbox::{Seccomp, User};
use offload::telemetry::LogArgs;

pub use self::limits::LimitArgs;
use crate::volume::geometry::SPARE_PERCENT;
use crate::volume::superblock::SERIAL_LEN;

/// Largest queue size: what QEMU has.
const QUEUE_SIZE_MAX: u16 = 1024;
/// Most queues.
const QUEUES_MAX: u16 = 64;
const POLL_US_MAX: u64 = 1000;

/// Encrypted, authenticated volumes for virtual machines, served over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "vhost-blk", version, max_term_width = 100)]
pub struct Cli {
    /// How much to say.
    #[command(flatten)]
    pub log: LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new, empty volume in a file or on a block device
    Create(CreateArgs),
    /// Serve a volume to a virtual machine
    Serve(Box<ServeArgs>),
    /// Tell what a volume that is being served may use, or change it
    Limits(LimitsArgs),
    /// Make a volume larger, also while a virtual machine uses it
    Resize(ResizeArgs),
    /// Say what a volume is; without a key, what can be read without one
    Info(InfoArgs),
    /// Authenticate everything that a volume holds, and repair what can be. Exit status: 0 clean (or
    /// is now, with --repair), 1 damaged, 2 not checked, or not repaired
    Check(CheckArgs),
    /// Make a volume from a disk image: raw, or what qemu-img reads
    Import(ImportArgs),
    /// Move a volume's contents together and give free room back to the file system
    Compact(CompactArgs),
    /// Write a volume's contents, decrypted, to a raw disk image or device
    Export(ExportArgs),
}

/// What unlocks a volume.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct KeyArgs {
    /// A file of 32 raw bytes or 64 hex digits that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A file whose first line is the passphrase, that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

impl KeyArgs {
    /// Where the key is.
    pub fn source(&self) -> Option<KeySource> {
        let passphrase = self.passphrase_file.clone().map(KeySource::Passphrase);
        self.key_file.clone().map(KeySource::File).or(passphrase)
    }
}

/// What unlocks a volume, if it is to be unlocked.
#[derive(Clone, Debug, Args)]
#[group(required = false, multiple = false)]
pub struct OptionalKeyArgs {
    /// A file of 32 raw bytes or 64 hex digits that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A file whose first line is the passphrase, that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

impl OptionalKeyArgs {
    /// Where the key is, if one was named.
    pub fn source(&self) -> Option<KeySource> {
        KeyArgs {
            key_file: self.key_file.clone(),
            passphrase_file: self.passphrase_file.clone(),
        }
        .source()
    }
}

/// `create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Size that the guest sees, like 10G; on a block device the largest that fits, if left out
    #[arg(long, value_parser = size)]
    pub size: Option<u64>,
    /// The key.
    #[command(flatten)]
    pub key: KeyArgs,
    /// Room besides the volume's size, in percent of it, taken in a file only as far as it is used:
    /// the more, the faster random writes are once all of the volume is written
    #[arg(long, value_name = "PERCENT", default_value_t = SPARE_PERCENT,
        value_parser = clap::value_parser!(u64).range(3..=400))]
    pub spare: u64,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
    /// File or block device
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
}

/// `serve`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("unlock").required(true)
    .args(["key_file", "passphrase_file", "ephemeral"]))]
pub struct ServeArgs {
    /// Where frontends come from.
    #[command(flatten)]
    pub socket: SocketArgs,
    /// File or block device that holds the volume
    #[arg(long, value_name = "VOLUME", visible_alias = "blk-file")]
    pub volume: PathBuf,
    /// The key.
    #[command(flatten)]
    pub key: OptionalKeyArgs,
    /// Make a new, empty volume of this size, like 10G, and keep its key to this process: when the
    /// card ends, or is killed, the data are gone. VOLUME is a folder, where a file without a name is
    /// made, or a blank device
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "read_only")]
    pub ephemeral: Option<u64>,
    /// Take no writes from the guest, and write nothing
    #[arg(long)]
    pub read_only: bool,
    /// Virtqueues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    pub queues: u16,
    /// Largest size of a virtqueue that is accepted, a power of two up to 1024
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    pub queue_size: u16,
    /// Look for a queue's next event for up to this many microseconds before sleeping, while
    /// events come that quickly; 0: never
    #[arg(long, value_name = "N", default_value_t = 32,
        value_parser = clap::value_parser!(u64).range(..=POLL_US_MAX))]
    pub poll_us: u64,
    /// Memory for the map of where blocks are, like 64M; by the volume's size if left out: all of
    /// its map (a 128th of the volume), at least 16M, at most 256M
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub metadata_cache: Option<u64>,
    /// Serial number that the guest sees, up to 20 ASCII characters; the volume's own if left out
    #[arg(long, value_parser = serial)]
    pub serial: Option<[u8; SERIAL_LEN]>,
    /// Answer questions about the running card on this socket (JSON lines)
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
    /// Bytes a second that are moved together while no requests come, like 200M; 0: none
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "200M")]
    pub rehome_rate: u64,
    /// Warn, in the log and by an event on the control socket, when the file system of the volume's
    /// file is this full
    #[arg(long, value_name = "PERCENT", default_value_t = 90,
        value_parser = clap::value_parser!(u8).range(1..=100))]
    pub low_space: u8,
    /// Become this user (UID or UID:GID, numbers) once volume, key and sockets are open. It removes
    /// the sockets in the end if their folder is its own; else the next card there replaces them
    #[arg(long, value_name = "USER", value_parser = parse_user)]
    pub user: Option<User>,
    /// What happens at a system call that the card is not known to need
    #[arg(long, value_enum, value_name = "MODE", default_value = "enforce")]
    pub seccomp: Seccomp,
    /// What the volume may use.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `limits`.
#[derive(Debug, Args)]
pub struct LimitsArgs {
    /// Control socket of the card
    #[arg(long, value_name = "PATH")]
    pub control_socket: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Lift all limits
    #[arg(long)]
    pub none: bool,
    /// New limits in place of all that there are; without any, they are told.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Where the volume is.
    #[command(flatten)]
    pub target: ResizeTarget,
    /// The key; a card that serves the volume has it.
    #[command(flatten)]
    pub key: OptionalKeyArgs,
    /// New size that the guest sees, like 20G; all that a block device has, if left out
    #[arg(long, value_parser = size)]
    pub size: Option<u64>,
    /// With --volume: also if the volume was not closed. Only when its guest is gone for good
    #[arg(long, conflicts_with = "control_socket")]
    pub force: bool,
}

/// A volume, or the card that serves it.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ResizeTarget {
    /// File or block device that holds a volume that is not being served
    #[arg(long, value_name = "VOLUME")]
    pub volume: Option<PathBuf>,
    /// Control socket of the card that serves the volume: the guest sees the new size at once
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
}

/// `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The key.
    #[command(flatten)]
    pub key: OptionalKeyArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// File or block device
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
}

/// `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Mend the header's copies and the record of which slots are free. No data is given up
    #[arg(long)]
    pub repair: bool,
    /// Give up what does not authenticate: list it, then let it read as zeros. What the backing
    /// cannot read is left
    #[arg(long, requires = "repair")]
    pub zero_damaged: bool,
    /// Repair a volume that was not closed: no guest of it is left
    #[arg(long, requires = "repair")]
    pub force: bool,
    /// File or block device
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
}

/// `compact`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("target").required(true).args(["control_socket", "volume"]))]
pub struct CompactArgs {
    /// The key of a volume that is not being served.
    #[command(flatten)]
    pub key: OptionalKeyArgs,
    /// The control socket of the card that serves the volume
    #[arg(long, value_name = "PATH", conflicts_with_all = ["key_file", "passphrase_file"])]
    pub control_socket: Option<PathBuf>,
    /// File or block device that holds the volume
    #[arg(value_name = "VOLUME")]
    pub volume: Option<PathBuf>,
}

/// `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The new volume's key.
    #[command(flatten)]
    pub key: KeyArgs,
    /// Format of the image as qemu-img names it; found out if left out. A sealed volume is only taken
    /// for an image, with its sealed bytes for contents, as raw
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
    /// Disk image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// File or block device for the new volume
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
}

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArgs,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
    /// File or block device that holds the volume
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
    /// Raw image or block device to write to
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
}

fn rate(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    size(text)
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && size <= QUEUE_SIZE_MAX => Ok(size),
        _ => Err(format!(
            "a queue size is a power of two from 1 to {QUEUE_SIZE_MAX}"
        )),
    }
}

fn serial(text: &str) -> Result<[u8; SERIAL_LEN], String> {
    let mut serial = [0; SERIAL_LEN];
    let is_printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    match serial.get_mut(..text.len()) {
        Some(place) if is_printable && !text.is_empty() => {
            place.copy_from_slice(text.as_bytes());
            Ok(serial)
        }
        _ => Err(format!(
            "a serial number has 1 to {SERIAL_LEN} printable ASCII characters"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Cli, String> {
        Cli::try_parse_from(std::iter::once("vhost-blk").chain(args.split_whitespace()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_key_is_needed_and_only_one() {
        assert!(
            parse("create --size 1G v")
                .unwrap_err()
                .contains("--key-file")
        );
        assert!(parse("create --size 1G --key-file k v").is_ok());
        assert!(parse("create --size 1G --key-file k --passphrase-file p v").is_err());
        assert!(parse("info v").is_ok());
        assert!(parse("check v").is_err());
        assert!(parse("check --key-file k --repair --zero-damaged --force v").is_ok());
        assert!(parse("check --key-file k --zero-damaged v").is_err());
        assert!(parse("check --key-file k --force v").is_err());
    }

    #[test]
    fn an_ephemeral_volume_takes_no_key() {
        let serve = |rest: &str| parse(&format!("serve --fd 3 --volume v {rest}"));
        assert!(serve("--ephemeral 10G").is_ok());
        assert!(serve("").unwrap_err().contains("--key-file"));
        for wrong in ["--key-file k", "--passphrase-file p", "--read-only"] {
            assert!(serve(&format!("--ephemeral 10G {wrong}")).is_err());
        }
    }

    #[test]
    fn resize_takes_a_volume_or_a_card() {
        assert!(parse("resize --volume v --key-file k --size 2G").is_ok());
        assert!(parse("resize --control-socket s --size 2G").is_ok());
        assert!(parse("resize --size 2G --key-file k").is_err());
        assert!(parse("resize --volume v --control-socket s --size 2G").is_err());
        assert!(parse("resize --control-socket s --force --size 2G").is_err());
    }

    #[test]
    fn compact_takes_a_volume_or_a_card() {
        assert!(parse("compact --key-file k v").is_ok());
        assert!(parse("compact --control-socket s").is_ok());
        assert!(parse("compact --control-socket s v").is_err());
        assert!(parse("compact --control-socket s --key-file k").is_err());
        let error = parse("compact").unwrap_err();
        let both = ["--control-socket <PATH>", "VOLUME"];
        assert!(both.iter().all(|one| error.contains(one)), "{error}");
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_range() {
        let serve = |rest: &str| parse(&format!("serve --fd 3 --volume v --key-file k {rest}"));
        assert!(serve("--queues 4 --queue-size 128 --serial vol0123 --user 12:34").is_ok());
        for (wrong, hint) in [
            ("--queues 0", "1..=64"),
            ("--queue-size 100", "power of two"),
            ("--queue-size 2048", "1024"),
            ("--serial 012345678901234567890", "20"),
            ("--serial \u{e9}", "ASCII"),
            ("--user root", "numbers"),
            ("--iops=-1", "--iops"),
            ("--iops-burst 10", "--iops <N>"),
            ("--iops 10 --iops-burst 20:x", "RATE:SECONDS"),
            ("--iops 10 --iops-burst x", "N:SECONDS"),
            ("--bps 10MB", "1024"),
            ("--bps-burst 20M", "--bps <SIZE>"),
            ("--io-size 16K", "--iops <N>"),
            ("--iops 10 --io-size 1T", "too large"),
            ("--low-space 0", "1..=100"),
            ("--low-space 101", "1..=100"),
        ] {
            let error = serve(wrong).unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
        let limits = "--iops 10 --iops-burst 20:5 --bps 1M --bps-burst 2M --io-size 16K";
        let Command::Serve(args) = serve(limits).unwrap().command else {
            panic!()
        };
        let rates = args.limits.rates();
        assert_eq!((rates.ops, rates.bytes), (Some(10), Some(1 << 20)));
        assert_eq!(rates.ops_burst.map(|b| (b.rate, b.seconds)), Some((20, 5)));
        assert_eq!(rates.bytes_burst.map(|b| b.rate), Some(2 << 20));
        assert_eq!(rates.op_len, Some(16384));
        assert!(parse("create --size 10GB --key-file k v").is_err());
    }
}
