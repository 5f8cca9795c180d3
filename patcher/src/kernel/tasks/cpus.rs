//! The CPUs of the running kernel: which task each runs, and the stacks that are its own.
//!
//! Sources: kernel `arch/x86/include/asm/{cpu_entry_area,percpu}.h`, `kernel/sched/sched.h`.

use std::ops::Range;

use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::layout::CpuLayout;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;

/// `NR_CPUS` of the largest kernels.
const MAX_CPUS: u32 = 8192;

/// One CPU, as the kernel counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its number.
    pub index: usize,
    /// Whether the kernel counts it as online.
    pub online: bool,
    /// The task that it runs.
    pub current: Gva,
    /// The task that it runs when there is none.
    pub idle: Gva,
    /// Its interrupt stack.
    pub irq_stack: Range<Gva>,
    /// Its exception stacks.
    pub exception_stacks: Vec<Range<Gva>>,
    /// Where it enters the kernel from the user, before it is on the task's stack.
    pub entry_stack: Range<Gva>,
    /// What its per-CPU symbols are offsets from.
    pub(crate) area: u64,
    /// The GS base of the vCPU that is this CPU, while it is in the kernel.
    pub(crate) gs_base: u64,
}

/// The possible CPUs.
pub(super) fn cpus<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<Vec<Cpu>, KernelError> {
    let layout = &kernel.layout().cpus;
    let at = kernel.runtime(layout.count);
    let count = memory.u32(at)?;
    if count == 0 || count > MAX_CPUS {
        return Err(KernelError::Unsound {
            what: "number of CPUs",
            at,
            value: count.into(),
        });
    }
    let bits = |mask| {
        let mut bytes = vec![0; count.div_ceil(64) as usize * 8];
        memory.read(kernel.runtime(mask), &mut bytes)?;
        Ok::<_, KernelError>(bytes)
    };
    let (possible, online) = (bits(layout.possible)?, bits(layout.online)?);
    let is_set = |mask: &[u8], index: usize| {
        mask.get(index / 8)
            .is_some_and(|byte| byte >> (index % 8) & 1 != 0)
    };
    let mut offsets = vec![0; count as usize * 8];
    memory.read(kernel.runtime(layout.offsets), &mut offsets)?;
    let mut cpus = Vec::new();
    for (index, offset) in offsets.as_chunks::<8>().0.iter().enumerate() {
        let offset = u64::from_le_bytes(*offset);
        if is_set(&possible, index) {
            let online = is_set(&online, index);
            cpus.push(cpu(layout, kernel, memory, (index, online, offset))?);
        }
    }
    Ok(cpus)
}

fn cpu<R: ReadPhys + ?Sized>(
    layout: &CpuLayout,
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    (index, online, gs_base): (usize, bool, u64),
) -> Result<Cpu, KernelError> {
    let first = layout.first.map_or(0, |first| kernel.runtime(first).0);
    let area = gs_base.wrapping_add(first);
    let own = |offset: u64| memory.u64(Gva(area.wrapping_add(offset)));
    let irq_top = own(layout.irq_stack)?;
    let exceptions = own(layout.exception_stacks)?;
    let entry_area = exceptions.wrapping_sub(layout.exception_in_area);
    let within = |base: u64, range: &Range<u64>| {
        Gva(base.wrapping_add(range.start))..Gva(base.wrapping_add(range.end))
    };
    // The pointer is to the topmost word; a CPU that was never brought up has none.
    let irq_end = if irq_top == 0 {
        0
    } else {
        irq_top.wrapping_add(8)
    };
    let irq_start = if irq_top == 0 {
        0
    } else {
        irq_end.wrapping_sub(kernel.layout().stack_size)
    };
    let known = exceptions != 0;
    Ok(Cpu {
        index,
        online,
        current: Gva(own(layout.current)?),
        idle: Gva(own(layout.idle)?),
        irq_stack: Gva(irq_start)..Gva(irq_end),
        exception_stacks: layout
            .exception
            .iter()
            .filter(|_| known)
            .map(|range| within(exceptions, range))
            .collect(),
        entry_stack: if known {
            within(entry_area, &layout.entry_in_area)
        } else {
            Gva(0)..Gva(0)
        },
        area,
        gs_base,
    })
}
