//! The host's name servers, as `/etc/resolv.conf` has them, now and when it changes.
//!
//! The file is looked at every [`INTERVAL`], which costs one system call and needs no watch that a
//! rename loses. The sandbox lets it be read: the file itself where it lies among others in `/etc`,
//! its folder where that is a service's own (`/run/systemd/resolve`), so that a new file in its place
//! is found too. A file in `/etc` that is replaced by another one, rather than written, is out of
//! reach then; that is said once, and the control socket takes other servers.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use offload::control::{ControlError, ControlServer};
use offload::stop::StopSignal;
use serde_json::json;

use crate::args::name_server;
use crate::services::dns::upstream::{Upstream, servers_of};

const FILE: &str = "/etc/resolv.conf";
/// How often it is looked at.
const INTERVAL: Duration = Duration::from_secs(3);

/// Which file it is, and which state of it: inode, changed when, length.
type State = (u64, i64, i64, u64);

/// See the module.
#[derive(Debug)]
pub(super) struct Resolvers {
    file: PathBuf,
    seen: Option<State>,
    has_failed: bool,
}

impl Resolvers {
    pub(super) fn of_host() -> Self {
        Self::of(Path::new(FILE))
    }

    fn of(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            seen: None,
            has_failed: false,
        }
    }

    /// The servers, if they may be others than last time. Of a file that is not there or cannot be
    /// read, there are none.
    pub(super) fn read(&mut self) -> Option<Vec<SocketAddr>> {
        let state = std::fs::metadata(&self.file).ok();
        let state = state.map(|it| (it.ino(), it.mtime(), it.mtime_nsec(), it.len()));
        if state == self.seen && state.is_some() {
            return None;
        }
        self.seen = state;
        match std::fs::read_to_string(&self.file) {
            Ok(text) => {
                self.has_failed = false;
                Some(servers_of(&text))
            }
            Err(error) => {
                let is_told = std::mem::replace(&mut self.has_failed, true);
                if !is_told && error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(
                        %error,
                        "cannot read {}: the name servers stay; `set_dns_upstream` on the control \
                         socket sets others",
                        self.file.display()
                    );
                }
                None
            }
        }
    }

    /// What has to stay in reach of a sandboxed card.
    pub(super) fn reach(&self) -> Option<PathBuf> {
        let file = self.file.canonicalize().ok()?;
        match file.parent() {
            Some(folder) if folder == Path::new("/etc") || folder == Path::new("/") => Some(file),
            Some(folder) => Some(folder.to_owned()),
            None => None,
        }
    }

    /// Keeps `upstream` up to date from a thread of its own, until the end.
    pub(super) fn follow(
        mut self,
        upstream: Arc<Upstream>,
        stop: StopSignal,
    ) -> io::Result<JoinHandle<()>> {
        let body = move || {
            while !stop.wait(Some(INTERVAL)) {
                if let Some(servers) = self.read()
                    && upstream.set(&servers)
                {
                    tracing::info!("the name servers are {servers:?} now");
                }
            }
        };
        std::thread::Builder::new()
            .name("resolvers".into())
            .spawn(body)
    }
}

/// Shows and sets the name servers that are asked.
pub(super) fn methods(server: ControlServer, upstream: &Arc<Upstream>) -> ControlServer {
    let shown = |upstream: &Upstream| json!({ "servers": *upstream.servers() });
    let server = server.method("dns_upstream", {
        let upstream = Arc::clone(upstream);
        move |_| Ok(shown(&upstream))
    });
    let upstream = Arc::clone(upstream);
    server.method("set_dns_upstream", move |params| {
        let servers: Vec<String> = serde_json::from_value(params["servers"].clone())
            .map_err(|error| ControlError::bad_params(error.to_string()))?;
        let servers: Result<Vec<_>, _> = servers.iter().map(|it| name_server(it)).collect();
        upstream.set(&servers.map_err(ControlError::bad_params)?);
        Ok(shown(&upstream))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_when_it_is_written_replaced_or_gone_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut resolvers = Resolvers::of(&path);
        assert_eq!(resolvers.read(), None);
        let server = |last: u8| SocketAddr::from(([192, 0, 2, last], 53));
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(resolvers.read(), Some(vec![server(1)]));
        assert_eq!(resolvers.read(), None);
        std::fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        assert_eq!(resolvers.read(), Some(vec![server(1), server(2)]));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(resolvers.read(), None, "what was known stays");
        let other = dir.path().join("other");
        std::fs::write(&other, "nameserver 192.0.2.3\n").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(resolvers.read(), Some(vec![server(3)]));
        assert_eq!(resolvers.reach(), dir.path().canonicalize().ok());
    }

    #[test]
    fn the_servers_are_followed_until_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let upstream = Arc::new(Upstream::default());
        let stop = StopSignal::new().unwrap();
        let resolvers = Resolvers::of(&path);
        let thread = resolvers
            .follow(Arc::clone(&upstream), stop.clone())
            .unwrap();
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while upstream.servers().is_empty() {
            assert!(std::time::Instant::now() < end);
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.stop();
        thread.join().unwrap();
    }
}
