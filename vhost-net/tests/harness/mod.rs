//! A guest of smoltcp's own before a whole card, on real sockets of the host's loopback.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use vhost_net::card::{Card, CardStats};
use vhost_net::frame::header::NetHeader;
use vhost_net::host::{Happened, HostSockets};
use vhost_net::locals::{LocalOptions, LocalSide};
use vhost_net::policy::SharedRules;
use vhost_net::policy::groups::GroupsSpec;
use vhost_net::services::imds::{Imds, MetadataSpec};
use vhost_net::spec::Spec;
use vhost_net::stack::{Settings, Stack, Wire};

#[path = "../../src/testing.rs"]
mod testing;

use testing::Nic;

pub const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
pub const CARD: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];

#[derive(Default)]
pub struct Frames(pub Vec<Vec<u8>>);

impl Wire for Frames {
    fn has_room(&self) -> bool {
        self.0.len() < 4096
    }
    fn send(&mut self, _: NetHeader, frame: &[u8]) {
        self.0.push(frame.to_vec());
    }
}

pub struct Lab {
    pub card: Card<LocalSide>,
    pub stats: Arc<CardStats>,
    pub imds: Arc<Imds>,
    pub host: HostSockets,
    pub wire: Frames,
    pub nic: Nic,
    pub guest: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
    /// What the clock is ahead of the real one.
    pub ahead: Duration,
    port: u16,
    /// TTL or hop limit of each TCP segment with data that came, in order.
    pub hops: Vec<u8>,
}

impl Lab {
    pub fn new(flows_max: usize, metadata: &MetadataSpec) -> Self {
        let start = Instant::now();
        let spec = Arc::new(Spec::default());
        let imds = Imds::new(metadata, &spec, [7; 32], start).unwrap();
        let imds = Arc::new(imds);
        let options = LocalOptions {
            rules: Some(Arc::new(SharedRules::new(GroupsSpec::default()).unwrap())),
            imds: Some(Arc::clone(&imds)),
            ..LocalOptions::default()
        };
        let settings = Settings {
            flows_max,
            host_loopback: vec![Ipv4Addr::new(10, 0, 2, 2).into()],
            ..Settings::default()
        };
        let stats = Arc::new(CardStats::default());
        let engine = Arc::clone(&stats.stack);
        let stack = Stack::new(Arc::clone(&spec), settings, engine, 1, start);
        let local = LocalSide::new(&spec, &options, false, start);
        let mut nic = Nic::default();
        let config = Config::new(HardwareAddress::Ip);
        let mut guest = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        let own = Ipv4Addr::new(10, 0, 2, 15);
        let own6: Ipv6Addr = "fd00:0:0:2::15".parse().unwrap();
        guest.update_ip_addrs(|all| {
            all.push(IpCidr::new(IpAddress::from(own), 24)).unwrap();
            all.push(IpCidr::new(IpAddress::from(own6), 64)).unwrap();
        });
        let gateway = Ipv4Addr::new(10, 0, 2, 2);
        guest.routes_mut().add_default_ipv4_route(gateway).unwrap();
        let gateway: Ipv6Addr = "fe80::2".parse().unwrap();
        guest.routes_mut().add_default_ipv6_route(gateway).unwrap();
        Self {
            card: Card::new(spec, Arc::clone(&stats), stack, local),
            stats,
            imds,
            host: HostSockets::new().unwrap(),
            wire: Frames::default(),
            nic,
            guest,
            sockets: SocketSet::new(Vec::new()),
            start,
            ahead: Duration::ZERO,
            port: 1024,
            hops: Vec::new(),
        }
    }

    pub fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    pub fn connect(&mut self, to: (IpAddr, u16)) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 4096]);
        let mut socket = Socket::new(buffer(), buffer());
        self.port = if self.port == u16::MAX {
            1024
        } else {
            self.port + 1
        };
        socket.connect(self.guest.context(), to, self.port).unwrap();
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn send(&mut self, packet: &[u8]) {
        let kind = if packet[0] >> 4 == 4 {
            [8, 0]
        } else {
            [0x86, 0xdd]
        };
        let frame = [&CARD[..], &GUEST, &kind, packet].concat();
        let now = self.now();
        let (wire, host) = (&mut self.wire, &mut self.host);
        let elsewhere = self
            .card
            .from_guest(&NetHeader::default(), &frame, now, wire, host);
        assert!(elsewhere.is_none(), "there is one pair");
    }

    /// One round of everybody.
    pub fn round(&mut self) {
        let now = self.now();
        let micros = i64::try_from((now - self.start).as_micros()).unwrap();
        let time = smoltcp::time::Instant::from_micros(micros);
        self.guest.poll(time, &mut self.nic, &mut self.sockets);
        for packet in std::mem::take(&mut self.nic.tx) {
            self.send(&packet);
        }
        let mut happened = Vec::new();
        while self.host.take_events(&mut happened) {}
        for event in happened {
            if let Happened::Socket(flow, event) = event {
                self.card.stack.on_host(flow, event);
            }
        }
        self.card.run(now, &mut self.wire, &mut self.host);
        for frame in std::mem::take(&mut self.wire.0) {
            let (hops, protocol, transport) = match frame.get(12..14) {
                Some([8, 0]) => (frame[22], frame[23], 34),
                Some([0x86, 0xdd]) => (frame[21], frame[20], 54),
                _ => continue,
            };
            let has_data = protocol == 6
                && frame.len() > transport + 4 * usize::from(frame[transport + 12] >> 4);
            if has_data {
                self.hops.push(hops);
            }
            self.nic.rx.push_back(frame[14..].to_vec());
        }
    }

    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(120);
        while !is_so(self) {
            assert!(Instant::now() < end, "never: {what}; {:?}", self.card);
            self.round();
        }
    }
}
