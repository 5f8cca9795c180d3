//! Patch sites in x86-64 code: the fentry site, whole displaced instructions, the jump and the NOPs that replace them,
//! and the relocated head that keeps displaced instructions runnable elsewhere.
//!
//! Nothing here reads a guest: bytes and their address come in, bytes or a reason come out.
//! Encodings: Intel SDM vol. 2 (`JMP rel32` E9, `ENDBR64` F3 0F 1E FA, table 4-12 for the multi-byte NOPs).

use std::ops::Range;

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FlowControl, Instruction,
    InstructionBlock, Mnemonic, OpKind, Register,
};

use crate::addr::Gva;

/// Length of `jmp rel32`, in bytes.
pub const JUMP_LEN: usize = 5;
/// Length of a fentry site (`call __fentry__`, or the NOP that the kernel puts there), in bytes.
pub const FENTRY_LEN: usize = 5;
/// The longest instruction of the architecture, in bytes.
pub const MAX_INSTRUCTION_LEN: usize = 15;
/// `endbr64`.
pub const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// The 5-byte NOP that the kernel itself puts on an idle fentry site.
pub const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Multi-byte NOPs of 1 to 9 bytes, as recommended by the SDM (vol. 2, `NOP`, table 4-12).
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &NOP5,
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// Why code cannot be decoded, moved or jumped from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsnError {
    /// The bytes are no instruction, or are cut off.
    #[error("the bytes at {at} are not an instruction that can be decoded: {bytes:02x?}")]
    Undecodable {
        /// Address of the first such byte.
        at: Gva,
        /// Up to 15 bytes from there.
        bytes: Vec<u8>,
    },
    /// A 32-bit displacement does not reach.
    #[error("a jump from {from} does not reach {to}: they are more than 2 GiB apart")]
    OutOfReach {
        /// Address of the jump.
        from: Gva,
        /// Where it should lead.
        to: Gva,
    },
    /// The instruction would not do the same elsewhere.
    #[error("the instruction at {at} (`{text}`) cannot be moved: {why}")]
    Immovable {
        /// Address of the instruction.
        at: Gva,
        /// The instruction, disassembled.
        text: String,
        /// What stands in the way.
        why: &'static str,
    },
}

/// The bytes of `jmp to`, to be placed at `from`.
///
/// # Errors
/// [`InsnError::OutOfReach`] beyond 2 GiB.
pub fn jump(from: Gva, to: Gva) -> Result<[u8; JUMP_LEN], InsnError> {
    let next = from.0.wrapping_add(JUMP_LEN as u64);
    let distance = to.0.wrapping_sub(next).cast_signed();
    let distance = i32::try_from(distance).map_err(|_| InsnError::OutOfReach { from, to })?;
    let mut bytes = [0xe9, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&distance.to_le_bytes());
    Ok(bytes)
}

/// `len` bytes of NOPs that a linear decoder walks in whole instructions.
#[must_use]
pub fn nops(mut len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while len > 0 {
        let take = len.min(NOPS.len());
        bytes.extend_from_slice(NOPS[take - 1]);
        len -= take;
    }
    bytes
}

/// Decodes the instruction that starts `offset` bytes into `code`, which lies at `base`.
fn decode(code: &[u8], base: Gva, offset: usize) -> Result<Instruction, InsnError> {
    let rest = code.get(offset..).unwrap_or_default();
    let at = Gva(base.0.wrapping_add(offset as u64));
    let mut decoder = Decoder::with_ip(64, rest, at.0, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        let bytes = rest.iter().take(MAX_INSTRUCTION_LEN).copied().collect();
        return Err(InsnError::Undecodable { at, bytes });
    }
    Ok(instruction)
}

/// The shortest run of whole instructions from the start of `code` (at `base`) that covers at least `min` bytes.
///
/// # Errors
/// [`InsnError::Undecodable`], also when `code` ends too early.
pub fn whole_instructions(
    code: &[u8],
    base: Gva,
    min: usize,
) -> Result<Vec<Instruction>, InsnError> {
    let mut instructions = Vec::new();
    let mut len = 0;
    while len < min {
        let instruction = decode(code, base, len)?;
        len += instruction.len();
        instructions.push(instruction);
    }
    Ok(instructions)
}

/// A branch that leads somewhere it must not, or whose target cannot be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BranchFound {
    /// A direct branch at `.at` leads to `.to`.
    Into {
        /// Address of the branch.
        at: Gva,
        /// Its target.
        to: Gva,
    },
    /// An indirect jump through a table, which may lead anywhere in the function.
    Table {
        /// Address of the jump.
        at: Gva,
        /// The jump, disassembled.
        text: String,
    },
}

