//! A block card on its own, without a shim: for frontends that are not QEMU, and for several of them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use crate::binaries::binary;
use crate::guest::PATIENCE;
use crate::lab::{Lab, Volume, text};

/// Whom a card becomes when the test is root.
const NOBODY: u32 = 65534;

/// A card, killed when this is dropped.
pub struct Card {
    child: Child,
    folder: PathBuf,
}

impl Card {
    /// Starts `vhost-blk serve` on a volume with these sockets, in a folder of the card's own, and
    /// `more` arguments. Does not wait for it.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(lab: &Lab, volume: &Volume, sockets: &[&str], more: &[&str]) -> Self {
        // It removes its sockets in the end, as whoever it has become by then.
        let folder = lab.path("card");
        std::fs::create_dir(&folder).expect("room");
        let mut command = Command::new(binary("vhost-blk"));
        command.arg("serve");
        for socket in sockets {
            command.arg("--socket-path").arg(folder.join(socket));
        }
        command
            .args(["--volume", text(&volume.path)])
            .args(["--key-file", text(&volume.key)])
            .args(more);
        if rustix::process::geteuid().is_root() {
            command.args(["--user", &format!("{NOBODY}:{NOBODY}")]);
            std::os::unix::fs::chown(&folder, Some(NOBODY), Some(NOBODY)).expect("root may");
        }
        let child = command.spawn().expect("vhost-blk starts");
        Self { child, folder }
    }

    /// A socket of it.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Waits until a path is there.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&self, path: &Path) {
        let end = Instant::now() + PATIENCE;
        while !path.exists() {
            assert!(Instant::now() < end, "no {}", path.display());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Ends it, in order.
    ///
    /// # Panics
    /// When it does not end as it should.
    pub fn terminate(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
