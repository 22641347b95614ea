//! The system calls that a card makes once it runs.
//!
//! First, filters that turn calls away that the C library makes by itself and can do without:
//! `clone3` does not exist (ENOSYS), since its flags lie in memory, where a filter cannot look, so
//! glibc is sent back to `clone`, whose flags say whether a thread is made or a process; and where
//! no paths are in reach, `openat` is refused (EPERM). glibc's `free` opens
//! /proc/sys/vm/overcommit_memory when a thread's heap shrinks, and takes a refusal well; a card
//! must not be killed for that. Then comes the list below, which has the calls that the first ones
//! turn away. The kernel takes the strictest answer of all.
//!
//! On purpose not on the list: anything that executes, forks, traces, mounts, loads, makes or
//! connects sockets, opens or removes files (unless the sandbox keeps paths in reach), and
//! executable memory.

use std::collections::BTreeMap;
use std::fmt;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::SandboxError;

/// What happens at a system call that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Seccomp {
    /// It fails with EPERM. A card that needs a call we forgot gets an error and says so.
    Enforce,
    /// The process is killed. For tests, and for those who prefer it dead.
    Kill,
    /// It is carried out, and the kernel logs it: to find out what a new kernel or C library needs.
    Log,
    /// There is no filter.
    Off,
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforced",
            Self::Kill => "enforced by killing",
            Self::Log => "only logged",
            Self::Off => "off",
        })
    }
}

/// Calls on files by path that make sense because paths are in reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileCalls {
    pub(super) open: bool,
    pub(super) remove: bool,
}

/// Calls allowed with any arguments.
const CALLS: &[i64] = &[
    // Open files.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_close,
    libc::SYS_close_range,
    // Open sockets: the frontend's and the control clients'.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Memory. `mmap` and `mprotect` have rules.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    // Threads and signals. `clone`, `tgkill` and `prctl` have rules; `clone3` is turned away by
    // the other filter.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Time, randomness, who am I.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
];

/// Older calls that C libraries still make where the architecture has them.
#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_time,
    libc::SYS_dup2,
    libc::SYS_pipe,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[i64] = &[];

#[cfg(target_arch = "x86_64")]
const REMOVE_CALLS: &[i64] = &[libc::SYS_unlinkat, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const REMOVE_CALLS: &[i64] = &[libc::SYS_unlinkat];

// C libraries open by `openat` only.
const OPEN_CALLS: &[i64] = &[libc::SYS_openat, libc::SYS_openat2, libc::SYS_getdents64];

/// What the first filter refuses, so the list need not: see the module.
const TURNED_AWAY: &[i64] = &[libc::SYS_openat];

/// Requests of `ioctl` that are let through: blocking mode, how much a socket holds, "is this a
/// terminal" and its width (libc's `isatty`), the geometry of block devices.
const IOCTLS: &[u64] = &[
    0x5421,
    0x541b,
    0x5401,
    0x5413,
    0x8008_1272,
    0x1268,
    0x127b,
    0x1277,
    0x127f,
];

fn only_if(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    // 32 bits: flags, requests and pids are ints, and the upper half may hold anything.
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

fn rules(files: FileCalls, extra: &[i64]) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules = BTreeMap::new();
    let bits = |mask: libc::c_int| u64::from(mask.cast_unsigned());
    let executable = bits(libc::PROT_EXEC);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let not_executable = only_if(2, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, vec![not_executable]);
    }
    let thread = bits(libc::CLONE_THREAD);
    rules.insert(
        libc::SYS_clone,
        vec![only_if(0, SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    // `abort` signals its own process and no other.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![only_if(0, SeccompCmpOp::Eq, own)?]);
    // Names of threads and, by the C library, of memory.
    let mut names = Vec::new();
    for name in [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA] {
        names.push(only_if(0, SeccompCmpOp::Eq, bits(name))?);
    }
    rules.insert(libc::SYS_prctl, names);
    let ioctls: Result<Vec<_>, _> = IOCTLS
        .iter()
        .map(|&request| only_if(1, SeccompCmpOp::Eq, request))
        .collect();
    rules.insert(libc::SYS_ioctl, ioctls?);

    let open = if files.open { OPEN_CALLS } else { TURNED_AWAY };
    let remove = if files.remove { REMOVE_CALLS } else { &[] };
    for &call in [CALLS, OLD_CALLS, open, remove, extra]
        .into_iter()
        .flatten()
    {
        // No rule means any arguments.
        rules.insert(call, Vec::new());
    }
    Ok(rules)
}

/// The programs to install, in this order; none when the filter is off.
pub(super) fn compile(
    mode: Seccomp,
    files: FileCalls,
    extra: &[i64],
) -> Result<Vec<BpfProgram>, SandboxError> {
    let errno = |number: libc::c_int| SeccompAction::Errno(number.cast_unsigned());
    let otherwise = match mode {
        Seccomp::Off => return Ok(Vec::new()),
        Seccomp::Enforce => errno(libc::EPERM),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
    };
    let compile = || -> Result<Vec<BpfProgram>, BackendError> {
        let arch: TargetArch = std::env::consts::ARCH.try_into()?;
        let no_clone3 = SeccompFilter::new(
            BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
            SeccompAction::Allow,
            errno(libc::ENOSYS),
            arch,
        )?;
        let list = SeccompFilter::new(rules(files, extra)?, otherwise, SeccompAction::Allow, arch)?;
        let mut programs = vec![no_clone3.try_into()?];
        // One that only logs is to find such calls, and to carry them out.
        if !files.open && mode != Seccomp::Log {
            let turned_away = TURNED_AWAY.iter().map(|&call| (call, Vec::new()));
            let refused = errno(libc::EPERM);
            programs.push(
                SeccompFilter::new(turned_away.collect(), SeccompAction::Allow, refused, arch)?
                    .try_into()?,
            );
        }
        programs.push(list.try_into()?);
        Ok(programs)
    };
    compile().map_err(|error| SandboxError::Seccomp(error.into()))
}

pub(super) fn install(programs: &[BpfProgram]) -> Result<(), SandboxError> {
    // The list lacks `seccomp`, so it has to be the last.
    for program in programs {
        apply_filter_all_threads(program).map_err(SandboxError::Seccomp)?;
    }
    Ok(())
}
