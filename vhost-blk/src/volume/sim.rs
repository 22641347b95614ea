//! Simulated backing and crash tests.
use std::sync::Arc;
pub(crate) fn note_sequences(_: Option<Arc<crypto::session::Session>>, _: u64, _: u64) {}
