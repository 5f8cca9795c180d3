//! What rules ask for, sets and times, does not change.

use patcher::apply::tune::SetsError;

use super::guest::guest;
use super::{FULL, REPORT};
use crate::updates::{Failing, Problem};

/// A set could not be changed.
pub(in crate::patching) fn sets(cause: &SetsError) -> Problem {
    let message = "the set was not changed, or not wholly";
    asked_for("set", message, cause)
}

/// A time could not be begun, ended or done away with.
pub(in crate::patching) fn times(cause: &SetsError) -> Problem {
    asked_for("time", "the time was not changed", cause)
}

/// A thing of this kind that rules ask for could not be changed.
fn asked_for(kind: &str, message: &str, cause: &SetsError) -> Problem {
    let problem = |failing, code: &str, hint: &str| {
        Problem::new(failing, code, message, cause.to_string(), hint)
    };
    match cause {
        SetsError::None { .. } => problem(
            Failing::Unknown,
            &format!("no_such_{kind}"),
            &format!("exopatch {kind} list shows all of them"),
        ),
        SetsError::Name { .. } => problem(
            Failing::Refused,
            &format!("{kind}_name"),
            "give it another name",
        ),
        SetsError::Room { .. } => problem(
            Failing::Refused,
            "set_room",
            "give it less room, or use several sets",
        ),
        SetsError::Used { .. } => problem(
            Failing::Conflict,
            &format!("{kind}_in_use"),
            "exopatch update list shows all updates, exopatch update show their rules",
        ),
        SetsError::Wide { .. } => problem(
            Failing::Conflict,
            "set_key_wide",
            "put it into a set of its own; or take the rule out of use, put it in, and use the rule again",
        ),
        SetsError::Set(_) => problem(
            Failing::Refused,
            "set_full",
            "take keys out that are not needed any more, make one with more --room, or use several: `x in set a or x in set b`",
        ),
        SetsError::Full(_) => problem(Failing::Refused, "arena_full", FULL),
        SetsError::Guest(error) => guest(error),
        SetsError::Plan(_) => problem(Failing::Failed, "arena_not_mappable", REPORT),
    }
}
