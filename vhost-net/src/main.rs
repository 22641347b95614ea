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

fn main() -> ExitCode {
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
