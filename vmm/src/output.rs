//! The only way to the process's standard output and standard error besides logs and the guest's console.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes `text` and a newline to standard output. A reader that has gone away (`exopatch ... | head`) is not an error.
///
/// # Errors
/// Whatever else kept the text from being written.
pub fn line(text: impl Display) -> io::Result<()> {
    is_read(format_args!("{text}\n")).map(drop)
}

/// Writes `text` to standard output as it is.
///
/// # Errors
/// As [`line()`].
pub fn text(text: impl Display) -> io::Result<()> {
    is_read(text).map(drop)
}

/// Writes `text` to standard output as it is; whether anybody still reads there, for those who write without end.
///
/// # Errors
/// As [`line()`].
pub fn is_read(text: impl Display) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    }
}

/// Tells the person at the terminal something that is neither result nor log.
///
/// Nobody is left to tell when standard error itself is gone, so failures end here.
pub fn note(text: impl Display) {
    drop(writeln!(io::stderr().lock(), "exopatch: {text}"));
}

/// Writes an error that is already in the form that was asked for to standard error.
pub fn raw_error(text: impl Display) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Writes an error with its chain of causes to standard error.
pub fn error(error: &dyn std::error::Error) {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        let line = inner.to_string();
        // Errors that already quote their source in their own message are not repeated.
        if !text.contains(&line) {
            text.push_str("\n  because: ");
            text.push_str(&line);
        }
        cause = inner.source();
    }
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Text from outside, made harmless for a terminal: control characters become escapes.
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// As [`clean`], of a text of several lines.
#[must_use]
pub fn clean_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(clean).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{clean, clean_lines};

    #[test]
    fn what_a_guest_says_cannot_drive_the_terminal() {
        assert_eq!(
            clean("a\u{1b}[2Jb\u{9b}1m é\n"),
            "a\\u{1b}[2Jb\\u{9b}1m é\\n"
        );
        assert_eq!(clean_lines("a\u{1b}\nb\r\nc"), "a\\u{1b}\nb\nc");
    }
}
