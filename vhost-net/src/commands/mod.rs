//! The subcommands.

/// A line on standard output. Whoever reads it may leave early (`| head`): what the command does and
/// its exit status do not depend on that.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

mod capture;
mod control;
mod groups;
mod limits;
mod publish;
mod resolvers;
mod serve;
mod status;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use offload::telemetry::with_causes;

use crate::args::Command;

/// Runs a subcommand. The process's exit status.
pub fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Serve(args) => serve::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Publish(args) => publish::run(&args),
        Command::Limits(args) => limits::run(&args),
        Command::Groups(args) => groups::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-net: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is wrong", path.display()))
}
