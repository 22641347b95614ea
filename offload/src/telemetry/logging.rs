//! Where log lines go: to stderr, as text or as JSON lines.
//!
//! A card never writes a log file and never daemonises; whoever starts it (the shim, systemd,
//! a terminal) owns the stream. The text form leaves the time out when the journal reads it,
//! which stamps lines itself, and has colours on a terminal only. Control characters in what a
//! guest makes us print are escaped by `tracing-subscriber`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// The environment variable that overrides `-v` and `-q`, e.g. `info,offload::vhost_user=trace`.
pub const LOG_ENV: &str = "OFFLOAD_LOG";

/// What `--help` has these options under, apart from a program's own.
const HEADING: &str = "Log";

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The options that every program of the house has.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LogArgs {
    /// Say more; twice: everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = HEADING)]
    pub verbose: u8,
    /// Say warnings and errors only; twice: errors only
    #[arg(short, long, action = clap::ArgAction::Count, conflicts_with = "verbose", global = true,
        help_heading = HEADING)]
    pub quiet: u8,
    /// Form of the log lines on stderr
    #[arg(
        long,
        value_enum,
        default_value_t,
        global = true,
        value_name = "FORMAT",
        help_heading = HEADING
    )]
    pub log_format: LogFormat,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter in the environment cannot be read.
    #[error("{LOG_ENV}={text:?} is no log filter; write it like `info,offload=debug`")]
    Filter {
        /// What was found.
        text: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The process has a subscriber already.
    #[error("logging is set up already")]
    Twice(#[source] TryInitError),
}

/// Sends log lines to stderr. Call once, before the first thread.
///
/// # Errors
/// The environment's filter is wrong, or logging was set up before.
pub fn init_logging(args: &LogArgs) -> Result<(), LoggingError> {
    let environment = std::env::var_os(LOG_ENV).map(|text| text.to_string_lossy().into_owned());
    let filter = filter(args, environment.as_deref())?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
        LogFormat::Text => {
            let builder = builder
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false);
            if std::env::var_os("JOURNAL_STREAM").is_some() {
                builder.without_time().finish().try_init()
            } else {
                builder.finish().try_init()
            }
        }
    }
    .map_err(LoggingError::Twice)
}

fn filter(args: &LogArgs, environment: Option<&str>) -> Result<EnvFilter, LoggingError> {
    let text = match (environment, args.verbose, args.quiet) {
        (Some(text), ..) if !text.is_empty() => text,
        (_, 0, 0) => "info",
        (_, 0, 1) => "warn",
        (_, 0, _) => "error",
        (_, 1, _) => "debug",
        _ => "trace",
    };
    EnvFilter::try_new(text).map_err(|source| LoggingError::Filter {
        text: text.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(verbose: u8, quiet: u8, environment: Option<&str>) -> String {
        filter(
            &LogArgs {
                verbose,
                quiet,
                ..LogArgs::default()
            },
            environment,
        )
        .unwrap()
        .to_string()
    }

    #[test]
    fn verbosity_chooses_the_level_and_the_environment_overrides_it() {
        assert_eq!(level(0, 0, None), "info");
        assert_eq!(level(0, 0, Some("")), "info");
        assert_eq!(level(1, 0, None), "debug");
        assert_eq!(level(9, 0, None), "trace");
        assert_eq!(level(0, 1, None), "warn");
        assert_eq!(level(0, 2, None), "error");
        assert_eq!(level(2, 0, Some("warn")), "warn");
    }

    #[test]
    fn a_wrong_filter_is_refused_and_named() {
        let error = filter(&LogArgs::default(), Some("offload=loud")).unwrap_err();
        assert!(error.to_string().contains("offload=loud"), "{error}");
    }
}
