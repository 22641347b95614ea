//! The edge: the host's sockets of one thread.
//!
//! All sockets are watched by one epoll instance, edge-triggered, and the thread's io_uring watches
//! that: one wait for everything, and a socket costs one system call when it is made instead of one
//! for each event. Polls of their own in the io_uring were the other choice: a submission for each
//! socket, to be cancelled and waited for when it closes.
//!
//! Sockets are never asked twice for what an edge has not announced, but the first time: a socket is
//! taken for neither readable nor writable when it is made, and epoll reports its state once.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, ipproto,
};

use vm_memory::VolatileSlice;

use crate::lan::port::Watcher;
use crate::local::Outgoing;
use crate::stack::{Event, Host, Kind, Report};

mod asked;
mod kept;
mod path;
pub mod publish;

use asked::Asked;
use kept::Peeking;
pub use path::may_ping;
use publish::{Published, Transport};

/// Events taken at a time.
const EVENTS: usize = 64;
/// How often in one call: the rest comes in the next round.
const EVENT_BATCHES: usize = 8;
/// Marks the events of published ports.
const PUBLISHED: u64 = 1 << 63;
/// Marks the events of questions to servers.
const ASKED: u64 = 1 << 62;
/// Marks the events of descriptors that are watched for others.
const WATCHED_FOR: u64 = 1 << 61;

struct Socket {
    fd: OwnedFd,
    /// Tells it from earlier ones of the same number.
    serial: u32,
    /// It keeps its bytes.
    peeking: Option<Peeking>,
}

/// What happened at the host.
#[derive(Debug)]
pub enum Happened {
    /// An event on a flow's socket.
    Socket(usize, Event),
    /// Somebody is at a published port.
    Published(usize),
    /// A server has said something.
    Answer(u64),
    /// An event on a descriptor that is watched for somebody: its mark.
    Watched(u64, Event),
}

/// See the module.
pub struct HostSockets {
    epoll: OwnedFd,
    sockets: Vec<Option<Socket>>,
    serial: u32,
    /// By numbers that are never used again: a flow of datagrams remembers its port's.
    published: HashMap<usize, Arc<Published>>,
    published_next: usize,
    asked: HashMap<u64, Asked>,
}

impl std::fmt::Debug for HostSockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostSockets").finish_non_exhaustive()
    }
}

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);
const WATCHED: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

/// A path that is too narrow is the guest's business if it says so, else the kernel's.
fn discover_mtu(fd: BorrowedFd<'_>, is_v4: bool, dont_fragment: bool) -> io::Result<()> {
    if is_v4 {
        let discovery = if dont_fragment {
            Ipv4PathMtuDiscovery::DO
        } else {
            Ipv4PathMtuDiscovery::DONT
        };
        sockopt::set_ip_mtu_discover(fd, discovery)?;
    } else {
        let discovery = if dont_fragment {
            Ipv6PathMtuDiscovery::DO
        } else {
            Ipv6PathMtuDiscovery::DONT
        };
        sockopt::set_ipv6_mtu_discover(fd, discovery)?;
    }
    Ok(())
}

