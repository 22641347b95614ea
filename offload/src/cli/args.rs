//! The options for the vhost-user socket.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::listener::{ListenError, Listener};

/// `--socket-path PATH`, several times for a card that serves several sockets, xor `--fd N`, and what belongs to them. Flatten it into a card's options;
/// options of the card that are needed to serve do not matter when
/// [`super::capabilities_asked`] is looked at first.
#[derive(Clone, Debug, clap::Args)]
pub struct SocketArgs {
    /// Listen on this vhost-user socket; a stale one is replaced. Several times where a card may
    /// have several frontends
    #[arg(long, value_name = "PATH", conflicts_with = "fd", required_unless_present_any = ["fd", "print_capabilities"])]
    pub socket_path: Vec<PathBuf>,
    /// Use this inherited descriptor: a listening or a connected Unix stream socket
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,
    /// Permissions of the socket, in octal; 660 lets the group in
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    pub socket_mode: u32,
    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

impl SocketArgs {
    /// Opens the one socket that the options name. Call it once, early: the descriptor of `--fd` is
    /// taken over.
    ///
    /// # Errors
    /// The path is taken or cannot be bound, or the descriptor is not what it has to be; several
    /// paths are named.
    pub fn open(&self) -> Result<Listener, ListenError> {
        let mut listeners = self.open_all()?.into_iter();
        match (listeners.next(), listeners.next()) {
            (Some(listener), None) => Ok(listener),
            _ => Err(ListenError::Several),
        }
    }

    /// Opens all that the options name, in their order, for a card that can serve several: at
    /// least one. As [`SocketArgs::open`] else.
    ///
    /// # Errors
    /// One of them cannot be opened; then none is.
    pub fn open_all(&self) -> Result<Vec<Listener>, ListenError> {
        match (self.socket_path.as_slice(), self.fd) {
            ([], Some(fd)) => Ok(vec![Listener::inherit(fd)?]),
            ([], None) | ([_, ..], Some(_)) => Err(ListenError::NotOne),
            (paths, None) => paths
                .iter()
                .map(|path| Ok(Listener::bind(path, self.socket_mode)?))
                .collect(),
        }
    }
}

/// Reads permission bits in octal, `600` or `0660`.
///
/// # Errors
/// A text that says what is wrong.
pub fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & !0o777 == 0 => Ok(mode),
        _ => Err("permissions are three octal digits, like 600 or 660".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Card {
        #[command(flatten)]
        socket: SocketArgs,
    }

    fn parse(args: &[&str]) -> Result<SocketArgs, String> {
        Card::try_parse_from([&["card"], args].concat())
            .map(|card| card.socket)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_path_or_a_descriptor_is_needed_and_not_both() {
        assert!(parse(&["--fd", "3"]).is_ok());
        let path = parse(&["--socket-path", "../a b"]).unwrap();
        assert_eq!(path.socket_path, [PathBuf::from("../a b")]);
        assert_eq!(path.socket_mode, 0o600);
        assert!(parse(&[]).unwrap_err().contains("--socket-path"));
        assert!(
            parse(&["--fd", "3", "--socket-path", "x"])
                .unwrap_err()
                .contains("cannot be used")
        );
        assert!(parse(&["--print-capabilities"]).unwrap().print_capabilities);
        assert!(matches!(
            parse(&["--print-capabilities"]).unwrap().open(),
            Err(ListenError::NotOne)
        ));
    }

    #[test]
    fn several_paths_are_opened_together_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| format!("--socket-path={}", dir.path().join(name).display());
        let two = parse(&[&path("a"), &path("b")]).unwrap();
        assert_eq!(two.open_all().unwrap().len(), 2);
        assert!(matches!(two.open(), Err(ListenError::Several)));
        let twice = parse(&[&path("a"), &path("b"), &path("a")]).unwrap();
        assert!(matches!(twice.open_all(), Err(ListenError::Path(_))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(parse(&["--fd", "3", &path("a")]).is_err());
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(
            parse(&["--fd=3", "--socket-mode=0660"])
                .unwrap()
                .socket_mode,
            0o660
        );
        for wrong in ["", "8", "1777", "rw-", "-1"] {
            assert!(
                parse(&["--fd=3", &format!("--socket-mode={wrong}")]).is_err(),
                "{wrong}"
            );
        }
    }
}
