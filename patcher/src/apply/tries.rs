//! One pause for each try, tries until a deadline, and what it cost the guest.

use std::time::{Duration, Instant};

use super::hooks::HookEvent;
use crate::commit::{Blocked, CommitError, Quiescent, Running, Scanned, Times};
use crate::guest::counted::Counted;
use crate::guest::{Guest, GuestError, PausedGuest};
use crate::plan::Plan;

/// Pauses in which the kernel must have been found to be another before that is believed.
pub(super) const LOOKS: u64 = 3;
/// First wait between two tries; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_micros(500);
/// Longest wait between two tries.
pub(super) const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// Where the time of one pause went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Stopping all vCPUs and devices.
    pub stop: u64,
    /// Proving that it is the same kernel, not changing its own code.
    pub prove: u64,
    /// Looking through registers and stacks.
    pub scan: u64,
    /// Comparing the bytes that are written.
    pub verify: u64,
    /// Writing.
    pub write: u64,
    /// Letting everything go again.
    pub resume: u64,
}

/// What an operation cost the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How often the guest was paused.
    pub pauses: u64,
    /// Length of the last pause, the one that committed, in microseconds: from the first vCPU's stop to the last one's start.
    pub pause_us: u64,
    /// Its parts.
    pub phases: Phases,
    /// Bytes of guest memory read under it.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Words of stacks looked at.
    pub stack_words: u64,
    /// Tasks whose stacks were looked through.
    pub tasks: u64,
}

/// How to go about it.
#[expect(missing_debug_implementations, reason = "holds a closure")]
#[derive(Clone, Copy)]
pub struct ApplyOptions<'a> {
    /// When to give up.
    pub deadline: Instant,
    /// Do everything but the commit.
    pub check_only: bool,
    /// Told what is being waited for.
    pub doing: &'a dyn Fn(String),
    /// Told that everything has been written, before the guest runs again: from then on nothing is undone.
    pub written: &'a dyn Fn(),
    /// Told of hooks that begin and end.
    pub hook: &'a dyn Fn(&HookEvent),
}

/// An operation that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CommitFailed {
    /// Something was in the way at every try before the deadline. Nothing was changed.
    #[error("not possible before the deadline, in {pauses} tries: {last}")]
    Deadline {
        /// What was in the way at the last try.
        last: Blocked,
        /// How often it was tried.
        pauses: u64,
    },
    /// It cannot be done. Nothing was changed.
    #[error(transparent)]
    Refused(Blocked),
    /// The guest could not be stopped. Nothing was changed.
    #[error("the guest could not be paused: {0}")]
    Pause(GuestError),
    /// A write failed.
    #[error(transparent)]
    Commit(CommitError),
    /// Everything was written, but the guest could not be let go.
    #[error("everything was written, but the guest could not be resumed: {0}")]
    Resume(GuestError),
}

impl CommitFailed {
    /// Whether the guest is not as it was before: it stays paused, and must be ended.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(
            self,
            Self::Commit(CommitError::Torn { .. }) | Self::Resume(_)
        )
    }
}

/// Does `plan` under one pause, as soon as nothing is in the way. Returns what it cost, and what was seen on the way.
///
/// # Errors
/// [`CommitFailed`].
pub fn commit<G: Guest, K: Running>(
    guest: &mut G,
    kernel: &K,
    plan: &Plan,
    options: &ApplyOptions<'_>,
) -> Result<(Report, Scanned), CommitFailed> {
    commit_within(guest, kernel, plan, u64::MAX, options, &|_| {})
}

/// The same, with so many tries at most. Once everything has been written, `seen` is told what was seen under that pause.
pub(super) fn commit_within<G: Guest, K: Running>(
    guest: &mut G,
    kernel: &K,
    plan: &Plan,
    tries: u64,
    options: &ApplyOptions<'_>,
    seen: &dyn Fn(&Scanned),
) -> Result<(Report, Scanned), CommitFailed> {
    let mut wait = FIRST_WAIT;
    let mut pauses = 0;
    loop {
        pauses += 1;
        let blocked = match one_try(guest, kernel, plan, options, seen)? {
            Tried::Done(report, scanned) => return Ok((Report { pauses, ..report }, scanned)),
            Tried::Blocked(blocked) => blocked,
        };
        // One look can mislead, for instance at a vCPU that is between two states; several do not.
        let looked_once = matches!(blocked, Blocked::OtherKernel { .. }) && pauses < LOOKS;
        if !blocked.passes() && !looked_once {
            return Err(CommitFailed::Refused(blocked));
        }
        let left = options.deadline.saturating_duration_since(Instant::now());
        if left <= wait || pauses >= tries {
            return Err(CommitFailed::Deadline {
                last: blocked,
                pauses,
            });
        }
        (options.doing)(format!("waiting: {blocked}"));
        // The guest runs meanwhile; what is in the way has to move on by itself.
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

enum Tried {
    Done(Report, Scanned),
    Blocked(Blocked),
}

fn one_try<G: Guest, K: Running>(
    guest: &mut G,
    kernel: &K,
    plan: &Plan,
    options: &ApplyOptions<'_>,
    seen: &dyn Fn(&Scanned),
) -> Result<Tried, CommitFailed> {
    let rested = kernel.first_look(guest, plan, options.deadline);
    let start = Instant::now();
    let paused = Counted::new(guest.pause(options.deadline).map_err(CommitFailed::Pause)?);
    let stopped = start.elapsed();
    let counts = paused.counts();
    let quiescent = match Quiescent::check(paused, kernel, plan, rested, options.deadline) {
        Ok(quiescent) => quiescent,
        Err(blocked) => return Ok(Tried::Blocked(blocked)),
    };
    let scanned = quiescent.scanned.clone();
    let (paused, times) = if options.check_only {
        let times = quiescent.times;
        (quiescent.abandon(), times)
    } else {
        let committed = quiescent.commit().map_err(CommitFailed::Commit)?;
        seen(&scanned);
        (options.written)();
        committed
    };
    let resuming = Instant::now();
    paused.resume().map_err(CommitFailed::Resume)?;
    let phases = phases(stopped, times, resuming.elapsed());
    let report = Report {
        pauses: 1,
        pause_us: micros(start.elapsed()),
        phases,
        bytes_read: counts.read(),
        bytes_written: counts.written(),
        stack_words: scanned.words,
        tasks: scanned.tasks,
    };
    Ok(Tried::Done(report, scanned))
}

fn phases(stop: Duration, times: Times, resume: Duration) -> Phases {
    Phases {
        stop: micros(stop),
        prove: micros(times.prove),
        scan: micros(times.scan),
        verify: micros(times.verify),
        write: micros(times.write),
        resume: micros(resume),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
