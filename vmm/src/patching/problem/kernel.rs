//! The kernel cannot be used: its file, where the guest runs it, where our memory goes in it.

use patcher::kernel::arena::ArenaError;
use patcher::kernel::locate::LocateError;

use super::{NOT_APPLIED, REPORT, refused};
use crate::kernel_index::IndexError;
use crate::patching::NotReady;
use crate::updates::{Failing, Problem};

/// The kernel's file cannot be used.
pub(in crate::patching) fn index(cause: &IndexError) -> Problem {
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

/// The guest does not run the kernel that it was booted with.
pub(in crate::patching) fn locate(cause: &LocateError) -> Problem {
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
pub(in crate::patching) fn not_ready(cause: &NotReady) -> Problem {
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

/// The arena cannot be mapped.
pub(in crate::patching) fn arena(cause: &ArenaError) -> Problem {
    refused("arena_not_mappable", cause, REPORT)
}
