//! From one frame to the next, as the unwind table says, to the end of the stack.
//!
//! It ends at a user's registers at the top of a stack, in entry code that was interrupted before (or after) the kernel
//! proper, or near the top of a task's stack, where its first function was called from. Follows kernel
//! `arch/x86/kernel/unwind_orc.c` in what the tables mean, and is stricter in what it believes.

use std::ops::Range;

use super::code::{Code, SWITCH};
use super::known::Owner;
use super::layout::{RegistersLayout, UnwindLayout};
use super::live::Live;
use super::reason::{Reason, Unreliable};
use super::{End, Frame, Via};
use crate::addr::{Gva, LinkAddr};
use crate::guest::{ReadPhys, Vcpu};
use crate::kernel::memory::Memory;
use crate::kernel::orc::{Base, Content, FramePointer, Orc};
use crate::kernel::tasks::{Hidden, Task, Tasks};

/// More frames than fit the stacks of one CPU and a task.
const MAX_FRAMES: usize = 8192;
/// Bytes that newer kernels leave free above the user's registers.
const PADDING: u64 = 16;
/// Bytes between the user's registers and the frame of a task's first function, at most: what it was started with.
const FIRST_FRAME: u64 = 128;

/// Registers that a caller may be found by, while their values are known.
#[derive(Clone, Copy, Debug)]
struct Scratch {
    r10: u64,
    r13: u64,
    di: u64,
    dx: u64,
    ax: u64,
}

/// A place in the code of a thread, and the rule that holds there.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    ip: Gva,
    sp: Gva,
    bp: u64,
    rule: Orc,
    /// It was interrupted there, as opposed to waiting for a call to return.
    interrupted: bool,
    scratch: Option<Scratch>,
}

/// Follows stacks of one guest, while it stands still.
pub(crate) struct Walker<'a, R: ?Sized> {
    pub(crate) code: Code<'a, R>,
    pub(crate) layout: &'a UnwindLayout,
    pub(crate) tasks: &'a Tasks,
    pub(crate) entry_text: Range<Gva>,
    live: Live<'a, R>,
    /// The task that sleeps, when it is one; else any that runs.
    sleeper: Option<usize>,
}

/// What comes after a frame.
enum Next {
    Caller(Cursor, Frame),
    End(End),
}

impl<'a, R: ReadPhys + ?Sized> Walker<'a, R> {
    pub(crate) fn new(
        code: Code<'a, R>,
        memory: &'a Memory<'a, R>,
        layout: &'a UnwindLayout,
        tasks: &'a Tasks,
        entry_text: Range<Gva>,
    ) -> Self {
        Self {
            code,
            layout,
            tasks,
            entry_text,
            live: Live::new(memory, tasks),
            sleeper: None,
        }
    }

    /// The stacks that the last walk went through, by their lowest addresses.
    pub(crate) fn visited(&self) -> &[Gva] {
        self.live.visited()
    }

    /// The task on whose stack the last walk ended.
    pub(crate) fn task(&self) -> Option<usize> {
        match self.live.owner()? {
            Owner::Task(index) => Some(index),
            _ => None,
        }
    }

    /// Whether the last walk ended on the stack of a task that no CPU takes for its own.
    pub(crate) fn on_stack_of_another(&self) -> bool {
        match self.live.owner() {
            Some(Owner::Task(index)) => self
                .tasks
                .tasks
                .get(index)
                .is_some_and(|task| task.cpu.is_none()),
            Some(Owner::Nobody) => true,
            _ => false,
        }
    }

    /// Follows the stack of the task of `index`, which does not run.
    pub(crate) fn sleeping(
        &mut self,
        index: usize,
        task: &Task,
        frames: &mut Vec<Frame>,
    ) -> Result<End, Unreliable> {
        self.start(Some(index));
        let inactive = self.layout.inactive;
        let begin = self.sleeper_begins(task);
        let unreliable = |reason| Unreliable {
            ip: Gva(0),
            sp: task.saved_sp,
            reason,
        };
        let (ip, slot, bp) = begin.map_err(unreliable)?;
        let sp = Gva(task.saved_sp.0.wrapping_add(inactive.size));
        let interrupted = self.begins(ip);
        let rule = self.rule(ip, slot, interrupted).map_err(unreliable)?;
        let via = if interrupted { Via::Begins } else { Via::Call };
        frames.push(Frame {
            ip,
            via,
            at: Some(slot),
        });
        self.follow(
            Cursor {
                ip,
                sp,
                bp,
                rule,
                interrupted,
                scratch: None,
            },
            frames,
        )
    }

