//! The made-up kernel's list of BPF code.

use super::guest::TinyGuest;
use super::{Basic, Btf};

/// Offsets of the made-up `bpf_ksym`.
const START: u64 = 0;
const END: u64 = 8;
const NAME: u64 = 16;
const LINK: u64 = 80;
const PROGRAM: u64 = 120;

/// The type that `kernel/bpf` asks about.
pub(super) fn types(btf: &mut Btf, (_, long, byte, list): Basic) {
    let name = btf.array(byte, 64);
    let members = [
        ("start", long, 0),
        ("end", long, 8),
        ("name", name, 16),
        ("lnode", list, 80),
        ("prog", byte, 120),
    ];
    btf.structure("bpf_ksym", 128, &members);
}

impl TinyGuest {
    /// Lists pieces of code: first byte, last but one, name, and whether it is a program. Returns where each is described.
    pub(crate) fn bpf(&mut self, pieces: &[(u64, u64, &str, bool)]) -> Vec<u64> {
        let mut described = Vec::new();
        for (start, end, name, program) in pieces {
            let at = self.object(128);
            self.put(at + START, *start);
            self.put(at + END, *end);
            self.put_bytes(at + NAME, name.as_bytes());
            self.put(at + PROGRAM, (*program).into());
            described.push(at);
        }
        let links: Vec<u64> = described.iter().map(|at| at + LINK).collect();
        self.list(self.at("bpf_kallsyms"), &links);
        described
    }

    /// Makes the piece described at `of` the last but one of a circle that does not come back to the list's head.
    pub(crate) fn bpf_circle(&mut self, of: u64) {
        self.put(of + LINK, of + LINK);
    }
}
