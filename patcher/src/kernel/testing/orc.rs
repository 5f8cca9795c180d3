//! The unwind table of the made-up kernel, and the code that it is for: each way of finding a caller has a function of its own.

use super::{Basic, Btf, Form, RODATA, TEXT, relative};

/// Where the table's addresses and its entries are linked.
pub(crate) const IPS: u64 = RODATA + 0x8_2000;
pub(crate) const ENTRIES: u64 = RODATA + 0x8_4000;

/// What an entry of the table says.
#[derive(Clone, Copy)]
pub(crate) enum Rule {
    Undefined,
    End,
    /// Register and offset for the caller's stack pointer, register and offset for its frame pointer.
    Call((u16, i16), (u16, i16)),
    /// As a call whose caller goes on where it was interrupted.
    Signal((u16, i16)),
    Registers((u16, i16)),
    ProcessorFrame((u16, i16)),
    /// Numbers that mean nothing.
    Unknown,
}

use Rule::{Call, End, ProcessorFrame, Registers, Signal, Undefined, Unknown};

const KEPT: (u16, i16) = (0, 0);
const SAVED: (u16, i16) = (1, -16);

/// Offset of the first of the functions named `filler_...`, each of [`FUNCTION`] bytes.
pub(crate) const FUNCTIONS: u64 = 0x1000;
pub(crate) const FUNCTION: u64 = 16;
/// Where a function goes on after its call.
pub(crate) const AFTER_CALL: u64 = 8;

/// The functions whose callers are found in a particular way, by their number.
pub(crate) mod function {
    pub(crate) const PLAIN: u64 = 0;
    pub(crate) const PUSHES_BP: u64 = 1;
    pub(crate) const FRAME_POINTER: u64 = 2;
    pub(crate) const OVER_ANOTHER_STACK: u64 = 3;
    pub(crate) const REALIGNED: u64 = 4;
    pub(crate) const BY_R10: u64 = 5;
    pub(crate) const BY_R13: u64 = 6;
    pub(crate) const FIRST: u64 = 7;
    pub(crate) const SILENT: u64 = 8;
    pub(crate) const STANDS_STILL: u64 = 9;
    pub(crate) const INTERRUPTS: u64 = 10;
    pub(crate) const UNKNOWN: u64 = 11;
    pub(crate) const BP_FROM_BP: u64 = 12;
    /// This and all that follow are plain.
    pub(crate) const OTHERS: u64 = 13;
    /// What comes after its call may be replaced by code that pushes.
    pub(crate) const REPLACED: u64 = 40;
}

/// Places in the entry code, as offsets.
pub(crate) const BEFORE_KERNEL: u64 = 0x90;
pub(crate) const PROCESSOR_FRAME: u64 = 0x104;
pub(crate) const SAVED_REGISTERS: u64 = 0x118;
pub(crate) const FRAME_BY_DX: u64 = 0x144;
/// Where a new task begins.
pub(crate) const FORKED: u64 = 0x240;
/// A thunk, of which the table says nothing.
pub(crate) const THUNK: u64 = 0x3640;
/// In the tracers' code.
pub(crate) const GRAPH: u64 = 0x500;
pub(crate) const PROBE: u64 = 0x540;
pub(crate) const TRACER: u64 = 0x3620;

/// Offset of each stretch of code from `TEXT`, and what is said of it.
const RULES: [(u64, Rule); 32] = [
    (0, Undefined),
    (0x80, End),
    (0x100, ProcessorFrame((5, 0))),
    (0x110, Registers((5, 0))),
    (0x140, ProcessorFrame((2, 0))),
    (0x180, End),
    (0x200, Undefined),
    (FORKED, End),
    (0x260, Undefined),
    (0x300, Call((5, 8), KEPT)),
    (0x306, Call((5, 16), SAVED)),
    (0x340, Undefined),
    (0x440, Call((5, 8), KEPT)),
    (0x480, Undefined),
    (GRAPH, End),
    (PROBE, Call((5, 8), KEPT)),
    (0x560, Undefined),
    (0x5c0, Call((5, 32), KEPT)),
    // Of two entries for one place the later counts.
    (0x600, End),
    (0x600, Undefined),
    (FUNCTIONS, Call((5, 8), KEPT)),
    (FUNCTIONS + 0x10, Call((5, 16), SAVED)),
    (FUNCTIONS + 0x20, Call((4, 16), SAVED)),
    (FUNCTIONS + 0x30, Call((9, 8), KEPT)),
    (FUNCTIONS + 0x40, Call((8, -8), KEPT)),
    (FUNCTIONS + 0x50, Call((6, 0), KEPT)),
    (FUNCTIONS + 0x60, Call((7, 0), KEPT)),
    (FUNCTIONS + 0x70, End),
    (FUNCTIONS + 0x80, Undefined),
    (FUNCTIONS + 0x90, Call((5, 0), KEPT)),
    (FUNCTIONS + 0xa0, Signal((5, 8))),
    (FUNCTIONS + 0xb0, Unknown),
];
/// What follows: in a table of its own, because arrays have one length.
const MORE: [(u64, Rule); 4] = [
    (FUNCTIONS + 0xc0, Call((5, 24), (4, 0))),
    (FUNCTIONS + 0xd0, Call((5, 8), KEPT)),
    (TRACER, Call((5, 24), KEPT)),
    (TRACER + 0x10, Undefined),
];

