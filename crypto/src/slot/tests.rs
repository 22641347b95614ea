use super::*;
use crate::golden;
use crate::keys::Secret32;
use zeroize::Zeroizing;

const CONTEXT: &[u8] = b"volume 7, slot 0";

fn key_file(byte: u8) -> KeyMaterial {
    KeyMaterial::File(Secret32::take(&mut [byte; 32]))
}

fn passphrase(text: &str) -> KeyMaterial {
    KeyMaterial::Passphrase(Zeroizing::new(text.as_bytes().to_vec()))
}

fn seal_fast(material: &KeyMaterial, dek: &Dek) -> [u8; SLOT_LEN] {
    seal(material, dek, CONTEXT, Argon2Params::fast_for_tests()).unwrap()
}

#[test]
fn a_slot_opens_with_the_material_that_sealed_it() {
    for material in [key_file(1), passphrase("secret")] {
        let dek = Dek::generate().unwrap();
        let slot = seal_fast(&material, &dek);
        assert_eq!(open(&slot, &material, CONTEXT).unwrap(), dek);
    }
}

#[test]
fn golden_slots_made_elsewhere_open() {
    let context = golden::bytes("context");
    let dek = Dek::from_secret(golden::secret("dek"));
    let material = KeyMaterial::File(golden::secret("key"));
    let slot = golden::array("slot_key_file");
    assert_eq!(open(&slot, &material, &context), Ok(dek));

    let dek = Dek::from_secret(golden::secret("dek"));
    let material = KeyMaterial::Passphrase(Zeroizing::new(golden::bytes("passphrase")));
    let slot = golden::array("slot_passphrase");
    assert_eq!(open(&slot, &material, &context), Ok(dek));
}

