//! All tasks of the running kernel, its CPUs, and every kernel stack.
//!
//! Tasks are those of the process list with their threads, each CPU's idle task, and whatever runs. That is not all: a task on its
//! way out leaves the lists before its last instruction, and may still be preempted or even sleep (so that run queues would not
//! show it either). What it cannot shed is its stack: every stack but the first task's is a mapped area of its own. So
//! all areas of a stack's size are listed too, and those that no task owns are stacks whose live part is unknown.
//! Sources: kernel `include/linux/sched.h`, `kernel/{fork,exit}.c`, `arch/x86/include/asm/cpu_entry_area.h`.

mod cpus;
pub mod process;
mod reading;

use std::ops::Range;

pub use self::cpus::Cpu;
pub(crate) use self::reading::Reader;
use self::reading::Reading;
use super::ahead::Ahead;
use super::gather::{Bound, Gather};
use super::layout::TaskLayout;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::rested::{Recall, Rested};
use super::vmap;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// More tasks than any guest that is still worth updating has.
const MAX_TASKS: usize = 1 << 17;

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
    /// It is as a first look found it, and has not stopped running since: see [`super::rested`].
    pub(crate) rested: bool,
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
        Self::read_beside(kernel, memory, &Rested::default())
    }

    /// The same, with little read of those that have `rested`.
    pub(crate) fn read_beside<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        rested: &Rested,
    ) -> Result<Self, KernelError> {
        let mut all = Self::listed(kernel, memory, rested)?;
        let mut areas = vmap::areas(kernel, memory, rested.areas())?;
        areas.sort_unstable_by_key(|area| area.start);
        let first = kernel.runtime(kernel.layout().task.init_task);
        let areas = unowned(&all.tasks, first, areas)?;
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
        rested: &Rested,
    ) -> Result<Self, KernelError> {
        let layout = &kernel.layout().task;
        let reader = Reader::new(kernel);
        let links = links(layout);
        let cpus = cpus::cpus(kernel, memory)?;
        let online = cpus.iter().filter(|cpu| cpu.online);
        let mut current: Vec<Gva> = online.map(|cpu| cpu.current).collect();
        current.sort_unstable();
        let mut walk = Walk {
            layout,
            memory,
            links: Ahead::new(&links, rested.order()),
            reading: reader.reading(memory),
            recall: rested.recall(),
            current,
            tasks: Vec::with_capacity(rested.order().len()),
        };
        walk.all(kernel.runtime(layout.init_task))?;
        let mut known = walk.places();
        for cpu in &cpus {
            for at in [Some(cpu.idle), cpu.online.then_some(cpu.current)] {
                walk.also(at.unwrap_or(Gva(0)), &mut known)?;
            }
        }
        let mut tasks = walk.tasks;
        for cpu in cpus.iter().filter(|cpu| cpu.online) {
            let index = known.binary_search_by_key(&cpu.current, |(at, _)| *at);
            let index = index.ok().and_then(|place| known.get(place));
            if let Some(task) = index.and_then(|(_, index)| tasks.get_mut(*index)) {
                task.cpu = Some(cpu.index);
            }
        }
        Ok(Self {
            tasks,
            cpus,
            unowned: Vec::new(),
        })
    }
}

/// Of `areas`, sorted, those that are no task's stack.
///
/// # Errors
/// When a stack other than the `first` task's is none of them: then there could be some that no list shows.
fn unowned(
    tasks: &[Task],
    first: Gva,
    areas: Vec<vmap::Area>,
) -> Result<Vec<vmap::Area>, KernelError> {
    let stacks = tasks
        .iter()
        .filter(|task| task.at != first && !task.stack.is_empty());
    let mut stacks: Vec<(Gva, Gva)> = stacks.map(|task| (task.stack.start, task.at)).collect();
    stacks.sort_unstable();
    let mut stacks = stacks.into_iter().peekable();
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

/// What is read of every task: the way to the next ones, and how often it has stopped.
fn links(layout: &TaskLayout) -> Gather {
    let mut fields = vec![
        (layout.tasks, 8),
        (layout.thread_node, 8),
        (layout.signal, 8),
    ];
    if let Some(turns) = &layout.turns {
        let all = [turns.voluntary, turns.involuntary, turns.since];
        fields.extend(all.map(|at| (at, 8)));
    }
    Gather::new(&fields)
}

/// The same, as it was read.
#[derive(Clone, Copy)]
struct Links {
    next_process: u64,
    next_thread: u64,
    signal: u64,
    turns: Option<Turns>,
}

/// A walk through the lists of tasks.
struct Walk<'a, R: ?Sized> {
    layout: &'a TaskLayout,
    memory: &'a Memory<'a, R>,
    links: Ahead<'a>,
    reading: Reading<'a, R>,
    recall: Recall<'a>,
    /// The current tasks of CPUs, sorted: they run.
    current: Vec<Gva>,
    tasks: Vec<Task>,
}

