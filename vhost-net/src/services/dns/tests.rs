use hickory_proto::rr::rdata::SOA;

use super::*;

fn client() -> Client {
    Client {
        client: ("10.0.2.15".parse().unwrap(), 40000),
        server: ("10.0.2.3".parse().unwrap(), 53),
        stream: None,
    }
}

struct World {
    dns: Dns,
    now: Instant,
    out: DnsOut,
}

fn world(servers: &[&str]) -> World {
    let spec = Spec {
        hostname: Some("web-1".into()),
        domain: Some("example.internal".into()),
        upstream_dns: servers
            .iter()
            .map(|server| format!("{server}:53").parse().unwrap())
            .collect(),
        ..Spec::default()
    };
    let peers = vec![("db".to_owned(), vec!["10.0.2.20".parse().unwrap()])];
    let mut id = 100;
    let random = Box::new(move || {
        id += 1;
        id
    });
    World {
        dns: Dns::new(&spec, &peers, random),
        now: Instant::now(),
        out: DnsOut::default(),
    }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

impl World {
    /// Asks; gives the answer if there is one at once.
    fn ask(&mut self, message: &Message) -> Option<Message> {
        let bytes = message.to_vec().unwrap();
        self.dns.query(client(), &bytes, self.now, &mut self.out);
        self.reply()
    }

    fn reply(&mut self) -> Option<Message> {
        let (to, bytes) = self.out.replies.pop()?;
        assert_eq!(to, client());
        Some(Message::from_vec(&bytes).unwrap())
    }

    /// The question that went to a server.
    fn sent(&mut self) -> (u64, SocketAddr, Message) {
        let outgoing = self.out.outgoing.pop().unwrap();
        let message = Message::from_vec(&outgoing.payload).unwrap();
        (outgoing.token, outgoing.to, message)
    }

    fn serve(&mut self, token: u64, answer: &Message) -> Option<Message> {
        let bytes = answer.to_vec().unwrap();
        self.dns.answered(token, &bytes, self.now, &mut self.out);
        self.reply()
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }
}

fn answer(question: &Message, ttl: u32, addresses: &[[u8; 4]]) -> Message {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.queries.clone_from(&question.queries);
    for address in addresses {
        let name = question.queries[0].name().clone();
        answer.add_answer(Record::from_rdata(
            name,
            ttl,
            RData::A(A((*address).into())),
        ));
    }
    answer
}

fn nothing(question: &Message, ttl: u32, minimum: u32) -> Message {
    let mut answer = answer(question, 0, &[]);
    answer.metadata.response_code = ResponseCode::NXDomain;
    let zone = Name::from_ascii("example.com.").unwrap();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, minimum);
    answer.add_authority(Record::from_rdata(zone, ttl, RData::SOA(soa)));
    answer
}

#[test]
fn local_names_are_answered_without_a_server() {
    let mut world = world(&[]);
    for (name, kind, wanted) in [
        ("web-1.", RecordType::A, "10.0.2.15"),
        ("WEB-1.Example.INTERNAL.", RecordType::A, "10.0.2.15"),
        ("web-1.", RecordType::AAAA, "fd00:0:0:2::15"),
        ("instance-data.", RecordType::A, "169.254.169.254"),
        ("db.example.internal.", RecordType::A, "10.0.2.20"),
        (
            "20.2.0.10.in-addr.arpa.",
            RecordType::PTR,
            "db.example.internal.",
        ),
    ] {
        let reply = world.ask(&question(name, kind)).unwrap();
        assert_eq!(reply.metadata.id, 7);
        assert!(reply.metadata.authoritative);
        assert_eq!(reply.answers.len(), 1, "{name}");
        assert_eq!(reply.answers[0].data.to_string(), wanted);
        assert_eq!(reply.queries[0].name().to_ascii(), name);
    }
    let reply = world.ask(&question("db.", RecordType::AAAA)).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(reply.answers.is_empty());
    assert_eq!(world.dns.stats().local, 7);
}

