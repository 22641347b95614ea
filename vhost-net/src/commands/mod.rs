//! The subcommands.

mod serve;

use std::process::ExitCode;

use offload::telemetry::with_causes;

use crate::args::Command;

/// Runs a subcommand. The process's exit status.
pub fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Serve(args) => serve::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-net: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
