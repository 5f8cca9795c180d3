//! Where a piece of code finds its caller, before each of its instructions: by every way through it from the first one.
//!
//! For code that no unwind table describes, because the kernel made it while it ran. What holds at an instruction is proved, not
//! guessed: all ways that lead there must agree, and nothing may be done to the stack or frame pointer that is not understood.
//! A way ends where the code is left: by a return, for which the return address must be all that is left of the frame, or by a jump to
//! other code, which must find the stack as this code found it, or the frame as this code has it.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register};

use super::depth::effect;

/// Bytes that code may have below its return address without a frame pointer.
const MAX_DEPTH: u16 = 4096;
const WORD: u16 = 8;

/// How the caller is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Its return address lies so many bytes above the stack pointer; the frame pointer is still the caller's.
    Above(u16),
    /// The frame pointer points at the caller's, over which its return address lies.
    ByFramePointer,
    /// The code is about to return, to the address that the stack pointer points at, whose frame that is: it has dropped its own.
    Dropped,
}

/// The code does something to its stack that is not understood, or its ways do not agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what it does with the stack {offset:#x} bytes on cannot be told")]
pub struct Unclear {
    /// Where, in bytes from its first.
    pub offset: u64,
}

/// What holds before one instruction, with what else has to be known to go on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    caller: Caller,
    /// What the stack pointer points at is the caller's frame pointer.
    pushed: bool,
}

/// What holds before each instruction that can be come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// Each instruction's first byte with its length.
    instructions: BTreeMap<u64, (u64, Caller)>,
}

impl Frames {
    /// Goes all ways through `code`, which is called at its first byte.
    ///
    /// # Errors
    /// [`Unclear`].
    pub fn follow(code: &[u8]) -> Result<Self, Unclear> {
        let mut states: BTreeMap<u64, (u64, State)> = BTreeMap::new();
        let mut left = vec![(0, State::plain(Caller::Above(0)))];
        let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
        while let Some((offset, state)) = left.pop() {
            let unclear = Unclear { offset };
            if let Some((_, before)) = states.get(&offset) {
                if *before != state {
                    return Err(unclear);
                }
                continue;
            }
            let start = usize::try_from(offset).map_err(|_| unclear)?;
            decoder.set_position(start).map_err(|_| unclear)?;
            decoder.set_ip(offset);
            let instruction = decoder.decode();
            states.insert(offset, (instruction.len() as u64, state));
            step(&instruction, code.len() as u64, state, &mut left).ok_or(unclear)?;
        }
        let mut end = 0;
        for (offset, (len, _)) in &states {
            if *offset < end {
                return Err(Unclear { offset: *offset });
            }
            end = offset + len;
        }
        let of = |(offset, (len, state)): (u64, (u64, State))| (offset, (len, state.caller));
        Ok(Self {
            instructions: states.into_iter().map(of).collect(),
        })
    }

    /// What holds before the instruction that the byte at `offset` belongs to; `None` where no way leads.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<Caller> {
        let (start, (len, caller)) = self.instructions.range(..=offset).next_back()?;
        (offset - start < *len).then_some(*caller)
    }
}

impl State {
    fn plain(caller: Caller) -> Self {
        Self {
            caller,
            pushed: false,
        }
    }
}

/// Where `instruction`, in code of `len` bytes, leads from `state`; `None` when that cannot be told.
fn step(
    instruction: &Instruction,
    len: u64,
    state: State,
    left: &mut Vec<(u64, State)>,
) -> Option<()> {
    let next = instruction.next_ip();
    let mut branch = |state: State| {
        let target = instruction.near_branch_target();
        if target < len {
            left.push((target, state));
            return Some(());
        }
        may_leave(state).then_some(())
    };
    match instruction.flow_control() {
        _ if instruction.is_invalid() => None,
        FlowControl::Next => {
            left.push((next, straight(instruction, len, state)?));
            Some(())
        }
        FlowControl::Call if instruction.near_branch_target() < len => None,
        FlowControl::Call | FlowControl::IndirectCall => {
            left.push((next, state));
            (state.caller != Caller::Dropped).then_some(())
        }
        FlowControl::ConditionalBranch => {
            branch(state)?;
            left.push((next, state));
            Some(())
        }
        FlowControl::UnconditionalBranch => branch(state),
        FlowControl::IndirectBranch => may_leave(state).then_some(()),
        FlowControl::Return => {
            let plain = instruction.code() == Code::Retnq;
            let whole = matches!(state.caller, Caller::Above(0) | Caller::Dropped);
            (plain && whole).then_some(())
        }
        // Nothing goes on behind these: padding, and what never happens.
        FlowControl::Interrupt if instruction.code() == Code::Int3 => Some(()),
        FlowControl::Exception => Some(()),
        _ => None,
    }
}

