//! The API's answers as tables for people. Whatever came from the guest or a file is cleaned first.

use super::{clean, words};
use crate::api::wire::{
    CallList, Dump, Hook, HookMoment, HookState, Kernel, PowerButton, Report, SetList, TimeList,
    Transition, Update, UpdateList, Verification, Vm, VmState,
};

/// Appends a line of a name and its value.
fn row(table: &mut String, name: &str, value: impl std::fmt::Display) {
    table.push_str(&format!("{name:<14}{value}\n"));
}

pub(super) fn vm_state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Ended => "ended",
    }
}

/// Seconds with three decimals.
pub(super) fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

pub(super) fn vm(vm: &Vm) -> String {
    let mut table = String::new();
    row(&mut table, "state", vm_state(vm.state));
    if let Some(end) = &vm.end {
        row(&mut table, "end", clean(end));
    }
    row(&mut table, "vcpus", vm.vcpus);
    row(&mut table, "memory", format_args!("{} MiB", vm.memory_mib));
    row(
        &mut table,
        "uptime",
        format_args!("{} s", seconds(vm.uptime_ms)),
    );
    row(&mut table, "kernel", clean(&vm.kernel));
    row(&mut table, "cmdline", clean(&vm.cmdline));
    if let Some(console) = &vm.console {
        row(&mut table, "console", clean(console));
    }
    if let Some(panic) = &vm.panic {
        row(&mut table, "panic", clean(panic));
    }
    table
}

pub(super) fn transition(done: &Transition) -> String {
    let state = vm_state(done.vm.state);
    if done.changed {
        format!("{state} after {} µs\n", done.took_us)
    } else {
        format!("{state} already\n")
    }
}

pub(super) fn power_button(pressed: &PowerButton) -> String {
    let heard = if pressed.heard {
        "the power button was pressed\n"
    } else {
        "the power button was pressed, but the guest has no driver that listens to it (yet)\n"
    };
    heard.to_owned()
}

pub(super) fn dump(dump: &Dump) -> String {
    let Dump {
        path,
        bytes,
        pause_us,
    } = dump;
    format!(
        "{}: {bytes} bytes, the guest was paused for {pause_us} µs\n",
        clean(path)
    )
}

pub(super) fn kernel(kernel: &Kernel) -> String {
    let mut table = String::new();
    row(&mut table, "file", clean(&kernel.file));
    row(&mut table, "build id", clean(&kernel.build_id));
    row(&mut table, "symbols", kernel.symbols);
    match &kernel.running {
        Some(running) => {
            row(&mut table, "slide", clean(&running.slide));
            let boot = match &running.boot_phase {
                Some(phase) => format!("not over: {}", clean(phase)),
                None => "over".to_owned(),
            };
            row(&mut table, "boot", boot);
        }
        None => {
            let why = kernel.not_running.as_deref().unwrap_or("no");
            row(&mut table, "running", clean(why));
        }
    }
    let arena = &kernel.arena;
    row(
        &mut table,
        "arena",
        format_args!(
            "{} of {} bytes used, at {}",
            arena.used_bytes,
            arena.bytes,
            clean(&arena.guest_physical)
        ),
    );
    table
}

pub(super) fn updates(list: &UpdateList) -> String {
    let mut table = format!(
        "{:<5}{:<15}{:>10}  {:<24}{}\n",
        "ID", "STATE", "PAUSE µs", "NAME", "FUNCTIONS"
    );
    for update in &list.updates {
        let report = update.reverted.as_ref().or(update.applied.as_ref());
        let pause = report.map_or_else(|| "-".to_owned(), |report| report.pause_us.to_string());
        let functions = clean(&update.functions.join(","));
        let (id, state, name) = (update.id, words::state(update), clean(&update.name));
        table.push_str(&format!(
            "{id:<5}{state:<15}{pause:>10}  {name:<24}{functions}\n"
        ));
    }
    table
}