    /// Where a task that does not run goes on, where that is saved, and its frame pointer.
    fn sleeper_begins(&mut self, task: &Task) -> Result<(Gva, Gva, u64), Reason> {
        let at = task.saved_sp;
        if !task.stack.contains(&at) {
            return Err(Reason::OffStack);
        }
        self.live.go_beneath(at)?;
        let slot = Gva(at.0.wrapping_add(self.layout.inactive.ret));
        let ip = Gva(self.live.word(slot)?);
        let bp = self
            .live
            .word(Gva(at.0.wrapping_add(self.layout.inactive.bp)))?;
        Ok((ip, slot, bp))
    }

    /// Follows the stacks of a vCPU that is in the kernel.
    pub(crate) fn running(
        &mut self,
        vcpu: &Vcpu,
        frames: &mut Vec<Frame>,
    ) -> Result<End, Unreliable> {
        self.start(None);
        let (ip, sp) = (Gva(vcpu.rip), Gva(vcpu.rsp()));
        let unreliable = |reason| Unreliable { ip, sp, reason };
        let ip = self.interrupted_at(ip, sp).map_err(unreliable)?;
        let [ax, _, dx, _, _, bp, _, di, _, _, r10, _, _, r13, _, _] = vcpu.gpr;
        let scratch = Some(Scratch {
            r10,
            r13,
            di,
            dx,
            ax,
        });
        let (rule, sp) = self.stopped(ip, sp, scratch).map_err(unreliable)?;
        frames.push(Frame {
            ip,
            via: Via::Runs,
            at: None,
        });
        if rule == Orc::End && self.entry_text.contains(&ip) {
            // The stack pointer may be a user's, who could have chosen one in any stack: it is not even looked at.
            return Ok(End::Entry);
        }
        self.follow(
            Cursor {
                ip,
                sp,
                bp,
                rule,
                interrupted: true,
                scratch,
            },
            frames,
        )
    }

    fn start(&mut self, sleeper: Option<usize>) {
        self.live.leave();
        self.sleeper = sleeper;
    }

    fn follow(&mut self, mut cursor: Cursor, frames: &mut Vec<Frame>) -> Result<End, Unreliable> {
        for _ in 0..MAX_FRAMES {
            let unreliable = |reason| Unreliable {
                ip: cursor.ip,
                sp: cursor.sp,
                reason,
            };
            match self.next(&cursor).map_err(unreliable)? {
                Next::End(end) => return Ok(end),
                Next::Caller(caller, frame) => {
                    frames.push(frame);
                    cursor = caller;
                }
            }
        }
        Err(Unreliable {
            ip: cursor.ip,
            sp: cursor.sp,
            reason: Reason::TooDeep,
        })
    }

    fn next(&mut self, cursor: &Cursor) -> Result<Next, Reason> {
        if self.code.taken.is_returning(cursor.ip) {
            return self.diverted(cursor);
        }
        let (base, offset, bp, content, signal) = match cursor.rule {
            Orc::Undefined => return Err(Reason::Undefined { at: cursor.ip }),
            Orc::End => return self.end(cursor).map(Next::End),
            Orc::Caller {
                base,
                offset,
                bp,
                content,
                signal,
            } => (base, offset, bp, content, signal),
        };
        self.live.go_beneath(cursor.sp)?;
        let stack = self.live.current().map(|known| known.range.start);
        let at = self.base(cursor, base, offset.into())?;
        let whole = content == Content::Registers;
        let (mut caller, frame) = match content {
            Content::Call => self.return_address(cursor, at, signal)?,
            Content::Registers | Content::ProcessorFrame => {
                match self.registers(cursor, at, whole)? {
                    Some(interrupted) => interrupted,
                    None => return Ok(Next::End(End::User)),
                }
            }
        };
        match bp {
            FramePointer::Kept => {}
            FramePointer::FromCallerSp(offset) => {
                caller.bp = self
                    .live
                    .word(Gva(at.0.wrapping_add_signed(offset.into())))?;
            }
            FramePointer::FromBp(offset) => {
                caller.bp = self
                    .live
                    .word(Gva(cursor.bp.wrapping_add_signed(offset.into())))?;
            }
        }
        let known = self
            .live
            .current()
            .filter(|known| Some(known.range.start) == stack);
        let stays = known
            .is_some_and(|known| known.range.start <= caller.sp && caller.sp <= known.range.end);
        if stays && caller.sp <= cursor.sp {
            return Err(Reason::NoProgress { to: caller.sp });
        }
        Ok(Next::Caller(caller, frame))
    }

