//! Runs the few instructions that handlers are made of, for tests: one at a time, over registers and memory that a test fills.
//!
//! An instruction that is none of them is an error. Memory that is not there faults, and goes on where a fixup says.

use std::collections::BTreeMap;

use iced_x86::{
    ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

/// A processor, its code and memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    registers: BTreeMap<Register, u64>,
    pub(crate) memory: BTreeMap<u64, u8>,
    pub(crate) code: Vec<(u64, Vec<u8>)>,
    pub(crate) fixups: Vec<(u64, u64)>,
    pub(crate) gs: u64,
    pub(crate) rip: u64,
    /// Instructions so far.
    pub(crate) steps: usize,
    carry: bool,
    zero: bool,
    sign: bool,
    overflow: bool,
}

impl Run {
    pub(crate) fn get(&self, register: Register) -> u64 {
        let full = self
            .registers
            .get(&register.full_register())
            .copied()
            .unwrap_or(0);
        truncated(full, register.size())
    }

    pub(crate) fn set(&mut self, register: Register, value: u64) {
        let full = register.full_register();
        let value = match register.size() {
            8 => value,
            4 => truncated(value, 4),
            size => {
                let mask = truncated(u64::MAX, size);
                self.get(full) & !mask | value & mask
            }
        };
        self.registers.insert(full, value);
    }

    pub(crate) fn load(&self, at: u64, size: usize) -> Option<u64> {
        (0..size as u64).rev().try_fold(0, |value, offset| {
            let byte = self.memory.get(&at.wrapping_add(offset))?;
            Some(value << 8 | u64::from(*byte))
        })
    }

    pub(crate) fn store(&mut self, at: u64, size: usize, value: u64) {
        for (offset, byte) in value.to_le_bytes().into_iter().take(size).enumerate() {
            self.memory.insert(at.wrapping_add(offset as u64), byte);
        }
    }

    pub(crate) fn push(&mut self, value: u64) {
        let at = self.get(Register::RSP).wrapping_sub(8);
        self.set(Register::RSP, at);
        self.store(at, 8, value);
    }

    pub(crate) fn pop(&mut self) -> u64 {
        let at = self.get(Register::RSP);
        self.set(Register::RSP, at.wrapping_add(8));
        self.load(at, 8).expect("a stack")
    }

    /// Runs until it leaves the code, `before` each instruction; at most `most` of them.
    pub(crate) fn run(&mut self, most: usize, mut before: impl FnMut(&mut Self)) {
        for _ in 0..most {
            let Some(instruction) = self.fetch() else {
                return;
            };
            before(self);
            self.steps += 1;
            self.rip = instruction.next_ip();
            if self.step(&instruction).is_none() {
                let at = instruction.ip();
                let fixup = self.fixups.iter().find(|(insn, _)| *insn == at);
                self.rip = fixup
                    .unwrap_or_else(|| panic!("{instruction} faults at {at:#x}"))
                    .1;
            }
        }
        assert!(self.fetch().is_none(), "no end after {most} instructions");
    }

    fn fetch(&self) -> Option<Instruction> {
        let (at, bytes) = self
            .code
            .iter()
            .find(|(at, bytes)| (*at..*at + bytes.len() as u64).contains(&self.rip))?;
        let from = usize::try_from(self.rip - at).unwrap();
        let mut decoder = Decoder::with_ip(64, &bytes[from..], self.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        assert!(!instruction.is_invalid(), "no code at {:#x}", self.rip);
        Some(instruction)
    }

    fn address(&self, instruction: &Instruction, operand: u32) -> u64 {
        let value = |register: Register, _, _| match register {
            Register::GS => Some(self.gs),
            Register::DS | Register::SS | Register::CS | Register::ES => Some(0),
            register => Some(self.get(register)),
        };
        instruction.virtual_address(operand, 0, value).unwrap()
    }

    fn size(instruction: &Instruction, operand: u32) -> usize {
        match instruction.op_kind(operand) {
            OpKind::Register => instruction.op_register(operand).size(),
            OpKind::Memory => instruction.memory_size().size(),
            _ => 8,
        }
    }

    /// The value of an operand; `None` when it is not there.
    fn read(&self, instruction: &Instruction, operand: u32) -> Option<u64> {
        match instruction.op_kind(operand) {
            OpKind::Register => Some(self.get(instruction.op_register(operand))),
            OpKind::Memory => self.load(
                self.address(instruction, operand),
                Self::size(instruction, operand),
            ),
            _ => Some(instruction.immediate(operand)),
        }
    }

    fn write(&mut self, instruction: &Instruction, operand: u32, value: u64) -> Option<()> {
        if instruction.op_kind(operand) == OpKind::Register {
            self.set(instruction.op_register(operand), value);
            return Some(());
        }
        let (at, size) = (
            self.address(instruction, operand),
            Self::size(instruction, operand),
        );
        self.load(at, size)?;
        self.store(at, size, value);
        Some(())
    }

    fn step(&mut self, of: &Instruction) -> Option<()> {
        match of.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch => {
                if self.holds(of.condition_code()) {
                    self.rip = of.near_branch_target();
                }
                return Some(());
            }
            FlowControl::UnconditionalBranch => {
                self.rip = of.near_branch_target();
                return Some(());
            }
            FlowControl::Call => {
                self.push(of.next_ip());
                self.rip = of.near_branch_target();
                return Some(());
            }
            FlowControl::Return => {
                self.rip = self.pop();
                return Some(());
            }
            other => panic!("{of} is {other:?}"),
        }
        self.compute(of)
    }

