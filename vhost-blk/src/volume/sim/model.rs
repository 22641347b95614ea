//! What a guest may see.

/// Sectors of 512 bytes that the guest writes to.
#[derive(Clone, Debug)]
pub(super) struct Model {
    sectors: Vec<Sector>,
    version: u64,
}

#[derive(Clone, Debug)]
struct Sector {
    /// Versions and the value that each gave the sector, oldest first. Version 0 is the start.
    history: Vec<(u64, u64)>,
    /// The newest version that was acknowledged.
    acked: u64,
    /// The newest version that was acknowledged as durable.
    durable: u64,
    is_busy: bool,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    /// Nothing: everything acknowledged is there, nothing else.
    None,
    /// The card was killed, the guest lives.
    Kill,
    /// The power was cut.
    Power,
}

impl Model {
    pub(super) fn new(sectors: usize) -> Self {
        let fresh = Sector {
            history: vec![(0, 0)],
            acked: 0,
            durable: 0,
            is_busy: false,
        };
        Self {
            sectors: vec![fresh; sectors],
            version: 0,
        }
    }

    /// Whether no write of these sectors is under way: the outcome of two at once is not defined.
    pub(super) fn is_free(&self, first: usize, count: usize) -> bool {
        self.sectors[first..first + count]
            .iter()
            .all(|sector| !sector.is_busy)
    }

    /// A write begins. Returns its version; `zeroes`: the value is 0 whatever the version.
    pub(super) fn begin(&mut self, first: usize, count: usize, zeroes: bool) -> u64 {
        self.version += 1;
        let value = if zeroes { 0 } else { self.version };
        for sector in &mut self.sectors[first..first + count] {
            sector.history.push((self.version, value));
            sector.is_busy = true;
        }
        self.version
    }

    /// A write was acknowledged.
    pub(super) fn ack(&mut self, first: usize, count: usize, version: u64, is_durable: bool) {
        for sector in &mut self.sectors[first..first + count] {
            sector.acked = sector.acked.max(version);
            if is_durable {
                sector.durable = sector.durable.max(version);
            }
            sector.is_busy = false;
        }
    }

    /// A write failed: it happened, or not, or in part.
    pub(super) fn fail(&mut self, first: usize, count: usize) {
        for sector in &mut self.sectors[first..first + count] {
            sector.is_busy = false;
        }
    }

    /// A flush begins: what it will have to cover.
    pub(super) fn begin_flush(&self) -> Vec<u64> {
        self.sectors.iter().map(|sector| sector.acked).collect()
    }

    pub(super) fn ack_flush(&mut self, covered: &[u64]) {
        for (sector, acked) in self.sectors.iter_mut().zip(covered) {
            sector.durable = sector.durable.max(*acked);
        }
    }

    /// Whether a read that was submitted when `floor` was acknowledged may return `value`.
    pub(super) fn may_read(&self, index: usize, floor: u64, value: u64) -> bool {
        self.sectors[index]
            .history
            .iter()
            .any(|(version, v)| *v == value && *version >= floor)
    }

    pub(super) fn acked(&self, index: usize) -> u64 {
        self.sectors[index].acked
    }

    /// Judges what a sector reads as after a crash, and pins it.
    pub(super) fn judge(&mut self, index: usize, value: u64, crash: Crash) -> Result<(), String> {
        let sector = &mut self.sectors[index];
        let floor = match crash {
            Crash::None | Crash::Kill => sector.acked,
            Crash::Power => sector.durable,
        };
        let found = sector
            .history
            .iter()
            .find(|(version, v)| {
                *v == value && *version >= floor && (crash != Crash::None || *version == floor)
            })
            .map(|(version, _)| *version);
        let Some(version) = found else {
            return Err(format!(
                "{crash:?}: sector {index} reads {value}, acknowledged {}, durable {}, history {:?}",
                sector.acked,
                sector.durable,
                sector.history.iter().rev().take(6).collect::<Vec<_>>()
            ));
        };
        sector.history.retain(|(old, _)| *old <= version);
        sector.acked = version;
        sector.durable = match crash {
            Crash::Power => version,
            _ => sector.durable.min(version),
        };
        sector.is_busy = false;
        Ok(())
    }
}
