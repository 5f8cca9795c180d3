//! Applies and reverts updates: one pause for each try, tries until a deadline, a report of what the pause cost.
//!
//! Everything that can be is done before the pause: finding the functions, linking, planning. What may have changed since is
//! looked at again under it.

mod live;

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::addr::Gva;

use self::live::{Inhabited, Live};
use crate::commit::{Blocked, CommitError, Quiescent, Running, Times};
use crate::edition::link::{self, LinkError, Linked, Returns};
use crate::edition::object::Package;
use crate::edition::resident::Resident;
use crate::edition::space::ArenaSpace;
use crate::guest::counted::Counted;
use crate::guest::{Guest, GuestError, PausedGuest};
use crate::kernel::alternatives::Alternatives;
use crate::kernel::arena::{ArenaError, ArenaLayout, ArenaPart, SLOT_SIZE};
use crate::kernel::boot::BootState;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::orc::OrcError;
use crate::kernel::text::{ReturnError, ReturnForm};
use crate::kernel::unwind::OtherCode;
use crate::plan::target::{Target, TargetError};
use crate::plan::{ArenaMap, Entry, Plan, PlanError};

/// Pauses in which the kernel must have been found to be another before that is believed.
const LOOKS: u64 = 3;
/// First wait between two tries; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_micros(500);
/// Longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

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
}

/// An update that is in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What was placed and redirected.
    pub linked: Linked,
    /// What was written.
    pub plan: Plan,
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

/// Why an update was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The guest had not finished booting by the deadline.
    #[error(
        "the guest has not finished booting (its kernel is {state}); updates are applied once it has"
    )]
    Booting {
        /// The kernel's name for its state.
        state: String,
    },
    /// The guest is on its way down.
    #[error("the guest is going down (its kernel is {state})")]
    Ending {
        /// The kernel's name for its state.
        state: String,
    },
    /// The running kernel cannot be read.
    #[error("the running kernel cannot be read: {0}")]
    Kernel(#[from] KernelError),
    /// How its functions return cannot be told.
    #[error(transparent)]
    Returns(#[from] ReturnError),
    /// A function cannot be redirected.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The package cannot be linked.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The arena cannot be mapped.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The stacks of threads in the editions could not be followed.
    #[error("the package's unwind entries are not those of this kernel: {0}")]
    Unwind(#[from] OrcError),
    /// No plan can be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The plan was not done.
    #[error(transparent)]
    Commit(#[from] CommitFailed),
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

/// Our part of a guest's memory, as one running kernel sees it. Another kernel needs another one.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Where it is mapped.
    pub layout: ArenaLayout,
    /// What of it is handed out.
    pub space: ArenaSpace,
    /// The code that is in it, of reverted updates too: threads may still be there.
    pub residents: Vec<Resident>,
}

impl Arena {
    /// An empty arena for a kernel that was just located.
    ///
    /// # Errors
    /// When the kernel's address space has no place for it.
    pub fn new<G: Guest>(guest: &G, kernel: &Kernel) -> Result<Self, ArenaError> {
        let layout = ArenaLayout::plan(kernel, guest, &guest.arena())?;
        let space = ArenaSpace::new(range(&layout.code), range(&layout.data));
        Ok(Self {
            layout,
            space,
            residents: Vec::new(),
        })
    }

    /// The kernel with what is in the arena.
    fn inhabited<'k>(&self, kernel: &'k Kernel) -> Inhabited<'k> {
        let known = self.residents.iter().map(|resident| resident.code.clone());
        let others = known.chain([OtherCode::arena()]).collect();
        Inhabited { kernel, others }
    }

    /// The arena in both address spaces, with the page-table entries that are still to be written.
    fn map<G: Guest>(&self, guest: &G, kernel: &Kernel) -> Result<ArenaMap, ArenaError> {
        let mut map = ArenaMap {
            parts: Vec::new(),
            entries: Vec::new(),
        };
        for part in self.layout.parts() {
            map.parts.push((range(part), part.memory.start));
            if !part.mapped(kernel, guest)? {
                map.entries.push(Entry {
                    at: part.entry_at,
                    expect: 0,
                    value: part.entry,
                    maps: part.at,
                });
            }
        }
        Ok(map)
    }
}

/// Where the kernel sees a part of the arena. It is one of the top entries of the page tables, below the last page.
fn range(part: &ArenaPart) -> Range<Gva> {
    part.at..Gva(part.at.0.saturating_add(SLOT_SIZE))
}

/// Applies `package` to the kernel that `guest` runs, or with [`ApplyOptions::check_only`] does everything but the commit.
///
/// Returns the update (none if it was only checked) and what it cost. Room in `arena` is taken only by an update that is applied, or that may be:
/// a panic leaves it taken.
///
/// # Errors
/// [`ApplyError`]; the guest is as it was, unless [`CommitFailed::is_broken`].
pub fn apply<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    package: &Package,
    options: &ApplyOptions<'_>,
) -> Result<(Option<Applied>, Report), ApplyError> {
    booted(guest, kernel, options)?;
    let mut draft = arena.space.clone();
    let applied = prepare(guest, kernel, arena, &mut draft, package)?;
    let resident = Resident::of(&applied.linked, kernel)?;
    let inhabited = arena.inhabited(kernel);
    let before = std::mem::replace(&mut arena.space, draft);
    arena.residents.push(resident);
    let committed = commit(guest, &inhabited, &applied.plan, options);
    let stays = match &committed {
        Ok(_) => !options.check_only,
        Err(failed) => failed.is_broken(),
    };
    if !stays {
        arena.space = before;
        arena.residents.pop();
    }
    Ok(((!options.check_only).then_some(applied), committed?))
}