    /// Where the caller's frame ends, or the saved registers begin.
    fn base(&mut self, cursor: &Cursor, base: Base, offset: i64) -> Result<Gva, Reason> {
        let scratch = |register, of: fn(&Scratch) -> u64| {
            cursor
                .scratch
                .as_ref()
                .map(of)
                .ok_or(Reason::Register { register })
        };
        let value = match base {
            Base::Sp => cursor.sp.0.wrapping_add_signed(offset),
            Base::Bp => cursor.bp.wrapping_add_signed(offset),
            Base::AtSp => {
                let beneath = Gva(self.live.word(cursor.sp)?);
                self.live.go_beneath(beneath)?;
                beneath.0.wrapping_add_signed(offset)
            }
            Base::AtBp => self.live.word(Gva(cursor.bp.wrapping_add_signed(offset)))?,
            Base::R10 => scratch("r10", |registers| registers.r10)?,
            Base::R13 => scratch("r13", |registers| registers.r13)?,
            Base::Di => scratch("rdi", |registers| registers.di)?,
            Base::Dx => scratch("rdx", |registers| registers.dx)?,
        };
        Ok(Gva(value))
    }

    /// The caller of a function that returns to the word below `at`.
    fn return_address(
        &mut self,
        cursor: &Cursor,
        at: Gva,
        signal: bool,
    ) -> Result<(Cursor, Frame), Reason> {
        let slot = Gva(at.0.wrapping_sub(8));
        let found = Gva(self.live.word(slot)?);
        let ip = self.given_back(found, slot)?;
        // The switch to a task that has never run returns to where it begins.
        let signal = signal || self.begins(ip);
        self.caller(cursor, ip, slot, signal)
    }

    /// The frame that goes on at `ip`, whose place on the stack is `slot`: after a call, or at its beginning.
    fn caller(
        &self,
        cursor: &Cursor,
        ip: Gva,
        slot: Gva,
        begins: bool,
    ) -> Result<(Cursor, Frame), Reason> {
        let caller = Cursor {
            ip,
            sp: Gva(slot.0.wrapping_add(8)),
            bp: cursor.bp,
            rule: self.rule(ip, slot, begins)?,
            interrupted: begins,
            scratch: None,
        };
        let via = if begins { Via::Begins } else { Via::Call };
        let at = Some(slot);
        Ok((caller, Frame { ip, via, at }))
    }

    /// The caller of a function whose return the function graph tracer handles at the cursor's place.
    fn diverted(&mut self, cursor: &Cursor) -> Result<Next, Reason> {
        self.live.go_beneath(cursor.sp)?;
        let owners = self.owners();
        let (slot, ip) = (self.code.taken).returning_to(&owners, cursor.ip, cursor.sp)?;
        let (caller, frame) = self.caller(cursor, ip, slot, false)?;
        if caller.sp < cursor.sp {
            return Err(Reason::NoProgress { to: caller.sp });
        }
        Ok(Next::Caller(caller, frame))
    }

    /// What was interrupted, by its registers at `at`, of which the processor pushed some or the kernel `whole`; `None` for a user.
    fn registers(
        &mut self,
        cursor: &Cursor,
        at: Gva,
        whole: bool,
    ) -> Result<Option<(Cursor, Frame)>, Reason> {
        let RegistersLayout {
            ip,
            cs,
            sp,
            ss,
            bp,
            r10,
            r13,
            di,
            dx,
            ax,
            size,
        } = self.layout.registers;
        let start = if whole {
            at
        } else {
            Gva(at.0.wrapping_sub(ip))
        };
        let of = |offset: u64| Gva(start.0.wrapping_add(offset));
        let aside = matches!(
            cursor.rule,
            Orc::Caller {
                base: Base::Di | Base::Dx,
                ..
            }
        ) && !self.live.is_on(start);
        if aside {
            self.live.look_aside(of(ip))?;
        }
        let segment = self.live.word(of(cs))?;
        match segment & 3 {
            0 if aside => return Err(Reason::Order { at: of(cs) }),
            0 => {}
            3 => {
                return self
                    .came_from_user(of(if whole { size } else { ss + 8 }))
                    .map(|()| None);
            }
            _ => {
                return Err(Reason::Privilege {
                    at: of(cs),
                    value: segment,
                });
            }
        }
        let slot = of(ip);
        let (found, sp) = (Gva(self.live.word(slot)?), Gva(self.live.word(of(sp))?));
        // Where the processor alone has pushed, all other registers are still what they were.
        let (bp, scratch) = if whole {
            let scratch = Scratch {
                r10: self.live.word(of(r10))?,
                r13: self.live.word(of(r13))?,
                di: self.live.word(of(di))?,
                dx: self.live.word(of(dx))?,
                ax: self.live.word(of(ax))?,
            };
            (self.live.word(of(bp))?, Some(scratch))
        } else {
            (cursor.bp, cursor.scratch)
        };
        let ip = self.interrupted_at(found, sp)?;
        let (rule, sp) = self.stopped(ip, sp, scratch)?;
        let frame = Frame {
            ip,
            via: Via::Interrupted,
            at: Some(slot),
        };
        Ok(Some((
            Cursor {
                ip,
                sp,
                bp,
                rule,
                interrupted: true,
                scratch,
            },
            frame,
        )))
    }

