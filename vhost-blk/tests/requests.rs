//! What the guest's requests get, over real rings, from the real binary.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use offload::testing::driver::Buffer;

#[test]
fn data_come_back_as_they_were_written_and_survive_a_restart() {
    let files = Files::with_volume("64M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 8192), [0; 8192], "never written: zeros");
    let small = pattern(1, 4096);
    let large = pattern(2, 1 << 20);
    guest.write(0, &small);
    guest.write(8 * 100, &large);
    assert_eq!(guest.read(0, 4096), small);
    assert_eq!(guest.read(8 * 100, 1 << 20), large);
    guest.flush();
    drop(guest);
    card.stop();

    let stored = std::fs::read(files.path("volume")).unwrap();
    let needle = &large[4096..4128];
    assert!(
        !stored.windows(needle.len()).any(|window| window == needle),
        "the backing holds plaintext"
    );
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    assert_eq!(guest.read(0, 4096), small);
    assert_eq!(guest.read(8 * 100, 1 << 20), large);
    drop(guest);
    card.stop();
}

#[test]
fn parts_of_blocks_are_merged_with_what_is_there() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let mut expected = pattern(1, 32 * 512);
    guest.write(64, &expected);
    // One sector, several, across blocks, whole blocks with ragged ends, into a hole.
    for (seed, sector, sectors) in [(2, 3, 1), (3, 5, 6), (4, 7, 19), (5, 0, 1), (6, 31, 1)] {
        let part = pattern(seed, sectors * 512);
        guest.write(64 + sector as u64, &part);
        expected[sector * 512..(sector + sectors) * 512].copy_from_slice(&part);
        assert_eq!(guest.read(64, 32 * 512), expected);
    }
    assert_eq!(guest.read(64 + 3, 512), expected[3 * 512..4 * 512]);
    assert_eq!(guest.read(64 + 6, 9 * 512), expected[6 * 512..15 * 512]);
    guest.write(1001, &expected[..512]);
    let mut block = vec![0; 4096];
    block[512..1024].copy_from_slice(&expected[..512]);
    assert_eq!(guest.read(1000, 4096), block);
    drop(guest);
    card.stop();
}

#[test]
fn requests_that_make_no_sense_get_an_error_and_the_queue_goes_on() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let end = (16 << 20) / 512;
    let sane = pattern(9, 4096);
    let error = |status, room: usize| Reply {
        status,
        data: vec![0xee; room],
        written: 1,
    };
    for (kind, sector, out, room, status) in [
        // Past the end, also by overflow.
        (IN, end, 0, 512, IOERR),
        (IN, end - 1, 0, 1024, IOERR),
        (IN, u64::MAX, 0, 512, IOERR),
        (IN, u64::MAX / 512, 0, 1024, IOERR),
        (OUT, end, 512, 0, IOERR),
        (OUT, end - 7, 4096, 0, IOERR),
        // No whole sectors.
        (IN, 0, 0, 511, IOERR),
        (IN, 0, 0, 513, IOERR),
        (OUT, 0, 100, 0, IOERR),
        // Nobody has heard of these.
        (2, 0, 0, 0, UNSUPP),
        (10, 0, 0, 512, UNSUPP),
        (u32::MAX, 0, 512, 0, UNSUPP),
        (1 << 31, 0, 0, 0, UNSUPP),
        // Segment lists of the wrong length.
        (DISCARD, 0, 0, 0, IOERR),
        (DISCARD, 0, 15, 0, IOERR),
        (WRITE_ZEROES, 0, 17 * 16, 0, IOERR),
    ] {
        let reply = guest.request(kind, sector, &vec![0; out], room);
        assert_eq!(
            reply,
            error(status, room),
            "kind {kind}, sector {sector}, {out}, {room}"
        );
        guest.write(8, &sane);
        assert_eq!(guest.read(8, 4096), sane);
    }
    // The last sector is there, and nothing of zero length is wrong with zero length.
    guest.write(end - 1, &sane[..512]);
    assert_eq!(guest.read(end - 1, 512), sane[..512]);
    for kind in [IN, OUT] {
        let reply = guest.request(kind, 0, &[], 0);
        assert_eq!((reply.status, reply.written), (OK, 1));
    }
    assert_eq!(guest.request(IN, end + 1, &[], 0).status, IOERR);
    drop(guest);
    card.stop();
}

