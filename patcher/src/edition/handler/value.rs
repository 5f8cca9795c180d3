//! The values that a handler's tests look at, brought into a register.
//!
//! What is reached through the current task is read at once; what an argument leads to, by what cannot fault.

use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister8, AsmRegister16, AsmRegister32, AsmRegister64, byte_ptr, cl, cx,
    di, dil, dl, dword_ptr, dx, eax, ecx, edi, edx, esi, qword_ptr, r8, r8b, r8d, r8w, r9, r9b,
    r9d, r9w, r10, r10b, r10d, r10w, r11, r11d, rax, rcx, rdi, rdx, rsi, si, sil, word_ptr,
};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::HandlerError;
use super::emit::Emit;
use crate::rule::resolve::{Source, Value};

/// The registers of the arguments, each whole and its lower 4, 2 and 1 bytes.
pub(super) const ARGUMENTS: [(AsmRegister64, AsmRegister32, AsmRegister16, AsmRegister8); 6] = [
    (rdi, edi, di, dil),
    (rsi, esi, si, sil),
    (rdx, edx, dx, dl),
    (rcx, ecx, cx, cl),
    (r8, r8d, r8w, r8b),
    (r9, r9d, r9w, r9b),
];

/// A value where it can be compared.
#[derive(Clone, Copy)]
pub(super) enum Held {
    Half(AsmRegister32),
    Whole(AsmRegister64),
}

impl Held {
    /// The lower half of its register.
    pub(super) fn half(self) -> AsmRegister32 {
        match self {
            Self::Half(half) => half,
            Self::Whole(whole) => {
                let known = halves().find(|(it, _)| *it == whole);
                known.map_or(eax, |(_, half)| half)
            }
        }
    }

    /// Its register whole, of which the upper half may be anything.
    fn whole(self) -> AsmRegister64 {
        match self {
            Self::Whole(whole) => whole,
            Self::Half(half) => {
                let known = halves().find(|(_, it)| *it == half);
                known.map_or(rax, |(whole, _)| whole)
            }
        }
    }
}

/// The registers that hold values, but for `rax`, and their lower halves.
fn halves() -> impl Iterator<Item = (AsmRegister64, AsmRegister32)> {
    let arguments = ARGUMENTS.into_iter();
    let arguments = arguments.map(|(whole, half, ..)| (whole, half));
    arguments.chain([(r10, r10d), (r11, r11d)])
}

