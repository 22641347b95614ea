//! The backends that are compared.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::space::Space;
use crate::results::TargetInfo;
use crate::server::Server;
use crate::target::args;

/// The servers' address as guests know it. Every backend leads it to the loopback of the host's
/// namespace: there passt acknowledges what it has handed to the kernel. For any other address it waits
/// until the peer has, looks for that every 10 ms only, and a single flow stands still in between: so it
/// is measured at its best.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// passt, as found on PATH.
pub const PASST: &str = "passt";
/// What carries slirp.
pub const QEMU: &str = "qemu-system-x86_64";

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The network card.
    Offload,
    /// The network card, on a wire as narrow as an ordinary Ethernet.
    Offload1500,
    /// passt with `--vhost-user`.
    Passt,
}

/// A guest's side of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The guest's.
    pub guest: Ipv4Addr,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// Largest IP packet.
    pub mtu: u32,
}

impl Peer {
    /// All, in order.
    pub const ALL: [Self; 3] = [Self::Offload, Self::Offload1500, Self::Passt];

    /// Whether it is the card.
    #[must_use]
    pub const fn is_card(self) -> bool {
        matches!(self, Self::Offload | Self::Offload1500)
    }

    /// Name and description.
    #[must_use]
    pub fn info(self) -> TargetInfo {
        let (name, about) = match self {
            Self::Offload => (
                "offload",
                "vhost-net, one queue pair, MTU 9001, checksum and segmentation offloads",
            ),
            Self::Offload1500 => ("offload 1500", "the same at MTU 1500"),
            Self::Passt => (
                "passt",
                "passt --vhost-user at its best MTU, 65520; it has no offloads",
            ),
        };
        TargetInfo {
            name: name.to_owned(),
            about: about.to_owned(),
        }
    }

    /// What the guest has to be given.
    #[must_use]
    pub const fn addresses(self) -> Addresses {
        match self {
            // The card's defaults.
            Self::Offload | Self::Offload1500 => Addresses {
                guest: Ipv4Addr::new(10, 0, 2, 15),
                gateway: Ipv4Addr::new(10, 0, 2, 2),
                mtu: if matches!(self, Self::Offload) {
                    9001
                } else {
                    1500
                },
            },
            Self::Passt => Addresses {
                guest: Ipv4Addr::new(192, 0, 2, 2),
                gateway: Ipv4Addr::new(192, 0, 2, 1),
                mtu: 65520,
            },
        }
    }

    /// Name of the guest's interface.
    #[must_use]
    pub const fn interface(self) -> &'static str {
        match self {
            Self::Offload => "offload0",
            Self::Offload1500 => "offload1",
            Self::Passt => "passt0",
        }
    }

    /// Starts it in the host's namespace. `passt` and `card` are the programs.
    ///
    /// # Errors
    /// It does not start or does not listen.
    pub fn serve(
        self,
        host: &Space,
        card: &Path,
        passt: &Path,
        dir: &Path,
    ) -> Result<(Server, PathBuf)> {
        let name = self.info().name;
        let socket = dir.join(self.interface()).with_extension("sock");
        let (nsenter, net) = host.enter();
        let Addresses {
            guest,
            gateway,
            mtu,
        } = self.addresses();
        let own: Vec<OsString> = match self {
            Self::Offload | Self::Offload1500 => args(["serve", "--socket-path"])
                .chain([socket.clone().into()])
                .chain(args(["--map-host-loopback"]))
                .chain([SERVER.to_string().into(), "--mtu".into()])
                .chain([mtu.to_string().into()])
                .collect(),
            Self::Passt => args(["-f", "-4", "--vhost-user", "-i", "up0", "--no-map-gw", "-s"])
                .chain([socket.clone().into()])
                .chain(args(["--map-host-loopback"]))
                .chain([SERVER.to_string().into()])
                .chain(args(["-t", "none", "-u", "none", "-n", "24"]))
                .chain([
                    OsString::from("-a"),
                    guest.to_string().into(),
                    "-g".into(),
                    gateway.to_string().into(),
                    "--mtu".into(),
                    mtu.to_string().into(),
                ])
                .collect(),
        };
        let program = if self.is_card() { card } else { passt };
        let all: Vec<OsString> = [OsString::from(net), "--".into(), program.into()]
            .into_iter()
            .chain(own)
            .collect();
        let log = dir.join(self.interface()).with_extension("log");
        let server = Server::start(nsenter, &all, &socket, log).context(name)?;
        Ok((server, socket))
    }
}

/// The host's namespace: a loopback, and an uplink for whoever asks for a default route.
///
/// # Errors
/// No permission.
pub fn host() -> Result<Space> {
    let host = Space::new()?;
    // A TAP that nobody reads: there need not be a dummy device in the kernel.
    host.ip("tuntap add dev up0 mode tap")?;
    host.ip("link set up0 up mtu 65520")?;
    host.ip("address add 192.0.2.2/24 dev up0")?;
    host.ip("route add default via 192.0.2.1 dev up0")?;
    host.set("ipv4/ping_group_range", "0 2147483647")?;
    usual_tcp(&host)?;
    Ok(host)
}

/// TCP's settings are ordinary ones, whatever this machine's are. BBR paces what needs no pace, and takes
/// long to find its rate again when a backend has dropped a burst; where it is the machine's default, the
/// kernel lets a namespace have Reno only. passt announces what the host's receiver has room for, but
/// takes what its own socket has room for and drops the rest: so receivers are as usual, and senders may
/// have what passt's authors ask for. Both help all backends.
fn usual_tcp(space: &Space) -> Result<()> {
    let set = |name| space.set("ipv4/tcp_congestion_control", name);
    set("cubic").or_else(|_| set("reno"))?;
    space.set("ipv4/tcp_rmem", "4096 131072 6291456")?;
    space.set("ipv4/tcp_wmem", "4096 16384 16777216")?;
    Ok(())
}

/// Gives the guest's interface its address and route.
///
/// # Errors
/// The interface is not there.
pub fn configure(guest: &Space, peer: Peer) -> Result<()> {
    let Addresses {
        guest: address,
        gateway,
        mtu,
    } = peer.addresses();
    let name = peer.interface();
    if peer.is_card() {
        // The card's source check lets nothing pass from another.
        guest.ip(&format!("link set {name} address 52:54:00:12:34:56"))?;
    }
    guest.ip(&format!("address add {address}/24 dev {name}"))?;
    guest.ip(&format!("link set {name} up mtu {mtu} txqueuelen 1000"))?;
    guest.ip(&format!("route add default via {gateway} dev {name}"))?;
    guest.set("ipv4/tcp_tw_reuse", "1")?;
    usual_tcp(guest)
}
