//! The other side of a card, for tests and benches: the frontend's vhost-user, and the guest
//! driver's virtqueues.

pub mod driver;
pub mod frontend;
