//! On which stacks the vCPUs are, and from where up those are live.
//!
//! From a vCPU in the kernel its stacks are followed down to its task: an interrupt stack keeps at its top the stack
//! pointer that it interrupted, an exception stack keeps there what the processor pushed. A vCPU in the user's code, or in entry code
//! while still (or again) on the user's stack pointer, is on no kernel stack at all.

use std::collections::HashMap;
use std::ops::Range;

use super::locate::KernelError;
use super::stack::ScanError;
use super::tasks::{Task, Tasks};
use crate::addr::Gva;
use crate::guest::{Vcpu, VcpuState};

/// Task, interrupt, and each of the exception stacks once; more is no chain that a kernel makes.
const MAX_CHAIN: usize = 8;
/// Where the processor's frame has the code segment, the instruction pointer and the stack pointer, below a stack's top.
const FRAME_CS: u64 = 32;
const FRAME_RIP: u64 = 40;
const FRAME_SP: u64 = 16;
/// The lowest address that is the kernel's, with four or five levels.
const KERNEL_HALF: u64 = 1 << 63;

/// Where the vCPUs are.
#[derive(Debug, Default)]
pub(crate) struct Running {
    /// The live parts of interrupt, exception and entry stacks, with the vCPU that is on them.
    pub(crate) stacks: Vec<(usize, Range<Gva>)>,
    /// The lowest live address of a task's stack, by the task's index.
    reached: HashMap<usize, Gva>,
    /// A vCPU is on the stack of a task that is not (yet) its CPU's current one.
    switching: bool,
}

impl Running {
    /// Whether a vCPU is on the stack of the task of this index.
    pub(crate) fn is_on(&self, index: usize) -> bool {
        self.reached.contains_key(&index)
    }

    /// From where up the stack of `task` is live; `None` when nothing of it is.
    pub(crate) fn live_from(&self, index: usize, task: &Task) -> Option<Gva> {
        match (self.reached.get(&index), task.cpu) {
            (Some(sp), Some(_)) => Some(*sp),
            // Not current, and yet a stack pointer is in it: it is being switched to, or a user chose that value.
            (Some(sp), None) => Some(task.saved_sp.min(*sp)),
            (None, None) => Some(task.saved_sp),
            // Its vCPU is in the user's code, or has just left its stack for that of the next task.
            (None, Some(_)) => self.switching.then_some(task.saved_sp),
        }
    }
}

/// Whether `vcpu` can be on a kernel stack.
pub(crate) fn in_kernel(vcpu: &Vcpu) -> bool {
    vcpu.state != VcpuState::Offline && vcpu.cpl < 3
}

/// Where a vCPU was before what it does now.
#[derive(Clone, Copy)]
struct Context {
    vcpu: usize,
    rip: Gva,
    sp: Gva,
}

impl Context {
    fn unreliable(&self, why: &'static str) -> ScanError {
        ScanError::Unreliable {
            vcpu: self.vcpu,
            rip: self.rip,
            sp: self.sp,
            why,
        }
    }
}

/// Reads a word of the guest's memory.
pub(crate) type ReadWord<'a> = &'a dyn Fn(Gva) -> Result<u64, KernelError>;

/// Finds out on which stacks `vcpus` are. `entry_text` is the code between the user and the kernel proper.
pub(crate) fn running(
    entry_text: &Range<Gva>,
    word: ReadWord<'_>,
    vcpus: &[Vcpu],
    tasks: &Tasks,
) -> Result<Running, ScanError> {
    let mut chain = Chain {
        entry_text,
        word,
        tasks,
        running: Running::default(),
    };
    // vCPUs that are on no task's stack: as many current tasks may have nothing live.
    let mut without = 0;
    for (index, vcpu) in vcpus
        .iter()
        .enumerate()
        .filter(|(_, vcpu)| vcpu.state != VcpuState::Offline)
    {
        let context = Context {
            vcpu: index,
            rip: Gva(vcpu.rip),
            sp: Gva(vcpu.rsp()),
        };
        if !in_kernel(vcpu) || !chain.follow(context)? {
            without += 1;
        }
    }
    let running = chain.running;
    let current = tasks
        .tasks
        .iter()
        .enumerate()
        .filter(|(_, task)| task.cpu.is_some());
    let unreached = current
        .filter(|(index, _)| !running.reached.contains_key(index))
        .count();
    if !running.switching && unreached > without {
        let none = Context {
            vcpu: vcpus.len(),
            rip: Gva(0),
            sp: Gva(0),
        };
        return Err(none.unreliable("more tasks run than vCPUs could be running them"));
    }
    Ok(running)
}

