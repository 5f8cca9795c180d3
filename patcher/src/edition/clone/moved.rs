//! The code of a clone: each instruction of the original, copied, with what it reaches relative to itself re-aimed.
//!
//! Branches grow only where a short one does not reach any more. Where the original would run on past its end, the clone goes on there by a jump.

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::{ConstantOffsets, FlowControl, Instruction, Mnemonic};

use super::flags;
use super::original::{Original, Part, StaticBranch};
use super::refused::{Reason, Refused};
use crate::addr::Gva;
use crate::edition::reloc::Kind;
use crate::x86::insn;

mod step;

/// Alignment of each part, in bytes: that of the kernel's own functions.
pub(super) const ALIGN: u64 = 16;
/// What fills gaps: `int3`.
pub(super) const GAP: u8 = 0xcc;
/// `cmp dword [rip + distance], 0`, and the conditional jump behind it.
const TEST: [u8; 7] = [0x83, 0x3d, 0, 0, 0, 0, 0];
const JUMP_ABOVE: [u8; 6] = [0x0f, 0x8f, 0, 0, 0, 0];
const JUMP_AT_MOST: [u8; 6] = [0x0f, 0x8e, 0, 0, 0, 0];
const JUMP: [u8; 5] = [0xe9, 0, 0, 0, 0];

/// Where something leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// To this offset of the clone, and to this place in the original.
    Here(u64, Gva),
    /// To this place of the running kernel.
    There(Gva),
}

/// Where a branch leads, before anything has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dest {
    /// To the step of this number.
    Step(usize),
    /// Out of the function.
    Out(Gva),
}

/// What is done with an instruction.
#[derive(Debug)]
pub(super) enum What {
    /// It is copied, with what it reaches re-aimed.
    Plain(Instruction),
    /// It leads elsewhere by a distance of its own.
    Branch(Instruction),
    /// A static branch becomes a test of its key.
    Test(StaticBranch),
    /// The original goes on behind its end.
    On(Gva),
}

/// One instruction of the original, and where it goes.
#[derive(Debug)]
pub(super) struct Step<'a> {
    at: Gva,
    bytes: &'a [u8],
    constants: ConstantOffsets,
    pub(super) what: What,
    pub(super) dest: Option<Dest>,
    long: bool,
    /// Its offset in the clone, and its bytes there.
    new: u64,
    size: u64,
}

/// All instructions of a function, part by part.
pub(super) struct Steps<'a> {
    pub(super) all: Vec<Step<'a>>,
    /// The steps of each part, and where the part is.
    parts: Vec<(Range<usize>, Range<Gva>)>,
    by_address: HashMap<Gva, usize>,
    original: &'a Original,
}

/// A part of a clone.
#[derive(Debug)]
pub(super) struct MovedPart {
    /// The name of the original's part.
    pub(super) name: String,
    /// Where it is in the clone.
    pub(super) range: Range<u64>,
    /// From which offset on what holds that held at a place of the original.
    pub(super) rules: Vec<(u64, Gva)>,
}

/// A relocation: an offset in the code, how, to what, and the constant added.
pub(super) type Aim = (usize, Kind, To, i64);

/// A clone.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) code: Vec<u8>,
    pub(super) relocations: Vec<Aim>,
    pub(super) parts: Vec<MovedPart>,
    places: HashMap<Gva, u64>,
    /// Where fixups that lie out of the function are jumped to from.
    outer: HashMap<Gva, u64>,
}

/// Whether control never goes on to the next instruction.
pub(super) fn leaves(instruction: &Instruction) -> bool {
    use FlowControl::{IndirectBranch, Return, UnconditionalBranch};
    matches!(
        instruction.flow_control(),
        Return | IndirectBranch | UnconditionalBranch
    )
}

impl Moved {
    /// The clone of `original`.
    pub(super) fn of(original: &Original) -> Result<Self, Refused> {
        let mut steps = Steps::decode(original)?;
        steps.aim()?;
        steps.lay_out()?;
        let mut moved = Self {
            code: Vec::new(),
            relocations: Vec::new(),
            parts: Vec::new(),
            places: HashMap::new(),
            outer: HashMap::new(),
        };
        for (part, (range, _)) in original.parts.iter().zip(&steps.parts) {
            moved.part(&steps, part, range.clone())?;
        }
        for (at, step) in &steps.by_address {
            let new = steps.all.get(*step).map_or(0, |step| step.new);
            moved.places.insert(*at, new);
        }
        moved.jumps_out(&steps);
        Ok(moved)
    }

