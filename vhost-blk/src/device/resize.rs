//! Growing the volume under a running guest, asked for over the control socket.
//!
//! Growing writes a checkpoint, which may take as long as the disk likes, and a control method must be
//! quick: so a thread of its own does it. The method waits a little for the usual case and else says
//! that it runs; asking without parameters tells how it ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offload::control::{ControlError, ControlErrorKind, EventSender};
use offload::vhost_user::{ConfigChangeNotifier, Notified};
use serde_json::{Value, json};
use thiserror::Error;

use super::BlockDevice;
use crate::volume::engine::GrowError;

/// How long the method waits for the thread.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Why a volume that is served does not grow.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// The card takes no writes.
    #[error("the volume is served read-only; resize it through a card that may write")]
    ReadOnly,
    /// The engine says no.
    #[error(transparent)]
    Grow(#[from] GrowError),
}

/// Those who tell guests that the configuration has changed.
#[derive(Debug, Default)]
pub(super) struct Announcers(Mutex<Vec<ConfigChangeNotifier>>);

impl BlockDevice {
    /// From now on, new sizes are announced over `notifier` too.
    pub fn announce_over(&self, notifier: ConfigChangeNotifier) {
        let list = &self.announcers.0;
        list.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(notifier);
    }

    /// Grows the volume to `len` bytes, or to what the backing has room for, and tells the guests.
    /// Blocking. Returns the size that it has then.
    ///
    /// # Errors
    /// See [`ResizeError`].
    pub fn resize(&self, len: Option<u64>) -> Result<u64, ResizeError> {
        if self.state.settings.is_read_only {
            return Err(ResizeError::ReadOnly);
        }
        let volume = self.volume();
        let before = volume.shared().volume_len();
        let len = match len {
            Some(len) => len,
            None => volume.largest_len()?,
        };
        volume.grow(len)?;
        let after = volume.shared().volume_len();
        let told = self.announce();
        if after != before {
            tracing::info!(before, after, told, "the volume has grown");
        }
        Ok(after)
    }

    /// Tells all guests; how many there were.
    fn announce(&self) -> usize {
        let list = &self.announcers.0;
        let list = list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter()
            .filter(|notifier| notifier.notify() != Notified::NobodyListens)
            .count()
    }
}

#[derive(Debug, Default)]
enum Progress {
    #[default]
    Idle,
    Running,
    Done {
        before: u64,
        after: u64,
    },
    Failed(String),
}

/// The control method `resize`.
pub struct ResizeMethod {
    device: Arc<BlockDevice>,
    events: EventSender,
    progress: Arc<(Mutex<Progress>, Condvar)>,
}

impl ResizeMethod {
    /// For this device; those who subscribed to `events` hear of new sizes.
    pub fn new(device: Arc<BlockDevice>, events: EventSender) -> Self {
        Self {
            device,
            events,
            progress: Arc::default(),
        }
    }

    /// `{"size": bytes}` or `{"size": "max"}` (all that a device has) begins; no parameters ask.
    ///
    /// # Errors
    /// The parameters are wrong, or another resize runs.
    pub fn call(&self, params: &Value) -> Result<Value, ControlError> {
        if !params.is_null() {
            self.begin(wanted(params)?)?;
        }
        let (lock, bell) = &*self.progress;
        let progress = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let (progress, _) = bell
            .wait_timeout_while(progress, PATIENCE, |now| matches!(now, Progress::Running))
            .unwrap_or_else(PoisonError::into_inner);
        Ok(self.report(&progress))
    }

    fn report(&self, progress: &Progress) -> Value {
        let now = self.device.volume().shared().volume_len();
        match progress {
            Progress::Idle => json!({ "state": "idle", "size_bytes": now }),
            Progress::Running => json!({ "state": "running", "size_bytes": now }),
            Progress::Done { before, after } => {
                json!({ "state": "done", "before_bytes": before, "size_bytes": after })
            }
            Progress::Failed(error) => {
                json!({ "state": "failed", "size_bytes": now, "error": error })
            }
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, len: Option<u64>) -> Result<(), ControlError> {
        let mut now = self.progress();
        if matches!(*now, Progress::Running) {
            let text = GrowError::Busy.to_string();
            return Err(ControlError::new(ControlErrorKind::Busy, text));
        }
        let device = Arc::clone(&self.device);
        let progress = Arc::clone(&self.progress);
        let events = self.events.clone();
        let work = move || {
            let before = device.volume().shared().volume_len();
            let outcome = match device.resize(len) {
                Ok(after) => {
                    events.send(
                        "resized",
                        json!({ "before_bytes": before, "size_bytes": after }),
                    );
                    Progress::Done { before, after }
                }
                Err(error) => {
                    tracing::warn!("the volume does not grow: {error}");
                    Progress::Failed(error.to_string())
                }
            };
            *progress.0.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
            progress.1.notify_all();
        };
        let spawned = std::thread::Builder::new()
            .name("resize".to_owned())
            .spawn(work);
        if let Err(error) = spawned {
            let text = format!("no thread is to be had: {error}");
            return Err(ControlError::new(ControlErrorKind::Failed, text));
        }
        // The thread cannot end before this: it waits for the lock.
        *now = Progress::Running;
        Ok(())
    }
}

/// The size asked for; `None`: all that there is.
fn wanted(params: &Value) -> Result<Option<u64>, ControlError> {
    let wrong = || {
        ControlError::new(
            ControlErrorKind::BadParams,
            "give {\"size\": BYTES}, or {\"size\": \"max\"} for all that the device has",
        )
    };
    let fields = params.as_object().filter(|fields| fields.len() == 1);
    let size = fields.and_then(|fields| fields.get("size"));
    match size.ok_or_else(wrong)? {
        Value::String(text) if text == "max" => Ok(None),
        size => size.as_u64().map(Some).ok_or_else(wrong),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_bytes_or_max_and_nothing_else() {
        assert_eq!(wanted(&json!({ "size": 4096 })), Ok(Some(4096)));
        assert_eq!(wanted(&json!({ "size": "max" })), Ok(None));
        for wrong in [
            json!({}),
            json!([]),
            json!(4096),
            json!({ "size": -1 }),
            json!({ "size": 1.5 }),
            json!({ "size": 1e30 }),
            json!({ "size": "20G" }),
            json!({ "size": null }),
            json!({ "size": 4096, "force": true }),
        ] {
            assert!(wanted(&wrong).is_err(), "{wrong}");
        }
    }
}
