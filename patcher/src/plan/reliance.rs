//! Does any caller of a function rely on registers that the function happens not to change?
//!
//! A compiler that sees a function and its caller in one file may keep values of the caller in registers that any function may change, if that one does
//! not (`gcc -fipa-ra`). It does so in no file that it makes fentry sites in, and for no call through a pointer. So a function without fentry may
//! be replaced by another only if none of its direct callers does. What is not understood is taken for reliance.
//!
//! - What the function leaves alone: all caller-saved registers but those that it surely changes, in its own code or in what it calls.
//! - Of those no caller may read one behind the call before it is written: each way from there is followed, into what it calls where that
//!   is assembly, and where the caller returns, on in its own callers.

use std::collections::BTreeMap;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpKind, Register,
};

use super::program::{Function, ImageProgram, Kind, Program, branches};
use crate::addr::LinkAddr;
use crate::kernel::image::{Image, NotShipped};
use crate::x86::insn::has_near_target;
use crate::x86::registers::{Effect, Registers};

/// Most instructions that one question is followed over.
const INSTRUCTIONS: u32 = 20_000;
/// Most functions whose changes of registers are added up.
const CALLEES: usize = 64;
/// How deep calls of assembly are followed into, and returns to callers of callers.
const DEPTH: u32 = 4;

/// Who relies on what, as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reliance {
    /// Where the function, or one that ends by it, is called or jumped to.
    pub caller: LinkAddr,
    /// The registers concerned.
    pub registers: Registers,
    /// Where the answer was found, and what it is.
    pub at: LinkAddr,
    /// What is there.
    pub why: &'static str,
}

/// All direct callers of an image's functions.
#[derive(Debug)]
pub struct Callers<'a>(ImageProgram<'a>);

impl<'a> Callers<'a> {
    /// Finds them, in all code of `image`.
    ///
    /// # Errors
    /// When the image was recovered from memory.
    pub fn of(image: &'a Image) -> Result<Self, NotShipped> {
        ImageProgram::new(image).map(Self)
    }

    /// Shows that none of those of the function at `entry` relies on registers that it leaves alone.
    ///
    /// # Errors
    /// The first that does, or of which that cannot be told.
    pub fn none_relies(&self, entry: LinkAddr) -> Result<(), Reliance> {
        none_relies(&self.0, entry)
    }
}

/// As [`Callers::none_relies`].
fn none_relies(program: &impl Program, entry: LinkAddr) -> Result<(), Reliance> {
    let mut search = Search::new(program);
    let left = Registers::ALL.without(search.changed(entry));
    search.callers(entry, left, DEPTH)
}

/// Why a way was not followed to an end at which nobody relies.
struct Found {
    at: LinkAddr,
    registers: Registers,
    why: &'static str,
}

struct Search<'p, P> {
    program: &'p P,
    info: InstructionInfoFactory,
    budget: u32,
}

/// One instruction, and what is tracked before it.
struct Step<'a> {
    function: Function<'a>,
    instruction: Instruction,
    tracked: Registers,
}

/// Ways that are still to be followed, and what was tracked where they were taken before.
#[derive(Default)]
struct Ways {
    open: Vec<(LinkAddr, Registers)>,
    seen: BTreeMap<LinkAddr, Registers>,
    /// What was tracked at any return.
    returned: Registers,
}

impl Ways {
    fn add(&mut self, at: LinkAddr, tracked: Registers) {
        let seen = self.seen.entry(at).or_default();
        if !tracked.without(*seen).is_empty() {
            *seen = seen.or(tracked);
            self.open.push((at, *seen));
        }
    }
}

impl<'p, P: Program> Search<'p, P> {
    fn new(program: &'p P) -> Self {
        Self {
            program,
            info: InstructionInfoFactory::new(),
            budget: INSTRUCTIONS,
        }
    }

    /// Registers that the compiler surely takes for changed by the function at `entry`; there may be more.
    fn changed(&mut self, entry: LinkAddr) -> Registers {
        let (mut changed, mut open, mut seen) = (Registers::NONE, vec![entry], vec![entry]);
        while let Some(at) = open.pop() {
            let Some(function) = self
                .program
                .function(at)
                .filter(|function| function.entry == at)
            else {
                continue;
            };
            match function.kind {
                Kind::Plain(_) => {}
                // Of a function of another file the compiler takes all for changed.
                Kind::Traced(_) if at != entry => return Registers::ALL,
                Kind::IndirectThunk => return Registers::ALL,
                Kind::Traced(_)
                | Kind::Part { .. }
                | Kind::ReturnThunk
                | Kind::Padding
                | Kind::Unknown => continue,
            }
            for instruction in &mut Decoder::with_ip(64, function.code, at.0, DecoderOptions::NONE)
            {
                let range = LinkAddr(instruction.ip())..LinkAddr(instruction.next_ip());
                if instruction.is_invalid() {
                    break;
                }
                // What a paravirtual call or an alternative changes, its inline assembly says.
                if self.program.changes(&range) {
                    continue;
                }
                changed = changed.or(Effect::of(&instruction, &mut self.info).writes);
                if matches!(instruction.flow_control(), FlowControl::IndirectCall) {
                    return Registers::ALL;
                }
                let to = LinkAddr(instruction.near_branch_target());
                let leaves = has_near_target(&instruction) && !(at..function.end()).contains(&to);
                if leaves && seen.len() < CALLEES && !seen.contains(&to) {
                    seen.push(to);
                    open.push(to);
                }
            }
        }
        changed
    }

