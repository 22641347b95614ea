//! What cards say to each other: one message a datagram of a `SOCK_SEQPACKET` socket.
//!
//! | byte 0 | what follows |
//! |---|---|
//! | 1, announcement | JSON, at most [`ANNOUNCEMENT_MAX`] bytes: who the sender is |
//! | 2, frame | three zero bytes, `struct virtio_net_hdr` of 12 bytes (virtio 1.3, 5.1.6), the frame |
//!
//! The first message each way is an announcement, a later one replaces it whole. It is JSON since it
//! is rare, and a network lives through updates of its cards: unknown keys are let be, a `protocol`
//! that is not [`PROTOCOL`] is refused. Frames are as the sender's guest gave them, with its partial
//! checksum and its super-segment; the receiver knows what its own guest takes.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use smoltcp::wire::EthernetAddress;

use crate::frame::FRAME_MAX;
use crate::frame::header::{HEADER_LEN, NetHeader};
use crate::policy::groups::INTERFACE_GROUPS_MAX;
use crate::spec::{MTU_MAX, MTU_MIN};

/// What both sides have to speak.
pub const PROTOCOL: u32 = 1;
/// Longest announcement in bytes.
pub const ANNOUNCEMENT_MAX: usize = 8192;
/// Most addresses of a member.
pub const ADDRESSES_MAX: usize = 16;
/// Bytes in front of a frame.
pub const PREFIX_LEN: usize = 4 + HEADER_LEN;
/// Longest message.
pub const MESSAGE_MAX: usize = PREFIX_LEN + FRAME_MAX;

const ANNOUNCEMENT: u8 = 1;
const FRAME: u8 = 2;

/// Who a card serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The guest's hardware address.
    pub mac: EthernetAddress,
    /// What the guest is called: one label.
    pub name: Option<String>,
    /// Bytes of an IP packet that it takes.
    pub mtu: u16,
    /// Its addresses, the given ones first.
    pub addresses: Vec<IpAddr>,
    /// The security groups that it is in.
    pub groups: Vec<String>,
}

/// An announcement as it is written.
#[derive(Serialize, Deserialize)]
struct Written {
    protocol: u32,
    mac: String,
    #[serde(default)]
    name: Option<String>,
    mtu: u16,
    addresses: Vec<IpAddr>,
    #[serde(default)]
    groups: Vec<String>,
}

/// A message that was understood.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Who the sender is.
    Announcement(Announcement),
    /// A frame; neither its header nor its bytes have been looked at.
    Frame(NetHeader, &'a [u8]),
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Shorter than what it says it is.
    #[error("the message is cut off")]
    Short,
    /// Longer than any message.
    #[error("the message is too long")]
    Long,
    /// Neither announcement nor frame.
    #[error("messages of kind {0} are not known here")]
    Kind(u8),
    /// Not the JSON that it should be.
    #[error("the announcement cannot be read")]
    Json(#[source] serde_json::Error),
    /// The other card is of another age.
    #[error("the other card speaks protocol {0}, this one {PROTOCOL}; update the older one")]
    Protocol(u32),
    /// A field of an announcement makes no sense.
    #[error("the announcement's {0} cannot be")]
    Field(&'static str),
}

/// Reads a message.
///
/// # Errors
/// See [`Refused`].
pub fn parse(bytes: &[u8]) -> Result<Message<'_>, Refused> {
    match bytes {
        [] => Err(Refused::Short),
        _ if bytes.len() > MESSAGE_MAX => Err(Refused::Long),
        [ANNOUNCEMENT, text @ ..] if text.len() > ANNOUNCEMENT_MAX => Err(Refused::Long),
        [ANNOUNCEMENT, text @ ..] => announcement(text).map(Message::Announcement),
        [FRAME, rest @ ..] => {
            let header = rest.get(3..PREFIX_LEN - 1).and_then(NetHeader::from_bytes);
            let frame = bytes.get(PREFIX_LEN..);
            let (header, frame) = header.zip(frame).ok_or(Refused::Short)?;
            Ok(Message::Frame(header, frame))
        }
        [kind, ..] => Err(Refused::Kind(*kind)),
    }
}

fn announcement(text: &[u8]) -> Result<Announcement, Refused> {
    let written: Written = serde_json::from_slice(text).map_err(Refused::Json)?;
    if written.protocol != PROTOCOL {
        return Err(Refused::Protocol(written.protocol));
    }
    let mac: Option<EthernetAddress> = written.mac.parse().ok();
    let mac = mac.filter(EthernetAddress::is_unicast);
    let is_id = |id: &String| (1..=64).contains(&id.len());
    if !written.name.as_deref().is_none_or(is_label) {
        return Err(Refused::Field("name"));
    }
    if !(MTU_MIN..=MTU_MAX).contains(&written.mtu) {
        return Err(Refused::Field("mtu"));
    }
    if written.addresses.len() > ADDRESSES_MAX {
        return Err(Refused::Field("addresses"));
    }
    if written.groups.len() > INTERFACE_GROUPS_MAX || !written.groups.iter().all(is_id) {
        return Err(Refused::Field("groups"));
    }
    Ok(Announcement {
        mac: mac.ok_or(Refused::Field("mac"))?,
        name: written.name,
        mtu: written.mtu,
        addresses: written.addresses,
        groups: written.groups,
    })
}

/// Whether a text is one label of a host's name (RFC 1123, 2.1).
#[must_use]
pub fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl Announcement {
    /// As a message.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = vec![ANNOUNCEMENT];
        let written = Written {
            protocol: PROTOCOL,
            mac: self.mac.to_string(),
            name: self.name.clone(),
            mtu: self.mtu,
            addresses: self.addresses.clone(),
            groups: self.groups.clone(),
        };
        serde_json::to_writer(&mut bytes, &written)?;
        Ok(bytes)
    }
}

