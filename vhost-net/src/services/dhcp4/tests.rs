use super::*;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const LEASE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

fn spec() -> Spec {
    Spec {
        hostname: Some("web-1".into()),
        domain: Some("example.internal".into()),
        ..Spec::default()
    }
}

fn request(kind: MessageType, ciaddr: Ipv4Addr, options: &[DhcpOption]) -> Message {
    let mut message = Message::new_with_id(0xabcd_1234, ciaddr, NONE, NONE, NONE, &MAC);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    message
}

fn ask(server: &mut Dhcp4, message: &Message) -> Option<(Reply, Message)> {
    let reply = server.handle(&spec(), &encode(message).unwrap())?;
    let message = Message::decode(&mut Decoder::new(&reply.message)).unwrap();
    assert_eq!(message.opcode(), Opcode::BootReply);
    assert_eq!(message.xid(), 0xabcd_1234);
    assert_eq!(message.chaddr(), MAC);
    assert!(reply.message.len() >= MESSAGE_MIN);
    Some((reply, message))
}

fn option(message: &Message, code: OptionCode) -> DhcpOption {
    message.opts().get(code).unwrap().clone()
}

#[test]
fn a_discover_is_offered_the_lease_with_all_that_the_guest_needs() {
    let mut server = Dhcp4::default();
    let (reply, offer) = ask(&mut server, &request(MessageType::Discover, NONE, &[])).unwrap();
    assert_eq!(reply.destination, LEASE);
    assert_eq!(reply.mac, EthernetAddress(MAC));
    assert_eq!(reply.source, GATEWAY);
    assert_eq!(offer.yiaddr(), LEASE);
    let expected = [
        DhcpOption::MessageType(MessageType::Offer),
        DhcpOption::ServerIdentifier(GATEWAY),
        DhcpOption::AddressLeaseTime(3600),
        DhcpOption::Renewal(1800),
        DhcpOption::Rebinding(3150),
        DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 0, 2, 255)),
        DhcpOption::Router(vec![GATEWAY]),
        DhcpOption::DomainNameServer(vec![Ipv4Addr::new(10, 0, 2, 3)]),
        DhcpOption::InterfaceMtu(9001),
        DhcpOption::Hostname("web-1".into()),
        DhcpOption::DomainName("example.internal".into()),
        DhcpOption::NtpServers(vec![Ipv4Addr::new(169, 254, 169, 123)]),
    ];
    for wanted in &expected {
        assert_eq!(&option(&offer, OptionCode::from(wanted)), wanted);
    }
    assert_eq!(offer.opts().len(), expected.len());
    assert_eq!(server.stats().offers, 1);
}

#[test]
fn a_client_gets_the_options_that_it_asks_for_and_no_others() {
    let list = DhcpOption::ParameterRequestList(vec![OptionCode::Router, OptionCode::LogServer]);
    let message = request(MessageType::Discover, NONE, &[list]);
    let (_, offer) = ask(&mut Dhcp4::default(), &message).unwrap();
    assert!(offer.opts().contains(OptionCode::Router));
    assert!(offer.opts().contains(OptionCode::AddressLeaseTime));
    for absent in [OptionCode::DomainNameServer, OptionCode::Hostname] {
        assert!(!offer.opts().contains(absent));
    }
}

#[test]
fn a_client_that_cannot_take_unicast_is_answered_by_broadcast() {
    let mut message = request(MessageType::Discover, NONE, &[]);
    message.set_flags(Flags::default().set_broadcast());
    let (reply, offer) = ask(&mut Dhcp4::default(), &message).unwrap();
    assert_eq!(reply.destination, Ipv4Addr::BROADCAST);
    assert_eq!(reply.mac, EthernetAddress::BROADCAST);
    assert!(offer.flags().broadcast());
}

#[test]
fn selecting_our_offer_is_acknowledged_and_another_servers_is_left_alone() {
    let mut server = Dhcp4::default();
    let select = |server: Ipv4Addr, address: Ipv4Addr| {
        request(
            MessageType::Request,
            NONE,
            &[
                DhcpOption::ServerIdentifier(server),
                DhcpOption::RequestedIpAddress(address),
            ],
        )
    };
    let (_, ack) = ask(&mut server, &select(GATEWAY, LEASE)).unwrap();
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert_eq!(ack.yiaddr(), LEASE);
    assert_eq!(
        ask(&mut server, &select(Ipv4Addr::new(10, 0, 2, 9), LEASE)),
        None
    );
    let (_, nak) = ask(&mut server, &select(GATEWAY, Ipv4Addr::new(10, 0, 2, 16))).unwrap();
    assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
    assert_eq!(server.stats().ignored, 1);
}

