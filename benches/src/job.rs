//! What is measured: one access pattern, block size and queue depth.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

/// Bytes of the smallest block, and what block sizes are multiples of.
pub const BLOCK_MIN: u32 = 4096;
/// Bytes of the largest block: the longest segment that the card takes.
pub const BLOCK_MAX: u32 = 1 << 20;
/// Most requests in flight: three descriptors each fit a queue of [`QUEUE_SIZE`].
pub const DEPTH_MAX: u16 = 128;
/// Descriptors of the queue.
pub const QUEUE_SIZE: u16 = 512;

/// How requests walk over the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads of random blocks.
    RandRead,
    /// Writes of random blocks.
    RandWrite,
    /// Reads from the start to the end, and again.
    SeqRead,
    /// The same, told apart since it runs right after random overwrites, which scatter what is
    /// written out of place.
    ScatteredRead,
    /// Writes from the start to the end, and again.
    SeqWrite,
    /// A write of a random block and a flush, one after the other, counted as one.
    WriteFlush,
}

impl Pattern {
    const ALL: [(&str, Self); 6] = [
        ("randread", Self::RandRead),
        ("randwrite", Self::RandWrite),
        ("seqread", Self::SeqRead),
        ("scatteredread", Self::ScatteredRead),
        ("seqwrite", Self::SeqWrite),
        ("writeflush", Self::WriteFlush),
    ];

    /// Whether requests go to random places.
    #[must_use]
    pub const fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite | Self::WriteFlush)
    }

    /// Whether requests read.
    #[must_use]
    pub const fn is_read(self) -> bool {
        matches!(self, Self::RandRead | Self::SeqRead | Self::ScatteredRead)
    }
}

/// One measurement's access pattern. As text: `randread-4k-qd32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// How requests walk over the disk.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block: u32,
    /// Requests in flight.
    pub depth: u16,
}

/// Why a job's text is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum JobError {
    /// Not three parts.
    #[error("{0:?} is not a job: write PATTERN-BLOCK-qdDEPTH, like randread-4k-qd32")]
    Form(String),
    /// Unknown pattern.
    #[error(
        "{0:?} is not a pattern: take randread, randwrite, seqread, \
         scatteredread, seqwrite or writeflush"
    )]
    Pattern(String),
    /// Block size out of range.
    #[error("{0:?} is not a block size: take a multiple of 4k up to 1m")]
    Block(String),
    /// Depth out of range.
    #[error("{0:?} is not a queue depth: take qd1 to qd{DEPTH_MAX}")]
    Depth(String),
}

impl Job {
    /// The standard set, in the order in which it runs: what random writes scatter is read in order
    /// at the end of a round.
    #[must_use]
    pub const fn standard() -> [Self; 9] {
        use Pattern::{RandRead, RandWrite, ScatteredRead, SeqRead, SeqWrite, WriteFlush};
        const fn job(pattern: Pattern, kib: u32, depth: u16) -> Job {
            Job {
                pattern,
                block: kib << 10,
                depth,
            }
        }
        [
            job(SeqRead, 128, 16),
            job(SeqRead, 1024, 4),
            job(RandRead, 4, 1),
            job(RandRead, 4, 32),
            job(RandRead, 4, 128),
            job(SeqWrite, 128, 16),
            job(WriteFlush, 4, 1),
            job(RandWrite, 4, 32),
            job(ScatteredRead, 128, 16),
        ]
    }

    /// Title for people.
    #[must_use]
    pub fn title(&self) -> String {
        let what = match self.pattern {
            Pattern::RandRead => "random read",
            Pattern::RandWrite => "random write",
            Pattern::SeqRead => "sequential read",
            Pattern::ScatteredRead => "sequential read after random writes",
            Pattern::SeqWrite => "sequential write",
            Pattern::WriteFlush => "write + flush",
        };
        let (size, depth) = (block_text(self.block, " KiB", " MiB"), self.depth);
        format!("{size} {what}, QD {depth}")
    }

    /// Whether results are told in MiB/s rather than in requests a second.
    #[must_use]
    pub const fn is_about_bandwidth(&self) -> bool {
        self.block >= 64 << 10
    }
}

fn block_text(bytes: u32, kib: &str, mib: &str) -> String {
    if bytes.is_multiple_of(1 << 20) {
        format!("{}{mib}", bytes >> 20)
    } else {
        format!("{}{kib}", bytes >> 10)
    }
}

fn parse_block(text: &str) -> Option<u32> {
    let (digits, shift) = match text.strip_suffix('k') {
        Some(digits) => (digits, 10),
        None => (text.strip_suffix('m')?, 20),
    };
    let bytes = digits.parse::<u32>().ok()?.checked_mul(1 << shift)?;
    let fits = (BLOCK_MIN..=BLOCK_MAX).contains(&bytes) && bytes.is_multiple_of(BLOCK_MIN);
    fits.then_some(bytes)
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Pattern::ALL.iter().find(|(_, p)| *p == self.pattern);
        let name = named.map_or("?", |(name, _)| name);
        let block = block_text(self.block, "k", "m");
        write!(f, "{name}-{block}-qd{}", self.depth)
    }
}

impl FromStr for Job {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let mut parts = text.split('-');
        let (Some(name), Some(block), Some(depth), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(JobError::Form(text.to_owned()));
        };
        let known = Pattern::ALL.iter().find(|(known, _)| *known == name);
        let &(_, pattern) = known.ok_or_else(|| JobError::Pattern(name.to_owned()))?;
        let block = parse_block(block).ok_or_else(|| JobError::Block(block.to_owned()))?;
        let depth = depth
            .strip_prefix("qd")
            .and_then(|digits| digits.parse().ok())
            .filter(|depth| (1..=DEPTH_MAX).contains(depth))
            .ok_or_else(|| JobError::Depth(depth.to_owned()))?;
        Ok(Self {
            pattern,
            block,
            depth,
        })
    }
}

impl Serialize for Job {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_standard_job_survives_being_written_and_read() {
        for job in Job::standard() {
            assert_eq!(job.to_string().parse(), Ok(job));
        }
    }

    #[test]
    fn a_jobs_text_says_pattern_block_and_depth() {
        let job: Job = "seqwrite-128k-qd16".parse().unwrap();
        assert_eq!(job.pattern, Pattern::SeqWrite);
        assert_eq!((job.block, job.depth), (131_072, 16));
        assert_eq!(job.title(), "128 KiB sequential write, QD 16");
        let job: Job = "seqread-1m-qd4".parse().unwrap();
        assert_eq!(job.block, BLOCK_MAX);
        assert_eq!(job.title(), "1 MiB sequential read, QD 4");
    }

    #[test]
    fn a_wrong_job_is_refused_with_what_would_be_right() {
        let error = |text: &str| text.parse::<Job>().unwrap_err();
        assert!(matches!(error("randread-4k"), JobError::Form(_)));
        assert!(matches!(error("randread-4k-qd1-x"), JobError::Form(_)));
        assert!(matches!(error("trim-4k-qd1"), JobError::Pattern(_)));
        for block in ["4", "2k", "5k", "2m", "0k", "k", "9999999m", "4096m"] {
            let text = format!("randread-{block}-qd1");
            assert_eq!(error(&text), JobError::Block(block.to_owned()));
        }
        for depth in ["1", "qd0", "qd129", "qd", "qd-1"] {
            let text = format!("randread-4k-{depth}");
            assert!(text.parse::<Job>().is_err(), "{text}");
        }
    }
}
