//! How far straight-line code moves the stack pointer.
//!
//! For code that no unwind table describes as it is: read from one end to the other, each branch within it taken for balanced,
//! as code must be whose stack can be followed at all. Whatever moves the stack pointer by an unknown amount gives no answer.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register};

/// By how many bytes the stack pointer is lower at the end of `code` than at its beginning; `None` if that cannot be told, or if `code` ends
/// within an instruction.
///
/// A call that leads out of `code` has returned when what follows is executed. One that leads further down in it never will: its
/// return address stays on the stack.
#[must_use]
pub fn pushed(code: &[u8]) -> Option<i64> {
    let mut depth: i64 = 0;
    for instruction in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        depth = depth.checked_add(effect(&instruction, code.len() as u64)?)?;
    }
    Some(depth)
}

/// By how many bytes the stack pointer is lower at the end of `code` than at its first instruction at or behind `from`, where an unwind table
/// describes that all from there on is alike: what is pushed there is what the table does not know of. `code` begins where a function does, so
/// that each of its instructions is read from where it begins.
///
/// Where a branch leaves and nothing is pushed, what follows is come to from elsewhere, and is as the table says.
#[must_use]
pub fn pushed_since(code: &[u8], from: usize) -> Option<i64> {
    let (mut depth, mut end): (i64, u64) = (0, 0);
    for instruction in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        if instruction.is_invalid() {
            return None;
        }
        end = instruction.next_ip();
        let leaves = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch
                | FlowControl::IndirectBranch
                | FlowControl::Return
                | FlowControl::Exception
        );
        if instruction.ip() >= from as u64 && !(leaves && depth == 0) {
            depth = depth.checked_add(effect(&instruction, code.len() as u64)?)?;
        }
    }
    (end == code.len() as u64).then_some(depth)
}

/// Whether no instruction of `code` moves the stack pointer.
#[must_use]
pub fn is_level(code: &[u8]) -> bool {
    let mut instructions = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).into_iter();
    instructions.all(|instruction| effect(&instruction, code.len() as u64) == Some(0))
}

/// What one instruction of code of `len` bytes pushes.
pub(super) fn effect(instruction: &Instruction, len: u64) -> Option<i64> {
    let immediate = || instruction.try_immediate(1).ok();
    let writes_sp = instruction.op0_register().full_register() == Register::RSP;
    match (instruction.flow_control(), instruction.mnemonic()) {
        _ if instruction.is_invalid() => None,
        (FlowControl::Call, _) => {
            let inside = (instruction.next_ip()..=len).contains(&instruction.near_branch_target());
            Some(if inside { 8 } else { 0 })
        }
        (FlowControl::IndirectCall, _) => Some(0),
        (FlowControl::Next, Mnemonic::Sub) if writes_sp => immediate().map(u64::cast_signed),
        (FlowControl::Next, Mnemonic::Add) if writes_sp => {
            immediate().and_then(|by| by.cast_signed().checked_neg())
        }
        (FlowControl::Next, Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push) => {
            Some(-i64::from(instruction.stack_pointer_increment()))
        }
        (FlowControl::Next, Mnemonic::Leave | Mnemonic::Enter) => None,
        (FlowControl::Next, Mnemonic::Xchg)
            if instruction.op1_register().full_register() == Register::RSP =>
        {
            None
        }
        (FlowControl::Next, _) if writes_sp => None,
        (FlowControl::Next, _) => Some(-i64::from(instruction.stack_pointer_increment())),
        // Padding that is never executed.
        (FlowControl::Interrupt, _) if instruction.code() == Code::Int3 => Some(0),
        (FlowControl::ConditionalBranch, _) => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{is_level, pushed, pushed_since};

    #[test]
    fn each_instruction_counts_as_what_it_does_to_the_stack_pointer() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (&[], Some(0)),
            // push rbx; pushfq; pop rax
            (&[0x53], Some(8)),
            (&[0x9c], Some(8)),
            (&[0x9c, 0x58], Some(0)),
            // sub rsp, 16; add rsp, 0x100
            (&[0x48, 0x83, 0xec, 0x10], Some(16)),
            (&[0x48, 0x81, 0xc4, 0, 1, 0, 0], Some(-256)),
            // cmp rsp, 16; mov rax, [rsp]; nop; lfence
            (&[0x48, 0x83, 0xfc, 0x10], Some(0)),
            (&[0x48, 0x8b, 0x04, 0x24, 0x90, 0x0f, 0xae, 0xe8], Some(0)),
            // A call that leads out, one over the int3 behind it, and one to the end.
            (&[0xe8, 0, 1, 0, 0, 0x53], Some(8)),
            (&[0xe8, 1, 0, 0, 0, 0xcc, 0x90], Some(8)),
            (&[0xe8, 1, 0, 0, 0, 0xcc], Some(8)),
            // jne back
            (&[0x53, 0x75, 0xfd], Some(8)),
            // xchg [r13+2], ax
            (&[0x66, 0x41, 0x87, 0x45, 0x02], Some(0)),
            // mov rsp, rax; xchg rax, rsp; pop rsp; leave; and rsp, -16; sub rsp, rax
            (&[0x48, 0x89, 0xc4], None),
            (&[0x48, 0x94], None),
            (&[0x48, 0x87, 0xc4], None),
            (&[0x48, 0x87, 0xe0], None),
            (&[0x5c], None),
            (&[0xc9], None),
            (&[0x48, 0x83, 0xe4, 0xf0], None),
            (&[0x48, 0x29, 0xc4], None),
            // ret; jmp; half an instruction
            (&[0xc3], None),
            (&[0xeb, 0x00], None),
            (&[0x48, 0x83], None),
        ];
        for (code, want) in cases {
            assert_eq!(pushed(code), *want, "{code:02x?}");
        }
    }

    #[test]
    fn only_what_is_pushed_behind_the_place_counts() {
        // push rbp; nop; pushfq; pop rax; jmp; push rbx; jmp
        let code = [0x55, 0x90, 0x9c, 0x58, 0xeb, 0, 0x53, 0xeb, 0];
        for (len, from, want) in [
            (0, 0, Some(0)),
            (1, 0, Some(8)),
            (2, 1, Some(0)),
            (3, 1, Some(8)),
            (4, 1, Some(0)),
            (6, 1, Some(0)),
            (7, 1, Some(8)),
            (9, 1, None),
            // Within an instruction.
            (5, 1, None),
        ] {
            assert_eq!(pushed_since(&code[..len], from), want, "{len} {from}");
        }
    }

    #[test]
    fn code_is_level_only_if_each_of_its_instructions_is() {
        assert!(is_level(&[0x90, 0xe8, 0, 1, 0, 0]));
        assert!(!is_level(&[0x9c, 0x58]));
        assert!(!is_level(&[0xc3]));
    }
}
