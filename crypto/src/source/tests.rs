use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, mknodat};
use tempfile::TempDir;

use super::*;

const KEY: [u8; 32] = *b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\
                        \xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7\xf8\xf9\xfa\xfb\xfc\xfd\xfe\xff";
const HEX: &str = "000102030405060708090a0b0c0d0e0ff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

fn file(dir: &TempDir, content: impl AsRef<[u8]>, mode: u32) -> PathBuf {
    let path = dir.path().join("key");
    // A read-only file of an earlier round cannot be written to, except by root.
    let _ = fs::remove_file(&path);
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    path
}

fn load_key(content: impl AsRef<[u8]>) -> Result<KeyMaterial, SourceError> {
    let dir = TempDir::new().unwrap();
    KeySource::File(file(&dir, content, 0o600)).load()
}

fn load_passphrase(content: impl AsRef<[u8]>) -> Result<KeyMaterial, SourceError> {
    let dir = TempDir::new().unwrap();
    KeySource::Passphrase(file(&dir, content, 0o600)).load()
}

#[track_caller]
fn assert_key(loaded: Result<KeyMaterial, SourceError>, expected: &[u8; 32]) {
    match loaded.unwrap() {
        KeyMaterial::File(key) => assert_eq!(key.expose(), expected),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_passphrase(loaded: Result<KeyMaterial, SourceError>, expected: &[u8]) {
    match loaded.unwrap() {
        KeyMaterial::Passphrase(bytes) => assert_eq!(bytes.as_slice(), expected),
        other @ KeyMaterial::File(_) => panic!("{other:?}"),
    }
}

#[test]
fn a_key_file_holds_raw_bytes_or_hex_digits_of_either_case() {
    assert_key(load_key(KEY), &KEY);
    assert_key(load_key(HEX), &KEY);
    assert_key(load_key(HEX.to_uppercase()), &KEY);
    assert_key(load_key(format!("{HEX}\n")), &KEY);
    assert_key(load_key(format!("{HEX}\r\n")), &KEY);
}

#[test]
fn raw_keys_keep_a_last_byte_that_looks_like_a_newline() {
    let mut key = KEY;
    key[31] = b'\n';
    assert_key(load_key(key), &key);
}

#[test]
fn what_is_not_a_key_is_refused_with_the_way_to_make_one() {
    let contents: [Vec<u8>; 11] = [
        b"".into(),
        b"\n".into(),
        KEY[..31].into(),
        [KEY.as_slice(), b"\n"].concat(),
        HEX[..63].into(),
        format!("{HEX}0").into(),
        format!("{HEX}\n\n").into(),
        format!(" {HEX}").into(),
        HEX.replace('f', "g").into(),
        HEX.replace("00", "+0").into(),
        vec![0xff; 64],
    ];
    for content in contents {
        let error = load_key(content).unwrap_err();
        assert!(matches!(error, SourceError::NotAKey(_)), "{error}");
        assert!(error.to_string().contains("head -c 32 /dev/urandom"));
    }
}

#[test]
fn a_passphrase_is_the_first_line() {
    assert_passphrase(load_passphrase("open sesame"), b"open sesame");
    assert_passphrase(load_passphrase("open sesame\n"), b"open sesame");
    assert_passphrase(load_passphrase("open sesame\r\n"), b"open sesame");
    assert_passphrase(load_passphrase("one\ntwo\n"), b"one");
    assert_passphrase(load_passphrase(" spaces count "), b" spaces count ");
    assert_passphrase(load_passphrase([0xff, 0x00, b'\n']), &[0xff, 0x00]);
}

#[test]
fn an_empty_passphrase_is_refused() {
    for content in ["", "\n", "\r\n", "\nsecond line\n"] {
        let error = load_passphrase(content).unwrap_err();
        assert!(matches!(error, SourceError::NoPassphrase(_)), "{error}");
    }
}

#[test]
fn files_that_others_can_touch_are_refused_and_told_chmod() {
    let dir = TempDir::new().unwrap();
    for mode in [0o640, 0o604, 0o620, 0o610, 0o601, 0o644, 0o666, 0o777] {
        let path = file(&dir, KEY, mode);
        for source in [KeySource::File(path.clone()), KeySource::Passphrase(path)] {
            let error = source.load().unwrap_err();
            assert!(matches!(error, SourceError::TooOpen { mode: m, .. } if m == mode));
            assert!(error.to_string().contains("chmod 600 "), "{error}");
        }
    }
    for mode in [0o600, 0o400, 0o700] {
        assert_key(KeySource::File(file(&dir, KEY, mode)).load(), &KEY);
    }
}

#[test]
fn files_of_other_users_are_refused_and_those_of_root_are_not() {
    let path = Path::new("key");
    let check = |owner, us| check_private(path, owner, 0o100_600, us);
    assert!(check(1000, 1000).is_ok());
    assert!(check(0, 1000).is_ok());
    for (owner, us) in [(1001, 1000), (1000, 0)] {
        let error = check(owner, us).unwrap_err();
        assert!(matches!(error, SourceError::WrongOwner { .. }));
        assert!(error.to_string().contains(&format!("chown {us} key")));
    }
}

#[test]
fn a_symbolic_link_is_judged_by_the_file_it_leads_to() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, KEY, 0o600);
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    assert_key(KeySource::File(link.clone()).load(), &KEY);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let error = KeySource::File(link).load().unwrap_err();
    assert!(matches!(error, SourceError::TooOpen { .. }));
}

#[test]
fn what_is_not_a_regular_file_is_refused_without_waiting() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for path in [
        dir.path().to_owned(),
        fifo,
        socket,
        PathBuf::from("/dev/zero"),
    ] {
        for source in [
            KeySource::File(path.clone()),
            KeySource::Passphrase(path.clone()),
        ] {
            let error = source.load().unwrap_err();
            assert!(matches!(error, SourceError::NotAFile(_)), "{error}");
        }
    }
}

#[test]
fn a_missing_file_is_named_and_its_cause_kept() {
    let error = KeySource::File("/nonexistent/key".into())
        .load()
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot read /nonexistent/key");
    assert!(
        matches!(error, SourceError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
}

#[test]
fn long_files_are_refused_without_reading_them_whole() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, b"x", 0o600);
    // Sparse, and far larger than memory: reading it whole would not end.
    let huge = fs::OpenOptions::new().write(true).open(&path).unwrap();
    huge.set_len(1 << 40).unwrap();
    for source in [KeySource::File(path.clone()), KeySource::Passphrase(path)] {
        let error = source.load().unwrap_err();
        assert!(matches!(error, SourceError::TooLong(_)), "{error}");
    }
    assert_passphrase(load_passphrase([b'p'; MAX_FILE_LEN]), &[b'p'; MAX_FILE_LEN]);
    let error = load_passphrase([b'p'; MAX_FILE_LEN + 1]).unwrap_err();
    assert!(matches!(error, SourceError::TooLong(_)));
}

#[test]
fn debug_shows_no_key_and_no_passphrase() {
    let shown = format!("{:?}", load_key(KEY).unwrap());
    assert_eq!(shown, "File([REDACTED])");
    let shown = format!("{:?}", load_passphrase("open sesame").unwrap());
    assert_eq!(shown, "Passphrase([REDACTED])");
}
