//! What was planned could not be written: no moment for it, or it failed.

use patcher::apply::CommitFailed;
use patcher::commit::{Blocked, CommitError};

use super::guest::guest;
use super::plan::refusal;
use super::{LATER, REPORT};
use crate::updates::{BROKEN, Failing, Problem};

/// A commit was not done; `message` says of what.
pub(super) fn commit(message: &str, cause: &CommitFailed) -> Problem {
    let problem = |failing, code: &str, hint: &str| {
        Problem::new(failing, code, message, cause.to_string(), hint)
    };
    match cause {
        CommitFailed::Deadline { last, .. } => {
            let (code, hint) = match last {
                Blocked::Busy { .. } => (
                    "not_quiescent",
                    "some thread is always inside: try again with a longer --deadline, or replace a function around it",
                ),
                _ => ("guest_in_flux", LATER),
            };
            problem(Failing::Deadline, code, hint)
        }
        CommitFailed::Refused(Blocked::Changed(error)) => Problem {
            message: message.to_owned(),
            ..refusal(error)
        },
        CommitFailed::Refused(_) => problem(
            Failing::Refused,
            "other_kernel_runs",
            "the guest was reset or has started another kernel",
        ),
        CommitFailed::Pause(error) => Problem {
            message: message.to_owned(),
            ..guest(error)
        },
        CommitFailed::Commit(CommitError::RolledBack { .. }) => {
            problem(Failing::Failed, "write_failed", REPORT)
        }
        CommitFailed::Commit(CommitError::Torn { .. }) | CommitFailed::Resume(_) => problem(
            Failing::Broken,
            BROKEN,
            "exopatch vm dump writes what the guest was; exopatch vm kill ends it",
        ),
    }
}