#[test]
fn a_chain_is_taken_apart_by_bytes_and_not_by_descriptors() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let ram = std::sync::Arc::clone(&guest.ram);
    let at = ram.alloc(1 << 16, 4096);
    let mut request = OUT.to_le_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(40u64.to_le_bytes());
    let data = pattern(3, 8192);
    request.extend(&data);
    ram.write(at, &request);
    let status = at + 0xf000;

    // Header and data in pieces of every odd size; header and data in one; one byte each.
    for cut in [1, 3, 7, 15, 16, 17, 700, 4096, request.len()] {
        ram.write(status, &[0xee]);
        guest.write(40, &[0; 8192]);
        let mut chain: Vec<Buffer> = (0..request.len())
            .step_by(cut)
            .take(100)
            .map(|from| {
                let len = cut.min(request.len() - from);
                Buffer::readable(at + from as u64, len as u32)
            })
            .collect();
        let covered: u32 = chain.iter().map(|buffer| buffer.len).sum();
        let rest = request.len() as u32 - covered;
        if rest > 0 {
            chain.push(Buffer::readable(at + u64::from(covered), rest));
        }
        chain.push(Buffer::writable(status, 1));
        assert_eq!(guest.raw_indirect(&chain), 1);
        assert_eq!(ram.read(status, 1), [OK], "pieces of {cut}");
        assert_eq!(guest.read(40, 8192), data, "pieces of {cut}");
    }

    // The status is the last writable byte, wherever the data before it are.
    ram.write(at, &IN.to_le_bytes());
    let into = at + 0x4000;
    for cut in [1000, 4096, 8192, 8193] {
        ram.write(into, &[0xee; 8193]);
        let mut chain = vec![Buffer::readable(at, 16)];
        for from in (0..8193).step_by(cut) {
            let len = cut.min(8193 - from);
            chain.push(Buffer::writable(into + from as u64, len as u32));
        }
        assert_eq!(guest.raw_indirect(&chain), 8193);
        assert_eq!(ram.read(into, 8192), data);
        assert_eq!(ram.read(into + 8192, 1), [OK]);
    }
    drop(guest);
    card.stop();
}

#[test]
fn chains_that_lack_a_part_come_back_with_what_was_written() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let ram = std::sync::Arc::clone(&guest.ram);
    let at = ram.alloc(8192, 4096);
    ram.write(at, &[0; 16]);
    let status = at + 4096;
    let r = |len| Buffer::readable(at, len);
    let w = |len| Buffer::writable(status, len);
    // No status, no header, half a header.
    assert_eq!(guest.raw_chain(&[r(16)]), 0);
    for chain in [&[w(1)][..], &[w(513)], &[r(15), w(1)], &[r(1), w(513)]] {
        ram.write(status, &[0xee; 600]);
        assert_eq!(guest.raw_chain(chain), 1);
        let last = chain.last().unwrap().len as usize;
        let seen = ram.read(status, last);
        assert_eq!(seen[last - 1], IOERR);
        assert!(seen[..last - 1].iter().all(|byte| *byte == 0xee));
    }
    // Buffers that are not in guest memory: data, header, status.
    let nowhere = 1 << 40;
    ram.write(at, &IN.to_le_bytes());
    let bad_data = [r(16), Buffer::writable(nowhere, 4096), w(1)];
    guest.write(0, &[1; 4096]);
    assert_eq!(guest.raw_chain(&bad_data), 1);
    assert_eq!(ram.read(status, 1), [IOERR]);
    let bad_header = [Buffer::readable(nowhere, 16), w(1)];
    assert_eq!(guest.raw_chain(&bad_header), 1);
    assert_eq!(ram.read(status, 1), [IOERR]);
    let bad_status = [r(16), Buffer::writable(nowhere, 1)];
    assert_eq!(guest.raw_chain(&bad_status), 0);
    ram.write(at, &OUT.to_le_bytes());
    let bad_source = [r(16), Buffer::readable(nowhere, 4096), w(1)];
    assert_eq!(guest.raw_chain(&bad_source), 1);
    assert_eq!(ram.read(status, 1), [IOERR]);
    assert_eq!(
        guest.read(0, 4096),
        [1; 4096],
        "a write that failed changed nothing"
    );
    drop(guest);
    card.stop();
}

