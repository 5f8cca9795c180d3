//! What the kernel switches in its text while it runs: static branches and calls, tracing, kprobes.

use super::boot::branch;
use super::facts::{Facts, Probe};
use super::window::Window;
use super::{Cause, ChangedError};
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::bytes::le_u64;
use crate::kernel::memory::Memory;
use crate::kernel::sites::SiteKind;

/// The NOPs that the kernel puts in, by their length.
const NOP2: [u8; 2] = [0x66, 0x90];
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
/// What stands in for a call of a function that returns zero, in either form.
const ZERO: [[u8; 5]; 2] = [
    [0x2e, 0x2e, 0x2e, 0x31, 0xc0],
    [0x66, 0x66, 0x48, 0x31, 0xc0],
];
const RETURN: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;
const JMP_SHORT: u8 = 0xeb;
const INT3: u8 = 0xcc;
const NOP: u8 = 0x90;
/// Low bits of a key: the branch is taken unless it is switched on; the call is a tail call; its code is freed after boot.
const TAKEN: u64 = 1;
const TAIL: u64 = 1;
const KEY_FLAGS: u64 = 3;

pub(super) fn apply<R: ReadPhys + ?Sized>(
    facts: &Facts<'_>,
    memory: &Memory<'_, R>,
    window: &mut Window<'_>,
) -> Result<(), ChangedError> {
    let switch = Switch { facts, memory };
    switch.counting(window)?;
    switch.branches(window)?;
    switch.calls(window)?;
    switch.trampolines(window)?;
    switch.tracing(window)?;
    switch.probes(window)
}

struct Switch<'a, R: ?Sized> {
    facts: &'a Facts<'a>,
    memory: &'a Memory<'a, R>,
}

