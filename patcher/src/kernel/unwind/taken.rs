//! Return addresses that the guest's tracers took from a stack and keep elsewhere, and code of theirs that is a copy of the kernel's.
//!
//! A return address is given back by where on the stack it was: both tracers remember that. An answer that is not unique is none.
//! Sources: kernel `kernel/trace/{fgraph,rethook}.c`, `arch/x86/kernel/{ftrace.c,ftrace_64.S,rethook.c}`,
//! `arch/x86/kernel/kprobes/core.c`.

use super::layout::{TakenByGraph, TakenByProbe, UnwindLayout};
use super::reason::Reason;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::bytes::le_u64;
use crate::kernel::gather::{Bound, Gather};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::tasks::Hidden;
use crate::x86::depth::pushed;

/// More return addresses than any tracer keeps of one task, in bytes.
const MAX_GRAPH: u64 = 1 << 16;
/// More probes than return through one task at a time.
const MAX_PROBES: usize = 4096;
/// More tracers than any guest runs.
const MAX_TRACERS: usize = 4096;
/// A replaced address may have replaced another one; so many deep at most.
const MAX_DEPTH: usize = 4;
/// `FTRACE_OPS_FL_SAVE_REGS`.
const SAVE_REGISTERS: u64 = 1 << 2;

/// What a tracer keeps of one place on a stack.
#[derive(Default)]
struct Kept {
    /// A return address.
    real: Option<Gva>,
    /// What another tracer had put there before.
    other: Option<Gva>,
    /// There are two return addresses.
    differ: bool,
}

/// What the guest's tracers know.
pub(crate) struct Taken<'a, R: ?Sized> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) memory: &'a Memory<'a, R>,
    pub(crate) layout: &'a UnwindLayout,
}