impl HostSockets {
    /// No sockets yet.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            sockets: Vec::new(),
            serial: 0,
            published: HashMap::new(),
            published_next: 0,
            asked: HashMap::new(),
        })
    }

    /// What to wait on: readable when [`Self::take_events`] has something. Lives as long as this.
    #[must_use]
    pub fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes what has happened. True: there may be more.
    pub fn take_events(&mut self, happened: &mut Vec<Happened>) -> bool {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        for _ in 0..EVENT_BATCHES {
            let taken = match epoll::wait(&self.epoll, &mut events[..], Some(&now)) {
                Ok((taken, _)) => taken,
                Err(_) => return false,
            };
            let is_last = taken.len() < EVENTS;
            for event in &*taken {
                let (data, flags) = (event.data.u64(), event.flags);
                if data & PUBLISHED != 0 {
                    happened.push(Happened::Published((data & !PUBLISHED) as usize));
                    continue;
                }
                if data & ASKED != 0 {
                    happened.push(Happened::Answer(data & !ASKED));
                    continue;
                }
                let failed = flags.contains(EventFlags::ERR);
                let hung_up = flags.contains(EventFlags::HUP);
                let event = Event {
                    readable: failed || flags.contains(EventFlags::IN),
                    writable: failed || hung_up || flags.contains(EventFlags::OUT),
                    hangup: hung_up || flags.contains(EventFlags::RDHUP),
                };
                if data & WATCHED_FOR != 0 {
                    happened.push(Happened::Watched(data & !WATCHED_FOR, event));
                    continue;
                }
                let (flow, serial) = ((data >> 32) as usize, data as u32);
                let socket = self.sockets.get(flow).and_then(Option::as_ref);
                if socket.is_none_or(|socket| socket.serial != serial) {
                    continue;
                }
                happened.push(Happened::Socket(flow, event));
            }
            if is_last {
                return false;
            }
        }
        true
    }

    fn adopt(&mut self, flow: usize, fd: OwnedFd) -> io::Result<()> {
        self.serial = self.serial.wrapping_add(1);
        let data = (flow as u64) << 32 | u64::from(self.serial);
        epoll::add(&self.epoll, &fd, EventData::new_u64(data), WATCHED)?;
        if self.sockets.len() <= flow {
            self.sockets.resize_with(flow + 1, || None);
        }
        if let Some(place) = self.sockets.get_mut(flow) {
            *place = Some(Socket {
                fd,
                serial: self.serial,
                peeking: None,
            });
        }
        Ok(())
    }

    /// Takes a connection to a published port as the socket of a flow.
    ///
    /// # Errors
    /// The kernel cannot watch it.
    pub fn adopt_stream(&mut self, flow: usize, fd: OwnedFd) -> io::Result<()> {
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        self.adopt(flow, fd)
    }

    fn fd(&self, flow: usize) -> io::Result<BorrowedFd<'_>> {
        let socket = self.sockets.get(flow).and_then(Option::as_ref);
        let socket = socket.ok_or(io::Error::from(io::ErrorKind::NotConnected))?;
        Ok(socket.fd.as_fd())
    }

    fn peeking(&mut self, flow: usize) -> io::Result<(&OwnedFd, &mut Peeking)> {
        let socket = self.sockets.get_mut(flow).and_then(Option::as_mut);
        socket
            .and_then(|socket| Some((&socket.fd, socket.peeking.as_mut()?)))
            .ok_or(io::ErrorKind::NotConnected.into())
    }

    /// Watches these published ports, and no others.
    pub fn publish(&mut self, ports: &[Arc<Published>]) {
        let epoll = &self.epoll;
        self.published.retain(|_, old| {
            let is_kept = ports.iter().any(|new| Arc::ptr_eq(new, old));
            if !is_kept {
                let _ = epoll::delete(epoll, old.fd());
            }
            is_kept
        });
        for new in ports {
            if self.published.values().any(|old| Arc::ptr_eq(new, old)) {
                continue;
            }
            let at = self.published_next;
            self.published_next += 1;
            let data = EventData::new_u64(PUBLISHED | at as u64);
            if let Err(error) = epoll::add(&self.epoll, new.fd(), data, EventFlags::IN) {
                tracing::error!(%error, "cannot watch the published port {new}");
                continue;
            }
            self.published.insert(at, Arc::clone(new));
        }
    }

    /// Waits for no server any more.
    pub fn forget_all(&mut self) {
        self.asked.clear();
    }

    /// Takes what a server said to a question.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock`: nothing there.
    pub fn answer(&mut self, token: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let asked = self.asked.get_mut(&token);
        let asked = asked.ok_or(io::Error::from(io::ErrorKind::NotConnected))?;
        asked.answer(buffer)
    }

    /// A published port by its number in [`Happened::Published`].
    #[must_use]
    pub fn published(&self, at: usize) -> Option<Arc<Published>> {
        self.published.get(&at).cloned()
    }
}

