//! Commits and checkpoints, run by whichever lane finds that one is due. Their order of steps is
//! told in [`commit`](super::super::commit) and [`checkpoint`](super::super::checkpoint).

use std::sync::Arc;

use super::Lane;
use super::flight::{FlightKind, Member};
use crate::volume::backing::Barrier;
use crate::volume::engine::core::Core;
use crate::volume::engine::draft::DRAFT_BLOCKS;
use crate::volume::engine::request::{IoKind, Payload};
use crate::volume::engine::{JobWrite, Stats};
use crate::volume::geometry::{BLOCK_LEN, Slot};
use crate::volume::mutant::{self, Mutant};
use crate::volume::space::Run;

/// What a lane can be at besides requests; at most one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobKind {
    /// The record of a write that is under way.
    Draft,
    Commit,
    Checkpoint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Log records or pages are being written.
    Write,
    /// The barrier behind them.
    Barrier,
    /// The superblock is being written.
    Superblock,
    /// The barrier behind it.
    SuperblockBarrier,
    /// The other copy is being written.
    Mirror,
}

pub(super) struct Job {
    kind: JobKind,
    step: Step,
    /// Operations of this step under way.
    left: usize,
    has_failed: bool,
}

impl Job {
    pub(super) fn is_checkpoint(&self) -> bool {
        self.kind == JobKind::Checkpoint
    }
}

impl JobKind {
    pub(super) const fn barrier(self) -> Barrier {
        match self {
            Self::Draft | Self::Commit => Barrier::Commit,
            Self::Checkpoint => Barrier::Checkpoint,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Draft | Self::Commit => "committing",
            Self::Checkpoint => "writing a checkpoint",
        }
    }
}

impl<P: Payload> Lane<P> {
    /// Starts what is due.
    pub(super) fn start_jobs(&mut self, core: &mut Core) {
        if core.wants_commit()
            && let Some(writes) = core.begin_commit(&mut || self.shared.take_sequences(1))
        {
            self.begin(JobKind::Commit, writes);
        }
        if core.wants_checkpoint()
            && let Some(writes) =
                core.begin_checkpoint(false, &mut || self.shared.take_sequences(1))
        {
            self.begin(JobKind::Checkpoint, writes);
        }
        if core.wants_page_slots() {
            match core.take_run() {
                Some(run) => {
                    core.growing = true;
                    let (offset, len) = (Slot(run.start).offset(), run.len * BLOCK_LEN as u64);
                    self.emit(FlightKind::Grow(run), IoKind::Allocate { offset, len });
                }
                None => {
                    core.backing_full = true;
                    // Nothing is under way that would tell those who wait for it.
                    core.feed_starved();
                }
            }
        }
    }

