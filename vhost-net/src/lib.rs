//! The network card: a stock guest's virtio-net device, served from a process that needs no
//! privileges.
//!
//! ```text
//!  guest ──virtqueues──► device ──frames──► services   answers what the card itself is: ARP, ND,
//!                          ▲                  │        DHCP, RA, DNS, metadata
//!                          │                  ▼
//!                          │                policy     security groups, limits, flow log, capture
//!                          │                  │
//!                          │                  ▼
//!                          └──────────────  stack      TCP terminated, UDP and ICMP by tables
//!                                             │ ▲
//!                                             ▼ │ bytes, errors
//!                                            host      the sockets of the host, in the queue's
//!                                                      io_uring
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | what an interface is: addresses, gateway, name servers, MTU |
//! | [`frame`] | a frame of the guest's, checked once; offload metadata; checksums |
//! | [`card`] | the order in which a packet meets services, policy and stack |
//! | [`stack`] | flows: TCP terminated, UDP, echo |
//! | [`host`] | the host's sockets, published ports |
//! | [`lan`] | private networks: cards whose guests reach each other |
//! | [`device`] | the virtio-net device: features, queue pairs |
//! | [`local`] | what the services and the policy look like from the data path |
//! | [`services`] | ARP, ND, DHCP, DHCPv6, DNS, metadata, ping: what the card itself is on the link |
//! | [`capture`] | frames of a running interface, for whoever asks for them |
//! | [`memory`] | how memory of flows is given back |
//! | [`metrics`] | what services and policy count, as the control socket shows it |
//! | [`policy`] | source check, security groups, connection tracking, flow log, capture format |
//!
//! Everything but [`device`], [`host`] and [`capture`] is free of I/O: it takes bytes and a `now` and returns
//! frames and wishes.

pub mod args;
pub mod capture;
pub mod card;
pub mod commands;
pub mod device;
pub mod frame;
pub mod host;
pub mod lan;
pub mod local;
pub mod locals;
pub mod memory;
pub mod metrics;
pub mod policy;
pub mod services;
pub mod spec;
pub mod stack;
#[cfg(test)]
mod testing;