    /// Where the instruction is that was at `at`; `None` when none was.
    pub(super) fn instruction(&self, at: Gva) -> Option<u64> {
        self.places.get(&at).copied()
    }

    /// Where the instruction at `at` goes on after a fault, where it went on at `to`.
    pub(super) fn fixup(&self, original: &Original, at: Gva, to: Gva) -> Result<To, Refused> {
        let place = self.places.get(&to).or_else(|| self.outer.get(&to));
        place
            .map(|place| To::Here(*place, to))
            .ok_or_else(|| Refused {
                function: original.name.clone(),
                at,
                reason: Reason::Middle { to },
            })
    }

    fn part(&mut self, steps: &Steps<'_>, part: &Part, range: Range<usize>) -> Result<(), Refused> {
        let own = steps.all.get(range).unwrap_or_default();
        let start = own.first().map_or(0, |step| step.new);
        self.code.resize(usize::try_from(start).unwrap_or(0), GAP);
        let mut rules = Vec::new();
        for step in own {
            step.emit(steps, part, self)?;
            match step.what {
                // A rule may change within the bytes of an instruction that took the place of several.
                What::Plain(_) => {
                    rules.extend((0..step.size).map(|at| (step.new + at, Gva(step.at.0 + at))))
                }
                What::Branch(_) | What::Test(_) | What::On(_) => rules.push((step.new, step.at)),
            }
        }
        self.parts.push(MovedPart {
            name: part.name.clone(),
            range: start..self.code.len() as u64,
            rules,
        });
        Ok(())
    }

    /// Adds a jump to each fixup that lies out of the function: the kernel looks for fixups only where the instruction is.
    fn jumps_out(&mut self, steps: &Steps<'_>) {
        let faults = steps.original.parts.iter().flat_map(|part| &part.faults);
        let faults = faults.filter(|fault| self.places.contains_key(&fault.at));
        let mut outside: Vec<Gva> = faults
            .flat_map(|fault| fault.leads.iter().map(|(_, to)| *to))
            .filter(|to| !steps.is_inside(*to))
            .collect();
        outside.sort_unstable();
        outside.dedup();
        for to in outside {
            let at = self.code.len();
            self.code.extend(JUMP);
            self.relocations
                .push((at + 1, Kind::Pc32, To::There(to), -4));
            self.outer.insert(to, at as u64);
            if let Some(part) = self.parts.last_mut() {
                part.rules.push((at as u64, to));
                part.range.end = self.code.len() as u64;
            }
        }
    }

    fn put(&mut self, field: usize, distance: i64) {
        let bytes = i32::try_from(distance).unwrap_or_default().to_le_bytes();
        if let Some(room) = self.code.get_mut(field..field + 4) {
            room.copy_from_slice(&bytes);
        }
    }

    /// Aims the four bytes at `field`, with `behind` bytes of their instruction behind them, at `dest`.
    fn lead(&mut self, steps: &Steps<'_>, field: usize, behind: usize, dest: Dest) {
        let after = field + 4 + behind;
        match dest {
            Dest::Step(step) => {
                let new = steps.all.get(step).map_or(0, |step| step.new);
                self.put(field, new.cast_signed() - signed(after));
            }
            Dest::Out(at) => {
                let addend = signed(field) - signed(after);
                self.relocations
                    .push((field, Kind::Pc32, To::There(at), addend));
            }
        }
    }
}

impl<'a> Steps<'a> {
    fn refused(&self, at: Gva, reason: impl Into<Reason>) -> Refused {
        refused(self.original, at, reason)
    }

    /// Cuts the original into instructions.
    fn decode(original: &'a Original) -> Result<Self, Refused> {
        let mut steps = Self {
            all: Vec::new(),
            parts: Vec::new(),
            by_address: HashMap::new(),
            original,
        };
        for part in &original.parts {
            let first = steps.all.len();
            let mut offset = 0;
            while offset < part.code.len() {
                let step = step::step(original, part, offset)?;
                offset += step.bytes.len();
                steps.all.push(step);
            }
            steps.end(first);
            for (number, step) in steps.all.iter().enumerate().skip(first) {
                if !matches!(step.what, What::On(_)) {
                    steps.by_address.insert(step.at, number);
                }
            }
            let end = steps.all.last().map_or(Gva(part.at), Step::end);
            steps
                .parts
                .push((first..steps.all.len(), Gva(part.at)..end));
        }
        Ok(steps)
    }