/// Looks through all of `code` (at `base`) for a branch to a byte of `forbidden`, or a jump through a table.
///
/// Calls count too. An indirect jump through a plain register or memory slot is a tail call and is passed over; one
/// through an indexed table is reported, because its targets are not in the code.
///
/// # Errors
/// [`InsnError::Undecodable`].
pub fn find_branch_into(
    code: &[u8],
    base: Gva,
    forbidden: &Range<Gva>,
) -> Result<Option<BranchFound>, InsnError> {
    let mut offset = 0;
    while offset < code.len() {
        let instruction = decode(code, base, offset)?;
        let at = Gva(instruction.ip());
        if has_near_target(&instruction) {
            let to = Gva(instruction.near_branch_target());
            if forbidden.contains(&to) {
                return Ok(Some(BranchFound::Into { at, to }));
            }
        } else if instruction.flow_control() == FlowControl::IndirectBranch
            && instruction.op0_kind() == OpKind::Memory
            && instruction.memory_index() != Register::None
        {
            return Ok(Some(BranchFound::Table {
                at,
                text: disassemble(&instruction),
            }));
        }
        offset += instruction.len();
    }
    Ok(None)
}

/// Whether operand 0 is a near branch target in the instruction itself.
pub(crate) fn has_near_target(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

/// Instructions moved to another address, with the jump back to what follows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Where it is made to run.
    pub at: Gva,
    /// Its bytes, the jump back included.
    pub bytes: Vec<u8>,
    /// For each instruction its offset in `bytes`, and the address whose unwind rule holds there: that which it had, and of the jump
    /// back that which it leads to.
    pub moved: Vec<(u32, Gva)>,
}

/// Moves `displaced` to `at`, followed by a jump to the byte after the last of them.
///
/// Padding behind an instruction that leaves the function (`int3` or NOPs after `ret`) is not moved: nothing leads there.
/// The result depends on `at` only in its displacements, not in its length, as long as everything stays within 2 GiB.
///
/// # Errors
/// [`InsnError::Immovable`] when an instruction would not do the same there.
pub fn relocate(displaced: &[Instruction], at: Gva) -> Result<Head, InsnError> {
    let Some(last) = displaced.last() else {
        return Ok(Head {
            at,
            bytes: Vec::new(),
            moved: Vec::new(),
        });
    };
    let mut block = Vec::with_capacity(displaced.len() + 1);
    let mut left = false;
    for instruction in displaced {
        if left && matches!(instruction.mnemonic(), Mnemonic::Int3 | Mnemonic::Nop) {
            continue;
        }
        if let Some(why) = immovable(instruction) {
            return Err(refuse_move(instruction, why));
        }
        left = leaves(instruction);
        block.push(*instruction);
    }
    let back = Instruction::with_branch(Code::Jmp_rel32_64, last.next_ip())
        .map_err(|_| refuse_move(last, "no jump back to what follows it can be encoded"))?;
    block.push(back);
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let encoded = BlockEncoder::encode(64, InstructionBlock::new(&block, at.0), options)
        .map_err(|_| refuse_move(last, "it refers to something out of reach of its new place"))?;
    check_moved(
        &block,
        &encoded.code_buffer,
        &encoded.new_instruction_offsets,
        at,
    )?;
    let rules = block.iter().map(Instruction::ip);
    let moved = encoded
        .new_instruction_offsets
        .iter()
        .zip(rules.take(block.len() - 1).chain([last.next_ip()]))
        .map(|(&new, rule)| (new, Gva(rule)))
        .collect();
    Ok(Head {
        at,
        bytes: encoded.code_buffer,
        moved,
    })
}

/// Whether control never goes on to the next instruction.
fn leaves(instruction: &Instruction) -> bool {
    use FlowControl::{IndirectBranch, Return, UnconditionalBranch};
    matches!(
        instruction.flow_control(),
        Return | IndirectBranch | UnconditionalBranch
    )
}

/// What makes an instruction mean something else at another address, beyond what an encoder can fix.
fn immovable(instruction: &Instruction) -> Option<&'static str> {
    match instruction.flow_control() {
        FlowControl::Interrupt | FlowControl::Exception => {
            Some("the kernel finds out what it means by its address (bug table, breakpoint)")
        }
        FlowControl::XbeginXabortXend => Some("it begins or ends a transaction"),
        _ => None,
    }
}

