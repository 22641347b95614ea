use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use offload::stop::StopSignal;
use pcap_parser::traits::PcapReaderIterator as _;
use pcap_parser::{Block, PcapBlockOwned, PcapError, PcapNGReader};

use super::*;

/// A frame and its direction's flags.
type Flagged = (u8, Vec<u8>);

/// What another parser finds: the frames, and how many frames and drops were told in the end.
fn read(stream: &[u8]) -> (Vec<Flagged>, Option<(u64, u64)>) {
    let mut reader = PcapNGReader::new(1 << 20, stream).unwrap();
    let (mut frames, mut told) = (Vec::new(), None);
    loop {
        let (used, block) = match reader.next() {
            Ok(block) => block,
            Err(PcapError::Eof) => return (frames, told),
            Err(PcapError::Incomplete(_)) => {
                reader.refill().unwrap();
                continue;
            }
            Err(error) => panic!("{error:?}"),
        };
        match block {
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let flags = packet.options.iter().find(|it| it.code.0 == 2).unwrap();
                let kept = packet.data[..packet.caplen as usize].to_vec();
                frames.push((flags.value[0], kept));
            }
            PcapBlockOwned::NG(Block::InterfaceStatistics(it)) => {
                let number = |code| {
                    let option = it.options.iter().find(|option| option.code.0 == code);
                    u64::from_le_bytes(option.unwrap().value[..8].try_into().unwrap())
                };
                told = Some((number(4), number(5)));
            }
            _ => {}
        }
        reader.consume(used);
    }
}

fn start(tap: &Arc<Tap>, snaplen: u32, stop: &StopSignal) -> UnixStream {
    let (client, card) = UnixStream::pair().unwrap();
    card.set_nonblocking(true).unwrap();
    let running = tap.begin(Wanted { snaplen }).unwrap();
    spawn(running, card, "eni-7", stop.clone());
    client
}

fn rest(mut client: UnixStream) -> Vec<u8> {
    let mut stream = Vec::new();
    client.read_to_end(&mut stream).unwrap();
    stream
}

#[test]
fn frames_of_both_directions_come_in_order_and_the_client_says_when_it_is_enough() {
    let (tap, stop) = (Arc::new(Tap::default()), StopSignal::new().unwrap());
    tap.frame(Direction::Out, &[9; 60]);
    let client = start(&tap, 100, &stop);
    for n in 0..200_u8 {
        let direction = if n % 3 == 0 {
            Direction::In
        } else {
            Direction::Out
        };
        tap.frame(direction, &vec![n; usize::from(n) + 1]);
    }
    client.shutdown(Shutdown::Write).unwrap();
    let (frames, told) = read(&rest(client));
    assert_eq!(told, Some((200, 0)));
    assert_eq!(frames.len(), 200);
    for (n, (flags, frame)) in (0..200_u8).zip(&frames) {
        assert_eq!(*flags, if n % 3 == 0 { 1 } else { 2 });
        assert_eq!(frame, &vec![n; (usize::from(n) + 1).min(100)]);
    }
    tap.wait_ended(Duration::from_secs(10));
    assert!(!tap.is_wanted.load(Ordering::Relaxed));
    assert_eq!((tap.captured.get(), tap.dropped.get()), (200, 0));
}

#[test]
fn a_client_that_does_not_read_loses_frames_which_are_counted_and_nobody_waits() {
    let (tap, stop) = (Arc::new(Tap::default()), StopSignal::new().unwrap());
    let slow = start(&tap, pcap::SNAPLEN, &stop);
    let frame = vec![5; 60_000];
    // Ten times what there is room for.
    let sent = 20 * BUFFER_MAX / frame.len();
    for _ in 0..sent {
        tap.frame(Direction::In, &frame);
    }
    slow.shutdown(Shutdown::Write).unwrap();
    let (frames, told) = read(&rest(slow));
    let (all, dropped) = told.unwrap();
    assert_eq!(all, sent as u64);
    assert!(dropped > all / 2, "{dropped} of {all}");
    assert_eq!(frames.len() as u64, all - dropped);
    assert!(frames.iter().all(|(_, kept)| *kept == frame));
    assert_eq!(tap.dropped.get(), dropped);
}

#[test]
fn one_too_many_is_refused_until_another_one_ends() {
    let (tap, stop) = (Arc::new(Tap::default()), StopSignal::new().unwrap());
    let mut clients: Vec<_> = (0..CAPTURES_MAX).map(|_| start(&tap, 64, &stop)).collect();
    let refused = tap.begin(Wanted::default()).unwrap_err();
    assert!(matches!(refused, CaptureError::TooMany), "{refused}");
    // One that is gone without a word is found out.
    clients.pop();
    let end = Instant::now() + Duration::from_secs(30);
    let again = loop {
        match tap.begin(Wanted::default()) {
            Ok(running) => break running,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // One that never got its client gives its place back.
    drop(again);
    drop(start(&tap, 64, &stop));
    let short = tap.begin(Wanted { snaplen: 63 }).unwrap_err();
    assert!(matches!(short, CaptureError::Snaplen), "{short}");
}

#[test]
fn a_card_that_ends_tells_what_it_has() {
    let (tap, stop) = (Arc::new(Tap::default()), StopSignal::new().unwrap());
    let mut client = start(&tap, 64, &stop);
    // What a client says is not listened to.
    client.write_all(b"hello").unwrap();
    tap.frame(Direction::Out, &[1; 64]);
    stop.stop();
    let (frames, told) = read(&rest(client));
    assert_eq!((frames.len(), told), (1, Some((1, 0))));
    tap.wait_ended(Duration::from_secs(10));
    assert_eq!(tap.writers.load(Ordering::Relaxed), 0);
}
