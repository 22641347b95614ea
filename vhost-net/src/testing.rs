//! A guest's side for tests: where a TCP/IP stack of smoltcp's own meets the card.
//!
//! Tests in `tests/` include this file by its path.

use std::collections::VecDeque;

use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// The guest's network card: packets in and out.
#[derive(Debug, Default)]
pub struct Nic {
    /// To the guest.
    pub rx: VecDeque<Vec<u8>>,
    /// From it.
    pub tx: Vec<Vec<u8>>,
    /// Who makes and checks sums.
    pub checksum: ChecksumCapabilities,
}

/// A packet to the guest.
#[derive(Debug)]
pub struct NicRx(Vec<u8>);
/// Where one from it goes.
#[derive(Debug)]
pub struct NicTx<'a>(&'a mut Vec<Vec<u8>>);

impl phy::RxToken for NicRx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for NicTx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl phy::Device for Nic {
    type RxToken<'a> = NicRx;
    type TxToken<'a> = NicTx<'a>;
    fn receive(&mut self, _: Instant) -> Option<(NicRx, NicTx<'_>)> {
        Some((NicRx(self.rx.pop_front()?), NicTx(&mut self.tx)))
    }
    fn transmit(&mut self, _: Instant) -> Option<NicTx<'_>> {
        Some(NicTx(&mut self.tx))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = 9001;
        caps.checksum = self.checksum.clone();
        caps
    }
}
