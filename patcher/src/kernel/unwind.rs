//! The stacks of all threads, frame by frame: each reliable to its end, or unreliable with the reason and the place. Never a best effort.
//!
//! A sleeping task is followed from what it saved when it stopped running, a vCPU from its registers, over exception and interrupt stacks
//! down to its task's. A frame is believed only if an unwind table describes its code, if a call lies before its return address,
//! and if it lies further up than the one before; and a stack only if it ends where stacks end. The word scan of
//! [`super::stack`] knows nothing of all this: the two check each other.

pub(crate) mod bpf;
pub(crate) mod call;
pub(crate) mod code;
pub(crate) mod known;
pub(crate) mod layout;
pub(crate) mod live;
pub(crate) mod module;
pub mod reason;
pub(crate) mod taken;
pub(crate) mod walk;

use std::collections::HashSet;

use self::code::Code;
pub use self::code::OtherCode;
pub use self::reason::{Reason, Region, Unreliable};
use self::taken::Taken;
use self::walk::Walker;
use super::layout::LayoutError;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::orc::OrcError;
use super::running::in_kernel;
use super::stack::Who;
use super::tasks::{Rest, Task, Tasks};
use crate::addr::Gva;
use crate::guest::{ReadPhys, Vcpu, VcpuState};

/// How a frame came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// A vCPU is here.
    Runs,
    /// It waits for a call to return here.
    Call,
    /// It was interrupted here.
    Interrupted,
    /// It will begin here.
    Begins,
}

/// One place in the code of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it goes on.
    pub ip: Gva,
    /// How it came about.
    pub via: Via,
    /// Where on a stack that is written; `None` for a vCPU's register.
    pub at: Option<Gva>,
}

/// Where a reliable stack ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At a user's registers.
    User,
    /// In code on the way from or to the user, beneath which nothing of the kernel is.
    Entry,
    /// At a task's first function.
    First,
}

/// One thread's stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Whose it is.
    pub who: Who,
    /// The task whose stack was come to, by its index in [`Tasks::tasks`].
    pub task: Option<usize>,
    /// From the innermost out. Of an unreliable stack they are those before the reason.
    pub frames: Vec<Frame>,
    /// Where it ends, or why that cannot be told.
    pub end: Result<End, Unreliable>,
}

/// All stacks of a guest, at one moment.
#[derive(Clone, Debug)]
pub struct Stacks {
    /// The tasks and CPUs.
    pub tasks: Tasks,
    /// The stacks: of vCPUs by index, of tasks that do not run, and of no task.
    pub stacks: Vec<Stack>,
    /// Bytes of the guest's memory that were read for it, page tables not counted.
    pub bytes_read: u64,
}

/// Why no stack can be unwound.
#[derive(Debug, thiserror::Error)]
pub enum UnwindError {
    /// The kernel's unwind table cannot be used.
    #[error(transparent)]
    Orc(#[from] OrcError),
    /// The kernel lacks what unwinding needs.
    #[error("the kernel's stacks cannot be unwound: {cause}")]
    Layout {
        /// What is missing.
        cause: String,
    },
    /// The guest's tasks cannot be read. They may have been in motion.
    #[error("the guest's tasks cannot be read: {0}")]
    Kernel(#[from] KernelError),
}

/// Follows every stack of the guest, which must stand still. `others` is code outside the image that threads may be in.
///
/// # Errors
/// When the kernel has no unwind table, or its tasks cannot be read. That a stack is unreliable is no error here.
pub fn stacks<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    vcpus: &[Vcpu],
    others: &[OtherCode],
) -> Result<Stacks, UnwindError> {
    let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
    let tasks = Tasks::read_from(kernel, &memory)?;
    let mut stacks = Vec::new();
    let mut followed = Followed::new(kernel, &memory, &tasks, others)?;
    followed.all(vcpus, &mut |whose, frames, end| {
        stacks.push(Stack {
            who: whose.who(&tasks),
            task: whose.task(),
            frames: frames.to_vec(),
            end,
        });
    });
    let bytes_read = memory.bytes_read();
    Ok(Stacks {
        tasks,
        stacks,
        bytes_read,
    })
}

/// Whose stack was followed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whose {
    /// A vCPU's, and the index of the task that its stack is of.
    Vcpu(usize, Option<usize>),
    /// That of the task of this index, which does not run.
    Task(usize),
    Unowned,
}

impl Whose {
    pub(crate) fn who(self, tasks: &Tasks) -> Who {
        match self {
            Self::Vcpu(index, _) => Who::Vcpu(index),
            Self::Task(index) => match tasks.tasks.get(index) {
                Some(task) => Who::of(task),
                None => Who::Unowned,
            },
            Self::Unowned => Who::Unowned,
        }
    }

    pub(crate) fn task(self) -> Option<usize> {
        match self {
            Self::Vcpu(_, task) => task,
            Self::Task(index) => Some(index),
            Self::Unowned => None,
        }
    }
}

/// Takes a stack that has been followed: its frames as far as they are known, and its end.
pub(crate) type Sink<'s> = &'s mut dyn FnMut(Whose, &[Frame], Result<End, Unreliable>);

