//! Whether anything in the guest is inside given code, or will return into it.
//!
//! Every word of the live part of every kernel stack is looked at, from the stack pointer up. That finds each return address and each
//! interrupted instruction pointer, and more than those: it can refuse too often, never too seldom. Also looked at
//! are the registers of vCPUs in the kernel, and the return addresses that the guest's tracers keep elsewhere.
//!
//! A running task's stack pointer is its vCPU's, or is found at the top of the interrupt and exception stacks that
//! lie over it (kernel `arch/x86/include/asm/irq_stack.h`; Intel SDM vol. 3A, 6.14.2). A stack pointer in none of the
//! known places is [`ScanError::Unreliable`]. The user's registers at the top of a task's stack are left out: a user
//! could put any value there.

use std::ops::Range;

use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::running::{Running, running};
use super::tasks::{Hidden, Rest, Task, Tasks};
use super::unwind::{Unreliable, UnwindError};
use crate::addr::Gva;
use crate::guest::{ReadPhys, Vcpu};

/// More return addresses than any tracer keeps of one task, in bytes.
const MAX_HIDDEN: u64 = 1 << 16;
/// More probes than return through one task at a time.
const MAX_PROBES: usize = 4096;

/// What was looked at, and found to be outside the forbidden code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Tasks.
    pub tasks: usize,
    /// Stacks that belong to no task.
    pub unowned_stacks: usize,
    /// Words of stacks.
    pub words: u64,
    /// Frames of stacks, where they were looked at too.
    pub frames: u64,
    /// Bytes of the guest's memory that were read for it, page tables not counted.
    pub bytes_read: u64,
}

/// Whose stack it is, or whose register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A vCPU's own registers.
    Vcpu(usize),
    /// A task's stack.
    Task {
        /// Its thread id.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// An interrupt, exception or entry stack, on which this vCPU is.
    CpuStack(usize),
    /// A stack of no known task.
    Unowned,
}

impl Who {
    /// Names `task`.
    pub(crate) fn of(task: &Task) -> Self {
        Self::Task {
            pid: task.pid,
            name: task.name(),
        }
    }
}

/// Something is inside the forbidden code, or may return into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Whose it is.
    pub who: Who,
    /// Where the word is; `None` for a register.
    pub at: Option<Gva>,
    /// The word: an address in the forbidden code.
    pub value: Gva,
}

/// Why the code cannot be called free.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// Something is in it. It may be out of it a moment later.
    #[error("{} is in code that is to be changed, at {}", .0.who, .0.value)]
    Hit(Hit),
    /// A vCPU is where its stack cannot be told. That passes.
    #[error(
        "where vCPU {vcpu} is cannot be told: {why} (instruction pointer {rip}, stack pointer {sp})"
    )]
    Unreliable {
        /// The vCPU.
        vcpu: usize,
        /// Its instruction pointer, or that of the code that it interrupted.
        rip: Gva,
        /// The stack pointer that is in no known stack.
        sp: Gva,
        /// What is wrong.
        why: &'static str,
    },
    /// A stack cannot be followed to its end. That may pass.
    #[error("the stack of {who} cannot be followed: {cause}")]
    Stack {
        /// Whose it is.
        who: Who,
        /// Where and why following it ended.
        cause: Unreliable,
    },
    /// A frame is in the code, though no word is.
    #[error(
        "{who} is in code that is to be changed, at {value}, by its frames but not by the words of its stack"
    )]
    Disagree {
        /// Whose frame it is.
        who: Who,
        /// The address.
        value: Gva,
    },
    /// The kernel's stacks cannot be unwound.
    #[error(transparent)]
    Unwind(#[from] UnwindError),
    /// The guest's tasks or stacks could not be read. They may have been in motion.
    #[error("the guest's stacks cannot be read: {0}")]
    Kernel(#[from] KernelError),
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vcpu(index) => write!(f, "vCPU {index}"),
            Self::Task { pid, name } => write!(f, "task {pid} ({name})"),
            Self::CpuStack(index) => write!(f, "an interrupt or exception on vCPU {index}"),
            Self::Unowned => f.write_str("a stack of no known task"),
        }
    }
}

