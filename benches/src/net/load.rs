//! What is measured: TCP and UDP by an unmodified `iperf3`, round trips, new connections.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
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
/// Runs that look for the rate without loss.
const PROBES: u32 = 6;
/// What still counts as none: a datagram in ten thousand.
const LOSS_MAX: f64 = 1e-4;
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
    /// UDP datagrams of 1400 bytes from the guest, as fast as they go; those that arrive count.
    UdpFlood,
    /// The most of them that arrive without a loss.
    UdpLossless,
    /// A datagram there and back.
    RoundTrip,
    /// Connections that are opened, used for one byte each way, and closed.
    Connect,
}

impl Load {
    /// All, in order.
    pub const ALL: [Self; 9] = [
        Self::TcpOut { flows: 1 },
        Self::TcpIn { flows: 1 },
        Self::TcpOut { flows: 8 },
        Self::TcpIn { flows: 8 },
        Self::TcpBesideIdle { idle: 1000 },
        Self::UdpFlood,
        Self::UdpLossless,
        Self::RoundTrip,
        Self::Connect,
    ];

    /// What it is called on the command line.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::TcpOut { flows } => format!("tcp-out-{flows}"),
            Self::TcpIn { flows } => format!("tcp-in-{flows}"),
            Self::TcpBesideIdle { .. } => "tcp-beside-idle".to_owned(),
            Self::UdpFlood => "udp-flood".to_owned(),
            Self::UdpLossless => "udp-lossless".to_owned(),
            Self::RoundTrip => "round-trip".to_owned(),
            Self::Connect => "connect".to_owned(),
        }
    }

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

    /// Bits that a figure of this load stands for, in a run of so many seconds. `None`: it is not
    /// about bytes, or the run is made of several.
    #[must_use]
    pub fn bits(self, figure: f64, seconds: f64) -> Option<f64> {
        matches!(
            self,
            Self::TcpOut { .. } | Self::TcpIn { .. } | Self::TcpBesideIdle { .. } | Self::UdpFlood
        )
        .then_some(figure * 1e9 * seconds)
    }
}

impl std::str::FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let load = Self::ALL.into_iter().find(|load| load.name() == text);
        load.ok_or_else(|| {
            format!(
                "there is no load of this name; these there are: {}",
                known()
            )
        })
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
            Self::UdpFlood => {
                f.write_str("UDP from the guest, 1400 bytes, what arrives of a flood")
            }
            Self::UdpLossless => f.write_str("UDP from the guest, 1400 bytes, without loss"),
            Self::RoundTrip => f.write_str("UDP round trip, 64 bytes, median"),
            Self::Connect => f.write_str("TCP connections opened, used and closed"),
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
            let address = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, ECHO_PORT));
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
        Load::UdpFlood => Ok(udp(guest, time, "0")?.0),
        Load::UdpLossless => lossless(guest, time),
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
    Ok(gbit_s(&ask_iperf(guest, time, arguments)?))
}

/// Gbit/s that arrived, and the part that was lost.
fn udp(guest: &Space, time: Duration, rate: &str) -> Result<(f64, f64)> {
    let sum = ask_iperf(guest, time, &["-u", "-b", rate, "-l", "1400"])?;
    Ok((gbit_s(&sum), sum.lost_percent.unwrap_or(0.0) / 100.0))
}

/// The highest rate at which nothing is lost, by bisection below what arrives of a flood.
fn lossless(guest: &Space, time: Duration) -> Result<f64> {
    let probe = time.min(Duration::from_secs(1));
    let (mut low, mut high) = (0.0, udp(guest, probe, "0")?.0 * 1.25);
    let mut best = 0.0;
    for _ in 0..PROBES {
        let rate = if low == 0.0 {
            high / 2.0
        } else {
            f64::midpoint(low, high)
        };
        let (arrived, lost) = udp(guest, probe, &format!("{:.0}", rate * 1e9))?;
        if lost <= LOSS_MAX {
            low = rate;
            best = f64::max(best, arrived);
        } else {
            high = rate;
        }
    }
    Ok(best)
}

fn ask_iperf(guest: &Space, time: Duration, arguments: &[&str]) -> Result<Sum> {
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
    sum.context("iperf3's report has no sum in it")
}

/// Of UDP, what was lost was sent only.
fn gbit_s(sum: &Sum) -> f64 {
    let arrived = 1.0 - sum.lost_percent.unwrap_or(0.0) / 100.0;
    sum.bits_per_second * arrived / 1e9
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

pub(super) fn open_idle(count: u16) -> io::Result<Vec<TcpStream>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_load_is_found_by_its_name_and_others_are_refused_with_a_list() {
        for load in Load::ALL {
            assert_eq!(load.name().parse(), Ok(load));
        }
        let error = "tcp".parse::<Load>().unwrap_err();
        assert!(error.contains("tcp-in-8, tcp-beside-idle"), "{error}");
    }

    #[test]
    fn what_was_lost_does_not_count_as_arrived() {
        let sum = Sum {
            bits_per_second: 2e9,
            lost_percent: Some(25.0),
        };
        assert_eq!(gbit_s(&sum), 1.5);
    }
}
