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
pub(crate) struct KnownStacks<'a> {
    tasks: &'a Tasks,
    /// Those that are no task's, sorted.
    others: Vec<Known>,
}

impl<'a> KnownStacks<'a> {
    pub(crate) fn of(tasks: &'a Tasks) -> Self {
        let mut others = Vec::with_capacity(tasks.unowned.len() + 8 * tasks.cpus.len());
        let mut add = |range: &Range<Gva>, owner| {
            if !range.is_empty() {
                others.push(Known {
                    range: range.clone(),
                    owner,
                });
            }
        };
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
        others.sort_unstable_by_key(|known| known.range.start);
        Self { tasks, others }
    }

    /// The one stack that `at` is in. One that overlaps its neighbour is none: no kernel has such.
    pub(crate) fn at(&self, at: Gva) -> Option<Known> {
        let holds = |known: &Known| known.range.contains(&at);
        let mut found = self
            .last_before(at.checked_add(1)?)
            .into_iter()
            .flatten()
            .filter(holds);
        let known = found.next()?;
        let end = known.range.end;
        let near = self.last_before(end).into_iter().flatten();
        let overlapping = near.filter(|near| known.range.start < near.range.end);
        (overlapping.count() == 1).then_some(known)
    }

    /// The last two stacks of tasks, and of others, that begin before `end`.
    fn last_before(&self, end: Gva) -> [Option<Known>; 4] {
        let stacks = &self.tasks.by_stack;
        let after = stacks.partition_point(|(start, _)| *start < end);
        let of_task = |back: usize| {
            let (_, index) = stacks.get(after.checked_sub(back)?)?;
            let task = self.tasks.tasks.get(*index)?;
            Some(Known {
                range: task.stack.clone(),
                owner: Owner::Task(*index),
            })
        };
        let after = self.others.partition_point(|known| known.range.start < end);
        let other = |back: usize| self.others.get(after.checked_sub(back)?).cloned();
        [of_task(1), of_task(2), other(1), other(2)]
    }

    /// The stack that a stack pointer of `sp` means: that of an empty one is its end.
    pub(crate) fn of_pointer(&self, sp: Gva) -> Option<Known> {
        self.at(sp).or_else(|| self.at(sp.checked_sub(1)?))
    }
}
