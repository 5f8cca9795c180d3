//! Where the vCPU threads stand still: all of them are called before any is awaited, and none is let go alone.
//!
//! ```text
//!            wanted = Stop, kick all, await all
//!   running ------------------------------------> stopped
//!      ^  ^---- deadline missed: wanted = Run ------|  |
//!      '------------- wanted = Run -----------------'  |
//!      '------------- wanted = Exit ----> threads end <'
//! ```
//!
//! It knows no KVM: a thread brings a value of type `S` (its registers) when it stands still, and the caller brings the kick.

use std::mem;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What a vCPU thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Run the guest.
    Run,
    /// Stand still: [`Rendezvous::park`].
    Stop,
    /// Return from the thread.
    Exit,
}

/// What happened while a thread stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// The stop lasted so long that the guest's watchdogs must be told.
    pub(crate) tell_clock: bool,
}

#[derive(Debug)]
struct Slots<S> {
    parked: Vec<Option<S>>,
    /// For each thread: a long stop has ended while it stood still. Kept until it leaves, which may be stops later.
    tell_clock: Vec<bool>,
    running_threads: usize,
}

/// The meeting place of one machine's vCPU threads.
#[derive(Debug)]
pub(crate) struct Rendezvous<S> {
    wanted: AtomicU8,
    slots: Mutex<Slots<S>>,
    arrived: Condvar,
    released: Condvar,
}

