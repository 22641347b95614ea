//! The subcommands: each opens what it needs, calls the library, and says what came of it.
//!
//! Errors come back as one chain and are printed once, here, in one line that says what to do
//! next.

/// A line on standard output. Whoever reads it may leave early (`| head`): what the command does and
/// its exit status do not depend on that.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

mod check;
mod compact;
mod create;
mod export;
mod import;
mod info;
mod limits;
mod open;
mod progress;
mod pump;
mod rehome;
mod repair;
mod resize;
mod serve;

use std::process::ExitCode;

use offload::telemetry::with_causes;

use crate::args::Command;

/// Runs a subcommand. The process's exit status.
pub fn run(command: Command) -> ExitCode {
    // A check that could not be made must not look like one that found damage.
    let mut failure = 1;
    let result = match command {
        Command::Create(args) => create::run(&args).map(|()| 0),
        Command::Serve(args) => serve::run(&args).map(|()| 0),
        Command::Limits(args) => limits::run(&args).map(|()| 0),
        Command::Resize(args) => resize::run(&args).map(|()| 0),
        Command::Info(args) => info::run(&args).map(|()| 0),
        Command::Check(args) => {
            failure = 2;
            check::run(&args).map(|is_clean| u8::from(!is_clean))
        }
        Command::Import(args) => import::run(&args).map(|()| 0),
        Command::Compact(args) => compact::run(&args).map(|()| 0),
        Command::Export(args) => export::run(&args).map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vhost-blk: {}", with_causes(error.as_ref()));
            ExitCode::from(failure)
        }
    }
}
