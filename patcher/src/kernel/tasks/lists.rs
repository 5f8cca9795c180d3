//! The kernel's lists of tasks: that of the processes, and that of the threads of each.
//!
//! Sources: kernel `include/linux/sched/signal.h` (`for_each_process()`, `for_each_thread()`).

use super::members::{places, turns};
use super::{Task, Turns};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::ahead::Ahead;
use crate::kernel::gather::{Bound, Gather};
use crate::kernel::layout::TaskLayout;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;

/// More tasks than any guest that is still worth updating has.
const MAX_TASKS: usize = 1 << 17;

/// Where a task is, and which turns it has had.
pub(super) type Member = (Gva, Option<Turns>);

/// Where tasks are, sorted, with the index of each.
type Places = Vec<(Gva, usize)>;

/// All tasks that the lists show, each once; and where they are, sorted, with the index of each. They were found in the order of `before` at an earlier look.
///
/// # Errors
/// When a list does not end, or cannot be read.
pub(super) fn members<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    before: &[Task],
) -> Result<(Vec<Member>, Places), KernelError> {
    let layout = &kernel.layout().task;
    let order: Vec<Gva> = before.iter().map(|task| task.at).collect();
    let links = links(layout);
    let mut walk = Walk {
        layout,
        memory,
        links: Ahead::new(&links, &order),
        members: Vec::with_capacity(order.len()),
    };
    walk.all(kernel.runtime(layout.init_task))?;
    let mut members = walk.members;
    let places = once(&mut members);
    Ok((members, places))
}

/// Leaves in `members` each once, where it is first. Returns where they are, sorted, with the index of each.
fn once(members: &mut Vec<Member>) -> Places {
    let known = places(members.iter().map(|(at, _)| *at));
    let again = known.windows(2).filter_map(|pair| match pair {
        [(first, _), (second, index)] if first == second => Some(*index),
        _ => None,
    });
    let mut again: Vec<usize> = again.collect();
    if again.is_empty() {
        return known;
    }
    again.sort_unstable();
    let mut index = 0;
    members.retain(|_| {
        index += 1;
        again.binary_search(&(index - 1)).is_err()
    });
    places(members.iter().map(|(at, _)| *at))
}

/// What is read of every task: the way to the next ones, and how often it has stopped.
fn links(layout: &TaskLayout) -> Gather {
    let mut fields = vec![
        (layout.tasks, 8),
        (layout.thread_node, 8),
        (layout.signal, 8),
    ];
    if let Some(turns) = &layout.turns {
        fields.extend(turns.fields());
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

/// A walk through the lists.
struct Walk<'a, R: ?Sized> {
    layout: &'a TaskLayout,
    memory: &'a Memory<'a, R>,
    links: Ahead<'a>,
    members: Vec<Member>,
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

    fn links(&mut self, at: Gva) -> Result<Links, KernelError> {
        let (layout, fields) = (self.layout, self.links.read(self.memory, at)?);
        Ok(Links {
            next_process: fields.u64(layout.tasks),
            next_thread: fields.u64(layout.thread_node),
            signal: fields.u64(layout.signal),
            turns: layout.turns.as_ref().map(|layout| turns(layout, fields)),
        })
    }

    fn push(&mut self, at: Gva, turns: Option<Turns>) -> Result<(), KernelError> {
        if self.members.len() >= MAX_TASKS {
            return Err(KernelError::Unsound {
                what: "number of tasks",
                at,
                value: MAX_TASKS as u64,
            });
        }
        self.members.push((at, turns));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::once;
    use crate::addr::Gva;

    #[test]
    fn members_that_several_lists_have_are_left_in_once() {
        for (all, want) in [
            (&[][..], &[][..]),
            (&[3, 1, 2], &[3, 1, 2]),
            (&[3, 1, 3, 2, 1, 3], &[3, 1, 2]),
        ] {
            let mut members = all.iter().map(|at| (Gva(*at), None)).collect();
            let places = once(&mut members);
            let left: Vec<u64> = members.iter().map(|(at, _)| at.0).collect();
            assert_eq!(left, want);
            assert!(places.iter().all(|(at, index)| members[*index].0 == *at));
            assert_eq!(places.len(), want.len());
        }
    }
}
