//! Mostly valid, sometimes bent conversations, fed into the message parser and the protocol
//! machine. Nothing may panic, no file descriptor may be lost, and what the machine says about
//! itself has to hold after every step.
//!
//! A coverage-guided fuzzer would find first (lengths, counts, bits, order) what the bends below aim
//! at; see `offload::testing::fuzz` for how to run more of them.

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::rc::Rc;

use offload::memory::RegionInfo;
use offload::testing::fuzz::{self, Random};
use offload::vhost_user::message::{HEADER_LEN, Header, MAX_BODY_LEN, MAX_MESSAGE_FDS, Request};
use offload::vhost_user::protocol::{
    Action, F_PROTOCOL_FEATURES, Offer, PROTOCOL_FEATURES, Protocol,
};

const CONVERSATIONS: u64 = 20_000;
const MESSAGES: u64 = 40;

const OFFER: Offer = Offer {
    features: 1 << 32 | 0xff,
    queue_count: 3,
    queue_size_max: 1024,
    has_config: true,
    has_mtu: true,
};

/// Stands for a file descriptor; knows how many of its kind are open.
#[derive(Debug)]
struct Token(Rc<Cell<usize>>);

impl Token {
    fn new(open: &Rc<Cell<usize>>) -> Self {
        open.set(open.get() + 1);
        Self(Rc::clone(open))
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

struct Wire {
    header: [u8; HEADER_LEN],
    body: Vec<u8>,
    fds: usize,
}

fn push(body: &mut Vec<u8>, value: u64, bytes: usize) {
    body.extend_from_slice(&value.to_ne_bytes()[..bytes]);
}

/// A handful of regions to choose from, most often the first; the third and fourth overlap it.
fn region(random: &mut Random) -> [u64; 4] {
    let first = [0x0, 0x10_0000, 0x7000_0000, 0];
    if !random.one_in(3) {
        return first;
    }
    random.pick(&[
        [0x10_0000, 0x10_0000, 0x7010_0000, 0x10_0000],
        [0x8_0000, 0x10_0000, 0x9000_0000, 0],
        [0x40_0000, 0x1000, 0x7000_0000, 0],
        [u64::MAX - 0xfff, 0x1000, 0x1_0000_0000, 0],
        [0x50_0000, 0x1000, u64::MAX - 0xfff, 0],
    ])
}

/// What a frontend usually begins with; SET_VRING_KICK comes last.
const PRELUDE: [u32; 8] = [16, 2, 37, 37, 8, 9, 18, 12];

fn valid(random: &mut Random, step: u64) -> (u32, Vec<u8>, usize) {
    let mut body = Vec::new();
    let mut queue = random.below(3);
    let mut fds = 0;
    let usual = PRELUDE.get(step as usize).copied();
    let request = match usual {
        Some(request) if !random.one_in(12) => {
            queue = 0;
            request
        }
        _ => random.pick(&[
            1, 2, 3, 4, 5, 8, 8, 9, 9, 10, 11, 11, 12, 12, 12, 13, 14, 15, 16, 17, 18, 18, 21, 24,
            25, 31, 32, 36, 37, 37, 37, 38, 38,
        ]),
    };
    match request {
        2 => {
            let features = random.pick(&[OFFER.features, 0, 1, 1 << 32]);
            let bit = random.pick(&[F_PROTOCOL_FEATURES, F_PROTOCOL_FEATURES, 0]);
            push(&mut body, features | bit, 8);
        }
        16 => push(&mut body, PROTOCOL_FEATURES.bits(), 8),
        5 => {
            let regions = random.below(3);
            push(&mut body, regions, 8);
            for _ in 0..regions {
                for field in region(random) {
                    push(&mut body, field, 8);
                }
            }
            fds = regions as usize;
        }
        8 => {
            push(&mut body, queue, 4);
            push(&mut body, random.pick(&[1, 128, 256, 512, 1024, 2048]), 4);
        }
        9 => {
            push(&mut body, queue, 8);
            let base = random.pick(&[
                0x7000_0000,
                0x7000_0000,
                0x7000_0000,
                0x7000_0000,
                0x7000_1000,
                0x7000_2000,
                0x700f_f000,
                0x9000_0000,
                u64::MAX - 0xfff,
            ]);
            for offset in [0, 0x8000, 0x4000] {
                push(&mut body, base.saturating_add(offset) & !0xf, 8);
            }
            push(&mut body, 0, 8);
        }
        10 | 11 => {
            push(&mut body, queue, 4);
            push(&mut body, random.below(1 << 16), 4);
        }
        12..=14 => {
            let no_fd = random.one_in(4);
            push(&mut body, queue | u64::from(no_fd) << 8, 8);
            fds = usize::from(!no_fd);
        }
        18 => {
            push(&mut body, queue, 4);
            push(&mut body, random.below(2), 4);
        }
        21 => fds = 1,
        24 | 25 => {
            let len = random.below(256) + 1;
            push(&mut body, random.below(257 - len), 4);
            push(&mut body, len, 4);
            push(&mut body, random.below(2), 4);
            body.resize(12 + len as usize, 0x55);
        }
        31 | 32 => {
            push(&mut body, 0x10000, 8);
            push(&mut body, 0, 8);
            push(&mut body, random.below(3) + 1, 2);
            push(&mut body, 256, 2);
            push(&mut body, 0, if random.one_in(2) { 4 } else { 0 });
            fds = usize::from(request == 32);
        }
        37 | 38 => {
            push(&mut body, 0, 8);
            for field in region(random) {
                push(&mut body, field, 8);
            }
            fds = usize::from(request == 37 || random.one_in(2));
        }
        _ => {}
    }
    (request, body, fds)
}

fn message(random: &mut Random, step: u64) -> Wire {
    let (mut request, mut body, mut fds) = valid(random, step);
    let mut flags = 1 | u32::from(random.one_in(2)) << 3;
    let mut announced = None;
    if random.one_in(8) {
        match random.below(8) {
            0 => request = random.next() as u32,
            1 => request = random.below(50) as u32,
            2 => body.truncate(random.below(body.len() as u64 + 1) as usize),
            3 => body.resize(body.len() + 1 + random.below(64) as usize, 0xff),
            4 => fds = random.below(MAX_MESSAGE_FDS as u64 + 1) as usize,
            5 => flags = random.next() as u32,
            6 => announced = Some(random.pick(&[u32::MAX, 0x8000_0000, MAX_BODY_LEN as u32 + 1])),
            _ => {}
        }
        // Bits anywhere, most often.
        if !body.is_empty() && !random.one_in(3) {
            let place = random.below(body.len() as u64) as usize;
            body[place] = random.pick(&[0, 1, 0x7f, 0x80, 0xff]);
        }
    }
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&request.to_ne_bytes());
    header[4..8].copy_from_slice(&flags.to_ne_bytes());
    header[8..].copy_from_slice(&announced.unwrap_or(body.len() as u32).to_ne_bytes());
    Wire { header, body, fds }
}

/// Plays the connection: keeps a table of regions and answers actions, sometimes with a failure.
#[derive(Default)]
struct Executor {
    regions: Vec<RegionInfo>,
    running: [bool; 3],
    started: u64,
    files: Vec<Token>,
}

fn sound(regions: &[RegionInfo]) -> bool {
    regions.iter().enumerate().all(|(n, a)| {
        let ends = [a.guest_phys_addr, a.userspace_addr, a.mmap_offset];
        a.size > 0
            && ends.iter().all(|start| start.checked_add(a.size).is_some())
            && regions[..n].iter().all(|b| {
                let apart =
                    |a: u64, a_len: u64, b: u64, b_len: u64| a + a_len <= b || b + b_len <= a;
                apart(a.guest_phys_addr, a.size, b.guest_phys_addr, b.size)
                    && apart(a.userspace_addr, a.size, b.userspace_addr, b.size)
            })
    })
}

impl Executor {
    /// Carries out all actions; their number is bounded by the queues.
    fn run(&mut self, protocol: &mut Protocol<Token>, random: &mut Random) {
        let mut count = 0;
        while let Some(action) = protocol.next_action() {
            count += 1;
            assert!(count <= 32, "actions without end");
            match action {
                Action::SetFeatures(features) => {
                    assert_eq!(features & !OFFER.features, 0);
                    assert_eq!(self.running, [false; 3]);
                }
                Action::ReplaceMemory(regions) => {
                    let (regions, files): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
                    if !sound(&regions) {
                        return protocol.drop_actions();
                    }
                    self.regions = regions;
                    self.files = files;
                    protocol.memory_changed(&self.regions);
                }
                Action::AddRegion(region, file) => {
                    let mut regions = self.regions.clone();
                    regions.push(region);
                    if !sound(&regions) || random.one_in(16) {
                        return protocol.drop_actions();
                    }
                    self.regions = regions;
                    self.files.push(file);
                    protocol.memory_changed(&self.regions);
                }
                Action::RemoveRegion(region) => {
                    let place = self.regions.iter().position(|r| {
                        (r.guest_phys_addr, r.size, r.userspace_addr)
                            == (region.guest_phys_addr, region.size, region.userspace_addr)
                    });
                    let Some(place) = place else {
                        return protocol.drop_actions();
                    };
                    self.regions.swap_remove(place);
                    self.files.swap_remove(place);
                    protocol.memory_changed(&self.regions);
                }
                Action::StartRing(queue) => self.start(protocol, queue, random),
                Action::StopRing(queue) => {
                    let running = &mut self.running[usize::from(queue)];
                    assert!(std::mem::replace(running, false), "stopped twice");
                    let base = random.next() as u16;
                    protocol.ring_stopped(queue, base);
                    assert_eq!(protocol.ring(queue).unwrap().base, base);
                }
                Action::UpdateMemory(queue)
                | Action::SetEnabled(queue)
                | Action::SetKick(queue)
                | Action::SetCall(queue) => assert!(self.running[usize::from(queue)]),
                Action::CreateInflight { num_queues, .. } => {
                    assert!(num_queues <= 3);
                    assert_eq!(self.running, [false; 3]);
                }
                Action::SetInflight(area, _file) => {
                    assert!(area.mmap_offset.checked_add(area.mmap_size).is_some());
                    assert_eq!(self.running, [false; 3]);
                }
                Action::SetBackendChannel(_file) => {}
                Action::SetMtu(_) => {}
                Action::SetErr(queue, _file) => assert!(queue < 3),
                Action::WriteConfig { offset, data } => {
                    assert!(offset as usize + data.len() <= 256);
                }
            }
        }
    }

