//! Tasks whose stacks were looked through while the guest ran, found to be in nothing that must be free, and that have not run since: under
//! the pause nobody has to look at those again. Those in the code of a group are still in it then.
//!
//! A task that stops running is counted first (`nvcsw`, `nivcsw`) and let go last (`on_cpu`; kernel `kernel/sched/core.c`, `__schedule()` and
//! `finish_task()`). So one that was found let go *after* its count was read, and whose stack was read after that, had stopped for good with that
//! count or a higher one. If it has the same one under the pause, is no CPU's current task, and no vCPU is on its stack, it has not run in
//! between: its stack is as it was read. What was read in motion is never believed: it does not fit, and the task is looked at again.
//! Which tasks there are is asked of the kernel's lists again only if one has come or gone (`census`).

use std::ops::Range;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use super::census::Census;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::quiescence::{Inside, Question};
use super::stack::{ScanError, Scanner, Who};
use super::tasks::{Reading, Rest, Task, Tasks, by_stack, places};
use super::unwind::{Followed, Frame, OtherCode};
use super::vmap;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// Tasks ahead among which the next one is looked for, before all are: lists change little between two looks.
const AHEAD: usize = 8;

/// All tasks as a first look found them.
#[derive(Clone, Debug, Default)]
pub struct Rested {
    /// The count of tasks before it, if that can be told.
    census: Option<Census>,
    /// Those that the kernel's lists show, in that order.
    pub(crate) listed: Vec<Task>,
    /// Those that only CPUs show.
    pub(crate) beyond: Vec<Task>,
    /// Where the listed ones are, sorted, and the index of each.
    pub(crate) places: Vec<(Gva, usize)>,
    /// Where their stacks begin, sorted, and the index of each that has one.
    pub(crate) by_stack: Vec<(Gva, usize)>,
    /// Those that are in the group's code.
    inside: Vec<Inside>,
    /// The descriptions of areas that are mapped like stacks, in the order of their list.
    areas: Vec<Gva>,
}

impl Rested {
    /// Looks at every task of the running guest that is at rest, for a look under a pause with the same `question`. What cannot be read now is left
    /// to that, and so is what is left of them `until` then.
    ///
    /// # Errors
    /// When the tasks cannot be listed, or no stack of the kernel can be followed.
    pub fn look<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        guest: &R,
        question: &Question<'_>,
        others: &[OtherCode],
        until: Instant,
    ) -> Result<Self, ScanError> {
        if kernel.layout().task.turns.is_none() {
            return Ok(Self::default());
        }
        let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
        let census = Census::take(kernel, &memory)?;
        let mut all = Tasks::listed(kernel, &memory, Self::default())?;
        // Counts are read before it is asked who was let go.
        fence(Ordering::Acquire);
        let inside = note_rest(kernel, &memory, &mut all, question, others, until)?;
        // Who is on a CPU is asked again.
        for task in &mut all.tasks {
            task.cpu = None;
        }
        let areas = vmap::areas(kernel, &memory, &[])?;
        let mut listed = all.tasks;
        let beyond = listed.split_off(all.in_lists.min(listed.len()));
        let rested = Self {
            census,
            places: places(listed.iter().map(|task| task.at)),
            by_stack: by_stack(&listed),
            listed,
            beyond,
            inside,
            areas: areas.iter().map(|area| area.at).collect(),
        };
        // Once as it will be done under the pause: what is read there is near then.
        drop(Tasks::read_beside(kernel, &memory, rested.clone()));
        Ok(rested)
    }

    /// Whether a task has come or gone since, or is about to, as far as the kernel counts them.
    ///
    /// # Errors
    /// When the counts cannot be read.
    pub fn is_outdated<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<bool, KernelError> {
        let memory = Memory::new(kernel, guest)?;
        Ok(kernel.layout().census.is_some() && !self.has_all(kernel, &memory)?)
    }

    /// Whether its tasks are known to be all that there are now.
    ///
    /// # Errors
    /// When the kernel's counts cannot be read.
    pub(crate) fn has_all<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        memory: &Memory<'_, R>,
    ) -> Result<bool, KernelError> {
        match self.census {
            Some(census) => Ok(Census::take(kernel, memory)? == Some(census)),
            None => Ok(false),
        }
    }

    /// The descriptions of areas that are mapped like stacks, in the order in which they were found.
    pub(crate) fn take_areas(&mut self) -> Vec<Gva> {
        std::mem::take(&mut self.areas)
    }

    /// Those that were found in the group's code.
    pub(crate) fn take_inside(&mut self) -> Vec<Inside> {
        std::mem::take(&mut self.inside)
    }

    /// What is known of tasks, for a walk through the kernel's lists.
    pub(crate) fn recall(&self) -> Recall<'_> {
        Recall {
            rested: self,
            next: 0,
        }
    }
}

