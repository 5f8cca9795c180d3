//! Callers made by hand, and whether they rely on what a function leaves alone.

use std::collections::BTreeMap;
use std::ops::Range;

use iced_x86::code_asm::{CodeAssembler, eax, ecx, edx, r8, rax, rbx, rcx, rdi, rdx, rsi};

use super::{Reliance, none_relies};
use crate::addr::LinkAddr;
use crate::plan::program::{Function, Kind, Program};
use crate::x86::registers::Registers;

type Assembled = Result<(), iced_x86::IcedError>;

const F: LinkAddr = LinkAddr(0xffff_ffff_8100_1000);
const CALLER: LinkAddr = LinkAddr(0xffff_ffff_8100_2000);
const OUTER: LinkAddr = LinkAddr(0xffff_ffff_8100_3000);
const OTHER: LinkAddr = LinkAddr(0xffff_ffff_8100_4000);

const PLAIN: Kind = Kind::Plain(Registers::NONE);

#[derive(Default)]
struct Made {
    functions: BTreeMap<LinkAddr, (Kind, Vec<u8>)>,
    changing: Vec<Range<LinkAddr>>,
}

impl Made {
    /// The function that is asked about: it changes `rax` and `rcx`, and leaves the others alone.
    fn new() -> Self {
        Self::default().with(F, PLAIN, |a| {
            a.mov(eax, 1)?;
            a.xor(ecx, ecx)?;
            a.ret()
        })
    }

    fn with(
        mut self,
        at: LinkAddr,
        kind: Kind,
        code: impl FnOnce(&mut CodeAssembler) -> Assembled,
    ) -> Self {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler).unwrap();
        let code = assembler.assemble(at.0).unwrap();
        self.functions.insert(at, (kind, code));
        self
    }

    fn check(&self, want: Option<(LinkAddr, &str, &str)>) {
        let got = none_relies(self, F).map_err(
            |Reliance {
                 caller,
                 registers,
                 why,
                 ..
             }| { (caller, registers.to_string(), why) },
        );
        match (got, want) {
            (Ok(()), None) => {}
            (Err((caller, registers, why)), Some(want)) => {
                assert_eq!((caller, &*registers), (want.0, want.1), "{why}");
                assert!(why.contains(want.2), "{why}");
            }
            (got, want) => panic!("{got:?}, not {want:?}"),
        }
    }
}

impl Program for Made {
    fn function(&self, at: LinkAddr) -> Option<Function<'_>> {
        let (entry, (kind, code)) = self.functions.range(..=at).next_back()?;
        let function = Function {
            entry: *entry,
            code,
            kind: *kind,
        };
        (at < function.end()).then_some(function)
    }

    fn branches_to(&self, entry: LinkAddr) -> Vec<LinkAddr> {
        let mut found = Vec::new();
        for (at, (_, code)) in &self.functions {
            for instruction in &mut iced_x86::Decoder::with_ip(64, code, at.0, 0) {
                if instruction.near_branch_target() == entry.0 {
                    found.push(LinkAddr(instruction.ip()));
                }
            }
        }
        found
    }

    fn changes(&self, code: &Range<LinkAddr>) -> bool {
        let mut sites = self.changing.iter();
        sites.any(|site| site.start < code.end && code.start < site.end)
    }
}

#[test]
fn a_caller_that_reads_what_is_left_alone_relies() {
    let caller = |code: fn(&mut CodeAssembler) -> Assembled| Made::new().with(CALLER, PLAIN, code);
    // Behind the call it reads rsi, which the function leaves alone.
    caller(|a| {
        a.call(F.0)?;
        a.mov(rax, rsi)?;
        a.ret()
    })
    .check(Some((CALLER, "rsi", "reads")));
    // On one of two ways.
    caller(|a| {
        let mut no = a.create_label();
        a.call(F.0)?;
        a.test(eax, eax)?;
        a.je(no)?;
        a.add(rbx, r8)?;
        a.set_label(&mut no)?;
        a.ret()
    })
    .check(Some((CALLER, "r8", "reads")));
    // It reads rcx and rax, which the function changes, so it cannot have kept anything there.
    caller(|a| {
        a.call(F.0)?;
        a.mov(rbx, rcx)?;
        a.add(rbx, rax)?;
        clobber(a)?;
        a.ret()
    })
    .check(None);
    // It writes each before it reads it.
    caller(|a| {
        a.call(F.0)?;
        clobber(a)?;
        a.mov(rax, rsi)?;
        a.ret()
    })
    .check(None);
    // It writes one in part only.
    caller(|a| {
        a.call(F.0)?;
        a.mov(iced_x86::code_asm::dl, 1)?;
        a.mov(rax, rdx)?;
        a.ret()
    })
    .check(Some((CALLER, "rdx", "reads")));
    // One that the compiler made fentry sites for keeps nothing.
    Made::new()
        .with(CALLER, Kind::Traced(Registers::NONE), |a| {
            a.call(F.0)?;
            a.mov(rax, rsi)?;
            a.ret()
        })
        .check(None);
}