struct Chain<'a> {
    entry_text: &'a Range<Gva>,
    word: ReadWord<'a>,
    tasks: &'a Tasks,
    running: Running,
}

impl Chain<'_> {
    /// Follows a vCPU's stacks down from `context`, and says whether they end on a task's.
    fn follow(&mut self, mut context: Context) -> Result<bool, ScanError> {
        for _ in 0..MAX_CHAIN {
            if let Some(index) = self.task_at(context.sp) {
                self.reach(index, context.sp);
                return Ok(true);
            }
            if self
                .tasks
                .unowned
                .iter()
                .any(|stack| holds(stack, context.sp))
            {
                // Scanned whole in any case; its task is on its way in or out.
                self.running.switching = true;
                return Ok(true);
            }
            let below = self.cpu_stack(context)?;
            let Some(next) = below else { return Ok(false) };
            context = next;
        }
        Err(context.unreliable("its stacks do not end"))
    }

    fn reach(&mut self, index: usize, sp: Gva) {
        let lowest = self.running.reached.entry(index).or_insert(sp);
        *lowest = sp.min(*lowest);
        let current = self
            .tasks
            .tasks
            .get(index)
            .is_some_and(|task| task.cpu.is_some());
        self.running.switching |= !current;
    }

    fn task_at(&self, sp: Gva) -> Option<usize> {
        let stacks = &self.tasks.by_stack;
        let after = stacks.partition_point(|(start, _)| *start <= sp);
        let (_, index) = *stacks.get(after.checked_sub(1)?)?;
        let stack = &self.tasks.tasks.get(index)?.stack;
        holds(stack, sp).then_some(index)
    }

    /// Notes the interrupt, exception or entry stack that `context` is on; `Some` is what was interrupted beneath it.
    fn cpu_stack(&mut self, context: Context) -> Result<Option<Context>, ScanError> {
        let sp = context.sp;
        for cpu in &self.tasks.cpus {
            if holds(&cpu.irq_stack, sp) {
                self.running
                    .stacks
                    .push((context.vcpu, sp..cpu.irq_stack.end));
                let saved = self.below(context, cpu.irq_stack.end, 8)?;
                return Ok(Some(Context {
                    sp: saved,
                    ..context
                }));
            }
            if let Some(stack) = cpu.exception_stacks.iter().find(|stack| holds(stack, sp)) {
                self.running.stacks.push((context.vcpu, sp..stack.end));
                if self.below(context, stack.end, FRAME_CS)?.0 & 3 == 3 {
                    return Ok(None);
                }
                let rip = self.below(context, stack.end, FRAME_RIP)?;
                let sp = self.below(context, stack.end, FRAME_SP)?;
                return Ok(Some(Context { rip, sp, ..context }));
            }
            if holds(&cpu.entry_stack, sp) {
                // From or to the user: the task's stack is empty.
                self.running
                    .stacks
                    .push((context.vcpu, sp..cpu.entry_stack.end));
                return Ok(None);
            }
        }
        if sp.0 < KERNEL_HALF && self.entry_text.contains(&context.rip) {
            return Ok(None);
        }
        Err(context.unreliable("its stack pointer is in no stack of the kernel"))
    }

    /// The word that lies `distance` below `top`, which must still be above the stack pointer.
    fn below(&self, context: Context, top: Gva, distance: u64) -> Result<Gva, ScanError> {
        let at = top.checked_sub(distance).filter(|at| *at >= context.sp);
        let at = at.ok_or_else(|| context.unreliable("its stack is empty"))?;
        Ok(Gva((self.word)(at)?))
    }
}

/// Whether a stack pointer of `sp` means this stack; that of an empty one is its end.
fn holds(stack: &Range<Gva>, sp: Gva) -> bool {
    stack.start <= sp && sp <= stack.end && !stack.is_empty()
}
