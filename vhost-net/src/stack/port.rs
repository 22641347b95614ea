//! smoltcp's device: one packet in, packets out to the wire.
//!
//! The medium is IP, not Ethernet: smoltcp then knows nothing of neighbours, routes and their small
//! tables, and the card, which knows both ends of its wire, writes the 14 bytes itself.

use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;
use vm_memory::VolatileSlice;

use super::Wire;
use super::emit::{self, Ends};
use super::hollow::Hollow;
use super::kept::Source;
use crate::frame::{ETHERNET_LEN, FRAME_MAX};

/// Largest super-segment: what an IPv4 header can say.
const SEGMENT_MAX: usize = 65535;

/// What the driver accepted, as far as it changes what it is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Partial checksums (GUEST_CSUM).
    pub partial: bool,
    /// TCP super-segments over IPv4 (GUEST_TSO4).
    pub tso4: bool,
}

/// Capabilities as smoltcp wants them. They are read once, when the interface is made.
pub(super) fn capabilities(mtu: u16, accepts: Accepts) -> DeviceCapabilities {
    let mut caps = DeviceCapabilities::default();
    caps.medium = Medium::Ip;
    caps.max_transmission_unit = usize::from(mtu);
    // Received sums were checked with the frame. A sum that is left to the driver is written by
    // `emit::finish`.
    caps.checksum.tcp = if accepts.partial {
        Checksum::None
    } else {
        Checksum::Tx
    };
    // smoltcp drops IPv6 packets above the MTU whatever their metadata say, so not for IPv6.
    caps.segmentation.tcpv4 = (accepts.partial && accepts.tso4)
        .then(|| SEGMENT_MAX.try_into().ok())
        .flatten();
    caps
}

/// A frame's worth of memory, used again and again.
pub(super) struct Scratch {
    bytes: Box<[u8]>,
    /// For frames of which only the headers are wanted.
    hollow: Option<Hollow>,
}

/// Longer than any headers, and no longer than a page of a [`Hollow`].
const HEADERS_MAX: usize = 4096;

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; FRAME_MAX].into_boxed_slice(),
            hollow: Hollow::new(FRAME_MAX),
        }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Memory for a frame of which what is behind its first [`HEADERS_MAX`] bytes is not wanted.
    fn headers(&mut self) -> &mut [u8] {
        match &mut self.hollow {
            Some(hollow) => hollow.bytes(),
            None => &mut self.bytes,
        }
    }
}

/// The device for one poll.
pub(super) struct Port<'a, W> {
    pub(super) ingress: Option<&'a [u8]>,
    /// Where payload is that is not in smoltcp's ring.
    pub(super) source: Option<&'a mut dyn Source>,
    pub(super) wire: &'a mut W,
    pub(super) scratch: &'a mut Scratch,
    pub(super) ends: Ends,
    pub(super) caps: &'a DeviceCapabilities,
    pub(super) accepts: Accepts,
}

/// See [`phy::RxToken`].
pub(super) struct Rx<'a>(&'a [u8]);

impl phy::RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// See [`phy::TxToken`].
pub(super) struct Tx<'a, W> {
    source: Option<&'a mut dyn Source>,
    wire: &'a mut W,
    scratch: &'a mut Scratch,
    ends: Ends,
    accepts: Accepts,
    segment: Option<u16>,
}

impl<W: Wire> phy::TxToken for Tx<'_, W> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // A flow's frame that is so long is a segment with payload.
        let is_hollow =
            len > HEADERS_MAX && self.source.as_ref().is_some_and(|it| it.has_payload());
        let buffer = if is_hollow {
            self.scratch.headers()
        } else {
            self.scratch.bytes()
        };
        let end = (ETHERNET_LEN + len).min(buffer.len());
        let frame = &mut buffer[..end];
        let result = f(&mut frame[ETHERNET_LEN..]);
        let header = emit::finish(frame, self.ends, self.accepts.partial, self.segment);
        let Some(source) = self.source else {
            self.wire.send(header, frame);
            return result;
        };
        let segment = emit::tcp_segment(frame);
        if let Some(segment) = &segment
            && segment.is_syn
        {
            source.begins(segment.sequence.wrapping_add(1));
        }
        match segment.and_then(|it| Some((it.sequence, frame.split_at_checked(it.payload_at)?))) {
            Some((sequence, (head, payload))) if source.has_payload() && !payload.is_empty() => {
                let mut read = |into: &[VolatileSlice<'_>]| source.read(sequence, into);
                self.wire.send_from(header, head, payload.len(), &mut read);
            }
            _ => self.wire.send(header, frame),
        }
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(Into::into);
    }
}

impl<W: Wire> phy::Device for Port<'_, W> {
    type RxToken<'b>
        = Rx<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Tx<'b, W>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_, W>)> {
        let packet = self.ingress.take()?;
        // The answer to a segment (a reset, a challenge) is small and there is at most one for
        // each: the wire finds room for it.
        Some((Rx(packet), self.token()))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_, W>> {
        // Nothing is ever dropped on the way to the guest: its loss would cost a second.
        self.wire.has_room().then(|| self.token())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.caps.clone()
    }
}

impl<W: Wire> Port<'_, W> {
    fn token(&mut self) -> Tx<'_, W> {
        Tx {
            source: match &mut self.source {
                Some(source) => Some(&mut **source),
                None => None,
            },
            wire: self.wire,
            scratch: self.scratch,
            ends: self.ends,
            accepts: self.accepts,
            segment: None,
        }
    }
}
