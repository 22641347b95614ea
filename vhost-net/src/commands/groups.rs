//! `groups`: tells or replaces the security groups of a running card.

use anyhow::Context;
use offload::control::ControlClient;
use serde_json::Value;

use super::read_toml;
use crate::args::GroupsArgs;
use crate::policy::groups::GroupsSpec;

pub(super) fn run(args: &GroupsArgs) -> anyhow::Result<()> {
    let mut client = ControlClient::connect(&args.control.control_socket)?;
    if let Some(path) = &args.set {
        let spec: GroupsSpec = read_toml(path)?;
        let spec = serde_json::to_value(spec).context("the groups as JSON")?;
        client.call("set_security_groups", spec)?;
    }
    let told = client.call("security_groups", Value::Null)?;
    if args.json {
        say!("{told}");
        return Ok(());
    }
    for rule in told["rules"].as_array().into_iter().flatten() {
        say!("{}", line(rule));
    }
    Ok(())
}

/// A rule and how many flows it has let begin.
fn line(told: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let rule = &told["rule"];
    let mut what = text(&rule["protocol"]);
    if !rule["ports"].is_null() {
        what = format!("{what} {}", text(&rule["ports"]));
    }
    if !rule["icmp-type"].is_null() {
        what = format!("{what} type {}", rule["icmp-type"]);
    }
    if !rule["icmp-code"].is_null() {
        what = format!("{what} code {}", rule["icmp-code"]);
    }
    let peers: Vec<String> = rule["peers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(text)
        .collect();
    let flows = told["flows"].as_u64().unwrap_or_default();
    format!(
        "{:<8} {:<16} {what:<16} {:<40} {flows} flows",
        text(&told["direction"]),
        text(&told["group"]),
        peers.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::SharedRules;

    #[test]
    fn a_rule_is_told_in_one_line_as_the_card_reports_it() {
        let text = "interface = ['web']\n[[group]]\nid = 'web'\n\
                    [[group.ingress]]\nprotocol = 'tcp'\nports = '80-81'\npeers = ['0.0.0.0/0', '::/0']\n\
                    [[group.egress]]\nprotocol = 'icmp'\nicmp-type = 8\npeers = ['10.0.0.0/8']\n";
        let rules = SharedRules::new(toml::from_str(text).unwrap()).unwrap();
        let report = serde_json::to_value(rules.report()).unwrap();
        let lines: Vec<String> = report.as_array().unwrap().iter().map(line).collect();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(
            words(&lines[0]),
            "ingress web tcp 80-81 0.0.0.0/0, ::/0 0 flows"
        );
        assert_eq!(
            words(&lines[1]),
            "egress web icmp type 8 10.0.0.0/8 0 flows"
        );
    }
}
