//! End-to-end tests: the binaries that users run, a stock QEMU, a stock Debian kernel.
//!
//! Nothing here looks inside: the tests start `host-shim run`, type on the guest's console, kill
//! what a host can lose, and look at the backing as somebody who stole it would.
//!
//! | module | holds |
//! |---|---|
//! | [`binaries`] | the binaries under test, built if they are not |
//! | [`card`] | a card on its own, without a shim |
//! | [`lab`] | a temporary folder with keys and volumes, and the `vhost-blk` commands on them |
//! | [`guest`] | a running VM, and conversations with it |
//! | [`names`] | name servers of the host's |
//! | [`rootfs`] | Debian with cloud-init, to be a guest's root |
//! | [`stamp`] | sectors that tell what they are; shared with `stamper`, which runs in the guest |
//! | [`tools`] | a disk with large programs of the host |
//!
//! All guests run on TCG, so that the tests need no /dev/kvm. `OFFLOAD_QEMU` names another QEMU than the
//! one in PATH, `OFFLOAD_QEMU_DATA` its firmware folders, separated by colons. `OFFLOAD_SEED` decides
//! what is random; a failed test says which seed it had.

pub mod binaries;
pub mod card;
pub mod guest;
pub mod lab;
pub mod names;
pub mod rootfs;
pub mod stamp;
pub mod tools;
