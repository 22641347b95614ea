//! What the paths name: the metadata of an instance as a tree of texts.
//!
//! Listings are as EC2 has them: one name a line, in order, a slash behind what has something below
//! it, and no newline at the end. Keys are listed as `0=name`. All versions show the same tree:
//! clients pin a version for the shape of what they read, and only ever gain names.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::spec::Spec;

/// The versions that a path may begin with; clients take the newest that they know.
pub const VERSIONS: [&str; 31] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-07-09",
    "2022-09-24",
    "2023-02-15",
    "2024-04-11",
    "latest",
];

/// Longest user-data, in bytes. EC2 has 16 KiB; cloud-init archives grow.
pub const USER_DATA_MAX: usize = 64 << 10;

/// What an instance is told about itself. Everything has a default that follows from the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct MetadataSpec {
    /// Whether there is a service at all; without it everything is 403.
    pub enabled: bool,
    /// Answers without a token too (IMDSv1).
    pub version_1: bool,
    /// TTL of the answer to a PUT, 1 to 64.
    pub hop_limit: u8,
    /// As `i-0123456789abcdef0`; when absent it follows from the hardware address.
    pub instance_id: Option<String>,
    /// As `m5.large`.
    pub instance_type: String,
    /// As `ami-...`.
    pub image_id: String,
    /// Twelve digits.
    pub account: String,
    /// As `eu-central-1a`; the region is this without the last letter.
    pub availability_zone: String,
    /// Lines of `authorized_keys`; the third word names the key.
    pub public_keys: Vec<String>,
    /// Names of the security groups.
    pub security_groups: Vec<String>,
    /// Shown below `tags/instance/`.
    pub tags: BTreeMap<String, String>,
    /// What `user-data` gives; 404 without it.
    pub user_data: Option<String>,
}

impl Default for MetadataSpec {
    fn default() -> Self {
        Self {
            enabled: true,
            version_1: false,
            hop_limit: 1,
            instance_id: None,
            instance_type: "offload.virtual".into(),
            image_id: "ami-00000000000000000".into(),
            account: "000000000000".into(),
            availability_zone: "local-1a".into(),
            public_keys: Vec::new(),
            security_groups: vec!["default".into()],
            tags: BTreeMap::new(),
            user_data: None,
        }
    }
}

/// What is wrong with the metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// Not a TTL that makes sense.
    #[error(
        "hop-limit {0}: use 1 to 64; 1 keeps tokens on the machine, 2 lets containers have them"
    )]
    HopLimit(u8),
    /// Would break a listing or a line.
    #[error("{name} {value:?} has a line break or is empty: use one line of text")]
    Line {
        /// Which.
        name: &'static str,
        /// What it says.
        value: String,
    },
    /// Would be a path of its own.
    #[error(
        "tag {0:?}: a tag's name on the metadata service has no '/', no spaces, and is not '.' or '..'"
    )]
    Tag(String),
    /// Too long.
    #[error("user-data of {0} bytes: {USER_DATA_MAX} are allowed; let it fetch the rest")]
    UserData(usize),
}

/// A place in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// Has names below it.
    Directory(BTreeMap<String, Entry>),
    /// Is a text.
    Text(String),
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the listing shows instead of the name, as `0=key`.
    label: Option<String>,
    node: Node,
}

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A directory's listing.
    Listing(String),
    /// A text.
    Text(&'a str),
}

impl Node {
    fn empty() -> Self {
        Self::Directory(BTreeMap::new())
    }

    /// Puts a text at a path, making the directories on the way.
    fn put(&mut self, path: &str, text: impl Into<String>) {
        let mut node = self;
        for name in path.split('/') {
            if let Self::Text(_) = node {
                *node = Self::empty();
            }
            let Self::Directory(entries) = node else {
                return;
            };
            let entry = entries.entry(name.to_owned()).or_insert_with(|| Entry {
                label: None,
                node: Self::empty(),
            });
            node = &mut entry.node;
        }
        *node = Self::Text(text.into());
    }

    /// Has the listing show something else for the name at a path.
    fn label(&mut self, path: &str, label: String) {
        let mut node = self;
        let mut names = path.split('/').peekable();
        while let (Some(name), Self::Directory(entries)) = (names.next(), node) {
            let Some(entry) = entries.get_mut(name) else {
                return;
            };
            if names.peek().is_none() {
                entry.label = Some(label);
                return;
            }
            node = &mut entry.node;
        }
    }

    /// What is at a path below this node; empty names on the way do not count.
    #[must_use]
    pub fn find<'a, 'p>(&'a self, names: impl Iterator<Item = &'p str>) -> Option<Found<'a>> {
        let mut node = self;
        for name in names.filter(|name| !name.is_empty()) {
            let Self::Directory(entries) = node else {
                return None;
            };
            node = &entries.get(name)?.node;
        }
        Some(match node {
            Self::Text(text) => Found::Text(text),
            Self::Directory(entries) => {
                let name = |(name, entry): (&String, &Entry)| match (&entry.label, &entry.node) {
                    (Some(label), _) => label.clone(),
                    (None, Self::Directory(_)) => format!("{name}/"),
                    (None, Self::Text(_)) => name.clone(),
                };
                Found::Listing(entries.iter().map(name).collect::<Vec<_>>().join("\n"))
            }
        })
    }
}

/// What an interface is called, as `eni-0000052540012345f`: made of its hardware address.
#[must_use]
pub fn interface_id(spec: &Spec) -> String {
    let bytes = spec.mac.0;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("eni-{hex:0>17}")
}

