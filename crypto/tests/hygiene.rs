//! What `harden_process` closes, looked at from inside. Alone in its binary, as it changes the process.

use rustix::process::{DumpableBehavior, Resource, dumpable_behavior, getrlimit};

#[test]
fn a_hardened_process_is_not_dumpable_and_has_no_core_limit_left() {
    crypto::hygiene::harden_process().unwrap();
    assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    let core = getrlimit(Resource::Core);
    assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
    // A second call is harmless.
    crypto::hygiene::harden_process().unwrap();
}
