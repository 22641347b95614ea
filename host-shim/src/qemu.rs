//! What is known about a QEMU binary, and the command line it gets.
//!
//! QEMU keeps vCPUs, memory and PCI; it has no block back end of its own. `-nodefaults` and
//! `-no-user-config` leave only what the plan names, and the sandbox takes away what a guest that
//! breaks out of a device model would need next: starting programs, changing user, obsolete system
//! calls.
//!
//! Guest memory is a memfd with `share=on`, since the cards map it. Each card's character device is
//! a client that reconnects, so that a restarted card finds its guest again. The option for that
//! changed: `reconnect=SECONDS` until QEMU 9.1, `reconnect-ms=` from 9.2 on, and 10.0 no longer
//! knows the old one.
//!
//! A network interface gets its interrupts as legacy INTx (`vectors=0`) under TCG. QEMU 7.2 crashes
//! in `msix_set_vector_notifiers` when a vhost-user network device with MSI-X starts without KVM's
//! irqfd. Which release mended it was not found out, so all of them get it: what is slow there is
//! the translation, not the interrupt. Block devices do not have the trouble. `romfile=` leaves out the
//! firmware to boot from a network, which would have its turn before the disk.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::plan::{CardPlan, ResolvedAccel};
use crate::spec::{Boot, VmSpec};

/// What the sandbox refuses.
pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// How long QEMU waits before it looks for a card again, in milliseconds, where it can be said.
pub const RECONNECT_MS: u32 = 100;

/// A QEMU release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Version {
    /// Major number.
    pub major: u16,
    /// Minor number.
    pub minor: u16,
}

impl Version {
    /// Reads what `qemu-system-x86_64 --version` prints.
    #[must_use]
    pub fn parse(output: &str) -> Option<Self> {
        let rest = output.split_once("version ")?.1;
        let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        Some(Self { major, minor })
    }

