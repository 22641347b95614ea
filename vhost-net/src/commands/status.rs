//! `status`: what the interface of a running card is.

use offload::control::ControlClient;
use serde_json::{Value, json};

use crate::args::StatusArgs;

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let mut client = ControlClient::connect(&args.control.control_socket)?;
    let version = client.call("version", Value::Null)?;
    let interface = client.call("interface", Value::Null)?;
    if args.json {
        say!("{}", json!({ "card": version, "interface": interface }));
    } else {
        say!("{}", text(&version, &interface));
    }
    Ok(())
}

fn text(version: &Value, interface: &Value) -> String {
    let of = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "none".to_owned(),
        other => other.to_string(),
    };
    let mut lines = vec![
        format!(
            "card       {} {}",
            of(&version["name"]),
            of(&version["version"])
        ),
        format!("mac        {}", of(&interface["mac"])),
        format!("ipv4       {}", of(&interface["ipv4"])),
        format!("ipv6       {}", of(&interface["ipv6"])),
        format!("mtu        {}", of(&interface["mtu"])),
        format!("ping       {}", of(&interface["ping"])),
    ];
    for rule in interface["published"].as_array().into_iter().flatten() {
        lines.push(format!("published  {}", of(rule)));
    }
    lines.join("\n")
}
