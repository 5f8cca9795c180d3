//! Predicates made by hand, each with one thing that it may not do; and any bytes as one.

use object::SectionKind;
use proptest::prelude::*;

use super::check;
use crate::edition::object::Package;
use crate::edition::object::tests::Maker;

/// Where the predicate begins: behind the edition, `jmp exopatch_original_f`.
const START: usize = 16;
/// Where its code has room for another function.
const HELPER: usize = 64;

/// A package with `code` as predicate `asks`, and `helper` as a function that it may call.
fn maker(code: &[u8], helper: &[u8]) -> Maker {
    let mut bytes = vec![0xcc; 96];
    bytes[..5].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
    bytes[START..START + code.len()].copy_from_slice(code);
    bytes[HELPER..HELPER + helper.len()].copy_from_slice(helper);
    let mut maker = Maker::new(&bytes);
    maker.relocate_text(1, 4, "exopatch_original_f", -4);
    maker.edition("f", 0, 0);
    maker.predicate("asks", START as u64);
    maker.orc();
    maker
}

fn checked(maker: &Maker) -> Result<(), String> {
    let package = Package::parse(&maker.finish()).unwrap();
    let done = check(&package, package.sections());
    done.map_err(|error| error.to_string())
}

/// What is said of a predicate of `code`, and `helper` behind it.
fn ask(code: &[u8], helper: &[u8]) -> Result<(), String> {
    checked(&maker(code, helper))
}

/// A call or jump with a relocation behind its opcode.
fn calling(code: &[u8], field: usize, symbol: &str) -> Result<(), String> {
    let mut maker = maker(code, &[0xc3]);
    maker.relocate_text((START + field) as u64, 4, symbol, -4);
    checked(&maker)
}

fn refused(said: Result<(), String>, want: &str) {
    let said = said.unwrap_err();
    assert!(said.contains(want), "{want}: {said}");
    assert!(said.starts_with("predicate asks cannot be asked: at "));
}

#[test]
fn code_of_the_package_may_run() {
    // cmp esi, 0x8905; sete al; ret
    let plain = [0x81, 0xfe, 0x05, 0x89, 0, 0, 0x0f, 0x94, 0xc0, 0xc3];
    assert_eq!(ask(&plain, &[]), Ok(()));
    // call helper; ret, and the helper loops: jne itself; ret
    let (call, helper) = ([0xe8, 43, 0, 0, 0, 0xc3], [0x75, 0xfe, 0xc3]);
    assert_eq!(ask(&call, &helper), Ok(()));
    // What is not come to does not matter: ret; call rax
    assert_eq!(ask(&[0xc3, 0xff, 0xd0], &[]), Ok(()));
    let fentry = [0xe8, 0, 0, 0, 0, 0xc3];
    assert_eq!(calling(&fentry, 1, "__fentry__"), Ok(()));
    let thunk = [0xe9, 0, 0, 0, 0];
    assert_eq!(calling(&thunk, 1, "__x86_return_thunk"), Ok(()));
    // mov rax, gs:[rip + current_task]; ret
    let per_cpu = [0x65, 0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xc3];
    assert_eq!(calling(&per_cpu, 4, "current_task"), Ok(()));
}

#[test]
fn a_relocated_call_is_followed() {
    let followed = |helper: &[u8]| {
        let mut maker = maker(&[0x90, 0xe8, 0, 0, 0, 0, 0xc3], helper);
        let text = maker.text();
        maker.relocate_text_to(START as u64 + 2, text, 60);
        checked(&maker)
    };
    assert_eq!(followed(&[0xc3]), Ok(()));
    refused(followed(&[0x0f, 0x0b]), ".text+0x40 it runs `ud2`");
}

#[test]
fn what_leaves_the_package_is_refused() {
    let call = [0xe8, 0, 0, 0, 0, 0xc3];
    refused(calling(&call, 1, "printk"), "calls or jumps to `printk`");
    refused(
        calling(&call, 1, "exopatch_original_f"),
        "`exopatch_original_f`",
    );
    refused(
        calling(&call, 1, "__x86_indirect_thunk_rax"),
        "`__x86_indirect_thunk_rax`",
    );
    refused(calling(&call, 1, "__x86_return_thunk"), "return_thunk");
    let jump = [0xe9, 0, 0, 0, 0];
    refused(calling(&jump, 1, "__fentry__"), "`__fentry__`");
    // jne panic
    let branch = [0x0f, 0x85, 0, 0, 0, 0, 0xc3];
    refused(calling(&branch, 2, "panic"), "`panic`");
}

#[test]
fn what_cannot_be_told_or_answered_is_refused() {
    for (code, want) in [
        (&[0xff, 0xd0][..], "by a pointer (`call rax`)"),
        (&[0xff, 0xe0], "by a pointer (`jmp rax`)"),
        (&[0x0f, 0x0b], "runs `ud2`"),
        (&[0xcc], "runs `int3`"),
        (&[0x0f, 0x01, 0xcb], "runs `stac`"),
        (&[0xfa], "runs `cli`"),
        (&[0xf4], "runs `hlt`"),
        (&[0x0f, 0x05], "runs `syscall`"),
        (&[0x48, 0xcf], "runs `iretq`"),
        (&[0xcb], "runs `retf`"),
        (&[0x06], "is no code"),
        // jmp in front of the section, and behind it
        (&[0xeb, 0x80], "is no code"),
        (&[0xeb, 0x7f], "is no code"),
        // The edition: jmp .-16
        (&[0xeb, 0xee], "runs the edition of f"),
    ] {
        refused(ask(code, &[]), want);
    }
    // The last instruction runs on into the gap.
    refused(ask(&[0x90], &[]), ".text+0x11 it runs `int3`");
}

#[test]
fn a_relocation_that_makes_another_instruction_is_refused() {
    // Over the opcode of `nop; ret`.
    let mut changed = maker(&[0x90, 0x90, 0x90, 0x90, 0xc3], &[]);
    changed.relocate_text(START as u64, 2, "jiffies", 0);
    refused(checked(&changed), "is no code");
    // From the instruction before into this one.
    let mut across = maker(&[0xeb, 0x02, 0x90, 0x90, 0x90, 0xc3], &[]);
    across.relocate_text(START as u64 + 3, 2, "jiffies", 0);
    refused(checked(&across), "is no code");
}

#[test]
fn where_a_fault_goes_on_is_walked() {
    // mov rax, [rdi]; ret; and its fixup, which warns.
    for (fixup, want) in [(&[0xc3][..], true), (&[0x0f, 0x0b], false)] {
        let mut maker = maker(&[0x48, 0x8b, 0x07, 0xc3], fixup);
        let table = maker.section("__ex_table", SectionKind::Data, &[0; 24]);
        for (field, to) in [(0, 0), (4, 8), (12, START), (16, HELPER)] {
            maker.relocate_to_text(table, field, i64::try_from(to).unwrap());
        }
        assert_eq!(checked(&maker).is_ok(), want);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_an_answer(code in prop::collection::vec(any::<u8>(), 1..40), field in 0_u64..36) {
        let mut maker = maker(&code, &[0xc3]);
        maker.relocate_text(START as u64 + field, 4, "printk", -4);
        let _ = checked(&maker);
    }
}
