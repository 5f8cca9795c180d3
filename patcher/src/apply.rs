//! Applies and reverts updates: what changes is worked out while the guest runs, and done under one pause.
//!
//! Everything that can be is done before the pause: finding the functions, linking, planning. What may have changed since is
//! looked at again under it.

pub mod arena;
mod calls;
pub mod handlers;
pub mod hooks;
mod live;
pub mod passing;
mod settle;
pub mod shadows;
mod switch;
pub mod times;
pub mod tries;
pub mod tune;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

pub use self::arena::{Arena, Edition, Holdings, Life};
use self::arena::{Placed, range};
pub use self::calls::{Calls, calls};
use self::hooks::HookError;
use self::live::Live;
pub use self::passing::{Model, Passing};
pub use self::settle::{force, settle};
use self::switch::Turn;
use self::tries::LONGEST_WAIT;
pub use self::tries::{ApplyOptions, CommitFailed, Phases, Report};
use crate::edition::escape::escape;
use crate::edition::handler::HandlerError;
use crate::edition::hook::Moment;
use crate::edition::link::{self, LinkError, Returns};
use crate::edition::list::{ListError, Listed, UpdateId, Use};
use crate::edition::object::Package;
use crate::edition::resident::Resident;
use crate::edition::set::SetError;
use crate::edition::space::Full;
use crate::guest::{Guest, GuestError};
use crate::kernel::alternatives::Alternatives;
use crate::kernel::arena::ArenaError;
use crate::kernel::boot::BootState;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::orc::OrcError;
use crate::kernel::text::{ReturnError, ReturnForm};
use crate::plan::target::{Target, TargetError};
use crate::plan::{PlanError, Purpose};
use crate::publish::{self, PublishError, Unit};
use crate::rule::resolve::ResolveError;

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
    /// The kernel cannot be told of the editions.
    #[error("the kernel cannot be told of the package's code: {0}")]
    Publish(#[from] PublishError),
    /// No plan can be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A rule cannot be asked of a function.
    #[error(transparent)]
    Rule(#[from] ResolveError),
    /// No handler can be made.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// A rule goes by a time that the host has not named.
    #[error("no time is called {name}, so there is no `during {name}`")]
    NoTime {
        /// Its name.
        name: String,
    },
    /// The arena cannot be stored into.
    #[error("a rule could not be changed: {0}")]
    Store(GuestError),
    /// There is no room for handlers, or what they look into.
    #[error(transparent)]
    Full(#[from] Full),
    /// No set of bound tasks can be made.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The lists of editions do not allow it.
    #[error(transparent)]
    List(#[from] ListError),
    /// A hook says no, or could not be run.
    #[error(transparent)]
    Hook(#[from] HookError),
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
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Its number: a higher one than that of any before.
    pub id: UpdateId,
    /// What it brings.
    pub package: &'a Package,
    /// The updates whose place it takes: they go in the same moment.
    pub instead_of: &'a [UpdateId],
    /// Who may be where at the switch.
    pub model: Model,
    /// How its editions are used.
    pub how: Use,
}

impl<'a> Request<'a> {
    /// Update `id`, whose editions are for all calls from the next on.
    #[must_use]
    pub fn new(id: UpdateId, package: &'a Package) -> Self {
        Self {
            id,
            package,
            instead_of: &[],
            model: Model::default(),
            how: Use::default(),
        }
    }
}

/// Applies an update to the kernel that `guest` runs, or with [`ApplyOptions::check_only`] does everything but the commit.
///
/// Returns what it cost. `arena` changes only with an update that is applied, or that may be, or whose hooks have run.
///
/// # Errors
/// [`ApplyError`]; the guest is as it was but for what hooks have done, unless [`ApplyError::is_broken`].
pub fn apply<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    request: &Request<'_>,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    booted(guest, kernel, options)?;
    hooks::ready(guest, kernel, arena, options)?;
    let going: BTreeSet<UpdateId> = request.instead_of.iter().copied().collect();
    let mut turn = Turn::new(arena, request.id, true);
    turn.leave(&going)?;
    place_in(&mut turn, guest, kernel, arena, request)?;
    enter(&mut turn.draft, request);
    let leaves = |moment| {
        request
            .instead_of
            .iter()
            .map(move |update| (*update, moment))
    };
    let hooks = request.package.hooks();
    let asks = hooks.is_some_and(|hooks| hooks.has(Moment::BeforeApply))
        || leaves(Moment::BeforeRevert).any(|(update, at)| hooks::has(arena, update, at));
    if asks && !options.check_only {
        // A hook is not run for what cannot be: everything but the commit is done before.
        let check = ApplyOptions {
            check_only: true,
            ..*options
        };
        turn.switch(guest, kernel, arena, request.model, &check)?;
        let mut alone = Turn::new(arena, request.id, true);
        place_in(&mut alone, guest, kernel, arena, request)?;
        // Unless it comes into effect, it is on its way out.
        alone.draft.drain(&BTreeSet::from([request.id]));
        hooks::switch(alone, guest, kernel, arena, options)?;
        let before = [(request.id, Moment::BeforeApply)].into_iter();
        for hook in before.chain(leaves(Moment::BeforeRevert)) {
            hooks::run(guest, kernel, arena, hook, options)?;
        }
        turn = Turn::new(arena, request.id, true);
        turn.map(guest, kernel, arena)?;
        turn.leave(&going)?;
        turn.draft.drains.remove(&request.id);
        turn.draft.free.remove(&request.id);
        enter(&mut turn.draft, request);
    }
    let report = turn.switch(guest, kernel, arena, request.model, options)?;
    if !options.check_only {
        let behind = leaves(Moment::AfterRevert).chain([(request.id, Moment::AfterApply)]);
        hooks::run_behind(guest, kernel, arena, behind, options)?;
    }
    Ok(report)
}

/// Has `turn` place what the update brings.
fn place_in<G: Guest>(
    turn: &mut Turn,
    guest: &G,
    kernel: &Kernel,
    arena: &Arena,
    request: &Request<'_>,
) -> Result<(), ApplyError> {
    turn.map(guest, kernel, arena)?;
    let placed = place(guest, kernel, arena, &mut turn.draft, request.package)?;
    turn.plan.place_all(&placed.linked, &turn.map)?;
    if let Some((tables, publication)) = &placed.known {
        turn.plan.place(Purpose::Publication, tables, &turn.map)?;
        turn.plan.publish.push(publication.clone());
    }
    let placed = Placed {
        writes: turn.plan.writes.clone(),
        model: request.model,
        ..placed
    };
    turn.draft.placed.insert(request.id, Arc::new(placed));
    Ok(())
}

/// Lists the editions of an update that is placed.
fn enter(draft: &mut Holdings, request: &Request<'_>) {
    let placed = draft.placed.get(&request.id).cloned();
    for redirection in placed.iter().flat_map(|placed| &placed.linked.redirections) {
        let edition = Listed {
            update: request.id,
            at: redirection.edition,
            head: redirection.head.at,
        };
        draft.functions.add(&redirection.target, edition);
    }
    draft.uses.insert(request.id, request.how.clone());
}

/// Takes updates back, all in the same moment. Their code stays where it is until it is known that no thread is in it, nor will return to it.
///
/// # Errors
/// [`ApplyError`]; all of them are still applied unless that [is broken](ApplyError::is_broken).
pub fn revert<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    updates: &[UpdateId],
    model: Model,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    hooks::ready(guest, kernel, arena, options)?;
    let update = updates.first().copied().unwrap_or_default();
    let going = updates.iter().copied().collect();
    Turn::new(arena, update, false).leave(&going)?;
    for update in updates {
        let hook = (*update, Moment::BeforeRevert);
        hooks::run(guest, kernel, arena, hook, options)?;
    }
    let mut turn = Turn::new(arena, update, false);
    turn.map(guest, kernel, arena)?;
    turn.leave(&going)?;
    let report = turn.switch(guest, kernel, arena, model, options)?;
    let behind = updates.iter().map(|update| (*update, Moment::AfterRevert));
    hooks::run_behind(guest, kernel, arena, behind, options)?;
    Ok(report)
}

/// Uses the editions of an update in effect in another way: for other calls, or counted. Where one store does that, the guest is not paused; else
/// its functions are switched by the model with which they came.
///
/// # Errors
/// [`ApplyError`]; they are used as before then, unless that [is broken](ApplyError::is_broken).
pub fn reuse<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    update: UpdateId,
    how: Use,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    if tune::retune(guest, kernel, arena, update, &how)? {
        return Ok(Report::default());
    }
    let mut turn = Turn::new(arena, update, true);
    turn.map(guest, kernel, arena)?;
    match turn.draft.uses.get_mut(&update) {
        Some(used) => *used = how,
        None => return Err(ListError::NotInEffect { update }.into()),
    }
    let placed = arena.holds.placed.get(&update);
    let model = placed.map_or_else(Model::default, |placed| placed.model);
    turn.switch(guest, kernel, arena, model, options)
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

/// How the kernel's functions return.
fn returns<G: Guest>(guest: &G, kernel: &Kernel) -> Result<Returns, ApplyError> {
    Ok(match kernel.return_form(guest)? {
        ReturnForm::Ret => Returns::Plain,
        ReturnForm::Jump(thunk) => Returns::Thunk(thunk),
    })
}

/// Finds the functions and links, while the guest runs. Room is taken from `draft`.
fn place<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    arena: &Arena,
    draft: &mut Holdings,
    package: &Package,
) -> Result<Placed, ApplyError> {
    let returns = returns(guest, kernel)?;
    let live = Live {
        kernel,
        returns,
        alternatives: Alternatives::read(kernel, guest)?,
    };
    link::same_kernel(package, &live)?;
    let ours = range(&arena.layout.code);
    let redirected = |at| arena.holds.functions.redirected(at);
    let editions = package.redirected();
    let targets = editions
        .map(|edition| Target::find(kernel, guest, edition, &ours, returns, redirected))
        .collect::<Result<Vec<_>, _>>()?;
    let linked = link::link(package, &live, targets, &mut draft.space)?;
    let resident = Resident::of(&linked, kernel)?;
    let unit = Unit::of(&linked, kernel, resident.code.table.clone())?;
    let known = publish::place(&unit, kernel, &mut draft.space)?;
    Ok(Placed {
        linked,
        known,
        writes: Vec::new(),
        model: Model::default(),
        resident,
        escape: escape(package),
    })
}

#[cfg(test)]
mod back_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod hooks_tests;
#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod passing_tests;
#[cfg(test)]
mod predicate_tests;
#[cfg(test)]
mod published_tests;
#[cfg(test)]
mod tune_tests;
#[cfg(test)]
mod whole_tests;
