use super::*;
use crate::services::imds::{CONNECTIONS_MAX, MetadataSpec};
use crate::spec::Spec;

fn imds_with(change: impl FnOnce(&mut MetadataSpec)) -> (Arc<Imds>, Instant) {
    let mut metadata = MetadataSpec {
        user_data: Some("#cloud-config\n".into()),
        ..MetadataSpec::default()
    };
    change(&mut metadata);
    let now = Instant::now();
    let imds = Imds::new(&metadata, &Spec::default(), [9; 32], now).unwrap();
    (Arc::new(imds), now)
}

fn imds() -> (Arc<Imds>, Instant) {
    imds_with(|_| {})
}

/// Sends and takes all that comes back.
fn exchange(connection: &mut Connection, request: &str, now: Instant) -> String {
    connection.receive(request.as_bytes(), now);
    let bytes: Vec<u8> = connection.output().drain(..).collect();
    String::from_utf8(bytes).unwrap()
}

/// One request on a connection of its own: status and body.
fn ask(imds: &Arc<Imds>, now: Instant, request: &str) -> (u16, String) {
    let mut connection = imds.connect(now).unwrap();
    let answer = exchange(&mut connection, request, now);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    // Another's parser reads what we write.
    let mut fields = [httparse::EMPTY_HEADER; 16];
    let mut parsed = httparse::Response::new(&mut fields);
    parsed.parse(answer.as_bytes()).unwrap();
    let length = parsed
        .headers
        .iter()
        .find(|it| it.name == "Content-Length")
        .unwrap();
    assert_eq!(
        std::str::from_utf8(length.value).unwrap(),
        body.len().to_string()
    );
    assert!(head.starts_with("HTTP/1.1 "));
    (parsed.code.unwrap(), body.to_owned())
}

fn put(ttl: &str) -> String {
    format!(
        "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n\r\n"
    )
}

fn get(path: &str, token: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n")
}