/// Takes the jumps of an update back. Its code stays where it is in `arena`: a thread may still be in it.
///
/// # Errors
/// [`CommitFailed`]; it is still applied unless that [is broken](CommitFailed::is_broken).
pub fn revert<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &Arena,
    applied: &Applied,
    options: &ApplyOptions<'_>,
) -> Result<Report, CommitFailed> {
    let plan = applied.plan.revert();
    commit(guest, &arena.inhabited(kernel), &plan, options)
}

/// Waits until the guest has finished booting.
fn booted<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    loop {
        let state = match kernel.boot_state(guest)? {
            BootState::Running => return Ok(()),
            BootState::Ending { state } => return Err(ApplyError::Ending { state }),
            BootState::NotFinished { state } => state,
        };
        if options.deadline.saturating_duration_since(Instant::now()) <= LONGEST_WAIT {
            return Err(ApplyError::Booting { state });
        }
        (options.doing)(format!(
            "waiting for the guest to finish booting (its kernel is {state})"
        ));
        std::thread::sleep(LONGEST_WAIT);
    }
}

/// Finds the functions, links and plans, while the guest runs.
fn prepare<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    arena: &Arena,
    space: &mut ArenaSpace,
    package: &Package,
) -> Result<Applied, ApplyError> {
    let returns = match kernel.return_form(guest)? {
        ReturnForm::Ret => Returns::Plain,
        ReturnForm::Jump(thunk) => Returns::Thunk(thunk),
    };
    let live = Live {
        kernel,
        returns,
        alternatives: Alternatives::read(kernel, guest)?,
    };
    link::same_kernel(package, &live)?;
    let ours = range(&arena.layout.code);
    let targets = package
        .editions()
        .iter()
        .map(|edition| Target::find(kernel, guest, edition, &ours, returns));
    let targets = targets.collect::<Result<Vec<_>, _>>()?;
    let linked = link::link(package, &live, targets, space)?;
    let map = arena.map(guest, kernel)?;
    let plan = Plan::apply(&linked, &map, |at| {
        kernel
            .translate(guest, at)
            .map_err(|error| error.to_string())
    })?;
    Ok(Applied { linked, plan })
}

/// Does `plan` under one pause, as soon as nothing is in the way.
///
/// # Errors
/// [`CommitFailed`].
pub fn commit<G: Guest, K: Running>(
    guest: &mut G,
    kernel: &K,
    plan: &Plan,
    options: &ApplyOptions<'_>,
) -> Result<Report, CommitFailed> {
    let mut wait = FIRST_WAIT;
    let mut pauses = 0;
    loop {
        pauses += 1;
        let blocked = match one_try(guest, kernel, plan, options)? {
            Tried::Done(report) => return Ok(Report { pauses, ..report }),
            Tried::Blocked(blocked) => blocked,
        };
        // One look can mislead, for instance at a vCPU that is between two states; several do not.
        let looked_once = matches!(blocked, Blocked::OtherKernel { .. }) && pauses < LOOKS;
        if !blocked.passes() && !looked_once {
            return Err(CommitFailed::Refused(blocked));
        }
        let left = options.deadline.saturating_duration_since(Instant::now());
        if left <= wait {
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
    Done(Report),
    Blocked(Blocked),
}

fn one_try<G: Guest, K: Running>(
    guest: &mut G,
    kernel: &K,
    plan: &Plan,
    options: &ApplyOptions<'_>,
) -> Result<Tried, CommitFailed> {
    let start = Instant::now();
    let paused = Counted::new(guest.pause(options.deadline).map_err(CommitFailed::Pause)?);
    let stopped = start.elapsed();
    let counts = paused.counts();
    let quiescent = match Quiescent::check(paused, kernel, plan, options.deadline) {
        Ok(quiescent) => quiescent,
        Err(blocked) => return Ok(Tried::Blocked(blocked)),
    };
    let scanned = quiescent.scanned;
    let (paused, times) = if options.check_only {
        let times = quiescent.times;
        (quiescent.abandon(), times)
    } else {
        let committed = quiescent.commit().map_err(CommitFailed::Commit)?;
        (options.written)();
        committed
    };
    let resuming = Instant::now();
    paused.resume().map_err(CommitFailed::Resume)?;
    let phases = phases(stopped, times, resuming.elapsed());
    Ok(Tried::Done(Report {
        pauses: 1,
        pause_us: micros(start.elapsed()),
        phases,
        bytes_read: counts.read(),
        bytes_written: counts.written(),
        stack_words: scanned.words,
        tasks: scanned.tasks,
    }))
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
#[cfg(test)]
mod whole_tests;
