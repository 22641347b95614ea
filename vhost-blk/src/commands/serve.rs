//! `serve`: the card.
//!
//! In this order, because each step needs what a later one takes away, and because a card that
//! cannot serve should say so before a frontend waits for it:
//!
//! 1. key, volume, recovery; key material wiped
//! 2. sockets
//! 3. sandbox: user, capabilities, Landlock, seccomp
//! 4. threads: queues, control socket; frontends
//! 5. at SIGTERM: rings stop, the volume is closed clean

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use offload::cli::{Listener, format_size};
use offload::control::{ControlError, ControlServer};
use offload::sandbox::Sandbox;
use offload::stop::StopSignal;
use offload::telemetry::Registry;
use offload::vhost_user::{Backend, BackendError};
use serde_json::{Value, json};

use super::open::{ephemeral, id_text, serial_text, volume_with};
use super::rehome::{self, Rehomer};
use crate::args::ServeArgs;
use crate::device::limits::{Limits, Wire};
use crate::device::report::LogReporter;
use crate::device::resize::ResizeMethod;
use crate::device::watch::SpaceWatch;
use crate::device::{BlockDevice, Settings};
use crate::volume::backing::{Access, Backing};
use crate::volume::engine::{Phase, Volume};
use crate::volume::recover::Recovered;

const NAME: &str = "vhost-blk";

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let paths = &args.socket.socket_path;
    if paths.len() > 1 && !args.read_only {
        bail!(
            "several sockets can share a volume only with --read-only: each guest would keep a file \
             system of its own in memory and overwrite what the others write"
        );
    }
    // First of all: what is at the number of --fd belongs to us before anything else is opened.
    let inherited = match args.socket.fd {
        Some(_) => Some(args.socket.open_all()?),
        None => None,
    };
    let limits = Limits::new(args.limits.rates()).context("the limits cannot be kept")?;
    let access = if args.read_only {
        Access::Read
    } else {
        Access::Write
    };
    let cache = args.metadata_cache;
    let (backing, recovered) = match args.ephemeral {
        Some(size) => ephemeral(&args.volume, size, cache)?,
        None => volume_with(&args.volume, args.key.source(), access, cache)?,
    };
    let leftover = args.ephemeral.map(|_| Arc::clone(&backing));
    tell(&recovered);
    let superblock = &recovered.superblock;
    let settings = Settings {
        is_read_only: args.read_only,
        is_ephemeral: args.ephemeral.is_some(),
        queues: args.queues,
        queue_size: args.queue_size,
        serial: args.serial.unwrap_or(superblock.serial),
        poll_limit: Duration::from_micros(args.poll_us),
    };
    let (id, size) = (
        id_text(&superblock.id),
        format_size(superblock.geometry.volume_len()),
    );
    let serial = serial_text(&settings.serial);
    let reporter = Box::new(LogReporter::new(serial_text(&superblock.serial)));
    let as_backing = Arc::clone(&backing) as Arc<dyn Backing>;
    let volume = Volume::new(recovered, as_backing, reporter);
    let room = (Arc::clone(volume.shared()), Arc::clone(&backing));
    let device = Arc::new(BlockDevice::new(
        volume,
        Arc::clone(&backing),
        settings,
        limits,
    ));

    let registry = Registry::new("vhost_blk");
    device.register_volume(&registry);
    SpaceWatch::register(&registry, &room.0, &room.1);
    let devices = shown(&device, paths, &registry);
    let moves = rehome::Handle::new(args.rehome_rate, !args.read_only);
    let listeners = match inherited {
        Some(listeners) => listeners,
        None => args.socket.open_all()?,
    };
    let control = args
        .control_socket
        .as_deref()
        .map(|path| control(path, &registry, &device, &moves))
        .transpose()?;
    let stop = StopSignal::from_signals().context("cannot wait for signals")?;

    let report = sandbox(args).context("cannot set up the sandbox")?;
    tracing::info!("sandboxed: {report}");

    let events = control.as_ref().map(ControlServer::events);
    let control = control
        .map(|server| server.spawn(stop.clone()))
        .transpose()?;
    let watch = (!args.read_only)
        .then(|| SpaceWatch::start(room.0, room.1, args.low_space, events))
        .transpose()
        .context("cannot watch the volume's room")?;
    let backends = devices
        .into_iter()
        .map(|device| Backend::new(Arc::clone(&device), device.queue_stats()))
        .collect::<Result<Vec<_>, _>>()?;
    // Siblings are read-only, and nobody resizes what is served read-only.
    if let Some(backend) = backends.first() {
        device.announce_over(backend.config_change_notifier());
    }
    tracing::info!(
        "serving volume {serial} ({id}), {size}{}",
        match args.ephemeral {
            Some(_) => ", ephemeral: it ends with this process",
            None if args.read_only => ", read-only",
            None => "",
        }
    );
    let rehomer = (!args.read_only)
        .then(|| Rehomer::start(&moves, &device, &backing))
        .transpose()
        .context("cannot start the thread that moves blocks")?;
    let served = serve_all(&backends, listeners, &stop);
    drop(rehomer);
    // Ends the queues' threads, so that nothing is under way any more.
    drop(backends);
    drop(control);
    drop(watch);
    if let Some(backing) = leftover {
        backing.wipe().context(
            "what the ephemeral volume held could not be overwritten; nobody has its key",
        )?;
        served?;
        tracing::info!("volume {serial} is gone");
        return Ok(());
    }
    device
        .volume()
        .close()
        .context("the volume could not be closed; it will be recovered when it is next opened")?;
    served?;
    tracing::info!("volume {serial} is closed");
    Ok(())
}