/// Looks for anything that is inside `forbidden` in the paused guest. Unaligned words are not looked at: the kernel pushes none.
///
/// # Errors
/// [`ScanError::Hit`] when something is, and when that cannot be told.
pub fn stack_words<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    vcpus: &[Vcpu],
    forbidden: &[Range<Gva>],
) -> Result<Scan, ScanError> {
    let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
    let tasks = Tasks::read_from(kernel, &memory)?;
    let running = on_stacks(kernel, &memory, vcpus, &tasks)?;
    let mut scanner = Scanner::new(kernel, &memory, (forbidden, &[]), &mut []);
    scanner.all(vcpus, &tasks, &running)
}

/// On which stacks the vCPUs of a guest are whose `tasks` have just been read.
pub(crate) fn on_stacks<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    vcpus: &[Vcpu],
    tasks: &Tasks,
) -> Result<Running, ScanError> {
    let entry = &kernel.layout().entry_text;
    let entry = kernel.runtime(entry.start)..kernel.runtime(entry.end);
    let word = |at: Gva| memory.u64(at).map_err(KernelError::from);
    running(&entry, &word, vcpus, tasks)
}

/// Code of which it is asked whether anything is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// The code.
    pub code: Range<Gva>,
    /// Who is in it, the first that was found.
    pub by: Option<Who>,
}

impl Watched {
    /// Asks about `code`.
    #[must_use]
    pub fn new(code: Range<Gva>) -> Self {
        Self { code, by: None }
    }

    /// Notes that `who` is in it.
    pub(crate) fn note(&mut self, who: impl FnOnce() -> Who) {
        self.by.get_or_insert_with(who);
    }
}

/// Looks through words of the kernel's memory for addresses in given code.
pub(crate) struct Scanner<'a, R: ?Sized> {
    kernel: &'a Kernel,
    memory: &'a Memory<'a, R>,
    forbidden: &'a [Range<Gva>],
    /// What is forbidden too where nobody is known to be.
    group: &'a [Range<Gva>],
    watched: &'a mut [Watched],
    /// The stacks of known tasks are done.
    unowned: bool,
    /// From the lowest to the highest address that is asked about: most words are outside.
    around: Range<u64>,
    count: u64,
    buf: Vec<u8>,
}

impl<'a, R: ReadPhys + ?Sized> Scanner<'a, R> {
    /// A scanner for `forbidden` code; the second part is so on stacks of no known task alone. What is inside `watched` code is no error: it is
    /// noted there.
    pub(crate) fn new(
        kernel: &'a Kernel,
        memory: &'a Memory<'a, R>,
        (forbidden, group): (&'a [Range<Gva>], &'a [Range<Gva>]),
        watched: &'a mut [Watched],
    ) -> Self {
        let asked = || {
            let watched = watched.iter().map(|watched| &watched.code);
            forbidden.iter().chain(group).chain(watched)
        };
        let first = asked().map(|range| range.start.0).min().unwrap_or(0);
        let last = asked().map(|range| range.end.0).max().unwrap_or(0);
        Self {
            kernel,
            memory,
            forbidden,
            group,
            watched,
            unowned: false,
            around: first..last,
            count: 0,
            buf: Vec::new(),
        }
    }

    /// Looks at the registers and every stack of a guest that stands still, but for those of tasks that have rested.
    pub(crate) fn all(
        &mut self,
        vcpus: &[Vcpu],
        tasks: &Tasks,
        running: &Running,
    ) -> Result<Scan, ScanError> {
        self.registers(vcpus)?;
        for (vcpu, stack) in &running.stacks {
            self.words(stack.clone(), || Who::CpuStack(*vcpu))?;
        }
        for (index, task) in tasks.tasks.iter().enumerate() {
            if task.rest == Rest::Unknown || running.is_on(index) {
                self.task(task, running.live_from(index, task))?;
            }
        }
        self.unowned = true;
        for stack in &tasks.unowned {
            self.words(stack.clone(), || Who::Unowned)?;
        }
        Ok(Scan {
            tasks: tasks.tasks.len(),
            unowned_stacks: tasks.unowned.len(),
            words: self.count,
            frames: 0,
            bytes_read: self.memory.bytes_read(),
        })
    }

