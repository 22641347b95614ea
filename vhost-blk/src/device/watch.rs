//! A thin volume takes room as it is written, and somebody has to hear of it before there is none.
//!
//! Once in a while, and off the data path, a thread looks at the file system that the volume's file is
//! on, and at the volume's own slots. When one passes its mark there is one log line and one event on
//! the control socket; the next only after the room was ample again, by some margin, so that a disk
//! that hovers around the mark does not flood anybody.
//!
//! How long until the next look follows from how far the mark is: no closer than what the fastest disk
//! could write meanwhile. A volume on a block device has no file system to watch: all of it is its own.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use offload::cli::format_size;
use offload::control::EventSender;
use offload::stop::StopSignal;
use offload::telemetry::Registry;
use serde_json::json;

use crate::volume::backing::{FileBacking, Room};
use crate::volume::engine::Shared;

/// Bytes a second that a guest can write at most, for deciding when to look again.
const FASTEST: u64 = 1 << 30;
const LOOK_SOONEST: Duration = Duration::from_millis(200);
const LOOK_LATEST: Duration = Duration::from_secs(10);
/// Percent below the mark at which the room is ample again.
const MARGIN: u64 = 3;
/// Percent of the slots in use at which they are short. A volume that is written all over has 3 % and
/// more left: less means that space is not given back as it should be.
const SLOTS_PERCENT: u8 = 99;

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Low,
    Ample,
}

/// Notices when room passes a mark.
#[derive(Debug)]
struct Mark {
    percent: u8,
    is_low: bool,
}

impl Mark {
    const fn at(percent: u8) -> Self {
        Self {
            percent,
            is_low: false,
        }
    }

    fn look(&mut self, room: Room) -> Option<Change> {
        let used = room.percent_used();
        let mark = u64::from(self.percent);
        if !self.is_low && used >= mark {
            self.is_low = true;
            Some(Change::Low)
        } else if self.is_low && used + MARGIN < mark {
            self.is_low = false;
            Some(Change::Ample)
        } else {
            None
        }
    }

    /// Bytes until the mark.
    fn distance(&self, room: Room) -> u64 {
        let left_at_mark = room.total / 100 * u64::from(100 - self.percent.min(100));
        room.free.saturating_sub(left_at_mark)
    }

    fn next_look(&self, room: Room) -> Duration {
        if self.is_low {
            return LOOK_LATEST / 5;
        }
        let millis = self.distance(room) / (FASTEST / 1000);
        Duration::from_millis(millis).clamp(LOOK_SOONEST, LOOK_LATEST)
    }
}

/// Watches the room of one volume until it is dropped.
#[derive(Debug)]
pub struct SpaceWatch {
    stop: StopSignal,
    thread: Option<JoinHandle<()>>,
}

impl SpaceWatch {
    /// Shows the room that is left as metrics.
    pub fn register(registry: &Registry, volume: &Arc<Shared>, backing: &Arc<FileBacking>) {
        let backing = Arc::clone(backing);
        registry.gauge(
            "backing_free_bytes",
            "Bytes that the file system of the volume's file has left; the whole device for a device",
            vec![],
            move || backing.room().map_or(0, |room| room.free),
        );
        let volume = Arc::clone(volume);
        registry.gauge(
            "slots_free_bytes",
            "Bytes of the volume's own slots that are free",
            vec![],
            move || volume.slots().free,
        );
    }

    /// Begins to watch. `percent` of the file system in use is the mark.
    ///
    /// # Errors
    /// No thread or no descriptor is to be had.
    pub fn start(
        volume: Arc<Shared>,
        backing: Arc<FileBacking>,
        percent: u8,
        events: Option<EventSender>,
    ) -> io::Result<Self> {
        let stop = StopSignal::new()?;
        let mut look = Look {
            volume,
            backing,
            events,
            file_system: Mark::at(percent),
            slots: Mark::at(SLOTS_PERCENT),
        };
        let signal = stop.clone();
        let thread = std::thread::Builder::new()
            .name("space".to_owned())
            .spawn(move || while !signal.wait(Some(look.once())) {})?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for SpaceWatch {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by its own thread.
            let _ = thread.join();
        }
    }
}

struct Look {
    volume: Arc<Shared>,
    backing: Arc<FileBacking>,
    events: Option<EventSender>,
    file_system: Mark,
    slots: Mark,
}

impl Look {
    /// Looks; how long until the next look.
    fn once(&mut self) -> Duration {
        let slots = self.volume.slots();
        if let Some(change) = self.slots.look(slots) {
            self.tell("slots", change, slots);
        }
        let next = self.slots.next_look(slots);
        if self.backing.is_device() {
            return next;
        }
        // A file system that does not answer is noticed by the data path.
        let Ok(room) = self.backing.room() else {
            return LOOK_LATEST;
        };
        if let Some(change) = self.file_system.look(room) {
            self.tell("backing", change, room);
        }
        next.min(self.file_system.next_look(room))
    }

    fn tell(&self, of: &'static str, change: Change, room: Room) {
        let (free, used) = (format_size(room.free), room.percent_used());
        let kind = match (change, of) {
            (Change::Low, "backing") => {
                tracing::warn!(
                    "the file system of the volume's file is {used} % full, {free} are left: when it is full, \
                     the guest gets I/O errors for new blocks. Make room, or trim the guest's file systems"
                );
                "low_space"
            }
            (Change::Low, _) => {
                tracing::warn!("{used} % of the volume's slots are in use, {free} are left");
                "low_space"
            }
            (Change::Ample, _) => {
                tracing::info!(
                    "there is room for the volume again: {free}, {used} % in use ({of})"
                );
                "ample_space"
            }
        };
        if let Some(events) = &self.events {
            let fields = json!({
                "of": of,
                "free_bytes": room.free,
                "total_bytes": room.total,
                "percent_used": used,
            });
            events.send(kind, fields);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(free: u64) -> Room {
        Room { free, total: 1000 }
    }

    #[test]
    fn a_mark_is_told_once_until_there_is_ample_room_again() {
        let mut mark = Mark::at(90);
        assert_eq!(mark.look(room(1000)), None);
        assert_eq!(mark.look(room(101)), None);
        assert_eq!(mark.look(room(100)), Some(Change::Low));
        // Hovering around it.
        for free in [99, 0, 101, 100, 120, 90, 130] {
            assert_eq!(mark.look(room(free)), None, "{free}");
        }
        assert_eq!(mark.look(room(141)), Some(Change::Ample));
        assert_eq!(mark.look(room(141)), None);
        assert_eq!(mark.look(room(1)), Some(Change::Low));
    }

    #[test]
    fn a_file_system_without_any_bytes_is_full_and_nothing_overflows() {
        let nothing = Room { free: 0, total: 0 };
        assert_eq!(nothing.percent_used(), 100);
        let huge = Room {
            free: u64::MAX,
            total: u64::MAX,
        };
        assert_eq!(huge.percent_used(), 0);
        assert_eq!(Mark::at(1).look(huge), None);
        assert_eq!(Mark::at(100).look(nothing), Some(Change::Low));
    }

    #[test]
    fn the_nearer_the_mark_the_sooner_the_next_look() {
        let look = |free, total| Mark::at(90).next_look(Room { free, total });
        assert_eq!(look(1 << 40, 1 << 40), LOOK_LATEST);
        assert_eq!(look(12 << 30, 100 << 30).as_secs(), 2);
        assert_eq!(look(10 << 30, 100 << 30), LOOK_SOONEST);
        assert_eq!(look(0, 100 << 30), LOOK_SOONEST);
    }
}
