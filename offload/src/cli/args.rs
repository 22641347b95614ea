//! The options for the vhost-user socket.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::listener::{ListenError, Listener};

/// `--socket-path PATH` xor `--fd N`, and what belongs to them. Flatten it into a card's options;
/// options of the card that are needed to serve do not matter when
/// [`super::capabilities_asked`] is looked at first.
#[derive(Clone, Debug, clap::Args)]
pub struct SocketArgs {
    /// Listen on this vhost-user socket; a stale one is replaced
    #[arg(long, value_name = "PATH", conflicts_with = "fd", required_unless_present_any = ["fd", "print_capabilities"])]
    pub socket_path: Option<PathBuf>,
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
    /// Opens what the options name. Call it once, early: the descriptor of `--fd` is taken over.
    ///
    /// # Errors
    /// The path is taken or cannot be bound, or the descriptor is not what it has to be.
    pub fn open(&self) -> Result<Listener, ListenError> {
        match (&self.socket_path, self.fd) {
            (Some(path), None) => Ok(Listener::bind(path, self.socket_mode)?),
            (None, Some(fd)) => Ok(Listener::inherit(fd)?),
            _ => Err(ListenError::NotOne),
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
        assert_eq!(path.socket_path, Some("../a b".into()));
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
