//! The kernel's mapped areas, as far as they are stacks.
//!
//! An area that is as large as a stack and was allocated page by page is taken for one, whoever allocated it: too many
//! stacks are harmless, too few are not. Left out are only those that provably hold no live frame: kept for
//! reuse, or waiting to be freed. Sources: kernel `mm/vmalloc.c`, `kernel/fork.c` (`alloc_thread_stack_node()`,
//! `thread_stack_delayed_free()`), `include/linux/vmalloc.h`.

use std::collections::HashSet;
use std::ops::Range;

use super::ahead::Ahead;
use super::gather::{Bound, Gather};
use super::layout::{VmapLayout, VmapLists};
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::tasks::Cpu;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// `VM_ALLOC`: the area was allocated page by page, as opposed to one that maps a device.
const VM_ALLOC: u64 = 2;
/// Behind each area lies an unmapped page.
const GUARD: u64 = 4096;
/// More areas than any guest that is still worth updating has.
const MAX_AREAS: usize = 1 << 18;
/// `nr_vmap_nodes` is at most this on the largest machines.
const MAX_NODES: u32 = 1024;

/// One mapped area of a stack's size.
pub(crate) struct Area {
    pub(crate) start: Gva,
    /// Its description.
    pub(crate) at: Gva,
    vm: u64,
}

/// The stacks in `areas`, which are no task's, but not those that hold no live frame.
pub(crate) fn unowned_stacks<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    areas: &[Area],
    cpus: &[Cpu],
) -> Result<Vec<Range<Gva>>, KernelError> {
    let layout = &kernel.layout().vmap;
    let size = kernel.layout().stack_size;
    let mut cached: Option<HashSet<u64>> = None;
    let mut unowned = Vec::new();
    for area in areas {
        if area.vm == 0 || memory.u64(Gva(area.vm.wrapping_add(layout.flags)))? & VM_ALLOC == 0 {
            continue;
        }
        if cached.is_none() {
            cached = Some(cached_stacks(kernel, memory, cpus)?);
        }
        // A stack is mapped before anyone is on it and unmapped after, from its lowest page up.
        let [lowest, highest] =
            [0, size.saturating_sub(8)].map(|offset| Gva(area.start.0.wrapping_add(offset)));
        if !memory.is_mapped(lowest)? || !memory.is_mapped(highest)? {
            continue;
        }
        let kept = cached
            .as_ref()
            .is_some_and(|cached| cached.contains(&area.vm));
        if !kept && !waits_to_be_freed(kernel, memory, area)? {
            let unsound = KernelError::Unsound {
                what: "mapped area",
                at: area.start,
                value: size,
            };
            unowned.push(area.start.range(size).ok_or(unsound)?);
        }
    }
    Ok(unowned)
}

/// All mapped areas of a stack's size and a guard page. Descriptions were found in this `order` before.
pub(crate) fn areas<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    order: &[Gva],
) -> Result<Vec<Area>, KernelError> {
    let layout = &kernel.layout().vmap;
    let size = kernel.layout().stack_size;
    let gather = Gather::new(&[
        (layout.start, 8),
        (layout.end, 8),
        (layout.list, 8),
        (layout.vm, 8),
    ]);
    let mut ahead = Ahead::new(&gather, order);
    let mut bound = Bound::new("list of mapped areas", MAX_AREAS);
    let mut found = Vec::new();
    let mut list = |head: Gva| {
        walk(
            layout,
            memory,
            head,
            size,
            &mut (&mut ahead, &mut bound, &mut found),
        )
    };
    match &layout.lists {
        VmapLists::One(head) => list(kernel.runtime(*head))?,
        VmapLists::Nodes {
            nodes,
            count,
            size,
            head,
        } => {
            let count_at = kernel.runtime(*count);
            let count = memory.u32(count_at)?;
            if count > MAX_NODES {
                return Err(KernelError::Unsound {
                    what: "number of vmap nodes",
                    at: count_at,
                    value: count.into(),
                });
            }
            let first = memory.u64(kernel.runtime(*nodes))?;
            for index in 0..u64::from(count) {
                list(Gva(first
                    .wrapping_add(index.wrapping_mul(*size))
                    .wrapping_add(*head)))?;
            }
        }
    }
    Ok(found)
}

fn walk<R: ReadPhys + ?Sized>(
    layout: &VmapLayout,
    memory: &Memory<'_, R>,
    head: Gva,
    size: u64,
    (ahead, bound, found): &mut (&mut Ahead<'_>, &mut Bound, &mut Vec<Area>),
) -> Result<(), KernelError> {
    let mut node = memory.u64(head)?;
    while node != head.0 {
        bound.step(node)?;
        let at = Gva(node.wrapping_sub(layout.list));
        let fields = ahead.read(memory, at)?;
        let (start, end) = (fields.u64(layout.start), fields.u64(layout.end));
        if end.checked_sub(start) == size.checked_add(GUARD) {
            found.push(Area {
                start: Gva(start),
                at,
                vm: fields.u64(layout.vm),
            });
        }
        node = fields.u64(layout.list);
    }
    Ok(())
}

/// The areas (`vm_struct`) of stacks that each CPU keeps for the next task: nobody is on them.
fn cached_stacks<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    cpus: &[Cpu],
) -> Result<HashSet<u64>, KernelError> {
    let mut cached = HashSet::new();
    let Some(offsets) = &kernel.layout().cpus.cached_stacks else {
        return Ok(cached);
    };
    for cpu in cpus {
        for offset in offsets.clone().step_by(8) {
            cached.insert(memory.u64(Gva(cpu.area.wrapping_add(offset)))?);
        }
    }
    Ok(cached)
}

/// Whether the stack in `area` has been given up: then its lowest words are an RCU head with the callback that frees it, and
/// the area. A live stack is never that deep.
fn waits_to_be_freed<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    area: &Area,
) -> Result<bool, KernelError> {
    let Some(freed) = &kernel.layout().vmap.freed else {
        return Ok(false);
    };
    let word = |offset: u64| memory.u64(Gva(area.start.0.wrapping_add(offset)));
    Ok(word(freed.func)? == kernel.runtime(freed.callback).0 && word(freed.area)? == area.vm)
}
