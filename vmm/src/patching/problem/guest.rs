//! The guest cannot be stopped or read, is going down, has gone to another kernel, or another patcher has it.

use std::error::Error;

use patcher::guest::GuestError;

use super::{LATER, NOT_APPLIED, REPORT, refused};
use crate::guest::GuestBusy;
use crate::updates::{Failing, Problem};

/// Another patcher has the guest.
pub(in crate::patching) fn busy(cause: &GuestBusy) -> Problem {
    let message = "the operation was not begun";
    let hint = "try again when the dump or update that is under way is done";
    Problem::new(Failing::Busy, "busy", message, cause.to_string(), hint)
}

/// The guest could not be stopped or read.
pub(in crate::patching) fn guest(cause: &GuestError) -> Problem {
    let (failing, code, hint) = match cause {
        GuestError::Ended => (
            Failing::Conflict,
            "guest_ended",
            "start another with exopatch run",
        ),
        GuestError::Deadline { .. } => (Failing::Deadline, "pause_deadline_passed", LATER),
        GuestError::NoMemory { .. } | GuestError::Machine { .. } => {
            (Failing::Failed, "machine_failed", REPORT)
        }
    };
    let message = "the operation was not carried out";
    Problem::new(failing, code, message, cause.to_string(), hint)
}

/// The guest is on its way down.
pub(in crate::patching) fn ending(state: &str) -> Problem {
    let cause = format!("the guest is going down (its kernel is {state})");
    let hint = "start another with exopatch run";
    Problem::new(
        Failing::Conflict,
        "guest_going_down",
        NOT_APPLIED,
        cause,
        hint,
    )
}

/// The guest's memory is not that of a sound kernel.
pub(in crate::patching) fn unreadable(cause: &dyn Error) -> Problem {
    refused(
        "kernel_unreadable",
        cause,
        "see the guest's log: its memory is not what its kernel would make it",
    )
}

/// The kernel of an update has gone.
pub(in crate::patching) fn gone() -> Problem {
    Problem::new(
        Failing::Conflict,
        "update_lost",
        "the update is gone with its kernel",
        "the guest no longer runs the kernel in which the update was applied: it was reset, or has started another",
        "nothing is left to undo; apply the update again if the guest runs the same kernel anew",
    )
}
