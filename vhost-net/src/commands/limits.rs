//! `limits`: tells or changes what a running interface may carry.

use anyhow::{Context, bail};
use offload::cli::format_size;
use offload::control::ControlClient;
use offload::limit::in_words;
use serde_json::Value;

use crate::args::LimitsArgs;
use crate::device::limits::{DirectionSpec, LimitsSpec};

pub(super) fn run(args: &LimitsArgs) -> anyhow::Result<()> {
    let spec = args.limits.spec();
    let wanted = match (spec != LimitsSpec::default(), args.none) {
        (true, true) => bail!("--none lifts all limits; leave it out to set some"),
        (false, false) => Value::Null,
        _ => serde_json::to_value(spec).context("the limits as JSON")?,
    };
    let told = ControlClient::connect(&args.control.control_socket)?.call("limits", wanted)?;
    if args.json {
        say!("{told}");
        return Ok(());
    }
    let spec: LimitsSpec =
        serde_json::from_value(told).context("the card's answer is not understood")?;
    say!("{}", text(&spec));
    Ok(())
}

/// One line for each kind of limit.
fn text(spec: &LimitsSpec) -> String {
    let of = |name: &str, spec: &DirectionSpec| {
        let packets = in_words(spec.pps, spec.pps_burst, |n| format!("{n} a second"));
        let bytes = in_words(spec.bps, spec.bps_burst, |n| {
            format!("{} a second", format_size(n))
        });
        format!("{name:<12}packets  {packets}\n{:<12}bytes    {bytes}", "")
    };
    format!(
        "{}\n{}",
        of("to guest", &spec.rx),
        of("from guest", &spec.tx)
    )
}

#[cfg(test)]
mod tests {
    use offload::limit::Burst;

    use super::*;

    #[test]
    fn limits_are_told_with_their_units() {
        let burst = |rate, seconds| Some(Burst { rate, seconds });
        let spec = LimitsSpec {
            rx: DirectionSpec {
                pps: Some(3000),
                pps_burst: burst(10_000, 60),
                bps: None,
                bps_burst: None,
            },
            tx: DirectionSpec {
                bps: Some(100 << 20),
                bps_burst: burst(1 << 30, 5),
                ..DirectionSpec::default()
            },
        };
        assert_eq!(
            text(&spec),
            "to guest    packets  3000 a second, burst 10000 a second for 60 s\n            \
             bytes    no limit\n\
             from guest  packets  no limit\n            \
             bytes    100 MiB a second, burst 1 GiB a second for 5 s"
        );
    }
}
