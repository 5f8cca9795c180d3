//! The tasks that are found, each read once: from the kernel's lists, or as they were at a first look if none has come or gone since.

use super::lists::{self, Member};
use super::reading::Reading;
use super::{Cpu, Rest, Task, Turns};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::gather::{Fields, Gather};
use crate::kernel::layout::TurnsLayout;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::rested::Rested;

/// The tasks found so far.
pub(super) struct Members<'a, R: ?Sized> {
    pub(super) tasks: Vec<Task>,
    finder: Finder<'a, R>,
    /// Where the tasks are, sorted, with the index of each.
    places: Vec<(Gva, usize)>,
    /// Where their stacks begin, sorted likewise, as far as that is known.
    by_stack: Option<Vec<(Gva, usize)>>,
    /// What is known of tasks in no list.
    beyond: Vec<Task>,
}

impl<'a, R: ReadPhys + ?Sized> Members<'a, R> {
    /// Those that the lists show.
    ///
    /// # Errors
    /// When a list does not end, or a task cannot be read.
    pub(super) fn find(
        kernel: &'a Kernel,
        memory: &'a Memory<'a, R>,
        cpus: &[Cpu],
        mut rested: Rested,
    ) -> Result<Self, KernelError> {
        let mut finder = Finder::new(kernel, memory, cpus);
        let beyond = std::mem::take(&mut rested.beyond);
        if rested.has_all(kernel, memory)? {
            let Rested {
                mut listed,
                places,
                by_stack,
                ..
            } = rested;
            let moved = finder.again(&mut listed)?;
            return Ok(Self {
                tasks: listed,
                finder,
                places,
                by_stack: (!moved).then_some(by_stack),
                beyond,
            });
        }
        let (members, places) = lists::members(kernel, memory, &rested.listed)?;
        Ok(Self {
            tasks: finder.anew(members, &rested)?,
            places,
            finder,
            by_stack: None,
            beyond,
        })
    }

    /// Adds the idle task of each of `cpus` and what runs there, and notes the latter.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(super) fn of_cpus(&mut self, cpus: &[Cpu]) -> Result<(), KernelError> {
        for cpu in cpus {
            self.place(cpu.idle)?;
            let current = if cpu.online {
                self.place(cpu.current)?
            } else {
                None
            };
            if let Some(task) = current.and_then(|index| self.tasks.get_mut(index)) {
                task.cpu = Some(cpu.index);
            }
        }
        Ok(())
    }

    /// The index of the task at `at`, which is read if it is none of them yet; `None` for no task.
    fn place(&mut self, at: Gva) -> Result<Option<usize>, KernelError> {
        let place = match self.places.binary_search_by_key(&at, |(at, _)| *at) {
            Ok(place) => return Ok(self.places.get(place).map(|(_, index)| *index)),
            Err(place) => place,
        };
        if at.0 == 0 {
            return Ok(None);
        }
        let turns = self.finder.turns(at)?;
        let known = self.beyond.iter().find(|task| task.at == at);
        let task = self.finder.task((at, turns), known)?;
        let index = self.tasks.len();
        if let Some(by_stack) = self.by_stack.as_mut().filter(|_| !task.stack.is_empty()) {
            by_stack.push((task.stack.start, index));
        }
        self.places.insert(place, (at, index));
        self.tasks.push(task);
        Ok(Some(index))
    }

    /// Where their stacks begin, sorted, with the index of each task that has one.
    pub(super) fn by_stack(&mut self) -> Vec<(Gva, usize)> {
        let Some(mut stacks) = self.by_stack.take() else {
            return by_stack(&self.tasks);
        };
        // All but those of CPUs are in order: a stable sort goes by that.
        stacks.sort();
        stacks
    }
}

/// Where the stacks of `tasks` begin, sorted, with the index of each that has one.
pub(crate) fn by_stack(tasks: &[Task]) -> Vec<(Gva, usize)> {
    let tasks = tasks.iter().enumerate();
    let stacks = tasks.filter(|(_, task)| !task.stack.is_empty());
    let mut stacks: Vec<_> = stacks
        .map(|(index, task)| (task.stack.start, index))
        .collect();
    stacks.sort_unstable();
    stacks
}

/// Where tasks are, sorted, with the index of each.
pub(crate) fn places(tasks: impl Iterator<Item = Gva>) -> Vec<(Gva, usize)> {
    let places = tasks.enumerate();
    let mut places: Vec<_> = places.map(|(index, at)| (at, index)).collect();
    places.sort_unstable();
    places
}

/// What reads tasks, or finds that they are as they were.
struct Finder<'a, R: ?Sized> {
    memory: &'a Memory<'a, R>,
    layout: Option<&'a TurnsLayout>,
    turns: Fields,
    reading: Reading<'a, R>,
    /// The current tasks of CPUs, sorted: they run.
    current: Vec<Gva>,
}

impl<'a, R: ReadPhys + ?Sized> Finder<'a, R> {
    fn new(kernel: &'a Kernel, memory: &'a Memory<'a, R>, cpus: &[Cpu]) -> Self {
        let layout = kernel.layout().task.turns.as_ref();
        let fields = layout.map_or_else(Vec::new, |layout| layout.fields().to_vec());
        let online = cpus.iter().filter(|cpu| cpu.online);
        let mut current: Vec<Gva> = online.map(|cpu| cpu.current).collect();
        current.sort_unstable();
        Self {
            memory,
            layout,
            turns: Gather::new(&fields).fields(),
            reading: Reading::new(kernel, memory),
            current,
        }
    }

    /// Reads those of `tasks` again that have run. Says whether the stack of one is another now.
    fn again(&mut self, tasks: &mut [Task]) -> Result<bool, KernelError> {
        let mut moved = false;
        for known in tasks {
            let turns = self.turns(known.at)?;
            if !self.has_rested(known, turns) {
                let task = self.reading.task(known.at, turns)?;
                moved |= task.stack != known.stack;
                *known = task;
            }
        }
        Ok(moved)
    }

    /// The tasks of `members`, in their order.
    fn anew(&mut self, members: Vec<Member>, rested: &Rested) -> Result<Vec<Task>, KernelError> {
        let mut recall = rested.recall();
        let tasks = members.into_iter();
        tasks
            .map(|member| self.task(member, recall.task(member.0)))
            .collect()
    }

    /// A task, and what was `known` of it at a first look.
    fn task(&mut self, (at, turns): Member, known: Option<&Task>) -> Result<Task, KernelError> {
        match known.filter(|known| self.has_rested(known, turns)) {
            Some(known) => Ok(known.clone()),
            None => self.reading.task(at, turns),
        }
    }

    fn has_rested(&self, known: &Task, turns: Option<Turns>) -> bool {
        known.rest != Rest::Unknown
            && known.turns == turns
            && self.current.binary_search(&known.at).is_err()
    }

    /// The turns of the task at `at`.
    fn turns(&mut self, at: Gva) -> Result<Option<Turns>, KernelError> {
        let Some(layout) = self.layout else {
            return Ok(None);
        };
        self.turns.read(self.memory, at)?;
        Ok(Some(turns(layout, &self.turns)))
    }
}

/// The turns that `fields` tell of.
pub(super) fn turns(layout: &TurnsLayout, fields: &Fields) -> Turns {
    let [wanted, had] = [layout.voluntary, layout.involuntary].map(|at| fields.u64(at));
    Turns {
        count: wanted.wrapping_add(had),
        since: fields.u64(layout.since),
    }
}