#[test]
fn a_question_goes_to_the_server_and_its_answer_to_the_guest_and_into_the_cache() {
    let mut world = world(&["192.0.2.53"]);
    let asked = question("example.com.", RecordType::A);
    assert!(world.ask(&asked).is_none());
    let (token, to, sent) = world.sent();
    assert_eq!(to, "192.0.2.53:53".parse().unwrap());
    assert_eq!(sent.metadata.id, 101);
    assert_eq!(sent.edns.as_ref().unwrap().max_payload(), UPSTREAM_SIZE);
    let reply = world
        .serve(token, &answer(&sent, 60, &[[1, 2, 3, 4]]))
        .unwrap();
    assert_eq!(reply.metadata.id, 7);
    assert!(reply.metadata.recursion_available);
    assert_eq!(reply.answers[0].ttl, 60);
    assert_eq!(world.out.over, [token]);

    world.wait(20);
    let reply = world.ask(&question("EXAMPLE.com.", RecordType::A)).unwrap();
    assert_eq!(reply.answers[0].ttl, 40);
    world.wait(40);
    assert!(world.ask(&asked).is_none());
    assert_eq!(world.dns.stats().cached, 1);
}

#[test]
fn answers_with_another_id_question_or_token_are_not_believed() {
    let mut world = world(&["192.0.2.53"]);
    world.ask(&question("example.com.", RecordType::A));
    let (token, _, sent) = world.sent();
    let good = answer(&sent, 60, &[[1, 2, 3, 4]]);
    let mut id = good.clone();
    id.metadata.id ^= 1;
    assert!(world.serve(token, &id).is_none());
    let mut other = good.clone();
    other.queries = question("evil.com.", RecordType::A).queries;
    assert!(world.serve(token, &other).is_none());
    let mut query = good.clone();
    query.metadata.message_type = MessageType::Query;
    assert!(world.serve(token, &query).is_none());
    assert!(world.serve(token + 1, &good).is_none());
    assert_eq!(world.dns.stats().forged, 3);
    assert!(world.serve(token, &good).is_some());
    assert!(world.serve(token, &good).is_none());
}

#[test]
fn a_silent_server_is_followed_by_the_next_and_in_the_end_by_servfail() {
    let mut world = world(&["192.0.2.1", "192.0.2.2"]);
    assert!(
        world
            .ask(&question("example.com.", RecordType::A))
            .is_none()
    );
    let mut ids = Vec::new();
    for server in [
        "192.0.2.1:53",
        "192.0.2.2:53",
        "192.0.2.1:53",
        "192.0.2.2:53",
    ] {
        let (_, to, sent) = world.sent();
        assert_eq!(to, server.parse().unwrap());
        ids.push(sent.metadata.id);
        assert_eq!(world.dns.poll_at(), Some(world.now + ATTEMPT_TIME));
        world.wait(2);
        world.dns.poll(world.now, &mut world.out);
    }
    assert_eq!(ids, [101, 102, 103, 104]);
    let reply = world.reply().unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(world.out.over.len(), 4);
    assert_eq!(world.dns.poll_at(), None);
}

#[test]
fn a_server_that_fails_is_followed_by_the_next_at_once() {
    let mut world = world(&["192.0.2.1", "192.0.2.2"]);
    world.ask(&question("example.com.", RecordType::A));
    let (token, _, sent) = world.sent();
    let mut failure = answer(&sent, 0, &[]);
    failure.metadata.response_code = ResponseCode::ServFail;
    assert!(world.serve(token, &failure).is_none());
    let (token, to, sent) = world.sent();
    assert_eq!(to, "192.0.2.2:53".parse().unwrap());
    assert!(
        world
            .serve(token, &answer(&sent, 60, &[[1, 2, 3, 4]]))
            .is_some()
    );
}

#[test]
fn negative_answers_are_cached_as_their_soa_says() {
    let mut world = world(&["192.0.2.53"]);
    let asked = question("nothing.example.com.", RecordType::A);
    world.ask(&asked);
    let (token, _, sent) = world.sent();
    let reply = world.serve(token, &nothing(&sent, 900, 30)).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    world.wait(29);
    let reply = world.ask(&asked).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    world.wait(1);
    assert!(world.ask(&asked).is_none());
    // Without an SOA it is not cached.
    let (token, _, sent) = world.sent();
    let mut bare = nothing(&sent, 900, 30);
    bare.authorities.clear();
    assert!(world.serve(token, &bare).is_some());
    assert!(world.ask(&asked).is_none());
}

