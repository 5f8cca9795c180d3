//! Every stack that the kernel's code can be on, by address; and which may lie beneath which.
//!
//! From the inside out: exception stacks over an interrupt stack over a task's; an exception may also have come while the vCPU was on the
//! stack on which it enters the kernel, beneath which there is none (kernel `arch/x86/kernel/dumpstack_64.c`).

use std::ops::Range;

use crate::addr::Gva;
use crate::kernel::tasks::Tasks;

/// Whose stack it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The task of this index.
    Task(usize),
    /// No task that is in a list: one on its way in or out.
    Nobody,
    /// A CPU's, for interrupts.
    Interrupt(usize),
    /// A CPU's, for one kind of exception.
    Exception(usize),
    /// A CPU's, for the way in from the user and out.
    Entry(usize),
}

impl Owner {
    fn cpu(self) -> Option<usize> {
        match self {
            Self::Interrupt(cpu) | Self::Exception(cpu) | Self::Entry(cpu) => Some(cpu),
            Self::Task(_) | Self::Nobody => None,
        }
    }

    /// Whether code on a stack of `below` may have been interrupted by, or have called, code on this one.
    pub(crate) fn may_lie_over(self, below: Self) -> bool {
        let same_cpu = match (self.cpu(), below.cpu()) {
            (Some(over), Some(below)) => over == below,
            _ => true,
        };
        let order = match self {
            Self::Exception(_) => true,
            Self::Interrupt(_) => matches!(below, Self::Task(_) | Self::Nobody),
            Self::Entry(_) | Self::Task(_) | Self::Nobody => false,
        };
        same_cpu && order
    }

    pub(crate) fn is_task(self) -> bool {
        matches!(self, Self::Task(_) | Self::Nobody)
    }
}

/// One stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) range: Range<Gva>,
    pub(crate) owner: Owner,
}

/// All of them, by address.
#[derive(Debug)]
pub(crate) struct KnownStacks(Vec<Known>);

impl KnownStacks {
    pub(crate) fn of(tasks: &Tasks) -> Self {
        let mut all =
            Vec::with_capacity(tasks.tasks.len() + tasks.unowned.len() + 8 * tasks.cpus.len());
        let mut add = |range: &Range<Gva>, owner| {
            if !range.is_empty() {
                all.push(Known {
                    range: range.clone(),
                    owner,
                });
            }
        };
        for (index, task) in tasks.tasks.iter().enumerate() {
            add(&task.stack, Owner::Task(index));
        }
        for stack in &tasks.unowned {
            add(stack, Owner::Nobody);
        }
        for cpu in &tasks.cpus {
            add(&cpu.irq_stack, Owner::Interrupt(cpu.index));
            for stack in &cpu.exception_stacks {
                add(stack, Owner::Exception(cpu.index));
            }
            add(&cpu.entry_stack, Owner::Entry(cpu.index));
        }
        all.sort_unstable_by_key(|known| known.range.start);
        Self(all)
    }

    /// The one stack that `at` is in. One that overlaps its neighbour is none: no kernel has such.
    pub(crate) fn at(&self, at: Gva) -> Option<&Known> {
        let after = self.0.partition_point(|known| known.range.start <= at);
        let index = after.checked_sub(1)?;
        let known = self.0.get(index)?;
        let before = index.checked_sub(1).and_then(|before| self.0.get(before));
        let overlaps = before.is_some_and(|before| before.range.end > known.range.start)
            || self
                .0
                .get(after)
                .is_some_and(|next| next.range.start < known.range.end);
        (known.range.contains(&at) && !overlaps).then_some(known)
    }

    /// The stack that a stack pointer of `sp` means: that of an empty one is its end.
    pub(crate) fn of_pointer(&self, sp: Gva) -> Option<&Known> {
        self.at(sp).or_else(|| self.at(sp.checked_sub(1)?))
    }
}
