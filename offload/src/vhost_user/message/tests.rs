use super::*;

const HEAD: fn(FrontendReq, usize) -> Header = |request, body_len| Header {
    request: request.into(),
    needs_reply: false,
    body_len,
};

fn header(request: u32, flags: u32, len: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    for (place, field) in bytes.chunks_mut(4).zip([request, flags, len]) {
        place.copy_from_slice(&field.to_ne_bytes());
    }
    bytes
}

/// A body made of numbers.
struct Bytes(Vec<u8>);

impl Bytes {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
}

fn parse(request: FrontendReq, body: Bytes, fds: usize) -> Result<Request<()>, MessageError> {
    Request::parse(&HEAD(request, body.0.len()), &body.0, vec![(); fds])
}

fn is_length<T>(result: Result<T, MessageError>) -> bool {
    matches!(result, Err(MessageError::Length { .. }))
}

fn is_fds<T>(result: Result<T, MessageError>) -> bool {
    matches!(result, Err(MessageError::Fds { .. }))
}

fn is_field<T>(result: Result<T, MessageError>) -> bool {
    matches!(result, Err(MessageError::Field { .. }))
}

#[test]
fn a_header_says_request_length_and_whether_a_reply_is_wanted() {
    let parsed = Header::parse(&header(8, 0x9, 8)).unwrap();
    assert_eq!(
        parsed,
        Header {
            request: 8,
            needs_reply: true,
            body_len: 8
        }
    );
    assert!(!Header::parse(&header(8, 0x1, 8)).unwrap().needs_reply);
}

#[test]
fn headers_of_other_versions_replies_and_reserved_bits_are_refused() {
    for version in [0, 2, 3] {
        assert_eq!(
            Header::parse(&header(1, version, 0)),
            Err(HeaderError::Version(version))
        );
    }
    assert_eq!(
        Header::parse(&header(1, 0x11, 0)),
        Err(HeaderError::ReservedFlags(0x11))
    );
    assert_eq!(
        Header::parse(&header(1, 0x5, 0)),
        Err(HeaderError::Reply(1))
    );
}

#[test]
fn a_body_may_be_as_long_as_the_limit_and_no_longer() {
    let limit = MAX_BODY_LEN as u32;
    assert!(Header::parse(&header(1, 1, limit)).is_ok());
    for len in [limit + 1, u32::MAX] {
        assert_eq!(
            Header::parse(&header(1, 1, len)),
            Err(HeaderError::TooLong { request: 1, len })
        );
    }
}

#[test]
fn a_reply_carries_request_code_version_and_length() {
    let reply = encode_reply(17, &7u64.to_ne_bytes());
    assert_eq!(reply[..HEADER_LEN], header(17, 0x5, 8));
    assert_eq!(reply[HEADER_LEN..], 7u64.to_ne_bytes());
}

#[test]
fn requests_that_were_never_offered_are_unsupported() {
    // Unknown, SET_LOG_BASE, IOTLB_MSG, RESET_DEVICE, GET_STATUS.
    for request in [0, 6, 22, 34, 40, 45, u32::MAX] {
        let header = Header {
            request,
            needs_reply: false,
            body_len: 0,
        };
        assert_eq!(
            Request::<()>::parse(&header, &[], Vec::new()),
            Err(MessageError::Unsupported(request))
        );
    }
}

#[test]
fn requests_without_body_take_neither_body_nor_descriptors() {
    use FrontendReq as R;
    for request in [
        R::GET_FEATURES,
        R::SET_OWNER,
        R::RESET_OWNER,
        R::GET_PROTOCOL_FEATURES,
        R::GET_QUEUE_NUM,
        R::GET_MAX_MEM_SLOTS,
    ] {
        assert!(parse(request, Bytes::new(), 0).is_ok());
        assert!(is_length(parse(request, Bytes::new().u64(0), 0)));
        assert!(is_fds(parse(request, Bytes::new(), 1)));
    }
}

