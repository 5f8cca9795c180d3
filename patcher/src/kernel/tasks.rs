//! All tasks of the running kernel, its CPUs, and every kernel stack.
//!
//! Tasks are those of the process list with their threads, each CPU's idle task, and whatever runs. That is not all: a task on its
//! way out leaves the lists before its last instruction, and may still be preempted or even sleep (so that run queues would not
//! show it either). What it cannot shed is its stack: every stack but the first task's is a mapped area of its own. So
//! all areas of a stack's size are listed too, and those that no task owns are stacks whose live part is unknown.
//! Sources: kernel `include/linux/sched.h`, `kernel/{fork,exit}.c`, `arch/x86/include/asm/cpu_entry_area.h`.

mod cpus;
mod lists;
mod members;
pub mod process;
mod reading;

use std::ops::Range;

pub use self::cpus::Cpu;
use self::members::Members;
pub(crate) use self::members::{by_stack, places};
pub(crate) use self::reading::Reading;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::rested::Rested;
use super::vmap;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// One task (a thread, a kernel thread or an idle task).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its `task_struct`.
    pub at: Gva,
    /// Its thread id, zero for idle tasks.
    pub pid: u32,
    /// Its name, padded with zeros.
    pub comm: [u8; 16],
    /// Its kernel stack; empty when it has none any more.
    pub stack: Range<Gva>,
    /// Its stack pointer when it last stopped running; meaningless while it runs.
    pub saved_sp: Gva,
    /// The CPU whose current task it is.
    pub cpu: Option<usize>,
    /// How often it has stopped running, where the kernel tells.
    pub(crate) turns: Option<Turns>,
    /// What a first look found, while it has not run since: see [`super::rested`].
    pub(crate) rest: Rest,
    /// Return addresses that a tracer took from its stack.
    pub(crate) hidden: Hidden,
}

impl Task {
    /// Its name as text.
    #[must_use]
    pub fn name(&self) -> String {
        let end = self
            .comm
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.comm.len());
        String::from_utf8_lossy(&self.comm[..end]).into_owned()
    }
}

/// Where a task is that has not run since a first look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rest {
    /// That is not known: it has run, or was not at rest.
    #[default]
    Unknown,
    /// In nothing that is asked about.
    Outside,
    /// In the code of the group; which of those that were found there it is.
    Inside(usize),
}

/// How often a task has stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turns {
    count: u64,
    /// When it began: another task in the same place began at another time.
    since: u64,
}

/// Where return addresses are that are not on the stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hidden {
    /// The function graph tracer's entries, and how many bytes of them are in use.
    pub(crate) graph: (u64, u64),
    /// The first node of the return probes' list.
    pub(crate) rethook: u64,
}

/// All of them, at one moment.
#[derive(Clone, Debug)]
pub struct Tasks {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// The CPUs that are possible, online or not.
    pub cpus: Vec<Cpu>,
    /// Stacks that belong to none of the tasks.
    pub unowned: Vec<Range<Gva>>,
    /// How many of the tasks lists show; behind them come those that only CPUs do.
    pub(crate) in_lists: usize,
    /// Where the tasks' stacks begin, sorted, and the index of each task that has one.
    pub(crate) by_stack: Vec<(Gva, usize)>,
}

impl Tasks {
    /// Reads all tasks, CPUs and stacks of `kernel` in `guest`, which must stand still.
    ///
    /// # Errors
    /// When a list does not end, or anything lies outside the guest's memory.
    pub fn read<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Self, KernelError> {
        Self::read_from(kernel, &Memory::new(kernel, guest)?)
    }

    pub(crate) fn read_from<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
    ) -> Result<Self, KernelError> {
        Self::read_beside(kernel, memory, Rested::default())
    }

    /// The same, with little read of those that have `rested`.
    pub(crate) fn read_beside<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        mut rested: Rested,
    ) -> Result<Self, KernelError> {
        let order = rested.take_areas();
        let mut all = Self::listed(kernel, memory, rested)?;
        let mut areas = vmap::areas(kernel, memory, &order)?;
        areas.sort_unstable_by_key(|area| area.start);
        let first = kernel.runtime(kernel.layout().task.init_task);
        let areas = unowned(&all, first, areas)?;
        all.unowned = vmap::unowned_stacks(kernel, memory, &areas, &all.cpus)?;
        let is_irq = |stack: &Range<Gva>| {
            let mut cpus = all.cpus.iter();
            cpus.any(|cpu| cpu.irq_stack.start == stack.start)
        };
        all.unowned.retain(|stack| !is_irq(stack));
        Ok(all)
    }

    /// Those that lists and CPUs show. Stacks of others are not looked for.
    pub(crate) fn listed<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        rested: Rested,
    ) -> Result<Self, KernelError> {
        let cpus = cpus::cpus(kernel, memory)?;
        let mut members = Members::find(kernel, memory, &cpus, rested)?;
        let in_lists = members.tasks.len();
        members.of_cpus(&cpus)?;
        let by_stack = members.by_stack();
        Ok(Self {
            tasks: members.tasks,
            cpus,
            unowned: Vec::new(),
            in_lists,
            by_stack,
        })
    }
}

/// Of `areas`, sorted, those that are no task's stack.
///
/// # Errors
/// When a stack other than the `first` task's is none of them: then there could be some that no list shows.
fn unowned(
    all: &Tasks,
    first: Gva,
    areas: Vec<vmap::Area>,
) -> Result<Vec<vmap::Area>, KernelError> {
    let stacks = all.by_stack.iter().filter_map(|(start, index)| {
        let task = all.tasks.get(*index)?;
        (task.at != first).then_some((*start, task.at))
    });
    let mut stacks = stacks.peekable();
    let unmapped = |(start, at): (Gva, Gva)| KernelError::Unsound {
        what: "task's stack, which is no mapped area (CONFIG_VMAP_STACK),",
        at,
        value: start.0,
    };
    let mut unowned = Vec::new();
    for area in areas {
        match stacks.peek() {
            Some((start, _)) if *start == area.start => {
                while stacks.next_if(|(start, _)| *start == area.start).is_some() {}
            }
            Some(stack) if stack.0 < area.start => return Err(unmapped(*stack)),
            _ => unowned.push(area),
        }
    }
    stacks
        .next()
        .map_or(Ok(unowned), |stack| Err(unmapped(stack)))
}
