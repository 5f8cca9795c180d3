//! Random functions and their clones do the same, whatever their static branches are switched to and whichever loads fault.

use iced_x86::code_asm::{CodeAssembler, CodeLabel, eax, edi, ptr, rax, rdi, rdx, rsi};
use iced_x86::{BlockEncoderOptions, Code, Instruction, MemoryOperand, Register};
use proptest::prelude::*;

use super::moved::{Moved, To};
use super::original::{Original, Part, StaticBranch, TableEntry};
use crate::addr::Gva;
use crate::x86::insn::NOP5;
use crate::x86::run::Run;

const AT: u64 = 0xffff_ffff_8100_0000;
const CLONE: u64 = 0xffff_ffff_ff80_0000;
const OUTER: u64 = 0xffff_ffff_8200_0000;
const DATA: u64 = 0xffff_ffff_8300_0000;
const KEYS: u64 = DATA + 0x100;
const STACK: u64 = 0xffff_c900_0000_8000;
const STOP: u64 = 0x1000;

/// What one block of a function does before it goes on to the next, or to one further down.
#[derive(Clone, Debug)]
enum Op {
    Compute(u8, i32),
    Load,
    Call,
    Label,
    Fault(bool, usize),
    Branch(u8, usize),
    Jump(usize),
    Static {
        on: bool,
        when_on: bool,
        to: usize,
    },
    /// So many bytes that do nothing: makes branches near ones.
    Room(u8),
    Return,
}

fn op() -> impl Strategy<Value = Op> {
    let to = || 0_usize..4;
    prop_oneof![
        4 => (0_u8..5, any::<i32>()).prop_map(|(kind, number)| Op::Compute(kind, number)),
        1 => Just(Op::Load),
        2 => Just(Op::Call),
        1 => Just(Op::Label),
        2 => (any::<bool>(), to()).prop_map(|(there, to)| Op::Fault(there, to)),
        4 => (0_u8..6, to()).prop_map(|(condition, to)| Op::Branch(condition, to)),
        1 => to().prop_map(Op::Jump),
        3 => (any::<bool>(), any::<bool>(), to()).prop_map(|(on, when_on, to)| Op::Static { on, when_on, to }),
        1 => (1_u8..140).prop_map(Op::Room),
        1 => Just(Op::Return),
    ]
}

/// A function as the kernel would have it, and what runs it.
struct World {
    original: Original,
    run: Run,
}

fn compute(a: &mut CodeAssembler, kind: u8, number: i32) {
    match kind {
        0 => a.mov(rax, i64::from(number)).unwrap(),
        1 => a.xor(rax, rdi).unwrap(),
        2 => a.inc(rdi).unwrap(),
        3 => a.lea(rax, rax + rdi * 2 + number).unwrap(),
        _ => a.imul_2(eax, edi).unwrap(),
    }
}

fn load(a: &mut CodeAssembler) {
    let from = MemoryOperand::with_base_displ(Register::RIP, DATA.cast_signed());
    let load = Instruction::with2(Code::Mov_r64_rm64, Register::RSI, from);
    a.add_instruction(load.unwrap()).unwrap();
    a.lea(rax, rax + rsi).unwrap();
}

fn branch(a: &mut CodeAssembler, condition: u8, to: CodeLabel) {
    match condition {
        0 => a.je(to).unwrap(),
        1 => a.jne(to).unwrap(),
        2 => a.jb(to).unwrap(),
        3 => a.jg(to).unwrap(),
        4 => a.jle(to).unwrap(),
        _ => a.jae(to).unwrap(),
    }
}