impl MetadataSpec {
    /// What is below each version.
    ///
    /// # Errors
    ///
    /// What is wrong with the texts.
    pub fn tree(&self, spec: &Spec) -> Result<Node, MetadataError> {
        self.check()?;
        let mut tree = Node::empty();
        // The top lists its three names without slashes, as EC2 does.
        let mac = spec.mac.to_string().replace('-', ":");
        let bytes = spec.mac.0;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let instance = self
            .instance_id
            .clone()
            .unwrap_or_else(|| format!("i-{hex:0>17}"));
        let v4 = spec.v4.map(|v4| v4.address.to_string());
        let name = spec.hostname.clone().unwrap_or_else(|| match &v4 {
            Some(address) => format!("ip-{}", address.replace('.', "-")),
            None => instance.clone(),
        });
        let name = match &spec.domain {
            Some(domain) if !name.contains('.') => format!("{name}.{domain}"),
            _ => name,
        };
        let zone = &self.availability_zone;
        let region = zone.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let groups = self.security_groups.join("\n");

        let mut meta = |path: &str, text: &str| tree.put(&format!("meta-data/{path}"), text);
        meta("ami-id", &self.image_id);
        meta("ami-launch-index", "0");
        meta("ami-manifest-path", "(unknown)");
        meta("hostname", &name);
        meta("instance-action", "none");
        meta("instance-id", &instance);
        meta("instance-life-cycle", "on-demand");
        meta("instance-type", &self.instance_type);
        meta("local-hostname", &name);
        meta("mac", &mac);
        meta("placement/availability-zone", zone);
        meta("placement/region", region);
        meta("profile", "default-hvm");
        meta("reservation-id", &format!("r-{hex:0>17}"));
        meta("security-groups", &groups);
        meta("services/domain", "amazonaws.com");
        meta("services/partition", "aws");
        if let Some(address) = &v4 {
            meta("local-ipv4", address);
        }
        if let Some(v6) = spec.v6 {
            meta("ipv6", &v6.address.to_string());
        }
        let mut link = |path: &str, text: &str| {
            tree.put(
                &format!("meta-data/network/interfaces/macs/{mac}/{path}"),
                text,
            );
        };
        link("device-number", "0");
        link("interface-id", &interface_id(spec));
        link("local-hostname", &name);
        link("mac", &mac);
        link("network-card", "0");
        link("owner-id", &self.account);
        link("security-groups", &groups);
        let network = |address: IpAddr, length: u8| {
            let network = ipnet::IpNet::new(address, length);
            network.map_or_else(|_| String::new(), |network| network.trunc().to_string())
        };
        if let Some(v4) = spec.v4 {
            let block = network(v4.address.into(), v4.prefix_len);
            link("local-ipv4s", &v4.address.to_string());
            for path in [
                "subnet-ipv4-cidr-block",
                "vpc-ipv4-cidr-block",
                "vpc-ipv4-cidr-blocks",
            ] {
                link(path, &block);
            }
        }
        if let Some(v6) = spec.v6 {
            let block = network(v6.prefix.into(), 64);
            link("ipv6s", &v6.address.to_string());
            link("subnet-ipv6-cidr-blocks", &block);
            link("vpc-ipv6-cidr-blocks", &block);
        }
        for (index, key) in self.public_keys.iter().enumerate() {
            let name = key.split_whitespace().nth(2).unwrap_or("key");
            let place = format!("meta-data/public-keys/{index}");
            tree.put(&format!("{place}/openssh-key"), key.as_str());
            tree.label(&place, format!("{index}={name}"));
        }
        for (name, value) in &self.tags {
            tree.put(&format!("meta-data/tags/instance/{name}"), value.as_str());
        }
        let document = json!({
            "accountId": self.account,
            "architecture": std::env::consts::ARCH,
            "availabilityZone": zone,
            "billingProducts": null,
            "devpayProductCodes": null,
            "marketplaceProductCodes": null,
            "imageId": self.image_id,
            "instanceId": instance,
            "instanceType": self.instance_type,
            "kernelId": null,
            "privateIp": v4,
            "ramdiskId": null,
            "region": region,
            "version": "2017-09-30",
        });
        tree.put(
            "dynamic/instance-identity/document",
            format!("{document:#}"),
        );
        if let Some(data) = &self.user_data {
            tree.put("user-data", data.as_str());
        }
        for top in ["dynamic", "meta-data"] {
            tree.label(top, top.into());
        }
        Ok(tree)
    }

    fn check(&self) -> Result<(), MetadataError> {
        if !(1..=64).contains(&self.hop_limit) {
            return Err(MetadataError::HopLimit(self.hop_limit));
        }
        let one = |name, value: &String| {
            if value.is_empty() || value.contains(['\n', '\r', '\0']) {
                let value = value.clone();
                return Err(MetadataError::Line { name, value });
            }
            Ok(())
        };
        if let Some(id) = &self.instance_id {
            one("instance-id", id)?;
        }
        one("instance-type", &self.instance_type)?;
        one("image-id", &self.image_id)?;
        one("account", &self.account)?;
        one("availability-zone", &self.availability_zone)?;
        self.public_keys
            .iter()
            .try_for_each(|key| one("public key", key))?;
        self.security_groups
            .iter()
            .try_for_each(|name| one("security group", name))?;
        for name in self.tags.keys() {
            let is_path = name.contains('/') || matches!(name.as_str(), "." | ".." | "_index");
            if name.is_empty() || is_path || name.contains(char::is_whitespace) {
                return Err(MetadataError::Tag(name.clone()));
            }
        }
        match self.user_data.as_ref().map(String::len) {
            Some(length) if length > USER_DATA_MAX => Err(MetadataError::UserData(length)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
