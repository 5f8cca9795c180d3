//! Packages linked against a kernel of three symbols, and every way in which that can fail.

use super::{LinkError, Linked, Resolve, Returns, link};
use object::SectionKind;
use object::write::SectionId;

use crate::addr::Gva;
use crate::edition::object::Package;
use crate::edition::object::tests::{BUILD_ID, Maker, sample};
use crate::edition::space::{ArenaSpace, Full, HANDLERS};
use crate::kernel::alternatives::tests::layout;
use crate::kernel::alternatives::{Alternatives, Features};
use crate::kernel::symbols::SymbolError;
use crate::plan::target::Target;
use crate::x86::insn::{JUMP_LEN, NOP5, jump, whole_instructions};

const CODE: Gva = Gva(0xffff_ffff_ff80_0000);
const DATA: Gva = Gva(0xffff_ffff_ffa0_0000);
const TEXT: u64 = 0xffff_ffff_8100_0000;
const THUNK: Gva = Gva(0xffff_ffff_8200_0000);
/// The processor's features: of 32 the second and the fourth.
const PRESENT: u32 = 0b1010;

struct Fake {
    build_id: Vec<u8>,
    returns: Returns,
    alternatives: Alternatives,
}

impl Resolve for Fake {
    fn build_id(&self) -> &[u8] {
        &self.build_id
    }

    fn symbol(&self, name: &str) -> Result<u64, SymbolError> {
        match name {
            "seq_printf" => Ok(TEXT + 0x1000),
            "pcpu_hot" => Ok(0x2_c000),
            "elsewhere" => Ok(0xffff_8880_0000_0000),
            "__x86_return_thunk" => Ok(THUNK.0 - 0x40),
            _ => Err(SymbolError::Missing {
                name: name.into(),
                near: vec![],
            }),
        }
    }

    fn returns(&self) -> Returns {
        self.returns
    }

    fn alternatives(&self) -> &Alternatives {
        &self.alternatives
    }
}

fn kernel() -> Fake {
    Fake {
        build_id: BUILD_ID.to_vec(),
        returns: Returns::Thunk(THUNK),
        alternatives: Alternatives {
            layout: layout(true),
            features: Features::new(PRESENT.to_le_bytes().to_vec()),
        },
    }
}

fn target() -> Target {
    // push rbp; mov rbp, rsp; mov eax, [rip+0x10]
    let displaced = vec![0x55, 0x48, 0x89, 0xe5, 0x8b, 0x05, 0x10, 0, 0, 0];
    Target {
        name: "f".into(),
        function: Gva(TEXT),
        size: 0x80,
        jump: Gva(TEXT + 5),
        displaced,
    }
}

fn space() -> ArenaSpace {
    ArenaSpace::new(
        Gva(CODE.0 - HANDLERS)..Gva(CODE.0 + 0x1000),
        DATA..Gva(DATA.0 + 0x1000),
    )
}

fn link_it(maker: &Maker, kernel: &Fake, space: &mut ArenaSpace) -> Result<Linked, LinkError> {
    link(
        &Package::parse(&maker.finish()).unwrap(),
        kernel,
        vec![target()],
        space,
    )
}

#[test]
fn everything_gets_its_place_and_value() {
    let mut space = space();
    let linked = link_it(&sample(), &kernel(), &mut space).unwrap();
    assert_eq!((linked.code.at, linked.data.at), (CODE.0, DATA.0));
    let [redirection] = &linked.redirections[..] else {
        panic!("one")
    };
    assert_eq!(redirection.edition, Gva(CODE.0));
    assert_eq!(redirection.head.at, Gva(CODE.0 + 32));
    assert_eq!(linked.code.bytes[..5], NOP5, "the fentry call");
    let code = whole_instructions(&linked.code.bytes, Gva(linked.code.at), 17).unwrap();
    assert_eq!(
        code[1].near_branch_target(),
        redirection.head.at.0,
        "the call of the original"
    );
    assert_eq!(code[2].ip_rel_memory_address(), DATA.0 + 4, "the variable");
    let head = whole_instructions(
        &redirection.head.bytes,
        redirection.head.at,
        redirection.head.bytes.len(),
    )
    .unwrap();
    assert_eq!(head[2].ip_rel_memory_address(), TEXT + 15 + 0x10);
    assert_eq!(
        head[3].near_branch_target(),
        TEXT + 15,
        "back to what follows the displaced bytes"
    );
    assert_eq!(linked.code.bytes[32..], redirection.head.bytes);
    assert_eq!(linked.data.bytes, [7; 8]);
    assert_eq!(linked.orc, [(Gva(CODE.0), vec![8, 0, 0, 0, 5, 0])]);
    assert_eq!(space.used(), 64 + linked.code.bytes.len() as u64 + 8);
    // A second one goes behind it.
    let next = link_it(&sample(), &kernel(), &mut space).unwrap();
    assert!(next.code.at >= linked.code.at + linked.code.bytes.len() as u64);
}

