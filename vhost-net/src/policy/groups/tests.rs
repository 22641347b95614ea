use super::*;

fn parse(text: &str) -> Result<Rules, GroupsError> {
    toml::from_str::<GroupsSpec>(text).unwrap().compile()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

const WEB: &str = r#"
interface = ["web"]

[[group]]
id = "web"
[[group.ingress]]
protocol = "tcp"
ports = "8000-8100"
peers = ["10.0.0.0/8", "admins"]
[[group.ingress]]
protocol = "icmp"
icmp-type = 8
peers = ["0.0.0.0/0"]
[[group.egress]]
protocol = "all"
peers = ["0.0.0.0/0", "::/0"]

[[group]]
id = "admins"
members = ["192.168.7.1", "fd00::7"]
"#;

#[test]
fn a_rule_allows_its_protocol_ports_and_peers_and_nothing_else() {
    let rules = parse(WEB).unwrap();
    let rule = &rules.ingress[0];
    let none = (0, 0);
    assert!(rule.allows(6, 8000, none, ip("10.1.2.3")));
    assert!(rule.allows(6, 8100, none, ip("10.1.2.3")));
    assert!(!rule.allows(6, 8101, none, ip("10.1.2.3")));
    assert!(!rule.allows(17, 8000, none, ip("10.1.2.3")));
    assert!(!rule.allows(6, 8000, none, ip("11.0.0.1")));
}

#[test]
fn a_group_stands_for_its_members_in_both_families() {
    let rules = parse(WEB).unwrap();
    let rule = &rules.ingress[0];
    assert!(rule.allows(6, 8080, (0, 0), ip("192.168.7.1")));
    assert!(rule.allows(6, 8080, (0, 0), ip("fd00::7")));
    assert!(!rule.allows(6, 8080, (0, 0), ip("192.168.7.2")));
}

#[test]
fn icmp_is_told_by_type_and_code() {
    let rules = parse(WEB).unwrap();
    let rule = &rules.ingress[1];
    assert!(rule.allows(1, 0, (8, 0), ip("1.2.3.4")));
    assert!(rule.allows(1, 0, (8, 7), ip("1.2.3.4")));
    assert!(!rule.allows(1, 0, (13, 0), ip("1.2.3.4")));
    assert!(!rule.allows(58, 0, (8, 0), ip("1.2.3.4")));
    assert!(
        !rule.allows(1, 0, (8, 0), ip("fd00::1")),
        "a network of IPv4 is not IPv6"
    );
}

#[test]
fn the_default_lets_everything_out_and_in_only_what_is_of_the_same_group() {
    let mut spec = GroupsSpec::default();
    spec.groups[0].members = vec![ip("10.0.2.16")];
    let rules = spec.compile().unwrap();
    let none = (0, 0);
    assert!(rules.egress[0].allows(6, 443, none, ip("8.8.8.8")));
    assert!(rules.egress[0].allows(17, 53, none, ip("2001:db8::1")));
    assert!(rules.ingress[0].allows(6, 22, none, ip("10.0.2.16")));
    assert!(!rules.ingress[0].allows(6, 22, none, ip("10.0.2.17")));
}

#[test]
fn rules_of_all_groups_of_the_interface_count_and_those_of_others_do_not() {
    let rule = |port: u16| RuleSpec {
        protocol: "tcp".into(),
        ports: Some(port.to_string()),
        icmp_type: None,
        icmp_code: None,
        peers: vec!["0.0.0.0/0".into()],
        description: None,
    };
    let group = |id: &str, port| GroupSpec {
        id: id.into(),
        ingress: vec![rule(port)],
        ..GroupSpec::default()
    };
    let spec = GroupsSpec {
        interface: vec!["a".into(), "c".into(), "a".into()],
        groups: vec![group("a", 1), group("b", 2), group("c", 3)],
    };
    let rules = spec.compile().unwrap();
    let groups: Vec<_> = rules
        .ingress
        .iter()
        .map(|rule| rule.group.as_str())
        .collect();
    assert_eq!(groups, ["a", "c"]);
    assert!(rules.egress.is_empty());
}

#[test]
fn each_mistake_is_named_with_its_place_and_its_remedy() {
    let rule =
        |body: &str| format!("interface = ['a']\n[[group]]\nid = 'a'\n[[group.ingress]]\n{body}\n");
    let any = "peers = ['::/0']";
    for (text, wanted) in [
        (
            rule(&format!("protocol = 'sctp'\n{any}")),
            "use tcp, udp, icmp",
        ),
        (
            rule(&format!("protocol = '256'\n{any}")),
            "use tcp, udp, icmp",
        ),
        (
            rule(&format!("protocol = 'tcp'\nports = '90-80'\n{any}")),
            "first-last",
        ),
        (
            rule(&format!("protocol = 'tcp'\nports = '65536'\n{any}")),
            "first-last",
        ),
        (
            rule(&format!("protocol = 'all'\nports = '80'\n{any}")),
            "leave it out",
        ),
        (
            rule(&format!("protocol = 'tcp'\nicmp-type = 8\n{any}")),
            "leave it out",
        ),
        (
            rule(&format!("protocol = 'icmp'\nicmp-code = 0\n{any}")),
            "needs `icmp-type`",
        ),
        (rule("protocol = 'all'\npeers = []"), "0.0.0.0/0"),
        (
            rule("protocol = 'all'\npeers = ['10.0.2.15/24']"),
            "write 10.0.2.0/24",
        ),
        (
            rule("protocol = 'all'\npeers = ['sg-1']"),
            "nor a group that is defined",
        ),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        assert!(error.contains("group \"a\", ingress rule 0"), "{error}");
    }
    for (text, wanted) in [
        ("interface = []\ngroup = []", "in no group"),
        ("interface = ['a']\ngroup = []", "not defined"),
        (
            "interface = ['a b']\n[[group]]\nid = 'a b'",
            "is not a name",
        ),
        (
            "interface = ['::1']\n[[group]]\nid = '::1'",
            "is not a name",
        ),
        (
            "interface = ['1.1.1.1']\n[[group]]\nid = '1.1.1.1'",
            "taken for an address",
        ),
        (
            "interface = ['a']\n[[group]]\nid = 'a'\n[[group]]\nid = 'a'",
            "there twice",
        ),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn sizes_are_bounded() {
    let mut spec = GroupsSpec::default();
    spec.groups[0].members = vec![ip("10.0.0.1"); PEERS_MAX + 1];
    assert!(matches!(spec.compile(), Err(GroupsError::TooMany { .. })));
    let mut spec = GroupsSpec::default();
    let rule = spec.groups[0].egress[0].clone();
    spec.groups[0].egress = vec![rule; RULES_MAX + 1];
    assert!(matches!(spec.compile(), Err(GroupsError::TooMany { .. })));
}

#[test]
fn what_is_read_is_written_the_same_as_toml_and_as_json() {
    let spec: GroupsSpec = toml::from_str(WEB).unwrap();
    let toml = toml::to_string(&spec).unwrap();
    assert_eq!(toml::from_str::<GroupsSpec>(&toml).unwrap(), spec);
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<GroupsSpec>(&json).unwrap(), spec);
    assert!(toml::from_str::<GroupsSpec>("interface = []\ngroup = []\nfoo = 1").is_err());
}
