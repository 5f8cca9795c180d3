//! What the kernel makes of its text once, at boot, in the order in which it does.

use std::collections::HashMap;

use super::facts::{Facts, RetpolineForm};
use super::moved::moved;
use super::window::Window;
use super::{Cause, ChangedError};
use crate::addr::{Gva, LinkAddr};
use crate::kernel::alternatives::AlternativeLayout;
use crate::kernel::bytes::le_i32;
use crate::kernel::locate::Kernel;
use crate::kernel::sites::{Entry, SiteKind};
use crate::kernel::symbols::SymbolError;

/// What a `lock` prefix becomes where there is but one CPU: a prefix that means nothing.
pub(super) const NO_LOCK: u8 = 0x3e;
const LOCK: u8 = 0xf0;
const NOP: u8 = 0x90;
const INT3: u8 = 0xcc;
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;
/// A prefix that gives a branch through a thunk a sixth byte.
const CS: u8 = 0x2e;
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// What is written over it (`gen_endbr_poison()`).
const SEALED: [u8; 4] = [0x66, 0x0f, 0x1f, 0x00];

/// Registers by number.
pub(super) const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// A branch with `opcode`, whose distance follows, at `at` to `to`.
pub(super) fn branch(opcode: &[u8], at: Gva, to: Gva) -> Vec<u8> {
    let end = at.0.wrapping_add(opcode.len() as u64 + 4);
    let [a, b, c, d, ..] = to.0.wrapping_sub(end).to_le_bytes();
    let mut bytes = opcode.to_vec();
    bytes.extend([a, b, c, d]);
    bytes
}

/// Where the branch `bytes` at `at` leads, its distance being the last four of them.
fn target(bytes: &[u8], at: LinkAddr) -> Option<LinkAddr> {
    let distance = le_i32(bytes, bytes.len().checked_sub(4)?)?;
    at.checked_add(bytes.len() as u64)?
        .checked_offset(distance.into())
}

/// The thunks of indirect branches, with their registers' numbers.
pub(super) fn thunks(kernel: &Kernel) -> Result<HashMap<LinkAddr, u8>, SymbolError> {
    let mut thunks = HashMap::new();
    for (number, name) in (0..).zip(REGISTERS) {
        let symbol = kernel
            .image()
            .symbols()
            .optional(&format!("__x86_indirect_thunk_{name}"))?;
        thunks.extend(symbol.map(|symbol| (symbol.address, number)));
    }
    Ok(thunks)
}

/// All that is done at boot.
pub(super) fn apply(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    apply_first(facts, window)?;
    alternatives(facts, window)?;
    calls(facts, window);
    seals(facts, window)?;
    locks(facts, window);
    constants(facts, window)
}

/// What is done before alternatives are chosen, also to what they are chosen from.
pub(super) fn apply_first(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    paravirt(facts, window)?;
    for entry in entries(facts, SiteKind::Retpoline, window) {
        let (at, range) = (entry.site.range.start, entry.site.range);
        let Some(old) = window.get(&range).map(<[u8]>::to_vec) else {
            continue;
        };
        let new = retpoline(facts, facts.retpolines, at, &old);
        let new = new.ok_or_else(|| unknown(facts, "indirect branch", at, &old))?;
        if new != old {
            window.put(at, &new, Cause::Retpoline);
            window.loosen(&range, Cause::Retpoline);
        }
    }
    for entry in entries(facts, SiteKind::ReturnThunk, window) {
        let at = entry.site.range.start;
        let mut new = facts.return_at(at);
        let len = usize::try_from(entry.site.range.end.0 - at.0).unwrap_or(new.len());
        new.resize(len.max(new.len()), INT3);
        window.put(at, &new, Cause::ReturnThunk);
    }
    Ok(())
}

fn entries<'a>(facts: &Facts<'a>, kind: SiteKind, window: &Window<'_>) -> Vec<Entry<'a>> {
    let sites = facts.shipped.sites();
    sites.entries(kind, &window.range).collect()
}

fn unknown(facts: &Facts<'_>, what: &'static str, at: LinkAddr, value: &[u8]) -> ChangedError {
    ChangedError::Unknown {
        what,
        at: facts.kernel.runtime(at),
        value: value.to_vec(),
    }
}

