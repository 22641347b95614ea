//! `serve`: the card.
//!
//! In this order, because each step needs what a later one takes away: sockets and published ports,
//! then the sandbox, then threads and frontends.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use offload::control::ControlServer;
use offload::sandbox::Sandbox;
use offload::stop::StopSignal;
use offload::telemetry::Registry;
use offload::vhost_user::Backend;

use super::control::{self, Facts};
use super::read_toml;
use super::resolvers::{self, Resolvers};
use crate::args::ServeArgs;
use crate::device::NetDevice;
use crate::device::publisher::{Publisher, default_groups};
use crate::host::may_ping;
use crate::lan::Lan;
use crate::lan::meeting::{Id, Meeting};
use crate::locals::{FlowLogOptions, LocalOptions};
use crate::policy::SharedRules;
use crate::policy::flowfile::FlowFile;
use crate::policy::flowlog::Identity;
use crate::services::dns::upstream::Upstream;
use crate::services::imds::{Imds, MetadataSpec, interface_id};
use crate::spec::Spec;
use crate::stack::Settings;

const NAME: &str = "vhost-net";
/// Descriptors that are not flows': queues, memory, logs.
const SPARE_DESCRIPTORS: u64 = 512;

/// How long captures may take to tell their clients the rest, in the end.
const CAPTURES_END: Duration = Duration::from_millis(500);

/// The calls that make the host's sockets, which no other card makes.
const SOCKET_CALLS: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
];

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    crate::memory::use_fresh_pages();
    // First of all: what is at the number of --fd belongs to us before anything else is opened.
    let listener = args.socket.open()?;
    let mut host = Resolvers::of_host();
    let spec = args.interface.spec(host.read().unwrap_or_default());
    let upstream = Arc::new(Upstream::new(&spec.upstream_dns));
    // Servers that somebody named are those.
    let followed = args.interface.dns_upstream.is_empty().then_some(host);
    let timeouts = args.policy.options().timeouts;
    if let Some(v6) = spec.v6.filter(|v6| !v6.contains(v6.address)) {
        anyhow::bail!(
            "--ipv6-address {} is not of the prefix {}/64",
            v6.address,
            v6.prefix
        );
    }
    let settings = Settings {
        flows_max: args.flows as usize,
        host_loopback: args.map_host_loopback.clone(),
        udp_one_way: Duration::from_secs(timeouts.udp.into()),
        udp_stream: Duration::from_secs(timeouts.udp_stream.into()),
        ..Settings::default()
    };
    let (mut local, flow_log) = local(args, &spec)?;
    local.upstream = Some(Arc::clone(&upstream));
    if let Some(path) = &args.interface.network {
        let meeting = Meeting::open(path, Id::new(spec.mac), args.user)
            .context("cannot join the private network")?;
        let (spec, rules) = (Arc::new(spec.clone()), local.rules.clone());
        local.lan = Some(Arc::new(Lan::new(meeting, spec, rules)));
    }
    let device = Arc::new(NetDevice::new(spec, settings, local, args.queue_pairs));
    let limits = args.limits.spec();
    device
        .set_limits(limits)
        .context("the limits cannot be kept")?;
    let has_default_groups = args.security_groups.is_none();
    let publisher = Arc::new(Publisher::new(Arc::clone(&device), has_default_groups));
    for rule in &args.publish {
        let port = publisher.add(*rule);
        port.with_context(|| format!("cannot publish {rule}"))?;
    }
    let registry = Registry::new("vhost_net");
    device.register(&registry);
    if let Some(file) = &flow_log {
        file.stats().register(&registry);
    }
    let may_ping_now = Arc::new(AtomicBool::new(true));
    registry.gauge(
        "ping_allowed",
        "Whether the host gives the card echo sockets (net.ipv4.ping_group_range)",
        Vec::new(),
        {
            let may_ping = Arc::clone(&may_ping_now);
            move || may_ping.load(Ordering::Relaxed).into()
        },
    );
    let stop = StopSignal::from_signals().context("cannot wait for signals")?;
    let control = args.control_socket.as_deref().map(|path| {
        let server = ControlServer::bind(path, NAME, env!("CARGO_PKG_VERSION"), &registry)?;
        let facts = Facts {
            device: Arc::clone(&device),
            publisher: Arc::clone(&publisher),
            may_ping: Arc::clone(&may_ping_now),
            stop: stop.clone(),
        };
        let server = control::methods(server, facts);
        anyhow::Ok(resolvers::methods(server, &upstream))
    });
    let control = control.transpose()?;

    let report = sandbox(args, followed.as_ref()).context("cannot set up the sandbox")?;
    tracing::info!("sandboxed: {report}");
    // As the user that it is now.
    if !may_ping() {
        may_ping_now.store(false, Ordering::Relaxed);
        tracing::warn!(
            "the guest cannot ping beyond the card: the host's net.ipv4.ping_group_range leaves out \
             this group; sysctl net.ipv4.ping_group_range='0 2147483647' lets everybody"
        );
    }

    let control = control
        .map(|server| server.spawn(stop.clone()))
        .transpose()?;
    // Dropped after the queues' threads, which leave their last windows to it.
    let flow_log = flow_log.map(FlowFile::spawn).transpose()?;
    // Ends with the process if not before: it holds nothing.
    let _followed = followed
        .map(|host| host.follow(upstream, stop.clone()))
        .transpose()
        .context("cannot follow the host's name servers")?;
    let backend = Backend::new(Arc::clone(&device), device.queue_stats())?;
    tracing::info!("serving {}", describe(&device));
    let served = backend.serve(listener, &stop);
    drop(backend);
    drop(flow_log);
    drop(control);
    device.tap().wait_ended(CAPTURES_END);
    Ok(served?)
}

