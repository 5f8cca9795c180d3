//! A guest's serial console as lines that can be waited for.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    closed: bool,
}

/// Everything that the guest has printed so far; a thread of its own keeps it up to date.
#[derive(Clone, Debug)]
pub struct Console(Arc<(Mutex<State>, Condvar)>);

impl Console {
    /// Collects the lines of `stream` until it ends.
    pub fn follow(stream: impl Read + Send + 'static) -> Self {
        let console = Self(Arc::default());
        let sink = console.clone();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                sink.with(|state| {
                    state
                        .lines
                        .push(String::from_utf8_lossy(&line).trim_end().to_owned())
                });
                line.clear();
            }
            sink.with(|state| state.closed = true);
        });
        console
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (state, changed) = &*self.0;
        let result = change(&mut state.lock().expect("no reader of the console panicked"));
        changed.notify_all();
        result
    }

    /// How many lines there are: a place from which to wait.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.with(|state| state.lines.len())
    }

    /// The lines from `mark` on.
    #[must_use]
    pub fn since(&self, mark: usize) -> Vec<String> {
        self.with(|state| state.lines[mark.min(state.lines.len())..].to_vec())
    }

    /// Waits for a line from `mark` on that `wanted` accepts, and gives its place.
    ///
    /// # Errors
    /// What was printed instead, when the time is over or the guest has ended.
    pub fn wait(
        &self,
        mark: usize,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<usize, String> {
        let deadline = Instant::now() + limit;
        let (state, changed) = &*self.0;
        let mut state = state.lock().expect("no reader of the console panicked");
        let mut seen = mark;
        loop {
            if let Some(found) = state.lines.iter().skip(seen).position(|line| wanted(line)) {
                return Ok(seen + found);
            }
            seen = state.lines.len().max(mark);
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                let why = if state.closed {
                    "the guest ended"
                } else {
                    "time is over"
                };
                return Err(format!("{why}; its last lines:\n{}", tail(&state.lines)));
            }
            state = changed
                .wait_timeout(state, left)
                .expect("no reader of the console panicked")
                .0;
        }
    }
}

fn tail(lines: &[String]) -> String {
    lines[lines.len().saturating_sub(40)..].join("\n")
}
