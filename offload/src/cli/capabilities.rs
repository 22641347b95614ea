//! `--print-capabilities`: what a management program may ask a card for before it starts it.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};

use serde::Serialize;

/// The answer to `--print-capabilities`, type `VHostUserBackendCapabilities` of QEMU's
/// `docs/interop/vhost-user.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// `"block"`, `"net"`, ..: `VHostUserBackendType`.
    #[serde(rename = "type")]
    pub backend_type: &'static str,
    /// What options the program takes, e.g. `"read-only"`, `"blk-file"` for a block backend.
    pub features: &'static [&'static str],
}

impl Capabilities {
    /// Writes the JSON and a newline.
    ///
    /// # Errors
    /// `out` cannot be written to.
    pub fn print(&self, mut out: impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut out, self)?;
        writeln!(out)
    }
}

/// Do the arguments ask for capabilities? To be looked at before they are parsed, because the
/// convention is that all other arguments are ignored then, missing and wrong ones too.
pub fn capabilities_asked(args: impl IntoIterator<Item = OsString>) -> bool {
    args.into_iter()
        .take_while(|arg| arg != OsStr::new("--"))
        .any(|arg| arg == "--print-capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_json_as_qemu_has_them() {
        let mut out = Vec::new();
        Capabilities {
            backend_type: "block",
            features: &["read-only", "blk-file"],
        }
        .print(&mut out)
        .unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
        );
        assert!(out.ends_with(b"\n"));
    }

    #[test]
    fn the_question_is_found_among_wrong_arguments_but_not_after_the_dashes() {
        let asked = |args: &[&str]| capabilities_asked(args.iter().map(OsString::from));
        assert!(asked(&[
            "card",
            "--no-such",
            "--print-capabilities",
            "--fd=x"
        ]));
        assert!(!asked(&["card", "--", "--print-capabilities"]));
        assert!(!asked(&["card", "--print-capabilities-not"]));
    }
}
