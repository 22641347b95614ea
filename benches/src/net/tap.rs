//! A TAP whose frames carry virtio-net headers: the kernel's own TCP on it is "the guest".

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;

use super::space::Space;

/// `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// Bytes of `virtio_net_hdr_v1` before each frame (virtio 1.3, 5.1.6).
pub const HEADER_LEN: usize = 12;
/// What TUNSETOFFLOAD knows (`linux/if_tun.h`).
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

/// Features of virtio-net by bit (virtio 1.3, 5.1.3).
pub mod feature {
    /// The device completes checksums of what it is given.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames with checksums to complete.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver takes TCP super-segments over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP super-segments over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device takes TCP super-segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP super-segments over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// Received frames may span several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// All of them that the client takes.
    pub const ALL: u64 =
        CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF;
}

/// Makes a TAP of this name in a namespace; the file is non-blocking. `features` are the device's: what
/// it takes, the kernel leaves to it.
///
/// # Errors
/// No permission, or the name is taken.
pub fn open(space: &Space, name: &str, features: u64) -> io::Result<File> {
    let file = space.run(|| {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: all-zero bytes are a valid `ifreq`: integers, bytes and a pointer that is null.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
            *place = byte.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let (fd, len) = (file.as_raw_fd(), HEADER_LEN as i32);
        let request = std::ptr::from_mut(&mut request);
        // SAFETY: `fd` is open; TUNSETIFF reads and writes an `ifreq` there, and there is one.
        done(unsafe { libc::ioctl(fd, TUNSETIFF, request) })?;
        let len = std::ptr::from_ref(&len);
        // SAFETY: `fd` is open; TUNSETVNETHDRSZ reads an `int` there, and there is one.
        done(unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, len) })?;
        Ok(file)
    })?;
    let mut offload: libc::c_ulong = 0;
    if features & feature::CSUM != 0 {
        offload |= TUN_F_CSUM;
        if features & feature::HOST_TSO4 != 0 {
            offload |= TUN_F_TSO4;
        }
        if features & feature::HOST_TSO6 != 0 {
            offload |= TUN_F_TSO6;
        }
    }
    // SAFETY: `file` is open; TUNSETOFFLOAD takes its flags by value.
    done(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offload) })?;
    let flags = rustix::fs::fcntl_getfl(&file)? | rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&file, flags)?;
    Ok(file)
}

fn done(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
