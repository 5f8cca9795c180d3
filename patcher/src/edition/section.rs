//! What each section of an edition's object is to us: placed in the arena, used here, left out, or a reason to refuse.
//!
//! The kernel's build sorts everything that needs care at run time into sections of its own (`include/asm-generic/vmlinux.lds.h`
//! lists them), so refusing a section by name refuses what it stands for.

use crate::edition::hook::CELLS;
use crate::publish::{BUGS, FIXUPS};

/// What is done with a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions: placed in the code half.
    Code,
    /// Constants and initialised variables: placed in the data half.
    Data,
    /// Zeroed variables: room in the data half.
    Zeroed,
    /// Read by us, not placed: the records of editions, predicates and hooks, the unwind table.
    Ours,
    /// Left out; `why` that loses nothing.
    LeftOut {
        /// Why nothing is lost.
        why: &'static str,
    },
    /// The object cannot be used with it; `why` says what would be lost.
    Refused {
        /// What the kernel would have to be told.
        why: &'static str,
    },
}

/// Instructions that live where ordinary kernel text does.
const CODE: &[&str] = &[
    ".text",
    ".text.unlikely",
    ".text.hot",
    // Takes the place of other code where the guest's processor calls for it; never run where it is.
    ".altinstr_replacement",
    // Runs as long as no alternative was chosen.
    ".altinstr_aux",
];
/// Data that needs nothing but memory.
const DATA: &[&str] = &[
    ".data",
    ".data.once",
    ".data..once",
    ".data.unlikely",
    ".data.rel",
    ".data.rel.local",
    ".data.rel.ro",
    ".data.rel.ro.local",
    ".data..read_mostly",
    ".data..ro_after_init",
    ".data..cacheline_aligned",
    ".data..shared_aligned",
    // What hooks are run by.
    CELLS,
    // Debug messages that nobody can switch on, for the kernel does not know of them.
    "__dyndbg",
    "__dyndbg_classes",
];
/// Tables about the code, which become the kernel's (see [`crate::publish`]).
const TABLES: &[&str] = &[FIXUPS, BUGS];
const OURS: &[&str] = &[
    ".exopatch.kernel",
    ".exopatch.editions",
    ".exopatch.predicates",
    ".exopatch.hooks",
    ".exopatch.ticker",
    ".orc_unwind",
    ".orc_unwind_ip",
    ".altinstructions",
];

/// By exact name, or by prefix where the name ends in `*`.
const LEFT_OUT: &[(&str, &str)] = &[
    (
        "__mcount_loc",
        "the fentry call of an edition becomes a NOP, so there is nothing to trace",
    ),
    (
        "__patchable_function_entries",
        "the padding before an edition is only used by mitigations that patch the kernel's own calls",
    ),
    (
        ".return_sites",
        "returns of an edition go to the live return thunk",
    ),
    (
        ".retpoline_sites",
        "an edition keeps calling the retpoline thunks, which the kernel has patched",
    ),
    (".call_sites", "only call depth tracking patches them"),
    (".ibt_endbr_seal", "an edition keeps its ENDBR instructions"),
    (
        ".smp_locks",
        "an edition keeps its LOCK prefixes, which are right on any number of processors",
    ),
    (
        ".orc_header",
        "the package is for exactly one kernel, which has the same format",
    ),
    (
        ".static_call_sites",
        "static calls of an edition go through the kernel's trampolines, which it keeps right",
    ),
    (
        ".parainstructions",
        "an edition keeps its indirect calls through the kernel's table of paravirtual operations",
    ),
    (
        ".printk_index",
        "only a list of all messages lacks those of an edition",
    ),
    (".discard*", "the kernel's own linking discards it"),
    (".note*", "notes are for tools"),
    (".comment", "comments are for tools"),
    (".modinfo", "an edition is no module"),
    (".gnu.linkonce.this_module", "an edition is no module"),
    (".llvm_addrsig", "it is for linkers"),
];