#[test]
fn the_layout_of_a_fresh_slot_is_as_documented() {
    let params = Argon2Params {
        memory_kib: 0x0102,
        passes: 3,
        lanes: 2,
    };
    let dek = Dek::generate().unwrap();
    let slot = seal(&passphrase("x"), &dek, CONTEXT, params).unwrap();
    assert_eq!(slot[..16], [2, 0, 1, 0, 2, 1, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0]);
    assert_ne!(slot[16..48], [0; 32]);
    assert_ne!(slot[48..60], [0; 12]);
    assert_eq!(slot[108..], [0; 148]);

    let slot = seal(&key_file(1), &dek, CONTEXT, params).unwrap();
    assert_eq!(slot[..16], [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn two_slots_of_one_key_share_neither_salt_nor_ciphertext() {
    let (material, dek) = (key_file(1), Dek::generate().unwrap());
    let (one, other) = (seal_fast(&material, &dek), seal_fast(&material, &dek));
    assert_ne!(one[16..48], other[16..48]);
    assert_ne!(one[60..108], other[60..108]);
}

#[test]
fn a_wrong_key_or_passphrase_is_refused_with_a_clear_error() {
    let dek = Dek::generate().unwrap();
    let slot = seal_fast(&key_file(1), &dek);
    let error = open(&slot, &key_file(2), CONTEXT).unwrap_err();
    assert_eq!(error, SlotError::WrongKey);
    assert!(error.to_string().contains("wrong key or passphrase"));
    let slot = seal_fast(&passphrase("secret"), &dek);
    for wrong in ["Secret", "secret ", "secre", ""] {
        let opened = open(&slot, &passphrase(wrong), CONTEXT);
        assert_eq!(opened, Err(SlotError::WrongKey), "{wrong:?}");
    }
}

#[test]
fn a_slot_does_not_open_in_another_place() {
    let slot = seal_fast(&key_file(1), &Dek::generate().unwrap());
    for context in [&b"volume 8, slot 0"[..], b"", b"volume 7, slot 00"] {
        assert_eq!(open(&slot, &key_file(1), context), Err(SlotError::WrongKey));
    }
}

#[test]
fn the_wrong_kind_of_key_is_told_which_option_to_give() {
    let dek = Dek::generate().unwrap();
    let slot = seal_fast(&passphrase("secret"), &dek);
    let error = open(&slot, &key_file(1), CONTEXT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this volume was sealed with a passphrase; give --passphrase-file"
    );
    let slot = seal_fast(&key_file(1), &dek);
    let error = open(&slot, &passphrase("secret"), CONTEXT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this volume was sealed with a key file; give --key-file"
    );
}

#[test]
fn an_empty_slot_says_so() {
    assert_eq!(
        open(&[0; SLOT_LEN], &key_file(1), CONTEXT),
        Err(SlotError::Empty)
    );
    assert_eq!(describe(&[0; SLOT_LEN]), None);
}

#[test]
fn every_flipped_bit_of_a_key_file_slot_is_refused() {
    let slot = seal_fast(&key_file(1), &Dek::generate().unwrap());
    for bit in 0..SLOT_LEN * 8 {
        let mut bent = slot;
        bent[bit / 8] ^= 1 << (bit % 8);
        assert!(open(&bent, &key_file(1), CONTEXT).is_err(), "bit {bit}");
    }
}

#[test]
fn every_flipped_bit_of_a_passphrase_slot_is_refused() {
    let material = passphrase("secret");
    let slot = seal_fast(&material, &Dek::generate().unwrap());
    // Memory bits 13 to 20 ask for 8 MiB to 1 GiB, which is granted and takes long, and ends like bit 12.
    let costly = 4 * 8 + 13..=4 * 8 + 20;
    for bit in (0..SLOT_LEN * 8).filter(|bit| !costly.contains(bit)) {
        let mut bent = slot;
        bent[bit / 8] ^= 1 << (bit % 8);
        assert!(open(&bent, &material, CONTEXT).is_err(), "bit {bit}");
    }
}

#[test]
fn a_hostile_cost_is_refused_before_any_memory_is_taken() {
    let material = passphrase("secret");
    let slot = seal_fast(&material, &Dek::generate().unwrap());
    let max = Argon2Params::MAX;
    let fast = Argon2Params::fast_for_tests();
    for bad in [
        Argon2Params {
            memory_kib: max.memory_kib + 1,
            ..fast
        },
        Argon2Params {
            memory_kib: u32::MAX,
            ..fast
        },
        Argon2Params {
            memory_kib: 7,
            ..fast
        },
        Argon2Params {
            memory_kib: 0,
            ..fast
        },
        Argon2Params {
            passes: max.passes + 1,
            ..fast
        },
        Argon2Params {
            passes: u32::MAX,
            ..fast
        },
        Argon2Params { passes: 0, ..fast },
        Argon2Params {
            lanes: max.lanes + 1,
            memory_kib: 1024,
            ..fast
        },
        Argon2Params {
            lanes: u32::MAX,
            ..fast
        },
        Argon2Params { lanes: 8, ..fast },
        Argon2Params { lanes: 0, ..fast },
    ] {
        let mut bent = slot;
        bent[4..8].copy_from_slice(&bad.memory_kib.to_le_bytes());
        bent[8..12].copy_from_slice(&bad.passes.to_le_bytes());
        bent[12..16].copy_from_slice(&bad.lanes.to_le_bytes());
        let opened = open(&bent, &material, CONTEXT);
        assert_eq!(opened, Err(SlotError::Params(bad)));
        let sealed = seal(&material, &Dek::generate().unwrap(), CONTEXT, bad);
        assert_eq!(sealed, Err(SealError::Params(bad)));
        // With a key file the cost means nothing.
        seal(&key_file(1), &Dek::generate().unwrap(), CONTEXT, bad).unwrap();
    }
    assert!(max.is_bearable() && fast.is_bearable() && Argon2Params::default().is_bearable());
}

#[test]
fn a_kind_or_version_from_the_future_is_named() {
    let mut slot = seal_fast(&key_file(1), &Dek::generate().unwrap());
    slot[2] = 2;
    let expected = SlotError::Unsupported {
        kind: 1,
        version: 2,
    };
    assert_eq!(open(&slot, &key_file(1), CONTEXT), Err(expected));
    slot[..4].copy_from_slice(&[9, 0, 1, 0]);
    let expected = SlotError::Unsupported {
        kind: 9,
        version: 1,
    };
    assert_eq!(open(&slot, &key_file(1), CONTEXT), Err(expected));
    assert_eq!(describe(&slot), None);
}

#[test]
fn describe_tells_kind_and_cost() {
    let dek = Dek::generate().unwrap();
    let info = describe(&seal_fast(&key_file(1), &dek)).unwrap();
    assert_eq!((info.kind, info.argon2), (SlotKind::KeyFile, None));
    let info = describe(&seal_fast(&passphrase("x"), &dek)).unwrap();
    assert_eq!(info.kind, SlotKind::Passphrase);
    assert_eq!(info.argon2, Some(Argon2Params::fast_for_tests()));
    assert_eq!(
        (info.version, info.kind.to_string()),
        (1, "passphrase".into())
    );
}

proptest::proptest! {
    #[test]
    fn no_slot_of_a_stranger_panics_or_opens(bytes: [u8; 256], kind in 0..4u8, version in 0..2u8, zero: bool) {
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&[kind, 0, version, 0]);
        if zero {
            bytes[4..16].fill(0);
            bytes[108..].fill(0);
        }
        proptest::prop_assert!(open(&bytes, &key_file(1), CONTEXT).is_err());
        let _ = describe(&bytes);
    }
}