/// Writes all that the function leaves alone.
fn clobber(a: &mut CodeAssembler) -> Assembled {
    use iced_x86::code_asm::{edi, esi, r8d, r9d, r10d, r11d};
    for register in [edi, esi, edx, r8d, r9d, r10d, r11d] {
        a.xor(register, register)?;
    }
    Ok(())
}

#[test]
fn what_is_called_next_may_get_what_was_left_alone() {
    let two = |kind: Kind| {
        Made::new()
            .with(CALLER, PLAIN, |a| {
                a.call(F.0)?;
                a.call(OTHER.0)?;
                a.ret()
            })
            .with(OTHER, kind, |a| {
                a.mov(rax, rdi)?;
                a.ret()
            })
    };
    two(Kind::Traced(Registers::NONE)).check(None);
    two(Kind::Traced(Registers::arguments(1))).check(Some((CALLER, "rdi", "passes them on")));
    two(Kind::Plain(Registers::arguments(2))).check(Some((CALLER, "rdi, rsi", "passes them on")));
    // Of assembly the code tells.
    two(Kind::Unknown).check(Some((CALLER, "rdi", "may read them")));
    let through_pointer = Made::new().with(CALLER, PLAIN, |a| {
        a.call(F.0)?;
        a.call(rax)?;
        a.ret()
    });
    through_pointer.check(Some((CALLER, "rdi, rsi, rdx, r8, r9", "through a pointer")));
}

#[test]
fn callers_of_callers_are_asked() {
    // It returns with rsi as it was, and its own caller reads that.
    let inner = |jump: bool| {
        Made::new().with(CALLER, PLAIN, move |a| {
            if jump {
                a.jmp(F.0)
            } else {
                a.call(F.0)?;
                a.ret()
            }
        })
    };
    for jump in [false, true] {
        inner(jump)
            .with(OUTER, PLAIN, |a| {
                a.call(CALLER.0)?;
                a.mov(rbx, rsi)?;
                a.ret()
            })
            .check(Some((OUTER, "rsi", "reads")));
        inner(jump)
            .with(OUTER, PLAIN, |a| {
                a.call(CALLER.0)?;
                clobber(a)?;
                a.ret()
            })
            .check(None);
        inner(jump)
            .with(OUTER, Kind::Traced(Registers::NONE), |a| {
                a.call(CALLER.0)?;
                a.mov(rbx, rsi)?;
                a.ret()
            })
            .check(None);
    }
    // Assembly that jumps there returns to nobody knows whom.
    Made::new()
        .with(CALLER, Kind::Unknown, |a| a.jmp(F.0))
        .check(Some((
            CALLER,
            "rdi, rsi, rdx, r8, r9, r10, r11",
            "not known",
        )));
}

#[test]
fn what_is_not_understood_relies() {
    let mut patched = Made::new().with(CALLER, PLAIN, |a| {
        a.call(F.0)?;
        clobber(a)?;
        a.ret()
    });
    patched.check(None);
    let behind = LinkAddr(CALLER.0 + 5);
    patched.changing.push(behind..LinkAddr(behind.0 + 2));
    patched.check(Some((
        CALLER,
        "rdi, rsi, rdx, r8, r9, r10, r11",
        "the kernel changes",
    )));
    // A part of a function whose name several have.
    Made::new()
        .with(CALLER, Kind::Part { function: None }, |a| {
            a.call(F.0)?;
            a.ret()
        })
        .check(Some((
            CALLER,
            "rdi, rsi, rdx, r8, r9, r10, r11",
            "a part of",
        )));
    // Nobody calls it but through pointers, or itself.
    Made::new().check(None);
}

#[test]
fn what_a_function_calls_changes_registers_for_it() {
    let wrapper = |kind: Kind| {
        Made::default()
            .with(F, PLAIN, |a| {
                a.call(OTHER.0)?;
                a.ret()
            })
            .with(OTHER, kind, |a| {
                clobber(a)?;
                a.ret()
            })
            .with(CALLER, PLAIN, |a| {
                a.call(F.0)?;
                a.mov(rbx, rsi)?;
                a.ret()
            })
    };
    wrapper(PLAIN).check(None);
    wrapper(Kind::Traced(Registers::NONE)).check(None);
    wrapper(Kind::IndirectThunk).check(None);
    // Assembly may be called with a list of its own of what it changes.
    wrapper(Kind::Unknown).check(Some((CALLER, "rsi", "reads")));
}