/// How many there are.
pub(crate) const COUNT: u64 = (RULES.len() + MORE.len()) as u64;

/// All of them, in the order of their addresses.
pub(crate) fn rules() -> impl Iterator<Item = (u64, Rule)> {
    RULES.into_iter().chain(MORE)
}

/// Offsets of the calls in the made-up text.
pub(crate) fn calls() -> impl Iterator<Item = usize> {
    let functions = (0..600).map(|index| FUNCTIONS + index * FUNCTION + AFTER_CALL - 5);
    let entries = [PROCESSOR_FRAME, SAVED_REGISTERS, FRAME_BY_DX];
    let all = functions.chain(entries.map(|after| after - 5));
    all.map(|at| usize::try_from(at).unwrap())
}

pub(crate) fn ips() -> Vec<u8> {
    let at: Vec<u64> = rules().map(|(at, _)| TEXT + at).collect();
    relative(IPS, 4, &at)
}

pub(crate) fn entries(form: Form) -> Vec<u8> {
    rules().flat_map(|(_, rule)| entry(form, rule)).collect()
}

/// One entry: before Linux 6.3 the end of the stack is a bit, from then on a kind.
pub(crate) fn entry(form: Form, rule: Rule) -> [u8; 6] {
    let new = form == Form::New;
    let (sp, bp, kind, bit) = match rule {
        Undefined => (KEPT, KEPT, 0, false),
        End => (KEPT, KEPT, u16::from(new), !new),
        Call(sp, bp) => (sp, bp, if new { 2 } else { 0 }, false),
        Signal(sp) => (sp, KEPT, if new { 2 } else { 0 }, new),
        Registers(sp) => (sp, KEPT, if new { 3 } else { 1 }, new),
        ProcessorFrame(sp) => (sp, KEPT, if new { 4 } else { 2 }, new),
        Unknown => ((12, 8), KEPT, 2, false),
    };
    // Before: two bits of kind, then the end. After: three bits of kind, then the signal.
    let last = if new { 11 } else { 10 };
    let word = sp.0 | bp.0 << 4 | kind << 8 | u16::from(bit) << last;
    let mut entry = [0; 6];
    entry[..2].copy_from_slice(&sp.1.to_le_bytes());
    entry[2..4].copy_from_slice(&bp.1.to_le_bytes());
    entry[4..].copy_from_slice(&word.to_le_bytes());
    entry
}

/// A structure whose members may be bit fields: name, type, bits (zero for none), first bit.
fn bits(btf: &mut Btf, name: &str, size: u32, members: &[(&str, u32, u32, u32)]) {
    const BIT_FIELDS: u32 = 0x80;
    let mut extra = Vec::new();
    for (member, kind, bits, first) in members {
        extra.extend([btf.string(member), *kind, bits << 24 | first]);
    }
    btf.add(name, 4 | BIT_FIELDS, members.len(), size, &extra);
}

/// The types that unwinding asks about.
pub(crate) fn types(btf: &mut Btf, form: Form, basic: Basic) {
    let (int, long, ..) = basic;
    let short = btf.int(2);
    let mut members = vec![
        ("sp_offset", short, 0, 0),
        ("bp_offset", short, 0, 16),
        ("sp_reg", int, 4, 32),
        ("bp_reg", int, 4, 36),
    ];
    match form {
        Form::New => members.extend([("type", int, 3, 40), ("signal", int, 1, 43)]),
        _ => members.extend([("type", int, 2, 40), ("end", int, 1, 42)]),
    }
    bits(btf, "orc_entry", 6, &members);
    let registers = ["r13", "bp", "r10", "ax", "dx", "di", "ip", "cs", "sp", "ss"];
    let offsets = [16, 32, 56, 80, 96, 112, 128, 136, 152, 160];
    let registers: Vec<_> = registers
        .into_iter()
        .zip(offsets)
        .map(|(name, offset)| (name, long, offset))
        .collect();
    btf.structure("pt_regs", 168, &registers);
    btf.structure(
        "inactive_task_frame",
        56,
        &[("bp", long, 40), ("ret_addr", long, 48)],
    );
}

/// Offsets into the made-up `struct module`: of its link, of the pointer to its code and the size, of its unwind table.
pub(crate) mod module {
    pub(crate) const LIST: u64 = 8;
    pub(crate) const BASE: u64 = 160;
    pub(crate) const COUNT: u64 = 0x1c0;
    pub(crate) const IPS: u64 = 0x1c8;
    pub(crate) const ENTRIES: u64 = 0x1d0;

    use super::Form;

    pub(crate) fn size(form: Form) -> u64 {
        BASE + if form == Form::New { 8 } else { 12 }
    }
}
