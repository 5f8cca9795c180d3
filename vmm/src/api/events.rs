//! The event stream: the machine's event log, followed by any number of clients, each at its own pace.
//!
//! Follows the server-sent events of the HTML standard (section 9.2): each event has an id, and a client that comes
//! back with `Last-Event-ID` gets everything after it. A client that is too slow for the log is told how many events
//! it missed; nothing is ever kept for a single client.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse;
use tokio::sync::{broadcast, watch};
use tokio_stream::Stream;

use super::convert;
use super::machine::Machine;
use super::wire;
use crate::events::{Event, Events};

/// A place in the event log.
struct Follower {
    machine: Arc<dyn Machine>,
    /// Number of the last event that was given out or counted as missed.
    seen: u64,
    past: VecDeque<Event>,
    coming: broadcast::Receiver<Event>,
    /// True when no more events will come.
    stop: watch::Receiver<bool>,
}

impl Follower {
    fn new(machine: Arc<dyn Machine>, seen: Option<u64>, stop: watch::Receiver<bool>) -> Self {
        let seen = start_after(machine.events(), seen);
        let (past, coming) = machine.events().subscribe(seen);
        Self {
            machine,
            seen,
            past: past.into(),
            coming,
            stop,
        }
    }

    /// The next event, as soon as there is one; `None` once `stop` is true and all were given out.
    async fn next(&mut self) -> Option<wire::Event> {
        loop {
            let event = match self.past.pop_front() {
                Some(event) => event,
                None => match self.coming.try_recv() {
                    Ok(event) => event,
                    Err(broadcast::error::TryRecvError::Lagged(_)) => {
                        let (past, coming) = self.machine.events().subscribe(self.seen);
                        (self.past, self.coming) = (past.into(), coming);
                        continue;
                    }
                    Err(broadcast::error::TryRecvError::Closed) => return None,
                    Err(broadcast::error::TryRecvError::Empty) if *self.stop.borrow() => {
                        return None;
                    }
                    Err(broadcast::error::TryRecvError::Empty) => {
                        self.wait().await;
                        continue;
                    }
                },
            };
            let missed = event.sequence.saturating_sub(self.seen + 1);
            if missed > 0 {
                self.seen = event.sequence - 1;
                let at_ms = convert::ms(event.at);
                self.past.push_front(event);
                return Some(wire::Event {
                    id: self.seen,
                    at_ms,
                    body: wire::EventBody::Missed { count: missed },
                });
            }
            // Lower numbers were given out already.
            if event.sequence > self.seen {
                self.seen = event.sequence;
                return Some(convert::event(event));
            }
        }
    }

    /// Waits until there may be an event or the end; a received event is kept.
    async fn wait(&mut self) {
        tokio::select! {
            received = self.coming.recv() => if let Ok(event) = received {
                self.past.push_back(event);
            },
            _ = self.stop.changed() => {}
        }
    }
}

/// Where a client starts to read: after the event that it saw last, else at what happens from now on.
///
/// A number from the future belongs to an earlier VM on the same socket: everything kept is then new.
fn start_after(events: &Events, last_seen: Option<u64>) -> u64 {
    let newest = events.newest();
    match last_seen {
        Some(id) if id <= newest => id,
        Some(_) => 0,
        None => newest,
    }
}

/// The machine's events after `last_seen`, framed; ends when `stop` becomes true and all were sent.
pub(super) fn stream(
    machine: Arc<dyn Machine>,
    last_seen: Option<u64>,
    stop: watch::Receiver<bool>,
) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    let follower = Follower::new(machine, last_seen, stop);
    futures_util::stream::unfold(follower, async |mut follower| {
        let event = follower.next().await?;
        let framed = sse::Event::default()
            .id(event.id.to_string())
            .event(event.body.kind());
        let framed = match framed.json_data(&event) {
            Ok(framed) => framed,
            Err(why) => sse::Event::default().comment(format!("event {}: {why}", event.id)),
        };
        Some((Ok(framed), follower))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::Follower;
    use crate::api::double::Double;
    use crate::api::machine::Machine;
    use crate::api::wire::EventBody;
    use crate::events::{EventKind, RING};

    /// Publishes `before` events, follows after `seen`, publishes `later`, and gives the ids read and the number missed.
    fn check(
        before: usize,
        seen: Option<u64>,
        later: usize,
        ids: std::ops::Range<u64>,
        missed: u64,
    ) {
        let double = Arc::new(Double::default());
        let publish =
            |count| (0..count).for_each(|_| drop(double.events().publish(EventKind::PowerButton)));
        let (_stopped, stop) = watch::channel(true);
        publish(before);
        let mut follower = Follower::new(double.clone(), seen, stop);
        publish(later);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let (mut read, mut gone) = (Vec::new(), 0);
        while let Some(event) = runtime.block_on(follower.next()) {
            match event.body {
                EventBody::Missed { count } => gone += count,
                EventBody::PowerButton => read.push(event.id),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(read, ids.collect::<Vec<_>>());
        assert_eq!(gone, missed);
    }

    #[test]
    fn a_client_gets_what_it_has_not_seen() {
        let ring = u64::try_from(RING).unwrap();
        check(3, None, 0, 4..4, 0);
        check(3, None, 2, 4..6, 0);
        check(3, Some(0), 2, 1..6, 0);
        check(3, Some(2), 0, 3..4, 0);
        check(3, Some(3), 1, 4..5, 0);
        check(3, Some(99), 0, 1..4, 0);
        check(RING + 10, Some(4), 0, 11..ring + 11, 6);
        check(3, Some(3), RING + 10, 14..ring + 14, 10);
    }

    #[test]
    fn a_waiting_client_is_woken() {
        let double = Arc::new(Double::default());
        let (_stopped, stop) = watch::channel(false);
        let mut follower = Follower::new(double.clone(), None, stop);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let event = runtime.block_on(async {
            tokio::join!(follower.next(), async {
                double.events().publish(EventKind::Started)
            })
            .0
        });
        assert_eq!(event.unwrap().body, EventBody::Started);
    }
}