#[test]
fn a_rebooted_guest_keeps_its_address_and_a_moved_one_is_told_at_once() {
    let mut server = Dhcp4::default();
    let reboot = |address| {
        let wanted = DhcpOption::RequestedIpAddress(address);
        request(MessageType::Request, NONE, &[wanted])
    };
    let (_, ack) = ask(&mut server, &reboot(LEASE)).unwrap();
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    let (reply, nak) = ask(&mut server, &reboot(Ipv4Addr::new(192, 168, 1, 7))).unwrap();
    assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
    assert_eq!(reply.destination, Ipv4Addr::BROADCAST);
    assert_eq!(nak.yiaddr(), NONE);
    assert!(!nak.opts().contains(OptionCode::Router));
    assert!(!nak.opts().contains(OptionCode::AddressLeaseTime));
}

#[test]
fn a_renewal_is_answered_to_the_address_by_a_server_that_never_saw_the_guest_before() {
    let mut server = Dhcp4::default();
    let (reply, ack) = ask(&mut server, &request(MessageType::Request, LEASE, &[])).unwrap();
    assert_eq!(
        (reply.destination, reply.mac),
        (LEASE, EthernetAddress(MAC))
    );
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert_eq!((ack.ciaddr(), ack.yiaddr()), (LEASE, LEASE));
}

#[test]
fn inform_gets_parameters_without_a_lease() {
    let mut server = Dhcp4::default();
    let (reply, ack) = ask(&mut server, &request(MessageType::Inform, LEASE, &[])).unwrap();
    assert_eq!(reply.destination, LEASE);
    assert_eq!(ack.yiaddr(), NONE);
    assert!(!ack.opts().contains(OptionCode::AddressLeaseTime));
    assert!(ack.opts().contains(OptionCode::DomainNameServer));
}

#[test]
fn release_and_decline_are_taken_in_silence_and_the_lease_stays() {
    let mut server = Dhcp4::default();
    let id = DhcpOption::ServerIdentifier(GATEWAY);
    let release = request(MessageType::Release, LEASE, std::slice::from_ref(&id));
    assert_eq!(ask(&mut server, &release), None);
    let wanted = DhcpOption::RequestedIpAddress(LEASE);
    assert_eq!(
        ask(
            &mut server,
            &request(MessageType::Decline, NONE, &[id, wanted])
        ),
        None
    );
    assert_eq!(server.stats().releases, 2);
    let (_, offer) = ask(&mut server, &request(MessageType::Discover, NONE, &[])).unwrap();
    assert_eq!(offer.yiaddr(), LEASE);
}

#[test]
fn rapid_commit_is_acknowledged_at_once() {
    let message = request(MessageType::Discover, NONE, &[DhcpOption::RapidCommit]);
    let (_, ack) = ask(&mut Dhcp4::default(), &message).unwrap();
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert!(ack.opts().contains(OptionCode::RapidCommit));
}

#[test]
fn a_client_identifier_comes_back_unless_it_names_another_machine() {
    let mut server = Dhcp4::default();
    let with = |id: &[u8]| {
        let id = DhcpOption::ClientIdentifier(id.to_vec());
        request(MessageType::Discover, NONE, &[id])
    };
    let (_, offer) = ask(&mut server, &with(&[255, 1, 2, 3, 4, 0, 1])).unwrap();
    assert_eq!(
        option(&offer, OptionCode::ClientIdentifier),
        DhcpOption::ClientIdentifier(vec![255, 1, 2, 3, 4, 0, 1])
    );
    assert_eq!(ask(&mut server, &with(&[1, 2, 0, 0, 0, 0, 9])), None);
    assert!(ask(&mut server, &with(&[1, 0x52, 0x54, 0, 0x12, 0x34, 0x56])).is_some());
}

