use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::golden::unhex;

const ENGINES: [Engine; 2] = [Engine::AwsLc, Engine::Portable];

/// One published case, for AES-256-GCM with a 96-bit nonce.
#[derive(Deserialize)]
struct Case {
    #[serde(rename = "tcId")]
    id: u32,
    key: String,
    iv: String,
    aad: String,
    msg: String,
    ct: String,
    tag: String,
    result: String,
}

fn array<const N: usize>(digits: &str) -> [u8; N] {
    unhex(digits).try_into().unwrap()
}

fn key(engine: Engine, mut bytes: [u8; 32]) -> AeadKey {
    AeadKey::new(engine, &Secret32::take(&mut bytes))
}

fn nist_cases() -> Vec<Case> {
    let text = include_str!("../../tests/data/nist_cavp_gcmEncryptExtIV256.rsp");
    text.split("\n\n")
        .filter(|block| block.starts_with("Count"))
        .map(|block| {
            let field = |name: &str| {
                let line = block
                    .lines()
                    .find(|line| line.split_once(" =").is_some_and(|(left, _)| left == name));
                line.unwrap().split_once('=').unwrap().1.trim().to_owned()
            };
            Case {
                id: field("Count").parse().unwrap(),
                key: field("Key"),
                iv: field("IV"),
                aad: field("AAD"),
                msg: field("PT"),
                ct: field("CT"),
                tag: field("Tag"),
                result: "valid".to_owned(),
            }
        })
        .collect()
}

fn wycheproof_cases() -> Vec<Case> {
    serde_json::from_str(include_str!("../../tests/data/wycheproof_aes_256_gcm.json")).unwrap()
}

/// Runs a case through all three calls of one engine.
fn run(engine: Engine, case: &Case) {
    let id = case.id;
    let key = key(engine, array(&case.key));
    let (nonce, tag) = (array(&case.iv), array(&case.tag));
    let (aad, msg, ct) = (unhex(&case.aad), unhex(&case.msg), unhex(&case.ct));
    let valid = match case.result.as_str() {
        "valid" => true,
        "invalid" => false,
        other => panic!("case {id} is {other}"),
    };

    let mut sealed = msg.clone();
    let made = key.seal_nonce(nonce, &aad, &mut sealed);
    assert_eq!((sealed == ct) && (made == tag), valid, "{engine:?} {id}");

    let mut opened = ct.clone();
    let result = key.open_nonce(nonce, &aad, &mut opened, &tag);
    assert_eq!(result.is_ok(), valid, "{engine:?} {id}");
    let expected = if valid { msg } else { vec![0; ct.len()] };
    assert_eq!(opened, expected, "{engine:?} {id}");

    let mut out = vec![0xee; ct.len()];
    let result = key.open_into_nonce(nonce, &aad, &ct, &tag, &mut out);
    assert_eq!(result.is_ok(), valid, "{engine:?} {id}");
    assert_eq!(out, expected, "{engine:?} {id}");
}

#[test]
fn both_engines_agree_with_the_nist_cavp_vectors() {
    let cases = nist_cases();
    assert_eq!(cases.len(), 375);
    for engine in ENGINES {
        for case in &cases {
            run(engine, case);
        }
    }
}

#[test]
fn both_engines_agree_with_wycheproof_and_refuse_its_forgeries() {
    let cases = wycheproof_cases();
    let forgeries = cases.iter().filter(|case| case.result == "invalid");
    assert_eq!((cases.len(), forgeries.count()), (66, 27));
    for engine in ENGINES {
        for case in &cases {
            run(engine, case);
        }
    }
}

#[test]
fn a_nonce_is_four_zero_bytes_and_the_sequence_number_little_endian() {
    assert_eq!(
        nonce(0x0102_0304_0506_0708),
        [0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]
    );
}

#[test]
fn the_default_engine_is_aws_lc() {
    assert_eq!(Engine::default(), Engine::AwsLc);
}

#[test]
fn debug_shows_the_engine_and_no_key() {
    for engine in ENGINES {
        let shown = format!("{:?}", key(engine, [0xab; 32]));
        assert_eq!(shown, format!("AeadKey({engine:?}, [REDACTED])"));
    }
}

#[test]
fn an_output_of_another_length_is_refused_and_wiped() {
    for engine in ENGINES {
        let key = key(engine, [1; 32]);
        let mut sealed = *b"sixteen byte msg";
        let tag = key.seal(1, b"", &mut sealed);
        for len in [0, 15, 17, 32] {
            let mut out = vec![0xee; len];
            assert_eq!(
                key.open_into(1, b"", &sealed, &tag, &mut out),
                Err(AuthError)
            );
            assert_eq!(out, vec![0; len]);
        }
    }
}

