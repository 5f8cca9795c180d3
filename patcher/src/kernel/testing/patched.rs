//! A function of the made-up kernel that has a site of every kind that kernels patch, and the tables that say so.

use super::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, function};
use super::{Basic, Btf, DATA, Form, Part, RODATA, TEXT, relative};

/// The function.
pub(crate) const PATCHED: u64 = TEXT + 0x3700;
/// Its sites.
pub(crate) const JUMP_LABEL: u64 = PATCHED;
pub(crate) const STATIC_CALL: u64 = PATCHED + 0x10;
pub(crate) const FENCE: u64 = PATCHED + 0x20;
pub(crate) const MOVED: u64 = PATCHED + 0x28;
pub(crate) const RETPOLINE: u64 = PATCHED + 0x30;
pub(crate) const LOCK: u64 = PATCHED + 0x38;
pub(crate) const ENDBR: u64 = PATCHED + 0x48;
pub(crate) const OPERATION: u64 = PATCHED + 0x50;
pub(crate) const PLAIN: u64 = PATCHED + 0x60;
pub(crate) const CONSTANT: u64 = PATCHED + 0x72;
/// Where the branch of the static one leads.
pub(crate) const TARGET: u64 = PATCHED + 0x40;
pub(crate) const TRAMPOLINE: u64 = TEXT + 0x3600;
pub(crate) const TRACER: u64 = TEXT + 0x3620;
pub(crate) const THUNK: u64 = TEXT + 0x3640;
/// A function with room for code that counts its calls, and a call of it.
pub(crate) const COUNTED: u64 = TEXT + 0x36c0;
pub(crate) const CALL: u64 = PATCHED + 0x80;
pub(crate) const COUNTING_RETURN: u64 = TEXT + 0x3690;
pub(crate) const COUNTING_THUNK: u64 = TEXT + 0x36a0;
/// The code that counts: it reaches a CPU's variable relative to itself.
pub(crate) const COUNT: [u8; 9] = [0x65, 0x48, 0xc1, 0x3d, 0x10, 0, 0, 0, 5];
pub(crate) const COUNT_AT: u64 = DATA + 0x38e8;
pub(crate) const NOTHING: u64 = TEXT + 0x3660;
/// The feature that the first alternative asks for, and that whose absence the second asks for.
pub(crate) const PRESENT: u16 = 33;
/// That which nobody has.
const NEVER: u16 = 35;
pub(crate) const ABSENT: u16 = 34;

/// pushfq; two NOPs; pop rax; four NOPs.
pub(crate) const PUSHES: [u8; 8] = [0x9c, 0x90, 0x90, 0x58, 0x90, 0x90, 0x90, 0x90];
const REPLACEMENTS: u64 = RODATA + 0x9_0000;

pub(super) const TEXT_SYMBOLS: [(u64, &str); 13] = [
    (0x3600, "__SCT__made"),
    (0x3620, "ftrace_caller"),
    (0x3630, "ftrace_caller_end"),
    (0x3640, "__x86_indirect_thunk_rax"),
    (0x3660, "_paravirt_nop"),
    (0x3660, "nop_func"),
    (0x3680, "paravirt_BUG"),
    (0x3680, "BUG_func"),
    (0x3690, "call_depth_return_thunk"),
    (0x36a0, "__x86_indirect_call_thunk_rax"),
    (0x36c0, "counted"),
    (0x3700, "patched"),
    (0x3f00, "_etext"),
];

pub(super) const DATA_SYMBOLS: [(u64, &str); 16] = [
    (0x3800, "__start___jump_table"),
    (0x3810, "__stop___jump_table"),
    (0x3820, "__start_static_call_sites"),
    (0x3828, "__stop_static_call_sites"),
    (0x3830, "__SCK__made"),
    (0x3840, "made_key"),
    (0x3850, "ftrace_pages_start"),
    (0x3858, "ftrace_ops_list"),
    (0x3860, "boot_cpu_data"),
    (0x3878, "ftrace_trace_function"),
    (0x3880, "pv_ops"),
    (0x38c0, "made_pointer"),
    (0x38d0, "ftrace_list_end"),
    (0x38e0, "behind_ftrace"),
    (0x38e8, "skl_call_thunk_template"),
    (0x38f1, "skl_call_thunk_tail"),
];

/// The types that `kernel/changed` asks about.
pub(super) fn types(btf: &mut Btf, form: Form, (int, long, byte, _): Basic) {
    let capabilities = btf.array(int, 3);
    btf.structure("cpuinfo_x86", 24, &[("x86_capability", capabilities, 4)]);
    btf.structure("static_key", 16, &[("enabled", int, 0)]);
    btf.structure("static_call_key", 16, &[("func", long, 0)]);
    btf.structure(
        "ftrace_page",
        24,
        &[("next", long, 0), ("records", long, 8), ("index", int, 16)],
    );
    btf.structure("dyn_ftrace", 16, &[("ip", long, 0), ("flags", long, 8)]);
    btf.structure(
        "ftrace_ops",
        32,
        &[
            ("next", long, 0),
            ("trampoline", long, 8),
            ("trampoline_size", long, 16),
            ("flags", long, 24),
        ],
    );
    let (operations, short) = (btf.array(long, 8), btf.int(2));
    btf.structure("paravirt_patch_template", 64, &[("all", operations, 0)]);
    let slot = btf.structure("arch_optimized_insn", 8, &[("insn", long, 0)]);
    let probe = btf.structure("made_kprobe", 64, &[("all", operations, 0)]);
    btf.structure(
        "optimized_kprobe",
        80,
        &[("kp", probe, 0), ("optinsn", slot, 64)],
    );
    let mut fields = vec![
        ("instr_offset", int, 0),
        ("repl_offset", int, 4),
        ("cpuid", short, 8),
    ];
    if form == Form::New {
        fields.extend([
            ("flags", short, 10),
            ("instrlen", byte, 12),
            ("replacementlen", byte, 13),
        ]);
        btf.structure("alt_instr", 14, &fields);
    } else {
        fields.extend([("instrlen", byte, 10), ("replacementlen", byte, 11)]);
        btf.structure("alt_instr", 12, &fields);
        btf.structure(
            "paravirt_patch_site",
            16,
            &[("instr", long, 0), ("type", byte, 8), ("len", byte, 9)],
        );
    }
}

