//! A pair's part in a private network: the first one has the [port](crate::lan::port), others leave
//! their frames with it.

use std::time::Instant;

use super::Shared;
use crate::frame::header::NetHeader;
use crate::lan::port::Port;
use crate::locals::LocalSide;

/// Takes a frame of the guest's that is for a member. False: it is for others.
pub(super) fn to_member(
    port: &mut Option<Port>,
    shared: &Shared,
    local: &mut LocalSide,
    header: &NetHeader,
    frame: &[u8],
    now: Instant,
) -> bool {
    if let Some(port) = port {
        return port.from_guest(header, frame, now, local, &shared.stats);
    }
    let Some(lan) = &shared.local.lan else {
        return false;
    };
    let is_for_member = local.is_for_member(frame);
    if is_for_member {
        lan.hand_over(*header, frame);
    }
    is_for_member
}