    /// Checks that a user's registers, which end at `end`, are where they belong: on a task's stack at its top.
    fn came_from_user(&self, end: Gva) -> Result<(), Reason> {
        let misplaced = Reason::Misplaced { end };
        let known = self.live.current().ok_or_else(|| misplaced.clone())?;
        let above = known
            .range
            .end
            .offset_from(end)
            .ok_or_else(|| misplaced.clone())?;
        match known.owner.is_task() {
            true if above != 0 && above != PADDING => Err(misplaced),
            _ => Ok(()),
        }
    }

    /// Checks that a stack ends here.
    fn end(&mut self, cursor: &Cursor) -> Result<End, Reason> {
        if cursor.interrupted && self.sleeper.is_none() && self.entry_text.contains(&cursor.ip) {
            return Ok(End::Entry);
        }
        self.live.go_beneath(cursor.sp)?;
        // Only where tasks begin may a stack end at an instruction: elsewhere the table means that it does not know.
        let link = LinkAddr(cursor.ip.0.wrapping_sub(self.code.taken.kernel.slide()));
        let known_to_end = !cursor.interrupted || self.layout.forked.contains(&link);
        if known_to_end && self.at_top(cursor.sp) {
            return Ok(End::First);
        }
        let end = self.live.current().map_or(Gva(0), |known| known.range.end);
        Err(Reason::EndsEarly { at: cursor.ip, end })
    }

    /// Whether a task that has never run begins at `ip`.
    fn begins(&self, ip: Gva) -> bool {
        ip == self.code.taken.kernel.runtime(self.layout.forked.start)
    }

    /// Whether `sp` is where the first frame of a task begins, on the stack that is being followed.
    fn at_top(&self, sp: Gva) -> bool {
        let Some(known) = self.live.current().filter(|known| known.owner.is_task()) else {
            return false;
        };
        let above = known.range.end.offset_from(sp);
        above.is_some_and(|above| above <= self.layout.registers.size + PADDING + FIRST_FRAME)
    }

    /// The rule and the stack pointer that hold where code was interrupted. Entry code is told by a call which stack to go on with: until it has
    /// switched to it, the table has the rule of before that call, which does not know what the call has pushed.
    fn stopped(&self, ip: Gva, sp: Gva, scratch: Option<Scratch>) -> Result<(Orc, Gva), Reason> {
        if self.entry_text.contains(&ip) && self.code.switches_stack(ip)? {
            let unknown = Reason::Register { register: "rax" };
            let scratch = scratch.ok_or(unknown)?;
            let behind = Gva(ip.0.wrapping_add(SWITCH.len() as u64));
            return Ok((self.code.interrupted(behind)?, Gva(scratch.ax)));
        }
        Ok((self.code.interrupted(ip)?, sp))
    }

    fn rule(&self, ip: Gva, slot: Gva, interrupted: bool) -> Result<Orc, Reason> {
        if interrupted {
            self.code.interrupted(ip)
        } else {
            self.code.calling(ip, slot)
        }
    }

    /// Where code was interrupted: just after a return that a tracer diverted, that is where it should have returned to.
    fn interrupted_at(&self, ip: Gva, sp: Gva) -> Result<Gva, Reason> {
        self.given_back(ip, Gva(sp.0.wrapping_sub(8)))
    }

    fn given_back(&self, value: Gva, slot: Gva) -> Result<Gva, Reason> {
        self.code.taken.given_back(&self.owners(), value, slot)
    }

    /// What tracers keep for the tasks that the stack may be of.
    fn owners(&self) -> impl Iterator<Item = &'a Hidden> + Clone + use<'a, R> {
        let (on_it, sleeper) = (self.task(), self.sleeper);
        let own = move |index: &usize, task: &Task| match sleeper {
            Some(sleeper) => *index == sleeper,
            None => task.cpu.is_some() || Some(*index) == on_it,
        };
        let owners = self.tasks.tasks.iter().enumerate();
        let owners = owners.filter(move |(index, task)| own(index, task));
        owners.map(|(_, task): (_, &Task)| -> &Hidden { &task.hidden })
    }
}
