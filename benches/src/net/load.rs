//! What is measured: TCP and UDP by an unmodified `iperf3`, round trips, new connections.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize, Serializer};

use super::peer::SERVER;
use super::space::Space;
use crate::client::histogram;

const IPERF_PORT: u16 = 5201;
const ECHO_PORT: u16 = 7007;
/// Threads that connect at a time.
const CONNECTORS: usize = 8;
/// How often `iperf3` is asked again.
const TRIES: u32 = 10;
/// Round trips of a measurement at most.
const ROUND_TRIPS: usize = 5000;

/// What is done through the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// TCP from the guest.
    TcpOut {
        /// Connections.
        flows: u16,
    },
    /// TCP to the guest.
    TcpIn {
        /// Connections.
        flows: u16,
    },
    /// One TCP flow from the guest while others are open and silent.
    TcpBesideIdle {
        /// How many others.
        idle: u16,
    },
    /// UDP datagrams of 1400 bytes from the guest, as fast as they go.
    UdpOut,
    /// A datagram there and back.
    RoundTrip,
    /// Connections that are opened, used for one byte each way, and closed.
    Connect,
}

impl Load {
    /// All, in order.
    pub const ALL: [Self; 8] = [
        Self::TcpOut { flows: 1 },
        Self::TcpIn { flows: 1 },
        Self::TcpOut { flows: 8 },
        Self::TcpIn { flows: 8 },
        Self::TcpBesideIdle { idle: 1000 },
        Self::UdpOut,
        Self::RoundTrip,
        Self::Connect,
    ];

    /// Unit of the figure.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::RoundTrip => "µs",
            Self::Connect => "1/s",
            _ => "Gbit/s",
        }
    }

    /// Whether less is better.
    #[must_use]
    pub const fn is_latency(self) -> bool {
        matches!(self, Self::RoundTrip)
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TcpOut { flows: 1 } => f.write_str("TCP from the guest, 1 flow"),
            Self::TcpOut { flows } => write!(f, "TCP from the guest, {flows} flows"),
            Self::TcpIn { flows: 1 } => f.write_str("TCP to the guest, 1 flow"),
            Self::TcpIn { flows } => write!(f, "TCP to the guest, {flows} flows"),
            Self::TcpBesideIdle { idle } => {
                write!(f, "TCP from the guest, 1 flow beside {idle} idle ones")
            }
            Self::UdpOut => f.write_str("UDP from the guest, 1400 bytes, what arrives"),
            Self::RoundTrip => f.write_str("UDP round trip, 64 bytes, median"),
            Self::Connect => f.write_str("New TCP connections"),
        }
    }
}

impl Serialize for Load {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[derive(Debug, Deserialize)]
struct Report {
    #[serde(default)]
    end: End,
    error: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
struct End {
    sum_received: Option<Sum>,
    sum: Option<Sum>,
}

#[derive(Debug, Deserialize)]
struct Sum {
    bits_per_second: f64,
    lost_percent: Option<f64>,
}

/// The servers in the host's namespace: `iperf3` and the echoes.
pub struct Servers {
    iperf: Child,
    stop: Arc<AtomicBool>,
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Servers").finish_non_exhaustive()
    }
}

impl Servers {
    /// Starts them.
    ///
    /// # Errors
    /// A port is taken or a program is missing.
    pub fn start(host: &Space) -> Result<Self> {
        let iperf = host
            .command("iperf3")
            .args(["-s", "-p", &IPERF_PORT.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("iperf3 does not start: install Debian's package iperf3")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (listener, socket) = host.run(|| {
            let address = SocketAddr::V4(SocketAddrV4::new(SERVER, ECHO_PORT));
            Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?))
        })?;
        listener.set_nonblocking(false)?;
        for _ in 0..CONNECTORS {
            let (listener, stop) = (listener.try_clone()?, Arc::clone(&stop));
            thread::spawn(move || echo_connections(&listener, &stop));
        }
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stopped = Arc::clone(&stop);
        thread::spawn(move || echo_datagrams(&socket, &stopped));
        Ok(Self { iperf, stop })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

/// Answers one byte and waits for the end; a connection that stays silent gets a thread of its own.
fn echo_connections(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => {
                let _ = stream.write_all(&byte);
                let _ = stream.read(&mut byte);
            }
            Ok(_) => {}
            Err(_) => {
                // Silent: kept open until its other end goes.
                let _ = stream.set_read_timeout(None);
                let keep = thread::Builder::new().stack_size(64 << 10);
                let _ = keep.spawn(move || stream.read(&mut [0]));
            }
        }
    }
}

fn echo_datagrams(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(buffer.get(..len).unwrap_or_default(), from);
        }
    }
}

