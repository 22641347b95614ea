//! The host side: from a VM spec to cards and QEMU that run, and stop, in order.
//!
//! | module | holds | does I/O |
//! |---|---|---|
//! | [`spec`] | the TOML file, checked | no |
//! | [`plan`] | from a spec and what the host offers to processes | no |
//! | [`qemu`] | what is known of a QEMU, its command line | no |
//! | [`host`] | what this host offers | yes |
//! | [`accel`] | does /dev/kvm run guests? | yes |
//! | [`qmp`] | QEMU's control protocol | yes; its wire format no |
//! | [`supervise`] | runs a plan | yes; its state machine no |
//! | [`guest`] | a small guest for demonstration and tests | yes; its formats no |

pub mod accel;
pub mod guest;
pub mod host;
pub mod plan;
pub mod qemu;
pub mod qmp;
pub mod spec;
pub mod supervise;
