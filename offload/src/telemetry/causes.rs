//! Errors for people.

use std::error::Error;

/// An error and its causes in one line.
#[must_use]
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        // Errors that show their source repeat it.
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Why {
        #[error("cannot serve")]
        Serve(#[source] Box<Why>),
        #[error("cannot open it ({0})")]
        Shows(#[source] Box<Why>),
        #[error("no such file")]
        Bottom,
    }

    #[test]
    fn causes_follow_in_one_line_and_none_is_said_twice() {
        let shows = Why::Shows(Box::new(Why::Bottom));
        assert_eq!(with_causes(&shows), "cannot open it (no such file)");
        let serve = Why::Serve(Box::new(shows));
        assert_eq!(
            with_causes(&serve),
            "cannot serve: cannot open it (no such file)"
        );
        assert_eq!(with_causes(&Why::Bottom), "no such file");
    }
}