#[test]
fn single_numbers_have_exactly_eight_bytes() {
    for request in [
        FrontendReq::SET_FEATURES,
        FrontendReq::SET_PROTOCOL_FEATURES,
        FrontendReq::NET_SET_MTU,
    ] {
        assert!(parse(request, Bytes::new().u64(u64::MAX), 0).is_ok());
        assert!(is_length(parse(request, Bytes::new().u32(0), 0)));
        assert!(is_length(parse(request, Bytes::new().u64(0).u32(0), 0)));
        assert!(is_fds(parse(request, Bytes::new().u64(0), 1)));
    }
}

#[test]
fn ring_sizes_are_powers_of_two_that_fit_16_bits() {
    let num = |num| parse(FrontendReq::SET_VRING_NUM, Bytes::new().u32(3).u32(num), 0);
    assert_eq!(
        num(256),
        Ok(Request::SetVringNum {
            queue: 3,
            size: 256
        })
    );
    for bad in [0, 3, 1 << 16, u32::MAX] {
        assert!(is_field(num(bad)), "{bad}");
    }
}

#[test]
fn queue_indices_and_bases_that_do_not_fit_16_bits_are_refused() {
    let base = |queue, base| {
        let body = Bytes::new().u32(queue).u32(base);
        parse(FrontendReq::SET_VRING_BASE, body, 0)
    };
    assert_eq!(
        base(1, 0xffff),
        Ok(Request::SetVringBase {
            queue: 1,
            base: 0xffff
        })
    );
    assert!(is_field(base(1, 0x1_0000)));
    assert!(is_field(base(0x1_0001, 0)));
}

#[test]
fn enable_is_yes_or_no() {
    let enable = |num| {
        parse(
            FrontendReq::SET_VRING_ENABLE,
            Bytes::new().u32(0).u32(num),
            0,
        )
    };
    assert!(enable(0).is_ok() && enable(1).is_ok());
    assert!(is_field(enable(2)));
}

#[test]
fn ring_addresses_are_aligned_as_virtio_wants_and_in_the_order_of_the_specification() {
    let addr = |flags, desc, used, avail| {
        let body = Bytes::new().u32(2).u32(flags);
        let body = body.u64(desc).u64(used).u64(avail).u64(0);
        parse(FrontendReq::SET_VRING_ADDR, body, 0)
    };
    assert_eq!(
        addr(0, 0x10, 0x24, 0x32),
        Ok(Request::SetVringAddr {
            queue: 2,
            ring: UserRing {
                desc_table: 0x10,
                avail_ring: 0x32,
                used_ring: 0x24
            }
        })
    );
    assert!(is_field(addr(0, 0x18, 0x24, 0x32)));
    assert!(is_field(addr(0, 0x10, 0x22, 0x32)));
    assert!(is_field(addr(0, 0x10, 0x24, 0x31)));
    // Logging of the used ring, not offered.
    assert!(is_field(addr(1, 0x10, 0x24, 0x32)));
}

#[test]
fn bit_8_of_a_ring_descriptor_message_stands_for_no_descriptor() {
    let kick = |word, fds| parse(FrontendReq::SET_VRING_KICK, Bytes::new().u64(word), fds);
    assert_eq!(
        kick(5, 1),
        Ok(Request::SetVringKick {
            queue: 5,
            fd: Some(())
        })
    );
    assert_eq!(
        kick(0x105, 0),
        Ok(Request::SetVringKick { queue: 5, fd: None })
    );
    assert!(is_fds(kick(5, 0)));
    assert!(is_fds(kick(5, 2)));
    assert!(is_fds(kick(0x105, 1)));
    assert!(is_field(kick(0x205, 1)));
}

#[test]
fn a_memory_table_has_as_many_descriptors_as_regions_and_as_many_regions_as_it_says() {
    let table = |count: u32, regions: u64, fds| {
        let mut body = Bytes::new().u32(count).u32(0);
        for n in 0..regions {
            body = body.u64(n << 20).u64(1 << 20).u64(n << 30).u64(n << 20);
        }
        parse(FrontendReq::SET_MEM_TABLE, body, fds)
    };
    let Ok(Request::SetMemTable(regions)) = table(2, 2, 2) else {
        panic!("refused");
    };
    assert_eq!(
        regions[1].0,
        RegionInfo {
            guest_phys_addr: 1 << 20,
            size: 1 << 20,
            userspace_addr: 1 << 30,
            mmap_offset: 1 << 20
        }
    );
    assert!(is_fds(table(2, 2, 1)));
    assert!(is_fds(table(2, 2, 3)));
    assert!(is_fds(table(u32::MAX, 2, 2)));
    assert!(is_length(table(2, 1, 2)));
    assert!(is_length(table(2, 3, 2)));
    assert!(is_fds(table(33, 33, 33)));
}