impl Watcher for HostSockets {
    fn watch(&mut self, fd: BorrowedFd<'_>, mark: u64) -> io::Result<()> {
        let mark = mark & !(PUBLISHED | ASKED | WATCHED_FOR);
        Ok(epoll::add(
            &self.epoll,
            fd,
            EventData::new_u64(WATCHED_FOR | mark),
            WATCHED,
        )?)
    }
}

impl Host for HostSockets {
    fn open(&mut self, flow: usize, kind: Kind, to: SocketAddr) -> io::Result<()> {
        let (socket_type, protocol) = match (kind, &to) {
            (Kind::Tcp, _) => (SocketType::STREAM, ipproto::TCP),
            (Kind::Udp { .. }, _) => (SocketType::DGRAM, ipproto::UDP),
            (Kind::Ping, SocketAddr::V4(_)) => (SocketType::DGRAM, ipproto::ICMP),
            (Kind::Ping, SocketAddr::V6(_)) => (SocketType::DGRAM, ipproto::ICMPV6),
        };
        let fd = rustix::net::socket_with(family(&to), socket_type, FLAGS, Some(protocol))?;
        match (kind, &to) {
            (Kind::Tcp, _) => sockopt::set_tcp_nodelay(&fd, true)?,
            (Kind::Udp { dont_fragment }, to) => {
                discover_mtu(fd.as_fd(), to.is_ipv4(), dont_fragment)?;
            }
            (Kind::Ping, to) => path::keep_errors(&fd, to.is_ipv4())?,
        }
        match rustix::net::connect(&fd, &to) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) if kind == Kind::Tcp => {}
            Err(errno) => return Err(errno.into()),
        }
        self.adopt(flow, fd)
    }

    fn connected(&mut self, flow: usize) -> io::Result<()> {
        Ok(sockopt::socket_error(self.fd(flow)?)??)
    }

    fn recv(&mut self, flow: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let (len, _) = rustix::net::recv(self.fd(flow)?, buffer, RecvFlags::empty())?;
        Ok(len)
    }

    fn keep(&mut self, flow: usize) -> bool {
        let socket = self.sockets.get_mut(flow).and_then(Option::as_mut);
        socket.is_some_and(|socket| {
            socket.peeking = Peeking::begin(&socket.fd);
            socket.peeking.is_some()
        })
    }

    fn pending(&mut self, flow: usize) -> io::Result<usize> {
        Ok(rustix::io::ioctl_fionread(self.fd(flow)?)? as usize)
    }

    fn peek(&mut self, flow: usize, at: usize, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let (fd, peeking) = self.peeking(flow)?;
        peeking.peek(fd, at, into)
    }

    fn discard(&mut self, flow: usize, count: usize) -> io::Result<usize> {
        let (fd, peeking) = self.peeking(flow)?;
        peeking.discard(fd, count)
    }

    fn send(&mut self, flow: usize, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(
            self.fd(flow)?,
            bytes,
            SendFlags::NOSIGNAL,
        )?)
    }

    fn send_from(&mut self, published: usize, to: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        let port = self.published(published);
        let port = port.filter(|port| port.rule().transport == Transport::Udp);
        let port = port.ok_or(io::Error::from(io::ErrorKind::NotConnected))?;
        Ok(rustix::net::sendto(
            port.fd(),
            bytes,
            SendFlags::NOSIGNAL,
            &to,
        )?)
    }

    fn finish(&mut self, flow: usize) {
        if let Ok(fd) = self.fd(flow) {
            // Fails on a socket that is reset already, which its next event says.
            let _ = rustix::net::shutdown(fd, Shutdown::Write);
        }
    }

    fn close(&mut self, flow: usize, is_reset: bool) {
        if let Some(socket) = self.sockets.get_mut(flow).and_then(Option::take)
            && is_reset
        {
            let _ = sockopt::set_socket_linger(&socket.fd, Some(Duration::ZERO));
        }
    }

    fn ask(&mut self, question: &Outgoing) -> io::Result<()> {
        let asked = Asked::new(question)?;
        let data = EventData::new_u64(ASKED | (question.token & !(ASKED | PUBLISHED)));
        epoll::add(&self.epoll, asked.fd(), data, asked.watched())?;
        self.asked.insert(question.token, asked);
        Ok(())
    }

    fn forget(&mut self, token: u64) {
        self.asked.remove(&token);
    }

    fn set_hops(&mut self, flow: usize, is_v4: bool, hops: u8) -> io::Result<()> {
        let fd = self.fd(flow)?;
        path::keep_errors(fd, is_v4)?;
        path::set_hops(fd, is_v4, hops)
    }

    fn report(&mut self, flow: usize) -> Option<Report> {
        path::take_error(self.fd(flow).ok()?)
    }

    fn set_dont_fragment(&mut self, flow: usize, dont_fragment: bool) {
        if let Ok(fd) = self.fd(flow) {
            // A socket of IPv4 refuses what is for IPv6, but not the other way round. One that
            // refuses both keeps what it had.
            let _ = discover_mtu(fd, false, dont_fragment)
                .or_else(|_| discover_mtu(fd, true, dont_fragment));
        }
    }

    fn path_mtu(&mut self, flow: usize) -> Option<u32> {
        let fd = self.fd(flow).ok()?;
        sockopt::ip_mtu(fd).or_else(|_| sockopt::ipv6_mtu(fd)).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Instant;

    use super::*;

    /// Waits for events of that kind.
    fn answers(host: &mut HostSockets) -> Vec<u64> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let mut happened = Vec::new();
            host.take_events(&mut happened);
            if !happened.is_empty() || Instant::now() > end {
                let token = |it: &Happened| match it {
                    Happened::Answer(token) => Some(*token),
                    _ => None,
                };
                return happened.iter().filter_map(token).collect();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_server_is_asked_from_a_port_of_its_own_and_only_its_answer_comes_back() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        let mut host = HostSockets::new().unwrap();
        for token in [7, 8] {
            let payload = vec![token as u8; 3];
            let question = Outgoing {
                token,
                to,
                payload,
                is_stream: false,
            };
            host.ask(&question).unwrap();
        }
        let mut buffer = [0; 64];
        let (len, seven) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], [7; 3]);
        let (_, eight) = server.recv_from(&mut buffer).unwrap();
        assert_ne!(seven, eight);
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        stranger.send_to(b"forged", eight).unwrap();
        server.send_to(b"answer", eight).unwrap();
        assert_eq!(answers(&mut host), [8]);
        let len = host.answer(8, &mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"answer");
        assert!(host.answer(8, &mut buffer).is_err());
        host.forget(8);
        assert_eq!(host.asked.len(), 1);
        assert!(host.answer(9, &mut buffer).is_err());
    }

    #[test]
    fn a_server_is_asked_over_tcp_and_its_answer_is_taken_when_it_is_whole() {
        use std::io::{Read as _, Write as _};

        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut host = HostSockets::new().unwrap();
        let question = Outgoing {
            token: 5,
            to: server.local_addr().unwrap(),
            payload: b"question".to_vec(),
            is_stream: true,
        };
        host.ask(&question).unwrap();
        let mut peer = server.accept().unwrap().0;
        let mut buffer = vec![0; 1 << 16];
        let mut asked = [0; 10];
        // Sending is the events' work.
        assert_eq!(answers(&mut host).first(), Some(&5));
        assert!(host.answer(5, &mut buffer).is_err());
        peer.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"\0\x08question");
        let whole = [&[0xff, 0x00][..], &[7; 0xff00]].concat();
        let (one, two) = whole.split_at(30_000);
        peer.write_all(one).unwrap();
        answers(&mut host);
        assert!(host.answer(5, &mut buffer).is_err());
        peer.write_all(two).unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        let len = loop {
            answers(&mut host);
            match host.answer(5, &mut buffer) {
                Ok(len) => break len,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            assert!(Instant::now() < end);
        };
        assert_eq!(buffer[..len], [7; 0xff00]);
        drop(peer);
        answers(&mut host);
        let error = host.answer(5, &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