#[test]
fn returns_are_those_of_the_kernel() {
    let mut maker = Maker::new(&[0xe9, 0, 0, 0, 0, 0x0f, 0x85, 0, 0, 0, 0, 0xcc]);
    maker.relocate_text(1, 4, "__x86_return_thunk", -4);
    maker.relocate_text(7, 4, "__x86_return_thunk", -4);
    maker.edition("f", 0, 0);
    maker.orc();
    let linked = link_it(&maker, &kernel(), &mut space()).unwrap();
    let at = Gva(linked.code.at);
    assert_eq!(linked.code.bytes[..JUMP_LEN], jump(at, THUNK).unwrap());
    let plain = Fake {
        returns: Returns::Plain,
        ..kernel()
    };
    let linked = link_it(&maker, &plain, &mut space()).unwrap();
    assert_eq!(
        linked.code.bytes[..JUMP_LEN],
        [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]
    );
    // A conditional return cannot be a `ret`; it still goes to the kernel's thunk.
    let code = whole_instructions(&linked.code.bytes[JUMP_LEN..], Gva(at.0 + 5), 6).unwrap();
    assert_eq!(code[0].near_branch_target(), THUNK.0 - 0x40);
}

#[test]
fn what_cannot_be_linked_is_named() {
    let check = |what: &str, change: &dyn Fn(&mut Maker)| {
        let mut maker = sample();
        change(&mut maker);
        let mut space = space();
        let error = link_it(&maker, &kernel(), &mut space)
            .unwrap_err()
            .to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert_eq!(space.used(), 64, "nothing is taken");
    };
    check("`no_such_function`", &|m| {
        m.relocate_text(20, 4, "no_such_function", -4)
    });
    check("original of g, which the package does not replace", &|m| {
        m.relocate_text(20, 4, "exopatch_original_g", -4)
    });
    check(
        ".text+0x14 refers to `elsewhere`, which is out of reach",
        &|m| m.relocate_text(20, 2, "elsewhere", -4),
    );
    check("does not fit in R_X86_64_32", &|m| {
        m.relocate_text(20, 10, "seq_printf", 0)
    });
    check(".text+0x14 refers to __fentry__", &|m| {
        m.relocate_text(20, 4, "__fentry__", -4)
    });
}

#[test]
fn per_cpu_offsets_do_not_move() {
    let mut maker = sample();
    maker.relocate_text(20, 11, "pcpu_hot", 8);
    let linked = link_it(&maker, &kernel(), &mut space()).unwrap();
    assert_eq!(linked.code.bytes[20..24], 0x2_c008_u32.to_le_bytes());
}

#[test]
fn another_kernel_and_a_full_arena_are_refused() {
    let other = Fake {
        build_id: vec![1; 20],
        ..kernel()
    };
    let error = link_it(&sample(), &other, &mut space())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&"5a".repeat(20)) && error.contains(&"01".repeat(20)),
        "{error}"
    );
    let mut full = space();
    full.data.take(0xff9, 1).unwrap();
    let before = full.clone();
    let error = link_it(&sample(), &kernel(), &mut full).unwrap_err();
    assert!(
        matches!(error, LinkError::Full(Full { half: "data", .. })),
        "{error}"
    );
    assert_eq!(full, before);
}

/// What 16 NOPs of `.text`, from offset 16, become by alternatives whose code is `replacements`.
fn alternatives(
    replacements: &[u8],
    change: &dyn Fn(&mut Maker, SectionId),
    entries: &[(u64, u64, u16, u16, u8, u8)],
    flags: bool,
) -> Result<Vec<u8>, LinkError> {
    let mut code = vec![0xcc; 16];
    code.extend([0x90; 16]);
    let mut maker = Maker::new(&code);
    let section = maker.section(".altinstr_replacement", SectionKind::Text, replacements);
    change(&mut maker, section);
    maker.alternatives(section, entries);
    maker.edition("f", 0, 0);
    maker.orc();
    let mut kernel = kernel();
    kernel.alternatives.layout = layout(flags);
    let linked = link_it(&maker, &kernel, &mut space())?;
    Ok(linked.code.bytes[16..32].to_vec())
}