/// Runs a load from the guest's namespace.
///
/// # Errors
/// Nothing gets through, or `iperf3` says something unexpected.
pub fn run(load: Load, guest: &Space, time: Duration) -> Result<f64> {
    match load {
        Load::TcpOut { flows } => iperf(guest, time, &["-P", &flows.to_string()]),
        Load::TcpIn { flows } => iperf(guest, time, &["-R", "-P", &flows.to_string()]),
        Load::UdpOut => iperf(guest, time, &["-u", "-b", "0", "-l", "1400"]),
        Load::TcpBesideIdle { idle } => {
            let open = guest.run(|| open_idle(idle)).context("idle connections")?;
            let result = iperf(guest, time, &["-P", "1"]);
            drop(open);
            result
        }
        Load::RoundTrip => guest.run(|| round_trip(time)).context("round trips"),
        Load::Connect => guest.run(|| connect(time)).context("connections"),
    }
}

fn iperf(guest: &Space, time: Duration, arguments: &[&str]) -> Result<f64> {
    let mut command = guest.command("iperf3");
    command
        .args(["-c", &SERVER.to_string(), "-p", &IPERF_PORT.to_string()])
        .args(["-J", "--connect-timeout", "3000", "-t"])
        .arg(time.as_secs().max(1).to_string())
        .args(arguments);
    let mut tries = 0;
    let report = loop {
        let said = timed(&mut command, time + Duration::from_secs(20))?;
        let report: Report = serde_json::from_slice(&said).context("iperf3's report")?;
        match report.error {
            None => break report,
            // The server takes a moment to notice that the last test is over.
            Some(_) if tries < TRIES => thread::sleep(Duration::from_millis(300)),
            Some(error) => bail!("iperf3: {error}"),
        }
        tries += 1;
    };
    let sum = report.end.sum_received.or(report.end.sum);
    let sum = sum.context("iperf3's report has no sum in it")?;
    // Of UDP, what was lost was sent only.
    let arrived = 1.0 - sum.lost_percent.unwrap_or(0.0) / 100.0;
    Ok(sum.bits_per_second * arrived / 1e9)
}

/// What a command says, within a time. Its status does not matter: `iperf3` reports its errors.
fn timed(command: &mut Command, limit: Duration) -> Result<Vec<u8>> {
    let output = Command::new("timeout")
        .arg(limit.as_secs().to_string())
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .output()
        .context("timeout(1) does not start")?;
    Ok(output.stdout)
}

fn open_idle(count: u16) -> io::Result<Vec<TcpStream>> {
    let address = SocketAddr::V4(SocketAddrV4::new(SERVER, ECHO_PORT));
    let limit = Duration::from_secs(5);
    (0..count)
        .map(|_| TcpStream::connect_timeout(&address, limit))
        .collect()
}

#[allow(clippy::cast_precision_loss)]
fn round_trip(time: Duration) -> io::Result<f64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((SERVER, ECHO_PORT))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut latency = histogram();
    let end = Instant::now() + time;
    let mut buffer = [0; 64];
    while Instant::now() < end && latency.len() < ROUND_TRIPS as u64 {
        let begin = Instant::now();
        socket.send(&buffer)?;
        socket.recv(&mut buffer)?;
        let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        latency.saturating_record(nanos);
    }
    Ok(latency.value_at_quantile(0.5) as f64 / 1e3)
}

#[allow(clippy::cast_precision_loss)]
fn connect(time: Duration) -> io::Result<f64> {
    let address = SocketAddr::V4(SocketAddrV4::new(SERVER, ECHO_PORT));
    let count = AtomicU64::new(0);
    let begin = Instant::now();
    let end = begin + time;
    let once = || -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    };
    thread::scope(|scope| {
        let connectors: Vec<_> = (0..CONNECTORS)
            .map(|_| {
                scope.spawn(|| {
                    // A new thread is in the namespace of the one that made it.
                    while Instant::now() < end {
                        once()?;
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        connectors.into_iter().try_for_each(|connector| {
            connector
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        })
    })?;
    Ok(count.into_inner() as f64 / begin.elapsed().as_secs_f64())
}