#[test]
fn the_serial_number_is_told_as_far_as_there_is_room() {
    let files = Files::with_volume("16M");
    let card = files.serve(&["--serial", "vol0123456789"]);
    let mut guest = Guest::new(&card);
    let mut serial = b"vol0123456789".to_vec();
    serial.resize(20, 0);
    for room in [0, 1, 5, 19, 20, 21, 512] {
        let reply = guest.request(GET_ID, 0, &[], room);
        let told = room.min(20);
        assert_eq!((reply.status, reply.written), (OK, told as u32 + 1));
        assert_eq!(reply.data[..told], serial[..told]);
        assert!(reply.data[told..].iter().all(|byte| *byte == 0xee));
    }
    drop(guest);
    card.stop();
    // Without the option it is the volume's own, which `create` has printed.
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let reply = guest.request(GET_ID, 0, &[], 20);
    assert!(reply.data.starts_with(b"vol") && reply.data.is_ascii());
    drop(guest);
    card.stop();
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_give_room_back() {
    use std::os::unix::fs::MetadataExt;
    let files = Files::with_volume("64M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let data = pattern(5, 1 << 20);
    for mib in 0..16 {
        guest.write(mib * 2048, &data);
    }
    guest.flush();
    let allocated = || std::fs::metadata(files.path("volume")).unwrap().blocks() * 512;
    let before = allocated();

    // Several segments, one of them ragged: a discard leaves what is not a whole block.
    let mut list = segment(0, 8 * 2048, 0);
    list.extend(segment(8 * 2048 + 3, 10, 0));
    assert_eq!(guest.request(DISCARD, 0, &list, 0).status, OK);
    assert_eq!(guest.read(0, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(guest.read(7 * 2048, 1 << 20), vec![0; 1 << 20]);
    let ragged = guest.read(8 * 2048, 8192);
    assert_eq!(ragged[..4096], data[..4096]);

    // Write zeroes does what it says to the byte, with and without unmap.
    let mut list = segment(10 * 2048 + 3, 10, 1);
    list.extend(segment(11 * 2048, 2048, 0));
    assert_eq!(guest.request(WRITE_ZEROES, 0, &list, 0).status, OK);
    let mut expected = data[..8192].to_vec();
    expected[3 * 512..13 * 512].fill(0);
    assert_eq!(guest.read(10 * 2048, 8192), expected);
    assert_eq!(guest.read(11 * 2048, 1 << 20), vec![0; 1 << 20]);

    // Room comes back once the old slots were punched, after the commit.
    guest.flush();
    let end = std::time::Instant::now() + PATIENCE;
    while allocated() > before - (7 << 20) {
        assert!(
            std::time::Instant::now() < end,
            "{} of {before}",
            allocated()
        );
        guest.flush();
        std::thread::sleep(std::time::Duration::from_millis(10));
    }

    // Flags and limits.
    for (kind, list, status) in [
        (DISCARD, segment(0, 8, 1), UNSUPP),
        (DISCARD, segment(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, segment(0, 8, 4), UNSUPP),
        (DISCARD, segment(0, (64 << 11) + 1, 0), IOERR),
        (DISCARD, segment(64 << 11, 1, 0), IOERR),
        (WRITE_ZEROES, segment(u64::MAX, 1, 0), IOERR),
        (DISCARD, segment(0, 0, 0), OK),
    ] {
        assert_eq!(guest.request(kind, 0, &list, 0).status, status, "{list:?}");
    }
    drop(guest);
    card.stop();
}

#[test]
fn types_whose_feature_was_not_negotiated_are_not_supported() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let none = Options {
        features: 1 << 32,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, none);
    guest.write(0, &[1; 512]);
    assert_eq!(guest.request(FLUSH, 0, &[], 0).status, UNSUPP);
    assert_eq!(
        guest.request(DISCARD, 0, &segment(0, 8, 0), 0).status,
        UNSUPP
    );
    assert_eq!(
        guest.request(WRITE_ZEROES, 0, &segment(0, 8, 0), 0).status,
        UNSUPP
    );
    assert_eq!(guest.read(0, 512), [1; 512]);
    drop(guest);
    card.stop();
}

#[test]
fn queues_are_served_side_by_side_with_deep_queues() {
    let files = Files::with_volume("64M");
    let card = files.serve(&["--queues", "3"]);
    let options = Options {
        queues: 3,
        ..Options::default()
    };
    let mut guest = Guest::with(&card, options);
    assert_eq!(guest.frontend.config(34, 2), 3u16.to_le_bytes());
    let mut tickets = Vec::new();
    for round in 0..15u64 {
        for queue in 0..3 {
            let block = round * 3 + queue as u64;
            let data = pattern(block, 16384);
            tickets.push(guest.send(queue, OUT, block * 32, &data, 0).unwrap());
        }
    }
    for ticket in &tickets {
        assert_eq!(guest.wait(ticket).status, OK);
    }
    let mut tickets = Vec::new();
    for block in 0..45u64 {
        let queue = (block as usize + 1) % 3;
        tickets.push((
            block,
            guest.send(queue, IN, block * 32, &[], 16384).unwrap(),
        ));
    }
    for (block, ticket) in &tickets {
        let reply = guest.wait(ticket);
        assert_eq!((reply.status, reply.data), (OK, pattern(*block, 16384)));
    }
    drop(guest);
    card.stop();
}

#[test]
fn a_large_request_of_many_segments_is_served_whole() {
    let files = Files::with_volume("64M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let ram = std::sync::Arc::clone(&guest.ram);
    let len: u32 = 16 << 20;
    let at = ram.alloc(u64::from(len) + 8192, 4096);
    let (header, status) = (at + u64::from(len), at + u64::from(len) + 4096);
    let data = pattern(8, len as usize);
    ram.write(at, &data);
    for kind in [OUT, IN] {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 12]);
        ram.write(header, &bytes);
        ram.write(status, &[0xee]);
        let mut chain = vec![Buffer::readable(header, 16)];
        let part = len / 128;
        for index in 0..128 {
            let addr = at + u64::from(index * part);
            chain.push(match kind {
                OUT => Buffer::readable(addr, part),
                _ => Buffer::writable(addr, part),
            });
        }
        chain.push(Buffer::writable(status, 1));
        let expected = if kind == IN { len + 1 } else { 1 };
        assert_eq!(guest.raw_indirect(&chain), expected);
        assert_eq!(ram.read(status, 1), [OK]);
        if kind == OUT {
            ram.write(at, &vec![0; len as usize]);
        }
    }
    assert!(ram.read(at, len as usize) == data);
    drop(guest);
    card.stop();
}

/// What comes of a chain, from the text of the standard: bytes written and status.
fn model(kind: u32, sector: u64, readable: u64, writable: u64, disk: u64) -> (u32, Option<u8>) {
    let Some(room) = writable.checked_sub(1) else {
        return (0, None);
    };
    let Some(payload) = readable.checked_sub(16) else {
        return (1, Some(IOERR));
    };
    let fits = |len: u64| len.is_multiple_of(512) && sector + len / 512 <= disk / 512;
    match kind {
        IN if fits(room) => (room as u32 + 1, Some(OK)),
        OUT if fits(payload) => (1, Some(OK)),
        IN | OUT => (1, Some(IOERR)),
        FLUSH => (1, Some(OK)),
        GET_ID => (room.min(20) as u32 + 1, Some(OK)),
        DISCARD | WRITE_ZEROES if payload == 0 || !payload.is_multiple_of(16) || payload > 256 => {
            (1, Some(IOERR))
        }
        // Whether the segments make sense is not modelled.
        DISCARD | WRITE_ZEROES => (1, None),
        _ => (1, Some(UNSUPP)),
    }
}

#[test]
fn any_chain_comes_back_with_the_length_and_status_that_the_standard_has_for_it() {
    let files = Files::with_volume("16M");
    let card = files.serve(&[]);
    let mut guest = Guest::new(&card);
    let ram = std::sync::Arc::clone(&guest.ram);
    let at = ram.alloc(1 << 20, 4096);
    let disk = 16 << 20;
    for seed in 0..3000_u64 {
        let dice = pattern(seed + 1, 64);
        let mut next = dice
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]));
        let mut roll = |below: u16| u64::from(next.next().unwrap() % below);
        let kind = match roll(8) {
            0 | 1 => IN,
            2 | 3 => OUT,
            4 => [FLUSH, GET_ID][roll(2) as usize],
            5 => [DISCARD, WRITE_ZEROES][roll(2) as usize],
            _ => roll(20) as u32,
        };
        let sector = match roll(4) {
            0 => disk / 512 - roll(20),
            1 => u64::from(u32::MAX) * 7,
            _ => roll(30_000),
        };
        // Lengths that are right half of the time, cut anywhere.
        let mut lengths = |head: u64, tail: u64| {
            let body = match roll(4) {
                0 => 0,
                1 => roll(20_000),
                2 => roll(20) * 16,
                _ => roll(40) * 512,
            };
            let mut left = (head + body + tail).saturating_sub(u64::from(roll(12) == 0) * 16);
            let mut list = Vec::new();
            while left > 0 {
                let part = match roll(3) {
                    _ if list.len() > 5 => left,
                    0 => left,
                    1 => left.min(1 + roll(40)),
                    _ => left.min(1 + roll(9000)),
                };
                list.push(part as u32);
                left -= part;
            }
            list
        };
        let (readable, writable) = (lengths(16, 0), lengths(0, 1));
        let total = |list: &[u32]| list.iter().map(|len| u64::from(*len)).sum::<u64>();
        let (r, w) = (total(&readable), total(&writable));
        if r + w == 0 {
            continue;
        }
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        // Readable bytes one after the other, writable ones behind, with a guard at their end.
        ram.write(at, &pattern(seed, r as usize + 16));
        ram.write(at, &header);
        let into = at + r + 16;
        ram.write(into, &vec![0xee; w as usize + 16]);
        let mut chain = Vec::new();
        let mut addr = at;
        for len in &readable {
            chain.push(Buffer::readable(addr, *len));
            addr += u64::from(*len);
        }
        let mut addr = into;
        for len in &writable {
            chain.push(Buffer::writable(addr, *len));
            addr += u64::from(*len);
        }
        let written = guest.raw_indirect(&chain);
        let (expected, status) = model(kind, sector, r, w, disk);
        let told = format!("seed {seed}, kind {kind}, sector {sector}, {readable:?}, {writable:?}");
        assert_eq!(written, expected, "{told}");
        let seen = ram.read(into, w as usize + 16);
        assert!(
            seen[w as usize..].iter().all(|byte| *byte == 0xee),
            "{told}"
        );
        if let Some(status) = status {
            assert_eq!(seen[w as usize - 1], status, "{told}");
        }
        if w > 0 && written == 1 {
            assert!(
                seen[..w as usize - 1].iter().all(|byte| *byte == 0xee),
                "{told}"
            );
        }
    }
    drop(guest);
    card.stop();
    assert!(files.on_volume("check", &[]).status.success());
}
