//! Users as people name them on the command line.

use crate::sandbox::User;

/// Means "as it is" to the kernel (setresuid(2)), so that a card would stay root.
const UNCHANGED: u32 = u32::MAX;

/// Reads `UID` or `UID:GID`, both in decimal; a group that is left out has the user's number. Names
/// are not looked up: a card does not read the host's user database.
///
/// # Errors
/// A text that says what is wrong.
pub fn parse_user(text: &str) -> Result<User, String> {
    let wrong = || "a user is UID or UID:GID in numbers, like 1000:1000".to_owned();
    let number = |text: &str| {
        let number = text.parse::<u32>().ok();
        number.filter(|&n| n != UNCHANGED).ok_or_else(wrong)
    };
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    Ok(User {
        uid: number(uid)?,
        gid: number(gid)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_one_number_or_two() {
        let of = |uid, gid| Ok(User { uid, gid });
        assert_eq!(parse_user("65534"), of(65534, 65534));
        assert_eq!(parse_user("12:34"), of(12, 34));
        for wrong in [
            "",
            "root",
            ":",
            "1:",
            ":1",
            "1:2:3",
            "-1",
            "4294967295",
            "1:4294967295",
            "4294967296",
        ] {
            let error = parse_user(wrong).unwrap_err();
            assert!(error.contains("UID:GID"), "{wrong}: {error}");
        }
    }
}
