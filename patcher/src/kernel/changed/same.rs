//! Whether two stretches of code are the same but for how their NOPs and jumps are encoded.
//!
//! Kernels differ in how long their NOPs are, whether they jump over many of them, and whether a jump that could be short is.
//! NOPs are those that kernels write, no others (Intel SDM vol. 2B, NOP, table 4-12; kernel `arch/x86/include/asm/nops.h`).

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use crate::addr::Gva;

const INT3: u8 = 0xcc;

/// What an instruction does, as far as it matters here.
#[derive(PartialEq, Eq)]
enum Step<'a> {
    /// At an offset, these bytes.
    Other(usize, &'a [u8]),
    /// At an offset, a branch of this kind to there.
    Branch(usize, Mnemonic, u64),
}

/// Whether `a` and `b`, both at `at`, are the same code.
pub(super) fn same(a: &[u8], b: &[u8], at: Gva) -> bool {
    a == b || steps(a, at).is_some_and(|of| Some(of) == steps(b, at))
}

/// The instructions of `code` without NOPs; `None` when they do not fill it.
fn steps(code: &[u8], at: Gva) -> Option<Vec<Step<'_>>> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut steps = Vec::new();
    let mut instruction = Instruction::default();
    let mut unreachable = false;
    while decoder.can_decode() {
        let offset = decoder.position();
        decoder.decode_out(&mut instruction);
        if instruction.code() == Code::INVALID {
            return None;
        }
        let bytes = code.get(offset..decoder.position())?;
        let padding = bytes == [INT3] && unreachable || is_nop(bytes);
        if padding || over_padding(&instruction, code.get(decoder.position()..)?) {
            unreachable |= instruction.mnemonic() == Mnemonic::Jmp;
            continue;
        }
        unreachable = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::Return | FlowControl::IndirectBranch
        );
        let near = instruction.is_jmp_short_or_near()
            || instruction.is_jcc_short_or_near()
            || instruction.is_call_near();
        steps.push(if near {
            let target = instruction.near_branch_target();
            Step::Branch(offset, instruction.mnemonic(), target)
        } else {
            Step::Other(offset, bytes)
        });
    }
    Some(steps)
}

/// Whether `instruction` jumps over nothing but padding, at the beginning of `rest`.
fn over_padding(instruction: &Instruction, rest: &[u8]) -> bool {
    if !instruction.is_jmp_short_or_near() {
        return false;
    }
    let over = instruction
        .near_branch_target()
        .checked_sub(instruction.next_ip());
    let over = over.and_then(|over| usize::try_from(over).ok());
    over.and_then(|over| rest.get(..over))
        .is_some_and(is_padding)
}

/// Whether `code` is nothing but NOPs, breakpoints, and jumps over such.
fn is_padding(code: &[u8]) -> bool {
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let (mut start, mut step) = (0, Instruction::default());
    while decoder.can_decode() {
        decoder.decode_out(&mut step);
        let bytes = &code[start..decoder.position()];
        let rest = &code[decoder.position()..];
        if bytes != [INT3] && !is_nop(bytes) && !over_padding(&step, rest) {
            return false;
        }
        start = decoder.position();
    }
    true
}

/// Whether `bytes` are one NOP as kernels write them.
fn is_nop(bytes: &[u8]) -> bool {
    let long = bytes.iter().position(|byte| *byte != 0x66).unwrap_or(0);
    match bytes.split_at(long) {
        ([] | [0x66], [0x90]) => true,
        ([], [0x0f, 0x1f, 0x00] | [0x0f, 0x1f, 0x40, 0] | [0x0f, 0x1f, 0x80, 0, 0, 0, 0]) => true,
        ([] | [0x66], [0x0f, 0x1f, 0x44, 0, 0]) => true,
        (prefixes, [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0] | [0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0]) => {
            prefixes.len() <= 3
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Gva, same};

    #[test]
    fn code_is_the_same_whatever_its_nops_are() {
        let check = |a: &[u8], b: &[u8], want: bool| {
            assert_eq!(same(a, b, Gva(0x1000)), want, "{a:02x?} {b:02x?}");
            assert_eq!(same(b, a, Gva(0x1000)), want, "{b:02x?} {a:02x?}");
        };
        // Single and long ones, and a jump over padding.
        check(&[0x90; 5], &[0x0f, 0x1f, 0x44, 0, 0], true);
        check(&[0x90; 5], &[0xeb, 3, 0xcc, 0xcc, 0xcc], true);
        check(&[0x90; 5], &[0xeb, 2, 0xcc, 0xcc, 0x90], true);
        check(&[0x90; 5], &[0xeb, 3, 0xcc, 0x55, 0xcc], false);
        check(&[0x90; 5], &[0xcc; 5], false);
        check(
            &[0x90; 41],
            &[&[0xeb, 39][..], &[0xcc; 39][..]].concat(),
            true,
        );
        check(
            &[0x90; 11],
            &[0x66, 0x66, 0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
            true,
        );
        check(&[0x90; 9], &[0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], true);
        check(
            &[0xeb, 4, 0x90, 0x90, 0x90, 0x90],
            &[0xeb, 4, 0xeb, 2, 0xcc, 0xcc],
            true,
        );
        // NOPs that no kernel writes.
        check(&[0x90; 5], &[0x0f, 0x1f, 0x44, 0, 1], false);
        check(&[0x90; 2], &[0x2e, 0x90], false);
        check(&[0x90; 2], &[0xf3, 0x90], false);
        check(&[0xe9, 0, 0, 0, 0], &[0xeb, 3, 0x0f, 0x1f, 0], true);
        check(&[0xe9, 0, 0, 0, 0], &[0xeb, 3, 0x0f, 0x0b, 0x90], false);
        // A short jump and a near one to the same place, and to others.
        check(
            &[0xe9, 0x10, 0, 0, 0],
            &[0xeb, 0x13, 0x90, 0x90, 0x90],
            true,
        );
        check(
            &[0xe9, 0x10, 0, 0, 0],
            &[0xeb, 0x13, 0xcc, 0xcc, 0xcc],
            true,
        );
        check(
            &[0xe9, 0x10, 0, 0, 0],
            &[0xeb, 0x12, 0x90, 0x90, 0x90],
            false,
        );
        check(&[0xe9, 0x10, 0, 0, 0], &[0xe8, 0x10, 0, 0, 0], false);
        // The same instructions at other offsets are not the same code: something may lead there.
        check(&[0x55, 0x90], &[0x90, 0x55], false);
        check(&[0x55, 0x90], &[0x55, 0x0f], false);
        check(&[0x0f, 0x01, 0xca], &[0x90; 3], false);
    }
}
