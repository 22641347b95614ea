//! The end of a round: look for more, or sleep.

use std::io;
use std::time::{Duration, Instant};

use super::{Parts, Rounds};
use crate::device::QueueHandler;
use crate::virtqueue::Virtqueue;
use crate::worker::patience::Wait;
use crate::worker::ring::Ring;

/// For how long a look for more may put them off. Before sleeping, everything is told.
const TELL_AFTER: Duration = Duration::from_micros(8);
/// How often a ring without kick eventfd is looked at.
const NO_KICK_INTERVAL: Duration = Duration::from_millis(1);

impl<H: QueueHandler> Rounds<H> {
    /// Submits, and sleeps if there is nothing to do.
    pub(super) fn rest(&mut self, mut has_more: bool) -> io::Result<()> {
        has_more |= self.parts.handler.has_more() || self.parts.engine.uring.has_news();
        if !has_more && self.look()? {
            return self.parts.engine.uring.submit();
        }
        let Parts { engine, handler } = &mut *self.parts;
        let mut looks_soon = false;
        if !engine.is_exiting && !has_more {
            for ring in &mut engine.rings {
                if !ring.is_popping() {
                    continue;
                }
                looks_soon |= !ring.kick.is_armed;
                if ring.is_pulled && !ring.is_starved {
                    continue;
                }
                let enable = if ring.is_pulled {
                    Virtqueue::enable_kicks_for_more
                } else {
                    Virtqueue::enable_kicks
                };
                let has_new = ring.queue.as_mut().is_some_and(enable);
                if has_new {
                    ring.is_starved = false;
                }
                has_more |= has_new;
            }
        }
        if has_more {
            return engine.uring.submit();
        }
        let mut timeout = handler
            .deadline()
            .map(|at| at.saturating_duration_since(Instant::now()));
        if looks_soon {
            let interval = timeout.map_or(NO_KICK_INTERVAL, |t| t.min(NO_KICK_INTERVAL));
            timeout = Some(interval);
        }
        engine.uring.wait(timeout)
    }

    /// Before sleeping: looks for a while if events have been coming quickly. Whether there is
    /// something to do.
    fn look(&mut self) -> io::Result<bool> {
        let Parts { engine, .. } = &mut *self.parts;
        let wait = match engine.pending {
            0 => Wait::Guest,
            _ => Wait::Kernel,
        };
        let Some(until) = self.patience.begin(wait, Instant::now) else {
            engine.tell();
            return Ok(false);
        };
        engine.uring.submit()?;
        let tell_at = (until + TELL_AFTER).checked_sub(self.patience.limit());
        let mut tells = engine.rings.iter().any(|ring| ring.untold > 0);
        loop {
            // A doorbell, too, is a completion.
            let has_chain = |ring: &mut Ring| {
                ring.is_popping()
                    && !ring.is_pulled
                    && ring.queue.as_mut().is_some_and(Virtqueue::has_next)
            };
            if engine.uring.has_news()
                || !engine.is_exiting && engine.rings.iter_mut().any(has_chain)
            {
                return Ok(true);
            }
            let now = Instant::now();
            if tells && (now >= until || tell_at.is_none_or(|at| now >= at)) {
                engine.tell();
                tells = false;
            }
            if now >= until {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }
}
