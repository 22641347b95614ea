//! `serve`: the card.
//!
//! In this order, because each step needs what a later one takes away: sockets and published ports,
//! then the sandbox, then threads and frontends.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use offload::control::{ControlError, ControlServer};
use offload::sandbox::Sandbox;
use offload::stop::StopSignal;
use offload::telemetry::Registry;
use offload::vhost_user::Backend;
use serde_json::json;

use crate::args::ServeArgs;
use crate::device::NetDevice;
use crate::device::limits::LimitsSpec;
use crate::host::publish::{Published, Transport};
use crate::locals::{FlowLogOptions, LocalOptions};
use crate::policy::SharedRules;
use crate::policy::flowfile::FlowFile;
use crate::policy::flowlog::Identity;
use crate::policy::groups::GroupsSpec;
use crate::services::imds::{Imds, MetadataSpec, interface_id};
use crate::spec::Spec;
use crate::stack::Settings;

const NAME: &str = "vhost-net";
/// Descriptors that are not flows': queues, memory, logs.
const SPARE_DESCRIPTORS: u64 = 512;

/// The calls that make the host's sockets, which no other card makes.
const SOCKET_CALLS: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
];

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    // First of all: what is at the number of --fd belongs to us before anything else is opened.
    let listener = args.socket.open()?;
    let spec = args.interface.spec(resolvers());
    let settings = Settings {
        flows_max: args.flows as usize,
        host_loopback: args.map_host_loopback.clone(),
        ..Settings::default()
    };
    let (local, flow_log) = local(args, &spec)?;
    let device = Arc::new(NetDevice::new(spec, settings, local, args.queue_pairs));
    let limits = args.limits.spec();
    device
        .set_limits(limits)
        .context("the limits cannot be kept")?;
    for rule in &args.publish {
        let port = Published::open(*rule).with_context(|| format!("cannot publish {rule}"))?;
        device.publish(|ports| ports.push(Arc::new(port)));
    }
    let registry = Registry::new("vhost_net");
    device.register(&registry);
    if let Some(file) = &flow_log {
        file.stats().register(&registry);
    }
    let control = args
        .control_socket
        .as_deref()
        .map(|path| control(path, &registry, &device))
        .transpose()?;
    let stop = StopSignal::from_signals().context("cannot wait for signals")?;

    let report = sandbox(args).context("cannot set up the sandbox")?;
    tracing::info!("sandboxed: {report}");

    let control = control
        .map(|server| server.spawn(stop.clone()))
        .transpose()?;
    // Dropped after the queues' threads, which leave their last windows to it.
    let flow_log = flow_log.map(FlowFile::spawn).transpose()?;
    let backend = Backend::new(Arc::clone(&device), device.queue_stats())?;
    tracing::info!("serving {}", describe(&device));
    let served = backend.serve(listener, &stop);
    drop(backend);
    drop(flow_log);
    drop(control);
    Ok(served?)
}

/// What services and policy are told, from the files that the command line names.
fn local(args: &ServeArgs, spec: &Spec) -> anyhow::Result<(LocalOptions, Option<FlowFile>)> {
    let groups = match &args.security_groups {
        Some(path) => read_toml(path)?,
        None => {
            let mut groups = GroupsSpec::default();
            for rule in &args.publish {
                let protocol = match rule.transport {
                    Transport::Tcp => "tcp",
                    Transport::Udp => "udp",
                };
                groups.allow_published(protocol, rule.guest_port);
            }
            groups
        }
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
        imds: Some(Arc::new(imds)),
        flow_log: flow_log.as_ref().map(|file| FlowLogOptions {
            feed: file.feed(),
            interval: args.flow_log_interval,
        }),
        ..LocalOptions::default()
    };
    Ok((options, flow_log))
}

fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is wrong", path.display()))
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

/// The host's own name servers. What is not there or cannot be read is none.
fn resolvers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = |line: &str| line.trim().strip_prefix("nameserver")?.trim().parse().ok();
    text.lines().filter_map(server).collect()
}

fn control(
    path: &Path,
    registry: &Registry,
    device: &Arc<NetDevice>,
) -> anyhow::Result<ControlServer> {
    let server = ControlServer::bind(path, NAME, env!("CARGO_PKG_VERSION"), registry)?;
    let about = Arc::clone(device);
    let server = server.method("security_groups", {
        let device = Arc::clone(device);
        move |_| {
            let rules = device.rules().ok_or_else(no_groups)?;
            Ok(json!({ "spec": rules.spec(), "rules": rules.report() }))
        }
    });
    let server = server.method("set_security_groups", {
        let device = Arc::clone(device);
        move |params| {
            let rules = device.rules().ok_or_else(no_groups)?;
            let spec: GroupsSpec = serde_json::from_value(params)
                .map_err(|error| ControlError::bad_params(error.to_string()))?;
            rules
                .replace(spec)
                .map_err(|error| ControlError::bad_params(error.to_string()))?;
            Ok(json!({ "rules": rules.report() }))
        }
    });
    let server = server.method("limits", {
        let device = Arc::clone(device);
        move |params| {
            if !params.is_null() {
                let spec: LimitsSpec = serde_json::from_value(params)
                    .map_err(|error| ControlError::bad_params(error.to_string()))?;
                device
                    .set_limits(spec)
                    .map_err(|error| ControlError::bad_params(error.to_string()))?;
            }
            Ok(json!(device.limits()))
        }
    });
    Ok(server.method("interface", move |_| {
        let spec = about.spec();
        Ok(json!({
            "mac": spec.mac.to_string(),
            "ipv4": spec.v4.map(|v4| v4.address.to_string()),
            "ipv6": spec.v6.map(|v6| v6.address.to_string()),
            "mtu": spec.mtu,
            "published": about.publish(|ports| {
                ports.iter().map(ToString::to_string).collect::<Vec<_>>()
            }),
        }))
    }))
}

fn no_groups() -> ControlError {
    ControlError::failed("this card has no security groups")
}

fn sandbox(args: &ServeArgs) -> Result<offload::sandbox::Report, offload::sandbox::SandboxError> {
    let mut builder = Sandbox::builder()
        .seccomp(args.seccomp)
        .network()
        .allow_calls(SOCKET_CALLS)
        // Each flow has a socket.
        .max_open_files(u64::from(args.flows) + SPARE_DESCRIPTORS);
    if let Some(user) = args.user {
        builder = builder.user(user);
    }
    // The sockets' own files are removed in the end.
    let paths = args.socket.socket_path.iter().chain(&args.control_socket);
    paths
        .fold(builder, |builder, path| builder.remove_file(path))
        .apply()
}
