//! The machine's one breakpoint: where it is, and which vCPUs are held because they came to it.
//!
//! ```text
//!   running --came--> held --(a stop: parks, and is held again behind it)--> ... --take, or clear--> running
//! ```
//!
//! Each vCPU's thread sets or clears its own breakpoint before it runs the guest, so that a kick is all it takes to bring it up to date.
//! Like the rendezvous this knows no KVM.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use patcher::addr::Gva;

/// Why nobody came to a breakpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BreakpointError {
    /// The time is over.
    #[error("no vCPU came there before the deadline")]
    Deadline,
    /// The guest uses the processor's breakpoints itself.
    #[error(
        "the guest has hardware breakpoints of its own on vCPU {vcpu}, which would not work meanwhile"
    )]
    InUse {
        /// The first vCPU on which that was seen.
        vcpu: usize,
    },
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
}

/// Steps of one instruction each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// It ends before the instruction at this address,
    pub to: Gva,
    /// or after so many steps.
    pub most: usize,
}

#[derive(Debug)]
struct State {
    held: Vec<bool>,
    /// The walk that whoever comes is to make before it is held.
    walk: Option<Walk>,
    /// Where the last one was before each of its steps, and behind the last.
    path: Vec<Gva>,
    in_use: Option<usize>,
    ended: bool,
}

/// The breakpoint of one machine.
#[derive(Debug)]
pub(crate) struct Breakpoint {
    /// Zero, where no kernel has code, when there is none.
    at: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Breakpoint {
    /// None, on `vcpus` vCPUs.
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            at: AtomicU64::new(0),
            state: Mutex::new(State {
                held: vec![false; vcpus],
                walk: None,
                path: Vec::new(),
                in_use: None,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is to be.
    pub(crate) fn wanted(&self) -> Option<Gva> {
        match self.at.load(Ordering::SeqCst) {
            0 => None,
            at => Some(Gva(at)),
        }
    }

    /// Wants it at `at`. Each vCPU that runs must be kicked behind it.
    pub(crate) fn set(&self, at: Gva) {
        self.state().in_use = None;
        self.at.store(at.0, Ordering::SeqCst);
    }

    /// Wants whoever comes there to make this walk first.
    pub(crate) fn set_walk(&self, walk: Walk) {
        let mut state = self.state();
        state.walk = Some(walk);
        state.path.clear();
    }

    /// For the thread of a vCPU that came: the walk that it is to make.
    pub(crate) fn walk(&self) -> Option<Walk> {
        self.state().walk
    }

    /// For the same: the way that it took.
    pub(crate) fn walked(&self, path: Vec<Gva>) {
        self.state().path = path;
    }

    /// The way that was taken last.
    pub(crate) fn path(&self) -> Vec<Gva> {
        std::mem::take(&mut self.state().path)
    }

    /// Wants it nowhere, and lets go who is held. Each vCPU must be kicked behind it.
    pub(crate) fn clear(&self) {
        self.at.store(0, Ordering::SeqCst);
        let mut state = self.state();
        state.held.fill(false);
        state.walk = None;
        drop(state);
        self.changed.notify_all();
    }

    /// For the thread of vCPU `index`, which has come to `at`: it is held, if that is still wanted.
    pub(crate) fn came(&self, index: usize, at: Gva) {
        let mut state = self.state();
        if self.wanted() != Some(at) {
            return;
        }
        if let Some(held) = state.held.get_mut(index) {
            *held = true;
        }
        self.changed.notify_all();
    }

    /// For the thread of vCPU `index`, on which none can be set.
    pub(crate) fn in_use(&self, index: usize) {
        self.state().in_use.get_or_insert(index);
        self.changed.notify_all();
    }

    /// For the thread of vCPU `index`: waits for as long as it is held and `runs` says that the guest is to run.
    pub(crate) fn wait_while_held(&self, index: usize, runs: impl Fn() -> bool) {
        if self.wanted().is_none() {
            return;
        }
        let mut state = self.state();
        while state.held.get(index) == Some(&true) && runs() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets threads that are held look again at what is wanted of them.
    pub(crate) fn wake(&self) {
        // Whoever has looked, but does not wait yet, has the lock.
        drop(self.state());
        self.changed.notify_all();
    }

    /// Nobody will come any more.
    pub(crate) fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// Waits until somebody is held.
    ///
    /// # Errors
    /// When nobody will be, or was before `deadline`.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<(), BreakpointError> {
        let mut state = self.state();
        loop {
            if state.ended {
                return Err(BreakpointError::Ended);
            }
            if let Some(vcpu) = state.in_use {
                return Err(BreakpointError::InUse { vcpu });
            }
            if state.held.contains(&true) {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(BreakpointError::Deadline);
            }
            state = self
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Who is held, ascending; they go on from the breakpoint when the guest next runs. For one who has stopped the guest.
    pub(crate) fn take(&self) -> Vec<usize> {
        let mut state = self.state();
        let held = state.held.iter().enumerate();
        let held = held.filter_map(|(index, held)| held.then_some(index));
        let held = held.collect();
        state.held.fill(false);
        held
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use patcher::addr::Gva;

    use super::{Breakpoint, BreakpointError};

    const HERE: Gva = Gva(0x1000);

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn who_came_is_held_until_taken_or_cleared() {
        let release = |how: fn(&Breakpoint)| {
            let breakpoint = Arc::new(Breakpoint::new(2));
            breakpoint.set(HERE);
            let thread = {
                let breakpoint = Arc::clone(&breakpoint);
                thread::spawn(move || {
                    breakpoint.came(1, HERE);
                    breakpoint.wait_while_held(1, || true);
                    breakpoint.wanted()
                })
            };
            breakpoint.wait(soon()).expect("somebody came");
            assert!(!thread.is_finished());
            how(&breakpoint);
            let wanted = thread.join().expect("it went on");
            assert_eq!(breakpoint.take(), [0; 0]);
            wanted
        };
        let taken = |breakpoint: &Breakpoint| {
            assert_eq!(breakpoint.take(), [1]);
            breakpoint.wake();
        };
        assert_eq!(release(taken), Some(HERE));
        assert_eq!(release(Breakpoint::clear), None);
    }

    #[test]
    fn a_stop_reaches_who_is_held_and_does_not_let_him_go() {
        let breakpoint = Arc::new(Breakpoint::new(1));
        let runs = Arc::new(AtomicBool::new(true));
        breakpoint.set(HERE);
        breakpoint.came(0, HERE);
        let thread = {
            let (breakpoint, runs) = (Arc::clone(&breakpoint), Arc::clone(&runs));
            thread::spawn(move || breakpoint.wait_while_held(0, || runs.load(Ordering::SeqCst)))
        };
        runs.store(false, Ordering::SeqCst);
        breakpoint.wake();
        thread.join().expect("it heard of the stop");
        assert_eq!(breakpoint.take(), [0]);
    }

    #[test]
    fn nobody_is_held_at_a_place_that_is_wanted_no_more() {
        let breakpoint = Breakpoint::new(1);
        breakpoint.set(HERE);
        breakpoint.clear();
        breakpoint.came(0, HERE);
        breakpoint.set(Gva(0x2000));
        breakpoint.came(0, HERE);
        let now = Instant::now();
        assert_eq!(breakpoint.wait(now), Err(BreakpointError::Deadline));
        breakpoint.in_use(0);
        let in_use = BreakpointError::InUse { vcpu: 0 };
        assert_eq!(breakpoint.wait(soon()), Err(in_use));
        breakpoint.set(HERE);
        breakpoint.end();
        assert_eq!(breakpoint.wait(soon()), Err(BreakpointError::Ended));
    }
}
