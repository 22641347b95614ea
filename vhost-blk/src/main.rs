//! `vhost-blk`: see the crate's documentation.

use std::process::ExitCode;

use clap::Parser;
use offload::cli::{Capabilities, capabilities_asked};
use offload::telemetry::init_logging;
use vhost_blk::args::Cli;
use vhost_blk::commands;

const CAPABILITIES: Capabilities = Capabilities {
    backend_type: "block",
    features: &["read-only", "blk-file"],
};

fn main() -> ExitCode {
    // Other arguments, missing and wrong ones too, do not matter then.
    if capabilities_asked(std::env::args_os()) {
        return match CAPABILITIES.print(std::io::stdout().lock()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let cli = Cli::parse();
    // Before any key is read.
    if let Err(error) = crypto::hygiene::harden_process() {
        eprintln!("vhost-blk: cannot keep keys out of core dumps: {error}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = init_logging(&cli.log) {
        eprintln!("vhost-blk: {error}");
        return ExitCode::FAILURE;
    }
    commands::run(cli.command)
}
