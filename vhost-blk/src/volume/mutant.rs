//! Deliberate breaks of the protocol. The crash tests switch them on to show that they would
//! notice: a test that passes with the protocol broken proves nothing.

/// A step of the protocol left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The barrier of a commit starts before its log records have completed.
    SyncBeforeLog,
    /// A commit is acknowledged without a barrier.
    NoBarrier,
    /// Old slots are freed when they are superseded, not when the commit is durable.
    EarlyFree,
    /// The last commit's data are not authenticated at recovery.
    SkipVerify,
    /// The data of a draft before a commit that is dropped are not authenticated at recovery.
    SkipDraft,
    /// A draft whose data did not land stays in the log.
    KeepFailedDraft,
    /// A commit takes a draft for all that it has to write.
    DraftForAll,
    /// A commit does not wait for the data of the draft before it.
    HastyDraft,
    /// The slot of a drafted write that was superseded is used again at once.
    DraftSlotFree,
    /// A write is acknowledged before it has landed.
    EarlyAck,
    /// The delta ring is not read at recovery.
    IgnoreRing,
    /// Ring records of committed batches are replayed too.
    ReplayAllRing,
    /// The superblock is written without waiting for the pages' barrier.
    NoPageBarrier,
    /// Pages of the current tree are overwritten before the next superblock is durable.
    EarlyPageFree,
    /// The session of the last activation goes on after a crash, from sequence 1.
    SameSession,
    /// Only one superblock copy is ever written.
    OneSuperblock,
    /// The old place of a moved block is freed before the commit of the new one.
    MoveEarlyFree,
    /// A moved block is published without looking whether it was written meanwhile.
    MoveBlindly,
    /// A moved block is published before it has landed.
    MoveUnwritten,
    /// A volume's new size is written before its backing has it.
    GrowBeforeBacking,
    /// An activation writes before what it found is durable.
    NoFirstBarrier,
    /// The delta ring is released when a commit begins, not when it is durable.
    EarlyRingRelease,
    /// Slots are used again while reads of them are under way.
    SlotUnderRead,
    /// A page with changes that are stored nowhere may be forgotten.
    EvictDirty,
    /// A page may be forgotten while its write is under way.
    EvictUnwritten,
    /// What a write that was admitted needs may be forgotten before its commit.
    TouchWithoutPin,
    /// A leaf that is not in memory is taken for holes instead of being read.
    MissIsHole,
    /// The log is used again before the superblock that gives it up is durable.
    EarlyLogFree,
    /// Partial writes do not have their block for themselves.
    SharedRanges,
}

#[cfg(test)]
thread_local! {
    static CURRENT: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether the running test broke this step.
#[cfg(test)]
pub(crate) fn is(mutant: Mutant) -> bool {
    CURRENT.get() == Some(mutant)
}

/// Never, outside of tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn is(_: Mutant) -> bool {
    false
}

/// Breaks a step for the rest of the thread.
#[cfg(test)]
pub(crate) fn set(mutant: Option<Mutant>) {
    CURRENT.set(mutant);
}
