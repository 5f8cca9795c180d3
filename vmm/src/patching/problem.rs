//! The patcher's errors as problems of an operation: each keeps its own text as the cause, and gets a fixed code and a
//! way out.

use std::error::Error;

use patcher::apply::hooks::HookError;
use patcher::apply::tune::SetsError;
use patcher::apply::{ApplyError, CommitFailed};
use patcher::commit::{Blocked, CommitError};
use patcher::edition::clone::{CloneError, Reason, Refused};
use patcher::edition::link::LinkError;
use patcher::edition::list::ListError;
use patcher::edition::object::PackageError;
use patcher::guest::GuestError;
use patcher::kernel::arena::ArenaError;
use patcher::kernel::locate::LocateError;
use patcher::kernel::symbols::SymbolError;
use patcher::plan::refusal::Refusal;
use patcher::plan::target::TargetError;
use patcher::publish::PublishError;
use patcher::rule::resolve::ResolveError;

use super::NotReady;
use crate::guest::{BreakError, GuestBusy};
use crate::kernel_index::IndexError;
use crate::trial::TrialError;
use crate::updates::{BROKEN, Failing, Problem};
use crate::views::ViewError;
use crate::views::error::Kind;
use crate::vm::BreakpointError;

const NOT_APPLIED: &str = "the update was not applied";
const NOT_REVERTED: &str = "the update was not reverted";
const NOT_REUSED: &str = "the update is used as before";
const NOT_FORCED: &str = "the switch was not forced";
const FULL: &str = "revert updates that are not needed; what threads or addresses keep is shown by exopatch update show";
const NOT_SETTLED: &str = "the guest's threads could not be looked at";
const NOT_SEEN: &str = "the kernel was not shown";
const REPORT: &str = "this should not happen with a stock kernel: please report it";
const ELSEWHERE: &str =
    "fix it in another function: one that calls this one, or that this one calls";
const LATER: &str = "try again later, or with a longer --deadline";

fn refused(code: &str, cause: &dyn Error, hint: &str) -> Problem {
    Problem::new(Failing::Refused, code, NOT_APPLIED, cause.to_string(), hint)
}

/// Another patcher has the guest.
pub(super) fn busy(cause: &GuestBusy) -> Problem {
    let message = "the operation was not begun";
    let hint = "try again when the dump or update that is under way is done";
    Problem::new(Failing::Busy, "busy", message, cause.to_string(), hint)
}

