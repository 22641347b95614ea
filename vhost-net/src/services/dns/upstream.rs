//! The servers that are asked, which change while the card runs: the host moves to another network,
//! or somebody says so on the control socket.
//!
//! One object for all queues. A queue looks at a number when it has a question, and takes the list
//! only when that has changed.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::PORT;

/// Most servers that are asked; more say nothing new.
pub const SERVERS_MAX: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub struct Upstream {
    servers: Mutex<Arc<[SocketAddr]>>,
    version: AtomicU64,
}

impl Upstream {
    /// With these servers.
    #[must_use]
    pub fn new(servers: &[SocketAddr]) -> Self {
        let upstream = Self::default();
        upstream.set(servers);
        upstream
    }

    /// Changes with each [`Self::set`] that changes something.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The servers.
    #[must_use]
    pub fn servers(&self) -> Arc<[SocketAddr]> {
        let servers = self.servers.lock();
        Arc::clone(&servers.unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks these from now on, the first [`SERVERS_MAX`] of them. Whether they are others than before.
    pub fn set(&self, servers: &[SocketAddr]) -> bool {
        let servers = servers.get(..SERVERS_MAX).unwrap_or(servers);
        let mut old = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = **old != *servers;
        if is_new {
            *old = servers.into();
            self.version.fetch_add(1, Ordering::AcqRel);
        }
        is_new
    }
}

/// The servers that a `resolv.conf` names. Lines that are not understood are passed over, as
/// resolvers do.
#[must_use]
pub fn servers_of(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| -> Option<SocketAddr> {
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|word| *word == "nameserver");
        let address: IpAddr = address.and(words.next())?.parse().ok()?;
        Some((address, PORT).into())
    };
    text.lines().filter_map(server).take(SERVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf_is_read_as_resolvers_do() {
        let text = "# nameserver 192.0.2.9\nsearch example.internal\nnameserver 192.0.2.1\n\
                    \tnameserver\t2001:db8::1 # second\nnameserver not-an-address\nnameserver\n\
                    nameservers 192.0.2.2\noptions edns0\n";
        let found = servers_of(text);
        let wanted = ["192.0.2.1:53", "[2001:db8::1]:53"];
        assert_eq!(found, wanted.map(|it| it.parse::<SocketAddr>().unwrap()));
        let many = "nameserver 192.0.2.1\n".repeat(100);
        assert_eq!(servers_of(&many).len(), SERVERS_MAX);
    }

    #[test]
    fn the_version_changes_when_the_servers_do() {
        let one = ["192.0.2.1:53".parse().unwrap()];
        let upstream = Upstream::new(&one);
        let version = upstream.version();
        assert!(!upstream.set(&one));
        assert_eq!(upstream.version(), version);
        assert!(upstream.set(&[]));
        assert_ne!(upstream.version(), version);
        assert!(upstream.servers().is_empty());
    }
}
