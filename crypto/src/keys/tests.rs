use super::*;
use crate::golden;

fn kek(byte: u8) -> Kek {
    Kek::from_secret(Secret32::take(&mut [byte; 32]))
}

fn dek(byte: u8) -> Dek {
    Dek::from_secret(Secret32::take(&mut [byte; 32]))
}

#[test]
fn generated_keys_differ_and_are_not_zero() {
    let (one, other) = (Secret32::generate().unwrap(), Secret32::generate().unwrap());
    assert_ne!(one, other);
    assert_ne!(one.expose(), &[0; 32]);
    assert_ne!(Dek::generate().unwrap(), Dek::generate().unwrap());
    assert_ne!(
        SessionKey::generate().unwrap(),
        SessionKey::generate().unwrap()
    );
}

#[test]
fn take_wipes_the_bytes_it_takes() {
    let mut bytes = [7; 32];
    let secret = Secret32::take(&mut bytes);
    assert_eq!(bytes, [0; 32]);
    assert_eq!(secret.expose(), &[7; 32]);
}

#[test]
fn debug_never_shows_key_bytes() {
    let secret = Secret32::take(&mut [0xab; 32]);
    assert_eq!(format!("{secret:?}"), "[REDACTED]");
    assert_eq!(format!("{:?}", kek(0xab)), "Kek([REDACTED])");
    assert_eq!(format!("{:#?}", dek(0xab)), "Dek([REDACTED])");
    let session = SessionKey::from_secret(secret);
    assert_eq!(format!("{session:?}"), "SessionKey([REDACTED])");
}

#[test]
fn secrets_that_differ_in_one_bit_are_not_equal() {
    let one = Secret32::take(&mut [9; 32]);
    assert_eq!(one, Secret32::take(&mut [9; 32]));
    for bit in 0..256 {
        let mut bytes = [9; 32];
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(one, Secret32::take(&mut bytes));
    }
}

#[test]
fn a_wrapped_key_opens_with_the_same_key_and_context_only() {
    let dek = dek(1);
    let wrapped = kek(2).wrap(&dek, b"here").unwrap();
    assert_eq!(kek(2).unwrap_dek(&wrapped, b"here").unwrap(), dek);
    assert_eq!(kek(3).unwrap_dek(&wrapped, b"here"), Err(UnwrapError));
    assert_eq!(kek(2).unwrap_dek(&wrapped, b"there"), Err(UnwrapError));
    assert_eq!(kek(2).unwrap_dek(&wrapped, b""), Err(UnwrapError));
}

#[test]
fn every_flipped_bit_of_a_wrapped_key_is_refused() {
    let wrapped = kek(2).wrap(&dek(1), b"here").unwrap();
    for bit in 0..WRAPPED_LEN * 8 {
        let mut bytes = *wrapped.as_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let bent = Wrapped::from_bytes(bytes);
        assert_eq!(kek(2).unwrap_dek(&bent, b"here"), Err(UnwrapError));
    }
}

#[test]
fn wrapping_twice_gives_different_bytes() {
    let (kek, dek) = (kek(1), dek(2));
    let wraps = [kek.wrap(&dek, b"").unwrap(), kek.wrap(&dek, b"").unwrap()];
    assert_ne!(wraps[0].as_bytes()[..12], wraps[1].as_bytes()[..12]);
    assert_ne!(wraps[0].as_bytes()[12..], wraps[1].as_bytes()[12..]);
}

#[test]
fn a_wrapped_session_key_does_not_open_as_a_volume_key() {
    let session = SessionKey::from_secret(Secret32::take(&mut [1; 32]));
    let wrapped = dek(5).wrap_session(&session, b"here").unwrap();
    assert_eq!(dek(5).unwrap_session(&wrapped, b"here").unwrap(), session);
    assert_eq!(kek(5).unwrap_dek(&wrapped, b"here"), Err(UnwrapError));
    let wrapped = kek(5).wrap(&dek(1), b"here").unwrap();
    assert_eq!(dek(5).unwrap_session(&wrapped, b"here"), Err(UnwrapError));
}

#[test]
fn golden_a_session_key_wrapped_elsewhere_opens() {
    let dek = Dek::from_secret(golden::secret("dek"));
    let wrapped = Wrapped::from_bytes(golden::array("wrapped_session"));
    let session = dek
        .unwrap_session(&wrapped, &golden::bytes("context"))
        .unwrap();
    assert_eq!(session.secret(), &golden::secret("session"));
}

#[test]
fn derivation_is_hkdf_sha256_of_rfc_5869() {
    // HKDF-Expand's output is a prefix of a longer one, so the first 32 of test case 1's 42 bytes apply; its
    // input key has 22 bytes, which `derive` does not take, so this checks the parts as they are used there.
    let mut okm = [0; 32];
    let salt: Vec<u8> = (0..=0x0c).collect();
    let info: Vec<u8> = (0xf0..=0xf9).collect();
    Hkdf::<Sha256>::new(Some(&salt), &[0x0b; 22])
        .expand(&info, &mut okm)
        .unwrap();
    let expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf";
    assert_eq!(okm.as_slice(), golden::unhex(expected));
}
