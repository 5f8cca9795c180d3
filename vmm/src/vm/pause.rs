//! Stopping and resuming the guest as a whole: devices, then vCPUs; and who holds it.

use std::collections::VecDeque;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::rendezvous::Wanted;
use super::{Inner, State, Vm};
use crate::events::EventKind;
use crate::kvm::vcpu::Stopped;

/// Longer pauses than this are told to the guest's clock, which quiets its watchdogs. Shorter ones must not mute them.
const TELL_CLOCK_AFTER: Duration = Duration::from_secs(1);

/// Pauses that are remembered one by one.
const REMEMBERED: usize = 8;

/// Who holds the guest still.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    user: bool,
    patcher: bool,
    unsound: bool,
    since: Option<Instant>,
    /// Since when, if it would run but for a patcher.
    patcher_since: Option<Instant>,
    stopped: Vec<Stopped>,
    pauses: Pauses,
}

/// The pauses of a machine since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    /// How many a user asked for.
    pub by_user: u64,
    /// How many patchers made, to change the kernel or to look at it; those in a guest that its user had paused stop nothing.
    pub by_patcher: u64,
    /// How long the guest stood still in the patchers'.
    pub total: Duration,
    /// The newest of the patchers', oldest first.
    pub last: VecDeque<Pause>,
}

/// One pause that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// When the guest ran again, since the machine's start.
    pub ended: Duration,
    /// How long it stood still, from the request on.
    pub length: Duration,
}

impl Holds {
    fn any(&self) -> bool {
        self.user || self.patcher || self.unsound
    }

    pub(crate) fn state(&self) -> State {
        if !self.any() {
            return State::Running;
        }
        State::Paused {
            by_user: self.user,
            by_patcher: self.patcher,
            unsound: self.unsound,
        }
    }

    pub(crate) fn pauses(&self) -> Pauses {
        self.pauses.clone()
    }

    /// Counts a patcher's pause that is over at `now`, the time since the machine's start.
    fn note_pause(&mut self, now: Duration) {
        let Some(since) = self.patcher_since.take() else {
            return;
        };
        let (pauses, length) = (&mut self.pauses, since.elapsed());
        pauses.by_patcher += 1;
        pauses.total = pauses.total.saturating_add(length);
        if pauses.last.len() == REMEMBERED {
            pauses.last.pop_front();
        }
        pauses.last.push_back(Pause { ended: now, length });
    }
}

/// What a pause cost, until every vCPU and device stood still.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PauseStats {
    /// From the request to the last vCPU's registers.
    pub stop: Duration,
    /// Of that: until no device was doing anything.
    pub devices: Duration,
    /// System calls that each vCPU's thread spent on it, from its last return from the guest on.
    pub ioctls: Vec<u32>,
}

/// Why the guest does not stand still; it runs as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// A vCPU did not stop in time.
    #[error("vCPU {vcpu} did not stop before the deadline; the guest runs on")]
    Vcpu {
        /// The first one.
        vcpu: usize,
    },
    /// A device did not stop in time.
    #[error("a device did not stop before the deadline; the guest runs on")]
    Device,
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
}

/// Why the guest was not resumed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// No user's pause holds it.
    #[error("the guest is not paused")]
    NotPaused,
    /// A patcher gave it up.
    #[error(
        "an update could not be undone and the guest's memory is not sound: it stays paused; \
         dump what is needed, then kill it"
    )]
    Unsound,
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
}

impl Vm {
    /// Pauses the guest for a user. Pausing it twice is pausing it once.
    ///
    /// # Errors
    /// When not everything stood still before `deadline`; the guest then runs as before.
    pub fn pause(&self, deadline: Instant) -> Result<PauseStats, PauseError> {
        let mut holds = self.0.holds();
        let stats = self.0.stop(&mut holds, deadline)?;
        if !holds.user {
            holds.user = true;
            holds.pauses.by_user += 1;
            self.0
                .events
                .publish(EventKind::Paused { stop: stats.stop });
        }
        Ok(stats)
    }

    /// Ends a user's pause. A patcher at work keeps the guest still until it is done.
    ///
    /// # Errors
    /// When there is no such pause, or the guest must not run.
    pub fn resume(&self) -> Result<(), ResumeError> {
        let mut holds = self.0.holds();
        if holds.unsound {
            return Err(ResumeError::Unsound);
        }
        if !holds.user {
            return Err(ResumeError::NotPaused);
        }
        holds.user = false;
        let paused = holds.since.map_or(Duration::ZERO, |since| since.elapsed());
        if !self.0.go_if_free(&mut holds) {
            return Err(ResumeError::Ended);
        }
        self.0.events.publish(EventKind::Resumed { paused });
        Ok(())
    }
}

impl Inner {
    pub(crate) fn holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops everything unless it stands still already.
    fn stop(&self, holds: &mut Holds, deadline: Instant) -> Result<PauseStats, PauseError> {
        if self.rendezvous.wanted() == Wanted::Exit {
            return Err(PauseError::Ended);
        }
        if holds.any() {
            return Ok(PauseStats::default());
        }
        let start = Instant::now();
        if !self.devices.gate.shut(deadline) {
            return Err(PauseError::Device);
        }
        let devices = start.elapsed();
        match self.rendezvous.stop(deadline, |index| self.kick(index)) {
            Ok(stopped) => {
                holds.since = Some(start);
                let stats = PauseStats {
                    stop: start.elapsed(),
                    devices,
                    ioctls: stopped.iter().map(|it| it.ioctls).collect(),
                };
                holds.stopped = stopped;
                Ok(stats)
            }
            Err(missing) => {
                self.devices.gate.open();
                Err(missing.map_or(PauseError::Ended, |vcpu| PauseError::Vcpu { vcpu }))
            }
        }
    }

    /// Lets everything go unless somebody still holds it. Returns false when the guest has ended.
    fn go_if_free(&self, holds: &mut Holds) -> bool {
        if holds.any() {
            return true;
        }
        let paused = holds
            .since
            .take()
            .map_or(Duration::ZERO, |since| since.elapsed());
        holds.stopped.clear();
        let runs = self.rendezvous.resume(paused > TELL_CLOCK_AFTER);
        self.devices.gate.open();
        runs
    }

    /// Stops the guest for a patcher and tells where every vCPU is.
    pub(crate) fn hold_for_patcher(
        &self,
        deadline: Instant,
    ) -> Result<(Vec<Stopped>, PauseStats), PauseError> {
        let mut holds = self.holds();
        let runs = !holds.any();
        let stats = self.stop(&mut holds, deadline)?;
        holds.patcher = true;
        holds.patcher_since = holds.since.filter(|_| runs);
        Ok((holds.stopped.clone(), stats))
    }

    /// Ends a patcher's hold. Returns false when the guest has ended.
    pub(crate) fn release_from_patcher(&self) -> bool {
        let mut holds = self.holds();
        holds.patcher = false;
        let runs = self.go_if_free(&mut holds);
        holds.note_pause(self.events.elapsed());
        runs
    }

    /// Turns a patcher's hold into one that nothing ends.
    pub(crate) fn give_up(&self) {
        let mut holds = self.holds();
        holds.patcher = false;
        holds.unsound = true;
        holds.note_pause(self.events.elapsed());
        self.events.publish(EventKind::LeftPaused);
    }
}