fn distance(from: u64, to: u64) -> [u8; 4] {
    let distance = i32::try_from(to.wrapping_sub(from).cast_signed()).unwrap();
    distance.to_le_bytes()
}

/// A branch with `opcode` at `at` to `to`.
pub(crate) fn branch(opcode: u8, at: u64, to: u64) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(distance(at + 5, to));
    bytes
}

/// Writes the code, as it is linked.
pub(super) fn text(text: &mut [u8]) {
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at - TEXT).unwrap();
        text[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(JUMP_LABEL, &[0x0f, 0x1f, 0x44, 0, 0]);
    put(STATIC_CALL, &branch(0xe8, STATIC_CALL, TRAMPOLINE));
    put(FENCE, &[0x90; 5]);
    put(MOVED, &[0x90; 5]);
    put(RETPOLINE, &branch(0xe8, RETPOLINE, THUNK));
    put(LOCK, &[0xf0, 0xff, 0x00]);
    put(ENDBR, &[0xf3, 0x0f, 0x1e, 0xfa]);
    put(OPERATION, &[0xff, 0x15]);
    put(OPERATION + 2, &distance(OPERATION + 6, DATA + 0x3888));
    put(PLAIN, &[0x55]);
    put(CONSTANT - 2, &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8]);
    put(COUNTED - 16, &[0x90; 16]);
    put(CALL, &branch(0xe8, CALL, COUNTED));
    put(TRAMPOLINE, &branch(0xe9, TRAMPOLINE, NOTHING));
    put(TRAMPOLINE + 5, &[0x0f, 0xb9, 0xcc]);
}

/// Writes the tables that lie among the variables.
pub(super) fn data(data: &mut [u8]) {
    let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
    let jump = DATA + 0x3800;
    put(0x3800, &distance(jump, JUMP_LABEL));
    put(0x3804, &distance(jump + 4, TARGET));
    put(
        0x3808,
        &(DATA + 0x3840).wrapping_sub(jump + 8).to_le_bytes(),
    );
    put(0x38e8, &COUNT);
    let call = DATA + 0x3820;
    put(0x3820, &distance(call, STATIC_CALL));
    put(0x3824, &distance(call + 4, DATA + 0x3830));
}

/// The sections.
pub(super) fn parts(form: Form) -> Vec<Part> {
    let part = |name, at, bytes| Part {
        name,
        at,
        bytes,
        code: false,
    };
    let mut replacements = vec![0x0f, 0xae, 0xe8];
    replacements.extend(branch(0xe8, REPLACEMENTS + 3, TEXT + 0x340));
    replacements.extend(branch(0xe8, REPLACEMENTS + 8, TEXT + 0x3680));
    replacements.extend(PUSHES);
    let table = RODATA + 0x9_1000;
    let mut alternatives = Vec::new();
    let mut alternative =
        |site: u64, from: u64, feature: u16, absent: bool, call: bool, lens: [u8; 2]| {
            let at = table + alternatives.len() as u64;
            alternatives.extend(distance(at, site));
            alternatives.extend(distance(at + 4, from));
            if form == Form::New {
                let flags = u16::from(absent) | u16::from(call) << 1;
                alternatives.extend(feature.to_le_bytes());
                alternatives.extend(flags.to_le_bytes());
            } else {
                alternatives.extend((feature | u16::from(absent) << 15).to_le_bytes());
            }
            alternatives.extend(lens);
        };
    alternative(FENCE, REPLACEMENTS, PRESENT, false, false, [5, 3]);
    alternative(MOVED, REPLACEMENTS + 3, ABSENT, true, false, [5, 5]);
    if form == Form::New {
        alternative(OPERATION, REPLACEMENTS + 8, PRESENT, false, true, [6, 5]);
    }
    let replaced = TEXT + FUNCTIONS + function::REPLACED * FUNCTION + AFTER_CALL;
    alternative(replaced, REPLACEMENTS + 13, NEVER, false, false, [8, 8]);
    let at = |index: u64| RODATA + 0x9_2000 + index * 0x100;
    let mut all = vec![
        Part {
            name: ".altinstr_replacement",
            at: REPLACEMENTS,
            bytes: replacements,
            code: true,
        },
        part(".altinstructions", table, alternatives),
        part(".retpoline_sites", at(0), relative(at(0), 4, &[RETPOLINE])),
        part(".call_sites", at(4), relative(at(4), 4, &[CALL])),
        part(".smp_locks", at(1), relative(at(1), 4, &[LOCK])),
        part(".ibt_endbr_seal", at(2), relative(at(2), 4, &[ENDBR])),
    ];
    if form == Form::New {
        all.push(part(
            "runtime_ptr_made_pointer",
            at(3),
            relative(at(3), 4, &[CONSTANT]),
        ));
    } else {
        let mut site = OPERATION.to_le_bytes().to_vec();
        site.extend([1, 6, 0, 0, 0, 0, 0, 0]);
        all.push(part(".parainstructions", at(3), site));
    }
    all
}
