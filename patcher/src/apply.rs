//! Applies and reverts updates: what changes is worked out while the guest runs, and done under one pause.
//!
//! Everything that can be is done before the pause: finding the functions, linking, planning. What may have changed since is
//! looked at again under it.

pub mod arena;
mod live;
pub mod tries;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

pub use self::arena::{Arena, Edition, Holdings, Life};
use self::arena::{Placed, range};
use self::live::Live;
pub use self::tries::{ApplyOptions, CommitFailed, Phases, Report};
use self::tries::{LONGEST_WAIT, commit};
use crate::edition::escape::escape;
use crate::edition::link::{self, LinkError, Returns};
use crate::edition::list::{ListError, Listed, UpdateId};
use crate::edition::object::Package;
use crate::edition::resident::Resident;
use crate::guest::Guest;
use crate::kernel::alternatives::Alternatives;
use crate::kernel::arena::ArenaError;
use crate::kernel::boot::BootState;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::orc::OrcError;
use crate::kernel::text::{ReturnError, ReturnForm};
use crate::plan::target::{Target, TargetError};
use crate::plan::{Plan, PlanError};

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
    /// The lists of editions do not allow it.
    #[error(transparent)]
    List(#[from] ListError),
    /// The plan was not done.
    #[error(transparent)]
    Commit(#[from] CommitFailed),
}

impl ApplyError {
    /// Whether the guest is not as it was before: it stays paused, and must be ended.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Commit(failed) if failed.is_broken())
    }
}

/// An update that is to be applied.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its number: a higher one than that of any before.
    pub id: UpdateId,
    /// What it brings.
    pub package: &'a Package,
    /// The updates whose place it takes: they go in the same moment.
    pub instead_of: &'a [UpdateId],
}

/// Applies an update to the kernel that `guest` runs, or with [`ApplyOptions::check_only`] does everything but the commit.
///
/// Returns what it cost. `arena` changes only with an update that is applied, or that may be.
///
/// # Errors
/// [`ApplyError`]; the guest is as it was, unless [`CommitFailed::is_broken`].
pub fn apply<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    request: &Request<'_>,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    booted(guest, kernel, options)?;
    let mut draft = arena.holds.clone();
    let going = request.instead_of.iter().copied().collect();
    draft.functions.remove(&going)?;
    draft.drain(&going);
    let mut plan = Plan::default();
    let map = arena.map(guest, kernel)?;
    plan.map(&map);
    let placed = place(guest, kernel, arena, &mut draft, request.package)?;
    plan.place_all(&placed.linked, &map)?;
    let placed = Placed {
        writes: plan.writes.clone(),
        ..placed
    };
    for redirection in &placed.linked.redirections {
        let edition = Listed {
            update: request.id,
            at: redirection.edition,
            head: redirection.head.at,
        };
        draft.functions.add(&redirection.target, edition);
    }
    draft.placed.insert(request.id, Arc::new(placed));
    Ok(switch(guest, kernel, arena, draft, plan, options)?)
}

/// Takes updates back, all in the same moment. Their code stays where it is until it is known that no thread is in it, nor will return to it.
///
/// # Errors
/// [`ApplyError`]; all of them are still applied unless that [is broken](CommitFailed::is_broken).
pub fn revert<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    updates: &[UpdateId],
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    let mut draft = arena.holds.clone();
    let going: BTreeSet<UpdateId> = updates.iter().copied().collect();
    draft.functions.remove(&going)?;
    draft.drain(&going);
    Ok(switch(
        guest,
        kernel,
        arena,
        draft,
        Plan::default(),
        options,
    )?)
}

/// Looks under one pause whether code that nothing leads to any more is free of threads, and gives the room of such code back. Returns whose
/// it was. Nothing is written.
///
/// # Errors
/// [`CommitFailed`].
pub fn settle<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<Vec<UpdateId>, CommitFailed> {
    let mut plan = Plan::default();
    arena.holds.watch(&mut plan);
    let (_, scanned) = commit(guest, &arena.inhabited(kernel), &plan, options)?;
    Ok(arena.holds.settle(&scanned.watched))
}

/// Leads every function to where the lists of `draft` say, behind the writes of `plan`, and keeps the draft once that is done.
fn switch<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    mut draft: Holdings,
    mut plan: Plan,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    let turns = draft.functions.turns();
    for (target, from, to) in &turns {
        plan.redirect(target, *from, *to, |at| {
            let found = kernel.translate(guest, at);
            found.map_err(|error| error.to_string())
        })?;
    }
    draft.functions.led(&turns);
    // What is still led to is not yet free, whoever is in it.
    arena.holds.watch(&mut plan);
    let before = std::mem::replace(&mut arena.holds, draft);
    let inhabited = arena.inhabited(kernel);
    let written = Cell::new(false);
    let noted = ApplyOptions {
        written: &|| {
            written.set(true);
            (options.written)();
        },
        ..*options
    };
    // A panic goes on its way once the draft is known to be true, or not.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        commit(guest, &inhabited, &plan, &noted)
    }));
    let stays = match &outcome {
        Ok(Ok(_)) => !options.check_only,
        Ok(Err(failed)) => failed.is_broken(),
        Err(_) => written.get(),
    };
    if !stays {
        arena.holds = before;
    }
    let (report, scanned) = outcome.unwrap_or_else(|panic| resume_unwind(panic))?;
    arena.holds.settle(&scanned.watched);
    Ok(report)
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

/// Finds the functions and links, while the guest runs. Room is taken from `draft`.
fn place<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    arena: &Arena,
    draft: &mut Holdings,
    package: &Package,
) -> Result<Placed, ApplyError> {
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
    let redirected = |at| arena.holds.functions.redirected(at);
    let editions = package.editions().iter();
    let targets = editions
        .map(|edition| Target::find(kernel, guest, edition, &ours, returns, redirected))
        .collect::<Result<Vec<_>, _>>()?;
    let linked = link::link(package, &live, targets, &mut draft.space)?;
    let resident = Resident::of(&linked, kernel)?;
    Ok(Placed {
        linked,
        writes: Vec::new(),
        resident,
        escape: escape(package),
    })
}

#[cfg(test)]
mod whole_tests;
