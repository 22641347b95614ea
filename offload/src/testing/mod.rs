//! The other side of a card, for tests and benches: the frontend's vhost-user, the guest
//! driver's virtqueues, and a fuzzing harness.

pub mod driver;
pub mod frontend;
pub mod fuzz;
