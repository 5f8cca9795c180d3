//! All tasks of the running kernel, its CPUs, and every kernel stack.
//!
//! Tasks are those of the process list with their threads, each CPU's idle task, and whatever runs. That is not all: a task on its
//! way out leaves the lists before its last instruction, and may still be preempted or even sleep (so that run queues would not
//! show it either). What it cannot shed is its stack: every stack but the first task's is a mapped area of its own. So
//! all areas of a stack's size are listed too, and those that no task owns are stacks whose live part is unknown.
//! Sources: kernel `include/linux/sched.h`, `kernel/{fork,exit}.c`, `arch/x86/include/asm/cpu_entry_area.h`.

pub mod process;

use std::collections::HashSet;
use std::ops::Range;

use super::gather::{Bound, Fields, Gather};
use super::layout::{CpuLayout, TaskLayout};
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::vmap;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// More tasks than any guest that is still worth updating has.
const MAX_TASKS: usize = 1 << 17;
/// `NR_CPUS` of the largest kernels.
const MAX_CPUS: u32 = 8192;

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

/// Where return addresses are that are not on the stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hidden {
    /// The function graph tracer's entries, and how many bytes of them are in use.
    pub(crate) graph: (u64, u64),
    /// The first node of the return probes' list.
    pub(crate) rethook: u64,
}

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
        let layout = &kernel.layout().task;
        let gather = gather(layout);
        let mut walk = Walk {
            layout,
            memory,
            fields: gather.fields(),
            stack_size: kernel.layout().stack_size,
            seen: HashSet::new(),
            tasks: Vec::new(),
        };
        let cpus = cpus(kernel, memory)?;
        walk.all(kernel.runtime(layout.init_task))?;
        for cpu in &cpus {
            walk.also(cpu.idle)?;
            if cpu.online {
                walk.also(cpu.current)?;
            }
        }
        let mut tasks = walk.tasks;
        for cpu in cpus.iter().filter(|cpu| cpu.online) {
            if let Some(task) = tasks.iter_mut().find(|task| task.at == cpu.current) {
                task.cpu = Some(cpu.index);
            }
        }
        let owned: HashSet<u64> = tasks.iter().map(|task| task.stack.start.0).collect();
        let areas = vmap::areas(kernel, memory)?;
        mapped(&tasks, kernel.runtime(layout.init_task), &areas)?;
        let mut unowned = vmap::unowned_stacks(kernel, memory, &areas, &owned, &cpus)?;
        unowned.retain(|stack| cpus.iter().all(|cpu| cpu.irq_stack.start != stack.start));
        Ok(Self {
            tasks,
            cpus,
            unowned,
        })
    }
}

/// Proves that stacks are mapped areas, all but the first task's: else there could be some that no list shows.
fn mapped(tasks: &[Task], first: Gva, areas: &[vmap::Area]) -> Result<(), KernelError> {
    let starts: HashSet<Gva> = areas.iter().map(|area| area.start).collect();
    let mut stacks = tasks
        .iter()
        .filter(|task| task.at != first && !task.stack.is_empty());
    match stacks.find(|task| !starts.contains(&task.stack.start)) {
        None => Ok(()),
        Some(task) => {
            let what = "task's stack, which is no mapped area (CONFIG_VMAP_STACK),";
            Err(KernelError::Unsound {
                what,
                at: task.at,
                value: task.stack.start.0,
            })
        }
    }
}

fn gather(layout: &TaskLayout) -> Gather {
    let mut fields = vec![
        (layout.tasks, 16),
        (layout.thread_node, 16),
        (layout.signal, 8),
        (layout.stack, 8),
        (layout.pid, 4),
        (layout.comm, 16),
        (layout.sp, 8),
    ];
    if let Some(graph) = &layout.graph {
        fields.extend([(graph.entries, 8), (graph.last, 4)]);
    }
    if let Some(rethook) = &layout.rethook {
        fields.push((rethook.first, 8));
    }
    Gather::new(&fields)
}

/// A walk through the lists of tasks.
struct Walk<'a, R: ?Sized> {
    layout: &'a TaskLayout,
    memory: &'a Memory<'a, R>,
    fields: Fields<'a>,
    stack_size: u64,
    seen: HashSet<u64>,
    tasks: Vec<Task>,
}

impl<R: ReadPhys + ?Sized> Walk<'_, R> {
    /// All processes, from `first` on, each with its threads.
    fn all(&mut self, first: Gva) -> Result<(), KernelError> {
        let mut bound = Bound::new("list of processes", MAX_TASKS);
        let mut leader = first;
        loop {
            bound.step(leader.0)?;
            self.fields.read(self.memory, leader)?;
            let next = Gva(self
                .fields
                .u64(self.layout.tasks)
                .wrapping_sub(self.layout.tasks));
            let process = (
                self.fields.u64(self.layout.signal),
                self.fields.u64(self.layout.thread_node),
            );
            self.push(leader)?;
            self.threads(leader, process)?;
            leader = next;
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
            self.fields.read(self.memory, task)?;
            node = self.fields.u64(self.layout.thread_node);
            self.push(task)?;
        }
        Ok(())
    }

    /// Reads the task at `at`, unless it has been or is none.
    fn also(&mut self, at: Gva) -> Result<(), KernelError> {
        if at.0 == 0 || self.seen.contains(&at.0) {
            return Ok(());
        }
        self.fields.read(self.memory, at)?;
        self.push(at)
    }

    /// Adds the task at `at`, whose fields have just been read, unless it is known.
    fn push(&mut self, at: Gva) -> Result<(), KernelError> {
        if !self.seen.insert(at.0) {
            return Ok(());
        }
        if self.tasks.len() >= MAX_TASKS {
            return Err(KernelError::Unsound {
                what: "number of tasks",
                at,
                value: MAX_TASKS as u64,
            });
        }
        let (layout, fields) = (self.layout, &self.fields);
        let stack = Gva(fields.u64(layout.stack));
        let unsound = || KernelError::Unsound {
            what: "task's stack",
            at,
            value: stack.0,
        };
        let len = if stack.0 == 0 { 0 } else { self.stack_size };
        let graph = layout.graph.as_ref().map_or((0, 0), |graph| {
            let last = i64::from(fields.u32(graph.last).cast_signed());
            let count = u64::try_from(last.saturating_add(graph.first_count)).unwrap_or(0);
            (fields.u64(graph.entries), count.saturating_mul(graph.unit))
        });
        self.tasks.push(Task {
            at,
            pid: fields.u32(layout.pid),
            comm: fields.array(layout.comm),
            stack: stack.range(len).ok_or_else(unsound)?,
            saved_sp: Gva(fields.u64(layout.sp)),
            cpu: None,
            hidden: Hidden {
                graph,
                rethook: layout
                    .rethook
                    .as_ref()
                    .map_or(0, |hook| fields.u64(hook.first)),
            },
        });
        Ok(())
    }
}

/// The possible CPUs.
fn cpus<R: ReadPhys + ?Sized>(
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
