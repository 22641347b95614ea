//! `host-shim run`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use host_shim::host::{self, Binaries};
use host_shim::plan::plan;
use host_shim::spec;
use host_shim::supervise::{End, EscapeReader, Limits, LogSink, Options, Outcome, RawTerminal, Vm};

/// Arguments of `run`.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// The VM spec, TOML.
    spec: PathBuf,
    /// Print the plan and start nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the plan, or the outcome, as JSON.
    #[arg(long)]
    json: bool,
    /// Folder of the cards' binaries, when they are not beside this one or in PATH.
    #[arg(long, value_name = "DIR")]
    card_dir: Option<PathBuf>,
    /// QEMU's binary, when it is not in PATH.
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// Folder of QEMU's firmware, for a QEMU that is not installed. May be repeated.
    #[arg(long, value_name = "DIR")]
    qemu_data: Vec<PathBuf>,
}

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(&args.spec)
        .with_context(|| format!("cannot read {}", args.spec.display()))?;
    let file = std::path::absolute(&args.spec)?;
    let spec = spec::parse(&text, &file).map_err(|error| anyhow::Error::new(*error))?;
    let binaries = Binaries {
        qemu: args.qemu.clone(),
        qemu_data: args.qemu_data.clone(),
        card_dir: args.card_dir.clone(),
    };
    let plan = plan(&spec, &host::look_around(&spec, &binaries)?)?;
    if args.dry_run {
        let text = if args.json {
            serde_json::to_string_pretty(&plan)?
        } else {
            plan.to_string()
        };
        writeln!(std::io::stdout(), "{}", text.trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let terminal = RawTerminal::new().context("cannot make the terminal raw")?;
    let log = stderr_log(terminal.is_some());
    for warning in &plan.warnings {
        log("shim", &format!("warning: {warning}"));
    }
    if terminal.is_some() {
        log("shim", "control-] asks the guest to power off");
    }
    let on_escape = || {
        // The signal thread below stops the VM, as for any other signal. Raising cannot fail.
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGINT);
    };
    let input: Box<dyn std::io::Read + Send> = if terminal.is_some() {
        Box::new(EscapeReader::new(std::io::stdin(), on_escape))
    } else {
        Box::new(std::io::stdin())
    };
    let options = Options {
        console: Box::new(std::io::stdout()),
        input: Some(input),
        log: Arc::clone(&log),
        limits: Limits::default(),
    };
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ])?;
    let vm = Vm::start(plan, options)?;
    let stopper = vm.stopper();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in signals.forever() {
                stopper.stop();
            }
        })?;
    let outcome = vm.wait();
    drop(terminal);
    report(&outcome, args.json)?;
    Ok(if outcome.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Log lines, prefixed with who wrote them. A raw terminal wants carriage returns.
pub(crate) fn stderr_log(is_raw: bool) -> LogSink {
    let end = if is_raw { "\r\n" } else { "\n" };
    Arc::new(move |who, line| {
        // Standard error that is gone is no reason to stop a guest.
        let _ = write!(std::io::stderr().lock(), "[{who}] {line}{end}");
    })
}

fn report(outcome: &Outcome, json: bool) -> std::io::Result<()> {
    let mut err = std::io::stderr().lock();
    let end = match outcome.end {
        End::GuestPoweredOff => "the guest powered off",
        End::Stopped => "stopped",
        End::Failed => "failed",
    };
    if json {
        let failures: Vec<_> = outcome.failures.iter().map(ToString::to_string).collect();
        let restarts = outcome.restarts;
        let value = serde_json::json!({ "end": end, "failures": failures, "restarts": restarts });
        return writeln!(err, "{value}");
    }
    for failure in &outcome.failures {
        writeln!(err, "[shim] {failure}")?;
    }
    writeln!(err, "[shim] {end}")
}