/// What services and policy are told, from the files that the command line names.
fn local(args: &ServeArgs, spec: &Spec) -> anyhow::Result<(LocalOptions, Option<FlowFile>)> {
    let groups = match &args.security_groups {
        Some(path) => read_toml(path)?,
        None => default_groups(args.publish.iter().copied()),
    };
    let rules = SharedRules::new(groups).context("the security groups are wrong")?;
    let mut metadata = match &args.metadata {
        Some(path) => read_toml(path)?,
        None => MetadataSpec::default(),
    };
    if let Some(path) = &args.user_data {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read user-data from {}", path.display()))?;
        metadata.user_data = Some(text);
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).context("no randomness for the metadata service's tokens")?;
    let imds = Imds::new(&metadata, spec, key, Instant::now()).context("the metadata are wrong")?;
    let who = Identity {
        account: metadata.account,
        interface: interface_id(spec),
    };
    let open = |path: &PathBuf| FlowFile::open(path, args.flow_log_size, args.flow_log_keep, who);
    let flow_log = args.flow_log.as_ref().map(open).transpose()?;
    let options = LocalOptions {
        rules: Some(Arc::new(rules)),
        policy: args.policy.options(),
        peers: args.policy.neighbor.clone(),
        imds: Some(Arc::new(imds)),
        flow_log: flow_log.as_ref().map(|file| FlowLogOptions {
            feed: file.feed(),
            interval: args.flow_log_interval,
        }),
        ..LocalOptions::default()
    };
    Ok((options, flow_log))
}

fn describe(device: &NetDevice) -> String {
    let spec = device.spec();
    let v4 = spec
        .v4
        .map(|v4| format!(", {}/{}", v4.address, v4.prefix_len));
    let v6 = spec.v6.map(|v6| format!(", {}/64", v6.address));
    format!(
        "interface {}{}{}, MTU {}",
        spec.mac,
        v4.unwrap_or_default(),
        v6.unwrap_or_default(),
        spec.mtu
    )
}

fn sandbox(
    args: &ServeArgs,
    followed: Option<&Resolvers>,
) -> Result<offload::sandbox::Report, offload::sandbox::SandboxError> {
    let mut builder = Sandbox::builder()
        .seccomp(args.seccomp)
        .network()
        .allow_calls(SOCKET_CALLS)
        // Each flow has a socket.
        .max_open_files(u64::from(args.flows) + SPARE_DESCRIPTORS);
    if let Some(user) = args.user {
        builder = builder.user(user);
    }
    if let Some(path) = followed.and_then(Resolvers::reach) {
        builder = builder.read(path);
    }
    if let Some(network) = &args.interface.network {
        // Who else is there is read from the directory, which is open.
        builder = builder
            .allow_calls(&[libc::SYS_getdents64])
            .remove_in(network);
    }
    // The sockets' own files are removed in the end.
    let paths = args.socket.socket_path.iter().chain(&args.control_socket);
    paths
        .fold(builder, |builder, path| builder.remove_file(path))
        .apply()
}
