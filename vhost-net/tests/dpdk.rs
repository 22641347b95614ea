//! The card under another driver than Linux's: DPDK's `net_virtio_user`, driven by `dpdk-testpmd`.
//!
//! Debian has it in `dpdk-dev`, `librte-net-virtio23` and `librte-mempool-ring23`, with 150 MiB of other
//! drivers behind it: without them the test says so and does nothing. `DPDK_PLUGINS` names a directory
//! with the drivers of a DPDK that is not installed.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

struct Card(Child);

impl Drop for Card {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn testpmd() -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("dpdk-testpmd"))
        .find(|file| file.is_file())
}

/// All of a counter's values.
fn values(stats: &Value, name: &str) -> Vec<u64> {
    let entries = stats["ok"][name].as_array();
    let entries = entries.unwrap_or_else(|| panic!("{name} is missing in {stats}"));
    entries
        .iter()
        .map(|entry| entry["value"].as_u64().unwrap())
        .collect()
}

fn stats(control: &Path) -> Value {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.write_all(b"{\"method\":\"stats\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn dpdks_driver_sends_millions_of_frames_and_none_of_them_is_wrong() {
    let Some(testpmd) = testpmd() else {
        eprintln!("skipped: dpdk-testpmd is not on PATH (Debian: dpdk-dev librte-net-virtio23)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (socket, control) = (dir.path().join("net"), dir.path().join("control"));
    let card = Command::new(env!("CARGO_BIN_EXE_vhost-net"))
        .args(["serve", "--socket-path"])
        .arg(&socket)
        .arg("--control-socket")
        .arg(&control)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let _card = Card(card);
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() || !control.exists() {
        assert!(Instant::now() < end, "the card does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let device = format!(
        "net_virtio_user0,path={},queues=1,mac=52:54:00:12:34:56",
        socket.display()
    );
    let mut command = Command::new("timeout");
    // The guest's address and the card's: the card answers, and nothing leaves it.
    command
        .args(["--signal=INT", "4"])
        .arg(testpmd)
        .args(["--lcores=0@0,1@0", "--no-huge", "-m", "256", "--no-pci"])
        .args(["--no-telemetry", "--file-prefix=vhost-net-test", "--vdev"])
        .arg(device);
    if let Some(plugins) = std::env::var_os("DPDK_PLUGINS") {
        command.arg("-d").arg(plugins);
    }
    let output = command
        .args(["--", "--forward-mode=txonly", "--auto-start"])
        .args(["--stats-period=1", "--total-num-mbufs=8192"])
        .arg("--tx-ip=10.0.2.15,10.0.2.2")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().rev().find(|line| line.contains("TX-packets"));
    let sent: u64 = last
        .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or_else(|| panic!("{said}\n{}", String::from_utf8_lossy(&output.stderr)));
    assert!(sent > 0, "{said}");
    let stats = stats(&control);
    let [received, taken] = values(&stats, "requests")[..] else {
        panic!("{stats}");
    };
    assert_eq!(taken, sent);
    assert!(received > 0, "the card has answered nothing: {stats}");
    assert_eq!(values(&stats, "completions"), [received, taken]);
    for wrong in [
        "broken",
        "errors",
        "malformed_chains",
        "malformed_frames",
        "in_flight",
        "spoofed_frames",
    ] {
        assert!(values(&stats, wrong).iter().all(|n| *n == 0), "{stats}");
    }
}
