//! A small fuzzing harness: cases made from their number, replayable by it.
//!
//! What a stranger sends or stores here is behind an AEAD or a state machine, so random bytes, however
//! many a second, stop at the door; what finds bugs is a generator that knows the format, bends a
//! little of something valid, and seals it again. Such a generator needs no coverage feedback, and
//! without that it runs on a stable compiler, in every `cargo test`, in seconds. Rejected:
//! `cargo fuzz` and bolero's libFuzzer and AFL engines (a second, instrumented build; their own
//! mutations die at the first tag), and proptest (its shrinking keeps whole inputs, which are disk
//! images here).
//!
//! | variable | |
//! |---|---|
//! | `OFFLOAD_FUZZ_SECONDS` | run each target for so long instead of its number of cases |
//! | `OFFLOAD_FUZZ_FROM` | the first case, to go on where an earlier run ended |
//! | `OFFLOAD_FUZZ_CASE` | run only this one: what a failure prints |

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often it is looked whether a case still goes on.
const LOOK: Duration = Duration::from_secs(1);
/// A case that so many looks have seen hangs; machines that run tests are slow and shared. Looks and not
/// time: a process that was stopped for minutes does not hang.
const PATIENCE_LOOKS: u32 = 120;

/// A generator whose numbers depend on the seed alone (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// An index of something `len` long.
    pub const fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True once in `n` times.
    pub const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of them.
    ///
    /// # Panics
    /// There are none.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// `value` as somebody who wants to break a parser would have it: at a limit, next to itself, a
    /// bit away, or anything.
    pub fn bend(&mut self, value: u64) -> u64 {
        match self.below(8) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => value ^ 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(self.below(2)),
            4 => self.pick(&[
                0,
                1,
                u64::MAX,
                u64::MAX - 1,
                1 << 48,
                (1 << 48) - 1,
                1 << 63,
            ]),
            5 => self.below(1 << 16),
            6 => value.wrapping_mul(self.pick(&[2, 128, 256, 4096])),
            _ => self.next(),
        }
    }

    /// Changes some bytes: flips, limits, copies of other places, zeros.
    pub fn bend_bytes(&mut self, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        for _ in 0..1 + self.below(4) {
            let at = self.index(bytes.len());
            let len = 1 + self.index((bytes.len() - at).min(32));
            match self.below(6) {
                0 | 1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes[at] = self.pick(&[0, 1, 0x7f, 0x80, 0xff]),
                3 => bytes[at..at + len].fill(self.pick(&[0, 0xff])),
                4 => {
                    let from = self.index(bytes.len() - len + 1);
                    bytes.copy_within(from..from + len, at);
                }
                _ => bytes[at..at + len].fill_with(|| self.next() as u8),
            }
        }
    }
}

/// Prints how to see a failure again, should the case panic.
struct Story<'a> {
    target: &'a str,
    case: u64,
}

impl Drop for Story<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "fuzz target {}: OFFLOAD_FUZZ_CASE={} shows it again",
                self.target, self.case
            );
        }
    }
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Runs `case` with numbers from 0 on, each with its own generator, `count` of them or as the
/// environment says. Returns how many ran; targets count on having run as many when they say how
/// much of what they make has to be valid.
///
/// # Panics
/// As the case does, with its number printed. A case that hangs ends the process.
pub fn run(target: &str, count: u64, mut case: impl FnMut(u64, &mut Random)) -> u64 {
    let only = variable("OFFLOAD_FUZZ_CASE");
    let from = only.or_else(|| variable("OFFLOAD_FUZZ_FROM")).unwrap_or(0);
    let seconds = variable("OFFLOAD_FUZZ_SECONDS").map(Duration::from_secs);
    let begin = Instant::now();
    let (current, is_over) = (AtomicU64::new(from), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let watchdog = scope.spawn(|| watch(target, &current, &is_over));
        let over = OnDrop(|| {
            is_over.store(true, Ordering::Relaxed);
            watchdog.thread().unpark();
        });
        let mut number = from;
        loop {
            let is_enough = match (only, seconds) {
                (Some(only), _) => number > only,
                (None, Some(seconds)) => begin.elapsed() >= seconds,
                (None, None) => number - from >= count,
            };
            if is_enough {
                break;
            }
            current.store(number, Ordering::Relaxed);
            let story = Story {
                target,
                case: number,
            };
            // Neighbours must not look alike: the generator steps by a constant.
            case(number, &mut Random::new(Random::new(number).next()));
            drop(story);
            number += 1;
        }
        drop(over);
        let (ran, took) = (number - from, begin.elapsed());
        println!("fuzz target {target}: {ran} cases from {from} on in {took:.1?}");
        ran
    })
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn watch(target: &str, current: &AtomicU64, is_over: &AtomicBool) {
    let mut seen = (u64::MAX, 0);
    while !is_over.load(Ordering::Relaxed) {
        std::thread::park_timeout(LOOK);
        let now = current.load(Ordering::Relaxed);
        if now != seen.0 {
            seen = (now, 0);
            continue;
        }
        seen.1 += 1;
        if seen.1 > PATIENCE_LOOKS {
            eprintln!(
                "fuzz target {target}: case {now} hangs; OFFLOAD_FUZZ_CASE={now} shows it again"
            );
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_made_from_its_number_alone() {
        let mut first = Vec::new();
        assert_eq!(
            run("self", 50, |_, random| first
                .push((random.next(), random.bend(7)))),
            50
        );
        let mut second = Vec::new();
        run("self", 50, |_, random| {
            second.push((random.next(), random.bend(7)))
        });
        assert_eq!(first, second);
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 50, "and no two are the same");
    }

    #[test]
    fn bent_bytes_stay_where_they_are_and_mostly_change() {
        let mut changed = 0;
        run("self", 500, |_, random| {
            let mut bytes = [0x55; 40];
            let len = random.index(41);
            random.bend_bytes(&mut bytes[..len]);
            assert!(bytes[len..].iter().all(|byte| *byte == 0x55));
            changed += usize::from(bytes != [0x55; 40]);
        });
        assert!(changed > 400, "{changed}");
    }
}
