//! What happened to the guest, as a numbered stream: a ring of past events and a subscription to coming ones.
//!
//! A subscriber gets the past and the future without a gap or a repetition between them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::broadcast;

use crate::end::EndReason;
use crate::updates::Update;

/// How many events are kept for those who come late, and how far a slow subscriber may fall behind.
pub const RING: usize = 256;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Counts from 1 without gaps.
    pub sequence: u64,
    /// Time since the process started the virtual machine.
    pub at: Duration,
    /// What it was.
    pub kind: EventKind,
}

/// The things that happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The vCPUs run.
    Started,
    /// A user's pause stopped the guest.
    Paused {
        /// From the request until every vCPU and device stood still.
        stop: Duration,
    },
    /// A user's pause ended.
    Resumed {
        /// How long the guest stood still.
        paused: Duration,
    },
    /// The power button was pressed.
    PowerButton,
    /// The guest's kernel said that it panicked; it may still be writing its last words.
    Panic {
        /// The line with which it said so.
        line: String,
    },
    /// A patcher gave the guest up paused: its memory is not known to be sound.
    LeftPaused,
    /// The guest has ended; this is the last event of the machine.
    Ended(EndReason),
    /// An update changed state, or got on.
    Update(Box<Update>),
    /// Something that a layer above the machine reports, such as an update.
    Other {
        /// A fixed name for programs to test.
        code: String,
        /// A sentence for people.
        message: String,
    },
}

/// The stream itself.
#[derive(Debug)]
pub struct Events {
    start: Instant,
    ring: Mutex<VecDeque<Event>>,
    sender: broadcast::Sender<Event>,
}

impl Events {
    /// An empty stream whose times count from now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            ring: Mutex::new(VecDeque::new()),
            sender: broadcast::channel(RING).0,
        }
    }

    /// Time since the stream was made.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Adds an event and returns it as numbered.
    pub fn publish(&self, kind: EventKind) -> Event {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let event = Event {
            sequence: ring.back().map_or(1, |last| last.sequence + 1),
            at: self.start.elapsed(),
            kind,
        };
        if ring.len() == RING {
            ring.pop_front();
        }
        ring.push_back(event.clone());
        // An error here means only that nobody has subscribed.
        drop(self.sender.send(event.clone()));
        event
    }

    /// Number of the newest event; zero before the first.
    #[must_use]
    pub fn newest(&self) -> u64 {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.back().map_or(0, |last| last.sequence)
    }

    /// The kept past events numbered above `after`, and the coming ones.
    #[must_use]
    pub fn subscribe(&self, after: u64) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let past = ring
            .iter()
            .filter(|event| event.sequence > after)
            .cloned()
            .collect();
        (past, self.sender.subscribe())
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::{EventKind, Events, RING};

    #[test]
    fn a_subscriber_sees_past_and_future_without_gap_or_repetition() {
        let events = Events::new();
        for _ in 0..RING + 10 {
            events.publish(EventKind::PowerButton);
        }
        let (past, mut future) = events.subscribe(0);
        events.publish(EventKind::Started);
        assert_eq!(past.len(), RING);
        assert_eq!(past.first().map(|event| event.sequence), Some(11));
        let last = past.last().map(|event| event.sequence);
        let next = future.try_recv().map(|event| event.sequence).ok();
        assert_eq!(next, last.map(|sequence| sequence + 1));
        assert!(future.try_recv().is_err());
    }

    #[test]
    fn a_subscriber_that_has_seen_some_gets_only_the_rest() {
        let events = Events::new();
        for _ in 0..3 {
            events.publish(EventKind::PowerButton);
        }
        let (past, _future) = events.subscribe(2);
        let sequences: Vec<u64> = past.iter().map(|event| event.sequence).collect();
        assert_eq!(sequences, [3]);
    }
}
