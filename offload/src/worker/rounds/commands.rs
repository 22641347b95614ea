//! What the control plane asks of a queue's thread.

use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

use super::Rounds;
use crate::device::QueueHandler;
use crate::virtqueue::Virtqueue;
use crate::worker::ring::Call;
use crate::worker::{Command, RingConfig, WorkerError};

impl<H: QueueHandler> Rounds<H> {
    /// Obeys all that are there.
    pub(super) fn take_commands(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok((slot, command)) => self.obey(slot, command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.parts.engine.is_exiting = true;
                    return;
                }
            }
        }
    }

    fn obey(&mut self, slot: usize, command: Command) {
        let Some(ring) = self.ring(slot) else { return };
        let is_running = ring.queue.is_some();
        // An answer that nobody waits for any more does not matter.
        match command {
            Command::Start(config, reply) => {
                let _ = reply.send(self.start(slot, *config));
            }
            Command::Stop(reply) => {
                if is_running && ring.stopping.is_none() {
                    ring.stopping = Some(reply);
                } else {
                    let queue = ring.index;
                    let _ = reply.send(Err(WorkerError::NotRunning { queue }));
                }
            }
            Command::Call(fd, reply) => {
                ring.call = fd.map(Call::new);
                if is_running {
                    ring.signal_call();
                }
                let _ = reply.send(());
            }
            Command::Kick(fd, reply) => {
                self.disarm_kick(slot);
                if let Some(ring) = self.ring(slot) {
                    ring.kick.fd = fd;
                }
                if is_running {
                    self.arm_kick(slot);
                }
                let _ = reply.send(());
            }
            Command::Err(fd, reply) => {
                ring.err = fd;
                let _ = reply.send(());
            }
            Command::Enabled(is_enabled, reply) => {
                ring.is_enabled = is_enabled;
                let _ = reply.send(());
            }
            Command::Memory(memory, reply) => {
                if let Some(queue) = &mut ring.queue {
                    queue.set_memory(Arc::clone(&memory));
                }
                self.parts.engine.memory = memory;
                let _ = reply.send(());
            }
            Command::Exit => self.parts.engine.is_exiting = true,
        }
    }

    fn start(&mut self, slot: usize, config: RingConfig) -> Result<(), WorkerError> {
        let Some(ring) = self.ring(slot) else {
            return Err(WorkerError::Gone { queue: 0 });
        };
        let index = ring.index;
        if ring.queue.is_some() {
            return Err(WorkerError::Running { queue: index });
        }
        let layout = config.layout();
        let memory = Arc::clone(&config.memory);
        let has_inflight = config.inflight.is_some();
        let (queue, recovery) = Virtqueue::new(
            layout,
            config.base,
            config.features,
            config.memory,
            config.inflight,
        )
        .map_err(|source| WorkerError::Ring {
            queue: index,
            source,
        })?;
        if recovery.was_stale {
            tracing::warn!(
                queue = index,
                "the in-flight region is of another ring: cleared"
            );
        }
        if recovery.resubmitted > 0 {
            let chains = recovery.resubmitted;
            tracing::info!(
                queue = index,
                chains,
                "taking up chains of an earlier process"
            );
        }
        ring.queue = Some(queue);
        ring.has_logged_fault = false;
        ring.has_logged_malformed = false;
        ring.is_starved = false;
        ring.is_enabled = config.enabled;
        ring.call = config.call.map(Call::new);
        if has_inflight {
            // A killed process may have returned chains and died before it said so.
            ring.signal_call();
        }
        self.parts.engine.memory = memory;
        self.disarm_kick(slot);
        if let Some(ring) = self.ring(slot) {
            ring.kick.fd = config.kick;
        }
        self.arm_kick(slot);
        Ok(())
    }
}
