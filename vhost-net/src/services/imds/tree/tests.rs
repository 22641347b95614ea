use super::*;

fn metadata() -> MetadataSpec {
    MetadataSpec {
        public_keys: vec![
            "ssh-ed25519 AAAA alice@example".into(),
            "ssh-rsa BBBB bob".into(),
        ],
        tags: [("Name".to_owned(), "web 1".to_owned())].into(),
        user_data: Some("#cloud-config\n".into()),
        ..MetadataSpec::default()
    }
}

fn get(path: &str) -> Option<String> {
    let spec = Spec {
        hostname: Some("web-1".into()),
        domain: Some("example.internal".into()),
        ..Spec::default()
    };
    let tree = metadata().tree(&spec).unwrap();
    tree.find(path.split('/')).map(|found| match found {
        Found::Listing(text) => text,
        Found::Text(text) => text.to_owned(),
    })
}

#[test]
fn the_listings_are_as_ec2_has_them() {
    assert_eq!(get("").unwrap(), "dynamic\nmeta-data\nuser-data");
    let top = get("meta-data/").unwrap();
    assert!(!top.ends_with('\n'));
    let lines: Vec<_> = top.lines().collect();
    assert!(lines.contains(&"instance-id") && lines.contains(&"network/"));
    assert!(lines.contains(&"placement/") && lines.contains(&"public-keys/"));
    assert!(lines.is_sorted());
    assert_eq!(
        get("meta-data/public-keys/").unwrap(),
        "0=alice@example\n1=bob"
    );
    assert_eq!(get("meta-data/public-keys/0/").unwrap(), "openssh-key");
    assert_eq!(
        get("meta-data/network/interfaces/macs/").unwrap(),
        "52:54:00:12:34:56/"
    );
    assert_eq!(
        get("meta-data/placement").unwrap(),
        "availability-zone\nregion"
    );
}

#[test]
fn the_texts_follow_from_the_interface() {
    let same = |path: &str, text: &str| assert_eq!(get(path).as_deref(), Some(text), "{path}");
    same("meta-data/instance-id", "i-00000525400123456");
    same("meta-data/local-hostname", "web-1.example.internal");
    same("meta-data/local-ipv4", "10.0.2.15");
    same("meta-data/mac", "52:54:00:12:34:56");
    same(
        "meta-data/public-keys/0/openssh-key",
        "ssh-ed25519 AAAA alice@example",
    );
    same("meta-data/placement/region", "local-1");
    same("meta-data/tags/instance/Name", "web 1");
    same("user-data", "#cloud-config\n");
    let link = "meta-data/network/interfaces/macs/52:54:00:12:34:56";
    same(&format!("{link}/subnet-ipv4-cidr-block"), "10.0.2.0/24");
    same(&format!("{link}/ipv6s"), "fd00:0:0:2::15");
    assert_eq!(get("meta-data/nothing"), None);
    assert_eq!(get("meta-data/mac/more"), None);
    let document = get("dynamic/instance-identity/document").unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["privateIp"], "10.0.2.15");
    assert_eq!(document["instanceId"], "i-00000525400123456");
}

#[test]
fn metadata_that_would_break_a_listing_are_refused_with_a_reason() {
    let refused = |change: fn(&mut MetadataSpec), wanted: &str| {
        let mut spec = metadata();
        change(&mut spec);
        let error = spec.tree(&Spec::default()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    };
    refused(|it| it.hop_limit = 0, "1 to 64");
    refused(|it| it.hop_limit = 65, "1 to 64");
    refused(|it| it.instance_id = Some(String::new()), "one line");
    refused(|it| it.public_keys.push("a\nb".into()), "one line");
    refused(
        |it| _ = it.tags.insert("a/b".into(), String::new()),
        "no '/'",
    );
    refused(
        |it| it.user_data = Some("x".repeat(USER_DATA_MAX + 1)),
        "are allowed",
    );
}

#[test]
fn an_empty_specification_is_a_good_one() {
    assert_eq!(
        toml::from_str::<MetadataSpec>("").unwrap(),
        MetadataSpec::default()
    );
    assert!(toml::from_str::<MetadataSpec>("hop-limt = 2").is_err());
}