    /// Shows that no direct caller of `entry` relies on any register of `left`, which are those that it leaves alone.
    fn callers(&mut self, entry: LinkAddr, left: Registers, depth: u32) -> Result<(), Reliance> {
        if left.is_empty() {
            return Ok(());
        }
        for caller in self.program.branches_to(entry) {
            let relies = |found: Found| Reliance {
                caller,
                registers: found.registers,
                at: found.at,
                why: found.why,
            };
            let unknown = |why| {
                relies(Found {
                    at: caller,
                    registers: left,
                    why,
                })
            };
            let function = self
                .program
                .function(caller)
                .ok_or_else(|| unknown("no function is known there"))?;
            match branches(&function, caller, entry) {
                Some(true) => {}
                Some(false) => continue,
                None => return Err(unknown("it cannot be decoded")),
            }
            let home = self
                .home(&function)
                .ok_or_else(|| unknown("it is not known which function that is a part of"))?;
            if matches!(home.kind, Kind::Traced(_)) {
                continue;
            }
            let instruction = decode(&function, caller);
            let returned = match instruction.map(|instruction| instruction.flow_control()) {
                Some(FlowControl::Call) => {
                    let next =
                        instruction.map_or(caller, |instruction| LinkAddr(instruction.next_ip()));
                    self.follow(next, left, depth).map_err(relies)?
                }
                _ if home.entry == entry => continue,
                _ => left,
            };
            // What the caller changes anywhere, its own callers take for changed.
            let left = returned.without(self.changed(home.entry));
            if left.is_empty() {
                continue;
            }
            if depth == 0 || !matches!(home.kind, Kind::Plain(_)) {
                return Err(relies(Found {
                    at: caller,
                    registers: left,
                    why: "it returns with them, to callers that are not known",
                }));
            }
            self.callers(home.entry, left, depth - 1)?;
        }
        Ok(())
    }

