use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use smoltcp::wire::EthernetProtocol;

use super::*;

fn guest() -> Ipv6Addr {
    "fe80::5054:ff:fe12:3456".parse().unwrap()
}

fn spec() -> Spec {
    Spec {
        domain: Some("eu.example.internal".into()),
        ..Spec::default()
    }
}

/// The guest's packet as an ICMPv6 message.
fn message(source: Ipv6Addr, destination: Ipv6Addr, repr: NdiscRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv6Packet::new_unchecked(&mut bytes[..]));
    Icmpv6Packet::new_unchecked(&mut bytes[..]).fill_checksum(&source, &destination);
    bytes
}

fn packet(source: Ipv6Addr, destination: Ipv6Addr, payload: &[u8]) -> Packet<'_> {
    Packet {
        source: source.into(),
        destination: destination.into(),
        protocol: IpProtocol::Icmpv6,
        hop_limit: 255,
        payload,
    }
}

fn solicit(nd: &mut Nd, source: Ipv6Addr, target: &str) -> Option<Vec<u8>> {
    let target_addr: Ipv6Addr = target.parse().unwrap();
    let lladdr = (!source.is_unspecified()).then(|| spec().mac.into());
    let repr = NdiscRepr::NeighborSolicit {
        target_addr,
        lladdr,
    };
    let destination = solicited_node(target_addr);
    let bytes = message(source, destination, repr);
    let packet = packet(source, destination, &bytes);
    assert!(Nd::wants(&packet));
    nd.handle(&spec(), &packet)
}

/// Checks a frame of the card's with a parser of another house; gives addresses, the ICMPv6
/// message, and whether it was sent to the guest alone.
fn checked(frame: &[u8]) -> (Ipv6Addr, Ipv6Addr, Vec<u8>) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv6(ip)) = &sliced.net else {
        panic!("not IPv6")
    };
    let header = ip.header();
    assert_eq!(header.hop_limit(), 255);
    let Some(TransportSlice::Icmpv6(icmp)) = &sliced.transport else {
        panic!("not ICMPv6")
    };
    assert!(icmp.is_checksum_valid(header.source(), header.destination()));
    (
        header.source_addr(),
        header.destination_addr(),
        icmp.slice().to_vec(),
    )
}

#[test]
fn the_card_answers_for_its_addresses_and_no_others() {
    let mut nd = Nd::new(None);
    for target in ["fe80::2", "fd00:0:0:2::3", "fd00:ec2::254"] {
        let frame = solicit(&mut nd, guest(), target).unwrap();
        let (source, destination, bytes) = checked(&frame);
        assert_eq!(source, target.parse::<Ipv6Addr>().unwrap());
        assert_eq!(destination, guest());
        let repr = NdiscRepr::parse(&Icmpv6Packet::new_checked(&bytes[..]).unwrap()).unwrap();
        let NdiscRepr::NeighborAdvert { flags, lladdr, .. } = repr else {
            panic!("not an advertisement")
        };
        assert!(flags.contains(NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE));
        assert_eq!(lladdr, Some(spec().gateway_mac.into()));
    }
    assert_eq!(solicit(&mut nd, guest(), "fd00:0:0:2::77"), None);
    assert_eq!((nd.stats().answered, nd.stats().ignored), (3, 1));
}

#[test]
fn duplicate_address_detection_finds_the_guests_address_free_and_the_cards_taken() {
    let mut nd = Nd::new(None);
    let nobody = Ipv6Addr::UNSPECIFIED;
    assert_eq!(solicit(&mut nd, nobody, "fe80::5054:ff:fe12:3456"), None);
    let (_, destination, bytes) = checked(&solicit(&mut nd, nobody, "fe80::2").unwrap());
    assert_eq!(destination, ALL_NODES);
    let repr = NdiscRepr::parse(&Icmpv6Packet::new_checked(&bytes[..]).unwrap()).unwrap();
    let NdiscRepr::NeighborAdvert { flags, .. } = repr else {
        panic!("not an advertisement")
    };
    assert!(!flags.contains(NdiscNeighborFlags::SOLICITED));
}

