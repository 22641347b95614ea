//! The block card: encrypted volumes served as virtio-blk over vhost-user.
//!
//! ```text
//!  main ─► args ─► commands ─┬─► device ──► request, config        virtio-blk
//!                            │     │
//!                            │     ▼
//!                            └─► volume ──► engine ──► formats     the sealed volume
//! ```
//!
//! `volume` knows nothing of virtio, `device` nothing of how a volume is stored.

pub mod args;
pub mod commands;
pub mod device;
pub mod volume;