    fn check(
        &mut self,
        value: u64,
        at: Option<Gva>,
        who: impl FnOnce() -> Who,
    ) -> Result<(), ScanError> {
        let value = Gva(value);
        if !self.around.contains(&value.0) {
            return Ok(());
        }
        let inside = |range: &Range<Gva>| range.contains(&value);
        if self.forbidden.iter().any(inside) || (self.unowned && self.group.iter().any(inside)) {
            return Err(ScanError::Hit(Hit {
                who: who(),
                at,
                value,
            }));
        }
        let watched = self.watched.iter_mut();
        if let Some(watched) = watched.into_iter().find(|watched| inside(&watched.code)) {
            watched.note(who);
        }
        Ok(())
    }

    /// The registers of vCPUs in the kernel: returning code may hold its destination in one.
    fn registers(&mut self, vcpus: &[Vcpu]) -> Result<(), ScanError> {
        let started = vcpus
            .iter()
            .enumerate()
            .filter(|(_, vcpu)| super::running::in_kernel(vcpu));
        for (index, vcpu) in started {
            for value in vcpu.gpr.iter().chain([&vcpu.rip]) {
                self.check(*value, None, || Who::Vcpu(index))?;
            }
        }
        Ok(())
    }

    /// The stack of `task`, live from `from` up, and what tracers keep for it.
    pub(crate) fn task(&mut self, task: &Task, from: Option<Gva>) -> Result<(), ScanError> {
        let who = || Who::of(task);
        if let Some(sp) = from {
            let end = Gva(task
                .stack
                .end
                .0
                .saturating_sub(self.kernel.layout().user_registers));
            if !task.stack.is_empty() {
                let outside = sp < task.stack.start || sp > task.stack.end;
                if outside {
                    let what = "saved stack pointer";
                    return Err(KernelError::Unsound {
                        what,
                        at: task.at,
                        value: sp.0,
                    }
                    .into());
                }
                self.words(sp..end, who)?;
            }
        }
        self.hidden(&task.hidden, who)
    }

    /// Every word in `stack`.
    fn words(&mut self, stack: Range<Gva>, who: impl Fn() -> Who) -> Result<(), ScanError> {
        let start = Gva(stack.start.0 & !7);
        let len = stack
            .end
            .offset_from(start)
            .and_then(|len| usize::try_from(len).ok())
            .unwrap_or(0);
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(len, 0);
        self.memory
            .read(start, &mut buf)
            .map_err(KernelError::from)?;
        for (index, word) in buf.as_chunks::<8>().0.iter().enumerate() {
            let value = u64::from_le_bytes(*word);
            if self.around.contains(&value) {
                self.check(value, start.checked_add(index as u64 * 8), &who)?;
            }
        }
        self.count += (len / 8) as u64;
        self.buf = buf;
        Ok(())
    }

    /// Return addresses that tracers took from the task's stack.
    fn hidden(&mut self, hidden: &Hidden, who: impl Fn() -> Who) -> Result<(), ScanError> {
        let (entries, len) = hidden.graph;
        if entries != 0 && len != 0 {
            let entries = Gva(entries);
            let unsound = || KernelError::Unsound {
                what: "stack of traced returns",
                at: entries,
                value: len,
            };
            let range = (len <= MAX_HIDDEN)
                .then(|| entries.range(len))
                .flatten()
                .ok_or_else(unsound)?;
            self.words(range, &who)?;
        }
        let Some(layout) = self.kernel.layout().task.rethook.as_ref() else {
            return Ok(());
        };
        let mut node = hidden.rethook;
        let mut left = MAX_PROBES;
        while node != 0 {
            let unsound = KernelError::Unsound {
                what: "list of return probes",
                at: Gva(node),
                value: node,
            };
            left = left.checked_sub(1).ok_or(unsound)?;
            let at = Gva(node.wrapping_sub(layout.link).wrapping_add(layout.address));
            let value = self.memory.u64(at).map_err(KernelError::from)?;
            self.check(value, Some(at), &who)?;
            node = self.memory.u64(Gva(node)).map_err(KernelError::from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
