//! Growing a volume while it is in use.
//!
//! 1. The backing is made long enough, durably: a file is lengthened (it stays thin), a device has
//!    to have the room.
//! 2. The next checkpoint's superblock says the new size.
//! 3. Once that is durable the allocator gets the new chunks, requests behind the old end are taken,
//!    and the caller may announce the size.
//!
//! So a crash at any instant leaves the old size or the new one. The other way around, a header that
//! says more than the backing has, is what a truncated volume looks like, and is refused.
//!
//! The map has its full height always and the log stays as it is, so growing moves nothing and costs
//! one checkpoint. The memory for the map grows to what a volume of the new size gets by default, or, if it
//! was given, to the least that the new size can be served with.

use std::io;
use std::sync::atomic::Ordering;

use thiserror::Error;

use super::core::{Core, Phase};
use super::volume::{Volume, drive};
use crate::volume::geometry::{Geometry, GeometryError};
use crate::volume::mutant::{self, Mutant};

/// Why a volume does not grow.
#[derive(Debug, Error)]
pub enum GrowError {
    /// The size is impossible, smaller than it was, or more than the device has room for.
    #[error(transparent)]
    Size(#[from] GeometryError),
    /// The file system, or the disk, said no.
    #[error("the backing cannot be made longer: {0}; the volume has the size it had")]
    Extend(io::Error),
    /// No guest is connected, or none has ever been.
    #[error(
        "the volume is not active: no guest has connected yet. Resize it when the guest runs, or stop the \
         card and give --volume"
    )]
    NotActive,
    /// It was poisoned before, or while it grew.
    #[error(
        "the volume has failed and takes no more writes; look after its backing, then restart the card"
    )]
    Failed,
    /// Two at a time.
    #[error("the volume is being resized already; try again when that is done")]
    Busy,
}

impl Core {
    /// A superblock with these sizes is durable.
    pub(super) fn take_size(&mut self, geometry: Geometry) {
        if self.grow_to == Some(geometry) {
            self.grow_to = None;
        }
        if self.geometry != geometry {
            self.geometry = geometry;
            self.space.grow(geometry);
            self.map.allow((self.cache_for)(geometry.blocks));
            let len = geometry.volume_len();
            self.volume_len.store(len, Ordering::Relaxed);
        }
    }
}

impl Volume {
    /// Makes the volume `len` bytes long: when this returns, the size is durable and requests may use
    /// it. Blocking for one checkpoint; other lanes go on meanwhile. A volume that is that long already
    /// is left alone.
    ///
    /// # Errors
    /// See [`GrowError`]. Unless it is [`GrowError::Failed`], the volume goes on as it was.
    pub fn grow(&self, len: u64) -> Result<(), GrowError> {
        let mut lane = self.own();
        self.begin_grow(len)?;
        loop {
            lane.on_wake();
            drive(&mut lane, &*self.backing);
            if self.has_grown()? {
                return Ok(());
            }
            self.bell.wait();
        }
    }

    /// The largest size that the volume can have in its backing as that is now.
    ///
    /// # Errors
    /// The backing does not say how long it is.
    pub fn largest_len(&self) -> Result<u64, GrowError> {
        let have = self.backing.extend(0).map_err(GrowError::Extend)?;
        let geometry = self.shared.lock().geometry;
        Ok(geometry.largest_grown_in(have))
    }

    /// Steps 1 and 2: lengthens the backing and asks for the checkpoint, which any lane makes.
    pub(crate) fn begin_grow(&self, len: u64) -> Result<(), GrowError> {
        let wanted = {
            let core = self.shared.lock();
            if core.is_poisoned {
                return Err(GrowError::Failed);
            }
            let wanted = core.geometry.grown(len)?;
            if wanted.blocks == core.geometry.blocks {
                return Ok(());
            }
            if core.phase != Phase::Serving {
                return Err(GrowError::NotActive);
            }
            if core.grow_to.is_some() {
                return Err(GrowError::Busy);
            }
            wanted
        };
        if !mutant::is(Mutant::GrowBeforeBacking) {
            // Not under the lock: the guest goes on while a journal is written.
            let need = wanted.backing_len();
            let have = self.backing.extend(need).map_err(GrowError::Extend)?;
            if have < need {
                let volume = wanted.volume_len();
                return Err(GeometryError::BackingTooSmall { have, volume, need }.into());
            }
            if let Err(error) = self.backing.sync() {
                // As for any barrier: what was written before may be lost, and no second try tells.
                self.shared.lock().poison();
                self.shared.reporter().poisoned("growing");
                tracing::error!(%error, "the barrier behind the longer backing failed");
                return Err(GrowError::Failed);
            }
        }
        let mut core = self.shared.lock();
        core.grow_to = Some(wanted);
        core.wants_checkpoint = true;
        Ok(())
    }

    /// Step 3: whether nothing is left of what [`Volume::begin_grow`] began.
    pub(crate) fn has_grown(&self) -> Result<bool, GrowError> {
        let mut core = self.shared.lock();
        if core.is_poisoned {
            core.grow_to = None;
            return Err(GrowError::Failed);
        }
        let has_grown = core.grow_to.is_none() && !core.is_mirroring;
        if has_grown && mutant::is(Mutant::GrowBeforeBacking) {
            let need = core.geometry.backing_len();
            self.backing.extend(need).map_err(GrowError::Extend)?;
        }
        Ok(has_grown)
    }
}