impl<S: Copy> Rendezvous<S> {
    /// A meeting place for `threads` threads, which are first to stand still.
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            wanted: AtomicU8::new(Wanted::Stop as u8),
            slots: Mutex::new(Slots {
                parked: vec![None; threads],
                tell_clock: vec![false; threads],
                running_threads: threads,
            }),
            arrived: Condvar::new(),
            released: Condvar::new(),
        }
    }

    /// What the threads are to do now.
    pub(crate) fn wanted(&self) -> Wanted {
        match self.wanted.load(Ordering::SeqCst) {
            run if run == Wanted::Run as u8 => Wanted::Run,
            stop if stop == Wanted::Stop as u8 => Wanted::Stop,
            _ => Wanted::Exit,
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots<S>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For thread `index`: stands still until something else is wanted.
    pub(crate) fn park(&self, index: usize, state: S) -> Left {
        let mut slots = self.slots();
        if let Some(slot) = slots.parked.get_mut(index) {
            *slot = Some(state);
        }
        self.arrived.notify_all();
        while self.wanted() == Wanted::Stop {
            slots = self
                .released
                .wait(slots)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(slot) = slots.parked.get_mut(index) {
            *slot = None;
        }
        let tell_clock = slots.tell_clock.get_mut(index).is_some_and(mem::take);
        Left { tell_clock }
    }

    /// For a thread that ends: returns whether it was the last.
    pub(crate) fn leave(&self) -> bool {
        let mut slots = self.slots();
        slots.running_threads = slots.running_threads.saturating_sub(1);
        self.arrived.notify_all();
        slots.running_threads == 0
    }

    /// Stops all threads: kicks every one, then awaits every one. On a miss they run on.
    ///
    /// A thread that has not yet left the stop before has not run since, so what it brought then still holds.
    ///
    /// # Errors
    /// The index of the first thread that did not stand still before `deadline`, or `None` when they have ended or end.
    pub(crate) fn stop(
        &self,
        deadline: Instant,
        kick: impl Fn(usize),
    ) -> Result<Vec<S>, Option<usize>> {
        let count = {
            let slots = self.slots();
            if !self.change(Wanted::Run, Wanted::Stop) && self.wanted() == Wanted::Exit {
                return Err(None);
            }
            slots.parked.len()
        };
        (0..count).for_each(kick);
        let mut slots = self.slots();
        loop {
            if self.wanted() == Wanted::Exit {
                return Err(None);
            }
            let missing = slots.parked.iter().position(Option::is_none);
            let Some(missing) = missing else {
                return Ok(slots.parked.iter().flatten().copied().collect());
            };
            let now = Instant::now();
            if now >= deadline {
                self.change(Wanted::Stop, Wanted::Run);
                self.released.notify_all();
                return Err(Some(missing));
            }
            slots = self
                .arrived
                .wait_timeout(slots, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets all threads run. Returns false when they have been told to end instead.
    pub(crate) fn resume(&self, tell_clock: bool) -> bool {
        let mut slots = self.slots();
        if tell_clock {
            slots.tell_clock.fill(true);
        }
        self.change(Wanted::Stop, Wanted::Run);
        self.released.notify_all();
        self.wanted() == Wanted::Run
    }

    /// Tells all threads to end, wherever they are. Nothing undoes that.
    pub(crate) fn exit(&self, kick: impl Fn(usize)) {
        let count = {
            let slots = self.slots();
            self.wanted.store(Wanted::Exit as u8, Ordering::SeqCst);
            self.released.notify_all();
            self.arrived.notify_all();
            slots.parked.len()
        };
        (0..count).for_each(kick);
    }

    fn change(&self, from: Wanted, to: Wanted) -> bool {
        self.wanted
            .compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use super::{Rendezvous, Wanted};

    const SOON: Duration = Duration::from_secs(20);

    struct Crew {
        place: Arc<Rendezvous<usize>>,
        turns: Arc<Vec<AtomicU64>>,
        threads: Vec<JoinHandle<()>>,
    }

    /// Threads that look at what is wanted between turns, except `deaf` ones, which look only when told to end.
    fn crew(count: usize, deaf: Option<usize>) -> Crew {
        let place = Arc::new(Rendezvous::new(count));
        let turns = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
        let threads = (0..count)
            .map(|index| {
                let place = Arc::clone(&place);
                let turns = Arc::clone(&turns);
                thread::spawn(move || {
                    let mut first = true;
                    loop {
                        match place.wanted() {
                            Wanted::Exit => break,
                            Wanted::Stop if first || deaf != Some(index) => {
                                first = false;
                                place.park(index, index);
                            }
                            _ => {
                                turns[index].fetch_add(1, Ordering::Relaxed);
                                thread::yield_now();
                            }
                        }
                    }
                    place.leave();
                })
            })
            .collect();
        Crew {
            place,
            turns,
            threads,
        }
    }

    impl Crew {
        fn turns(&self) -> Vec<u64> {
            let turns = self.turns.iter();
            turns.map(|it| it.load(Ordering::SeqCst)).collect()
        }

        /// Waits until every thread has had a turn more.
        fn run(&self) {
            let before = self.turns();
            while self
                .turns()
                .iter()
                .zip(&before)
                .any(|(now, then)| now == then)
            {
                thread::yield_now();
            }
        }

        fn end(self) {
            self.place.exit(|_| {});
            for thread in self.threads {
                thread.join().expect("a thread ended well");
            }
        }
    }

    #[test]
    fn nobody_runs_between_stop_and_resume() {
        let crew = crew(4, None);
        for _ in 0..200 {
            let states = crew.place.stop(Instant::now() + SOON, |_| {});
            assert_eq!(states, Ok(vec![0, 1, 2, 3]));
            let before = crew.turns();
            thread::yield_now();
            assert_eq!(crew.turns(), before);
            assert!(crew.place.resume(false));
        }
        crew.end();
    }

    #[test]
    fn every_thread_is_kicked_before_any_is_awaited() {
        let crew = crew(3, None);
        crew.place
            .stop(Instant::now() + SOON, |_| {})
            .expect("first stop");
        crew.place.resume(false);
        let kicked = AtomicU64::new(0);
        crew.place
            .stop(Instant::now() + SOON, |index| {
                kicked.fetch_or(1 << index, Ordering::Relaxed);
            })
            .expect("stopped");
        assert_eq!(kicked.into_inner(), 0b111);
        crew.end();
    }

    #[test]
    fn a_missed_deadline_names_the_thread_and_lets_the_others_run() {
        let crew = crew(3, Some(1));
        crew.place
            .stop(Instant::now() + SOON, |_| {})
            .expect("first stop");
        crew.place.resume(false);
        crew.run();
        let missed = crew
            .place
            .stop(Instant::now() + Duration::from_millis(20), |_| {});
        assert_eq!(missed, Err(Some(1)));
        assert_eq!(crew.place.wanted(), Wanted::Run);
        crew.end();
    }

    #[test]
    fn a_thread_that_stands_through_two_stops_hears_of_the_long_one() {
        let place = Arc::new(Rendezvous::new(1));
        let thread = {
            let place = Arc::clone(&place);
            thread::spawn(move || place.park(0, 0).tell_clock)
        };
        place.stop(Instant::now() + SOON, |_| {}).expect("stopped");
        {
            // The thread cannot leave between these: it needs the same lock to look.
            let mut slots = place.slots();
            slots.tell_clock.fill(true);
        }
        place.resume(false);
        assert!(thread.join().expect("left"));
    }

    #[test]
    fn an_end_reaches_threads_that_stand_still() {
        let crew = crew(2, None);
        crew.place
            .stop(Instant::now() + SOON, |_| {})
            .expect("stopped");
        let place = Arc::clone(&crew.place);
        crew.end();
        assert!(!place.resume(false));
        assert_eq!(place.stop(Instant::now() + SOON, |_| {}), Err(None));
    }
}
