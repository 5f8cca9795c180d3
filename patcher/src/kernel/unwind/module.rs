//! How to unwind in a loaded module: its unwind table, looked up where the guest has it.
//!
//! Only what a stack leads into is read: a lookup costs a walk through the list of modules and as many words as halving takes. The kernel sorts
//! a module's table when it loads it (`arch/x86/kernel/unwind_orc.c`, `unwind_module_init()`); one that is not sorted gives
//! a wrong rule, which the checks of each frame then have to survive. Source: kernel `include/linux/module.h`.

use std::ops::Range;

use super::layout::ModuleLayout;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::gather::{Bound, Gather};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::orc::{Orc, OrcTable};

/// More modules than any guest loads.
const MAX_MODULES: usize = 1 << 14;
/// More entries than the table of any module has.
const MAX_ENTRIES: u32 = 1 << 22;
const SLOT: u64 = 4;

/// The table of one module.
struct Table {
    ips: Gva,
    entries: Gva,
    count: u32,
}

/// What the table of the module says that `at` is in; `None` where no module is, or it has no table. Its entries are laid out
/// as in `like`.
pub(crate) fn rule<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    layout: &ModuleLayout,
    like: &OrcTable,
    at: Gva,
) -> Result<Option<Orc>, KernelError> {
    let Some(table) = find(kernel, memory, layout, at)? else {
        return Ok(None);
    };
    let slot = |index: u32| Gva(table.ips.0.wrapping_add(SLOT * u64::from(index)));
    let (mut low, mut high) = (0, table.count);
    while low < high {
        let middle = u32::midpoint(low, high);
        let slot = slot(middle);
        let distance = memory.u32(slot)?.cast_signed();
        if slot.0.wrapping_add_signed(distance.into()) <= at.0 {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let Some(index) = low.checked_sub(1) else {
        return Ok(None);
    };
    let mut entry = [0; 8];
    let size = like.entry_size();
    let offset = u64::from(index) * size as u64;
    let part = entry.get_mut(..size).unwrap_or_default();
    memory.read(Gva(table.entries.0.wrapping_add(offset)), part)?;
    Ok(Some(like.decode(entry)))
}

/// The table of the module in whose code `at` is.
fn find<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    layout: &ModuleLayout,
    at: Gva,
) -> Result<Option<Table>, KernelError> {
    let mut wanted = vec![
        (layout.list, 8),
        (layout.count, 4),
        (layout.ips, 8),
        (layout.entries, 8),
    ];
    for Range { start, end } in layout.text.iter() {
        wanted.extend([(*start, 8), (*end, 4)]);
    }
    let gather = Gather::new(&wanted);
    let mut fields = gather.fields();
    let mut bound = Bound::new("list of modules", MAX_MODULES);
    let head = kernel.runtime(layout.head).0;
    let mut node = memory.u64(Gva(head))?;
    while node != head {
        bound.step(node)?;
        let module = Gva(node.wrapping_sub(layout.list));
        fields.read(memory, module)?;
        let holds = |text: &Range<u64>| {
            at.0.wrapping_sub(fields.u64(text.start)) < u64::from(fields.u32(text.end))
        };
        if layout.text.iter().any(holds) {
            let count = fields.u32(layout.count);
            if count > MAX_ENTRIES {
                return Err(KernelError::Unsound {
                    what: "module's unwind table",
                    at: module,
                    value: count.into(),
                });
            }
            let (ips, entries) = (Gva(fields.u64(layout.ips)), Gva(fields.u64(layout.entries)));
            return Ok((count > 0).then_some(Table {
                ips,
                entries,
                count,
            }));
        }
        node = fields.u64(layout.list);
    }
    Ok(None)
}