    /// Takes the padding from the end of the part that begins with step `first`, and has it go on where it would.
    fn end(&mut self, first: usize) {
        let padding = |step: &Step<'_>| match &step.what {
            What::Plain(it) => matches!(it.mnemonic(), Mnemonic::Int3 | Mnemonic::Nop),
            _ => false,
        };
        let own = self.all.get(first..).unwrap_or_default();
        let padded = own.iter().rev().take_while(|step| padding(step)).count();
        let leaves = own
            .iter()
            .rev()
            .nth(padded)
            .is_some_and(|last| match &last.what {
                What::Plain(it) | What::Branch(it) => leaves(it),
                What::Test(_) | What::On(_) => false,
            });
        // Nothing leads to padding behind what leaves.
        if leaves {
            self.all.truncate(self.all.len() - padded);
        }
        let Some(last) = self.all.last() else { return };
        if !leaves {
            let at = last.end();
            self.all.push(Step {
                at,
                bytes: &[],
                constants: ConstantOffsets::default(),
                what: What::On(at),
                dest: Some(Dest::Out(at)),
                long: true,
                new: 0,
                size: 0,
            });
        }
    }

    fn is_inside(&self, at: Gva) -> bool {
        self.parts.iter().any(|(_, part)| part.contains(&at))
    }

    /// Where something at `from` leads that led to `to`.
    fn dest(&self, from: Gva, to: Gva) -> Result<Dest, Refused> {
        match self.by_address.get(&to) {
            Some(step) => Ok(Dest::Step(*step)),
            None if self.is_inside(to) => Err(self.refused(from, Reason::Middle { to })),
            None => Ok(Dest::Out(to)),
        }
    }

    /// Finds where all branches lead, and refuses what cannot be moved.
    fn aim(&mut self) -> Result<(), Refused> {
        let first = self.original.parts.first().map_or(0, |part| part.at);
        let mut dests = Vec::with_capacity(self.all.len());
        for step in &self.all {
            dests.push(match &step.what {
                What::Plain(_) => None,
                // It goes by way of the original's beginning, which decides who answers.
                What::Branch(it) if it.is_call_near() && it.near_branch_target() == first => {
                    Some(Dest::Out(Gva(first)))
                }
                What::Branch(it) => Some(self.dest(step.at, Gva(it.near_branch_target()))?),
                What::Test(branch) => Some(self.dest(step.at, branch.to)?),
                What::On(to) => Some(self.dest(step.at, *to)?),
            });
        }
        for (step, dest) in self.all.iter_mut().zip(dests) {
            step.dest = dest;
        }
        for (number, step) in self.all.iter().enumerate() {
            let test = matches!(step.what, What::Test(_));
            if let Some(needs) = test.then(|| flags::needed(self, number)).flatten() {
                let (at, text) = (Gva(needs.ip()), insn::disassemble(needs));
                return Err(self.refused(step.at, Reason::Flags { at, text }));
            }
        }
        Ok(())
    }

    /// Gives each step its offset; a short branch that does not reach grows.
    fn lay_out(&mut self) -> Result<(), Refused> {
        loop {
            let mut offset = 0_u64;
            for (range, _) in &self.parts {
                offset = offset.next_multiple_of(ALIGN);
                for step in self.all.get_mut(range.clone()).unwrap_or_default() {
                    step.new = offset;
                    step.size = step.size();
                    offset += step.size;
                }
            }
            let reaches = |step: &Step<'_>| match step.dest {
                Some(Dest::Step(to)) => self.all.get(to).is_some_and(|to| {
                    let from = (step.new + step.size).cast_signed();
                    i8::try_from(to.new.cast_signed() - from).is_ok()
                }),
                _ => false,
            };
            let short = |step: &Step<'_>| step.is_short() && !step.long;
            let grow = self.all.iter().map(|step| short(step) && !reaches(step));
            let grow: Vec<bool> = grow.collect();
            if !grow.contains(&true) {
                return Ok(());
            }
            for (step, grow) in self.all.iter_mut().zip(grow) {
                if grow && !step.can_grow() {
                    let reason = step.immovable("it does not reach that far");
                    return Err(refused(self.original, step.at, reason));
                }
                step.long |= grow;
            }
        }
    }
}

/// A place or a length within the clone, which is far shorter than any limit.
fn signed(offset: usize) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

fn refused(original: &Original, at: Gva, reason: impl Into<Reason>) -> Refused {
    Refused {
        function: original.name.clone(),
        at,
        reason: reason.into(),
    }
}
