//! An update does not come, go, or change.

use patcher::apply::ApplyError;
use patcher::apply::hooks::HookError;
use patcher::edition::list::ListError;
use patcher::rule::resolve::ResolveError;

use super::commit::commit;
use super::guest::{ending, guest, unreadable};
use super::kernel::arena;
use super::package::{link, publish};
use super::plan::target;
use super::{FULL, NOT_APPLIED, REPORT, refused};
use crate::updates::{Failing, Problem};

const NOT_REVERTED: &str = "the update was not reverted";
const NOT_REUSED: &str = "the update is used as before";
const NOT_FORCED: &str = "the switch was not forced";
const NOT_SETTLED: &str = "the guest's threads could not be looked at";

/// An apply failed.
pub(in crate::patching) fn apply(cause: &ApplyError) -> Problem {
    match cause {
        ApplyError::Booting { .. } => Problem::new(
            Failing::Deadline,
            "guest_booting",
            NOT_APPLIED,
            cause.to_string(),
            "wait until the guest has booted, or give a longer --deadline",
        ),
        ApplyError::Ending { state } => ending(state),
        ApplyError::Kernel(error) => unreadable(error),
        ApplyError::Returns(error) => refused("kernel_returns_unknown", error, REPORT),
        ApplyError::Target(error) => target(error),
        ApplyError::Link(error) => link(error),
        ApplyError::Arena(error) => arena(error),
        ApplyError::Unwind(error) => refused(
            "package_not_unwindable",
            error,
            "build it again: exopatch build --kernel with the vmlinuz that the guest was booted from",
        ),
        ApplyError::Publish(error) => publish(error),
        ApplyError::Plan(error) => refused("cannot_plan", error, REPORT),
        ApplyError::List(error) => list(NOT_APPLIED, error),
        ApplyError::Rule(error @ ResolveError::NoPredicate { .. }) => refused(
            "rule_not_resolvable",
            error,
            "name one that the package has, or build the package with it",
        ),
        ApplyError::Rule(error) => refused(
            "rule_not_resolvable",
            error,
            "exopatch kernel types shows a function's arguments and what lies behind them",
        ),
        ApplyError::NoTime { .. } => refused(
            "rule_not_resolvable",
            cause,
            "exopatch time end NAME makes it, and exopatch time begin NAME begins it; or go by the clock: for, until, after",
        ),
        ApplyError::Store(error) => guest(error),
        ApplyError::Handler(error) => refused("cannot_choose", error, "change the rule"),
        ApplyError::Full(error) => refused("arena_full", error, FULL),
        ApplyError::Set(error) => refused("cannot_bind", error, REPORT),
        ApplyError::Hook(error) => hook(error),
        ApplyError::Commit(error) => commit(NOT_APPLIED, error),
    }
}

/// A hook kept a switch from being made.
fn hook(cause: &HookError) -> Problem {
    let (failing, code, hint) = match cause {
        HookError::Refused { .. } => (
            Failing::Refused,
            "hook_refused",
            "the package's author knows what that result says",
        ),
        HookError::Late { .. } => (
            Failing::Deadline,
            "hook_late",
            "give a longer --deadline; exopatch update show says who is still in its code",
        ),
        HookError::Unended { .. } => (
            Failing::Conflict,
            "hook_not_ended",
            "wait until it has ended (exopatch update show)",
        ),
        HookError::Taken { .. } => (
            Failing::Conflict,
            "hook_cannot_begin",
            "revert that update first",
        ),
        HookError::Cells { .. } => (Failing::Failed, "guest_unreadable", REPORT),
    };
    Problem::new(failing, code, NOT_APPLIED, cause.to_string(), hint)
}

/// A revert failed.
pub(in crate::patching) fn revert(cause: &ApplyError) -> Problem {
    not_done(NOT_REVERTED, cause)
}

/// The use of an update's editions could not be changed.
pub(in crate::patching) fn reuse(cause: &ApplyError) -> Problem {
    not_done(NOT_REUSED, cause)
}

/// A switch could not be forced.
pub(in crate::patching) fn force(cause: &ApplyError) -> Problem {
    not_done(NOT_FORCED, cause)
}

/// What waits for threads could not be looked at.
pub(in crate::patching) fn settle(cause: &ApplyError) -> Problem {
    not_done(NOT_SETTLED, cause)
}

fn not_done(message: &str, cause: &ApplyError) -> Problem {
    match cause {
        ApplyError::List(error) => list(message, error),
        ApplyError::Commit(error) => commit(message, error),
        other => Problem {
            message: message.to_owned(),
            ..apply(other)
        },
    }
}

/// The lists of editions do not allow it.
fn list(message: &str, cause: &ListError) -> Problem {
    let (code, hint) = match cause {
        ListError::NotInEffect { .. } => (
            "update_not_applied",
            "exopatch update list shows the state of all updates",
        ),
        ListError::NotPassing { .. } => (
            "nothing_to_force",
            "exopatch update show tells which tasks have yet to leave the old side, if any",
        ),
        ListError::Passing { .. } => (
            "update_switching",
            "exopatch update show tells which tasks it waits for; update force ends it; update revert takes it back, or update use with the rule before",
        ),
        ListError::Beneath { .. } => (
            "update_beneath_another",
            "or apply one update instead of both: exopatch update apply --instead-of",
        ),
    };
    Problem::new(Failing::Conflict, code, message, cause.to_string(), hint)
}