    fn compute(&mut self, of: &Instruction) -> Option<()> {
        let size = Self::size(of, 0);
        match of.mnemonic() {
            Mnemonic::Nop => Some(()),
            Mnemonic::Mov | Mnemonic::Movzx => self.write(of, 0, self.read(of, 1)?),
            Mnemonic::Movsx => {
                let value = signed(self.read(of, 1)?, Self::size(of, 1));
                self.write(of, 0, value.cast_unsigned())
            }
            Mnemonic::Lea => self.write(of, 0, self.address(of, 1)),
            Mnemonic::Push => {
                self.push(self.read(of, 0)?);
                Some(())
            }
            Mnemonic::Pop => {
                let value = self.pop();
                self.write(of, 0, value)
            }
            Mnemonic::Cmp => {
                let (left, right) = (self.read(of, 0)?, self.read(of, 1)?);
                self.compared(left, right, size);
                Some(())
            }
            Mnemonic::Test | Mnemonic::Xor => {
                let (left, right) = (self.read(of, 0)?, self.read(of, 1)?);
                let test = of.mnemonic() == Mnemonic::Test;
                let value = if test { left & right } else { left ^ right };
                (self.carry, self.overflow) = (false, false);
                self.judged(value, size);
                if test {
                    Some(())
                } else {
                    self.write(of, 0, value)
                }
            }
            Mnemonic::Inc => {
                let value = self.read(of, 0)?.wrapping_add(1);
                self.judged(value, size);
                self.write(of, 0, value)
            }
            Mnemonic::Xadd => {
                let (left, right) = (self.read(of, 0)?, self.read(of, 1)?);
                self.write(of, 0, left.wrapping_add(right))?;
                self.write(of, 1, left)
            }
            Mnemonic::Imul => {
                let (left, right) = match of.op_count() {
                    3 => (self.read(of, 1)?, self.read(of, 2)?),
                    _ => (self.read(of, 0)?, self.read(of, 1)?),
                };
                self.write(of, 0, left.wrapping_mul(right))
            }
            Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar => {
                let (left, count) = (self.read(of, 0)?, self.read(of, 1)?);
                let value = match of.mnemonic() {
                    Mnemonic::Shl => left << count,
                    Mnemonic::Shr => truncated(left, size) >> count,
                    _ => (signed(left, size) >> count).cast_unsigned(),
                };
                self.judged(value, size);
                self.write(of, 0, value)
            }
            other => panic!("{of} ({other:?}) is no instruction of a handler's"),
        }
    }

    fn compared(&mut self, left: u64, right: u64, size: usize) {
        let (left, right) = (truncated(left, size), truncated(right, size));
        self.carry = left < right;
        let difference = i128::from(signed(left, size)) - i128::from(signed(right, size));
        let value = left.wrapping_sub(right);
        self.judged(value, size);
        self.overflow = difference != i128::from(signed(value, size));
    }

    fn judged(&mut self, value: u64, size: usize) {
        self.zero = truncated(value, size) == 0;
        self.sign = signed(value, size) < 0;
    }

    fn holds(&self, condition: ConditionCode) -> bool {
        let less = self.sign != self.overflow;
        match condition {
            ConditionCode::e => self.zero,
            ConditionCode::ne => !self.zero,
            ConditionCode::b => self.carry,
            ConditionCode::ae => !self.carry,
            ConditionCode::be => self.carry || self.zero,
            ConditionCode::a => !self.carry && !self.zero,
            ConditionCode::l => less,
            ConditionCode::ge => !less,
            ConditionCode::le => less || self.zero,
            ConditionCode::g => !less && !self.zero,
            other => panic!("condition {other:?}"),
        }
    }
}

fn truncated(value: u64, size: usize) -> u64 {
    match size {
        8 => value,
        _ => value & ((1 << (size * 8)) - 1),
    }
}

fn signed(value: u64, size: usize) -> i64 {
    let above = 64 - size * 8;
    (value << above).cast_signed() >> above
}

#[cfg(test)]
mod tests {
    use iced_x86::Register;
    use iced_x86::code_asm::{CodeAssembler, al, eax, rax, rdi};

    use super::Run;

    fn check(rdi_is: u64, want: u64, code: impl Fn(&mut CodeAssembler)) {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler);
        let mut run = Run {
            code: vec![(0x1000, assembler.assemble(0x1000).unwrap())],
            rip: 0x1000,
            ..Run::default()
        };
        run.set(Register::RDI, rdi_is);
        run.run(9, |_| ());
        assert_eq!(run.get(Register::RAX), want);
    }

    /// What the manual says of partial registers, signs and flags (Intel SDM volume 1, chapter 3, and volume 2).
    #[test]
    fn instructions_do_what_the_manual_says() {
        check(!0, 0xffff_ffff, |a| {
            a.mov(rax, rdi).unwrap();
            a.mov(eax, iced_x86::code_asm::edi).unwrap();
        });
        check(0x80, 0xffff_ff80, |a| {
            a.movsx(eax, iced_x86::code_asm::dil).unwrap()
        });
        check(0x1234, 0x1200, |a| {
            a.mov(rax, rdi).unwrap();
            a.mov(al, 0).unwrap();
        });
        for (value, below, less) in [(0_u64, 1, 1), (!0, 0, 1), (1 << 63, 0, 1), (7, 0, 0)] {
            for signs in [false, true] {
                check(value, if signs { less } else { below }, |a| {
                    let mut end = a.create_label();
                    a.mov(eax, 1).unwrap();
                    a.cmp(rdi, 5).unwrap();
                    if signs {
                        a.jl(end).unwrap();
                    } else {
                        a.jb(end).unwrap();
                    }
                    a.xor(eax, eax).unwrap();
                    a.set_label(&mut end).unwrap();
                    a.mov(rdi, rdi).unwrap();
                });
            }
        }
    }
}