#[test]
fn other_machines_and_relays_are_counted_and_not_answered() {
    let mut server = Dhcp4::default();
    let mut other = request(MessageType::Discover, NONE, &[]);
    other.set_chaddr(&[2, 0, 0, 0, 0, 1]);
    assert_eq!(ask(&mut server, &other), None);
    let mut relayed = request(MessageType::Discover, NONE, &[]);
    relayed.set_giaddr(Ipv4Addr::new(10, 9, 9, 9));
    assert_eq!(ask(&mut server, &relayed), None);
    assert_eq!(
        ask(&mut server, &request(MessageType::Offer, NONE, &[])),
        None
    );
    assert_eq!(server.stats().ignored, 3);
}

#[test]
fn a_long_name_never_makes_the_message_longer_than_the_client_takes() {
    let mut spec = spec();
    spec.hostname = Some("h".repeat(250));
    spec.domain = Some("d".repeat(250));
    let message = encode(&request(MessageType::Discover, NONE, &[])).unwrap();
    let reply = Dhcp4::default().handle(&spec, &message).unwrap();
    assert!(reply.message.len() <= usize::from(MESSAGE_MAX));
    let offer = Message::decode(&mut Decoder::new(&reply.message)).unwrap();
    assert!(offer.opts().contains(OptionCode::Router));
    assert!(!offer.opts().contains(OptionCode::DomainName));

    let roomy = request(
        MessageType::Discover,
        NONE,
        &[DhcpOption::MaxMessageSize(1500)],
    );
    let reply = Dhcp4::default()
        .handle(&spec, &encode(&roomy).unwrap())
        .unwrap();
    let offer = Message::decode(&mut Decoder::new(&reply.message)).unwrap();
    assert!(offer.opts().contains(OptionCode::DomainName));
}

#[test]
fn a_hardware_address_longer_than_its_field_is_refused() {
    let mut bytes = encode(&request(MessageType::Discover, NONE, &[])).unwrap();
    for hlen in [0, 5, 7, 16, 17, 255] {
        bytes[2] = hlen;
        let mut server = Dhcp4::default();
        assert_eq!(server.handle(&spec(), &bytes), None);
        assert_eq!(server.stats().malformed, 1);
    }
}

#[test]
fn options_that_the_server_does_not_look_at_may_be_as_they_like() {
    let plain = encode(&request(MessageType::Discover, NONE, &[])).unwrap();
    let end = plain.iter().rposition(|byte| *byte == 255).unwrap();
    // A full name without room for its flags, the state of a bulk query, an interface of four bytes,
    // one of an unknown kind.
    let odd = [
        81, 2, 0, 0, 151, 0, 94, 4, 1, 2, 3, 4, 116, 1, 9, 152, 1, 0, 230, 3, 1, 2, 3, 0, 0,
    ];
    let bytes = [&plain[..end], &odd, &plain[end..]].concat();
    let mut server = Dhcp4::default();
    let expected = server.handle(&spec(), &plain);
    assert!(expected.is_some());
    assert_eq!(server.handle(&spec(), &bytes), expected);
    // Those that it does look at, cut off or of another length than they have.
    for wrong in [
        &[80, 1, 0][..],
        &[53, 2, 1, 1],
        &[54, 3, 1, 2, 3],
        &[50, 9, 1],
    ] {
        let bytes = [&plain[..end], wrong].concat();
        assert_eq!(server.handle(&spec(), &bytes), None, "{wrong:?}");
    }
    assert_eq!(server.stats().malformed, 4);
}

#[test]
fn bent_messages_never_panic_and_are_each_counted_once() {
    let full = request(
        MessageType::Request,
        LEASE,
        &[
            DhcpOption::ParameterRequestList(vec![OptionCode::Router, OptionCode::Hostname]),
            DhcpOption::ClientIdentifier(vec![1, 2, 3]),
            DhcpOption::MaxMessageSize(1500),
        ],
    );
    let good = encode(&full).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let mut server = Dhcp4::default();
    let rounds = 20_000_u64;
    for _ in 0..rounds {
        let mut bytes = good.clone();
        bytes.truncate(random.usize(0..=good.len()));
        for _ in 0..random.usize(0..6) {
            if !bytes.is_empty() {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
            }
        }
        if let Some(reply) = server.handle(&spec(), &bytes) {
            assert!(reply.message.len() <= 1500);
        }
    }
    let seen = server.stats();
    let sum = seen.offers + seen.acks + seen.naks + seen.releases + seen.ignored + seen.malformed;
    assert_eq!(sum, rounds);
}
