//! `vhost-net`: see the crate's documentation.

use std::process::ExitCode;

use clap::Parser;
use offload::cli::{Capabilities, capabilities_asked};
use offload::telemetry::init_logging;
use vhost_net::args::Cli;
use vhost_net::commands;

const CAPABILITIES: Capabilities = Capabilities {
    backend_type: "net",
    features: &[],
};

/// Buffers of this many bytes are mapped by themselves: pages that a flow never needed are never
/// there, and those that it did need are gone with it. glibc's own threshold grows with the first
/// such buffer that is freed; later ones would come from the heap, to be zeroed whole.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 128 << 10;

fn main() -> ExitCode {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) sets a number; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
    }
    // Other arguments, missing and wrong ones too, do not matter then.
    if capabilities_asked(std::env::args_os()) {
        return match CAPABILITIES.print(std::io::stdout().lock()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let cli = Cli::parse();
    if let Err(error) = init_logging(&cli.log) {
        eprintln!("vhost-net: {error}");
        return ExitCode::FAILURE;
    }
    commands::run(cli.command)
}
