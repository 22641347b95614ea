//! The metadata service and the resolver over TCP, as a guest's own stack sees them.

#![allow(clippy::unwrap_used, missing_docs)]

mod harness;

use std::net::IpAddr;
use std::time::Duration;

use harness::Lab;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use vhost_net::services::imds::MetadataSpec;

fn lab(hop_limit: u8) -> Lab {
    let metadata = MetadataSpec {
        hop_limit,
        user_data: Some("#cloud-config\n".repeat(4000)),
        ..MetadataSpec::default()
    };
    Lab::new(64, &metadata)
}

fn open(lab: &mut Lab, to: &str, port: u16) -> SocketHandle {
    let to: IpAddr = to.parse().unwrap();
    let handle = lab.connect((to, port));
    lab.until("a connection", |lab| {
        lab.socket(handle).state() == State::Established
    });
    handle
}

/// Sends, and takes what comes until there is `enough`.
fn ask(
    lab: &mut Lab,
    handle: SocketHandle,
    request: &[u8],
    enough: impl Fn(&[u8]) -> bool,
) -> Vec<u8> {
    lab.socket(handle).send_slice(request).unwrap();
    let mut said = Vec::new();
    lab.until("an answer", |lab| {
        let socket = lab.socket(handle);
        if socket.can_recv() {
            let _ = socket.recv(|bytes| {
                said.extend_from_slice(bytes);
                (bytes.len(), ())
            });
        }
        enough(&said)
    });
    said
}

/// One request: head and body.
fn http(lab: &mut Lab, handle: SocketHandle, request: &str) -> (String, String) {
    let whole = |said: &[u8]| {
        let text = String::from_utf8_lossy(said);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.split_once("Content-Length: ")?.1;
        let length: usize = length.lines().next()?.parse().ok()?;
        (body.len() >= length).then(|| (head.to_owned(), body.to_owned()))
    };
    let said = ask(lab, handle, request.as_bytes(), |said| {
        whole(said).is_some()
    });
    whole(&said).unwrap()
}

#[test]
fn a_token_leaves_with_the_hop_limit_that_was_set_and_nothing_before_it_does() {
    for (address, hop_limit) in [
        ("169.254.169.254", 1),
        ("169.254.169.254", 3),
        ("fd00:ec2::254", 1),
        ("fd00:ec2::254", 64),
    ] {
        let mut lab = lab(hop_limit);
        let handle = open(&mut lab, address, 80);
        let (head, _) = http(
            &mut lab,
            handle,
            "GET /latest/meta-data/ HTTP/1.1\r\nHost: x\r\n\r\n",
        );
        assert!(head.starts_with("HTTP/1.1 401 "), "{head}");
        assert!(lab.hops.iter().all(|hops| *hops == 64), "{:?}", lab.hops);
        lab.hops.clear();
        let put = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n\
                   X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n";
        let (head, token) = http(&mut lab, handle, put);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(!lab.hops.is_empty());
        assert!(
            lab.hops.iter().all(|hops| *hops == hop_limit),
            "{:?}",
            lab.hops
        );
        // On the same connection, and on one of its own: 56 KB, in as many segments as it takes.
        let get = format!(
            "GET /latest/user-data HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n"
        );
        let (_, kept) = http(&mut lab, handle, &get);
        let other = open(&mut lab, address, 80);
        let (head, fresh) = http(&mut lab, other, &get);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert_eq!(kept, fresh);
        assert_eq!(fresh, "#cloud-config\n".repeat(4000));
    }
}

#[test]
fn a_connection_without_a_request_is_cut_and_one_that_asks_is_kept() {
    let mut lab = lab(1);
    let (idle, busy) = (
        open(&mut lab, "169.254.169.254", 80),
        open(&mut lab, "169.254.169.254", 80),
    );
    for _ in 0..7 {
        lab.ahead += Duration::from_secs(5);
        let (head, _) = http(&mut lab, busy, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 401 "), "{head}");
    }
    lab.until("the idle one is cut", |lab| {
        lab.socket(idle).state() == State::Closed
    });
    assert_eq!(lab.socket(busy).state(), State::Established);
}

#[test]
fn the_resolver_answers_over_tcp_at_each_of_its_addresses() {
    let mut lab = lab(1);
    // `instance-data`, of type A.
    let mut question = vec![0, 31, 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 13];
    question.extend(b"instance-data\0\0\x01\0\x01");
    for address in [
        "10.0.2.3",
        "169.254.169.253",
        "fd00:0:0:2::3",
        "fd00:ec2::253",
    ] {
        let handle = open(&mut lab, address, 53);
        let whole = |said: &[u8]| {
            said.len() > 2 && said.len() >= 2 + usize::from(u16::from_be_bytes([said[0], said[1]]))
        };
        for _ in 0..3 {
            let said = ask(&mut lab, handle, &question, whole);
            assert_eq!(said[2..4], [0x12, 0x34], "{address}");
            assert!(
                said.ends_with(&[169, 254, 169, 254]),
                "{address}: {said:02x?}"
            );
        }
    }
}