#[test]
fn a_long_answer_is_cut_for_who_cannot_take_it_and_whole_for_who_can() {
    let mut world = world(&["192.0.2.53"]);
    let mut asked = question("many.example.com.", RecordType::A);
    world.ask(&asked);
    let (token, _, sent) = world.sent();
    let many: Vec<_> = (0..100).map(|last| [10, 0, 0, last]).collect();
    let reply = world.serve(token, &answer(&sent, 60, &many)).unwrap();
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    asked.set_edns(edns);
    let reply = world.ask(&asked).unwrap();
    assert!(!reply.metadata.truncation);
    assert_eq!(reply.answers.len(), 100);
    assert!(reply.edns.is_some());
    assert_eq!(world.dns.stats().truncated, 1);
}

#[test]
fn what_is_no_question_gets_an_error_or_nothing() {
    let mut world = world(&["192.0.2.53"]);
    let answer = answer(&question("a.b.", RecordType::A), 1, &[]);
    assert!(world.ask(&answer).is_none());
    let mut none = question("a.b.", RecordType::A);
    none.queries.clear();
    let reply = world.ask(&none).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
    let transfer = world.ask(&question("a.b.", RecordType::AXFR)).unwrap();
    assert_eq!(transfer.metadata.response_code, ResponseCode::NotImp);
    let mut bytes = question("a.b.", RecordType::A).to_vec().unwrap();
    bytes.truncate(15);
    world.dns.query(client(), &bytes, world.now, &mut world.out);
    let reply = world.reply().unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
    world
        .dns
        .query(client(), &bytes[..11], world.now, &mut world.out);
    assert!(world.out.replies.is_empty() && world.out.outgoing.is_empty());
}

#[test]
fn questions_under_way_and_the_cache_are_bounded() {
    let mut world = world(&["192.0.2.53"]);
    for number in 0..PENDING_MAX {
        let asked = question(&format!("n{number}.example.com."), RecordType::A);
        assert!(world.ask(&asked).is_none());
    }
    let reply = world
        .ask(&question("more.example.com.", RecordType::A))
        .unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(world.dns.stats().crowded, 1);

    while let Some(outgoing) = world.out.outgoing.pop() {
        let sent = Message::from_vec(&outgoing.payload).unwrap();
        world.serve(outgoing.token, &answer(&sent, 60, &[[1, 1, 1, 1]]));
    }
    for number in 0..2 * CACHE_ENTRIES {
        let asked = question(&format!("c{number}.example.com."), RecordType::A);
        assert!(world.ask(&asked).is_none());
        let (token, _, sent) = world.sent();
        world.serve(token, &answer(&sent, 60, &[[1, 1, 1, 1]]));
    }
    assert_eq!(world.dns.cache.len(), CACHE_ENTRIES);
    let sum: usize = world.dns.cache.values().map(|it| it.bytes).sum();
    assert_eq!(world.dns.cached_bytes, sum);
    assert!(
        world
            .ask(&question("c8191.example.com.", RecordType::A))
            .is_some()
    );
    assert!(
        world
            .ask(&question("c0.example.com.", RecordType::A))
            .is_none()
    );
}

#[test]
fn bent_messages_from_both_sides_never_panic() {
    let mut world = world(&["192.0.2.53"]);
    let mut random = fastrand::Rng::with_seed(23);
    let good = question("www.example.com.", RecordType::A)
        .to_vec()
        .unwrap();
    let sample = question("www.example.com.", RecordType::A);
    let reply = answer(&sample, 60, &[[1, 2, 3, 4], [5, 6, 7, 8]])
        .to_vec()
        .unwrap();
    for round in 0..20_000_u64 {
        let mut bytes = if round % 2 == 0 {
            good.clone()
        } else {
            reply.clone()
        };
        bytes.truncate(random.usize(0..=bytes.len()));
        for _ in 0..random.usize(0..5) {
            if !bytes.is_empty() {
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
            }
        }
        if round % 2 == 0 {
            world.dns.query(client(), &bytes, world.now, &mut world.out);
        } else {
            let token = random.u64(0..world.dns.token + 2);
            world.dns.answered(token, &bytes, world.now, &mut world.out);
        }
        for (_, reply) in world.out.replies.drain(..) {
            assert!(reply.len() <= 4096);
        }
        world.out = DnsOut::default();
        world.now += Duration::from_millis(10);
        world.dns.poll(world.now, &mut world.out);
    }
    assert!(world.dns.pending.len() <= PENDING_MAX);
}

