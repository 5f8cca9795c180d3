//! One instruction of the original: what it is, and what becomes of it.

use iced_x86::{
    ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind,
};

use super::{
    Dest, JUMP, JUMP_ABOVE, JUMP_AT_MOST, Moved, Step, Steps, TEST, To, What, refused, signed,
};
use crate::addr::Gva;
use crate::edition::clone::original::{Original, Part};
use crate::edition::clone::refused::{Reason, Refused};
use crate::edition::reloc::Kind;
use crate::kernel::bytes::le_i32;
use crate::x86::insn::{self, InsnError, MAX_INSTRUCTION_LEN};

/// The instruction `offset` bytes into `part`.
pub(super) fn step<'a>(
    original: &Original,
    part: &'a Part,
    offset: usize,
) -> Result<Step<'a>, Refused> {
    let at = Gva(part.at.wrapping_add(offset as u64));
    let rest = part.code.get(offset..).unwrap_or_default();
    let branch = part.branches.iter().find(|branch| branch.range.start == at);
    let (len, constants, what) = if let Some(branch) = branch {
        let len = branch.range.end.0.wrapping_sub(at.0);
        let len = usize::try_from(len).unwrap_or(rest.len());
        (len, ConstantOffsets::default(), What::Test(branch.clone()))
    } else {
        let mut decoder = Decoder::with_ip(64, rest, at.0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            let bytes = rest.iter().take(MAX_INSTRUCTION_LEN).copied().collect();
            return Err(refused(original, at, InsnError::Undecodable { at, bytes }));
        }
        check(part, &instruction).map_err(|reason| refused(original, at, reason))?;
        let constants = decoder.get_constant_offsets(&instruction);
        let what = if insn::has_near_target(&instruction) {
            What::Branch(instruction)
        } else {
            What::Plain(instruction)
        };
        (instruction.len(), constants, what)
    };
    let Some(bytes) = rest.get(..len) else {
        let bytes = rest.to_vec();
        return Err(refused(original, at, InsnError::Undecodable { at, bytes }));
    };
    // A static branch is whole: nothing else begins within it.
    let end = Gva(at.0.wrapping_add(len as u64));
    let cut = part
        .branches
        .iter()
        .find(|it| at < it.range.start && it.range.start < end);
    if let Some(cut) = cut {
        let to = cut.range.start;
        return Err(refused(original, at, Reason::Middle { to }));
    }
    Ok(Step {
        at,
        bytes,
        constants,
        what,
        dest: None,
        long: false,
        new: 0,
        size: 0,
    })
}

/// Refuses an instruction that would not do the same elsewhere.
fn check(part: &Part, instruction: &Instruction) -> Result<(), Reason> {
    let text = || insn::disassemble(instruction);
    let immovable = |why| Err(Reason::Immovable { text: text(), why });
    let at = Gva(instruction.ip());
    let thunked = part.thunked.iter().any(|range| range.contains(&at));
    match instruction.flow_control() {
        FlowControl::XbeginXabortXend => return immovable("it begins or ends a transaction"),
        FlowControl::IndirectBranch if !thunked => return Err(Reason::Indirect { text: text() }),
        FlowControl::IndirectBranch
        | FlowControl::UnconditionalBranch
        | FlowControl::ConditionalBranch
            if thunked =>
        {
            if let Some(table) = part.table {
                return Err(Reason::Table {
                    text: text(),
                    table,
                });
            }
        }
        _ => {}
    }
    match instruction.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 => immovable("its distance has 16 or 32 bits"),
        OpKind::FarBranch16 | OpKind::FarBranch32 => immovable("it goes to another segment"),
        _ => Ok(()),
    }
}

