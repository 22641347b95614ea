//! Limits, user, capabilities, dumps.

use std::io;

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Uid, geteuid, getppid, getrlimit,
    parent_process_death_signal, set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::SandboxError;

/// A user and a group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

fn failed(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |error| SandboxError::Step {
        step,
        source: error.into(),
    }
}

pub(super) fn thread_count() -> Result<usize, SandboxError> {
    let io_failed = |source: io::Error| SandboxError::Step {
        step: "count the threads",
        source,
    };
    Ok(std::fs::read_dir("/proc/self/task")
        .map_err(io_failed)?
        .count())
}

pub(super) fn limit_resources(max_open_files: u64) -> Result<(), SandboxError> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(failed("forbid core files"))?;
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = Some(max_open_files.min(hard));
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
    .map_err(failed("limit the number of open files"))
}

/// The calling thread is the only one (checked before), so its ids are the process's.
pub(super) fn become_user(user: User) -> Result<(), SandboxError> {
    if !geteuid().is_root() {
        return Err(SandboxError::NotRoot);
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // Changing the user clears the signal by which a supervisor takes its children along when it is
    // killed (prctl(2), PR_SET_PDEATHSIG). Who started this card still wants that.
    let death_signal = parent_process_death_signal().map_err(failed("read the death signal"))?;
    let parent = getppid();
    set_thread_groups(&[]).map_err(failed("leave the supplementary groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(failed("change the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(failed("change the user"))?;
    if death_signal.is_some() {
        set_parent_process_death_signal(death_signal).map_err(failed("keep the death signal"))?;
        if getppid() != parent {
            // It died meanwhile, and its signal was lost.
            return Err(failed("go on without the process that started this one")(
                Errno::SRCH,
            ));
        }
    }
    Ok(())
}

/// Says whether it could: that takes CAP_SETPCAP, which root loses with its user id.
pub(super) fn empty_bounding_set() -> bool {
    let mut emptied = true;
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(one) {
            // Numbers that this kernel does not know give EINVAL and have nothing to drop.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(_) => emptied = false,
        }
    }
    emptied
}

pub(super) fn drop_capabilities() -> Result<(), SandboxError> {
    // Kernels before 4.3 have no ambient set.
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(failed("drop ambient capabilities")(error)),
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .map_err(failed("drop capabilities"))
}

pub(super) fn forbid_dumps() -> Result<(), SandboxError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("become undumpable"))
}

pub(super) fn forbid_new_privileges() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(failed("set no_new_privs"))
}
