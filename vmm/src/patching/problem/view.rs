//! Nothing is shown of the kernel.

use patcher::guest::GuestError;
use patcher::kernel::locate::LocateError;

use super::REPORT;
use super::guest::guest;
use super::kernel::{locate, not_ready};
use crate::guest::BreakError;
use crate::patching::NotReady;
use crate::trial::TrialError;
use crate::updates::{Failing, Problem};
use crate::views::ViewError;
use crate::views::error::Kind;
use crate::vm::BreakpointError;

const NOT_SEEN: &str = "the kernel was not shown";

/// The guest's kernel was not found for a view.
pub(in crate::patching) fn not_seen(cause: LocateError) -> Problem {
    let problem = match cause {
        LocateError::NoVcpu | LocateError::Paging { .. } | LocateError::Slide { .. } => {
            not_ready(&NotReady::NotFound(cause))
        }
        other => locate(&other),
    };
    Problem {
        message: NOT_SEEN.to_owned(),
        ..problem
    }
}

/// There is no view.
pub(in crate::patching) fn view(cause: &ViewError) -> Problem {
    let failing = match cause.kind() {
        Kind::Malformed | Kind::NotFound => Failing::Unknown,
        Kind::State => Failing::Conflict,
        Kind::Unsound => Failing::Refused,
    };
    Problem::new(
        failing,
        cause.code(),
        NOT_SEEN,
        cause.to_string(),
        cause.hint(),
    )
}

/// Nobody came to a breakpoint.
pub(in crate::patching) fn breakpoint(cause: &BreakError) -> Problem {
    let (failing, code, hint) = match cause {
        BreakError::Guest(cause) => return guest(cause),
        BreakError::Breakpoint(BreakpointError::Ended) => return guest(&GuestError::Ended),
        BreakError::Breakpoint(BreakpointError::Deadline) => (
            Failing::Deadline,
            "nobody_came",
            "make the guest call it, or give a longer --deadline; the compiler may have put the function into its callers",
        ),
        BreakError::Breakpoint(BreakpointError::InUse { .. }) => (
            Failing::Conflict,
            "guest_has_breakpoints",
            "try again when its debugger or tracer has taken them away",
        ),
    };
    Problem::new(failing, code, NOT_SEEN, cause.to_string(), hint)
}

/// Nobody comes to a breakpoint in a guest that stands still.
pub(in crate::patching) fn stands_still() -> Problem {
    let cause = "the guest is paused, so that nobody comes anywhere";
    let hint = "exopatch vm resume lets it go";
    Problem::new(Failing::Conflict, "guest_paused", NOT_SEEN, cause, hint)
}

/// Breakpoints do nothing on this machine.
pub(in crate::patching) fn no_breakpoints() -> Problem {
    let cause = "hardware breakpoints do not stop guests on this machine";
    let hint = "where the processor is emulated, emulate it with QEMU 9.1 or newer";
    Problem::new(Failing::Conflict, "no_breakpoints", NOT_SEEN, cause, hint)
}

/// Breakpoints cannot be tried.
pub(in crate::patching) fn trial(cause: &TrialError) -> Problem {
    Problem::new(
        Failing::Failed,
        "machine_failed",
        NOT_SEEN,
        cause.to_string(),
        REPORT,
    )
}
