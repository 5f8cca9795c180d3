//! The event loop: the host side of devices, and signals. It never waits for the guest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Inner;
use crate::end::EndReason;
use crate::signals::EndingSignals;

/// Something that the loop serves.
pub(super) type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// So many events at once; there are few sources.
const READY_EVENTS: usize = 16;
/// The loop's subscribers need little.
const STACK: usize = 128 * 1024;

/// Runs `subscribers` on a thread of their own until `stop` is written.
pub(super) fn spawn(
    subscribers: Vec<Subscriber>,
    stop: EventFd,
) -> io::Result<thread::JoinHandle<()>> {
    let mut manager = EventManager::<Subscriber>::new_with_capacity(READY_EVENTS)
        .map_err(|error| io::Error::other(format!("event loop: {error}")))?;
    let stopped = Arc::new(AtomicBool::new(false));
    manager.add_subscriber(Box::new(Stop {
        event: stop,
        stopped: Arc::clone(&stopped),
    }));
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    thread::Builder::new()
        .name("devices".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "the event loop failed");
                    return;
                }
            }
        })
}

struct Stop {
    event: EventFd,
    stopped: Arc<AtomicBool>,
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        listen(ops, Events::new(&self.event, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Ends the machine on a signal that asks the process to end.
pub(super) struct Signals {
    pub(super) signals: EndingSignals,
    pub(super) machine: Weak<Inner>,
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        listen(ops, Events::new(&self.signals, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        if let (Some(name), Some(machine)) = (self.signals.received(), self.machine.upgrade()) {
            machine.end(EndReason::Killed(name.to_owned()));
        }
    }
}

fn listen(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        tracing::error!(%error, "the event loop lacks one of its sources");
    }
}
