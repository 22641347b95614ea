//! Benchmarks of the offload cards against peers that a user could take instead.
//!
//! `offload-benches blk` serves the same amount of data from the same file system by several
//! servers, drives each with the same client, and prints how they compare. How it stays honest:
//!
//! * **One client for all servers.** `blkio` (the virtio-blk driver of libblkio) talks vhost-user to
//!   the card and to `qemu-storage-daemon` alike, with the same rings and the same buffers. Only the
//!   baseline without virtio is `fio`'s, for it has nothing to talk vhost-user to.
//! * **Runs are interleaved**, and each round starts with another server: what the machine does
//!   meanwhile hits all of them. Ratios are taken within a round, then their median.
//! * **All data exists** before the first measurement, is incompressible, and is read back and
//!   compared: a fast server that returns something else loses.
//! * **Spread is shown**: a ratio is worth nothing without it.
//! * **The server's processor time** comes from its CPU clock, in nanoseconds, which counts its
//!   kernel threads (io_uring workers) and threads that have ended, too.
//!
//! `offload-benches scale` looks at one card alone on a volume that is far larger than its metadata
//! cache: memory that it holds, reads that miss, time to open after a crash.
//!
//! `offload-benches noisy` measures a volume beside a noisy neighbour, and what the neighbour's limit
//! spares it: see [`noisy`].
//!
//! `offload-benches net` compares the network card with passt: see [`net`].
//!
//! Modules, from the pure to the impure: [`job`] what is measured, [`stats`] medians and ratios,
//! [`results`] what came out, [`table`] and [`chart`] how it is shown; [`client`] drives a server,
//! [`server`] owns its process, [`target`] knows each peer's command line, [`fio`] runs the
//! baseline, [`fill`] leaves a volume with a full log, [`blk`] and [`scale`] do it all in order.

pub mod blk;
pub mod chart;
pub mod client;
pub mod fill;
pub mod fio;
pub mod job;
pub mod net;
pub mod noisy;
pub mod results;
pub mod scale;
pub mod server;
pub mod stats;
pub mod table;
pub mod target;
