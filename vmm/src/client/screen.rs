//! A view that has the terminal to itself: drawn anew each time, until a key or a signal ends it.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{isatty, tcgetwinsize};

use crate::output;
use crate::signals::EndingSignals;
use crate::terminal::{OtherScreen, RawMode};

/// The size of a terminal that does not tell its own: rows and columns.
const USUAL_SIZE: (usize, usize) = (24, 80);
/// How long a key may wait to be noticed.
const BETWEEN_KEYS: Duration = Duration::from_millis(50);
/// Keys that end a view: q, and Ctrl-C and Ctrl-D, which are bytes in raw mode.
const ENDING_KEYS: [u8; 4] = [b'q', b'Q', 3, 4];

/// The terminal while a view has it. Dropping this leaves it as it was.
#[derive(Debug)]
pub(super) struct Screen {
    /// Dropped first: what was typed goes to nobody.
    _other: OtherScreen,
    /// None if standard input is no terminal: then only signals end the view.
    keys: Option<RawMode>,
    signals: EndingSignals,
}

impl Screen {
    /// Takes the terminal; none if standard output is no terminal.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        if !isatty(stdout()) {
            return Ok(None);
        }
        // First of all: from here on no signal ends us before the terminal is as it was.
        let signals = EndingSignals::take()?;
        Ok(Some(Self {
            _other: OtherScreen::enter()?,
            keys: RawMode::enter()?,
            signals,
        }))
    }

    /// Shows `text`, as much of it as there is room for.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub(super) fn draw(text: &str) -> io::Result<()> {
        let size = tcgetwinsize(stdout()).map(|size| (size.ws_row.into(), size.ws_col.into()));
        let size = size
            .ok()
            .filter(|(rows, columns)| *rows > 0 && *columns > 0);
        output::text(frame(text, size.unwrap_or(USUAL_SIZE)))
    }

    /// Waits until somebody wants the view to end.
    ///
    /// # Errors
    /// When that cannot be known.
    pub(super) async fn ended(&mut self) -> io::Result<()> {
        while self.signals.received().is_none() && !self.ending_key()? {
            tokio::time::sleep(BETWEEN_KEYS).await;
        }
        Ok(())
    }

    /// Whether a key that ends the view was pressed, or the keyboard taken away.
    fn ending_key(&self) -> io::Result<bool> {
        let mut keyboard = [PollFd::from_borrowed_fd(stdin(), PollFlags::IN)];
        if self.keys.is_none() || poll(&mut keyboard, Some(&Timespec::default()))? == 0 {
            return Ok(false);
        }
        let mut typed = [0; 64];
        let count = rustix::io::read(stdin(), &mut typed)?;
        let typed = typed.get(..count).unwrap_or_default();
        Ok(count == 0 || typed.iter().any(|key| ENDING_KEYS.contains(key)))
    }
}

/// What a terminal of `size` rows and columns must be sent to show the beginning of each line of `text`, and nothing else.
fn frame(text: &str, size: (usize, usize)) -> String {
    let (rows, columns) = size;
    let count = text.lines().count();
    let shown = if count > rows {
        rows.saturating_sub(1)
    } else {
        rows
    };
    let lines = text.lines().take(shown);
    let mut lines: Vec<String> = lines
        .map(|line| line.chars().take(columns).collect())
        .collect();
    if count > rows {
        let more = format!("... and {} lines more", count - shown);
        lines.push(more.chars().take(columns).collect());
    }
    // Each line is wiped before it is written: behind a line as long as the screen is wide, its last column would be. So is what is left below.
    let mut frame = format!("\x1b[H\x1b[K{}", lines.join("\r\n\x1b[K"));
    if lines.len() < rows {
        frame.push_str("\r\n\x1b[J");
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::frame;

    #[test]
    fn a_frame_fits_its_terminal() {
        let check = |text: &str, size, lines: &[&str], below: bool| {
            let lines = lines.join("\r\n\x1b[K");
            let rest = if below { "\r\n\x1b[J" } else { "" };
            let wanted = format!("\x1b[H\x1b[K{lines}{rest}");
            assert_eq!(frame(text, size), wanted, "{text:?} on {size:?}");
        };
        check("ab\nc\n", (3, 9), &["ab", "c"], true);
        check("abc\n\ndef\n", (3, 2), &["ab", "", "de"], false);
        check(
            "a\nb\nc\nd\n",
            (3, 99),
            &["a", "b", "... and 2 lines more"],
            false,
        );
        check("µµµ\n", (1, 2), &["µµ"], false);
        check("a\nb\n", (1, 5), &["... a"], false);
    }
}