#[test]
fn keys_are_shared_between_threads() {
    fn assert_shared<T: Send + Sync>() {}
    assert_shared::<AeadKey>();
}

#[test]
fn every_flipped_bit_of_a_block_and_its_tag_is_refused_by_both_engines() {
    for engine in ENGINES {
        let key = key(engine, [3; 32]);
        let mut sealed: Vec<u8> = (0..=255).collect();
        let tag = key.seal(5, b"aad", &mut sealed);
        for bit in 0..sealed.len() * 8 {
            let mut bent = sealed.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.open(5, b"aad", &mut bent, &tag), Err(AuthError));
            assert!(bent.iter().all(|byte| *byte == 0));
        }
        for bit in 0..TAG_LEN * 8 {
            let (mut data, mut bent) = (sealed.clone(), tag);
            bent[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.open(5, b"aad", &mut data, &bent), Err(AuthError));
            assert!(data.iter().all(|byte| *byte == 0));
        }
        assert_eq!(key.open(5, b"aad", &mut sealed, &tag), Ok(()));
        assert!(sealed.iter().copied().eq(0..=255));
    }
}

#[test]
fn wiping_a_portable_key_removes_its_schedule_from_memory() {
    let mut key = key(Engine::Portable, [0xd3; 32]);
    let holds_key = |key: &AeadKey| {
        let page = crate::locked::tests::page_bytes(&key.cipher);
        page.windows(32).any(|at| at == [0xd3; 32])
    };
    // With AES instructions the schedule starts with the key itself, so that it is seen when it is there.
    #[cfg(target_arch = "x86_64")]
    assert_eq!(holds_key(&key), std::is_x86_feature_detected!("aes"));
    key.cipher.get_mut().wipe();
    assert!(!holds_key(&key));
    let (mut wiped, mut zero) = ([1; 16], [1; 16]);
    let tags = [
        key.seal(1, b"", &mut wiped),
        self::key(Engine::AwsLc, [0; 32]).seal(1, b"", &mut zero),
    ];
    assert_eq!((wiped, tags[0]), (zero, tags[1]));
}

/// Where a bit is flipped.
#[derive(Clone, Copy, Debug)]
enum Place {
    Data,
    Tag,
    Aad,
    Seq,
    Key,
}

fn flip(bytes: &mut [u8], at: prop::sample::Index) {
    let bit = at.index(bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn what_one_engine_seals_the_other_opens(
        bytes: [u8; 32],
        seq: u64,
        aad in prop::collection::vec(any::<u8>(), 0..100),
        data in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        let keys = ENGINES.map(|engine| key(engine, bytes));
        let mut made = Vec::new();
        for (sealer, opener) in [(&keys[0], &keys[1]), (&keys[1], &keys[0])] {
            let mut sealed = data.clone();
            let tag = sealer.seal(seq, &aad, &mut sealed);
            let mut out = vec![0xee; data.len()];
            prop_assert_eq!(opener.open_into(seq, &aad, &sealed, &tag, &mut out), Ok(()));
            prop_assert_eq!(&out, &data);
            made.push((sealed.clone(), tag));
            prop_assert_eq!(opener.open(seq, &aad, &mut sealed, &tag), Ok(()));
            prop_assert_eq!(&sealed, &data);
        }
        prop_assert_eq!(&made[0], &made[1]);
    }

    #[test]
    fn a_flipped_bit_anywhere_fails_and_leaves_no_plaintext(
        mut bytes: [u8; 32],
        seq: u64,
        mut aad in prop::collection::vec(any::<u8>(), 1..100),
        data in prop::collection::vec(1..=255u8, 1..5000),
        place in prop::sample::select(
            &[Place::Data, Place::Tag, Place::Aad, Place::Seq, Place::Key][..],
        ),
        at: prop::sample::Index,
    ) {
        let mut sealed = data.clone();
        let mut tag = key(Engine::AwsLc, bytes).seal(seq, &aad, &mut sealed);
        let mut seq = seq.to_le_bytes();
        match place {
            Place::Data => flip(&mut sealed, at),
            Place::Tag => flip(&mut tag, at),
            Place::Aad => flip(&mut aad, at),
            Place::Seq => flip(&mut seq, at),
            Place::Key => flip(&mut bytes, at),
        }
        let seq = u64::from_le_bytes(seq);
        for engine in ENGINES {
            let key = key(engine, bytes);
            let mut out = vec![0xee; data.len()];
            prop_assert_eq!(key.open_into(seq, &aad, &sealed, &tag, &mut out), Err(AuthError));
            prop_assert!(out.iter().all(|byte| *byte == 0));
            let mut out = sealed.clone();
            prop_assert_eq!(key.open(seq, &aad, &mut out, &tag), Err(AuthError));
            prop_assert!(out.iter().all(|byte| *byte == 0));
        }
    }
}
