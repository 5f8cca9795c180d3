//! Stopping and resuming the guest as a whole: devices, then vCPUs; and who holds it.

use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::rendezvous::Wanted;
use super::{Inner, State, Vm};
use crate::events::EventKind;
use crate::kvm::vcpu::Stopped;

/// Longer pauses than this are told to the guest's clock, which quiets its watchdogs. Shorter ones must not mute them.
const TELL_CLOCK_AFTER: Duration = Duration::from_secs(1);

/// Who holds the guest still.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    user: bool,
    patcher: bool,
    unsound: bool,
    since: Option<Instant>,
    stopped: Vec<Stopped>,
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
        let stats = self.stop(&mut holds, deadline)?;
        holds.patcher = true;
        Ok((holds.stopped.clone(), stats))
    }

    /// Ends a patcher's hold. Returns false when the guest has ended.
    pub(crate) fn release_from_patcher(&self) -> bool {
        let mut holds = self.holds();
        holds.patcher = false;
        self.go_if_free(&mut holds)
    }

    /// Turns a patcher's hold into one that nothing ends.
    pub(crate) fn give_up(&self) {
        let mut holds = self.holds();
        holds.patcher = false;
        holds.unsound = true;
        self.events.publish(EventKind::LeftPaused);
    }
}
