use super::*;
use crate::golden;

fn keys(session: &Session) -> [(&'static str, &AeadKey); 5] {
    [
        ("data", &session.data),
        ("page", &session.page),
        ("log", &session.log),
        ("ring", &session.ring),
        ("superblock", &session.superblock),
    ]
}

#[test]
fn golden_each_key_of_a_session_seals_the_pinned_bytes() {
    for engine in [Engine::AwsLc, Engine::Portable] {
        let session = Session::derive(engine, &SessionKey::from_secret(golden::secret("session")));
        for (name, key) in keys(&session) {
            let mut data = [0xa5; 16];
            let tag = key.seal(0x0102_0304_0506_0708, b"associated data", &mut data);
            let expected = golden::bytes(&format!("sealed_{name}"));
            assert_eq!([data, tag].concat(), expected, "{engine:?} {name}");
        }
    }
}

#[test]
fn what_one_key_of_a_session_seals_no_other_opens() {
    let session = Session::derive(Engine::AwsLc, &SessionKey::generate().unwrap());
    for (sealer, key) in keys(&session) {
        let mut sealed = [1; 64];
        let tag = key.seal(9, b"", &mut sealed);
        for (opener, key) in keys(&session) {
            let opened = key.open(9, b"", &mut sealed.clone(), &tag);
            assert_eq!(opened.is_ok(), sealer == opener, "{sealer} {opener}");
        }
    }
}

#[test]
fn debug_shows_no_key() {
    let key = SessionKey::from_secret(golden::secret("session"));
    let shown = format!("{:?}", Session::derive(Engine::Portable, &key));
    assert_eq!(shown.matches("[REDACTED]").count(), 5);
    assert_eq!(shown.matches(|c: char| c.is_ascii_digit()).count(), 0);
}
