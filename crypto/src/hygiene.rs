//! What a process does before it holds keys.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Keeps this process's memory out of core dumps and out of other processes' reach.
///
/// 1. `PR_SET_DUMPABLE` 0: no core dump, and no `ptrace(2)` or `/proc/PID/mem` by other processes of the same
///    user (root still can). A side effect: files under `/proc/PID` then belong to root, so whoever
///    supervises this process by them needs to be root, too. `execve(2)` undoes it: call this after.
/// 2. `RLIMIT_CORE` 0, hard and soft: covers children, and core handlers that read the limit.
///
/// Call it first thing in `main`, before a key is read.
///
/// # Errors
///
/// What the kernel said. A process that cannot do this should not load keys.
pub fn harden_process() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    Ok(())
}
