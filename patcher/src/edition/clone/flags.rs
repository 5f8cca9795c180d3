//! Whether the processor's status flags are free at a static branch, so that a test of its key may stand there.
//!
//! The flags are followed along all ways on until they are written anew, or the function is left or calls: nothing reaches across that in them.
//! Pushing all flags does not count as a use: what comes before a static branch in C leaves the status flags undefined (gcc takes every
//! `asm` for one that changes them), and nothing but the interrupt flag is asked of what was pushed.

use std::collections::HashSet;

use iced_x86::{FlowControl, Instruction, Mnemonic, RflagsBits};

use super::moved::{Dest, Steps, What};

/// The flags that a comparison changes.
const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// The first instruction found that needs flags from before the static branch at step `from`; `None` if none does.
pub(super) fn needed<'s>(steps: &'s Steps<'_>, from: usize) -> Option<&'s Instruction> {
    let mut seen = HashSet::new();
    let mut ahead: Vec<(usize, u32)> = steps.after(from).map(|step| (step, STATUS)).collect();
    while let Some((at, live)) = ahead.pop() {
        if !seen.insert((at, live)) {
            continue;
        }
        let Some(step) = steps.all.get(at) else {
            continue;
        };
        let live = match &step.what {
            // It is a test itself, which writes them all.
            What::Test(..) | What::On(..) => continue,
            What::Plain(instruction) | What::Branch(instruction) => {
                let pushes = instruction.mnemonic() == Mnemonic::Pushfq;
                if instruction.rflags_read() & live != 0 && !pushes {
                    return Some(instruction);
                }
                if matches!(
                    instruction.flow_control(),
                    FlowControl::Call | FlowControl::IndirectCall
                ) {
                    continue;
                }
                live & !instruction.rflags_modified()
            }
        };
        if live != 0 {
            ahead.extend(steps.after(at).map(|step| (step, live)));
        }
    }
    None
}

impl Steps<'_> {
    /// The steps that may follow `at` within the function.
    fn after(&self, at: usize) -> impl Iterator<Item = usize> + use<> {
        let step = self.all.get(at);
        let leaves = step.is_some_and(|step| match &step.what {
            What::Plain(instruction) | What::Branch(instruction) => {
                super::moved::leaves(instruction)
            }
            What::Test(..) => false,
            What::On(..) => true,
        });
        let next = (!leaves && at + 1 < self.all.len()).then_some(at + 1);
        let branch = step.and_then(|step| match step.dest {
            Some(Dest::Step(to)) => Some(to),
            _ => None,
        });
        next.into_iter().chain(branch)
    }
}
