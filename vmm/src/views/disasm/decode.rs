//! Bytes to instructions, with the names of what they refer to.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, GasFormatter, Instruction, OpKind, Register,
};
use patcher::addr::{Gva, LinkAddr};

use crate::views::place::Places;
use crate::views::{Subject, text_of};

/// The kernel runs in 64-bit mode.
const BITS: u32 = 64;

/// One instruction, or what is none up to where one could begin.
pub(super) struct Decoded {
    pub(super) at: Gva,
    /// Bytes from the function's first.
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) text: String,
    pub(super) target: Option<String>,
}

/// Decodes `bytes`, which begin at `start`; `target` names what an instruction refers to.
pub(super) fn decode(
    bytes: &[u8],
    start: Gva,
    target: impl Fn(&Instruction) -> Option<String>,
) -> Vec<Decoded> {
    let mut decoder = Decoder::with_ip(BITS, bytes, start.0, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    let options = formatter.options_mut();
    options.set_uppercase_hex(false);
    options.set_small_hex_numbers_in_decimal(false);
    options.set_space_after_operand_separator(true);
    // An instruction's own address is what it is relative to: its target stands beside it.
    options.set_rip_relative_addresses(true);
    let mut all = Vec::new();
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let from = decoder.position();
        decoder.decode_out(&mut instruction);
        let mut text = String::new();
        if instruction.is_invalid() {
            text.push_str("(bad)");
        } else {
            formatter.format(&instruction, &mut text);
        }
        all.push(Decoded {
            at: Gva(instruction.ip()),
            offset: from as u64,
            bytes: bytes
                .get(from..decoder.position())
                .unwrap_or_default()
                .to_vec(),
            text,
            target: target(&instruction),
        });
    }
    all
}

/// Names for what instructions refer to.
pub(super) struct Targets<'a> {
    subject: &'a Subject<'a>,
    places: &'a Places<'a>,
}

impl<'a> Targets<'a> {
    pub(super) fn new(subject: &'a Subject<'a>, places: &'a Places<'a>) -> Self {
        Self { subject, places }
    }

    /// The first thing of a name that an instruction branches to, or whose address is in it.
    pub(super) fn of(&self, instruction: &Instruction) -> Option<String> {
        if matches!(
            instruction.flow_control(),
            FlowControl::Call | FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        ) {
            return self.name(instruction.near_branch_target());
        }
        (0..instruction.op_count()).find_map(|operand| match instruction.op_kind(operand) {
            OpKind::Memory => self.memory(instruction),
            OpKind::Immediate32to64 | OpKind::Immediate64 => {
                self.name(instruction.immediate(operand))
            }
            _ => None,
        })
    }

    fn memory(&self, instruction: &Instruction) -> Option<String> {
        let base = instruction.memory_base();
        let direct = base == Register::None && instruction.memory_index() == Register::None;
        let at = instruction.memory_displacement64();
        if instruction.segment_prefix() != Register::GS {
            // A table that is indexed has its address here too.
            let absolute = base == Register::None;
            return (absolute || instruction.is_ip_rel_memory_operand())
                .then(|| self.name(at))
                .flatten();
        }
        // The segment begins where the CPU's own variables do.
        if !direct && !instruction.is_ip_rel_memory_operand() {
            return None;
        }
        let kernel = self.subject.kernel;
        let symbols = kernel.image().symbols();
        // What is linked from zero on does not move; what is linked in the image does.
        let moved = if symbols.percpu_start() == LinkAddr(0) {
            0
        } else {
            kernel.slide()
        };
        let (symbol, offset) = symbols.containing(LinkAddr(at.wrapping_sub(moved)))?;
        symbol
            .percpu
            .then(|| format!("{}+{offset:#x} of this CPU", symbol.name))
    }

    fn name(&self, at: u64) -> Option<String> {
        self.places.at(Gva(at)).map(|place| text_of(&place))
    }
}
