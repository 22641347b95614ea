//! Server and client over a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::cli::SocketError;
use crate::stop::StopSignal;
use crate::telemetry::{QueueStats, Registry};

struct Rig {
    dir: tempfile::TempDir,
    stats: Arc<QueueStats>,
    stop: StopSignal,
    events: EventSender,
    thread: Option<ControlThread>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stats = Arc::new(QueueStats::new());
        let registry = Registry::new("card");
        registry.queue(0, &stats);
        let stop = StopSignal::new().unwrap();
        let server =
            ControlServer::bind(&dir.path().join("s"), "card", "1.2.3", &registry).unwrap();
        let events = server.events();
        let thread = server
            .method("double", |params| match params.as_i64() {
                Some(n) => Ok(json!(n * 2)),
                None => Err(ControlError::bad_params("a number is wanted")),
            })
            .method("big", |_| Ok(Value::String("x".repeat(1 << 20))))
            .upgrade("echo", |params| {
                let Some(greeting) = params.as_str().map(str::to_owned) else {
                    return Err(ControlError::bad_params("a greeting is wanted"));
                };
                let then = move |stream: UnixStream| {
                    std::thread::spawn(move || {
                        stream.set_nonblocking(false).unwrap();
                        let mut stream = BufReader::new(stream);
                        let mut line = String::new();
                        stream.read_line(&mut line).unwrap();
                        let answer = format!("{greeting}, {line}");
                        stream.get_mut().write_all(answer.as_bytes()).unwrap();
                    });
                };
                Ok((json!("go on"), Box::new(then)))
            })
            .spawn(stop.clone())
            .unwrap();
        Self {
            dir,
            stats,
            stop,
            events,
            thread: Some(thread),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn client(&self) -> ControlClient {
        ControlClient::connect(&self.path()).unwrap()
    }
}

fn remote_kind(result: Result<Value, ClientError>) -> ControlErrorKind {
    match result {
        Err(ClientError::Remote(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_reads_stats_metrics_version_and_methods() {
    let rig = Rig::new();
    rig.stats.requests.add(42);
    let mut client = rig.client();
    assert_eq!(client.call("ping", Value::Null).unwrap(), Value::Null);
    assert_eq!(
        client.call("stats", Value::Null).unwrap()["requests"][0]["value"],
        42
    );
    let metrics = client.call("metrics", Value::Null).unwrap();
    assert!(
        metrics
            .as_str()
            .unwrap()
            .contains("card_requests_total{queue=\"0\"} 42\n")
    );
    assert_eq!(
        client.call("version", Value::Null).unwrap(),
        json!({"name": "card", "version": "1.2.3"})
    );
    assert_eq!(
        client.call("methods", Value::Null).unwrap(),
        json!([
            "big", "double", "echo", "events", "methods", "metrics", "ping", "stats", "version"
        ])
    );
}

#[test]
fn a_cards_own_methods_get_parameters_and_answer_with_errors() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.call("double", json!(21)).unwrap(), 42);
    assert_eq!(
        remote_kind(client.call("double", json!("x"))),
        ControlErrorKind::BadParams
    );
    assert_eq!(
        remote_kind(client.call("nope", Value::Null)),
        ControlErrorKind::UnknownMethod
    );
    assert_eq!(client.call("double", json!(1)).unwrap(), 2);
}

#[test]
fn a_method_may_take_the_connection_over_and_it_then_takes_no_clients_place() {
    let rig = Rig::new();
    let refused = rig.client().upgrade("echo", Value::Null).unwrap_err();
    assert!(matches!(refused, ClientError::Remote(_)), "{refused}");
    let mut taken = Vec::new();
    for _ in 0..2 * MAX_CONNECTIONS {
        let (told, stream) = rig.client().upgrade("echo", json!("hello")).unwrap();
        assert_eq!(told, json!("go on"));
        taken.push(stream);
    }
    for mut stream in taken {
        stream.get_mut().write_all(b"world\n").unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello, world\n");
    }
    assert_eq!(rig.client().call("double", json!(4)).unwrap(), json!(8));
}

#[test]
fn a_response_larger_than_the_socket_buffer_arrives_whole() {
    let rig = Rig::new();
    let big = rig.client().call("big", Value::Null).unwrap();
    assert_eq!(big.as_str().unwrap().len(), 1 << 20);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let rig = Rig::new();
    let mut stream = UnixStream::connect(rig.path()).unwrap();
    let requests: String = (0..500)
        .map(|n| format!("{{\"method\":\"double\",\"params\":{n}}}\n"))
        .collect();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let writer = std::thread::spawn(move || stream.write_all(requests.as_bytes()));
    for n in 0..500 {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("{{\"ok\":{}}}\n", n * 2));
    }
    writer.join().unwrap().unwrap();
}

#[test]
fn garbage_gets_an_error_and_the_connection_goes_on() {
    let rig = Rig::new();
    let mut stream = UnixStream::connect(rig.path()).unwrap();
    stream
        .write_all(b"\x00\xff garbage\n{\"method\":\"ping\"}\n")
        .unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(
        line.starts_with("{\"error\":{\"kind\":\"bad_request\""),
        "{line}"
    );
    line.clear();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "{\"ok\":null}\n");
}

#[test]
fn an_endless_line_is_cut_off_with_an_error() {
    let rig = Rig::new();
    let mut client = rig.client();
    let error = client
        .call(&"x".repeat(MAX_LINE + 1), Value::Null)
        .unwrap_err();
    // The rest of the line may still be on its way when the server hangs up.
    let refused =
        matches!(&error, ClientError::Remote(e) if e.kind == ControlErrorKind::BadRequest);
    assert!(refused || matches!(error, ClientError::Closed), "{error:?}");
    rig.client().call("ping", Value::Null).unwrap();
}

#[test]
fn clients_that_stall_do_not_keep_others_waiting_and_one_too_many_is_told_so() {
    let rig = Rig::new();
    let mut stalled = Vec::new();
    for n in 0..MAX_CONNECTIONS - 1 {
        let mut stream = UnixStream::connect(rig.path()).unwrap();
        // Half a request, or a large answer that nobody reads.
        stream
            .write_all(if n % 2 == 0 {
                b"{\"meth"
            } else {
                b"{\"method\":\"big\"}\n"
            })
            .unwrap();
        stalled.push(stream);
    }
    let mut last = rig.client();
    last.call("ping", Value::Null).unwrap();
    assert_eq!(
        remote_kind(rig.client().call("ping", Value::Null)),
        ControlErrorKind::Busy
    );
    stalled.pop();
    last.call("ping", Value::Null).unwrap();
    rig.client().call("ping", Value::Null).unwrap();
}

#[test]
fn a_half_sent_request_is_cut_off_in_time() {
    let rig = Rig::new();
    let mut stream = UnixStream::connect(rig.path()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream.write_all(b"{\"method\":").unwrap();
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
}

#[test]
fn the_socket_is_private_and_goes_away_at_the_stop() {
    let mut rig = Rig::new();
    let mode = std::fs::metadata(rig.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let _idle = rig.client();
    rig.stop.stop();
    drop(rig.thread.take());
    assert!(!rig.path().exists());
}

#[test]
fn dropping_the_handle_ends_the_thread_without_a_stop() {
    let mut rig = Rig::new();
    drop(rig.thread.take());
    assert!(!rig.stop.is_stopped());
    assert!(matches!(
        ControlClient::connect(&rig.path()),
        Err(ClientError::Connect { .. })
    ));
}

#[test]
fn a_second_server_on_a_live_socket_is_refused() {
    let rig = Rig::new();
    let second = ControlServer::bind(&rig.path(), "card", "1", &Registry::new("card"));
    assert!(matches!(
        second,
        Err(ServeError::Socket(SocketError::InUse { .. }))
    ));
    rig.client().call("ping", Value::Null).unwrap();
}

/// Not a test of its own: what another user's process does in the test below.
#[test]
fn helper_call_ping() {
    let Ok(path) = std::env::var("OFFLOAD_TEST_CONTROL_SOCKET") else {
        return;
    };
    let result = ControlClient::connect(Path::new(&path))
        .unwrap()
        .call("ping", Value::Null);
    println!("result: {result:?}");
}

#[test]
fn another_user_is_refused_even_when_the_file_lets_it_in() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can start a process of another user");
        return;
    }
    let rig = Rig::new();
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(rig.dir.path(), 0o755);
    open(&rig.path(), 0o666);
    // A copy, because the build directory need not be readable for others.
    let program = rig.dir.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    open(&program, 0o755);
    let call = |uid: u32| {
        let output = Command::new(&program)
            .args(["--exact", "control::tests::helper_call_ping", "--nocapture"])
            .env("OFFLOAD_TEST_CONTROL_SOCKET", rig.path())
            .uid(uid)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(call(0).contains("result: Ok(Null)"));
    let refused = call(65534);
    assert!(refused.contains("kind: Refused"), "{refused}");
    assert!(
        refused.contains("user 65534 may not talk here"),
        "{refused}"
    );
}

#[test]
fn the_client_waits_for_a_card_that_starts_and_gives_up_at_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let stop = StopSignal::new().unwrap();
    let waited = ControlClient::connect_within(&path, Duration::from_millis(50), &stop);
    assert!(matches!(waited, Err(ClientError::Connect { .. })));
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| ControlClient::connect_within(&path, Duration::from_secs(30), &stop));
        std::thread::sleep(Duration::from_millis(50));
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(waiting.join().unwrap().is_ok());
    });
    stop.stop();
    let stopped =
        ControlClient::connect_within(&dir.path().join("t"), Duration::from_secs(30), &stop);
    assert!(matches!(stopped, Err(ClientError::Stopped { .. })));
}

