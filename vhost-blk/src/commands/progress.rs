//! How far a long command is: a bar on a terminal, nothing elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes.
pub(super) fn bytes(total: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(total).with_message(what);
    let style = ProgressStyle::with_template(
        "{msg} [{bar:40}] {binary_bytes} of {binary_total_bytes} ({binary_bytes_per_sec}, {eta})",
    );
    // A template that is wrong is found by the tests below, not by users.
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_sound() {
        let bar = bytes(10, "testing");
        bar.inc(5);
        assert_eq!((bar.position(), bar.length()), (5, Some(10)));
        bar.finish_and_clear();
    }
}