impl<R: ReadPhys + ?Sized> Walk<'_, R> {
    /// All processes, from `first` on, each with its threads.
    fn all(&mut self, first: Gva) -> Result<(), KernelError> {
        let mut bound = Bound::new("list of processes", MAX_TASKS);
        let mut leader = first;
        loop {
            bound.step(leader.0)?;
            let links = self.links(leader)?;
            self.push(leader, links.turns)?;
            self.threads(leader, (links.signal, links.next_thread))?;
            leader = Gva(links.next_process.wrapping_sub(self.layout.tasks));
            if leader == first {
                return Ok(());
            }
        }
    }

    /// The threads of the process of `leader`, given its `signal_struct` and its own next link in the list.
    fn threads(
        &mut self,
        leader: Gva,
        (signal, leader_next): (u64, u64),
    ) -> Result<(), KernelError> {
        if signal == 0 {
            return Ok(());
        }
        let head = signal.wrapping_add(self.layout.thread_head);
        let own = leader.0.wrapping_add(self.layout.thread_node);
        let mut bound = Bound::new("list of threads", MAX_TASKS);
        let mut node = self.memory.u64(Gva(head))?;
        while node != head {
            bound.step(node)?;
            if node == own {
                node = leader_next;
                continue;
            }
            let task = Gva(node.wrapping_sub(self.layout.thread_node));
            let links = self.links(task)?;
            node = links.next_thread;
            self.push(task, links.turns)?;
        }
        Ok(())
    }

    /// Where all tasks are, sorted, with the index of each. One that several lists have is left in once.
    fn places(&mut self) -> Vec<(Gva, usize)> {
        let places = |tasks: &[Task]| {
            let places = tasks.iter().enumerate();
            let mut places: Vec<_> = places.map(|(index, task)| (task.at, index)).collect();
            places.sort_unstable();
            places
        };
        let known = places(&self.tasks);
        let mut again: Vec<usize> = known
            .windows(2)
            .filter_map(|pair| match pair {
                [(first, _), (second, index)] if first == second => Some(*index),
                _ => None,
            })
            .collect();
        if again.is_empty() {
            return known;
        }
        again.sort_unstable();
        let mut index = 0;
        self.tasks.retain(|_| {
            index += 1;
            again.binary_search(&(index - 1)).is_err()
        });
        places(&self.tasks)
    }

    /// Reads the task at `at`, unless it is `known` or none.
    fn also(&mut self, at: Gva, known: &mut Vec<(Gva, usize)>) -> Result<(), KernelError> {
        let Err(place) = known.binary_search_by_key(&at, |(at, _)| *at) else {
            return Ok(());
        };
        if at.0 == 0 {
            return Ok(());
        }
        known.insert(place, (at, self.tasks.len()));
        let links = self.links(at)?;
        self.push(at, links.turns)
    }

    fn links(&mut self, at: Gva) -> Result<Links, KernelError> {
        let (layout, fields) = (self.layout, self.links.read(self.memory, at)?);
        let turns = layout.turns.as_ref().map(|turns| {
            let [wanted, had] = [turns.voluntary, turns.involuntary].map(|at| fields.u64(at));
            Turns {
                count: wanted.wrapping_add(had),
                since: fields.u64(turns.since),
            }
        });
        Ok(Links {
            next_process: fields.u64(layout.tasks),
            next_thread: fields.u64(layout.thread_node),
            signal: fields.u64(layout.signal),
            turns,
        })
    }

    /// Adds the task at `at`, which has had these turns.
    fn push(&mut self, at: Gva, turns: Option<Turns>) -> Result<(), KernelError> {
        if self.tasks.len() >= MAX_TASKS {
            return Err(KernelError::Unsound {
                what: "number of tasks",
                at,
                value: MAX_TASKS as u64,
            });
        }
        let runs = self.current.binary_search(&at).is_ok();
        let known = self.recall.task(at, turns).filter(|_| !runs);
        let task = match known {
            Some(task) => task.clone(),
            None => self.reading.task(at, turns)?,
        };
        self.tasks.push(task);
        Ok(())
    }
}