const REFUSED: &[(&str, &str)] = &[
    (
        "__jump_table",
        "static branches (jump labels, dynamic debug, tracepoints) would not be switched; compile it with `exopatch build`, which makes them test their keys",
    ),
    (".static_call*", "static calls cannot be added"),
    ("__tracepoints*", "tracepoints cannot be added"),
    ("__tracepoint*", "tracepoints cannot be added"),
    ("_ftrace*", "trace events cannot be added"),
    ("__bpf_raw_tp_map", "tracepoints cannot be added"),
    ("__trace*", "trace strings would not be known to the tracer"),
    (
        ".data..percpu*",
        "per-CPU variables would have no memory of their own on each CPU",
    ),
    (".init*", "initialisation is over"),
    (".exit*", "an edition is never unloaded"),
    ("__param", "module parameters cannot be added"),
    ("__ksymtab*", "symbols cannot be exported from an edition"),
    ("___ksymtab*", "symbols cannot be exported from an edition"),
    ("___kcrctab*", "symbols cannot be exported from an edition"),
    (
        ".export_symbol",
        "symbols cannot be exported from an edition",
    ),
    (
        ".noinstr.text",
        "code that must not be instrumented has to lie in its own part of the kernel",
    ),
    (
        ".entry.text",
        "entry code has to be mapped in user page tables",
    ),
    (
        ".kprobes.text",
        "code that must not be probed has to lie in its own part of the kernel",
    ),
    (
        ".sched.text",
        "scheduler code has to lie in its own part of the kernel, where wait channels are looked for",
    ),
    (
        ".spinlock.text",
        "lock code has to lie in its own part of the kernel",
    ),
    (
        ".cpuidle.text",
        "idle code has to lie in its own part of the kernel",
    ),
    (
        ".irqentry.text",
        "interrupt entries have to lie in their own part of the kernel",
    ),
    (
        ".softirqentry.text",
        "softirq entries have to lie in their own part of the kernel",
    ),
    (".ref.text", "it may refer to freed initialisation code"),
    (".cfi_sites", "control-flow checks would not be patched"),
    (
        ".kcfi_traps",
        "control-flow violations would not be recognised",
    ),
];

/// The role of a section that is not empty. `alloc` and `write` are its ELF flags `SHF_ALLOC` and `SHF_WRITE`;
/// `zeroed` means `SHT_NOBITS`.
#[must_use]
pub fn role(name: &str, alloc: bool, zeroed: bool) -> Role {
    if OURS.contains(&name) {
        return Role::Ours;
    }
    if let Some(why) = named(LEFT_OUT, name) {
        return Role::LeftOut { why };
    }
    if !alloc {
        return Role::LeftOut {
            why: "it takes no memory at run time",
        };
    }
    if let Some(why) = named(REFUSED, name) {
        return Role::Refused { why };
    }
    if CODE.contains(&name) {
        Role::Code
    } else if zeroed && (name == ".bss" || name.starts_with(".bss.")) {
        Role::Zeroed
    } else if DATA.contains(&name)
        || TABLES.contains(&name)
        || name == ".rodata"
        || name.starts_with(".rodata.")
    {
        Role::Data
    } else {
        Role::Refused {
            why: "what the kernel does with such a section is not known here",
        }
    }
}

fn named(table: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    table.iter().find_map(|&(pattern, why)| {
        let matches = match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == pattern,
        };
        matches.then_some(why)
    })
}

#[cfg(test)]
mod tests {
    use super::{Role, role};

    #[test]
    fn sections_have_their_roles() {
        let check = |name: &str, want: &str| {
            let got = match role(name, true, name.starts_with(".bss")) {
                Role::Code => "code",
                Role::Data => "data",
                Role::Zeroed => "zeroed",
                Role::Ours => "ours",
                Role::LeftOut { .. } => "left out",
                Role::Refused { .. } => "refused",
            };
            assert_eq!(got, want, "{name}");
        };
        check(".text", "code");
        check(".text.unlikely", "code");
        check(".text.startup", "refused");
        check(".rodata.str1.1", "data");
        check(".data..read_mostly", "data");
        check(".bss", "zeroed");
        check(".exopatch.editions", "ours");
        for name in [
            "__mcount_loc",
            ".return_sites",
            ".retpoline_sites",
            ".call_sites",
            ".ibt_endbr_seal",
            ".smp_locks",
            ".static_call_sites",
            ".parainstructions",
            ".printk_index",
        ] {
            check(name, "left out");
        }
        check(".discard.reachable", "left out");
        check(".note.gnu.property", "left out");
        for name in ["__ex_table", "__bug_table"] {
            check(name, "data");
        }
        check(".altinstructions", "ours");
        check(".altinstr_replacement", "code");
        check(".altinstr_aux", "code");
        check("__dyndbg", "data");
        check("__dyndbg_classes", "data");
        check("__jump_table", "refused");
        for name in [
            ".static_call.text",
            ".static_call_tramp_key",
            ".data..percpu",
            ".init.text",
            ".exit.text",
        ] {
            check(name, "refused");
        }
        check("..unheard-of", "refused");
    }

    #[test]
    fn what_takes_no_memory_is_left_out() {
        assert!(matches!(
            role(".debug_info", false, false),
            Role::LeftOut { .. }
        ));
        assert!(matches!(
            role("__bug_table", false, false),
            Role::LeftOut { .. }
        ));
    }
}
