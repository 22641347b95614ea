//! Byte counts as people write them.

/// Units by their letter, each 1024 times the one before.
const LETTERS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// There is nothing.
    #[error("a size is missing; write it like 10G, 512M or 4096")]
    Empty,
    /// It does not start with a number.
    #[error("{0:?} is no size: it has to start with a number, like 10G, 512M or 4096")]
    NoNumber(String),
    /// The unit is not known.
    #[error("{0:?} has no known unit; use K, M, G, T, P or E (powers of 1024, also KiB, MiB, ..)")]
    Unit(String),
    /// KB, MB and so on, which mean powers of 1000 to some.
    #[error(
        "{text:?} could mean powers of 1000 or of 1024; write {letter} or {letter}iB for powers of 1024"
    )]
    Ambiguous {
        /// What was given.
        text: String,
        /// The letter of the unit.
        letter: char,
    },
    /// It does not come out at whole bytes.
    #[error("{0:?} is not a whole number of bytes")]
    Fraction(String),
    /// It does not fit in 64 bits.
    #[error("{0:?} is too large: sizes end below 16E")]
    TooLarge(String),
}

/// Reads a size in bytes: a decimal number and a unit `B`, `K`, `M`, `G`, `T`, `P`, `E` or `KiB`,
/// `MiB`, .. (powers of 1024, in either case), or none for bytes. `1.5G` is fine, since it comes
/// out at whole bytes.
///
/// # Errors
/// The text is no such number, or larger than 64 bits.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(SizeError::Empty);
    }
    let own = || text.to_owned();
    let split = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = unit_shift(unit.trim_start(), text)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(SizeError::NoNumber(own()));
    }
    let scale = |digits: u64| {
        digits
            .checked_shl(shift)
            .filter(|scaled| scaled >> shift == digits)
    };
    // Only digits are left, so all that can go wrong is their number.
    let whole = whole
        .parse()
        .ok()
        .and_then(scale)
        .ok_or_else(|| SizeError::TooLarge(own()))?;
    let part = fraction_bytes(fraction, shift).ok_or_else(|| SizeError::Fraction(own()))?;
    whole
        .checked_add(part)
        .ok_or_else(|| SizeError::TooLarge(own()))
}

/// `0.fraction << shift` in bytes, if that is whole.
fn fraction_bytes(fraction: &str, shift: u32) -> Option<u64> {
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Some(0);
    }
    // At most 60 binary digits after the point make a whole number, so no more decimal ones do,
    // and 19 of them fit. More precise sizes are written in a smaller unit.
    if fraction.len() > 19 {
        return None;
    }
    let digits = u128::from(fraction.parse::<u64>().ok()?);
    let scaled = digits.checked_shl(shift)?;
    let divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    if scaled % divisor != 0 {
        return None;
    }
    u64::try_from(scaled / divisor).ok()
}

fn unit_shift(unit: &str, text: &str) -> Result<u32, SizeError> {
    let unknown = || SizeError::Unit(text.to_owned());
    let mut chars = unit.chars();
    let Some(first) = chars.next() else {
        return Ok(0);
    };
    let letter = first.to_ascii_uppercase();
    let rest = chars.as_str();
    if letter == 'B' && rest.is_empty() {
        return Ok(0);
    }
    if !first.is_ascii_alphabetic() {
        return Err(if unit == text.trim() {
            SizeError::NoNumber(text.to_owned())
        } else {
            unknown()
        });
    }
    let position = LETTERS.into_iter().position(|known| known == letter);
    match (position, rest.to_ascii_lowercase().as_str()) {
        (Some(position), "" | "ib") => {
            // At most 6.
            Ok(10 * (u32::try_from(position).unwrap_or(0) + 1))
        }
        (Some(_), "b") => Err(SizeError::Ambiguous {
            text: text.to_owned(),
            letter,
        }),
        _ => Err(unknown()),
    }
}

/// A size for people: exact (`10 GiB`, `4097 B`) where that is short, else with two decimals and
/// marked as not exact (`~1.46 TiB`).
#[must_use]
pub fn format_size(bytes: u64) -> String {
    let power = bytes.checked_ilog2().unwrap_or(0) / 10;
    if power == 0 {
        return format!("{bytes} B");
    }
    let letter = usize::try_from(power - 1)
        .ok()
        .and_then(|i| LETTERS.get(i))
        .copied();
    let letter = letter.unwrap_or('E');
    let unit = 1_u64 << (10 * power);
    if bytes.is_multiple_of(unit) {
        return format!("{} {letter}iB", bytes / unit);
    }
    if bytes < 1 << 14 {
        return format!("{bytes} B");
    }
    let hundredths = u128::from(bytes) * 100 / u128::from(unit);
    let exact = hundredths * u128::from(unit) == u128::from(bytes) * 100;
    let mark = if exact { "" } else { "~" };
    format!(
        "{mark}{}.{:02} {letter}iB",
        hundredths / 100,
        hundredths % 100
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_with_units_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("10G", 10 << 30),
            ("512M", 512 << 20),
            ("512 MiB", 512 << 20),
            ("1TiB", 1 << 40),
            ("1t", 1 << 40),
            ("64k", 65536),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            (" 2P ", 2 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        let own = str::to_owned;
        for (text, error) in [
            ("", SizeError::Empty),
            ("  ", SizeError::Empty),
            ("G", SizeError::NoNumber(own("G"))),
            ("-1", SizeError::NoNumber(own("-1"))),
            (".5G", SizeError::NoNumber(own(".5G"))),
            ("1.G", SizeError::NoNumber(own("1.G"))),
            ("1.2.3G", SizeError::NoNumber(own("1.2.3G"))),
            ("10X", SizeError::Unit(own("10X"))),
            ("10Gi", SizeError::Unit(own("10Gi"))),
            ("10G5", SizeError::Unit(own("10G5"))),
            ("10 10", SizeError::Unit(own("10 10"))),
            ("1e3", SizeError::Unit(own("1e3"))),
            ("10\u{661}", SizeError::Unit(own("10\u{661}"))),
            (
                "10GB",
                SizeError::Ambiguous {
                    text: own("10GB"),
                    letter: 'G',
                },
            ),
            ("1.5", SizeError::Fraction(own("1.5"))),
            ("0.3G", SizeError::Fraction(own("0.3G"))),
            ("16E", SizeError::TooLarge(own("16E"))),
            (
                "18446744073709551616",
                SizeError::TooLarge(own("18446744073709551616")),
            ),
            (
                "99999999999999999999999999T",
                SizeError::TooLarge(own("99999999999999999999999999T")),
            ),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_short_and_honest() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (4097, "4097 B"),
            (10 << 30, "10 GiB"),
            (3 << 29, "1.50 GiB"),
            ((1 << 40) + 1, "~1.00 TiB"),
            (u64::MAX, "~15.99 EiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_exact_sizes_read_back(text in ".{0,30}", bytes in any::<u64>(), zeros in 0..60_u32) {
            let _ = parse_size(&text);
            let bytes = bytes >> zeros;
            let shown = format_size(bytes);
            if !shown.starts_with('~') {
                prop_assert_eq!(parse_size(&shown), Ok(bytes));
            }
        }
    }
}
