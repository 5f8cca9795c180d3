//! What a package holds, or a clone would, cannot be used, or does not fit the kernel.

use patcher::edition::clone::{CloneError, Reason, Refused};
use patcher::edition::link::LinkError;
use patcher::edition::object::PackageError;
use patcher::publish::PublishError;

use super::guest::unreadable;
use super::plan::{refusal, symbol};
use super::{FULL, REPORT, refused};
use crate::updates::Problem;

/// The bytes are no package.
pub(in crate::patching) fn package(cause: &PackageError) -> Problem {
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
pub(in crate::patching) fn other_build(package: &[u8], kernel: &[u8]) -> Problem {
    let cause = LinkError::OtherKernel {
        package: package.to_vec(),
        kernel: kernel.to_vec(),
    };
    link(&cause)
}

/// There are no clones of the functions that were named.
pub(in crate::patching) fn clones(cause: &CloneError) -> Problem {
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

pub(super) fn link(cause: &LinkError) -> Problem {
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

pub(super) fn publish(cause: &PublishError) -> Problem {
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
