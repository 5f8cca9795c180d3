//! What the made-up kernel says of livepatches and BPF trampolines.

use super::guest::TinyGuest;
use super::{Basic, Btf};

/// Where in the table of trampolines one is put.
pub(crate) const BUCKET: u64 = 8 * 700;
/// Offsets of the made-up `klp_func` and `bpf_trampoline`.
const STACKED: u64 = 8;
const NOP: u64 = 24;
const ADDRESS: u64 = 24;
const COUNTS: u64 = 32;

/// The types that `kernel/shadow` asks about.
pub(super) fn types(btf: &mut Btf, (int, long, byte, list): Basic) {
    btf.structure(
        "klp_ops",
        32,
        &[("node", list, 0), ("func_stack", list, 16)],
    );
    btf.structure(
        "klp_func",
        32,
        &[
            ("old_func", long, 0),
            ("stack_node", list, 8),
            ("nop", byte, 24),
        ],
    );
    let function = btf.structure("made_func", 16, &[("addr", long, 8)]);
    let counts = btf.array(int, 3);
    btf.structure(
        "bpf_trampoline",
        64,
        &[
            ("hlist", long, 0),
            ("func", function, 16),
            ("progs_cnt", counts, 32),
        ],
    );
    btf.enumeration(
        "bpf_tramp_prog_type",
        &[
            ("BPF_TRAMP_FENTRY", 0),
            ("BPF_TRAMP_FEXIT", 1),
            ("BPF_TRAMP_MODIFY_RETURN", 2),
        ],
    );
}

/// Livepatches functions: for each its versions from the newest on, and whether such a one only leads to the original.
pub(crate) fn livepatch(guest: &mut TinyGuest, functions: &[(u64, &[bool])]) {
    let mut nodes = Vec::new();
    for (function, versions) in functions {
        let ops = guest.object(32);
        let mut stacked = Vec::new();
        for nop in *versions {
            let version = guest.object(32);
            guest.put(version, *function);
            guest.put_bytes(version + NOP, &[u8::from(*nop)]);
            stacked.push(version + STACKED);
        }
        guest.list(ops + 16, &stacked);
        nodes.push(ops);
    }
    let head = guest.at("klp_ops");
    guest.list(head, &nodes);
}

/// Attaches so many programs of each kind to a function.
pub(crate) fn trampoline(guest: &mut TinyGuest, function: u64, programs: [u32; 3]) {
    let at = guest.object(64);
    let table = guest.at("trampoline_table");
    guest.put(table + BUCKET, at);
    guest.put(at + ADDRESS, function);
    for (kind, count) in (0..).zip(programs) {
        guest.put_bytes(at + COUNTS + kind * 4, &count.to_le_bytes());
    }
}