/// Whether other code may be jumped to: it finds the stack as this one did, or the frame that this one has.
fn may_leave(state: State) -> bool {
    matches!(
        state.caller,
        Caller::Above(0) | Caller::ByFramePointer | Caller::Dropped
    )
}

/// What holds behind an instruction that goes on to the next.
fn straight(instruction: &Instruction, len: u64, state: State) -> Option<State> {
    let to_frame = instruction.op0_register().full_register() == Register::RBP;
    let mnemonic = instruction.mnemonic();
    if mnemonic == Mnemonic::Nop {
        return Some(state);
    }
    let plain = |caller| Some(State::plain(caller));
    match state.caller {
        Caller::Dropped => None,
        Caller::ByFramePointer => match mnemonic {
            Mnemonic::Leave => plain(Caller::Above(0)),
            _ if touches_frame_pointer(instruction) => None,
            _ => plain(Caller::ByFramePointer),
        },
        Caller::Above(WORD) if state.pushed && is_frame_made(instruction) => {
            plain(Caller::ByFramePointer)
        }
        Caller::Above(depth) => {
            let pushes = mnemonic == Mnemonic::Push && to_frame;
            if touches_frame_pointer(instruction) || mnemonic == Mnemonic::Leave {
                return None;
            }
            let by = effect(instruction, len)?;
            let drops = depth == 0 && by == -i64::from(WORD) && mnemonic == Mnemonic::Add;
            if drops {
                return plain(Caller::Dropped);
            }
            let depth = u16::try_from(i64::from(depth).checked_add(by)?).ok()?;
            (depth <= MAX_DEPTH).then_some(State {
                caller: Caller::Above(depth),
                pushed: pushes && depth == WORD || state.pushed && by == 0,
            })
        }
    }
}

/// `mov rbp, rsp`.
fn is_frame_made(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_register() == Register::RBP
        && instruction.op1_register() == Register::RSP
}

