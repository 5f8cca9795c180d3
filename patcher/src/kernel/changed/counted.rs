//! Calls that are counted, as a mitigation of some processors (`retbleed=stuff`): each goes to a few instructions before
//! the function that it calls, where there is room for them.
//!
//! Where calls go now is exact; where the instructions stand is not: once written they stay, whoever called them.
//! Source: kernel `arch/x86/kernel/callthunks.c`.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::ChangedError;
use super::boot::REGISTERS;
use super::moved::moved;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::image::Shipped;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::text::ReturnForm;

const NOP: u8 = 0x90;
/// The counting instructions are few.
const MOST: u64 = 64;
/// Bytes of code that is copied elsewhere at a kexec (`KEXEC_CONTROL_CODE_MAX_SIZE`).
const KEXEC_CODE: u64 = 2048;
/// Functions whose calls are not counted (`skip_addr()`).
const NOT_COUNTED: [&str; 8] = [
    "error_entry",
    "paranoid_entry",
    "xen_error_entry",
    "__switch_to_asm",
    "ret_from_fork",
    "soft_restart_cpu",
    "__fentry__",
    "relocate_kernel",
];

/// How calls are counted.
pub(super) struct Counting {
    /// The instructions that count, as they are at `from`.
    code: Vec<u8>,
    from: LinkAddr,
    /// The text that stays: calls of what is freed after boot are not counted.
    text: Range<LinkAddr>,
    not_counted: HashSet<LinkAddr>,
    kexec: Option<LinkAddr>,
    /// Thunks of indirect branches that count too: by whether they are called, and the register's number.
    pub(super) thunks: HashMap<(bool, u8), LinkAddr>,
}

impl Counting {
    /// How `kernel`, which returns as `returns` says, counts calls; `None` when it does not.
    pub(super) fn of(kernel: &Kernel, returns: ReturnForm) -> Result<Option<Self>, ChangedError> {
        let symbols = kernel.image().symbols();
        let thunk = symbols.optional("call_depth_return_thunk")?;
        let counts = match (thunk, returns) {
            (Some(thunk), ReturnForm::Jump(to)) => kernel.runtime(thunk.address) == to,
            _ => false,
        };
        if !counts {
            return Ok(None);
        }
        let from = symbols.lookup("skl_call_thunk_template")?.address;
        let end = symbols.lookup("skl_call_thunk_tail")?.address;
        let unsound = KernelError::Unsound {
            what: "code that counts calls",
            at: kernel.runtime(from),
            value: end.0,
        };
        let len = end.offset_from(from).filter(|len| (1..=MOST).contains(len));
        let shipped = kernel.image().shipped()?;
        let code = len.and_then(|_| shipped.bytes(from..end));
        let mut code = code.ok_or(unsound)?.to_vec();
        shipped.relocs().apply(from, &mut code, kernel.slide())?;
        let mut thunks = HashMap::new();
        for (number, register) in (0..).zip(REGISTERS) {
            for (called, how) in [(true, "call"), (false, "jump")] {
                let thunk = symbols.optional(&format!("__x86_indirect_{how}_thunk_{register}"))?;
                thunks.extend(thunk.map(|thunk| ((called, number), thunk.address)));
            }
        }
        let mut not_counted = HashSet::new();
        for name in NOT_COUNTED {
            not_counted.extend(symbols.optional(name)?.map(|symbol| symbol.address));
        }
        Ok(Some(Self {
            code,
            from,
            text: super::text(kernel)?,
            not_counted,
            kexec: symbols
                .optional("relocate_kernel")?
                .map(|symbol| symbol.address),
            thunks,
        }))
    }

    /// The counting instructions, as they are at `pad`.
    pub(super) fn code_at(&self, pad: LinkAddr) -> Option<Vec<u8>> {
        moved(&self.code, self.from, pad)
    }

    /// Whether `code` can be the counting instructions somewhere: they begin and end alike everywhere.
    pub(super) fn like(&self, code: &[u8]) -> bool {
        code.first() == self.code.first() && code.last() == self.code.last()
    }

    pub(super) fn len(&self) -> usize {
        self.code.len()
    }

    /// Where a call of the kernel's own function at `to` goes, if it is counted.
    pub(super) fn entry(&self, shipped: &Shipped, to: LinkAddr) -> Option<LinkAddr> {
        let in_kexec = |start: LinkAddr| to.offset_from(start).is_some_and(|at| at < KEXEC_CODE);
        if !self.text.contains(&to)
            || self.not_counted.contains(&to)
            || self.kexec.is_some_and(in_kexec)
        {
            return None;
        }
        let pad = to.checked_sub(self.code.len() as u64)?;
        let room = shipped.text(pad..to)?;
        room.iter().all(|byte| *byte == NOP).then_some(pad)
    }

    /// Where a call of the function at `to`, which may be a module's, goes.
    pub(super) fn entry_of<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        to: Gva,
    ) -> Result<Gva, ChangedError> {
        if let Some(link) = kernel.link(to) {
            return Ok(self
                .entry(kernel.image().shipped()?, link)
                .map_or(to, |pad| kernel.runtime(pad)));
        }
        let pad = Gva(to.0.wrapping_sub(self.code.len() as u64));
        let mut live = vec![0; self.code.len()];
        memory.read(pad, &mut live)?;
        let link = LinkAddr(pad.0.wrapping_sub(kernel.slide()));
        Ok(if self.code_at(link) == Some(live) {
            pad
        } else {
            to
        })
    }
}