impl Emit<'_> {
    /// `value` as a key of a set, and not in `r10`: what it has not of 64 bits is zero. If the set has no key of more than 32, it may be a half.
    pub(super) fn key(&mut self, value: &Value, low: bool) -> Result<Held, HandlerError> {
        let unsigned = Value {
            signed: false,
            ..value.clone()
        };
        let held = match self.value(&unsigned)? {
            Held::Half(register) if low && register != r10d && register != eax => {
                Held::Half(register)
            }
            Held::Whole(register) if register == r10 => {
                self.code.mov(rax, r10)?;
                Held::Whole(rax)
            }
            held => Held::Whole(self.widened(held)?),
        };
        Ok(held)
    }

    /// What is held, as 64 bits.
    pub(super) fn widened(&mut self, held: Held) -> Result<AsmRegister64, HandlerError> {
        match held {
            Held::Whole(register) => Ok(register),
            // What is above the lower half of an argument is anything; a move of that half clears it.
            Held::Half(register) => {
                if register != eax {
                    self.code.mov(eax, register)?;
                }
                Ok(rax)
            }
        }
    }

    /// What is held and `by` more, in another register.
    pub(super) fn moved(&mut self, held: Held, by: i32) -> Result<Held, HandlerError> {
        if by == 0 {
            return Ok(held);
        }
        let from = held.whole();
        let to = if from == rax { r10 } else { rax };
        match held {
            Held::Half(_) => {
                let to = Held::Whole(to).half();
                self.code.lea(to, dword_ptr(from + by))?;
                Ok(Held::Half(to))
            }
            Held::Whole(_) => {
                self.code.lea(to, qword_ptr(from + by))?;
                Ok(Held::Whole(to))
            }
        }
    }

    /// `value` in a register: an argument's own, or `rax` or `r10`.
    pub(super) fn value(&mut self, value: &Value) -> Result<Held, HandlerError> {
        let (size, signed) = (value.size, value.signed);
        let held = match (value.from, value.loads.split_last()) {
            (Source::Task, None) => Held::Whole(r11),
            (Source::Task, Some((last, before))) => {
                let mut base = r11;
                for offset in before {
                    self.code
                        .mov(rax, qword_ptr(base + displacement(*offset)))?;
                    base = rax;
                }
                self.read(base + displacement(*last), size, signed)?
            }
            (Source::Cpu, _) => {
                self.cpu()?;
                Held::Half(eax)
            }
            (Source::Argument(number), None) => {
                let (whole, half, two, one) = argument(number);
                self.extended((whole, half, two, one), eax, size, signed)?
            }
            (Source::Argument(number), Some((last, before))) => {
                let mut base = argument(number).0;
                for offset in before {
                    self.load(base, *offset, 8)?;
                    base = r10;
                }
                self.load(base, *last, size)?;
                self.extended((r10, r10d, r10w, r10b), r10d, size, signed)?
            }
        };
        match value.bits {
            None => Ok(held),
            Some(bits) => self.field(held, bits, signed),
        }
    }

    /// Reads a value from where reading is safe into `eax` or `rax`.
    fn read(&mut self, at: AsmMemoryOperand, size: u8, signed: bool) -> Result<Held, HandlerError> {
        match (size, signed) {
            (1, false) => self.code.movzx(eax, byte_ptr(at))?,
            (1, true) => self.code.movsx(eax, byte_ptr(at))?,
            (2, false) => self.code.movzx(eax, word_ptr(at))?,
            (2, true) => self.code.movsx(eax, word_ptr(at))?,
            (4, _) => self.code.mov(eax, dword_ptr(at))?,
            _ => {
                self.code.mov(rax, qword_ptr(at))?;
                return Ok(Held::Whole(rax));
            }
        }
        Ok(Held::Half(eax))
    }

    /// The lower `size` bytes of a register, made 32 bits in `into` if they are fewer.
    fn extended(
        &mut self,
        (whole, half, two, one): (AsmRegister64, AsmRegister32, AsmRegister16, AsmRegister8),
        into: AsmRegister32,
        size: u8,
        signed: bool,
    ) -> Result<Held, HandlerError> {
        match (size, signed) {
            (1, false) => self.code.movzx(into, one)?,
            (1, true) => self.code.movsx(into, one)?,
            (2, false) => self.code.movzx(into, two)?,
            (2, true) => self.code.movsx(into, two)?,
            (4, _) => return Ok(Held::Half(half)),
            _ => return Ok(Held::Whole(whole)),
        }
        Ok(Held::Half(into))
    }

    /// The bits of a field out of the word that holds them, which was read into `rax` or `r10`.
    fn field(
        &mut self,
        held: Held,
        (first, count): (u8, u8),
        signed: bool,
    ) -> Result<Held, HandlerError> {
        let register = held.whole();
        let count = u32::from(count);
        let above = 64_u32.saturating_sub(u32::from(first) + count);
        self.code.shl(register, above)?;
        if signed {
            self.code.sar(register, 64 - count)?;
        } else {
            self.code.shr(register, 64 - count)?;
        }
        Ok(Held::Whole(register))
    }

    /// Loads from `offset` behind an address that nothing vouches for into `r10`, zero-extended; a rule that cannot is not answered.
    fn load(&mut self, base: AsmRegister64, offset: u32, size: u8) -> Result<(), HandlerError> {
        self.code.lea(r10, qword_ptr(base + displacement(offset)))?;
        self.code.call(self.spec.region.load(size).0)?;
        self.code.test(eax, eax)?;
        self.code.jne(self.fault)?;
        Ok(())
    }

    /// The current task, into `r11`; flags stay.
    pub(super) fn task(&mut self) -> Result<(), HandlerError> {
        let at = self.spec.per_cpu.current;
        self.own(Code::Mov_r64_rm64, Register::R11, at)
    }

    /// This processor's number, into `eax`; flags stay.
    pub(super) fn cpu(&mut self) -> Result<(), HandlerError> {
        let at = self.spec.per_cpu.cpu;
        self.own(Code::Mov_r32_rm32, Register::EAX, at)
    }

    /// Moves what this processor has of its own into a register.
    fn own(&mut self, code: Code, register: Register, at: i32) -> Result<(), HandlerError> {
        let memory = MemoryOperand::new(
            Register::None,
            Register::None,
            1,
            at.into(),
            8,
            false,
            Register::GS,
        );
        let instruction = Instruction::with2(code, register, memory)?;
        Ok(self.code.add_instruction(instruction)?)
    }
}

fn argument(number: u8) -> (AsmRegister64, AsmRegister32, AsmRegister16, AsmRegister8) {
    ARGUMENTS[usize::from(number).min(ARGUMENTS.len() - 1)]
}

/// An offset into a structure as a displacement.
pub(super) fn displacement(offset: u32) -> i32 {
    i32::try_from(offset).unwrap_or(i32::MAX)
}
