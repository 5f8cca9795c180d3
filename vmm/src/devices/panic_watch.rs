//! Knowing a guest's panic by what its kernel says on the serial console.
//!
//! A stock kernel that panics says so and then spins for ever: nothing else leaves the machine. A line that some user of
//! the guest has printed must not count, or anybody with a terminal could end the machine. The kernel writes its
//! own messages with the UART's interrupts masked, and everything of user space goes out by transmit interrupt with
//! them enabled; so only bytes written while masked are looked at.

use super::bus::Request;

/// How the first line of a panic contains it.
const PANIC: &str = "Kernel panic - not syncing";
/// How the last line contains it, when the kernel is not going to restart by itself.
const LAST_WORDS: &str = "---[ end Kernel panic - not syncing";
/// Longer lines are cut: nothing looked for starts so late.
const LINE_MAX: usize = 256;

/// Watches one console.
#[derive(Debug, Default)]
pub struct PanicWatch {
    line: Vec<u8>,
    panicked: bool,
}

impl PanicWatch {
    /// Takes one byte that the guest transmitted; `masked` tells whether the UART's interrupts were.
    pub fn byte(&mut self, byte: u8, masked: bool) -> Option<Request> {
        if !masked {
            return None;
        }
        if byte != b'\n' {
            if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
            return None;
        }
        let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        if line.contains(LAST_WORDS) {
            return Some(Request::Dead);
        }
        if self.panicked || !line.contains(PANIC) {
            return None;
        }
        self.panicked = true;
        Some(Request::Panicked(without_time(&line).to_owned()))
    }
}

/// The line without the kernel's time stamp, `[    1.234567] `.
fn without_time(line: &str) -> &str {
    match line
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        Some((_, rest)) => rest,
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::{PanicWatch, Request};

    fn feed(watch: &mut PanicWatch, text: &str, masked: bool) -> Vec<Request> {
        text.bytes()
            .filter_map(|byte| watch.byte(byte, masked))
            .collect()
    }

    const WORDS: &str = "[    3.5] Kernel panic - not syncing: sysrq triggered crash\r\n\
        [    3.5] CPU: 0\r\n\
        [    3.6] Kernel panic - not syncing: again\r\n\
        [    3.7] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n";

    #[test]
    fn a_panic_is_known_by_its_first_and_its_last_line() {
        let found = feed(&mut PanicWatch::default(), WORDS, true);
        let said = "Kernel panic - not syncing: sysrq triggered crash".to_owned();
        assert_eq!(found, [Request::Panicked(said), Request::Dead]);
    }

    #[test]
    fn what_user_space_prints_is_not_a_panic() {
        let mut watch = PanicWatch::default();
        assert_eq!(feed(&mut watch, WORDS, false), []);
        // A user's text in the middle of a kernel line does not become part of it.
        feed(&mut watch, "[ 1.0] Kernel panic", true);
        feed(&mut watch, " - not syncing: no", false);
        assert_eq!(feed(&mut watch, "s\n", true), []);
    }

    #[test]
    fn endless_lines_take_no_memory() {
        let mut watch = PanicWatch::default();
        feed(&mut watch, &"x".repeat(100_000), true);
        assert!(watch.line.capacity() < 1024);
    }
}