impl<R: ReadPhys + ?Sized> Switch<'_, R> {
    fn runtime(&self, at: LinkAddr) -> Gva {
        self.facts.kernel.runtime(at)
    }

    fn live<const N: usize>(&self, at: LinkAddr) -> Result<[u8; N], ChangedError> {
        let mut bytes = [0; N];
        self.memory.read(self.runtime(at), &mut bytes)?;
        Ok(bytes)
    }

    /// The code that counts calls stands wherever it was once called.
    fn counting(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        let Some(counting) = &self.facts.counting else {
            return Ok(());
        };
        let len = window.range.end.0 - window.range.start.0;
        let mut live = vec![0; usize::try_from(len).unwrap_or(0)];
        self.memory
            .read(self.runtime(window.range.start), &mut live)?;
        let codes = (0..).zip(live.windows(counting.len()));
        for (offset, code) in codes.filter(|(_, code)| counting.like(code)) {
            let pad = LinkAddr(window.range.start.0.wrapping_add(offset));
            let room = pad
                .range(counting.len() as u64)
                .and_then(|range| window.get(&range));
            let free = room.is_some_and(|room| room.iter().all(|byte| *byte == NOP));
            if free && counting.code_at(pad).as_deref() == Some(code) {
                window.put(pad, code, Cause::CallThunk);
            }
        }
        Ok(())
    }

    /// Where a call of `function` goes.
    fn entry(&self, function: Gva) -> Result<Gva, ChangedError> {
        match &self.facts.counting {
            Some(counting) => counting.entry_of(self.facts.kernel, self.memory, function),
            None => Ok(function),
        }
    }

    fn branches(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        let image = self.facts.kernel.image();
        let of = |path| image.types().offset_of("jump_entry", path);
        let (target, key) = (of("target")?, of("key")?);
        let enabled = image.types().offset_of("static_key", "enabled")?;
        for entry in self
            .facts
            .shipped
            .sites()
            .entries(SiteKind::JumpLabel, &window.range)
        {
            let range = entry.site.range.clone();
            let field = usize::try_from(key)
                .ok()
                .and_then(|at| le_u64(entry.bytes, at));
            let at = field.map(|distance| entry.at.0.wrapping_add(key).wrapping_add(distance));
            let (Some(at), Some(to)) = (at, entry.relative(target)) else {
                continue;
            };
            let state = LinkAddr((at & !KEY_FLAGS).wrapping_add(enabled));
            let on = self.memory.u32(self.runtime(state))? != 0;
            let len = range.end.0 - range.start.0;
            let bytes = match (on != (at & TAKEN != 0), len) {
                (false, 2) => NOP2.to_vec(),
                (false, _) => NOP5.to_vec(),
                (true, 2) => {
                    let [distance, ..] = to.0.wrapping_sub(range.end.0).to_le_bytes();
                    vec![JMP_SHORT, distance]
                }
                (true, _) => branch(&[JMP], self.runtime(range.start), self.runtime(to)),
            };
            window.put(range.start, &bytes, Cause::JumpLabel);
        }
        Ok(())
    }

    /// The function that a static call's key leads to now.
    fn function(&self, key: LinkAddr) -> Result<Gva, ChangedError> {
        let types = self.facts.kernel.image().types();
        let field = types.offset_of("static_call_key", "func")?;
        Ok(Gva(self
            .memory
            .u64(self.runtime(LinkAddr(key.0.wrapping_add(field))))?))
    }

    /// The code of a static call to `function` at `at`, where `old` is now.
    fn call(
        &self,
        at: LinkAddr,
        function: Gva,
        tail: bool,
        old: &[u8],
    ) -> Result<Vec<u8>, ChangedError> {
        let here = self.runtime(at);
        Ok(match (tail, function, old) {
            // Before its mitigations are decided the kernel writes a plain return, and it does not come back to all of them.
            (true, Gva(0), _) if self.live(at)? == RETURN => RETURN.to_vec(),
            (true, Gva(0), _) => self.facts.return_at(at),
            (true, _, [0x0f, condition @ 0x80..=0x8f, ..]) => {
                branch(&[0x0f, *condition], here, function)
            }
            (true, ..) => branch(&[JMP], here, function),
            (false, Gva(0), _) => NOP5.to_vec(),
            (false, ..) => {
                let called = branch(&[CALL], here, self.entry(function)?);
                let zero = self
                    .facts
                    .kernel
                    .image()
                    .symbols()
                    .optional("__static_call_return0")?;
                let zero = zero.map(|zero| self.runtime(zero.address));
                let live: [u8; 5] = self.live(at)?;
                // Once calls are counted the kernel no longer sees that it is that function.
                if zero != Some(function) || self.facts.counting.is_some() && live == *called {
                    called
                } else {
                    let form = ZERO.into_iter().find(|form| *form == live);
                    form.unwrap_or(ZERO[0]).to_vec()
                }
            }
        })
    }

    fn calls(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        let image = self.facts.kernel.image();
        let field = image.types().offset_of("static_call_site", "key")?;
        for entry in self
            .facts
            .shipped
            .sites()
            .entries(SiteKind::StaticCall, &window.range)
        {
            let at = entry.site.range.start;
            let (Some(key), Some(site)) = (entry.relative(field), at.range(6)) else {
                continue;
            };
            let tail = key.0 & TAIL != 0;
            let Some(old) = window.get(&site).map(<[u8]>::to_vec) else {
                continue;
            };
            let function = self.function(LinkAddr(key.0 & !KEY_FLAGS))?;
            window.put(at, &self.call(at, function, tail, &old)?, Cause::StaticCall);
        }
        Ok(())
    }

    /// A trampoline is left as it was linked until its call is first changed.
    fn trampolines(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        for (at, keys) in &self.facts.trampolines {
            let Some(old) = at
                .range(5)
                .and_then(|range| window.get(&range))
                .map(<[u8]>::to_vec)
            else {
                continue;
            };
            let live: [u8; 5] = self.live(*at)?;
            let mut wanted = None;
            for key in keys {
                let function = self.function(*key)?;
                let code = self.call(*at, function, true, &old)?;
                let untouched = self.linked(*key)? == function && live == *old;
                if untouched || live == *code {
                    wanted = Some(if untouched { old.clone() } else { code });
                    break;
                }
                wanted.get_or_insert(code);
            }
            if let Some(code) = wanted {
                window.put(*at, &code, Cause::StaticCall);
            }
        }
        Ok(())
    }

    /// The function that a static call's key was linked with.
    fn linked(&self, key: LinkAddr) -> Result<Gva, ChangedError> {
        let image = self.facts.kernel.image();
        let field = image.types().offset_of("static_call_key", "func")?;
        let at = LinkAddr(key.0.wrapping_add(field));
        let mut bytes = at
            .range(8)
            .and_then(|range| self.facts.shipped.bytes(range))
            .unwrap_or_default()
            .to_vec();
        self.facts
            .shipped
            .relocs()
            .apply(at, &mut bytes, self.facts.kernel.slide())?;
        Ok(Gva(le_u64(&bytes, 0).unwrap_or(0)))
    }

    fn tracing(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        let image = self.facts.kernel.image();
        for entry in self
            .facts
            .shipped
            .sites()
            .entries(SiteKind::Fentry, &window.range)
        {
            let at = entry.site.range.start;
            let Some(direct) = self.facts.traced.get(&at) else {
                window.put(at, &NOP5, Cause::Fentry);
                continue;
            };
            let live: [u8; 5] = self.live(at)?;
            match called(self.runtime(at), &live) {
                Some(to) if *direct && self.facts.bpf.contains(&to) => {
                    window.put(at, &live, Cause::Bpf);
                }
                Some(to) if *direct || self.is_tracer(to) => window.put(at, &live, Cause::Fentry),
                _ => window.put(at, &NOP5, Cause::Fentry),
            }
        }
        // The tracer's own code calls whatever traces now.
        let Some(current) = image.symbols().optional("ftrace_trace_function")? else {
            return Ok(());
        };
        let current = Gva(self.memory.u64(self.runtime(current.address))?);
        for name in ["ftrace_call", "ftrace_regs_call"] {
            if let Some(site) = image.symbols().optional(name)? {
                let mut code = branch(&[CALL], self.runtime(site.address), current);
                let counted = branch(&[CALL], self.runtime(site.address), self.entry(current)?);
                if self.live::<5>(site.address)? == *counted {
                    code = counted;
                }
                window.put(site.address, &code, Cause::Tracer);
            }
        }
        Ok(())
    }

    /// Whether a site of the function tracer may call `to`.
    fn is_tracer(&self, to: Gva) -> bool {
        let own = self.facts.kernel.symbol_at(to);
        self.facts.tracers.iter().any(|range| range.start == to)
            || own.is_some_and(|(symbol, offset)| {
                offset == 0
                    && ["ftrace_caller", "ftrace_regs_caller"].contains(&symbol.name.as_str())
            })
    }

    fn probes(&self, window: &mut Window<'_>) -> Result<(), ChangedError> {
        for probe in &self.facts.probes {
            match probe {
                Probe::Breakpoint(at) => window.put(*at, &[INT3], Cause::Kprobe),
                Probe::Jump(at, to) => {
                    let code = branch(&[JMP], self.runtime(*at), *to);
                    window.put(*at, &code, Cause::Kprobe);
                }
            }
        }
        Ok(())
    }
}

/// Where the call `bytes` at `at` leads.
fn called(at: Gva, bytes: &[u8; 5]) -> Option<Gva> {
    let [CALL, a, b, c, d] = *bytes else {
        return None;
    };
    at.checked_add(5)?
        .checked_offset(i32::from_le_bytes([a, b, c, d]).into())
}
