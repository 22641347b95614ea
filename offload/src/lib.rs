//! What every offload card shares: the vhost-user control plane, guest memory, the virtqueue
//! loop, the in-flight region, telemetry and the control socket, and the conventions of the
//! command line.
//!
//! | module | holds |
//! |---|---|
//! | [`device`] | what a card implements |
//! | [`vhost_user`] | wire messages, the sans-IO protocol machine, the connection |
//! | [`memory`] | guest memory made of the frontend's file descriptors |
//! | [`virtqueue`] | split virtqueues: popping chains, returning them, notifications |
//! | [`inflight`] | the region that outlives a killed card (vhost-user INFLIGHT_SHMFD) |
//! | [`worker`] | one thread and one io_uring a queue |
//! | [`limit`] | operations and bytes a second, shared by queues |
//! | [`telemetry`] | counters, latency histograms, logging set-up, rate-limited log lines |
//! | [`control`] | the control socket: JSON lines, peer credentials |
//! | [`cli`] | command-line conventions of vhost-user backends |
//! | [`sandbox`] | what a card gives up once it is set up |
//! | [`stop`] | the wish to stop (SIGTERM, SIGINT), pollable |
//!
//! Nothing here knows what a block or a packet is.

pub mod cli;
pub mod control;
pub mod device;
pub mod inflight;
pub mod limit;
pub mod memory;
pub mod sandbox;
pub mod stop;
pub mod telemetry;
pub mod vhost_user;
pub mod virtqueue;
pub mod worker;

#[cfg(feature = "testing")]
pub mod testing;
