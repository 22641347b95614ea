//! `publish`: tells, opens or withdraws ports of the host that lead into the guest.

use anyhow::Context;
use offload::control::ControlClient;
use serde_json::{Value, json};

use crate::args::PublishArgs;

pub(super) fn run(args: &PublishArgs) -> anyhow::Result<()> {
    let mut client = ControlClient::connect(&args.control.control_socket)?;
    let method = if args.remove { "unpublish" } else { "publish" };
    for rule in &args.rules {
        client
            .call(method, json!({ "rule": rule.to_string() }))
            .with_context(|| format!("cannot {method} {rule}"))?;
    }
    let told = client.call("published", Value::Null)?;
    if args.json {
        say!("{told}");
        return Ok(());
    }
    for rule in told["ports"].as_array().into_iter().flatten() {
        say!("{}", rule.as_str().unwrap_or_default());
    }
    if !args.rules.is_empty() && !args.remove && told["reachable"] == json!(false) {
        eprintln!("who may reach them is what the security groups say, which stay as they are");
    }
    Ok(())
}