#[test]
fn an_answer_that_a_server_cut_is_fetched_over_tcp_for_who_asks_over_tcp() {
    let mut world = world(&["192.0.2.1", "192.0.2.2"]);
    let asked = question("example.com.", RecordType::A);
    let stream = Client {
        stream: Some(3),
        ..client()
    };
    let bytes = asked.to_vec().unwrap();
    world.dns.query(stream, &bytes, world.now, &mut world.out);
    let first = world.out.outgoing.pop().unwrap();
    assert!(!first.is_stream);
    let sent = Message::from_vec(&first.payload).unwrap();
    let mut cut = answer(&sent, 60, &[]);
    cut.metadata.truncation = true;
    assert!(world.serve(first.token, &cut).is_none());
    let second = world.out.outgoing.pop().unwrap();
    assert!(second.is_stream);
    assert_eq!(second.to, first.to);
    let sent = Message::from_vec(&second.payload).unwrap();
    let whole = answer(&sent, 60, &[[192, 0, 2, 9]; 2000]);
    let bytes = whole.to_vec().unwrap();
    world
        .dns
        .answered(second.token, &bytes, world.now, &mut world.out);
    let (to, reply) = world.out.replies.pop().unwrap();
    assert_eq!(to, stream);
    assert!(reply.len() > 20_000);
    let reply = Message::from_vec(&reply).unwrap();
    assert!(!reply.metadata.truncation && reply.answers.len() == 2000);
    // What came for the one is there for the other, cut to what a datagram takes.
    let mut later = asked.clone();
    later.metadata.id = 9;
    let reply = world.ask(&later).unwrap();
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    assert_eq!(world.dns.stats().streamed, 1);
}

#[test]
fn a_cut_answer_goes_to_who_asked_by_udp_as_it_is() {
    let mut world = world(&["192.0.2.1"]);
    world.ask(&question("example.com.", RecordType::A));
    let (token, _, sent) = world.sent();
    let mut cut = answer(&sent, 60, &[[192, 0, 2, 9]]);
    cut.metadata.truncation = true;
    let reply = world.serve(token, &cut).unwrap();
    assert!(reply.metadata.truncation);
    assert!(world.out.outgoing.is_empty());
    assert!(
        world
            .ask(&question("example.com.", RecordType::A))
            .is_none(),
        "it was cached"
    );
}

#[test]
fn other_servers_are_asked_from_then_on_and_what_the_old_ones_said_is_forgotten() {
    let mut world = world(&["192.0.2.1"]);
    let upstream = Arc::new(Upstream::new(&["192.0.2.1:53".parse().unwrap()]));
    world.dns = world.dns.following(Arc::clone(&upstream));
    let asked = question("example.com.", RecordType::A);
    world.ask(&asked);
    let (token, _, sent) = world.sent();
    world
        .serve(token, &answer(&sent, 600, &[[192, 0, 2, 9]]))
        .unwrap();
    assert!(world.ask(&asked).is_some(), "cached");
    upstream.set(&["192.0.2.2:5353".parse().unwrap()]);
    assert!(world.ask(&asked).is_none());
    let (token, to, sent) = world.sent();
    assert_eq!(to, "192.0.2.2:5353".parse().unwrap());
    // One that is under way when there are no servers any more ends as one that nobody answers.
    upstream.set(&[]);
    world.wait(10);
    world.dns.poll(world.now, &mut world.out);
    let reply = world.reply().unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert!(
        world
            .serve(token, &answer(&sent, 600, &[[192, 0, 2, 9]]))
            .is_none()
    );
}
