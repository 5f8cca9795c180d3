//! A function cannot be redirected, or a symbol not be referred to.

use std::error::Error;

use patcher::kernel::symbols::SymbolError;
use patcher::plan::refusal::Refusal;
use patcher::plan::target::TargetError;

use super::guest::unreadable;
use super::{REPORT, refused};
use crate::updates::Problem;

const ELSEWHERE: &str =
    "fix it in another function: one that calls this one, or that this one calls";

pub(super) fn target(cause: &TargetError) -> Problem {
    match cause {
        TargetError::Symbol(error) => symbol(error, cause),
        TargetError::Refused(error) => refusal(error),
        TargetError::NotShipped(error) => refused("kernel_not_understood", error, REPORT),
        TargetError::Unreadable { .. } | TargetError::Probes(_) => unreadable(cause),
    }
}

pub(super) fn symbol(error: &SymbolError, cause: &dyn Error) -> Problem {
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

pub(super) fn refusal(cause: &Refusal) -> Problem {
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
