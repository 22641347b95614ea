//! Medians and spreads of a handful of runs.

use serde::Serialize;

/// The middle of some values and how far they spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of these values; `None` without any.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let upper = *sorted.get(half)?;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(*sorted.get(half - 1)?, upper)
        } else {
            upper
        };
        Some(Self { median, min, max })
    }

    /// Of the ratios of values that were taken in the same round.
    #[must_use]
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let pairs = ours.iter().zip(theirs);
        Self::of(pairs.filter(|(_, b)| **b > 0.0).map(|(a, b)| a / b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let spread = Spread::of([9.0, 1.0, 4.0]).unwrap();
        assert_eq!(spread.median, 4.0);
        assert_eq!((spread.min, spread.max), (1.0, 9.0));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of([8.0, 1.0, 2.0, 4.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of([7.0]).unwrap().median, 7.0);
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of_ratios(&[1.0], &[]), None);
        assert_eq!(Spread::of_ratios(&[1.0], &[0.0]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was twice as slow in the second round: the ratio does not move.
        let spread = Spread::of_ratios(&[100.0, 50.0, 100.0], &[200.0, 100.0, 200.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (0.5, 0.5, 0.5));
    }
}
