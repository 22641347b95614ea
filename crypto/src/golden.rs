//! Reads `tests/data/golden.json`, for tests.

use std::collections::BTreeMap;

use crate::keys::Secret32;

pub(crate) fn unhex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2), "{digits}");
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

pub(crate) fn bytes(name: &str) -> Vec<u8> {
    let text = include_str!("../tests/data/golden.json");
    let all: BTreeMap<String, String> = serde_json::from_str(text).unwrap();
    unhex(&all[name])
}

pub(crate) fn array<const N: usize>(name: &str) -> [u8; N] {
    bytes(name).try_into().unwrap()
}

pub(crate) fn secret(name: &str) -> Secret32 {
    Secret32::take(&mut array(name))
}
