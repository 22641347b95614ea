//! `host-shim demo`: the whole path on one machine, and what it promises shown with real bytes.
//!
//! Every claim is checked, not only printed: the command succeeds when all of them hold.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use host_shim::guest::{self, Initrd};
use host_shim::host;

mod backing;
mod packages;
mod show;
mod stage;

use backing::Backing;
use show::Show;
use stage::{Boot, Stage};

/// Size of the volume that the guest sees.
const VOLUME_SIZE: &str = "256M";
/// Slots of the backing that are damaged in turn until one is found that is in use.
const FLIPS_MAX: usize = 12;

/// Arguments of `demo`.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Leave the volume, its key and the VM spec where they are.
    #[arg(long)]
    keep: bool,
    /// Show all that guest, card and QEMU say.
    #[arg(long, short)]
    verbose: bool,
    /// Install nothing, build nothing: take what is there.
    #[arg(long)]
    offline: bool,
    /// Folder of the cards' binaries, when they are not beside this one or in PATH.
    #[arg(long, value_name = "DIR")]
    card_dir: Option<PathBuf>,
}

pub(crate) fn demo(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let mut show = Show::new(args.verbose);
    if !args.offline {
        show.step("packages", packages::install)?;
    }
    if !args.offline && args.card_dir.is_none() {
        show.step("cards", |_| build_cards())?;
    }
    let card = host::find_card(args.card_dir.as_deref(), host::BLOCK_CARD)?;
    // Not in /tmp, which may be a tmpfs: a card reads and writes around the page cache.
    let dir = tempfile::Builder::new()
        .prefix("offload-demo-")
        .tempdir_in("/var/tmp")?;
    let stage = Stage::new(dir.path(), &card)?;
    show.step("guest", |show| {
        let kernel = guest::kernel(&guest::cache_dir())?;
        let initrd = Initrd {
            modules: &["virtio_pci", "virtio_blk", "ext4", "virtio_net"],
            programs: &["mke2fs"],
            files: &[("/sbin/lease", include_bytes!("lease.sh"))],
            script: include_str!("guest.sh"),
        };
        std::fs::write(stage.initrd(), initrd.build(&kernel)?)?;
        std::os::unix::fs::symlink(&kernel.image, stage.kernel())?;
        show.line(&format!("Debian's kernel {}, unmodified", kernel.release));
        Ok(format!("kernel {}", kernel.release))
    })?;
    let result = story(&mut show, &stage);
    show.summary(&result);
    if args.keep {
        let dir = dir.keep();
        writeln!(std::io::stdout(), "kept: {}", dir.display())?;
    }
    result?;
    Ok(ExitCode::SUCCESS)
}

fn story(show: &mut Show, stage: &Stage<'_>) -> anyhow::Result<()> {
    show.step("seal", |_| {
        stage.create_volume(VOLUME_SIZE)?;
        Ok(format!(
            "{VOLUME_SIZE} volume, thin, its key in a file of mode 0600"
        ))
    })?;
    let mut first = None;
    show.step("first boot", |show| {
        let boot = first.insert(stage.boot(show, "write")?);
        boot.powered_off()?;
        ensure!(
            boot.console_has("demo: written"),
            "the guest did not get through"
        );
        let user = boot
            .card_user
            .context("the card was gone before it was looked at")?;
        let me = rustix::process::geteuid().as_raw();
        ensure!(me != 0 || user != 0, "the card ran as root");
        Ok(format!(
            "the card ran as uid {user}; mkfs, write, sync, power off"
        ))
    })?;
    show.step("network", |_| {
        let boot = first.context("there was no boot")?;
        let address = stage::ADDRESS;
        ensure!(
            boot.console_has(&format!("demo: network {address} of {} ", stage.instance())),
            "the guest got no address, or the metadata service did not say which instance it is"
        );
        Ok(format!(
            "{address} by DHCP; the metadata service knows the guest as {}",
            stage.instance()
        ))
    })?;
    show.step("second boot", |show| {
        let boot = stage.boot(show, "verify")?;
        boot.powered_off()?;
        ensure!(
            boot.console_has("demo: verified"),
            "the guest found other files than it wrote"
        );
        Ok("every file as it was written (sha256)".to_owned())
    })?;
    let backing = Backing::open(&stage.volume())?;
    show.step("plaintext", |show| {
        let (scanned, found) = backing.count(stage.marker().as_bytes())?;
        ensure!(scanned > 0, "the backing is empty");
        ensure!(
            found == 0,
            "the backing holds the guest's text {found} times"
        );
        show.line(&format!(
            "the guest reads its secret {} times in one file",
            stage::MARKERS
        ));
        Ok(format!(
            "none of it in the {} MiB of the backing",
            scanned >> 20
        ))
    })?;
    show.step("one bit", |show| {
        let at = damage(show, stage, &backing)?;
        let boot = stage.boot(show, "read")?;
        boot.powered_off()?;
        tampering_was_seen(&boot)?;
        backing.flip(at)?;
        ensure!(
            stage.check()?.success(),
            "the byte is back, and the volume still damaged"
        );
        Ok("the guest got an I/O error, the card's log names the block".to_owned())
    })
}

/// Flips one bit of a block that is in use, and says where. Slots of old versions are no use: nobody
/// reads them. `vhost-blk check` tells them apart.
fn damage(show: &Show, stage: &Stage<'_>, backing: &Backing) -> anyhow::Result<u64> {
    for at in backing.candidates(FLIPS_MAX)? {
        backing.flip(at)?;
        let status = stage.check()?;
        match status.code() {
            Some(1) => {
                show.line(&format!("flipped one bit at byte {at} of the backing"));
                return Ok(at);
            }
            Some(0) => backing.flip(at)?,
            _ => bail!("vhost-blk check failed: {status}"),
        }
    }
    bail!("found no block in use among {FLIPS_MAX}");
}

fn tampering_was_seen(boot: &Boot) -> anyhow::Result<()> {
    ensure!(
        boot.console_has("I/O error") && boot.console_has("demo: read failed"),
        "the guest read a damaged block without an error"
    );
    ensure!(
        !boot.console_has("demo: read all"),
        "the guest read all of a damaged disk"
    );
    let said = boot
        .log
        .iter()
        .any(|line| line.starts_with("disk0: ") && line.contains("does not authenticate"));
    ensure!(said, "the card's log does not name the damaged block");
    Ok(())
}

/// Builds the cards from the sources beside this crate, if they are there; quick when they are built.
fn build_cards() -> anyhow::Result<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    if !workspace.join("vhost-blk/Cargo.toml").is_file() {
        return Ok("as installed".to_owned());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "-p", "vhost-blk", "-p", "vhost-net"])
        .current_dir(&workspace);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let status = cargo.status().context("cannot run cargo")?;
    ensure!(status.success(), "building the cards failed");
    Ok("built".to_owned())
}