fn paravirt(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    let sites = entries(facts, SiteKind::Paravirt, window);
    if sites.is_empty() {
        return Ok(());
    }
    let types = facts.kernel.image().types();
    let field = types.offset_of("paravirt_patch_site", "type")?;
    let field = usize::try_from(field).unwrap_or(usize::MAX);
    let nothing = facts.kernel.symbol("_paravirt_nop")?;
    let none = facts.kernel.symbol("paravirt_BUG")?;
    for entry in sites {
        let range = entry.site.range;
        let slot = entry.bytes.get(field).map(|kind| u64::from(*kind) * 8);
        let slot = slot.and_then(|offset| facts.operations.0.checked_add(offset));
        let operation = slot.and_then(|slot| facts.operation(slot));
        let operation = operation
            .ok_or_else(|| unknown(facts, "paravirtual operation", range.start, entry.bytes))?;
        let at = facts.kernel.runtime(range.start);
        let mut code = match operation {
            Gva(0) => branch(&[CALL], at, none),
            operation if operation == nothing => Vec::new(),
            operation => branch(&[CALL], at, operation),
        };
        let len = usize::try_from(range.end.0 - range.start.0).unwrap_or(0);
        code.resize(len, NOP);
        window.put(range.start, &code, Cause::Paravirt);
        window.loosen(&range, Cause::Paravirt);
    }
    Ok(())
}

/// What the branch `old` at `at`, which goes through a thunk, becomes in `form`; `None` when it is no such branch.
pub(super) fn retpoline(
    facts: &Facts<'_>,
    form: RetpolineForm,
    at: LinkAddr,
    old: &[u8],
) -> Option<Vec<u8>> {
    let register = *facts.thunks.get(&target(old, at)?)?;
    let plain = old.strip_prefix(&[CS]).unwrap_or(old);
    let (condition, call) = match plain {
        [0x0f, condition @ 0x80..=0x8f, ..] => (Some(condition & 0xf), false),
        [CALL, ..] => (None, true),
        [JMP, ..] => (None, false),
        _ => return None,
    };
    let mut new = Vec::new();
    if let Some(condition) = condition {
        // Over what follows, on the opposite condition.
        new.extend([0x70 | condition ^ 1, u8::try_from(old.len() - 2).ok()?]);
    }
    match form {
        RetpolineForm::Thunk => return Some(old.to_vec()),
        RetpolineForm::Counted => {
            let thunk = *facts.counting.as_ref()?.thunks.get(&(call, register))?;
            let opcode = old.get(..old.len() - 4)?;
            return Some(branch(
                opcode,
                facts.kernel.runtime(at),
                facts.kernel.runtime(thunk),
            ));
        }
        RetpolineForm::Fenced => new.extend([0x0f, 0xae, 0xe8]),
        RetpolineForm::Direct => {}
    }
    if register >= 8 {
        new.push(0x41);
    }
    new.extend([0xff, if call { 0xd0 } else { 0xe0 } | register & 7]);
    if new.len() > old.len() {
        return Some(old.to_vec());
    }
    if !call && new.len() < old.len() {
        new.push(INT3);
    }
    new.resize(old.len(), NOP);
    Some(new)
}

fn alternatives(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    let mut sites = entries(facts, SiteKind::Alternative, window);
    if sites.is_empty() {
        return Ok(());
    }
    let layout = AlternativeLayout::of(facts.kernel.image().types())?;
    // Of several for one place, which follow each other, all are as long as the longest.
    for group in sites.chunk_by_mut(|a, b| a.site.range.start == b.site.range.start) {
        let end = group.iter().map(|entry| entry.site.range.end).max();
        for entry in group {
            entry.site.range.end = end.unwrap_or(entry.site.range.end);
        }
    }
    for entry in sites {
        let range = entry.site.range.clone();
        if let Some(code) = chosen(facts, window, &layout, &entry)? {
            window.put(range.start, &code, Cause::Alternative);
        }
        window.loosen(&range, Cause::Alternative);
    }
    Ok(())
}

