//! The guest's console: kept for those who wait for a word in it, or passed to a terminal.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Most bytes of a console that are kept; the oldest half goes when it is full.
const KEPT_MAX_BYTES: usize = 4 << 20;

/// A console that is kept in memory. Clones show the same one.
#[derive(Debug, Clone, Default)]
pub struct Console {
    shared: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Console {
    /// All that is kept of it.
    #[must_use]
    pub fn text(&self) -> String {
        let kept = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }

    /// Waits until `needle` was printed. `false` if it was not within `timeout`.
    #[must_use]
    pub fn wait_for(&self, needle: &str, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let (kept, grown) = &*self.shared;
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if kept
                .windows(needle.len().max(1))
                .any(|w| w == needle.as_bytes())
            {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            kept = grown
                .wait_timeout(kept, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (kept, grown) = &*self.shared;
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() + bytes.len() > KEPT_MAX_BYTES {
            let half = kept.len() / 2;
            kept.drain(..half);
        }
        kept.extend_from_slice(bytes);
        grown.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard input as a raw terminal, until this is dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes standard input raw; `None` if it is no terminal.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn new() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !rustix::termios::isatty(stdin) {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Control and `]`: the way out of a raw terminal, whose control-C goes to the guest.
const ESCAPE: u8 = 0x1d;

/// Passes bytes through, calls `on_escape` for each control-`]` and leaves that out.
pub struct EscapeReader<R, F> {
    inner: R,
    on_escape: F,
}

impl<R: Read, F: FnMut()> EscapeReader<R, F> {
    /// A reader over `inner`.
    pub fn new(inner: R, on_escape: F) -> Self {
        Self { inner, on_escape }
    }
}

impl<R: Read, F: FnMut()> Read for EscapeReader<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let got = self.inner.read(buffer)?;
            let mut kept = 0;
            for at in 0..got {
                if buffer[at] == ESCAPE {
                    (self.on_escape)();
                } else {
                    buffer[kept] = buffer[at];
                    kept += 1;
                }
            }
            if kept > 0 || got == 0 {
                return Ok(kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_is_seen_and_not_passed_on() {
        let mut seen = 0;
        let mut out = String::new();
        EscapeReader::new(&b"ab\x1dc\x1d"[..], || seen += 1)
            .read_to_string(&mut out)
            .unwrap();
        assert_eq!((out.as_str(), seen), ("abc", 2));
    }

    #[test]
    fn a_word_is_waited_for_across_writes() {
        let console = Console::default();
        let mut writer = console.clone();
        let thread = std::thread::spawn(move || {
            writer.write_all(b"log").unwrap();
            std::thread::sleep(Duration::from_millis(20));
            writer.write_all(b"in: ").unwrap();
        });
        assert!(console.wait_for("login: ", Duration::from_secs(5)));
        assert!(!console.wait_for("root@", Duration::from_millis(10)));
        thread.join().unwrap();
    }

    #[test]
    fn a_console_that_never_stops_does_not_fill_memory() {
        let mut console = Console::default();
        for _ in 0..10 {
            console.write_all(&vec![b'x'; 1 << 20]).unwrap();
        }
        assert!(console.text().len() <= KEPT_MAX_BYTES);
    }
}