    fn reconnect(self) -> String {
        if self >= (Self { major: 9, minor: 2 }) {
            format!("reconnect-ms={RECONNECT_MS}")
        } else {
            "reconnect=1".to_owned()
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A QEMU binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Qemu {
    /// Where it is.
    pub path: PathBuf,
    /// Its release.
    pub version: Version,
    /// Whether it was built with the seccomp sandbox.
    pub has_sandbox: bool,
    /// Folders of its firmware where it would not find them itself (a QEMU that is not installed).
    pub data_dirs: Vec<PathBuf>,
}

/// A path as QEMU's option parser wants it: a comma is written twice.
pub(crate) fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// What the firmware says about the machine: a UUID and a serial that begin with `ec2`, by which a
/// stock cloud-init knows that there is a metadata service to ask. They follow from the VM's name.
fn identity(name: &str) -> String {
    let hash = |basis: u64| {
        name.bytes().fold(basis, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
    };
    let (high, low) = (hash(0xcbf2_9ce4_8422_2325), hash(0x6295_c58d_62b8_2175));
    // Version 8 of RFC 9562: the digits have a meaning of ours.
    let uuid = format!(
        "ec2{:05x}-{:04x}-8{:03x}-8{:03x}-{:012x}",
        high >> 44,
        high >> 28 & 0xffff,
        high >> 16 & 0xfff,
        low >> 52,
        low & 0xffff_ffff_ffff
    );
    format!("type=1,product=offload,uuid={uuid},serial={uuid}")
}

/// QEMU's arguments for a VM whose cards listen where `cards` says.
pub(crate) fn arguments(
    spec: &VmSpec,
    qemu: &Qemu,
    accel: ResolvedAccel,
    cards: &[CardPlan],
    qmp: &Path,
) -> Vec<String> {
    let mut args = Vec::new();
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option(
        "-name",
        format!("guest={},process={}", spec.name, spec.name),
    );
    for dir in &qemu.data_dirs {
        option("-L", dir.to_string_lossy().into_owned());
    }
    if qemu.has_sandbox {
        option("-sandbox", SANDBOX.to_owned());
    }
    let mib = spec.memory_bytes >> 20;
    option(
        "-machine",
        "q35,usb=off,vmport=off,memory-backend=mem".to_owned(),
    );
    match accel {
        ResolvedAccel::Kvm => {
            option("-accel", "kvm".to_owned());
            option("-cpu", "host".to_owned());
        }
        ResolvedAccel::Tcg => {
            option("-accel", "tcg,thread=multi".to_owned());
            option("-cpu", "max".to_owned());
        }
    }
    if !spec.nics.is_empty() {
        option("-smbios", identity(&spec.name));
    }
    option("-smp", spec.cpus.to_string());
    option("-m", format!("{mib}M"));
    option(
        "-object",
        format!("memory-backend-memfd,id=mem,size={mib}M,share=on"),
    );
    match &spec.boot {
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            option("-kernel", kernel.to_string_lossy().into_owned());
            if let Some(initrd) = initrd {
                option("-initrd", initrd.to_string_lossy().into_owned());
            }
            if !cmdline.is_empty() {
                option("-append", cmdline.clone());
            }
        }
        Boot::Disk {
            firmware: Some(firmware),
        } => {
            option("-bios", firmware.to_string_lossy().into_owned());
        }
        Boot::Disk { firmware: None } => {}
    }
    for (index, (card, disk)) in cards.iter().zip(&spec.disks).enumerate() {
        option(
            "-chardev",
            format!(
                "socket,id=card{index},path={},{}",
                escape(&card.socket),
                qemu.version.reconnect()
            ),
        );
        let mut device = format!(
            "vhost-user-blk-pci,id=disk{index},chardev=card{index},num-queues={}",
            disk.queues
        );
        if let Some(size) = disk.queue_size {
            device.push_str(&format!(",queue-size={size}"));
        }
        if matches!(spec.boot, Boot::Disk { .. }) {
            device.push_str(&format!(",bootindex={index}"));
        }
        option("-device", device);
    }
    for (index, (card, nic)) in cards
        .iter()
        .skip(spec.disks.len())
        .zip(&spec.nics)
        .enumerate()
    {
        option(
            "-chardev",
            format!(
                "socket,id=netcard{index},path={},{}",
                escape(&card.socket),
                qemu.version.reconnect()
            ),
        );
        let mut netdev = format!("vhost-user,id=net{index},chardev=netcard{index}");
        if nic.queue_pairs > 1 {
            netdev.push_str(&format!(",queues={}", nic.queue_pairs));
        }
        option("-netdev", netdev);
        let mut device = format!(
            "virtio-net-pci,id=nic{index},netdev=net{index},mac={},host_mtu={},romfile=",
            nic.mac, nic.mtu
        );
        if nic.queue_pairs > 1 {
            device.push_str(",mq=on");
        }
        if accel == ResolvedAccel::Tcg {
            device.push_str(",vectors=0");
        } else if nic.queue_pairs > 1 {
            // One for each queue, the control queue and changes of the configuration.
            device.push_str(&format!(",vectors={}", 2 * nic.queue_pairs + 2));
        }
        option("-device", device);
    }
    option("-chardev", "stdio,id=console,signal=off".to_owned());
    option("-serial", "chardev:console".to_owned());
    option(
        "-chardev",
        format!("socket,id=qmp,path={},server=on,wait=off", escape(qmp)),
    );
    option("-mon", "chardev=qmp,mode=control".to_owned());
    option("-display", "none".to_owned());
    args.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
    if spec.exit_on_reboot {
        args.push("-no-reboot".to_owned());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_debian_and_upstream_are_read() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(Version::parse(debian), Some(Version { major: 7, minor: 2 }));
        let upstream = "QEMU emulator version 10.0.2\n";
        assert_eq!(
            Version::parse(upstream),
            Some(Version {
                major: 10,
                minor: 0
            })
        );
        assert_eq!(Version::parse("bash: no such file"), None);
        assert_eq!(Version::parse("version x.y"), None);
    }

    #[test]
    fn a_machine_says_by_its_uuid_that_it_has_metadata_and_no_two_are_the_same() {
        let one = identity("web1");
        let uuid = one.split("uuid=").nth(1).unwrap();
        let (uuid, serial) = uuid.split_once(",serial=").unwrap();
        assert_eq!(uuid, serial);
        assert!(uuid.starts_with("ec2"), "{uuid}");
        let lens: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(lens, [8, 4, 4, 4, 12], "{uuid}");
        assert!(uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'));
        assert_eq!(one, identity("web1"));
        assert_ne!(one, identity("web2"));
    }

    #[test]
    fn the_reconnect_option_follows_the_release() {
        let of = |major, minor| Version { major, minor }.reconnect();
        assert_eq!(of(7, 2), "reconnect=1");
        assert_eq!(of(9, 1), "reconnect=1");
        assert_eq!(of(9, 2), "reconnect-ms=100");
        assert_eq!(of(10, 0), "reconnect-ms=100");
    }

    #[test]
    fn commas_in_paths_do_not_become_options() {
        assert_eq!(escape(Path::new("/a,server=on/b")), "/a,,server=on/b");
    }
}