/// Proves that the encoder only changed displacements and branch widths: no memory slots for far targets, no lost instruction.
fn check_moved(
    displaced: &[Instruction],
    code: &[u8],
    offsets: &[u32],
    at: Gva,
) -> Result<(), InsnError> {
    for (instruction, &offset) in displaced.iter().zip(offsets) {
        let moved = usize::try_from(offset)
            .ok()
            .and_then(|offset| decode(code, at, offset).ok());
        let same = moved.is_some_and(|moved| {
            moved.mnemonic() == instruction.mnemonic()
                && moved.op_count() == instruction.op_count()
                && (!has_near_target(instruction)
                    || moved.near_branch_target() == instruction.near_branch_target())
                && (!instruction.is_ip_rel_memory_operand()
                    || moved.ip_rel_memory_address() == instruction.ip_rel_memory_address())
        });
        if !same {
            return Err(refuse_move(
                instruction,
                "it cannot be encoded alike at its new place",
            ));
        }
    }
    Ok(())
}

fn refuse_move(instruction: &Instruction, why: &'static str) -> InsnError {
    InsnError::Immovable {
        at: Gva(instruction.ip()),
        text: disassemble(instruction),
        why,
    }
}

/// The instruction in Intel syntax.
#[must_use]
pub fn disassemble(instruction: &Instruction) -> String {
    use iced_x86::{Formatter, NasmFormatter};
    let mut text = String::new();
    NasmFormatter::new().format(instruction, &mut text);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        BranchFound, InsnError, JUMP_LEN, disassemble, find_branch_into, jump, nops, relocate,
        whole_instructions,
    };
    use crate::addr::Gva;

    const BASE: Gva = Gva(0xffff_ffff_8100_0000);
    const ARENA: Gva = Gva(0xffff_ffff_ff80_0000);

    fn displaced_len(code: &[u8]) -> Result<usize, InsnError> {
        Ok(whole_instructions(code, BASE, JUMP_LEN)?
            .iter()
            .map(iced_x86::Instruction::len)
            .sum())
    }

    #[test]
    fn whole_instructions_cover_the_jump() {
        // push rbp; mov rbp, rsp; sub rsp, 8
        assert_eq!(
            displaced_len(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x08]),
            Ok(8)
        );
        // mov rax, gs:[0x12345678] is nine bytes
        assert_eq!(
            displaced_len(&[0x65, 0x48, 0x8b, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12, 0x90]),
            Ok(9)
        );
        // Cut off in the middle of the second instruction.
        assert!(
            matches!(displaced_len(&[0x55, 0x48, 0x89]), Err(InsnError::Undecodable { at, .. }) if at.0 == BASE.0 + 1)
        );
        // `push es` does not exist in 64-bit mode.
        assert!(matches!(
            displaced_len(&[0x06, 0x90, 0x90, 0x90, 0x90]),
            Err(InsnError::Undecodable { .. })
        ));
    }

    #[test]
    fn a_jump_reaches_two_gib() {
        assert_eq!(jump(Gva(0x1000), Gva(0x1005)), Ok([0xe9, 0, 0, 0, 0]));
        assert_eq!(
            jump(Gva(0x1000), Gva(0x1000)),
            Ok([0xe9, 0xfb, 0xff, 0xff, 0xff])
        );
        assert!(jump(ARENA, BASE).is_ok());
        let far = Gva(BASE.0 - (1 << 31));
        assert_eq!(
            jump(BASE, far),
            Err(InsnError::OutOfReach {
                from: BASE,
                to: far
            })
        );
    }

    #[test]
    fn spare_bytes_decode_as_nops() {
        for len in 0..32 {
            let bytes = nops(len);
            assert_eq!(bytes.len(), len);
            for instruction in whole_instructions(&bytes, BASE, len).unwrap() {
                assert_eq!(instruction.mnemonic(), iced_x86::Mnemonic::Nop);
            }
        }
    }

    #[test]
    fn the_head_keeps_what_instructions_refer_to() {
        // test edi, edi; je +0x20; mov rax, [rip+0x100]; call +0
        let code = [
            0x85, 0xff, 0x74, 0x20, 0x48, 0x8b, 0x05, 0x00, 0x01, 0x00, 0x00, 0xe8, 0x00, 0x00,
            0x00, 0x00,
        ];
        let displaced = whole_instructions(&code, BASE, code.len()).unwrap();
        let head = relocate(&displaced, ARENA).unwrap();
        let moved = whole_instructions(&head.bytes, ARENA, head.bytes.len()).unwrap();
        assert_eq!(moved[1].near_branch_target(), BASE.0 + 4 + 0x20);
        assert_eq!(moved[2].ip_rel_memory_address(), BASE.0 + 11 + 0x100);
        assert_eq!(moved[3].near_branch_target(), BASE.0 + 16);
        assert_eq!(moved[4].near_branch_target(), BASE.0 + 16, "the jump back");
        assert_eq!(moved.len(), 5);
        let moved: Vec<_> = head
            .moved
            .iter()
            .map(|(at, old)| (*at, old.0 - BASE.0))
            .collect();
        assert_eq!(moved, [(0, 0), (2, 2), (8, 4), (15, 11), (20, 16)]);
    }

    #[test]
    fn what_cannot_move_is_refused_by_name() {
        let check = |code: &[u8], want: &str| {
            let displaced = whole_instructions(code, BASE, code.len()).unwrap();
            let InsnError::Immovable { text, .. } = relocate(&displaced, ARENA).unwrap_err() else {
                panic!("{want}: another error");
            };
            assert_eq!(text, want);
        };
        check(&[0x90, 0x90, 0x90, 0x0f, 0x0b], "ud2");
        check(&[0x90, 0x90, 0x90, 0x90, 0xcc], "int3");
    }

    #[test]
    fn padding_behind_a_return_stays_behind() {
        // xor eax, eax; ret; int3; int3
        let displaced =
            whole_instructions(&[0x31, 0xc0, 0xc3, 0xcc, 0xcc], BASE, JUMP_LEN).unwrap();
        let head = relocate(&displaced, ARENA).unwrap();
        assert_eq!(head.bytes[..3], [0x31, 0xc0, 0xc3]);
        assert_eq!(head.bytes.len(), 3 + JUMP_LEN);
        // A function that is nothing but a jump elsewhere.
        let code = jump(BASE, Gva(BASE.0 + 0x1234)).unwrap();
        let head = relocate(&whole_instructions(&code, BASE, JUMP_LEN).unwrap(), ARENA).unwrap();
        assert_eq!(head.bytes[..5], jump(ARENA, Gva(BASE.0 + 0x1234)).unwrap());
    }

    #[test]
    fn a_head_out_of_reach_is_refused() {
        let code = [0x48, 0x8b, 0x05, 0x00, 0x01, 0x00, 0x00];
        let displaced = whole_instructions(&code, BASE, code.len()).unwrap();
        assert!(matches!(
            relocate(&displaced, Gva(0x1000_0000_0000)),
            Err(InsnError::Immovable { .. })
        ));
    }

    #[test]
    fn branches_back_are_found() {
        // nop; nop; dec edi; jne -4 (to BASE + 2)
        let code = [0x90, 0x90, 0xff, 0xcf, 0x75, 0xfc, 0xc3];
        let found = |from: u64, to: u64| {
            find_branch_into(&code, BASE, &(Gva(BASE.0 + from)..Gva(BASE.0 + to))).unwrap()
        };
        let branch = Some(BranchFound::Into {
            at: Gva(BASE.0 + 4),
            to: Gva(BASE.0 + 2),
        });
        assert_eq!(found(0, 5), branch);
        assert_eq!(found(2, 3), branch);
        assert_eq!(found(0, 2), None);
        assert_eq!(found(3, 7), None);
    }

    #[test]
    fn a_jump_table_is_found() {
        // jmp [rax*8 + 0x1000]; jmp rax is a tail call
        let table = [0xff, 0x24, 0xc5, 0x00, 0x10, 0x00, 0x00];
        let found = find_branch_into(&table, BASE, &(BASE..Gva(BASE.0 + 5))).unwrap();
        assert!(matches!(found, Some(BranchFound::Table { at, .. }) if at == BASE));
        assert_eq!(
            find_branch_into(&[0xff, 0xe0], BASE, &(BASE..Gva(BASE.0 + 5))),
            Ok(None)
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(code in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = find_branch_into(&code, BASE, &(BASE..Gva(BASE.0 + 16)));
            if let Ok(displaced) = whole_instructions(&code, BASE, JUMP_LEN)
                && let Ok(head) = relocate(&displaced, ARENA)
            {
                let again = whole_instructions(&head.bytes, ARENA, head.bytes.len()).unwrap();
                let last = again.last().unwrap();
                prop_assert_eq!(last.near_branch_target(), displaced.last().unwrap().next_ip(), "{}", disassemble(last));
            }
        }
    }
}
