//! What waits for the guest's threads to go on: switches that some tasks have yet to make, and code that some have yet to leave.

use super::ApplyError;
use super::arena::Arena;
use super::hooks;
use super::switch::{end_passing, keep, lead};
use super::tries::{ApplyOptions, CommitFailed};
use crate::edition::list::{ListError, UpdateId};
use crate::guest::Guest;
use crate::kernel::locate::Kernel;
use crate::plan::Plan;

/// Looks under one pause for each switch under way which of its tasks have left the old side, ends the switches that nobody is bound to any
/// more, and gives the room back of code that is free of threads.
///
/// # Errors
/// [`ApplyError`]; what was done before it stays done.
pub fn settle<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    hooks::ready(guest, kernel, arena, options)?;
    let passing = arena.holds.passing.iter();
    let updates: Vec<UpdateId> = passing.map(|passing| passing.update).collect();
    let only_drains = updates.is_empty();
    for update in updates {
        if shrink(guest, kernel, arena, update, options)? {
            finish(guest, kernel, arena, update, options)?;
        }
    }
    if only_drains {
        let draft = arena.holds.clone();
        keep(
            guest,
            kernel,
            arena,
            draft,
            Plan::default(),
            u64::MAX,
            options,
        )?;
    }
    forget(guest, kernel, arena, options)
}

/// Ends the switch of an update for everybody, bound tasks too: they may then run old code of one function beneath new code of another.
///
/// # Errors
/// [`ApplyError`]; it is under way as before then, unless that [is broken](ApplyError::is_broken).
pub fn force<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    update: UpdateId,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    let mut passing = arena.holds.passing.iter();
    if passing.any(|passing| passing.update == update) {
        finish(guest, kernel, arena, update, options)
    } else {
        Err(ListError::NotPassing { update }.into())
    }
}

/// Has the kernel forget code that nobody was found in, unless somebody is in it by now. It is somebody else's once no CPU can still be
/// reading what the kernel knew of it.
fn forget<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    if arena.holds.free.is_empty() {
        return Ok(());
    }
    let (mut draft, mut plan) = (arena.holds.clone(), Plan::default());
    draft.forget(&mut plan);
    arena.holds.free.clear();
    match keep(guest, kernel, arena, draft, plan, 1, options) {
        // It is looked at again.
        Err(ApplyError::Commit(CommitFailed::Deadline { .. })) => Ok(()),
        other => other.map(drop),
    }
}

/// Lets those go who have left the old side; whether nobody is left.
fn shrink<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    update: UpdateId,
    options: &ApplyOptions<'_>,
) -> Result<bool, ApplyError> {
    let draft = arena.holds.clone();
    let Some(passing) = draft
        .passing
        .iter()
        .find(|passing| passing.update == update)
    else {
        return Ok(false);
    };
    let mut plan = Plan::default();
    passing.shrink(&mut plan, draft.ways_of(&passing.functions));
    keep(guest, kernel, arena, draft, plan, u64::MAX, options)?;
    let mut passing = arena.holds.passing.iter();
    let passing = passing.find(|passing| passing.update == update);
    Ok(passing.is_some_and(|passing| passing.set.is_empty()))
}

/// Leads the functions of a switch to where everybody goes.
fn finish<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    update: UpdateId,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    let mut draft = arena.holds.clone();
    let functions = end_passing(&mut draft, update);
    let mut plan = Plan::default();
    let map = arena.map(guest, kernel)?;
    let mut changes = draft.changes();
    changes.retain(|(target, _)| functions.contains(&target.function));
    lead(guest, kernel, &mut draft, &mut plan, &map, &changes)?;
    keep(guest, kernel, arena, draft, plan, u64::MAX, options)?;
    Ok(())
}
