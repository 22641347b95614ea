//! `host-shim`: plans, starts, supervises cards and QEMU.

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use host_shim::accel;

mod demo;
mod resize;
mod run;

/// Plans, starts and supervises offload cards and QEMU.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the VM that a file describes, until it powers off or is stopped.
    ///
    /// Its console is on standard output and input. SIGINT and SIGTERM (and control-] where the
    /// console is a terminal) ask the guest to power off; a second one makes QEMU quit.
    Run(run::RunArgs),
    /// Make a disk of a VM that runs larger; its guest sees the new size at once.
    ///
    /// What is on the disk grows with the guest's own commands, like resize2fs. Disks do not shrink.
    /// Exit status 1: the card refuses.
    Resize(resize::ResizeArgs),
    /// Show the whole path: a sealed volume, a guest on it, and what an attacker gets.
    ///
    /// Installs the Debian packages it needs (and says which), builds the card if this is run from
    /// its sources, and works in a folder under /var/tmp that is removed in the end.
    Demo(demo::DemoArgs),
    /// Measure whether /dev/kvm runs guests at native speed. Exit status 1: it does not.
    ProbeKvm {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Resize(args) => resize::resize(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::ProbeKvm { json } => probe_kvm(json),
    };
    result.unwrap_or_else(|error| {
        // Nobody is left to be told when standard error is gone.
        let _ = match error.downcast::<host_shim::spec::SpecError>() {
            Ok(spec) => writeln!(std::io::stderr(), "{:?}", miette::Report::new(spec)),
            Err(error) => writeln!(std::io::stderr(), "host-shim: {error:#}"),
        };
        ExitCode::from(2)
    })
}

fn probe_kvm(json: bool) -> anyhow::Result<ExitCode> {
    // A child asked for JSON measures; whoever is asked by people starts that child.
    let verdict = if json {
        accel::measure()
    } else {
        host_shim::host::probe_kvm()
    };
    let usable = verdict.is_usable();
    let text = if json {
        serde_json::to_string(&verdict)?
    } else {
        verdict.to_string()
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
