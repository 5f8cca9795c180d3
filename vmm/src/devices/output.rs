//! The host side of the console's output: a queue that never blocks a vCPU.
//!
//! A reader that is slow makes the guest's transmitter busy, as a slow line would; one that has stopped loses only what no
//! longer fits. Lines go out at once, half lines (a prompt) when a timer of a few milliseconds says that no more came.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::alarm::Alarm;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The transmitter is busy while more than this waits.
const BUSY_ABOVE: usize = 4096;
/// More than this is never kept.
const KEPT_MOST: usize = 256 * 1024;
/// So much goes out in one call. A pipe or terminal that is ready takes it without blocking.
const CHUNK: usize = 256;
/// How long half a line waits for its rest.
const LINGER: Duration = Duration::from_millis(2);
/// How long to wait before a reader that took nothing is tried again.
const RETRY: Duration = Duration::from_millis(10);

/// What to do when more waits than is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Make the guest wait; what comes all the same is lost.
    Wait,
    /// Forget the oldest: for a terminal that nobody may be looking at.
    ForgetOldest,
}

/// The queue.
#[derive(Debug)]
pub struct ConsoleOutput {
    to: Option<OwnedFd>,
    queue: VecDeque<u8>,
    when_full: WhenFull,
    timer: Alarm,
    lost: u64,
}

impl ConsoleOutput {
    /// A queue before `to`, or one that swallows everything. `timer` says when [`Self::flush_waiting`] is due.
    #[must_use]
    pub fn new(to: Option<OwnedFd>, when_full: WhenFull, timer: Alarm) -> Self {
        Self {
            to,
            queue: VecDeque::new(),
            when_full,
            timer,
            lost: 0,
        }
    }

    /// Whether the guest should wait before it transmits more.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.when_full == WhenFull::Wait && self.queue.len() > BUSY_ABOVE
    }

    /// Sends what waits, as far as the reader takes it now.
    pub fn flush_waiting(&mut self) {
        if let Some(left) = self.send(Duration::ZERO) {
            self.timer.set(left);
        }
    }

    /// Sends what waits before the process ends, and waits up to `patience` for the reader.
    pub fn finish(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.queue.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.send(left).is_some() && left.is_zero() {
                break;
            }
        }
        let lost = self.lost + self.queue.len() as u64;
        if lost > 0 {
            tracing::warn!(lost, "console output was lost: nobody read it");
        }
    }

    /// Sends until the queue is empty (`None`) or the reader takes no more within `patience` (when to try again).
    fn send(&mut self, patience: Duration) -> Option<Duration> {
        let Some(to) = &self.to else {
            self.queue.clear();
            return None;
        };
        while !self.queue.is_empty() {
            let mut ready = [PollFd::new(to, PollFlags::OUT)];
            match poll(&mut ready, Timespec::try_from(patience).ok().as_ref()) {
                Ok(0) => return Some(RETRY),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return self.give_up(error),
            }
            let (front, _) = self.queue.as_slices();
            let chunk = &front[..front.len().min(CHUNK)];
            match rustix::io::write(to.as_fd(), chunk) {
                Ok(count) => drop(self.queue.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Some(RETRY),
                Err(error) => return self.give_up(error),
            }
        }
        None
    }

    /// The reader is gone for good.
    fn give_up(&mut self, error: rustix::io::Errno) -> Option<Duration> {
        tracing::warn!(%error, "the console's output cannot be written any more and is dropped");
        self.to = None;
        self.queue.clear();
        None
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.to.is_none() {
            return Ok(bytes.len());
        }
        let was_empty = self.queue.is_empty();
        for byte in bytes {
            if self.queue.len() >= KEPT_MOST {
                self.lost += 1;
                match self.when_full {
                    WhenFull::Wait => continue,
                    WhenFull::ForgetOldest => drop(self.queue.pop_front()),
                }
            }
            self.queue.push_back(*byte);
        }
        let line_ended = bytes.contains(&b'\n');
        if line_ended || self.queue.len() == CHUNK {
            self.flush_waiting();
        } else if was_empty {
            self.timer.set(LINGER);
        }
        Ok(bytes.len())
    }

    /// Nothing: the UART flushes after every byte, and bytes go out by line.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write, pipe};
    use std::time::{Duration, Instant};

    use super::{Alarm, BUSY_ABOVE, CHUNK, ConsoleOutput, KEPT_MOST, WhenFull};

    fn output(when_full: WhenFull) -> (ConsoleOutput, std::io::PipeReader) {
        let (reader, writer) = pipe().expect("a pipe");
        let timer = Alarm::new().expect("a timer");
        (
            ConsoleOutput::new(Some(writer.into()), when_full, timer),
            reader,
        )
    }

    #[test]
    fn lines_go_out_at_once_and_half_lines_when_the_timer_says_so() {
        let (mut output, mut reader) = output(WhenFull::Wait);
        output.write_all(b"one\nlogin: ").expect("queued");
        let mut found = [0; 11];
        reader.read_exact(&mut found).expect("a line");
        assert_eq!(&found, b"one\nlogin: ");
        output.write_all(b"x").expect("queued");
        let deadline = Instant::now() + Duration::from_secs(9);
        while !output.timer.has_rung() {
            assert!(Instant::now() < deadline, "the timer was not set");
            std::thread::yield_now();
        }
        output.flush_waiting();
        reader.read_exact(&mut found[..1]).expect("half a line");
    }

    #[test]
    fn a_reader_that_stopped_makes_the_line_busy_and_takes_no_endless_memory() {
        let (mut output, reader) = output(WhenFull::Wait);
        let line = [b"x".repeat(CHUNK - 1), b"\n".to_vec()].concat();
        while !output.is_busy() {
            output.write_all(&line).expect("queued");
        }
        assert!(output.queue.len() > BUSY_ABOVE);
        for _ in 0..2 * KEPT_MOST / line.len() {
            output.write_all(&line).expect("queued or lost");
        }
        assert!(output.queue.len() <= KEPT_MOST);
        assert!(output.lost > 0);
        drop(reader);
        output.finish(Duration::from_secs(5));
        assert!(output.queue.is_empty());
    }

    #[test]
    fn a_terminal_without_a_reader_keeps_the_newest() {
        let (mut output, _reader) = output(WhenFull::ForgetOldest);
        for index in 0..KEPT_MOST {
            writeln!(output, "{index}").expect("queued");
        }
        assert!(!output.is_busy());
        assert_eq!(output.queue.back(), Some(&b'\n'));
        assert!(output.queue.len() <= KEPT_MOST);
    }
}