/// Notes of each of `all` tasks that is at rest where it is, unless something speaks against what is asked. Returns who is in the group.
fn note_rest<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    all: &mut Tasks,
    question: &Question<'_>,
    others: &[OtherCode],
    until: Instant,
) -> Result<Vec<Inside>, ScanError> {
    let Some(layout) = &kernel.layout().task.turns else {
        return Ok(Vec::new());
    };
    let asked = [question.forbidden, question.watched].concat();
    let is_in = |code: &[Range<Gva>], frames: &[Frame]| {
        let mut frames = frames.iter();
        frames.any(|frame| code.iter().any(|range| range.contains(&frame.ip)))
    };
    let mut scanner = Scanner::new(kernel, memory, (&asked, &[]), &mut []);
    let mut followed = Followed::new(kernel, memory, all, others)?;
    let mut reading = Reading::new(kernel, memory);
    let (mut inside, mut rested) = (Vec::new(), Vec::new());
    let asleep = all.tasks.iter().enumerate();
    for (index, task) in asleep.filter(|(_, task)| task.cpu.is_none()) {
        if Instant::now() >= until {
            break;
        }
        let let_go = memory.u32(Gva(task.at.0.wrapping_add(layout.on_cpu)));
        if !let_go.is_ok_and(|on_cpu| on_cpu == 0) {
            continue;
        }
        // And everything else behind that.
        fence(Ordering::Acquire);
        let Ok(task) = reading.task(task.at, task.turns) else {
            continue;
        };
        // Of who is dead the stack is taken away without another turn.
        let exit = memory.u32(Gva(task.at.0.wrapping_add(layout.exit_state)));
        if !exit.is_ok_and(|exit| exit == 0) {
            continue;
        }
        if scanner.task(&task, Some(task.saved_sp)).is_err() {
            continue;
        }
        let frames = followed.of_sleeper(index, &task);
        let Some(frames) = frames.filter(|frames| !is_in(&asked, frames)) else {
            continue;
        };
        let rest = if is_in(question.group, frames) {
            inside.push(Inside {
                task: Some(task.at),
                who: Who::of(&task),
                frames: frames.to_vec(),
                unreliable: None,
            });
            Rest::Inside(inside.len() - 1)
        } else {
            Rest::Outside
        };
        rested.push((index, Task { rest, ..task }));
    }
    for (index, task) in rested {
        if let Some(known) = all.tasks.get_mut(index) {
            *known = task;
        }
    }
    Ok(inside)
}

/// What is known of tasks, as they are come to in the kernel's lists.
pub(crate) struct Recall<'a> {
    rested: &'a Rested,
    next: usize,
}

impl<'a> Recall<'a> {
    /// The task at `at`, if there was one.
    pub(crate) fn task(&mut self, at: Gva) -> Option<&'a Task> {
        let Rested { listed, places, .. } = self.rested;
        let ahead = listed.iter().skip(self.next).take(AHEAD);
        let ahead = ahead.enumerate().find(|(_, task)| task.at == at);
        let index = match ahead {
            Some((distance, _)) => self.next + distance,
            None => {
                let place = places.binary_search_by_key(&at, |(at, _)| *at).ok()?;
                places.get(place)?.1
            }
        };
        self.next = index + 1;
        listed.get(index)
    }
}

#[cfg(test)]
mod tests;