pub(super) fn update(update: &Update) -> String {
    let mut table = String::new();
    row(&mut table, "update", update.id);
    row(&mut table, "name", clean(&update.name));
    row(&mut table, "state", update.state.name());
    if let Some(doing) = &update.doing {
        row(&mut table, "doing", clean(doing));
    }
    if !update.instead_of.is_empty() {
        let numbers = update.instead_of.iter().map(u64::to_string);
        let numbers: Vec<String> = numbers.collect();
        row(&mut table, "instead of", numbers.join(", "));
    }
    if let Some(rule) = &update.rule {
        row(&mut table, "rule", clean(rule));
    }
    if let Some(bound) = &update.bound {
        row(
            &mut table,
            "waits for",
            format_args!("{} tasks to leave the old side", bound.len()),
        );
        for task in bound {
            let frames = clean(&task.frames.join(" < "));
            row(
                &mut table,
                "",
                format_args!("{}: {frames}", clean(&task.who)),
            );
        }
    }
    row(&mut table, "functions", clean(&update.functions.join(", ")));
    for edition in &update.editions {
        let state = edition.state.name();
        let why = edition.why.as_ref();
        let why = why.map_or_else(String::new, |why| format!(" ({})", clean(why)));
        let at = clean(&edition.at);
        row(
            &mut table,
            &format!("  {state}"),
            format_args!("{} at {at}{why}", clean(&edition.function)),
        );
    }
    for hook in &update.hooks {
        row(
            &mut table,
            "hook",
            format_args!("{} {}", clean(&hook.name), became(hook)),
        );
    }
    if let Some(applied) = &update.applied {
        report(
            &mut table,
            if update.check { "check" } else { "apply" },
            applied,
        );
    }
    if let Some(reverted) = &update.reverted {
        report(&mut table, "revert", reverted);
    }
    if let Some(error) = &update.error {
        row(
            &mut table,
            "error",
            format_args!("{} [{}]", clean(&error.message), clean(&error.code)),
        );
        row(&mut table, "cause", clean(&error.cause));
        row(&mut table, "hint", clean(&error.hint));
    }
    table
}

fn report(table: &mut String, what: &str, report: &Report) {
    let phases = &report.phases;
    row(
        table,
        &format!("{what} pause"),
        format_args!("{} µs", report.pause_us),
    );
    for (name, us) in [
        ("stop", phases.stop_us),
        ("prove", phases.prove_us),
        ("scan", phases.scan_us),
        ("verify", phases.verify_us),
        ("write", phases.write_us),
        ("resume", phases.resume_us),
    ] {
        row(table, &format!("  {name}"), format_args!("{us} µs"));
    }
    row(table, "  pauses", report.pauses);
    row(table, "  read", format_args!("{} bytes", report.bytes_read));
    row(
        table,
        "  written",
        format_args!("{} bytes", report.bytes_written),
    );
    row(
        table,
        "  stacks",
        format_args!("{} words of {} tasks", report.stack_words, report.tasks),
    );
    row(table, "  in all", format_args!("{} µs", report.total_us));
}

pub(super) fn sets(list: &SetList) -> String {
    let mut table = format!("{:<24}{:>8}  {}\n", "SET", "NUMBERS", "WHICH");
    for set in &list.sets {
        let (name, keys) = (clean(&set.name), clean(&set.keys.join(" ")));
        table.push_str(&format!("{name:<24}{:>8}  {keys}\n", set.len));
    }
    table
}

/// What became of a hook.
fn became(hook: &Hook) -> String {
    let moment = match hook.moment {
        HookMoment::BeforeApply => "before apply",
        HookMoment::AfterApply => "after apply",
        HookMoment::BeforeRevert => "before revert",
        HookMoment::AfterRevert => "after revert",
    };
    let after = hook.after_ms.unwrap_or(0);
    let state = match (hook.state, hook.result) {
        (HookState::Running, _) => "runs".to_owned(),
        (HookState::Ended, result) => {
            format!("returned {} after {after} ms", result.unwrap_or(0))
        }
        (HookState::Failed, _) => format!(
            "failed after {after} ms: {}",
            clean(hook.why.as_deref().unwrap_or_default())
        ),
    };
    format!("({moment}) {state}")
}

pub(super) fn times(list: &TimeList) -> String {
    let mut table = format!("{:<24}{}\n", "TIME", "NOW");
    for time in &list.times {
        let on = if time.on { "yes" } else { "no" };
        table.push_str(&format!("{:<24}{on}\n", clean(&time.name)));
    }
    table
}

pub(super) fn calls(list: &CallList) -> String {
    let mut table = format!("{:<32}{:<12}{:>16}\n", "FUNCTION", "EDITION", "CALLS");
    for calls in &list.calls {
        let edition = calls.update;
        let edition = edition.map_or_else(|| "original".to_owned(), |id| format!("update {id}"));
        let function = clean(&calls.function);
        table.push_str(&format!("{function:<32}{edition:<12}{:>16}\n", calls.calls));
    }
    table
}

pub(super) fn verification(found: &Verification) -> String {
    let mut table = String::new();
    let intact = if found.intact { "intact" } else { "changed" };
    row(&mut table, "update", found.id);
    row(
        &mut table,
        "state",
        format_args!("{intact} ({} bytes compared)", found.bytes),
    );
    for difference in &found.differences {
        row(&mut table, &clean(&difference.at), clean(&difference.what));
    }
    table
}
