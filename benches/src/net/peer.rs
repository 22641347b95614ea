//! The backends that are compared.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::space::Space;
use crate::results::TargetInfo;
use crate::server::Server;
use crate::target::args;

/// The servers' address, in the host's namespace.
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
    pub const ALL: [Self; 2] = [Self::Offload, Self::Passt];

    /// Name and description.
    #[must_use]
    pub fn info(self) -> TargetInfo {
        let (name, about) = match self {
            Self::Offload => (
                "offload",
                "vhost-net, one queue pair, MTU 9001, checksum and segmentation offloads",
            ),
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

    /// The program, if it is not the card.
    #[must_use]
    pub const fn needs(self) -> Option<&'static str> {
        match self {
            Self::Offload => None,
            Self::Passt => Some(PASST),
        }
    }

    /// What the guest has to be given.
    #[must_use]
    pub const fn addresses(self) -> Addresses {
        match self {
            // The card's defaults.
            Self::Offload => Addresses {
                guest: Ipv4Addr::new(10, 0, 2, 15),
                gateway: Ipv4Addr::new(10, 0, 2, 2),
                mtu: 9001,
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
        let socket = dir.join(&name).with_extension("sock");
        let (nsenter, net) = host.enter();
        let Addresses {
            guest,
            gateway,
            mtu,
        } = self.addresses();
        let own: Vec<OsString> = match self {
            Self::Offload => args(["serve", "--socket-path"])
                .chain([socket.clone().into()])
                .collect(),
            Self::Passt => args(["-f", "-4", "--vhost-user", "-i", "up0", "--no-map-gw", "-s"])
                .chain([socket.clone().into()])
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
        let program = match self {
            Self::Offload => card,
            Self::Passt => passt,
        };
        let all: Vec<OsString> = [OsString::from(net), "--".into(), program.into()]
            .into_iter()
            .chain(own)
            .collect();
        let log = dir.join(&name).with_extension("log");
        let server = Server::start(nsenter, &all, &socket, log).context(name)?;
        Ok((server, socket))
    }
}

/// The host's namespace: the servers' address, and an uplink for whoever asks for a default route.
///
/// # Errors
/// No permission.
pub fn host() -> Result<Space> {
    let host = Space::new()?;
    host.ip(&format!("address add {SERVER}/32 dev lo"))?;
    // A TAP that nobody reads: there need not be a dummy device in the kernel.
    host.ip("tuntap add dev up0 mode tap")?;
    host.ip("link set up0 up mtu 65520")?;
    host.ip("address add 192.0.2.2/24 dev up0")?;
    host.ip("route add default via 192.0.2.1 dev up0")?;
    host.set("ipv4/ping_group_range", "0 2147483647")?;
    Ok(host)
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
    if peer == Peer::Offload {
        // The card's source check lets nothing pass from another.
        guest.ip(&format!("link set {name} address 52:54:00:12:34:56"))?;
    }
    guest.ip(&format!("address add {address}/24 dev {name}"))?;
    guest.ip(&format!("link set {name} up mtu {mtu} txqueuelen 1000"))?;
    guest.ip(&format!("route add default via {gateway} dev {name}"))?;
    guest.set("ipv4/tcp_tw_reuse", "1")?;
    Ok(())
}