    fn start(&mut self, protocol: &mut Protocol<Token>, queue: u16, random: &mut Random) {
        let ring = protocol.ring(queue).unwrap();
        let place = ring.running.expect("a ring that starts has a place");
        assert!(ring.kick.is_some() && ring.size.is_power_of_two() && ring.size <= 1024);
        let size = u64::from(ring.size);
        for (start, len) in [
            (place.desc_table, 16 * size),
            (place.avail_ring, 6 + 2 * size),
            (place.used_ring, 6 + 8 * size),
        ] {
            for byte in [start, start + len - 1] {
                let inside = |r: &RegionInfo| byte.wrapping_sub(r.guest_phys_addr) < r.size;
                assert!(self.regions.iter().any(inside), "a ring outside of memory");
            }
        }
        if random.one_in(8) {
            return protocol.ring_failed(queue);
        }
        let running = &mut self.running[usize::from(queue)];
        assert!(!std::mem::replace(running, true), "started twice");
        self.started += 1;
    }
}

#[test]
fn no_conversation_breaks_the_parser_or_the_protocol() {
    let mut accepted = 0u64;
    let mut refused = 0u64;
    let mut malformed = 0u64;
    let mut started = 0u64;
    let ran = fuzz::run("protocol", CONVERSATIONS, |seed, random| {
        let open = Rc::new(Cell::new(0));
        let mut protocol = Protocol::new(OFFER);
        let mut executor = Executor::default();
        for step in 0..MESSAGES {
            let wire = message(random, step);
            let fds = (0..wire.fds).map(|_| Token::new(&open)).collect();
            let Ok(header) = Header::parse(&wire.header) else {
                malformed += 1;
                continue;
            };
            assert!(header.body_len <= MAX_BODY_LEN);
            let features = protocol.features();
            match Request::parse(&header, &wire.body, fds) {
                Err(_) => malformed += 1,
                Ok(request) => match protocol.handle(request) {
                    Ok(_) => accepted += 1,
                    Err(_) => {
                        refused += 1;
                        assert_eq!(features, protocol.features());
                        assert!(protocol.next_action().is_none(), "a refusal acts");
                    }
                },
            }
            executor.run(&mut protocol, random);
            let running: Vec<u16> = protocol.running().collect();
            let expected: Vec<u16> = (0..3)
                .filter(|q| executor.running[usize::from(*q)])
                .collect();
            assert_eq!(running, expected, "conversation {seed}, message {step}");
            // One for each region, two for each ring.
            assert!(
                open.get() <= executor.regions.len() + 6,
                "descriptors are kept"
            );
        }
        started += executor.started;
        drop((protocol, executor));
        assert_eq!(open.get(), 0, "conversation {seed} loses descriptors");
    });
    if ran < 1000 {
        return;
    }
    // A generator that is refused at the door tests nothing behind it.
    let all = ran * MESSAGES;
    assert!(accepted > all / 2, "{accepted} of {all} accepted");
    assert!(refused > all / 50, "{refused} of {all} refused");
    assert!(malformed > all / 50, "{malformed} of {all} malformed");
    assert!(started > ran / 4, "{started} rings started");
}

#[test]
fn no_random_bytes_break_the_parser() {
    fuzz::run("messages", 300_000, |_, random| {
        let mut header = [0; HEADER_LEN];
        let mut body = vec![0; random.below(80) as usize];
        header[..4].copy_from_slice(&(random.below(48) as u32).to_ne_bytes());
        header[4..8].copy_from_slice(&1u32.to_ne_bytes());
        header[8..].copy_from_slice(&(body.len() as u32).to_ne_bytes());
        for byte in &mut body {
            *byte = random.next() as u8;
        }
        let fds = vec![(); random.below(4) as usize];
        let header = Header::parse(&header).unwrap();
        if let Ok(request) = Request::parse(&header, &body, fds) {
            let mut protocol = Protocol::new(OFFER);
            let _ = protocol.handle(request);
        }
    });
}