#[test]
fn answers_that_are_none_are_errors_of_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let answer = |answer: &'static [u8]| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                BufReader::new(stream.try_clone().unwrap())
                    .read_line(&mut String::new())
                    .unwrap();
                stream.write_all(answer).unwrap();
            });
            ControlClient::connect(&path)
                .unwrap()
                .call("ping", Value::Null)
                .unwrap_err()
        })
    };
    assert!(matches!(answer(b""), ClientError::Closed));
    assert!(matches!(answer(b"{\"ok\":"), ClientError::Closed));
    assert!(matches!(answer(b"hello\n"), ClientError::Malformed(_)));
    assert!(matches!(
        answer(b"{\"ok\":1,\"error\":2}\n"),
        ClientError::Malformed(_)
    ));
}

#[test]
fn subscribers_get_events_and_others_do_not() {
    let rig = Rig::new();
    let mut other = rig.client();
    rig.events.send("early", json!({}));
    let mut one = rig.client().subscribe().unwrap();
    let mut two = rig.client().subscribe().unwrap();
    rig.events.send("low_space", json!({ "free_bytes": 7 }));
    for stream in [&mut one, &mut two] {
        let event = stream.next(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(event, json!({ "kind": "low_space", "free_bytes": 7 }));
        assert_eq!(stream.next(Duration::from_millis(20)).unwrap(), None);
    }
    assert_eq!(other.call("ping", Value::Null).unwrap(), Value::Null);
    let methods = other.call("methods", Value::Null).unwrap();
    assert!(methods.as_array().unwrap().contains(&json!("events")));
    drop(one);
    rig.events.send("again", json!({}));
    let event = two.next(Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!(event["kind"], "again");
    rig.stop.stop();
    assert!(two.next(Duration::from_secs(10)).is_err());
}

#[test]
fn a_subscriber_that_does_not_read_is_dropped_and_nobody_waits_for_it() {
    let rig = Rig::new();
    let slow = rig.client().subscribe().unwrap();
    let mut quick = rig.client().subscribe().unwrap();
    let mut other = rig.client();
    let text = "x".repeat(4000);
    // More than both sockets' buffers and the bound together.
    for number in 0..400 {
        rig.events
            .send("big", json!({ "number": number, "text": text }));
        let event = quick.next(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(event["number"], number);
    }
    assert_eq!(other.call("ping", Value::Null).unwrap(), Value::Null);
    let mut slow = slow;
    let mut seen = 0;
    let end = loop {
        match slow.next(Duration::from_secs(10)) {
            Ok(Some(_)) => seen += 1,
            other => break other,
        }
    };
    assert!(matches!(end, Err(ClientError::Closed)), "{end:?}");
    assert!(seen < 400, "{seen}");
}