/// What goes in front of a frame.
#[must_use]
pub fn prefix(header: &NetHeader) -> [u8; PREFIX_LEN] {
    let mut bytes = [0; PREFIX_LEN];
    bytes[0] = FRAME;
    let sent = NetHeader {
        num_buffers: 0,
        ..*header
    };
    bytes[4..].copy_from_slice(&sent.to_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use offload::testing::fuzz;

    use super::*;

    fn web() -> Announcement {
        Announcement {
            mac: EthernetAddress([0x52, 0x54, 0, 1, 2, 3]),
            name: Some("web-1".into()),
            mtu: 9001,
            addresses: vec![
                "10.0.2.15".parse().unwrap(),
                "fd00:0:0:2::15".parse().unwrap(),
            ],
            groups: vec!["default".into()],
        }
    }

    #[test]
    fn an_announcement_and_a_frame_survive_their_bytes() {
        let bytes = web().to_bytes().unwrap();
        assert_eq!(parse(&bytes).unwrap(), Message::Announcement(web()));
        let header = NetHeader {
            flags: 1,
            gso_type: 1,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            ..NetHeader::default()
        };
        let bytes = [&prefix(&header)[..], b"frame"].concat();
        assert_eq!(parse(&bytes).unwrap(), Message::Frame(header, b"frame"));
    }

    #[test]
    fn announcements_that_make_no_sense_are_refused_with_what_is_wrong() {
        let bent = |key: &str, value: serde_json::Value| {
            let bytes = web().to_bytes().unwrap();
            let mut json: serde_json::Value = serde_json::from_slice(&bytes[1..]).unwrap();
            json[key] = value;
            [&[ANNOUNCEMENT][..], json.to_string().as_bytes()].concat()
        };
        let many = vec!["10.0.0.1"; ADDRESSES_MAX + 1];
        for (key, value, says) in [
            ("protocol", 2.into(), "protocol 2"),
            ("mac", "01:00:5e:00:00:01".into(), "mac"),
            ("mac", "x".into(), "mac"),
            ("name", "a.b".into(), "name"),
            ("name", "".into(), "name"),
            ("mtu", 1279.into(), "mtu"),
            ("addresses", many.into(), "addresses"),
            ("addresses", "10.0.0.1".into(), "cannot be read"),
            ("groups", vec![""].into(), "groups"),
        ] {
            let error = parse(&bent(key, value)).unwrap_err().to_string();
            assert!(error.contains(says), "{key}: {error}");
        }
        let later = bent("later", 1.into());
        assert_eq!(parse(&later).unwrap(), Message::Announcement(web()));
        let long = [vec![ANNOUNCEMENT], vec![b' '; ANNOUNCEMENT_MAX + 1]].concat();
        assert!(matches!(parse(&long), Err(Refused::Long)));
        assert!(matches!(parse(&[]), Err(Refused::Short)));
        assert!(matches!(parse(&[FRAME; 15]), Err(Refused::Short)));
        assert!(matches!(parse(&[9, 1]), Err(Refused::Kind(9))));
    }

    #[test]
    fn bent_messages_are_read_or_refused_and_never_more_than_was_allowed() {
        let good = [
            web().to_bytes().unwrap(),
            [&prefix(&NetHeader::default())[..], &[7; 100]].concat(),
        ];
        fuzz::run("lan messages", 20_000, |_, random| {
            let mut bytes = good[random.index(2)].clone();
            random.bend_bytes(&mut bytes);
            bytes.truncate(random.index(bytes.len() + 1) + usize::from(random.one_in(2)) * 999);
            if let Ok(Message::Announcement(it)) = parse(&bytes) {
                assert!(it.addresses.len() <= ADDRESSES_MAX && it.mac.is_unicast());
                assert!(it.name.as_deref().is_none_or(is_label));
            }
        });
    }
}