#[test]
fn a_router_solicitation_gets_route_prefix_mtu_resolver_and_search_domain() {
    let mut nd = Nd::new(None);
    let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let bytes = message(
        guest(),
        all_routers,
        NdiscRepr::RouterSolicit { lladdr: None },
    );
    let frame = nd
        .handle(&spec(), &packet(guest(), all_routers, &bytes))
        .unwrap();
    let (source, destination, bytes) = checked(&frame);
    assert_eq!(source, "fe80::2".parse::<Ipv6Addr>().unwrap());
    assert_eq!(destination, guest());
    let repr = NdiscRepr::parse(&Icmpv6Packet::new_checked(&bytes[..]).unwrap()).unwrap();
    let NdiscRepr::RouterAdvert {
        flags,
        router_lifetime,
        mtu,
        prefix_info: Some(prefix),
        ..
    } = repr
    else {
        panic!("not an advertisement with a prefix")
    };
    assert!(flags.contains(NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER));
    assert_eq!(router_lifetime.secs(), 1800);
    assert_eq!(mtu, Some(9001));
    assert_eq!(prefix.prefix, spec().v6.unwrap().prefix);
    assert!(
        prefix
            .flags
            .contains(NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF)
    );
    // RFC 8106, figures 1 and 2, by hand.
    let resolver: Ipv6Addr = "fd00:0:0:2::3".parse().unwrap();
    let mut wanted = vec![25, 3, 0, 0, 0, 0, 7, 8];
    wanted.extend(resolver.octets());
    wanted.extend([31, 4, 0, 0, 0, 0, 7, 8]);
    wanted.extend(b"\x02eu\x07example\x08internal\0\0\0\0");
    assert_eq!(bytes[bytes.len() - wanted.len()..], wanted);
    assert_eq!(nd.stats().advertised, 1);
}

#[test]
fn advertisements_come_early_at_first_and_then_every_five_minutes() {
    let start = Instant::now();
    let mut nd = Nd::new(Some(start));
    let mut at = Vec::new();
    let mut now = start;
    while now < start + Duration::from_secs(700) {
        if let Some(frame) = nd.poll(&spec(), now) {
            at.push((now - start).as_secs());
            assert_eq!(checked(&frame).1, ALL_NODES);
            assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        }
        now += Duration::from_secs(1);
    }
    assert_eq!(at, [0, 16, 32, 48, 348, 648]);
    assert_eq!(Nd::new(None).poll(&spec(), now), None);
}

#[test]
fn what_may_have_crossed_a_router_or_breaks_a_rule_is_not_answered() {
    let mut nd = Nd::new(None);
    let target_addr: Ipv6Addr = "fe80::2".parse().unwrap();
    let to = solicited_node(target_addr);
    let none = Ipv6Addr::UNSPECIFIED;
    let lladdr = Some(spec().mac.into());
    let ask = |lladdr| NdiscRepr::NeighborSolicit {
        target_addr,
        lladdr,
    };
    let good = message(guest(), to, ask(lladdr));
    let far = Packet {
        hop_limit: 64,
        ..packet(guest(), to, &good)
    };
    assert_eq!(nd.handle(&spec(), &far), None);
    let mut code = good.clone();
    code[1] = 1;
    Icmpv6Packet::new_unchecked(&mut code[..]).fill_checksum(&guest(), &to);
    assert_eq!(nd.handle(&spec(), &packet(guest(), to, &code)), None);
    let mut sum = good.clone();
    sum[2] ^= 1;
    assert_eq!(nd.handle(&spec(), &packet(guest(), to, &sum)), None);
    let named = message(none, to, ask(lladdr));
    assert_eq!(nd.handle(&spec(), &packet(none, to, &named)), None);
    let unicast = message(none, target_addr, ask(None));
    assert_eq!(
        nd.handle(&spec(), &packet(none, target_addr, &unicast)),
        None
    );
    assert_eq!(nd.stats().malformed, 5);
    assert_eq!(nd.stats().answered, 0);
    assert!(nd.handle(&spec(), &packet(guest(), to, &good)).is_some());
}

#[test]
fn bent_messages_with_right_checksums_never_panic() {
    let target_addr: Ipv6Addr = "fe80::2".parse().unwrap();
    let to = solicited_node(target_addr);
    let lladdr = Some(spec().mac.into());
    let repr = NdiscRepr::NeighborSolicit {
        target_addr,
        lladdr,
    };
    let good = message(guest(), to, repr);
    let mut random = fastrand::Rng::with_seed(11);
    let mut nd = Nd::new(None);
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        bytes.resize(random.usize(0..120), 0);
        for _ in 0..random.usize(0..8) {
            if !bytes.is_empty() {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
            }
        }
        if bytes.len() >= 4 {
            if random.bool() {
                bytes[0] = random.u8(133..=137);
                bytes[1] = 0;
            }
            Icmpv6Packet::new_unchecked(&mut bytes[..]).fill_checksum(&guest(), &to);
        }
        let packet = packet(guest(), to, &bytes);
        if Nd::wants(&packet)
            && let Some(frame) = nd.handle(&spec(), &packet)
        {
            assert!(frame.len() < 300);
            assert_eq!(
                frame[12..14],
                u16::from(EthernetProtocol::Ipv6).to_be_bytes()
            );
        }
    }
    assert!(nd.stats().answered > 0 && nd.stats().advertised > 0);
}