    /// The function that `function` is or is a part of.
    fn home<'f>(&self, function: &Function<'f>) -> Option<Function<'f>>
    where
        'p: 'f,
    {
        match function.kind {
            Kind::Part { function } => self.program.function(function?),
            _ => Some(*function),
        }
    }

    /// Follows all ways from `start` until each register of `tracked` is written, and gives those that are not where they return.
    fn follow(
        &mut self,
        start: LinkAddr,
        tracked: Registers,
        depth: u32,
    ) -> Result<Registers, Found> {
        let mut ways = Ways::default();
        ways.add(start, tracked);
        while let Some((at, tracked)) = ways.open.pop() {
            self.step(at, tracked, depth, &mut ways)?;
        }
        Ok(ways.returned)
    }

    fn step(
        &mut self,
        at: LinkAddr,
        tracked: Registers,
        depth: u32,
        ways: &mut Ways,
    ) -> Result<(), Found> {
        let found = |registers, why| Found { at, registers, why };
        self.budget = self
            .budget
            .checked_sub(1)
            .ok_or_else(|| found(tracked, "too many ways lead on from there"))?;
        let function = self
            .program
            .function(at)
            .ok_or_else(|| found(tracked, "no function is known there"))?;
        if function.kind == Kind::Padding {
            return Ok(());
        }
        let instruction =
            decode(&function, at).ok_or_else(|| found(tracked, "it cannot be decoded"))?;
        let next = LinkAddr(instruction.next_ip());
        if self.program.changes(&(at..next)) {
            return Err(found(
                tracked,
                "the kernel changes that code, or goes elsewhere from there",
            ));
        }
        let effect = Effect::of(&instruction, &mut self.info);
        let read = effect.reads.and(tracked);
        if !read.is_empty() {
            return Err(found(read, "it reads them"));
        }
        let tracked = tracked.without(effect.replaces);
        let step = Step {
            function,
            instruction,
            tracked,
        };
        match instruction.flow_control() {
            FlowControl::Next => ways.add(next, tracked),
            FlowControl::ConditionalBranch => {
                ways.add(next, tracked);
                self.jump(&step, depth, ways)?;
            }
            FlowControl::UnconditionalBranch => self.jump(&step, depth, ways)?,
            FlowControl::Call => {
                let tracked = self.call(&step, depth)?;
                self.behind_call(&step, tracked, ways);
            }
            FlowControl::IndirectCall => {
                passes_nothing(&step)?;
                self.behind_call(&step, tracked, ways);
            }
            FlowControl::IndirectBranch
                if instruction.op0_kind() == OpKind::Memory
                    && instruction.memory_index() != Register::None =>
            {
                return Err(found(tracked, "it jumps through a table"));
            }
            FlowControl::IndirectBranch => {
                passes_nothing(&step)?;
                ways.returned = ways.returned.or(tracked);
            }
            FlowControl::Return if instruction.mnemonic() == iced_x86::Mnemonic::Ret => {
                ways.returned = ways.returned.or(tracked)
            }
            // A warning goes on behind it.
            FlowControl::Exception => self.behind_call(&step, tracked, ways),
            // A breakpoint: what is never come to.
            FlowControl::Interrupt if instruction.code() == iced_x86::Code::Int3 => {}
            _ if tracked.is_empty() => {}
            _ => return Err(found(tracked, "it leaves the kernel's own ways")),
        }
        Ok(())
    }

    /// Goes on behind something that may not come back: then the function may end there.
    fn behind_call(&self, step: &Step<'_>, tracked: Registers, ways: &mut Ways) {
        let next = LinkAddr(step.instruction.next_ip());
        if next < step.function.end() || step.function.kind == Kind::Unknown {
            ways.add(next, tracked);
        }
    }

    /// What is still tracked behind a call of what the instruction leads to.
    fn call(&mut self, step: &Step<'_>, depth: u32) -> Result<Registers, Found> {
        let (at, to) = (
            LinkAddr(step.instruction.ip()),
            LinkAddr(step.instruction.near_branch_target()),
        );
        let tracked = step.tracked;
        let found = |registers, why| Found { at, registers, why };
        if tracked.is_empty() {
            return Ok(tracked);
        }
        let callee = self
            .program
            .function(to)
            .ok_or_else(|| found(tracked, "no function is known where it leads"))?;
        match callee.kind {
            Kind::IndirectThunk => {
                passes_nothing(step)?;
                Ok(tracked)
            }
            Kind::Plain(arguments) if callee.entry == to => {
                let passed = tracked.and(arguments);
                if !passed.is_empty() {
                    return Err(found(passed, "it passes them on"));
                }
                Ok(tracked.without(self.changed(to)))
            }
            Kind::Traced(arguments) if callee.entry == to => {
                let passed = tracked.and(arguments);
                if !passed.is_empty() {
                    return Err(found(passed, "it passes them on"));
                }
                // Of another file: the compiler takes all for changed.
                Ok(Registers::NONE)
            }
            _ if depth == 0 => Err(found(tracked, "too many calls lead on from there")),
            _ => self
                .follow(to, tracked, depth - 1)
                .map_err(|inner| found(inner.registers, "what it calls may read them")),
        }
    }

    fn jump(&mut self, step: &Step<'_>, depth: u32, ways: &mut Ways) -> Result<(), Found> {
        let to = LinkAddr(step.instruction.near_branch_target());
        if step.tracked.is_empty() {
            return Ok(());
        }
        let target = self.program.function(to);
        match target.map(|target| {
            (
                target.kind,
                target.entry == to && target.entry != step.function.entry,
            )
        }) {
            Some((Kind::ReturnThunk, _)) => ways.returned = ways.returned.or(step.tracked),
            Some((Kind::IndirectThunk, _)) => {
                passes_nothing(step)?;
                ways.returned = ways.returned.or(step.tracked);
            }
            Some((Kind::Plain(_) | Kind::Traced(_), true)) => {
                let tracked = self.call(step, depth)?;
                ways.returned = ways.returned.or(tracked);
            }
            _ => ways.add(to, step.tracked),
        }
        Ok(())
    }
}

/// Nothing that is tracked may be an argument of what the instruction leads to, which may be any function.
fn passes_nothing(step: &Step<'_>) -> Result<(), Found> {
    let passed = step.tracked.and(Registers::PASSED);
    if passed.is_empty() {
        return Ok(());
    }
    Err(Found {
        at: LinkAddr(step.instruction.ip()),
        registers: passed,
        why: "it may pass them on, to what it finds through a pointer",
    })
}

/// The instruction at `at`, which is among the code of `function`.
fn decode(function: &Function<'_>, at: LinkAddr) -> Option<Instruction> {
    let offset = usize::try_from(at.offset_from(function.entry)?).ok()?;
    let mut decoder =
        Decoder::with_ip(64, function.code.get(offset..)?, at.0, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

#[cfg(test)]
mod tests;
