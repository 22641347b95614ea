//! `limits`: tells or changes what a served volume may use, over the card's control socket.

use anyhow::{Context, bail};
use offload::cli::format_size;
use offload::control::ControlClient;
use offload::limit::{Burst, in_words};
use serde_json::Value;

use crate::args::LimitsArgs;
use crate::device::limits::Wire;

pub(super) fn run(args: &LimitsArgs) -> anyhow::Result<()> {
    let rates = args.limits.rates();
    let wanted = match (rates.is_limited(), args.none) {
        (true, true) => bail!("--none lifts all limits; leave it out to set some"),
        (false, false) => Value::Null,
        _ => serde_json::to_value(Wire::from(rates)).context("the limits as JSON")?,
    };
    let told = ControlClient::connect(&args.control_socket)?.call("limits", wanted)?;
    if args.json {
        say!("{told}");
        return Ok(());
    }
    let wire: Wire = serde_json::from_value(told).context("the card's answer is not understood")?;
    say!("{}", text(&wire).trim_end());
    Ok(())
}

/// One line for each kind of limit.
fn text(wire: &Wire) -> String {
    let line = |name, rate: Option<u64>, burst: Option<Burst>, show: &dyn Fn(u64) -> String| {
        format!("{name:<13}{}\n", in_words(rate, burst, show))
    };
    let mut text = line("operations", wire.iops, wire.iops_burst, &|n| {
        format!("{n} a second")
    });
    if let Some(len) = wire.io_size {
        text += &format!("{:<13}each up to {}\n", "", format_size(len.into()));
    }
    text + &line("bytes", wire.bps, wire.bps_burst, &|n| {
        format!("{} a second", format_size(n))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_with_their_units() {
        let burst = |rate, seconds| Some(Burst { rate, seconds });
        let wire = Wire {
            iops: Some(3000),
            iops_burst: burst(10_000, 60),
            bps: Some(100 << 20),
            bps_burst: None,
            io_size: Some(16 << 10),
        };
        assert_eq!(
            text(&wire),
            "operations   3000 a second, burst 10000 a second for 60 s\n             \
             each up to 16 KiB\nbytes        100 MiB a second\n"
        );
        assert_eq!(
            text(&Wire::default()),
            "operations   no limit\nbytes        no limit\n"
        );
    }
}