#[test]
fn a_region_is_added_with_one_descriptor_and_removed_with_one_or_none() {
    let body = || Bytes::new().u64(0).u64(0).u64(4096).u64(0).u64(0);
    assert!(parse(FrontendReq::ADD_MEM_REG, body(), 1).is_ok());
    assert!(is_fds(parse(FrontendReq::ADD_MEM_REG, body(), 0)));
    assert!(is_fds(parse(FrontendReq::ADD_MEM_REG, body(), 2)));
    assert!(is_length(parse(FrontendReq::ADD_MEM_REG, body().u64(0), 1)));
    for fds in [0, 1] {
        assert!(parse(FrontendReq::REM_MEM_REG, body(), fds).is_ok());
    }
    assert!(is_fds(parse(FrontendReq::REM_MEM_REG, body(), 2)));
}

#[test]
fn configuration_accesses_stay_within_256_bytes_and_bring_what_they_announce() {
    let config = |request, offset, len, flags, data: usize| {
        let mut body = Bytes::new().u32(offset).u32(len).u32(flags);
        body.0.resize(12 + data, 0xaa);
        parse(request, body, 0)
    };
    for request in [FrontendReq::GET_CONFIG, FrontendReq::SET_CONFIG] {
        assert!(config(request, 0, 256, 0, 256).is_ok());
        assert!(config(request, 255, 1, 1, 1).is_ok());
        assert!(is_field(config(request, 255, 2, 0, 2)));
        assert!(is_field(config(request, 0, 0, 0, 0)));
        assert!(is_field(config(request, u32::MAX, 2, 0, 2)));
        assert!(is_field(config(request, 0, 257, 0, 257)));
        assert!(is_field(config(request, 0, 1, 2, 1)));
        assert!(is_length(config(request, 0, 8, 0, 7)));
        assert!(is_length(config(request, 0, 8, 0, 9)));
        assert!(is_length(parse(request, Bytes::new().u64(0), 0)));
    }
}

#[test]
fn inflight_descriptions_come_with_and_without_the_padding_of_c() {
    let body = || Bytes::new().u64(4096).u64(0).u16(2).u16(128);
    for (body, body_len) in [(body(), 20), (body().u32(0), 24)] {
        assert_eq!(
            parse(FrontendReq::GET_INFLIGHT_FD, body, 0),
            Ok(Request::GetInflightFd {
                num_queues: 2,
                queue_size: 128,
                body_len
            })
        );
    }
    assert!(is_length(parse(
        FrontendReq::GET_INFLIGHT_FD,
        body().u16(0),
        0
    )));
    assert!(is_fds(parse(FrontendReq::GET_INFLIGHT_FD, body(), 1)));
    assert!(parse(FrontendReq::SET_INFLIGHT_FD, body(), 1).is_ok());
    assert!(is_fds(parse(FrontendReq::SET_INFLIGHT_FD, body(), 0)));
    let with = |size, offset, queues, queue_size| {
        let body = Bytes::new().u64(size).u64(offset);
        parse(
            FrontendReq::SET_INFLIGHT_FD,
            body.u16(queues).u16(queue_size),
            1,
        )
    };
    assert!(is_field(with(0, 0, 2, 128)));
    assert!(is_field(with(2, u64::MAX, 2, 128)));
    assert!(is_field(with(4096, 0, 0, 128)));
    assert!(is_field(with(4096, 0, 2, 0)));
    assert!(is_field(with(4096, 0, 2, 100)));
}

#[test]
fn the_backend_channel_is_exactly_one_descriptor() {
    let channel = |fds| parse(FrontendReq::SET_BACKEND_REQ_FD, Bytes::new(), fds);
    assert_eq!(channel(1), Ok(Request::SetBackendReqFd(())));
    assert!(is_fds(channel(0)));
    assert!(is_fds(channel(2)));
}