fn plain(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

#[test]
fn a_token_opens_the_metadata_and_nothing_else_does() {
    let (imds, now) = imds();
    let (status, token) = ask(&imds, now, &put("21600"));
    assert_eq!(status, 200);
    let path = "/latest/meta-data/local-ipv4";
    assert_eq!(
        ask(&imds, now, &get(path, &token)),
        (200, "10.0.2.15".into())
    );
    assert_eq!(ask(&imds, now, &plain(path)).0, 401);
    assert_eq!(ask(&imds, now, &get(path, "AAAA")).0, 401);
    assert_eq!(ask(&imds, now, &get(path, "")).0, 401);
    assert_eq!(ask(&imds, now, &plain("/")).0, 401);
    let stats = imds.stats();
    assert_eq!(stats.tokens.load(Ordering::Relaxed), 1);
    assert_eq!(stats.refused.load(Ordering::Relaxed), 4);
}

#[test]
fn a_token_ends_with_its_time() {
    let (imds, now) = imds();
    let (_, token) = ask(&imds, now, &put("1"));
    let request = get("/latest/meta-data/mac", &token);
    assert_eq!(ask(&imds, now, &request).0, 200);
    assert_eq!(ask(&imds, now + Duration::from_secs(1), &request).0, 401);
}

#[test]
fn a_time_that_is_missing_or_out_of_range_is_a_bad_request() {
    let (imds, now) = imds();
    for ttl in [
        "0",
        "21601",
        "-1",
        "",
        "1.5",
        "+1",
        "99999999999",
        "one",
        "6 0",
    ] {
        assert_eq!(ask(&imds, now, &put(ttl)).0, 400, "{ttl:?}");
    }
    let none = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(ask(&imds, now, none).0, 400);
    for ttl in ["1", "21600", " 60 "] {
        assert_eq!(ask(&imds, now, &put(ttl)).0, 200, "{ttl:?}");
    }
}

#[test]
fn a_proxy_gets_no_token() {
    let (imds, now) = imds();
    let forwarded = put("60").replace("Host: x", "x-forwarded-for: 10.0.0.1");
    assert_eq!(ask(&imds, now, &forwarded).0, 403);
}

#[test]
fn a_service_that_is_off_forbids_everything() {
    let (imds, now) = imds_with(|it| it.enabled = false);
    assert_eq!(ask(&imds, now, &put("60")).0, 403);
    assert_eq!(ask(&imds, now, &plain("/latest/meta-data/")).0, 403);
}

#[test]
fn version_1_works_when_it_is_asked_for_and_a_bad_token_is_still_bad() {
    let (imds, now) = imds_with(|it| it.version_1 = true);
    assert_eq!(ask(&imds, now, &plain("/latest/meta-data/mac")).0, 200);
    assert_eq!(ask(&imds, now, &get("/latest/meta-data/mac", "bad")).0, 401);
}

#[test]
fn paths_begin_with_a_version_and_listings_are_found_with_and_without_the_slash() {
    let (imds, now) = imds();
    let (_, token) = ask(&imds, now, &put("60"));
    let read = |path: &str| ask(&imds, now, &get(path, &token));
    let versions = read("/").1;
    assert!(versions.ends_with("\nlatest") && versions.contains("\n2021-03-23\n"));
    assert_eq!(read("/2021-03-23/meta-data/instance-id").0, 200);
    assert_eq!(read("/latest").1, "dynamic\nmeta-data\nuser-data");
    assert_eq!(read("/latest/meta-data"), read("/2009-04-04/meta-data/"));
    assert_eq!(read("/latest//meta-data//mac?x=1").0, 200);
    assert_eq!(read("/latest/user-data").1, "#cloud-config\n");
    for path in [
        "/1999-01-01/meta-data/",
        "/latest/meta-data/x",
        "/latest/../latest",
        "/x",
    ] {
        assert_eq!(read(path).0, 404, "{path}");
    }
}

#[test]
fn methods_that_have_no_meaning_are_not_allowed() {
    let (imds, now) = imds();
    for (request, allow) in [
        ("POST /latest/meta-data/ HTTP/1.1\r\n\r\n", "GET, HEAD"),
        ("PUT /latest/meta-data/ HTTP/1.1\r\n\r\n", "GET, HEAD"),
        ("GET /latest/api/token HTTP/1.1\r\n\r\n", "PUT"),
        ("DELETE /latest/api/token HTTP/1.1\r\n\r\n", "PUT"),
    ] {
        let mut connection = imds.connect(now).unwrap();
        let answer = exchange(&mut connection, request, now);
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(
            answer.contains(&format!("\r\nAllow: {allow}\r\n")),
            "{answer}"
        );
    }
}

#[test]
fn head_has_the_length_and_no_body() {
    let (imds, now) = imds();
    let (_, token) = ask(&imds, now, &put("60"));
    let request = get("/latest/meta-data/local-ipv4", &token).replacen("GET", "HEAD", 1);
    let mut connection = imds.connect(now).unwrap();
    let answer = exchange(&mut connection, &request, now);
    assert!(answer.contains("Content-Length: 9\r\n"));
    assert!(answer.ends_with("\r\n\r\n"));
    assert!(answer.contains("X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 60\r\n"));
}

#[test]
fn a_kept_connection_takes_requests_one_after_the_other_also_in_one_piece() {
    let (imds, now) = imds();
    let (_, token) = ask(&imds, now, &put("60"));
    let mut connection = imds.connect(now).unwrap();
    let one = get("/latest/meta-data/mac", &token);
    for _ in 0..20 {
        assert!(exchange(&mut connection, &one, now).ends_with("52:54:00:12:34:56"));
    }
    let answers = exchange(&mut connection, &one.repeat(5), now);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 5);
    assert!(!connection.is_done());
    let last = one.replace("Host: x", "Connection: close");
    assert!(exchange(&mut connection, &last, now).contains("Connection: close\r\n"));
    assert!(connection.is_done());
}

#[test]
fn http_1_0_closes_unless_it_asks_to_stay() {
    let (imds, now) = imds();
    let mut connection = imds.connect(now).unwrap();
    exchange(&mut connection, "GET / HTTP/1.0\r\n\r\n", now);
    assert!(connection.is_done());
    let mut connection = imds.connect(now).unwrap();
    exchange(
        &mut connection,
        "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
        now,
    );
    assert!(!connection.is_done());
}

#[test]
fn a_request_in_single_bytes_is_answered_when_it_is_complete() {
    let (imds, now) = imds();
    let mut connection = imds.connect(now).unwrap();
    let request = put("60");
    for (index, byte) in request.bytes().enumerate() {
        assert!(connection.output().is_empty(), "byte {index}");
        connection.receive(&[byte], now);
    }
    assert!(!connection.output().is_empty());
}

#[test]
fn a_dribbled_request_is_cut_off_and_an_idle_connection_too() {
    let (imds, start) = imds();
    let mut connection = imds.connect(start).unwrap();
    assert_eq!(connection.deadline(), Some(start + IDLE_TIME));
    let mut now = start;
    for byte in b"GET / HTTP/1" {
        now += Duration::from_secs(1);
        connection.receive(&[*byte], now);
        assert_eq!(
            connection.deadline(),
            Some(start + Duration::from_secs(1) + REQUEST_TIME)
        );
    }
    let mut connection = imds.connect(start).unwrap();
    exchange(&mut connection, &put("60"), start + Duration::from_secs(5));
    assert_eq!(
        connection.deadline(),
        Some(start + Duration::from_secs(5) + IDLE_TIME)
    );
}