/// Puts the function together; its second part begins at the block `cut`.
fn world(ops: &[Op], cut: usize) -> World {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut blocks: Vec<CodeLabel> = (0..=ops.len()).map(|_| a.create_label()).collect();
    let further = |from: usize, by: usize| (from + 1 + by).min(ops.len());
    let (mut branches, mut faults, mut run) = (Vec::new(), Vec::new(), Run::default());
    for (number, op) in ops.iter().enumerate() {
        a.set_label(&mut blocks[number]).unwrap();
        // Each block makes flags of its own, so that none is needed from before.
        a.cmp(rdi, 77).unwrap();
        match op {
            Op::Compute(kind, by) => compute(&mut a, *kind, *by),
            Op::Load => load(&mut a),
            Op::Call => a.call(OUTER).unwrap(),
            Op::Label => {
                // Its own place is not the same in a clone: only the distance is.
                a.lea(rsi, ptr(blocks[ops.len()])).unwrap();
                a.lea(rdx, ptr(blocks[cut.max(number + 1)])).unwrap();
                a.cmp(rsi, rdx).unwrap();
                a.mov(rsi, 0_u64).unwrap();
                a.mov(rdx, 0_u64).unwrap();
            }
            Op::Fault(there, by) => {
                let mut here = a.create_label();
                a.mov(rsi, if *there { DATA } else { 8 }).unwrap();
                a.set_label(&mut here).unwrap();
                a.mov(rdx, ptr(rsi)).unwrap();
                faults.push((here, further(number, *by)));
            }
            Op::Branch(condition, by) => branch(&mut a, *condition, blocks[further(number, *by)]),
            Op::Jump(by) => a.jmp(blocks[further(number, *by)]).unwrap(),
            Op::Static { on, when_on, to } => {
                let mut here = a.create_label();
                a.set_label(&mut here).unwrap();
                let to = further(number, *to);
                if on == when_on {
                    a.jmp(blocks[to]).unwrap();
                } else {
                    a.db(&NOP5).unwrap();
                }
                let key = KEYS + 4 * branches.len() as u64;
                run.store(key, 4, u64::from(*on));
                branches.push((here, to, key, *when_on));
            }
            Op::Room(bytes) => (0..*bytes).for_each(|_| a.nop().unwrap()),
            Op::Return => a.ret().unwrap(),
        }
    }
    a.set_label(&mut blocks[ops.len()]).unwrap();
    a.lea(rax, rax + 1).unwrap();
    a.ret().unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let done = a.assemble_options(AT, options).unwrap();
    let ip = |label: &CodeLabel| done.label_ip(label).unwrap();
    let code = done.inner.code_buffer.clone();
    let cut = usize::try_from(ip(&blocks[cut]) - AT).unwrap();
    let mut original = Original {
        name: "f".to_owned(),
        slide: 0,
        parts: Vec::new(),
    };
    for (name, range) in [("f", 0..cut), ("f.cold", cut..code.len())] {
        let at = AT + range.start as u64;
        let inside = |ip: u64| (at..AT + range.end as u64).contains(&ip);
        let sites = branches.iter().filter(|(here, ..)| inside(ip(here)));
        let sites = sites.map(|(here, to, key, when_on)| {
            let start = ip(here);
            let short = code[usize::try_from(start - AT).unwrap()] == 0xeb;
            StaticBranch {
                range: Gva(start)..Gva(start + if short { 2 } else { 5 }),
                to: Gva(ip(&blocks[*to])),
                count: Gva(*key),
                when_on: *when_on,
            }
        });
        let entries = faults.iter().filter(|(here, _)| inside(ip(here)));
        let entries = entries.map(|(here, to)| TableEntry {
            at: Gva(ip(here)),
            bytes: vec![0; 12],
            insn: 0,
            leads: vec![(4, Gva(ip(&blocks[*to])))],
        });
        original.parts.push(Part {
            name: name.to_owned(),
            at,
            branches: sites.collect(),
            faults: entries.collect(),
            code: code[range.clone()].to_vec(),
            ..Part::default()
        });
    }
    original.parts.retain(|part| !part.code.is_empty());
    run.fixups = faults
        .iter()
        .map(|(here, to)| (ip(here), ip(&blocks[*to])))
        .collect();
    run.store(DATA, 8, 0x1234_5678);
    run.code = vec![(AT, code), (OUTER, outer())];
    World { original, run }
}

/// What the function calls: `lea rax, [rax+rax*2+7]; inc rdi; ret`.
fn outer() -> Vec<u8> {
    vec![0x48, 0x8d, 0x44, 0x40, 0x07, 0x48, 0xff, 0xc7, 0xc3]
}

/// The clone's code at its place.
fn linked(clone: &Moved) -> Vec<u8> {
    let mut code = clone.code.clone();
    for (at, kind, to, addend) in &clone.relocations {
        let to = match to {
            To::Here(offset, _) => CLONE + offset,
            To::There(at) => at.0,
        };
        let bytes = kind.bytes(to, *addend, CLONE + *at as u64).unwrap();
        code[*at..at + bytes.len()].copy_from_slice(&bytes);
    }
    code
}

fn answer(mut run: Run, at: u64, argument: u64) -> [u64; 5] {
    run.rip = at;
    run.set(Register::RSP, STACK);
    run.push(STOP);
    run.set(Register::RDI, argument);
    run.set(Register::RAX, 5);
    run.run(20_000, |_| ());
    assert_eq!(run.rip, STOP);
    [
        Register::RAX,
        Register::RDI,
        Register::RSI,
        Register::RDX,
        Register::RSP,
    ]
    .map(|of| run.get(of))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn a_clone_does_what_its_original_does(
        ops in prop::collection::vec(op(), 1..40), cut in any::<prop::sample::Index>(), argument in 0_u64..160,
    ) {
        let World { original, run } = world(&ops, cut.index(ops.len()));
        let clone = Moved::of(&original).unwrap();
        let want = answer(run.clone(), AT, argument);
        let rows = super::tables::fixups(&original, &clone).unwrap();
        let place = |to: To| match to {
            To::Here(offset, _) => CLONE + offset,
            To::There(at) => at.0,
        };
        let mut moved = run;
        moved.fixups = rows.iter().map(|row| (place(row.fields[0].1), place(row.fields[1].1))).collect();
        // Nothing of the original is there any more.
        moved.code = vec![(CLONE, linked(&clone)), (OUTER, outer())];
        prop_assert_eq!(answer(moved, CLONE, argument), want);
    }
}
