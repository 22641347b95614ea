use dhcproto::v6::ORO;

use super::*;

fn guest() -> Ipv6Addr {
    "fe80::5054:ff:fe12:3456".parse().unwrap()
}

fn spec() -> Spec {
    Spec {
        domain: Some("example.internal".into()),
        ..Spec::default()
    }
}

fn lease() -> Ipv6Addr {
    spec().v6.unwrap().address
}

fn ours() -> DhcpOption {
    DhcpOption::ServerId(vec![0, 3, 0, 1, 0x52, 0x55, 0x0a, 0, 2, 2])
}

fn association(id: u32, addresses: &[Ipv6Addr]) -> DhcpOption {
    let address = |addr: &Ipv6Addr| {
        DhcpOption::IAAddr(IAAddr {
            addr: *addr,
            preferred_life: 0,
            valid_life: 0,
            opts: DhcpOptions::new(),
        })
    };
    DhcpOption::IANA(IANA {
        id,
        t1: 0,
        t2: 0,
        opts: addresses.iter().map(address).collect(),
    })
}

fn request(kind: MessageType, options: &[DhcpOption]) -> Message {
    let mut message = Message::new_with_id(kind, [7, 8, 9]);
    let id = DhcpOption::ClientId(vec![0, 4, 1, 2, 3, 4]);
    message.opts_mut().insert(id);
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    message
}

fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn ask(server: &mut Dhcp6, message: &Message) -> Option<Message> {
    let reply = server.handle(&spec(), (guest(), SERVERS), &encode(message))?;
    let reply = Message::decode(&mut Decoder::new(&reply)).unwrap();
    assert_eq!(reply.xid(), [7, 8, 9]);
    assert_eq!(reply.opts().get(OptionCode::ServerId), Some(&ours()));
    assert_eq!(
        reply.opts().get(OptionCode::ClientId),
        message.opts().get(OptionCode::ClientId)
    );
    Some(reply)
}

/// Address and valid lifetime of each address of each association.
fn given(reply: &Message) -> Vec<(u32, Ipv6Addr, u32)> {
    let mut list = Vec::new();
    for option in reply.opts().iter() {
        if let DhcpOption::IANA(association) = option {
            for option in association.opts.iter() {
                if let DhcpOption::IAAddr(address) = option {
                    list.push((association.id, address.addr, address.valid_life));
                }
            }
        }
    }
    list
}

fn said(reply: &Message) -> Option<Status> {
    match reply.opts().get(OptionCode::StatusCode) {
        Some(DhcpOption::StatusCode(code)) => Some(code.status),
        _ => None,
    }
}

#[test]
fn a_solicit_is_advertised_the_address_resolver_and_search_list() {
    let mut server = Dhcp6::default();
    let solicit = request(MessageType::Solicit, &[association(5, &[])]);
    let reply = ask(&mut server, &solicit).unwrap();
    assert_eq!(reply.msg_type(), MessageType::Advertise);
    assert_eq!(given(&reply), [(5, lease(), 7200)]);
    assert_eq!(
        reply.opts().get(OptionCode::DomainNameServers),
        Some(&DhcpOption::DomainNameServers(vec![spec().v6.unwrap().dns]))
    );
    let list = [Name::from_ascii("example.internal").unwrap()];
    let Some(DhcpOption::DomainSearchList(names)) = reply.opts().get(OptionCode::DomainSearchList)
    else {
        panic!("no search list")
    };
    assert_eq!(
        names[0].to_ascii().trim_end_matches('.'),
        list[0].to_ascii()
    );
}

#[test]
fn rapid_commit_is_replied_to_at_once() {
    let options = [association(5, &[]), DhcpOption::RapidCommit];
    let reply = ask(
        &mut Dhcp6::default(),
        &request(MessageType::Solicit, &options),
    )
    .unwrap();
    assert_eq!(reply.msg_type(), MessageType::Reply);
    assert!(reply.opts().get(OptionCode::RapidCommit).is_some());
    assert_eq!(given(&reply), [(5, lease(), 7200)]);
}