impl<R: ReadPhys + ?Sized> Taken<'_, R> {
    /// The return address that was at `slot` before a tracer put `value` there; `value` itself where none did.
    pub(crate) fn given_back<'t>(
        &self,
        owners: &(impl Iterator<Item = &'t Hidden> + Clone),
        mut value: Gva,
        slot: Gva,
    ) -> Result<Gva, Reason> {
        let is = |handler: LinkAddr, value| self.kernel.runtime(handler) == value;
        for _ in 0..MAX_DEPTH {
            let (found, tracer) = match (&self.layout.graph, &self.layout.probe) {
                (Some(graph), _) if is(graph.handler, value) => (
                    self.each(owners.clone(), |task| self.by_graph(graph, task, slot))?,
                    "the function graph tracer",
                ),
                (_, Some(probe)) if is(probe.handler, value) => (
                    self.each(owners.clone(), |task| self.by_probe(probe, task, slot))?,
                    "a return probe",
                ),
                _ => return Ok(value),
            };
            value = found.ok_or(Reason::Taken { tracer, slot })?;
        }
        Err(Reason::Taken {
            tracer: "several tracers",
            slot,
        })
    }

    /// Whether the function graph tracer is, at `at`, between a function and where it should have returned to: its table calls that the end of
    /// the stack, which it is not.
    pub(crate) fn is_returning(&self, at: Gva) -> bool {
        self.layout.graph.as_ref().is_some_and(|graph| {
            at.0.wrapping_sub(self.kernel.runtime(graph.handler).0) < graph.handler_len
        })
    }

    /// Where the function returned to that the tracer handles the return of, at `at` with the stack pointer `sp`: the place on the stack that
    /// the return address was at, and the address.
    pub(crate) fn returning_to<'t>(
        &self,
        owners: &(impl Iterator<Item = &'t Hidden> + Clone),
        at: Gva,
        sp: Gva,
    ) -> Result<(Gva, Gva), Reason> {
        let unknown = || Reason::Taken {
            tracer: "the function graph tracer",
            slot: sp,
        };
        let graph = self.layout.graph.as_ref().ok_or_else(unknown)?;
        let code = self.handler_to(graph, at)?.ok_or_else(unknown)?;
        let pushed = pushed(&code).ok_or_else(unknown)?;
        // The function's return had taken its address from the stack when this code began.
        let slot = Gva(sp.0.wrapping_add_signed(pushed).wrapping_sub(8));
        let real = self.given_back(owners, self.kernel.runtime(graph.handler), slot)?;
        Ok((slot, real))
    }

    /// The code of the tracer's handler before `at`: the image's, or where that is not known the guest's.
    fn handler_to(&self, graph: &TakenByGraph, at: Gva) -> Result<Option<Vec<u8>>, Reason> {
        let Some(end) = self.kernel.link(at) else {
            return Ok(None);
        };
        if let Ok(shipped) = self.kernel.image().shipped() {
            let code = shipped.text(graph.handler..end);
            return Ok(code.map(<[u8]>::to_vec));
        }
        let len = end.offset_from(graph.handler);
        let len = len.filter(|len| *len < graph.handler_len);
        let Some(len) = len.and_then(|len| usize::try_from(len).ok()) else {
            return Ok(None);
        };
        let mut code = vec![0; len];
        let start = self.kernel.runtime(graph.handler);
        let read = self.memory.read(start, &mut code);
        read.map_err(Reason::unreadable)?;
        Ok(Some(code))
    }

    /// The one answer that any of the tasks has.
    fn each<'t>(
        &self,
        owners: impl Iterator<Item = &'t Hidden>,
        ask: impl Fn(&Hidden) -> Result<Option<Gva>, KernelError>,
    ) -> Result<Option<Gva>, Reason> {
        for task in owners {
            if let Some(found) = ask(task).map_err(Reason::unreadable)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// What the function graph tracer keeps of `slot`.
    fn by_graph(
        &self,
        graph: &TakenByGraph,
        task: &Hidden,
        slot: Gva,
    ) -> Result<Option<Gva>, KernelError> {
        let (start, len) = task.graph;
        if start == 0 || len == 0 {
            return Ok(None);
        }
        let at = Gva(start);
        if len > MAX_GRAPH {
            return Err(KernelError::Unsound {
                what: "stack of traced returns",
                at,
                value: len,
            });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.memory.read(at, &mut bytes)?;
        // Later kernels put words of other tracers between the entries: the place on the stack tells which words are one.
        let step = self
            .kernel
            .layout()
            .task
            .graph
            .as_ref()
            .map_or(8, |graph| graph.unit.max(8));
        let mut kept = Kept::default();
        for entry in (0..len).step_by(usize::try_from(step).unwrap_or(8)) {
            let word =
                |offset: u64| le_u64(&bytes, usize::try_from(entry.checked_add(offset)?).ok()?);
            let whole = entry.saturating_add(graph.size) <= len;
            if whole && word(graph.slot) == Some(slot.0) {
                self.keep(&mut kept, Gva(word(graph.ret).unwrap_or(0)), graph.handler);
            }
        }
        if kept.differ {
            return Err(KernelError::Unsound {
                what: "stack of traced returns",
                at,
                value: slot.0,
            });
        }
        Ok(kept.real.or(kept.other))
    }

    /// Notes that a tracer with this handler keeps `ret`. Where one traced function jumps to another, both return through one place, and the
    /// second tracing finds there what the first has put: of all that are kept, the one that no tracer put there is the caller's.
    fn keep(&self, kept: &mut Kept, ret: Gva, own: LinkAddr) {
        let graph = self.layout.graph.as_ref().map(|graph| graph.handler);
        let probe = self.layout.probe.as_ref().map(|probe| probe.handler);
        let mut handlers = [graph, probe].into_iter().flatten();
        if ret == self.kernel.runtime(own) {
            return;
        }
        if handlers.any(|handler| ret == self.kernel.runtime(handler)) {
            kept.other = Some(ret);
            return;
        }
        kept.differ |= kept.real.is_some_and(|real| real != ret);
        kept.real = Some(ret);
    }

    /// What return probes keep of `slot`.
    fn by_probe(
        &self,
        probe: &TakenByProbe,
        task: &Hidden,
        slot: Gva,
    ) -> Result<Option<Gva>, KernelError> {
        let gather = Gather::new(&[(probe.link, 8), (probe.ret, 8), (probe.slot, 8)]);
        let mut fields = gather.fields();
        let mut bound = Bound::new("list of return probes", MAX_PROBES);
        let mut kept = Kept::default();
        let mut node = task.rethook;
        while node != 0 {
            bound.step(node)?;
            fields.read(self.memory, Gva(node.wrapping_sub(probe.link)))?;
            if fields.u64(probe.slot) == slot.0 {
                self.keep(&mut kept, Gva(fields.u64(probe.ret)), probe.handler);
            }
            node = fields.u64(probe.link);
        }
        if kept.differ {
            return Err(KernelError::Unsound {
                what: "list of return probes",
                at: Gva(task.rethook),
                value: slot.0,
            });
        }
        Ok(kept.real.or(kept.other))
    }

    /// The code of the image that the code at `at`, outside it, is a copy of: as far as its stack goes they are one.
    pub(crate) fn copied_from(&self, at: Gva) -> Result<Option<LinkAddr>, KernelError> {
        match self.trampoline(at)? {
            Some(copied) => Ok(Some(copied)),
            None => self.probed(at),
        }
    }

    /// In a tracer's trampoline.
    fn trampoline(&self, at: Gva) -> Result<Option<LinkAddr>, KernelError> {
        let Some(layout) = &self.layout.ftrace else {
            return Ok(None);
        };
        let gather = Gather::new(&[
            (layout.next, 8),
            (layout.flags, 8),
            (layout.trampoline, 8),
            (layout.size, 8),
        ]);
        let mut fields = gather.fields();
        let mut bound = Bound::new("list of tracers", MAX_TRACERS);
        let end = self.kernel.runtime(layout.list_end).0;
        let mut ops = self.memory.u64(self.kernel.runtime(layout.list))?;
        while ops != end && ops != 0 {
            bound.step(ops)?;
            fields.read(self.memory, Gva(ops))?;
            let start = fields.u64(layout.trampoline);
            let offset = at.0.wrapping_sub(start);
            if start != 0 && offset < fields.u64(layout.size) {
                let saves = fields.u64(layout.flags) & SAVE_REGISTERS != 0;
                let copied = if saves {
                    &layout.with_registers
                } else {
                    &layout.without
                };
                let from = copied.start.checked_add(offset);
                return Ok(from.filter(|from| copied.contains(from)));
            }
            ops = fields.u64(layout.next);
        }
        Ok(None)
    }

    /// At or just behind the copy of an instruction that a kprobe executes out of line.
    fn probed(&self, at: Gva) -> Result<Option<LinkAddr>, KernelError> {
        let Some(layout) = &self.layout.kprobe else {
            return Ok(None);
        };
        let gather = Gather::new(&[(layout.address, 8), (layout.copy, 8), (layout.len, 1)]);
        let mut fields = gather.fields();
        for (_, probe) in self.kernel.kprobes(self.memory.guest())? {
            fields.read(self.memory, probe)?;
            let [len] = fields.array(layout.len);
            let offset = at.0.wrapping_sub(fields.u64(layout.copy));
            if offset == 0 || offset == u64::from(len) {
                let original = Gva(fields.u64(layout.address).wrapping_add(offset));
                return Ok(self.kernel.link(original));
            }
        }
        Ok(None)
    }
}