    /// Writes the record of what is about to leave along with it, if a flush is expected right after.
    pub(super) fn draft(&mut self, members: &[Member]) {
        if !self.may_draft || members.len() > DRAFT_BLOCKS {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let mut members = members.iter().map(Member::delta);
        let record = shared
            .lock()
            .begin_draft(&mut members, &mut || shared.take_sequences(1));
        if let Some(record) = record {
            self.begin(JobKind::Draft, vec![record]);
        }
    }

    fn begin(&mut self, kind: JobKind, writes: Vec<JobWrite>) {
        self.jobs.push(Job {
            kind,
            step: Step::Write,
            left: writes.len(),
            has_failed: false,
        });
        let is_empty = writes.is_empty();
        for write in writes {
            self.emit_job_write(kind, write);
        }
        if kind == JobKind::Commit && mutant::is(Mutant::SyncBeforeLog) {
            if let Some(job) = self.jobs.iter_mut().find(|job| job.kind == kind) {
                job.left += 1;
            }
            self.emit(FlightKind::Job(kind), IoKind::Sync(kind.barrier()));
        }
        if is_empty && let Some(index) = self.jobs.iter().position(|job| job.kind == kind) {
            // Not `next_step`, which may want the lock that the caller has: a commit that was drafted,
            // and a checkpoint of no pages of a volume that grows, come here.
            self.jobs[index].left = 1;
            self.barrier(index, Step::Barrier);
        }
    }

    fn emit_job_write(&mut self, kind: JobKind, JobWrite { offset, buffer }: JobWrite) {
        self.emit(
            FlightKind::Job(kind),
            IoKind::Write {
                offset,
                skip: 0,
                buffer,
            },
        );
    }

    pub(super) fn job_landed(&mut self, kind: JobKind, outcome: Result<(), i32>) {
        let Some(job) = self.jobs.iter_mut().find(|job| job.kind == kind) else {
            return;
        };
        job.left -= 1;
        job.has_failed |= outcome.is_err();
        if job.left == 0 {
            self.next_step(kind);
        }
    }

    /// All operations of a job's step have completed.
    fn next_step(&mut self, kind: JobKind) {
        let Some(index) = self.jobs.iter().position(|job| job.kind == kind) else {
            return;
        };
        if self.jobs[index].has_failed {
            // Whether earlier writes are durable is unknown for good: a barrier that failed is not
            // tried again, since the kernel may have dropped the pages it failed for.
            self.jobs.remove(index);
            let mut core = self.shared.lock();
            core.is_mirroring = false;
            core.poison();
            drop(core);
            self.shared.reporter().poisoned(kind.name());
            self.wants_lock = true;
            return;
        }
        let step = self.jobs[index].step;
        self.jobs[index].left = 1;
        match (kind, step) {
            (JobKind::Draft, _) => {
                self.jobs.remove(index);
                self.shared.lock().draft_written();
            }
            (JobKind::Commit, Step::Write) => {
                if mutant::is(Mutant::SyncBeforeLog) || mutant::is(Mutant::NoBarrier) {
                    return self.end_commit(index);
                }
                self.barrier(index, Step::Barrier);
            }
            (JobKind::Commit, _) => self.end_commit(index),
            (JobKind::Checkpoint, Step::Write) if mutant::is(Mutant::NoPageBarrier) => {
                self.write_superblock(index);
            }
            (JobKind::Checkpoint, Step::Write) => self.barrier(index, Step::Barrier),
            (JobKind::Checkpoint, Step::Barrier) => self.write_superblock(index),
            (JobKind::Checkpoint, Step::Superblock) => self.barrier(index, Step::SuperblockBarrier),
            (JobKind::Checkpoint, Step::SuperblockBarrier) => {
                Stats::add(&self.shared.stats().checkpoints, 1);
                let mirror = self.shared.lock().finish_checkpoint();
                self.jobs[index].step = Step::Mirror;
                match mirror {
                    Some(write) => self.emit_job_write(kind, write),
                    None => self.next_step(kind),
                }
            }
            (JobKind::Checkpoint, Step::Mirror) => {
                self.jobs.remove(index);
                self.shared.lock().finish_mirror();
            }
        }
        self.wants_lock = true;
    }

    fn barrier(&mut self, index: usize, step: Step) {
        self.jobs[index].step = step;
        let kind = self.jobs[index].kind;
        self.emit(FlightKind::Job(kind), IoKind::Sync(kind.barrier()));
    }

    fn end_commit(&mut self, index: usize) {
        self.jobs.remove(index);
        Stats::add(&self.shared.stats().commits, 1);
        self.shared.lock().finish_commit();
        self.wants_lock = true;
    }

    fn write_superblock(&mut self, index: usize) {
        self.jobs[index].step = Step::Superblock;
        let write = self
            .shared
            .lock()
            .seal_superblock(&mut || self.shared.take_sequences(1));
        match write {
            Some(write) => self.emit_job_write(JobKind::Checkpoint, write),
            // A commit failed meanwhile: nothing more is written.
            None => drop(self.jobs.remove(index)),
        }
    }

    /// Room for pages was asked for.
    pub(super) fn grown(&mut self, run: Run, outcome: Result<(), i32>) {
        let mut core = self.shared.lock();
        core.growing = false;
        match outcome {
            Ok(()) => core.space.add_page_slots(run),
            Err(_) => {
                core.backing_full = true;
                run.slots().for_each(|slot| core.space.free_now(slot));
            }
        }
        core.feed_starved();
        drop(core);
        self.wants_lock = true;
    }
}
