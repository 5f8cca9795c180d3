//! Which caller-saved registers an instruction reads and writes.
//!
//! Caller-saved by the System V ABI for x86-64 (section 3.2.3), as far as the kernel uses them: its C code keeps nothing in vector registers.

use std::fmt;

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, Register};

/// The registers that carry the words of arguments, in their order.
pub const ARGUMENTS: [Register; 6] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
];
/// All that are caller-saved, in the order of the bits of [`Registers`].
const ALL: [Register; 9] = {
    let [a, b, c, d, e, f] = ARGUMENTS;
    let rest = [Register::RAX, Register::R10, Register::R11];
    [a, b, c, d, e, f, rest[0], rest[1], rest[2]]
};

/// A set of caller-saved registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers(u16);

impl Registers {
    /// None.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self(0x1ff);
    /// What a call may read whose function is not known: the arguments, and `rax`, which counts vector registers.
    pub const PASSED: Self = Self(0x7f);

    /// Those that carry the first `count` words of arguments.
    #[must_use]
    pub fn arguments(count: usize) -> Self {
        Self((1 << count.min(ARGUMENTS.len())) - 1)
    }

    /// The one that `register` is, or is a part of; none if that is not caller-saved.
    #[must_use]
    pub fn of(register: Register) -> Self {
        let whole = register.full_register();
        let bit = ALL.iter().position(|candidate| *candidate == whole);
        bit.map_or(Self::NONE, |bit| Self(1 << bit))
    }

    /// Those in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        for register in ALL {
            if !self.and(Self::of(register)).is_empty() {
                write!(f, "{between}{}", format!("{register:?}").to_lowercase())?;
                between = ", ";
            }
        }
        Ok(())
    }
}

/// What an instruction does to caller-saved registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Read, in whole or in part, on some way through it.
    pub reads: Registers,
    /// Surely overwritten as a whole.
    pub replaces: Registers,
    /// Written, perhaps only in part or only sometimes.
    pub writes: Registers,
}

impl Effect {
    /// That of one instruction itself, not of what it calls.
    #[must_use]
    pub fn of(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Self {
        let mut effect = Self::default();
        for used in info.info(instruction).used_registers() {
            let register = Registers::of(used.register());
            let (reads, writes) = match used.access() {
                OpAccess::Read | OpAccess::CondRead => (true, false),
                OpAccess::Write | OpAccess::CondWrite => (false, true),
                OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
                OpAccess::None | OpAccess::NoMemAccess => (false, false),
            };
            if reads {
                effect.reads = effect.reads.or(register);
            }
            if writes {
                effect.writes = effect.writes.or(register);
            }
            // A write of four bytes clears the other four.
            let whole = used.register().is_gpr32() || used.register().is_gpr64();
            let surely = matches!(used.access(), OpAccess::Write | OpAccess::ReadWrite);
            if whole && surely {
                effect.replaces = effect.replaces.or(register);
            }
        }
        effect
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory};

    use super::Effect;

    #[test]
    fn each_instruction_reads_and_writes_what_it_should() {
        let check = |code: &[u8], want: [&str; 3]| {
            let instruction = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).decode();
            let effect = Effect::of(&instruction, &mut InstructionInfoFactory::new());
            let sets = [effect.reads, effect.replaces, effect.writes];
            assert_eq!(sets.map(|set| set.to_string()), want, "{instruction}");
        };
        // mov eax, edi; xor ecx, ecx; mov [rsi+rdx], r8; push r9
        check(&[0x89, 0xf8], ["rdi", "rax", "rax"]);
        check(&[0x31, 0xc9], ["", "rcx", "rcx"]);
        check(&[0x4c, 0x89, 0x04, 0x16], ["rsi, rdx, r8", "", ""]);
        check(&[0x41, 0x51], ["r9", "", ""]);
        // mov al, 1; sete cl; cmove r10d, ebx
        check(&[0xb0, 0x01], ["", "", "rax"]);
        check(&[0x0f, 0x94, 0xc1], ["", "", "rcx"]);
        // rep stosb; cpuid; call
        check(&[0xf3, 0xaa], ["rdi, rcx, rax", "", "rdi, rcx"]);
        check(
            &[0x0f, 0xa2],
            ["rcx, rax", "rdx, rcx, rax", "rdx, rcx, rax"],
        );
        check(&[0xe8, 0, 0, 0, 0], ["", "", ""]);
        check(&[0x48, 0x8b, 0x5c, 0x24, 0x08], ["", "", ""]);
    }
}