/// A device for each socket, all of the same volume.
fn shown(
    device: &Arc<BlockDevice>,
    paths: &[PathBuf],
    registry: &Registry,
) -> Vec<Arc<BlockDevice>> {
    let [_, others @ ..] = paths else {
        device.register_queues(registry, None);
        return vec![Arc::clone(device)];
    };
    let siblings = others.iter().map(|_| Arc::new(device.sibling()));
    let devices: Vec<_> = std::iter::once(Arc::clone(device))
        .chain(siblings)
        .collect();
    for (device, path) in devices.iter().zip(paths) {
        let path = path.to_string_lossy();
        device.register_queues(registry, (paths.len() > 1).then_some(&*path));
    }
    devices
}

/// Says what opening found out of the ordinary.
fn tell(recovered: &Recovered) {
    for (copy, health) in ["first", "second"].iter().zip(&recovered.copies) {
        if let Err(error) = health {
            tracing::warn!("the {copy} copy of the volume's header is not usable: {error}");
        }
    }
    if !recovered.superblock.clean {
        tracing::info!(
            batches = recovered.replayed,
            dropped = recovered.dropped,
            "the volume was not closed: replayed its log"
        );
    }
    let pages = recovered.missing_pages();
    if pages > 0 {
        tracing::error!(
            pages,
            "pages of the volume's map do not authenticate or cannot be read: what is below them \
             reads as errors; run `vhost-blk check`"
        );
    }
}

fn control(
    path: &Path,
    registry: &Registry,
    device: &Arc<BlockDevice>,
    moves: &rehome::Handle,
) -> anyhow::Result<ControlServer> {
    let server = ControlServer::bind(path, NAME, env!("CARGO_PKG_VERSION"), registry)?;
    let resize = ResizeMethod::new(Arc::clone(device), server.events());
    let server = server.method("resize", move |params| resize.call(&params));
    let device = Arc::clone(device);
    let limits = device.limits().clone();
    let server = server.method("limits", move |params| change(&limits, params));
    let server = rehome::methods(server, moves, &device);
    Ok(server.method("volume", move |_| {
        let volume = device.volume();
        let phase = match volume.phase() {
            Phase::Opened => "opened",
            Phase::Serving => "serving",
            Phase::Closed => "closed",
        };
        Ok(json!({
            "id": id_text(&volume.id()),
            "serial": serial_text(&volume.serial()),
            "size_bytes": volume.shared().volume_len(),
            "phase": phase,
        }))
    }))
}

/// The method `limits`: without parameters it tells the limits, with an object it puts that in their
/// place. The answer is what is in force then.
fn change(limits: &Limits, params: Value) -> Result<Value, ControlError> {
    if !params.is_null() {
        let wrong = |error: &dyn std::fmt::Display| {
            ControlError::bad_params(format!(
                "limits are an object of iops, iops_burst, bps, bps_burst and io_size: {error}"
            ))
        };
        // A list would be read as a structure without names.
        if !params.is_object() {
            return Err(wrong(&"this is none"));
        }
        let wanted: Wire = serde_json::from_value(params).map_err(|error| wrong(&error))?;
        let set = limits.set(wanted.into());
        set.map_err(|error| ControlError::bad_params(error.to_string()))?;
        tracing::info!("limits were changed: {}", json!(wanted));
    }
    Ok(json!(Wire::from(limits.rates())))
}

fn sandbox(args: &ServeArgs) -> Result<offload::sandbox::Report, offload::sandbox::SandboxError> {
    let mut builder = Sandbox::builder().seccomp(args.seccomp);
    if let Some(user) = args.user {
        builder = builder.user(user);
    }
    // The sockets' own files are removed in the end.
    let paths = args.socket.socket_path.iter().chain(&args.control_socket);
    paths
        .fold(builder, |builder, path| builder.remove_file(path))
        .apply()
}

/// The end of one socket, for whatever reason, ends all.
struct EndsAll<'a>(&'a StopSignal);

impl Drop for EndsAll<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Each socket on a thread of its own: frontends come and go independently.
fn serve_all(
    backends: &[Backend<BlockDevice>],
    listeners: Vec<Listener>,
    stop: &StopSignal,
) -> Result<(), BackendError> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = backends
            .iter()
            .zip(listeners)
            .map(|(backend, listener)| {
                scope.spawn(move || {
                    let _ends_all = EndsAll(stop);
                    backend.serve(listener, stop)
                })
            })
            .collect();
        let mut all = Ok(());
        for thread in threads {
            let one = thread.join();
            // The first error is told.
            all = all.and(one.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    })
}