#[test]
fn requests_that_can_be_read_in_two_ways_end_the_connection() {
    let (imds, now) = imds();
    for fields in [
        "Transfer-Encoding: chunked",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: x",
        "Content-Length: -1",
        "Content-Length: 3",
        "Bad Field: x",
    ] {
        let mut connection = imds.connect(now).unwrap();
        let request = format!("GET / HTTP/1.1\r\n{fields}\r\n\r\nabc");
        let answer = exchange(&mut connection, &request, now);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{fields}: {answer}");
        assert!(connection.is_done());
    }
}

#[test]
fn a_short_body_of_a_put_is_read_over_and_a_long_one_is_refused() {
    let (imds, now) = imds();
    let mut connection = imds.connect(now).unwrap();
    let request = put("60").replace("Host: x", "Content-Length: 3") + "abc" + &put("61");
    let answers = exchange(&mut connection, &request, now);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2);
    let request = put("60").replace("Host: x", "Content-Length: 1025");
    assert_eq!(ask(&imds, now, &request).0, 413);
}

#[test]
fn a_head_that_is_too_long_is_refused_before_it_is_complete() {
    let (imds, now) = imds();
    let endless = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(HEAD_MAX));
    assert_eq!(ask(&imds, now, &endless).0, 431);
    let many = format!(
        "GET / HTTP/1.1\r\n{}\r\n",
        "X: y\r\n".repeat(FIELDS_MAX + 1)
    );
    assert_eq!(ask(&imds, now, &many).0, 431);
}

#[test]
fn a_guest_that_does_not_read_holds_bounded_memory_and_is_cut_off() {
    let (imds, now) = imds_with(|it| it.user_data = Some("x".repeat(40_000)));
    let (_, token) = ask(&imds, now, &put("60"));
    let mut connection = imds.connect(now).unwrap();
    let request = get("/latest/user-data", &token);
    let mut largest = 0;
    for _ in 0..10_000 {
        if connection.is_done() {
            break;
        }
        connection.receive(request.as_bytes(), now);
        largest = largest.max(connection.output.len() + connection.input.len());
    }
    assert!(connection.is_done());
    assert!(largest <= OUTPUT_MAX + 41_000 + INPUT_MAX + 1, "{largest}");
}

#[test]
fn what_waited_for_room_goes_on_when_the_guest_reads() {
    let (imds, now) = imds_with(|it| it.user_data = Some("x".repeat(40_000)));
    let (_, token) = ask(&imds, now, &put("60"));
    let mut connection = imds.connect(now).unwrap();
    connection.receive(get("/latest/user-data", &token).repeat(10).as_bytes(), now);
    let mut got = 0;
    loop {
        let taken = connection.output().drain(..).len();
        if taken == 0 {
            break;
        }
        got += taken;
    }
    assert!(got > 400_000, "{got}");
}

#[test]
fn a_half_closed_connection_is_answered_and_then_closed() {
    let (imds, now) = imds();
    let mut connection = imds.connect(now).unwrap();
    connection.receive(put("60").as_bytes(), now);
    connection.end(now);
    assert!(connection.is_done());
    assert!(!connection.output().is_empty());
}

#[test]
fn only_answers_after_a_put_have_the_short_hop_limit() {
    let (imds, now) = imds_with(|it| it.version_1 = true);
    let mut connection = imds.connect(now).unwrap();
    exchange(&mut connection, &plain("/latest/meta-data/mac"), now);
    assert_eq!(connection.hop_limit(), 64);
    exchange(&mut connection, &put("60"), now);
    assert_eq!(connection.hop_limit(), 1);
}

#[test]
fn connections_are_bounded_and_come_back() {
    let (imds, now) = imds();
    let all: Vec<_> = (0..CONNECTIONS_MAX)
        .map(|_| imds.connect(now).unwrap())
        .collect();
    assert!(imds.connect(now).is_none());
    assert_eq!(imds.stats().crowded.load(Ordering::Relaxed), 1);
    drop(all);
    assert!(imds.connect(now).is_some());
}

#[test]
fn bent_requests_never_panic_and_each_gets_an_answer_or_waits() {
    let (imds, now) = imds();
    let (_, token) = ask(&imds, now, &put("60"));
    let good = [
        put("60"),
        get("/latest/meta-data/public-keys/0/", &token),
        plain("/latest"),
    ];
    let mut random = fastrand::Rng::with_seed(13);
    for _ in 0..20_000 {
        let mut bytes = good[random.usize(0..good.len())].clone().into_bytes();
        for _ in 0..random.usize(0..6) {
            let at = random.usize(0..bytes.len());
            match random.u8(0..3) {
                0 => bytes[at] = random.u8(..),
                1 => bytes.insert(at, *random.choice(b"\r\n :/%\0").unwrap()),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let mut connection = imds.connect(now).unwrap();
        connection.receive(&bytes, now);
        assert!(connection.output().len() < 4096);
        let waits = connection.output().is_empty() && !connection.is_done();
        assert_eq!(waits, connection.output().is_empty());
        connection.end(now);
        assert!(connection.is_done());
    }
}
