//! The door between the host side of devices and the guest: shut while the guest is paused.
//!
//! The event loop passes it for each thing it does to a device, and never waits at it: what comes while the door is shut
//! stays where it is (in a pipe, in a terminal) until the door's event says that it is open again.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Debug, Default)]
struct State {
    shut: bool,
    inside: usize,
}

/// The door.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    quiet: Condvar,
    opened: EventFd,
}

/// Somebody is past the door; dropping this is leaving.
#[derive(Debug)]
pub(crate) struct Inside<'g>(&'g Gate);

impl Gate {
    /// An open door.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            quiet: Condvar::new(),
            opened: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the door, unless it is shut.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.shut {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Shuts the door and waits until nobody is inside. Returns false, with the door open, when that takes past `deadline`.
    pub(crate) fn shut(&self, deadline: Instant) -> bool {
        let mut state = self.state();
        state.shut = true;
        while state.inside > 0 {
            let now = Instant::now();
            if now >= deadline {
                drop(state);
                self.open();
                return false;
            }
            state = self
                .quiet
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Opens the door and says so.
    pub(crate) fn open(&self) {
        self.state().shut = false;
        if let Err(error) = self.opened.write(1) {
            tracing::warn!(%error, "devices could not be told that the guest runs again");
        }
    }

    /// Readable after the door was opened.
    pub(crate) fn opened(&self) -> &EventFd {
        &self.opened
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.state().inside -= 1;
        self.0.quiet.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Gate;

    #[test]
    fn nobody_passes_a_shut_door_and_opening_is_told() {
        let gate = Gate::new().expect("a gate");
        assert!(gate.shut(Instant::now() + Duration::from_secs(9)));
        assert!(gate.enter().is_none());
        assert!(gate.opened().read().is_err());
        gate.open();
        assert!(gate.opened().read().is_ok());
        assert!(gate.enter().is_some());
    }

    #[test]
    fn a_door_that_does_not_clear_in_time_stays_open() {
        let gate = Gate::new().expect("a gate");
        let inside = gate.enter();
        assert!(!gate.shut(Instant::now()));
        drop(inside);
        assert!(gate.enter().is_some());
    }
}