#[test]
fn request_renew_and_rebind_give_the_same_address_also_from_a_new_server() {
    let own = association(1, &[lease()]);
    for (kind, server) in [
        (MessageType::Request, Some(ours())),
        (MessageType::Renew, Some(ours())),
        (MessageType::Rebind, None),
    ] {
        let options: Vec<_> = server.into_iter().chain([own.clone()]).collect();
        let reply = ask(&mut Dhcp6::default(), &request(kind, &options)).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Reply);
        assert_eq!(given(&reply), [(1, lease(), 7200)]);
    }
}

#[test]
fn a_foreign_address_comes_back_dead_beside_the_right_one() {
    let foreign: Ipv6Addr = "fd00:9::1".parse().unwrap();
    let options = [ours(), association(1, &[foreign])];
    let reply = ask(
        &mut Dhcp6::default(),
        &request(MessageType::Renew, &options),
    )
    .unwrap();
    assert_eq!(given(&reply), [(1, lease(), 7200), (1, foreign, 0)]);
}

#[test]
fn there_is_one_address_and_no_prefix() {
    let prefix = DhcpOption::IAPD(IAPD {
        id: 3,
        t1: 0,
        t2: 0,
        opts: DhcpOptions::new(),
    });
    let options = [association(1, &[]), association(2, &[]), prefix];
    let reply = ask(
        &mut Dhcp6::default(),
        &request(MessageType::Solicit, &options),
    )
    .unwrap();
    assert_eq!(given(&reply), [(1, lease(), 7200)]);
    let Some(DhcpOption::IAPD(association)) = reply.opts().get(OptionCode::IAPD) else {
        panic!("no answer for the prefix")
    };
    assert!(matches!(
        association.opts.get(OptionCode::StatusCode),
        Some(DhcpOption::StatusCode(StatusCode {
            status: Status::NoPrefixAvail,
            ..
        }))
    ));
}

#[test]
fn confirm_says_whether_the_addresses_belong_here() {
    let mut server = Dhcp6::default();
    let mut confirm = |addresses: &[Ipv6Addr]| {
        let options = [association(1, addresses)];
        ask(&mut server, &request(MessageType::Confirm, &options))
    };
    assert_eq!(said(&confirm(&[lease()]).unwrap()), Some(Status::Success));
    let foreign = "2001:db8::1".parse().unwrap();
    let reply = confirm(&[lease(), foreign]).unwrap();
    assert_eq!(said(&reply), Some(Status::NotOnLink));
    assert_eq!(confirm(&[]), None);
}

#[test]
fn release_and_decline_succeed() {
    for kind in [MessageType::Release, MessageType::Decline] {
        let options = [ours(), association(1, &[lease()])];
        let reply = ask(&mut Dhcp6::default(), &request(kind, &options)).unwrap();
        assert_eq!(said(&reply), Some(Status::Success));
        assert_eq!(given(&reply), []);
    }
}

#[test]
fn an_information_request_gets_what_it_asks_for() {
    let asked = DhcpOption::ORO(ORO {
        opts: vec![OptionCode::DomainNameServers],
    });
    let message = request(MessageType::InformationRequest, &[asked]);
    let reply = ask(&mut Dhcp6::default(), &message).unwrap();
    assert!(reply.opts().get(OptionCode::DomainNameServers).is_some());
    assert!(reply.opts().get(OptionCode::DomainSearchList).is_none());
}

#[test]
fn messages_for_other_servers_or_from_other_places_are_left_alone() {
    let mut server = Dhcp6::default();
    let other = DhcpOption::ServerId(vec![0, 3, 0, 1, 1, 1, 1, 1, 1, 1]);
    let options = [other, association(1, &[])];
    assert_eq!(
        ask(&mut server, &request(MessageType::Request, &options)),
        None
    );
    let good = encode(&request(MessageType::Solicit, &[association(1, &[])]));
    assert_eq!(server.handle(&spec(), (lease(), SERVERS), &good), None);
    assert_eq!(server.handle(&spec(), (guest(), guest()), &good), None);
    assert_eq!(server.stats().ignored, 3);
    // RFC 8415, 16.2 and 16.4.
    let options = [ours(), association(1, &[])];
    assert_eq!(
        ask(&mut server, &request(MessageType::Solicit, &options)),
        None
    );
    assert_eq!(
        ask(&mut server, &request(MessageType::Renew, &options[1..])),
        None
    );
    assert_eq!(server.stats().malformed, 2);
}

