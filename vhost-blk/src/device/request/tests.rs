//! Requests against a model that was written from the standard's text and shares no code with
//! the parser.

use offload::device::Segment;
use proptest::prelude::*;

use super::*;

const LEN: u64 = 1 << 20;
const ALL: u64 = config::FLUSH | config::DISCARD | config::WRITE_ZEROES;
const TERMS: Terms = Terms {
    features: ALL,
    volume_len: LEN,
    is_read_only: false,
};

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0xaa; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn shaped(readable: u64, writable: u64) -> Shape {
    Shape {
        readable,
        writable,
        status_at: 0,
    }
}

fn segments(lens: &[u32]) -> Vec<Segment> {
    let mut addr = 0x1000;
    lens.iter()
        .map(|len| {
            let segment = Segment { addr, len: *len };
            addr += u64::from(*len) + 100;
            segment
        })
        .collect()
}

/// The status that a request has to get, or none if it is to be carried out.
fn model(kind: u32, sector: u64, payload: u64, room: u64, terms: &Terms) -> Option<Status> {
    let sectors = u128::from(terms.volume_len / 512);
    let fits =
        |len: u64| len.is_multiple_of(512) && u128::from(sector) + u128::from(len / 512) <= sectors;
    let list = payload.is_multiple_of(16) && payload > 0 && payload <= 256;
    let needs = |feature: u64| terms.features & feature == 0;
    match kind {
        0 if !fits(room) => Some(Status::IoError),
        1 if terms.is_read_only || !fits(payload) => Some(Status::IoError),
        0 | 1 | 8 => None,
        4 if !needs(1 << 9) => None,
        11 if needs(1 << 13) => Some(Status::Unsupported),
        13 if needs(1 << 14) => Some(Status::Unsupported),
        11 | 13 if terms.is_read_only || !list => Some(Status::IoError),
        11 | 13 => None,
        _ => Some(Status::Unsupported),
    }
}

fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0..40_u64).prop_map(|n| n * 16),
        (0..3000_u64).prop_map(|n| n * 512),
        0..5000_u64,
        any::<u32>().prop_map(u64::from),
    ]
}

fn sectors() -> impl Strategy<Value = u64> {
    prop_oneof![0..3000_u64, any::<u64>(), (u64::MAX - 3000)..=u64::MAX]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_request_gets_what_the_standard_says(
        kind in prop_oneof![0..16_u32, any::<u32>()],
        sector in sectors(),
        payload in lengths(),
        room in lengths(),
        features in any::<u64>(),
        is_read_only in any::<bool>(),
    ) {
        let terms = Terms { features, is_read_only, ..TERMS };
        let shape = shaped(16 + payload, room);
        let parsed = parse(&header(kind, sector), &shape, &terms);
        let expected = model(kind, sector, payload, room, &terms);
        prop_assert_eq!(parsed.map_err(|refusal| refusal.status).err(), expected);
        match parsed {
            Ok(Request::In { offset, len }) => {
                prop_assert_eq!((kind, offset, len), (0, sector * 512, room));
            }
            Ok(Request::Out { offset, len }) => {
                prop_assert_eq!((kind, offset, len), (1, sector * 512, payload));
            }
            Ok(Request::GetId { room: told }) => prop_assert_eq!(told, room.min(20)),
            Ok(Request::Discard { ranges } | Request::WriteZeroes { ranges }) => {
                prop_assert_eq!(ranges as u64 * 16, payload);
            }
            Ok(Request::Flush) => prop_assert_eq!(kind, 4),
            Err(_) => {}
        }
    }

    #[test]
    fn no_bytes_and_no_shape_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..16),
        readable in any::<u64>(),
        writable in any::<u64>(),
        volume_len in any::<u64>(),
        lens in prop::collection::vec(any::<u32>(), 0..9),
        addr in any::<u64>(),
    ) {
        let terms = Terms { volume_len, ..TERMS };
        prop_assert_eq!(parse(&bytes, &shaped(readable, writable), &terms), Err(Refusal::INVALID));
        let mut full = bytes.clone();
        full.resize(16, 0);
        let _ = parse(&full, &shaped(readable, writable), &terms);
        let list: Vec<Segment> = lens.iter().map(|len| Segment { addr, len: *len }).collect();
        let _ = shape(&list, &list);
    }

    #[test]
    fn a_status_is_the_last_writable_byte(
        readable in prop::collection::vec(1..5000_u32, 0..6),
        writable in prop::collection::vec(1..5000_u32, 0..6),
    ) {
        let (from, to) = (segments(&readable), segments(&writable));
        let bytes: Vec<u64> =
            to.iter().flat_map(|s| s.addr..s.addr + u64::from(s.len)).collect();
        let shape = shape(&from, &to);
        prop_assert_eq!(shape.map(|shape| shape.status_at), bytes.last().copied());
        if let Some(shape) = shape {
            prop_assert_eq!(shape.writable, bytes.len() as u64 - 1);
            prop_assert_eq!(shape.readable, readable.iter().map(|len| u64::from(*len)).sum::<u64>());
        }
    }

    #[test]
    fn any_segment_gets_what_the_standard_says(
        sector in sectors(),
        count in prop_oneof![0..3000_u32, any::<u32>()],
        flags in prop_oneof![Just(0_u32), Just(1), any::<u32>()],
        is_discard in any::<bool>(),
    ) {
        let mut bytes = [0; RANGE_LEN];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        let expected = if flags > 1 || (is_discard && flags == 1) {
            Err(Status::Unsupported)
        } else if u128::from(sector) + u128::from(count) > u128::from(LEN / 512) || count > 131_072 {
            Err(Status::IoError)
        } else {
            Ok((sector * 512, u64::from(count) * 512))
        };
        let found = range(&bytes, is_discard, &TERMS).map_err(|refusal| refusal.status);
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn statuses_have_the_bytes_of_the_standard() {
    let statuses = [Status::Ok, Status::IoError, Status::Unsupported];
    assert_eq!(statuses.map(Status::byte), [0, 1, 2]);
}
