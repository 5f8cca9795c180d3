//! Where functions have just been entered, told from their code: behind nothing but an `endbr64`, at the function tracer's call or the
//! NOP that the kernel puts there.
//!
//! That is for kernels whose table of such places is not to be had. A place that is found is one; not all are found.

use std::ops::Range;

use super::bytes::le_i32;
use super::symbols::Symbols;
use crate::addr::LinkAddr;

const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// The NOPs that the tracer leaves, as long as its call; the second and third by kernels that chose them by processor (before Linux 5.13).
const NOPS: [[u8; 5]; 3] = [
    [0x0f, 0x1f, 0x44, 0, 0],
    [0x66, 0x66, 0x66, 0x66, 0x90],
    [0x3e, 0x8d, 0x74, 0x26, 0],
];
const CALL: u8 = 0xe8;
/// Bytes of both together.
const HEAD: usize = 9;

/// What the tracer's sites call: in the file, and while a function is traced. Elsewhere they call code made for one tracer, outside the kernel.
const CALLED: [&str; 3] = ["__fentry__", "ftrace_caller", "ftrace_regs_caller"];

/// The first `count` such places in `code`, of which `read` reads the bytes.
pub(crate) fn entered(
    symbols: &Symbols,
    code: &Range<LinkAddr>,
    count: usize,
    read: impl Fn(LinkAddr, &mut [u8; HEAD]) -> bool,
) -> Vec<LinkAddr> {
    let called: Vec<LinkAddr> = CALLED
        .iter()
        .filter_map(|name| symbols.lookup(name).ok())
        .map(|symbol| symbol.address)
        .collect();
    let site = |function: LinkAddr| {
        let mut head = [0; HEAD];
        if !read(function, &mut head) {
            return None;
        }
        let skipped = if head.starts_with(&ENDBR) {
            ENDBR.len()
        } else {
            0
        };
        let at = function.checked_add(skipped as u64)?;
        let first = head.get(skipped..)?;
        if NOPS.iter().any(|nop| first.starts_with(nop)) {
            return Some(at);
        }
        if *first.first()? != CALL {
            return None;
        }
        let to = at.checked_offset(i64::from(le_i32(first, 1)?) + 5)?;
        (called.contains(&to) || !code.contains(&to)).then_some(at)
    };
    let functions = symbols.iter().filter(|symbol| {
        matches!(symbol.kind, b't' | b'T') && !symbol.percpu && code.contains(&symbol.address)
    });
    functions
        .filter_map(|symbol| site(symbol.address))
        .take(count)
        .collect()
}
