//! What the control socket of a serving card answers, besides what every card's does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use offload::control::{ControlError, ControlErrorKind, ControlServer, Takeover};
use offload::stop::StopSignal;
use offload::telemetry::with_causes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::capture::{self, CaptureError, Wanted};
use crate::device::NetDevice;
use crate::device::limits::LimitsSpec;
use crate::device::publisher::Publisher;
use crate::host::publish::{PublishError, Rule};
use crate::policy::groups::GroupsSpec;
use crate::services::imds::interface_id;

/// What is known of a card when it serves.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) device: Arc<NetDevice>,
    pub(super) publisher: Arc<Publisher>,
    /// Whether the host lets the guest ping beyond the card.
    pub(super) may_ping: Arc<AtomicBool>,
    /// Ends captures.
    pub(super) stop: StopSignal,
}

/// Parameters of `publish` and `unpublish`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleParams {
    rule: String,
}

pub(super) fn methods(server: ControlServer, facts: Facts) -> ControlServer {
    let facts = Arc::new(facts);
    let with = |method: fn(&Facts, Value) -> Result<Value, ControlError>| {
        let facts = Arc::clone(&facts);
        move |params| method(&facts, params)
    };
    let server = server
        .method("interface", with(interface))
        .method("security_groups", with(groups))
        .method("set_security_groups", with(set_groups))
        .method("limits", with(limits))
        .method("published", with(published))
        .method("publish", with(publish))
        .method("unpublish", with(unpublish))
        .method("network", with(network));
    let facts = Arc::clone(&facts);
    server.upgrade("capture", move |params| begin_capture(&facts, params))
}

fn read<T: DeserializeOwned>(params: Value) -> Result<T, ControlError> {
    serde_json::from_value(params).map_err(|error| ControlError::bad_params(error.to_string()))
}

fn interface(facts: &Facts, _: Value) -> Result<Value, ControlError> {
    let spec = facts.device.spec();
    let ping = if facts.may_ping.load(Ordering::Relaxed) {
        "allowed"
    } else {
        "forbidden by the host's net.ipv4.ping_group_range"
    };
    Ok(json!({
        "mac": spec.mac.to_string(),
        "ipv4": spec.v4.map(|v4| v4.address.to_string()),
        "ipv6": spec.v6.map(|v6| v6.address.to_string()),
        "mtu": spec.mtu,
        "ping": ping,
        "published": ports(facts),
    }))
}

fn groups(facts: &Facts, _: Value) -> Result<Value, ControlError> {
    let rules = facts.device.rules().ok_or_else(no_groups)?;
    Ok(json!({ "spec": rules.spec(), "rules": rules.report() }))
}

fn set_groups(facts: &Facts, params: Value) -> Result<Value, ControlError> {
    let rules = facts.device.rules().ok_or_else(no_groups)?;
    let spec: GroupsSpec = read(params)?;
    rules
        .replace(spec)
        .map_err(|error| ControlError::bad_params(error.to_string()))?;
    facts.publisher.leave_groups();
    Ok(json!({ "rules": rules.report() }))
}

fn no_groups() -> ControlError {
    ControlError::failed("this card has no security groups")
}

fn limits(facts: &Facts, params: Value) -> Result<Value, ControlError> {
    if !params.is_null() {
        let spec: LimitsSpec = read(params)?;
        facts
            .device
            .set_limits(spec)
            .map_err(|error| ControlError::bad_params(error.to_string()))?;
    }
    Ok(json!(facts.device.limits()))
}

fn network(facts: &Facts, _: Value) -> Result<Value, ControlError> {
    let lan = facts.device.lan();
    let none = || ControlError::failed("this card is on no private network");
    lan.map(|lan| lan.report()).ok_or_else(none)
}

fn ports(facts: &Facts) -> Vec<String> {
    let rules = facts.publisher.rules();
    rules.iter().map(Rule::to_string).collect()
}

fn published(facts: &Facts, _: Value) -> Result<Value, ControlError> {
    let reachable = facts.publisher.has_default_groups();
    Ok(json!({ "ports": ports(facts), "reachable": reachable }))
}

fn rule(params: Value) -> Result<Rule, ControlError> {
    let params: RuleParams = read(params)?;
    let rule = params.rule.parse::<Rule>();
    rule.map_err(|error| ControlError::bad_params(error.to_string()))
}

fn refused(error: &PublishError) -> ControlError {
    ControlError::failed(with_causes(error))
}

fn publish(facts: &Facts, params: Value) -> Result<Value, ControlError> {
    let rule = facts.publisher.add(rule(params)?);
    let rule = rule.map_err(|error| refused(&error))?;
    tracing::info!("{rule} is published");
    Ok(json!({ "rule": rule.to_string() }))
}

fn unpublish(facts: &Facts, params: Value) -> Result<Value, ControlError> {
    let rule = rule(params)?;
    let removed = facts.publisher.remove(rule);
    removed.map_err(|error| refused(&error))?;
    tracing::info!("{rule} is published no longer");
    Ok(Value::Null)
}

fn begin_capture(facts: &Facts, params: Value) -> Result<(Value, Takeover), ControlError> {
    let wanted: Wanted = if params.is_null() {
        Wanted::default()
    } else {
        read(params)?
    };
    let begun = facts.device.tap().begin(wanted);
    let running = begun.map_err(|error| match error {
        CaptureError::TooMany => ControlError::new(ControlErrorKind::Busy, error.to_string()),
        CaptureError::Snaplen => ControlError::bad_params(error.to_string()),
        CaptureError::Resources(_) => ControlError::failed(error.to_string()),
    })?;
    let interface = interface_id(facts.device.spec());
    let told = json!({ "format": "pcapng", "interface": interface, "snaplen": wanted.snaplen });
    let stop = facts.stop.clone();
    let then = move |stream| capture::spawn(running, stream, &interface, stop);
    Ok((told, Box::new(then)))
}
