//! The patcher's errors as problems of an operation: each keeps its own text as the cause, and gets a fixed code and a
//! way out. One file for each thing that fails.

mod apply;
mod commit;
mod guest;
mod kernel;
mod package;
mod plan;
mod tune;
mod view;

use std::error::Error;

pub(super) use self::apply::{apply, force, reuse, revert, settle};
pub(super) use self::guest::{busy, ending, gone, guest, unreadable};
pub(super) use self::kernel::{arena, index, locate, not_ready};
pub(super) use self::package::{clones, other_build, package};
pub(super) use self::tune::{sets, times};
pub(super) use self::view::{breakpoint, no_breakpoints, not_seen, stands_still, trial, view};
use crate::updates::{Failing, Problem};

const NOT_APPLIED: &str = "the update was not applied";
const FULL: &str = "revert updates that are not needed; what threads or addresses keep is shown by exopatch update show";
const REPORT: &str = "this should not happen with a stock kernel: please report it";
const LATER: &str = "try again later, or with a longer --deadline";

/// The update was refused: the guest is as it was.
fn refused(code: &str, cause: &dyn Error, hint: &str) -> Problem {
    Problem::new(Failing::Refused, code, NOT_APPLIED, cause.to_string(), hint)
}

#[cfg(test)]
mod tests {
    use patcher::addr::{Gpa, Gva};
    use patcher::apply::{ApplyError, CommitFailed};
    use patcher::commit::{Blocked, CommitError};
    use patcher::edition::link::LinkError;
    use patcher::edition::object::PackageError;
    use patcher::edition::space::Full;
    use patcher::guest::GuestError;
    use patcher::journal::UndoError;
    use patcher::plan::Purpose;
    use patcher::plan::refusal::Refusal;

    use crate::updates::{BROKEN, Failing, Problem};

    fn check(problem: &Problem, failing: Failing, code: &str) {
        assert_eq!((problem.failing, problem.code.as_str()), (failing, code));
        for part in [&problem.message, &problem.cause, &problem.hint] {
            assert!(!part.is_empty(), "{problem:?}");
        }
    }

    fn site(site: &'static str) -> Refusal {
        Refusal::Site {
            function: "f".to_owned(),
            site,
            at: Gva(1),
            why: "w",
        }
    }

    #[test]
    fn every_failure_keeps_its_kind() {
        check(
            &super::package(&PackageError::NoEdition),
            Failing::Refused,
            "package_editions_wrong",
        );
        check(
            &super::other_build(&[1], &[2]),
            Failing::Refused,
            "package_for_other_kernel",
        );
        check(
            &super::guest(&GuestError::Ended),
            Failing::Conflict,
            "guest_ended",
        );
        check(
            &super::guest(&GuestError::Deadline { vcpu: 1 }),
            Failing::Deadline,
            "pause_deadline_passed",
        );
        check(
            &super::ending("SYSTEM_HALT"),
            Failing::Conflict,
            "guest_going_down",
        );
        check(&super::gone(), Failing::Conflict, "update_lost");
        let full = Full {
            half: "code",
            needed: 2,
            left: 1,
            size: 9,
        };
        let apply = |error: ApplyError| super::apply(&error);
        check(
            &apply(LinkError::Full(full).into()),
            Failing::Refused,
            "arena_full",
        );
        let link = LinkError::Refused(site("a kprobe"));
        check(&apply(link.into()), Failing::Refused, "kprobe_in_the_way");
        let booting = ApplyError::Booting {
            state: "SYSTEM_BOOTING".to_owned(),
        };
        check(&apply(booting), Failing::Deadline, "guest_booting");
        let busy = CommitFailed::Deadline {
            last: Blocked::Busy {
                cause: "task 1".to_owned(),
            },
            pauses: 3,
        };
        check(&apply(busy.into()), Failing::Deadline, "not_quiescent");
        let changed = CommitFailed::Refused(Blocked::Changed(site("a jump label")));
        check(
            &apply(changed.into()),
            Failing::Refused,
            "patch_site_in_the_way",
        );
    }

    #[test]
    fn only_a_torn_guest_is_broken() {
        let (purpose, at) = (Purpose::Trampoline, Gva(1));
        let undone = CommitError::RolledBack {
            purpose,
            at,
            cause: GuestError::Ended,
        };
        let torn = CommitError::Torn {
            purpose,
            at,
            cause: GuestError::Ended,
            undo: UndoError {
                at: Gpa(1),
                left: 1,
                total: 2,
                cause: GuestError::Ended,
            },
        };
        check(
            &super::commit::commit("m", &CommitFailed::Commit(undone)),
            Failing::Failed,
            "write_failed",
        );
        check(
            &super::commit::commit("m", &CommitFailed::Commit(torn)),
            Failing::Broken,
            BROKEN,
        );
    }
}