impl Step<'_> {
    pub(super) fn end(&self) -> Gva {
        Gva(self.at.0.wrapping_add(self.bytes.len() as u64))
    }

    /// Whether it is a branch with a distance of one byte.
    pub(super) fn is_short(&self) -> bool {
        matches!(self.what, What::Branch(_)) && self.constants.immediate_size() == 1
    }

    pub(super) fn can_grow(&self) -> bool {
        match &self.what {
            What::Branch(it) => it.is_jmp_short() || it.is_jcc_short(),
            _ => false,
        }
    }

    pub(super) fn size(&self) -> u64 {
        let size = match &self.what {
            What::Branch(it) if self.long && it.is_jcc_short() => JUMP_ABOVE.len(),
            What::Branch(_) if self.long => JUMP.len(),
            What::Plain(_) | What::Branch(_) => self.bytes.len(),
            What::Test(_) => TEST.len() + JUMP_ABOVE.len(),
            What::On(_) => JUMP.len(),
        };
        size as u64
    }

    pub(super) fn immovable(&self, why: &'static str) -> Reason {
        let text = match &self.what {
            What::Plain(it) | What::Branch(it) => insn::disassemble(it),
            What::Test(_) | What::On(_) => String::new(),
        };
        Reason::Immovable { text, why }
    }

    /// Adds its new bytes to `moved`.
    pub(super) fn emit(
        &self,
        steps: &Steps<'_>,
        part: &Part,
        moved: &mut Moved,
    ) -> Result<(), Refused> {
        let start = moved.code.len();
        let dest = self.dest.unwrap_or(Dest::Out(self.end()));
        match &self.what {
            What::Plain(instruction) => {
                moved.code.extend(self.bytes);
                self.reaches(steps, moved, start, instruction)?;
                self.holds(steps, part, moved, start)?;
            }
            What::Branch(instruction) if self.long => {
                if instruction.is_jcc_short() {
                    // The condition is in the low bits of either form's opcode.
                    let at = self.constants.immediate_offset().saturating_sub(1);
                    let condition = self.bytes.get(at).map_or(0, |opcode| opcode & 0xf);
                    moved.code.extend([0x0f, 0x80 | condition, 0, 0, 0, 0]);
                } else {
                    moved.code.extend(JUMP);
                }
                moved.lead(steps, moved.code.len() - 4, 0, dest);
            }
            What::Branch(_) => {
                moved.code.extend(self.bytes);
                let field = start + self.constants.immediate_offset();
                match dest {
                    Dest::Step(to) if self.is_short() => {
                        let to = steps.all.get(to).map_or(0, |to| to.new).cast_signed();
                        let [distance, ..] = (to - signed(moved.code.len())).to_le_bytes();
                        if let Some(byte) = moved.code.get_mut(field) {
                            *byte = distance;
                        }
                    }
                    dest => moved.lead(steps, field, 0, dest),
                }
            }
            What::Test(branch) => {
                moved.code.extend(TEST);
                moved.lead(steps, start + 2, 1, Dest::Out(branch.count));
                moved.code.extend(if branch.when_on {
                    JUMP_ABOVE
                } else {
                    JUMP_AT_MOST
                });
                moved.lead(steps, moved.code.len() - 4, 0, dest);
            }
            What::On(_) => {
                moved.code.extend(JUMP);
                moved.lead(steps, moved.code.len() - 4, 0, dest);
            }
        }
        Ok(())
    }

    /// Re-aims an operand relative to the instruction.
    fn reaches(
        &self,
        steps: &Steps<'_>,
        moved: &mut Moved,
        start: usize,
        instruction: &Instruction,
    ) -> Result<(), Refused> {
        if !instruction.is_ip_rel_memory_operand() {
            return Ok(());
        }
        let field = self.constants.displacement_offset();
        let to = Gva(instruction.ip_rel_memory_address());
        let to = if instruction.mnemonic() == Mnemonic::Lea {
            self.label(steps, to)?
        } else if steps.is_inside(to) {
            return Err(steps.refused(
                self.at,
                self.immovable("it reads or writes the function's code"),
            ));
        } else {
            To::There(to)
        };
        let addend = signed(field) - signed(self.bytes.len());
        moved
            .relocations
            .push((start + field, Kind::Pc32, to, addend));
        Ok(())
    }

    /// Re-aims addresses of the function's own instructions that it holds.
    fn holds(
        &self,
        steps: &Steps<'_>,
        part: &Part,
        moved: &mut Moved,
        start: usize,
    ) -> Result<(), Refused> {
        let end = self.end();
        for at in part
            .absolute
            .iter()
            .filter(|at| (self.at..end).contains(*at))
        {
            let field = usize::try_from(at.0.wrapping_sub(self.at.0)).unwrap_or(0);
            let Some(value) = le_i32(self.bytes, field) else {
                continue;
            };
            let value = Gva(i64::from(value).cast_unsigned());
            if let to @ To::Here(..) = self.label(steps, value)? {
                moved
                    .relocations
                    .push((start + field, Kind::Abs32Signed, to, 0));
            }
        }
        Ok(())
    }

    /// What the address `to` in code is in the clone: that of the function itself stays.
    fn label(&self, steps: &Steps<'_>, to: Gva) -> Result<To, Refused> {
        let beginning = steps.original.parts.iter().any(|part| part.at == to.0);
        if beginning || !steps.is_inside(to) {
            return Ok(To::There(to));
        }
        let step = steps
            .by_address
            .get(&to)
            .and_then(|step| steps.all.get(*step));
        let step = step.ok_or_else(|| steps.refused(self.at, Reason::Middle { to }))?;
        Ok(To::Here(step.new, to))
    }
}
