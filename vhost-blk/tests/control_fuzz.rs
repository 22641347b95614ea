//! The control socket of a serving card, with lines that are mostly requests: whatever it is asked, it
//! answers each line with one, goes on serving its guest, and ends well.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::*;
use offload::testing::fuzz::{self, Random};
use serde_json::{Value, json};

/// A line as long as this is refused and ends the connection.
const TOO_LONG: usize = 64 << 10;

struct Client {
    stream: UnixStream,
    replies: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let replies = BufReader::new(stream.try_clone().unwrap());
        Self { stream, replies }
    }

    /// The reply to a line; `None`: the connection is over.
    fn ask(&mut self, line: &[u8]) -> Option<Value> {
        let mut sent = line.to_vec();
        sent.push(b'\n');
        // It may be closed before all of a line that is too long is read.
        let is_sent = self.stream.write_all(&sent).is_ok();
        let mut reply = String::new();
        match self.replies.read_line(&mut reply) {
            Ok(0) | Err(_) => {
                assert!(
                    line.len() > TOO_LONG,
                    "no answer to {} bytes ({is_sent})",
                    line.len()
                );
                None
            }
            Ok(_) => Some(serde_json::from_str(&reply).unwrap()),
        }
    }
}

fn junk(random: &mut Random, depth: u64) -> Value {
    match random.below(if depth == 0 { 8 } else { 10 }) {
        0 => Value::Null,
        1 => json!(random.bend(4096)),
        2 => json!(-(random.below(1 << 40) as i64)),
        3 => json!(random.next() as f64 * 1e20),
        4 => json!(random.one_in(2)),
        5 => json!(random.pick(&[
            "",
            "1G",
            "-1",
            "1T",
            "99999999999999999999",
            "0x10",
            "\u{0}\u{1b}[2J",
            "1e9",
            "16M"
        ])),
        6 => json!("x".repeat(random.index(300))),
        7 => json!(random.below(1 << 30)),
        8 => (0..random.below(4))
            .map(|_| junk(random, depth - 1))
            .collect(),
        _ => {
            let names = [
                "size",
                "size_bytes",
                "bytes",
                "iops",
                "bps",
                "burst",
                "iops_burst",
                "bps_burst",
                "value",
                "limit",
                "io_size",
                "name",
                "16k",
            ];
            let fields = (0..random.below(4)).map(|_| {
                let name = random.pick(&names).to_owned();
                (name, junk(random, depth - 1))
            });
            Value::Object(fields.collect())
        }
    }
}

#[test]
fn no_line_on_the_control_socket_goes_unanswered_or_breaks_the_card() {
    let files = Files::with_volume("16M");
    let control = files.text("control");
    let card = files.serve(&["--control-socket", &control]);
    let mut guest = Guest::new(&card);
    guest.write(0, &pattern(1, 8192));
    let path = files.path("control");
    let mut client = Client::connect(&path);
    let methods = client.ask(br#"{"method":"methods"}"#).unwrap();
    let methods: Vec<String> = serde_json::from_value(methods["ok"].clone()).unwrap();
    assert!(methods.len() > 4, "{methods:?}");
    let (mut fine, mut refused) = (0, 0);
    let ran = fuzz::run("control", 3000, |_, random| {
        let method = &methods[random.index(methods.len())];
        let request = match random.below(3) {
            0 => json!({ "method": method }),
            _ => json!({ "method": method, "params": junk(random, 3) }),
        };
        let mut line = request.to_string().into_bytes();
        if random.one_in(2) {
            random.bend_bytes(&mut line);
        }
        if random.one_in(100) {
            line.resize(TOO_LONG - 10 + random.index(20), b' ');
        }
        line.retain(|byte| *byte != b'\n');
        match client.ask(&line) {
            Some(reply) if reply.get("ok").is_some() => fine += 1,
            Some(reply) => {
                let message = reply["error"]["message"].as_str().unwrap();
                assert!(!message.is_empty() && reply["error"]["kind"].is_string());
                refused += 1;
                if line.len() > TOO_LONG {
                    client = Client::connect(&path);
                }
            }
            None => client = Client::connect(&path),
        }
    });
    if ran >= 1000 {
        assert!(
            fine > ran / 10 && refused > ran / 10,
            "{fine}, {refused} of {ran}"
        );
    }
    // It may have been told to allow one operation in an hour.
    client = Client::connect(&path);
    if methods.iter().any(|method| method == "limits") {
        let lifted = client.ask(br#"{"method":"limits","params":{}}"#).unwrap();
        assert!(lifted.get("ok").is_some(), "{lifted}");
    }
    // Whatever it was told: the volume is as it was, at least in its first blocks.
    assert!(guest.read(0, 8192) == pattern(1, 8192));
    drop(guest);
    drop(client);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}
