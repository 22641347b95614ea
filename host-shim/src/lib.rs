//! The host side.
pub mod accel;
pub mod plan;
pub mod qemu;
pub mod spec;