/// The code that an alternative puts in place, if the processor calls for it.
fn chosen(
    facts: &Facts<'_>,
    window: &Window<'_>,
    layout: &AlternativeLayout,
    entry: &Entry<'_>,
) -> Result<Option<Vec<u8>>, ChangedError> {
    let range = &entry.site.range;
    let unknown = |what| unknown(facts, what, range.start, entry.bytes);
    let alternative = layout.decode(entry.bytes);
    let alternative = alternative.ok_or_else(|| unknown("flag of an alternative"))?;
    let wanted = alternative
        .is_wanted(&facts.features)
        .ok_or_else(|| unknown("feature of an alternative"))?;
    if !wanted {
        return Ok(None);
    }
    let len = range.end.0 - range.start.0;
    let from = entry.relative(layout.replacement as u64);
    let code_len = alternative.replacement_len as u64;
    let source = from.and_then(|from| from.range(code_len));
    let mut code = match source {
        Some(source) if code_len > 0 => {
            let replacements = facts.replacements.as_ref();
            let code = replacements.and_then(|replacements| replacements.get(&source));
            code.and_then(|code| moved(code, source.start, range.start))
                .ok_or_else(|| unknown("code of an alternative"))?
        }
        _ => Vec::new(),
    };
    if alternative.direct_call {
        let Some(old) = window.get(range) else {
            return Ok(None);
        };
        code = direct_call(facts, range.start, old)?;
    }
    let len = usize::try_from(len).unwrap_or(0);
    if code.len() > len {
        return Err(unknown("length of an alternative"));
    }
    code.resize(len, NOP);
    Ok(Some(code))
}

/// The call that stands in for the indirect one `old` through the table of paravirtual operations.
fn direct_call(facts: &Facts<'_>, at: LinkAddr, old: &[u8]) -> Result<Vec<u8>, ChangedError> {
    let unknown = || unknown(facts, "indirect call", at, old);
    let [0xff, 0x15, ..] = old else {
        return Err(unknown());
    };
    let slot = old.get(..6).and_then(|call| target(call, at));
    let operation = slot
        .and_then(|slot| facts.operation(slot))
        .ok_or_else(unknown)?;
    let here = facts.kernel.runtime(at);
    if operation == Gva(0) {
        return Ok(branch(&[CALL], here, facts.kernel.symbol("BUG_func")?));
    }
    if operation == facts.kernel.symbol("nop_func")? {
        return Ok(Vec::new());
    }
    Ok(branch(&[CALL], here, operation))
}

/// Calls that are counted go to where that is done.
fn calls(facts: &Facts<'_>, window: &mut Window<'_>) {
    let Some(counting) = &facts.counting else {
        return;
    };
    for kind in [SiteKind::Call, SiteKind::Alternative] {
        for entry in entries(facts, kind, window) {
            let at = entry.site.range.start;
            let call = at.range(5).and_then(|range| window.get(&range));
            let Some(call @ [CALL, ..]) = call else {
                continue;
            };
            let to = target(call, at).and_then(|to| counting.entry(facts.shipped, to));
            if let Some(to) = to.map(|to| facts.kernel.runtime(to)) {
                let call = branch(&[CALL], facts.kernel.runtime(at), to);
                window.put(at, &call, Cause::CallThunk);
            }
        }
    }
}

fn seals(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    for entry in entries(facts, SiteKind::IbtEndbr, window) {
        let range = entry.site.range;
        if window.get(&range).is_none_or(|old| old != ENDBR) {
            continue;
        }
        match facts.seal {
            Some(SEALED) => window.put(range.start, &SEALED, Cause::IbtEndbr),
            Some(ENDBR) | None => {}
            Some(other) => return Err(unknown(facts, "sealed endbr64", range.start, &other)),
        }
    }
    Ok(())
}

fn locks(facts: &Facts<'_>, window: &mut Window<'_>) {
    if !facts.locks_dropped {
        return;
    }
    for entry in entries(facts, SiteKind::SmpLock, window) {
        if window.get(&entry.site.range) == Some(&[LOCK]) {
            window.put(entry.site.range.start, &[NO_LOCK], Cause::SmpLock);
        }
    }
}

fn constants(facts: &Facts<'_>, window: &mut Window<'_>) -> Result<(), ChangedError> {
    for entry in entries(facts, SiteKind::RuntimeConst, window) {
        let Some(value) = facts.constants.get(entry.table) else {
            return Err(unknown(
                facts,
                "constant",
                entry.site.range.start,
                entry.bytes,
            ));
        };
        let len = usize::try_from(entry.site.range.end.0 - entry.site.range.start.0).unwrap_or(0);
        let value = value.get(..len).unwrap_or_default().to_vec();
        window.put(entry.site.range.start, &value, Cause::RuntimeConst);
    }
    Ok(())
}
