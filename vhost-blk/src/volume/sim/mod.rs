//! Crash tests on a simulated backing.
//!
//! The engine, recovery and activation run unchanged on a [`disk::SimDisk`] whose writes land
//! late, in any order, in part, or not at all. A seed decides the schedule: requests, the order in
//! which I/O completes, where the process is killed or the power is cut, also in the middle of
//! recovery. [`model::Model`] knows what a guest may see afterwards.
//!
//! Every [`Mutant`](super::mutant::Mutant) breaks one step of the protocol and must be caught.

mod disk;
mod model;
mod plan;
mod rig;
mod world;

mod abandoned_tests;
mod attack_tests;
mod crash_tests;
mod draft_tests;
mod fault_tests;
mod order_tests;
mod space_tests;

use std::cell::RefCell;

thread_local! {
    static ACTIVATIONS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An activation begins to seal with a session key, from sequence 1. What it is wrapped as tells
/// keys apart.
pub(crate) fn note_activation(key: &crypto::keys::Wrapped) {
    ACTIVATIONS.with_borrow_mut(|keys| keys.push(key.as_bytes().to_vec()));
}

/// The keys of this thread's activations so far.
fn take_activations() -> Vec<Vec<u8>> {
    ACTIVATIONS.take()
}