/// Stacks as they are followed, of a guest whose tasks have just been read.
pub(crate) struct Followed<'a, R: ?Sized> {
    walker: Walker<'a, R>,
    tasks: &'a Tasks,
    frames: Vec<Frame>,
    /// Starts of those that a vCPU is on.
    live: HashSet<Gva>,
    /// The tasks, by index, that are still current on CPUs whose vCPU is on the stack of the next one already.
    left: HashSet<usize>,
}

impl<'a, R: ReadPhys + ?Sized> Followed<'a, R> {
    /// None of them yet. `others` is code outside the image that threads may be in.
    pub(crate) fn new(
        kernel: &'a Kernel,
        memory: &'a Memory<'a, R>,
        tasks: &'a Tasks,
        others: &'a [OtherCode],
    ) -> Result<Self, UnwindError> {
        let table = kernel.image().orc().map_err(Clone::clone)?;
        let missing = |error: &LayoutError| UnwindError::Layout {
            cause: error.to_string(),
        };
        let layout = kernel.layout().unwind.as_ref().map_err(missing)?;
        let entry = &kernel.layout().entry_text;
        let entry = kernel.runtime(entry.start)..kernel.runtime(entry.end);
        let taken = Taken {
            kernel,
            memory,
            layout,
        };
        let code = Code::new(table, others, taken);
        Ok(Self {
            walker: Walker::new(code, memory, layout, tasks, entry),
            tasks,
            frames: Vec::new(),
            live: HashSet::new(),
            left: HashSet::new(),
        })
    }

    /// Follows every stack but those of tasks that have rested.
    pub(crate) fn all(&mut self, vcpus: &[Vcpu], sink: Sink<'_>) {
        self.vcpus(vcpus, sink);
        self.sleepers(sink);
        self.unowned(sink);
    }

    /// The frames of the task of `index`, which does not run, if its stack can be followed to its end.
    pub(crate) fn of_sleeper(&mut self, index: usize, task: &Task) -> Option<&[Frame]> {
        self.frames.clear();
        let followed =
            task.stack.is_empty() || self.walker.sleeping(index, task, &mut self.frames).is_ok();
        followed.then_some(&self.frames)
    }

    fn vcpus(&mut self, vcpus: &[Vcpu], sink: Sink<'_>) {
        let started = vcpus
            .iter()
            .enumerate()
            .filter(|(_, vcpu)| vcpu.state != VcpuState::Offline);
        for (index, vcpu) in started {
            let (mut end, mut task) = (Ok(End::User), None);
            self.frames.clear();
            if in_kernel(vcpu) {
                end = self.walker.running(vcpu, &mut self.frames);
                task = self.walker.task();
                if self.walker.on_stack_of_another() {
                    self.left.extend(left_by(self.tasks, vcpu));
                }
                let mut visited = self.walker.visited().iter();
                if visited.any(|start| !self.live.insert(*start)) {
                    end = Err(Unreliable {
                        ip: Gva(vcpu.rip),
                        sp: Gva(vcpu.rsp()),
                        reason: Reason::Shared,
                    });
                }
            }
            sink(Whose::Vcpu(index, task), &self.frames, end);
        }
    }

    fn sleepers(&mut self, sink: Sink<'_>) {
        let tasks = self.tasks.tasks.iter().enumerate();
        for (index, task) in tasks.filter(|(_, task)| task.rest == Rest::Unknown) {
            // A current task that no vCPU was found on is in the user's code, or has just been left for the next one.
            let asleep = task.cpu.is_none() || self.left.contains(&index);
            if !asleep || task.stack.is_empty() || self.live.contains(&task.stack.start) {
                continue;
            }
            self.frames.clear();
            let end = self.walker.sleeping(index, task, &mut self.frames);
            sink(Whose::Task(index), &self.frames, end);
        }
    }

    fn unowned(&self, sink: Sink<'_>) {
        for stack in &self.tasks.unowned {
            if !self.live.contains(&stack.start) {
                let reason = Reason::Unowned;
                let (ip, sp) = (Gva(0), stack.start);
                sink(Whose::Unowned, &[], Err(Unreliable { ip, sp, reason }));
            }
        }
    }
}

/// The task that `vcpu` has left for the next one, by its index; each that is current anywhere if it cannot be told on which CPU it was.
fn left_by(tasks: &Tasks, vcpu: &Vcpu) -> Vec<usize> {
    let on = tasks.cpus.iter().find(|cpu| cpu.gs_base == vcpu.gs_base);
    let current = tasks.tasks.iter().enumerate().filter(|(_, task)| {
        let cpu = task.cpu;
        cpu.is_some() && on.is_none_or(|on| cpu == Some(on.index))
    });
    current.map(|(index, _)| index).collect()
}

impl Frame {
    /// The frame as the guest's kernel prints it: function, distance from its start, and its size, in hexadecimal. An address
    /// outside the kernel's image is given as it is.
    #[must_use]
    pub fn describe(&self, kernel: &Kernel) -> String {
        // A call may be the last instruction of its function, which it belongs to though it returns behind it.
        let back = u64::from(matches!(self.via, Via::Call));
        let link = kernel.link(Gva(self.ip.0.wrapping_sub(back)));
        match link.and_then(|link| kernel.image().symbols().containing(link)) {
            Some((symbol, offset)) => {
                format!("{}+{:#x}/{:#x}", symbol.name, offset + back, symbol.size)
            }
            None => self.ip.to_string(),
        }
    }
}

#[cfg(test)]
mod bpf_tests;
#[cfg(test)]
mod taken_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vcpu_tests;