#[test]
fn alternatives_are_those_that_the_processor_calls_for() {
    const ABSENT: u16 = 1;
    const DIRECT_CALL: u16 = 2;
    // Three of two bytes each: mov al, N.
    let replacements = [0xb0, 1, 0xb0, 2, 0xb0, 3];
    let check = |entries: &[(u64, u64, u16, u16, u8, u8)], want: &[u8]| {
        let got = alternatives(&replacements, &|_, _| {}, entries, true).unwrap();
        let mut all = want.to_vec();
        all.resize(16, 0x90);
        assert_eq!(got, all, "{entries:?}");
    };
    check(&[(16, 0, 1, 0, 2, 2)], &[0xb0, 1]);
    check(&[(16, 0, 2, 0, 2, 2)], &[]);
    check(&[(16, 0, 1, ABSENT, 2, 2)], &[]);
    check(&[(16, 0, 2, ABSENT, 2, 2)], &[0xb0, 1]);
    // NOPs fill the rest.
    check(&[(16, 0, 1, 0, 5, 2)], &[0xb0, 1, 0x0f, 0x1f, 0x00]);
    check(&[(16, 6, 1, 0, 3, 0)], &[0x0f, 0x1f, 0x00]);
    // Of several for one place the last that is wanted, over all that any of them has.
    let two = [(16, 0, 1, 0, 2, 2), (16, 2, 3, 0, 5, 2)];
    check(&two, &[0xb0, 2, 0x0f, 0x1f, 0x00]);
    let two = [(16, 0, 1, 0, 2, 2), (16, 2, 2, 0, 5, 2)];
    check(&two, &[0xb0, 1, 0x0f, 0x1f, 0x00]);
    let apart = [(16, 0, 1, 0, 2, 2), (18, 4, 1, 0, 2, 2)];
    check(&apart, &[0xb0, 1, 0xb0, 3]);
    // An indirect call stays as it is, unless something else is wanted there.
    check(&[(16, 0, 1, DIRECT_CALL, 2, 2)], &[]);
    let both = [(16, 0, 1, DIRECT_CALL, 2, 2), (16, 2, 1, 0, 2, 2)];
    check(&both, &[0xb0, 2]);
}

#[test]
fn alternatives_keep_what_they_lead_to() {
    // jmp `seq_printf`; lea rax, [rip+0] of `seq_printf`; jmp to its own end.
    let replacements = [0xe9, 0, 0, 0, 0, 0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xeb, 0];
    let related = |maker: &mut Maker, section| {
        let symbol = maker.symbol("seq_printf", None);
        maker.relocate(section, 1, 4, symbol, -4);
        maker.relocate(section, 8, 2, symbol, -4);
        // What is replaced leads nowhere any more.
        maker.relocate_text(26, 2, "elsewhere", -4);
    };
    let got = alternatives(&replacements, &related, &[(16, 0, 1, 0, 15, 14)], true).unwrap();
    let at = Gva(CODE.0 + 16);
    let code = whole_instructions(&got, at, 15).unwrap();
    assert_eq!(code[0].near_branch_target(), TEXT + 0x1000);
    assert_eq!(code[1].ip_rel_memory_address(), TEXT + 0x1000);
    assert_eq!(code[2].near_branch_target(), at.0 + 14);
    // Not wanted, so that what is there still leads there, which is out of reach.
    let error = alternatives(&replacements, &related, &[(16, 0, 2, 0, 15, 14)], true);
    assert!(
        matches!(error, Err(LinkError::Overflow { .. })),
        "{error:?}"
    );
}

#[test]
fn alternatives_that_cannot_be_chosen_are_refused_by_name() {
    let check = |code: &[u8], entry: (u64, u64, u16, u16, u8, u8), flags: bool, want: &str| {
        let error = alternatives(code, &|_, _| {}, &[entry], flags).unwrap_err();
        assert!(error.to_string().contains(want), "{want}: {error}");
    };
    let nops = [0x90; 8];
    check(&nops, (16, 0, 32, 0, 2, 2), true, "feature 32");
    check(&nops, (16, 0, 1, 4, 2, 2), true, "a flag that is not known");
    check(&nops, (16, 0, 1, 0, 2, 3), true, "room for it");
    check(&nops, (30, 0, 1, 0, 3, 3), true, "room for it");
    check(&nops, (16, 6, 1, 0, 3, 3), true, "a replacement that is no");
    check(
        &nops,
        (16, 0, 1, 0, 2, 2),
        false,
        "entry 1 of the package's",
    );
    // Out of what moves, and into what is no instruction.
    let stuck = [0x90, 0x74, 0x02, 0x90, 0x90, 0x90];
    check(
        &stuck,
        (16, 1, 1, 0, 3, 3),
        true,
        "`je short 5` at .altinstr_replacement+0x1",
    );
    check(&[0x06], (16, 0, 1, 0, 1, 1), true, "not an instruction");
    // A relocation that is only half in what is taken, or replaced.
    let half = |maker: &mut Maker, section| {
        let symbol = maker.symbol("seq_printf", None);
        maker.relocate(section, 1, 4, symbol, -4);
    };
    let call = [0xe8, 0, 0, 0, 0];
    let error = alternatives(&call, &half, &[(16, 0, 1, 0, 3, 3)], true).unwrap_err();
    assert!(error.to_string().contains("that is no code"), "{error}");
    let half = |maker: &mut Maker, _| maker.relocate_text(17, 4, "seq_printf", -4);
    let error = alternatives(&nops, &half, &[(16, 0, 1, 0, 3, 3)], true).unwrap_err();
    assert!(error.to_string().contains("room for it"), "{error}");
}