/// Whether an instruction may change the frame pointer.
fn touches_frame_pointer(instruction: &Instruction) -> bool {
    let is = |register: Register| register.full_register() == Register::RBP;
    match instruction.mnemonic() {
        Mnemonic::Push | Mnemonic::Cmp | Mnemonic::Test => false,
        Mnemonic::Enter => true,
        // These write to their second operand, too.
        Mnemonic::Xchg | Mnemonic::Xadd => {
            is(instruction.op0_register()) || is(instruction.op1_register())
        }
        _ => is(instruction.op0_register()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Caller, Frames};
    use Caller::{Above, ByFramePointer as Framed, Dropped};

    /// What holds at the offsets given; nothing is asked of code that is not clear.
    fn check(code: &[u8], want: Result<&[(u64, Option<Caller>)], u64>) {
        match (Frames::follow(code), want) {
            (Ok(frames), Ok(want)) => {
                for (offset, caller) in want {
                    assert_eq!(frames.at(*offset), *caller, "{code:02x?} at {offset}");
                }
            }
            (Err(unclear), Err(want)) => assert_eq!(unclear.offset, want, "{code:02x?}"),
            (got, want) => panic!("{code:02x?}: {got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn a_program_is_followed_from_its_prologue_to_its_return() {
        // endbr64; nop; nop; push rbp; mov rbp, rsp; endbr64; sub rsp, 0x20; push rbx
        let mut code = vec![0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90];
        code.extend([0x55, 0x48, 0x89, 0xe5, 0xf3, 0x0f, 0x1e, 0xfa]);
        code.extend([0x48, 0x81, 0xec, 0x20, 0, 0, 0, 0x53]);
        // je to the call; pop rbx; leave; ret; int3; call elsewhere; jmp back to pop rbx
        code.extend([
            0x74, 0x04, 0x5b, 0xc9, 0xc3, 0xcc, 0xe8, 0, 1, 0, 0, 0xeb, 0xf5,
        ]);
        check(
            &code,
            Ok(&[
                (0, Some(Above(0))),
                (11, Some(Above(0))),
                (12, Some(Above(8))),
                (13, Some(Above(8))),
                (15, Some(Framed)),
                (26, Some(Framed)),
                (29, Some(Framed)),
                (30, Some(Framed)),
                (31, Some(Above(0))),
                (32, None),
                (33, Some(Framed)),
                (37, Some(Framed)),
                (39, Some(Framed)),
                (40, None),
            ]),
        );
    }

    #[test]
    fn a_trampoline_may_drop_its_own_frame() {
        // push rbp; mov rbp, rsp; call elsewhere; leave; add rsp, 8; jmp elsewhere (a return thunk)
        let head = [
            0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 1, 0, 0, 0xc9, 0x48, 0x83, 0xc4, 8,
        ];
        let jump = [&head[..], &[0xe9, 0, 1, 0, 0]].concat();
        let want = [(9, Some(Framed)), (10, Some(Above(0))), (14, Some(Dropped))];
        check(&jump, Ok(&want));
        check(&[&head[..], &[0xc3]].concat(), Ok(&want));
        // It does nothing else then.
        check(&[&head[..], &[0x53, 0xc3]].concat(), Err(14));
        check(&[&head[..], &[0xe8, 0, 1, 0, 0, 0xc3]].concat(), Err(14));
    }

    #[test]
    fn a_dispatcher_has_no_frame() {
        // cmp rdx, 1; je elsewhere; jmp rdx
        let code = [0x48, 0x83, 0xfa, 1, 0x0f, 0x84, 0, 1, 0, 0, 0xff, 0xe2];
        check(&code, Ok(&[(4, Some(Above(0))), (10, Some(Above(0)))]));
    }

    #[test]
    fn what_is_not_understood_gives_no_answer() {
        for (code, offset) in [
            // Not an instruction; cut off.
            (&[0x06][..], 0),
            (&[0x90], 1),
            (&[0x90, 0x48, 0x83], 1),
            // A return with something left on the stack, and with a frame.
            (&[0x53, 0xc3], 1),
            (&[0x55, 0x48, 0x89, 0xe5, 0xc3], 4),
            (&[0xc2, 8, 0], 0),
            // A frame pointer that is not what was pushed, or not yet.
            (&[0x53, 0x48, 0x89, 0xe5, 0xc9, 0xc3], 1),
            (&[0x48, 0x89, 0xe5, 0xc9, 0xc3], 0),
            (&[0x55, 0x53, 0x5b, 0x48, 0x89, 0xe5, 0xc9, 0xc3], 3),
            // It is changed: mov rbp, rax; xchg rax, rbp; pop rbp; lea ebp, [rax]
            (&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0xc5], 4),
            (&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x95], 4),
            (&[0x55, 0x48, 0x89, 0xe5, 0x5d], 4),
            (&[0x55, 0x48, 0x89, 0xe5, 0x8d, 0x28], 4),
            // Without a frame pointer the stack pointer must be known: mov rsp, rax; leave; pop past the return address.
            (&[0x48, 0x89, 0xc4], 0),
            (&[0xc9, 0xc3], 0),
            (&[0x58, 0xc3], 0),
            // Two ways that do not agree: je over push rbx; ret
            (&[0x74, 1, 0x53, 0xc3], 3),
            // A jump away with something on the stack; a call within.
            (&[0x53, 0xe9, 0, 1, 0, 0], 1),
            (&[0xe8, 0, 0, 0, 0, 0xc3], 0),
            // A jump into the middle of an instruction: je +1 over the first byte of mov eax, 0xc3c3c3c3
            (&[0x74, 1, 0xb8, 0xc3, 0xc3, 0xc3, 0xc3, 0xc3], 3),
            // syscall
            (&[0x0f, 0x05], 0),
        ] {
            check(code, Err(offset));
        }
        // Deeper than any.
        let deep: Vec<u8> = std::iter::repeat_n(0x53, 600).chain([0xc3]).collect();
        check(&deep, Err(512));
    }

    proptest! {
        #[test]
        fn arbitrary_code_never_panics(code in proptest::collection::vec(any::<u8>(), 0..96), at: u8) {
            if let Ok(frames) = Frames::follow(&code) {
                let _ = frames.at(at.into());
            }
        }
    }
}
