use std::io::{BufRead as _, BufReader, Write as _};
use std::thread::JoinHandle;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

/// A server that greets and then answers each line it gets with what `answers` says, `ID` standing
/// for the command's id. It hangs up when the answers run out, unless the last one is `HANG`.
fn server(greeting: &str, answers: &[&str]) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let greeting = greeting.to_owned();
    let answers: Vec<String> = answers.iter().map(|&a| a.to_owned()).collect();
    let thread = std::thread::spawn(move || {
        let mut stream = theirs;
        let mut seen = Vec::new();
        if stream
            .write_all(format!("{greeting}\n").as_bytes())
            .is_err()
        {
            return seen;
        }
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        for answer in answers {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                break;
            }
            let request: Value = serde_json::from_str(&line).unwrap();
            seen.push(request["execute"].as_str().unwrap().to_owned());
            if answer == "HANG" {
                // Until the client goes away.
                let _ = reader.read_line(&mut line);
                break;
            }
            let answer = answer.replace("ID", &request["id"].to_string());
            if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
                break;
            }
        }
        seen
    });
    (ours, thread)
}

const OK: &str = r#"{"return": {}, "id": ID}"#;

#[test]
fn commands_are_answered_after_negotiation() {
    let status = r#"{"return": {"running": true, "status": "running"}, "id": ID}"#;
    let (stream, thread) = server(GREETING, &[OK, status, OK]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    assert_eq!(client.status(LONG).unwrap(), "running");
    client.system_powerdown(LONG).unwrap();
    assert_eq!(
        thread.join().unwrap(),
        ["qmp_capabilities", "query-status", "system_powerdown"]
    );
}

#[test]
fn events_between_command_and_reply_are_kept_in_order() {
    let events = concat!(
        r#"{"event": "NEVER_HEARD_OF", "data": {"a": [1]}, "timestamp": {"seconds": 1, "microseconds": 2}}"#,
        "\n",
        r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#,
        "\n",
        r#"{"return": {}, "id": ID}"#
    );
    let (stream, _thread) = server(GREETING, &[OK, events, "HANG"]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    client.execute("stop", None, LONG).unwrap();
    let first = client.next_event(LONG).unwrap().unwrap();
    assert_eq!(
        (first.name.as_str(), &first.data),
        ("NEVER_HEARD_OF", &json!({"a": [1]}))
    );
    assert_eq!(
        client.next_event(LONG).unwrap().unwrap().data["reason"],
        "guest-shutdown"
    );
    assert_eq!(client.next_event(SHORT).unwrap(), None);
}

#[test]
fn a_refusal_carries_qemus_words() {
    let refusal = r#"{"id": ID, "error": {"class": "CommandNotFound", "desc": "no such thing"}}"#;
    let (stream, _thread) = server(GREETING, &[OK, refusal, OK]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    let error = client.execute("nonsense", None, LONG).unwrap_err();
    assert_eq!(error.to_string(), "QEMU refuses `nonsense`: no such thing");
    client
        .system_powerdown(LONG)
        .expect("the connection goes on");
}

#[test]
fn an_answer_to_an_abandoned_command_is_not_taken_for_the_next_one() {
    let late = concat!(
        r#"{"return": {"late": true}, "id": 99}"#,
        "\n",
        r#"{"return": 7, "id": ID}"#
    );
    let (stream, _thread) = server(GREETING, &[OK, late]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    assert_eq!(client.execute("x", None, LONG).unwrap(), json!(7));
}

#[test]
fn silence_is_a_timeout_that_names_the_command() {
    let (stream, _thread) = server(GREETING, &[OK, "HANG"]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    let error = client.system_powerdown(SHORT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "QEMU did not answer `system_powerdown` within 50 ms"
    );
}

#[test]
fn a_server_that_never_greets_is_a_timeout() {
    let (stream, _theirs) = UnixStream::pair().unwrap();
    let error = Client::negotiate(stream, SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
}

#[test]
fn hanging_up_is_told_and_is_what_quit_wants() {
    let (stream, _thread) = server(GREETING, &[OK]);
    let mut client = Client::negotiate(stream, LONG).unwrap();
    assert!(matches!(client.next_event(LONG), Err(QmpError::HungUp)));
    let (stream, _thread) = server(GREETING, &[OK]);
    Client::negotiate(stream, LONG).unwrap().quit(LONG).unwrap();
}

#[test]
fn bad_json_and_strange_objects_are_errors() {
    for greeting in ["not json", "{\"QMP\"", "[1, 2]", "{\"hello\": 1}", "\u{0}"] {
        let (stream, _thread) = server(greeting, &[OK]);
        let error = Client::negotiate(stream, LONG).unwrap_err();
        assert!(matches!(error, QmpError::NotQmp(_)), "{greeting}: {error}");
    }
}

#[test]
fn nobody_listening_is_waited_for_and_then_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    assert!(matches!(
        Client::connect(&path, SHORT),
        Err(QmpError::Connect(_))
    ));
}

#[test]
fn lines_are_cut_wherever_reads_end() {
    let mut lines = LineSplitter::default();
    lines.push(b"{\"a\"").unwrap();
    assert_eq!(lines.next_line(), None);
    lines.push(b": 1}\r\n\r\n{}\n{").unwrap();
    assert_eq!(lines.next_line().unwrap(), b"{\"a\": 1}\r\n");
    assert_eq!(lines.next_line().unwrap(), b"{}\n");
    assert_eq!(lines.next_line(), None);
}

#[test]
fn a_line_without_end_is_not_buffered_for_ever() {
    let mut lines = LineSplitter::default();
    let block = vec![b'x'; 1 << 20];
    let refused = (0..8).find_map(|_| lines.push(&block).err());
    assert!(matches!(refused, Some(wire::WireError::LineTooLong)));
}