/// A message with associations of addresses in each other, `levels` deep.
fn nested(levels: u32) -> Vec<u8> {
    let mut inner = DhcpOptions::new();
    for id in 0..levels {
        inner = DhcpOptions::from_iter([DhcpOption::IANA(IANA {
            id,
            t1: 0,
            t2: 0,
            opts: inner,
        })]);
    }
    let nested: Vec<_> = inner.into_iter().collect();
    encode(&request(MessageType::Solicit, &nested))
}

#[test]
fn options_nested_without_end_cost_no_more_than_their_bytes() {
    let mut server = Dhcp6::default();
    // An association in an association means nothing.
    for levels in [3, 80] {
        let bytes = nested(levels);
        assert!(bytes.len() < MESSAGE_MAX);
        let reply = server.handle(&spec(), (guest(), SERVERS), &bytes).unwrap();
        assert!(reply.len() < 200, "{}", reply.len());
    }
    // The same shape in a datagram of 60 KiB, made by hand: its depth would be thousands.
    let mut long = nested(80)[..4].to_vec();
    let mut left = 60_000_u16;
    while left >= 16 {
        left -= 16;
        long.extend([0, 3]);
        long.extend((left + 12).to_be_bytes());
        long.extend([0; 12]);
    }
    assert_eq!(server.handle(&spec(), (guest(), SERVERS), &long), None);
    assert_eq!(server.stats().malformed, 1);
}

#[test]
fn bent_messages_never_panic_and_replies_stay_small() {
    let good = encode(&request(
        MessageType::Request,
        &[ours(), association(1, &[lease()]), association(2, &[])],
    ));
    let mut random = fastrand::Rng::with_seed(3);
    let mut server = Dhcp6::default();
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        bytes.truncate(random.usize(0..=good.len()));
        for _ in 0..random.usize(0..6) {
            if !bytes.is_empty() {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
            }
        }
        if let Some(reply) = server.handle(&spec(), (guest(), SERVERS), &bytes) {
            assert!(reply.len() <= 1280 - 48);
        }
    }
    let seen = server.stats();
    let sum = seen.advertised + seen.replies + seen.ignored + seen.malformed;
    assert_eq!(sum, 20_000);
    assert!(seen.replies > 0 && seen.malformed > 0);
}

#[test]
fn an_option_that_is_shorter_than_its_fields_makes_the_message_malformed() {
    assert_eq!(essentials(&[], false), Some(vec![]));
    for short in [
        &[0, 3, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
        &[0, 4, 0, 3, 0, 0, 0],
        &[0, 1, 0, 4, 0, 0],
        &[0, 1, 0],
    ] {
        assert_eq!(essentials(short, false), None, "{short:?}");
    }
    let nested = [&[0, 3, 0, 18][..], &[0; 12], &[0, 5, 0, 2, 1, 2]].concat();
    assert_eq!(essentials(&nested, false), None);
}

#[test]
fn options_that_the_decoder_reads_by_an_idea_of_its_own_change_nothing() {
    // A preference has one byte. If it says that it has more, what is in it is no option.
    let hidden = [0, 7, 0, 9, 1, 0, 17, 0, 2, 0, 0, 0, 0];
    // Too short for what they are.
    let short = [
        0, 16, 0, 2, 1, 2, 0, 11, 0, 2, 1, 2, 0, 17, 0, 2, 1, 2, 0, 13, 0, 0,
    ];
    let plain = encode(&request(MessageType::Solicit, &[association(1, &[])]));
    let mut server = Dhcp6::default();
    let mut said = Vec::new();
    for more in [&[][..], &hidden, &short] {
        let bytes = [&plain[..], more].concat();
        said.push(server.handle(&spec(), (guest(), SERVERS), &bytes).unwrap());
    }
    assert!(said.iter().all(|reply| *reply == said[0]));
}