/// The guest could not be stopped or read.
pub(super) fn guest(cause: &GuestError) -> Problem {
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

/// The kernel's file cannot be used.
pub(super) fn index(cause: &IndexError) -> Problem {
    let (code, hint) = match cause {
        IndexError::File { .. } => (
            "kernel_file_unreadable",
            "the file that the guest was booted from must stay where it is",
        ),
        IndexError::Temporary { .. } => (
            "no_room_for_kernel",
            "make room there, or set TMPDIR to a directory that has it",
        ),
        IndexError::Payload { .. } => (
            "kernel_not_unpackable",
            "boot the vmlinuz of the kernel's package",
        ),
        IndexError::Image { .. } => (
            "kernel_not_supported",
            "boot a kernel with symbols (KALLSYMS_ALL) and types (DEBUG_INFO_BTF), as distributions build it",
        ),
    };
    let message = "the kernel's image cannot be used";
    Problem::new(Failing::Refused, code, message, cause.to_string(), hint)
}

/// The bytes are no package.
pub(super) fn package(cause: &PackageError) -> Problem {
    let (code, hint) = match cause {
        PackageError::Section { .. } | PackageError::TooMuch { .. } => (
            "package_section_unsupported",
            "write the edition without what makes this section",
        ),
        PackageError::Relocation { .. } | PackageError::LeftOut { .. } => (
            "package_relocation_unsupported",
            "write the edition without this reference",
        ),
        PackageError::NoEdition
        | PackageError::NotAFunction { .. }
        | PackageError::Twice { .. } => (
            "package_editions_wrong",
            "see exopatch.h for how an edition says what it replaces",
        ),
        PackageError::NotAPredicate { .. }
        | PackageError::TwoPredicates { .. }
        | PackageError::TooManyPredicates { .. } => (
            "package_predicates_wrong",
            "see exopatch.h for how a package defines predicates",
        ),
        PackageError::NotAHook { .. }
        | PackageError::TwoHooks { .. }
        | PackageError::ReplacesTicker { .. } => (
            "package_hooks_wrong",
            "see exopatch_hooks.h for how a package defines hooks",
        ),
        PackageError::NoOrc | PackageError::Ours { .. } | PackageError::TwoTables { .. } => (
            "package_not_ours",
            "build it with this exopatch's build command",
        ),
        PackageError::TooLarge { .. }
        | PackageError::Elf { .. }
        | PackageError::NotRelocatable { .. }
        | PackageError::Outside { .. } => (
            "package_malformed",
            "give an .xpu file as exopatch build wrote it",
        ),
    };
    refused(code, cause, hint)
}

/// The package is for another build of the kernel.
pub(super) fn other_build(package: &[u8], kernel: &[u8]) -> Problem {
    let cause = LinkError::OtherKernel {
        package: package.to_vec(),
        kernel: kernel.to_vec(),
    };
    link(&cause)
}

/// The guest does not run the kernel that it was booted with.
pub(super) fn locate(cause: &LocateError) -> Problem {
    let (code, hint) = match cause {
        LocateError::Symbol(_) | LocateError::Type(_) => ("kernel_not_supported", REPORT),
        _ => (
            "other_kernel_runs",
            "updates are for the kernel that exopatch booted; start the guest anew to get back to it",
        ),
    };
    refused(code, cause, hint)
}

/// The guest was not ready before the deadline.
pub(super) fn not_ready(cause: &NotReady) -> Problem {
    let (code, hint) = match cause {
        NotReady::Booting { .. } => (
            "guest_booting",
            "wait until the guest has booted, or give a longer --deadline",
        ),
        NotReady::NotFound(_) => (
            "kernel_not_found",
            "wait until the guest has booted; a guest that went to another kernel cannot be updated",
        ),
    };
    Problem::new(
        Failing::Deadline,
        code,
        NOT_APPLIED,
        cause.to_string(),
        hint,
    )
}

/// The guest's kernel was not found for a view.
pub(super) fn not_seen(cause: LocateError) -> Problem {
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
pub(super) fn view(cause: &ViewError) -> Problem {
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
pub(super) fn breakpoint(cause: &BreakError) -> Problem {
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
pub(super) fn stands_still() -> Problem {
    let cause = "the guest is paused, so that nobody comes anywhere";
    let hint = "exopatch vm resume lets it go";
    Problem::new(Failing::Conflict, "guest_paused", NOT_SEEN, cause, hint)
}

/// Breakpoints do nothing on this machine.
pub(super) fn no_breakpoints() -> Problem {
    let cause = "hardware breakpoints do not stop guests on this machine";
    let hint = "where the processor is emulated, emulate it with QEMU 9.1 or newer";
    Problem::new(Failing::Conflict, "no_breakpoints", NOT_SEEN, cause, hint)
}

/// Breakpoints cannot be tried.
pub(super) fn trial(cause: &TrialError) -> Problem {
    Problem::new(
        Failing::Failed,
        "machine_failed",
        NOT_SEEN,
        cause.to_string(),
        REPORT,
    )
}

/// The guest is on its way down.
pub(super) fn ending(state: &str) -> Problem {
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
pub(super) fn unreadable(cause: &dyn Error) -> Problem {
    refused(
        "kernel_unreadable",
        cause,
        "see the guest's log: its memory is not what its kernel would make it",
    )
}

/// The kernel of an update has gone.
pub(super) fn gone() -> Problem {
    Problem::new(
        Failing::Conflict,
        "update_lost",
        "the update is gone with its kernel",
        "the guest no longer runs the kernel in which the update was applied: it was reset, or has started another",
        "nothing is left to undo; apply the update again if the guest runs the same kernel anew",
    )
}

/// The arena cannot be mapped.
pub(super) fn arena(cause: &ArenaError) -> Problem {
    refused("arena_not_mappable", cause, REPORT)
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

/// An apply failed.
pub(super) fn apply(cause: &ApplyError) -> Problem {
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

fn publish(cause: &PublishError) -> Problem {
    match cause {
        PublishError::Full(full) => link(&LinkError::Full(*full)),
        PublishError::Kernel(_) => unreadable(cause),
        PublishError::Unknown { .. } => refused(
            "package_section_unsupported",
            cause,
            "write the edition without what makes this section",
        ),
        PublishError::Shape { .. } | PublishError::Outside { .. } | PublishError::Twice { .. } => {
            refused(
                "package_malformed",
                cause,
                "give an .xpu file as exopatch build wrote it",
            )
        }
        PublishError::Symbol(_) | PublishError::Type(_) | PublishError::Far { .. } => {
            refused("kernel_not_understood", cause, REPORT)
        }
    }
}

/// A set could not be changed.
pub(super) fn sets(cause: &SetsError) -> Problem {
    let message = "the set was not changed, or not wholly";
    asked_for("set", message, cause)
}

/// A time could not be begun, ended or done away with.
pub(super) fn times(cause: &SetsError) -> Problem {
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

/// A revert failed.
pub(super) fn revert(cause: &ApplyError) -> Problem {
    not_done(NOT_REVERTED, cause)
}

/// The use of an update's editions could not be changed.
pub(super) fn reuse(cause: &ApplyError) -> Problem {
    not_done(NOT_REUSED, cause)
}

/// A switch could not be forced.
pub(super) fn force(cause: &ApplyError) -> Problem {
    not_done(NOT_FORCED, cause)
}

/// What waits for threads could not be looked at.
pub(super) fn settle(cause: &ApplyError) -> Problem {
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
            "exopatch update show tells which tasks it waits for; update force ends it, update revert takes it back",
        ),
        ListError::Beneath { .. } => (
            "update_beneath_another",
            "or apply one update instead of both: exopatch update apply --instead-of",
        ),
    };
    Problem::new(Failing::Conflict, code, message, cause.to_string(), hint)
}

fn target(cause: &TargetError) -> Problem {
    match cause {
        TargetError::Symbol(error) => symbol(error, cause),
        TargetError::Refused(error) => refusal(error),
        TargetError::NotShipped(error) => refused("kernel_not_understood", error, REPORT),
        TargetError::Unreadable { .. } | TargetError::Probes(_) => unreadable(cause),
    }
}

/// There are no clones of the functions that were named.
pub(super) fn clones(cause: &CloneError) -> Problem {
    match cause {
        CloneError::Symbol(error) => symbol(error, cause),
        CloneError::NotShipped(error) => refused("kernel_not_understood", error, REPORT),
        CloneError::Twice { .. } => refused("clone_twice", cause, "name each function once"),
        CloneError::Refused(Refused {
            reason: Reason::Changed { .. } | Reason::Compared(_) | Reason::Unreadable(_),
            ..
        }) => refused(
            "clone_text_changed",
            cause,
            "take the guest's probes off, or try again: it may have been changing its text",
        ),
        CloneError::Refused(_) => refused(
            "clone_not_possible",
            cause,
            "name a function that can be moved, or write an edition of this one",
        ),
    }
}

fn symbol(error: &SymbolError, cause: &dyn Error) -> Problem {
    match error {
        SymbolError::Missing { .. } => refused(
            "symbol_missing",
            cause,
            "the compiler may have inlined or renamed it: replace a function that calls it",
        ),
        SymbolError::Ambiguous { .. } => refused(
            "symbol_ambiguous",
            cause,
            "say which one is meant by its position (see exopatch.h)",
        ),
        _ => refused("symbol_unusable", cause, "refer to another symbol"),
    }
}

fn link(cause: &LinkError) -> Problem {
    let (code, hint) = match cause {
        LinkError::OtherKernel { .. } => (
            "package_for_other_kernel",
            "build it again: exopatch build --kernel with the vmlinuz that the guest was booted from",
        ),
        LinkError::Symbol { cause: error, .. } => return symbol(error, cause),
        LinkError::NoOriginal { .. } => (
            "no_original",
            "only the originals of functions that the package replaces can be called",
        ),
        LinkError::Fentry { .. } => ("fentry_misused", "do not refer to __fentry__"),
        LinkError::Overflow { .. } => (
            "relocation_out_of_range",
            "build it with exopatch build, which uses the kernel's code model",
        ),
        LinkError::Alternative(_) => (
            "alternative_unusable",
            "build it again: exopatch build --kernel with the vmlinuz that the guest was booted from",
        ),
        LinkError::Predicate(_) => (
            "predicate_not_askable",
            "see EXOPATCH_PREDICATE in exopatch.h for what a predicate may do; what it cannot read itself the host can put into a set",
        ),
        LinkError::Thunk(_) => ("predicate_not_askable", REPORT),
        LinkError::Full(_) => ("arena_full", FULL),
        LinkError::Refused(error) => return refusal(error),
    };
    refused(code, cause, hint)
}

fn refusal(cause: &Refusal) -> Problem {
    let (code, hint) = match cause {
        Refusal::NoFentry { .. } => ("function_without_fentry", ELSEWHERE),
        Refusal::Reliance { .. } => ("callers_rely_on_registers", ELSEWHERE),
        Refusal::TooShort { .. } => ("function_too_short", ELSEWHERE),
        Refusal::Region { .. } => ("function_in_special_region", ELSEWHERE),
        Refusal::Site { site, .. } if site.contains("kprobe") => (
            "kprobe_in_the_way",
            "remove the probe in the guest, then apply the update",
        ),
        Refusal::Site { .. } => ("patch_site_in_the_way", ELSEWHERE),
        Refusal::BranchInto { .. } | Refusal::JumpTable { .. } => {
            ("branch_into_displaced_code", ELSEWHERE)
        }
        Refusal::Undecodable { .. } => ("function_undecodable", REPORT),
        Refusal::Immovable { .. } => ("instruction_not_movable", ELSEWHERE),
        Refusal::Changed { .. } => (
            "text_changed",
            "the guest has changed this function itself: remove its probe or live patch, then apply the update",
        ),
        Refusal::AlreadyRedirected { .. } => (
            "already_redirected",
            "exopatch update list shows by which update; revert it first",
        ),
        Refusal::Unpredictable { .. } => ("text_unpredictable", ELSEWHERE),
    };
    refused(code, cause, hint)
}

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
            &super::commit("m", &CommitFailed::Commit(undone)),
            Failing::Failed,
            "write_failed",
        );
        check(
            &super::commit("m", &CommitFailed::Commit(torn)),
            Failing::Broken,
            BROKEN,
        );
    }
}
