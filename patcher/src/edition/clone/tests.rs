//! Hand-made functions with each thing that is moved, or refused.

use super::moved::{Moved, To};
use super::original::{Original, Part, StaticBranch, TableEntry};
use super::package;
use super::refused::{CloneError, Reason};
use super::tables;
use crate::addr::Gva;
use crate::edition::escape::escape;
use crate::edition::object::{Package, Place};
use crate::edition::reloc::Kind;
use crate::kernel::changed::tests::booted;
use crate::kernel::testing::guest::SLIDE;
use crate::kernel::testing::patched::{PATCHED, TRAMPOLINE};
use crate::kernel::testing::{BUILD_ID, Form};

const AT: u64 = 0xffff_ffff_8100_0000;

fn function(code: &[u8]) -> Original {
    Original {
        name: "f".to_owned(),
        slide: 0,
        parts: vec![Part {
            name: "f".to_owned(),
            at: AT,
            code: code.to_vec(),
            ..Part::default()
        }],
    }
}

fn moved(code: &[u8]) -> Moved {
    Moved::of(&function(code)).unwrap()
}

fn refused(original: &Original) -> (u64, Reason) {
    let error = Moved::of(original).unwrap_err();
    assert_eq!(error.function, "f");
    (error.at.0 - AT, error.reason)
}

#[test]
fn what_stays_within_is_copied_and_what_leads_out_is_aimed_anew() {
    // je +1; nop; call AT+0x100; mov rax, [AT+0x200]; ret; int3; int3
    let code = [
        0x74, 1, 0x90, 0xe8, 0xf8, 0, 0, 0, 0x48, 0x8b, 0x05, 0xf1, 1, 0, 0, 0xc3, 0xcc, 0xcc,
    ];
    let clone = moved(&code);
    assert_eq!(clone.code, code[..16], "but for the padding");
    let to = |at| To::There(Gva(AT + at));
    let want = [
        (4, Kind::Pc32, to(0x100), -4),
        (11, Kind::Pc32, to(0x200), -4),
    ];
    assert_eq!(clone.relocations, want);
    assert_eq!(clone.parts[0].range, 0..16);
}

#[test]
fn short_branches_grow_where_they_lead_out() {
    // test edi, edi; jns AT+0x40; jmp AT+2
    let clone = moved(&[0x85, 0xff, 0x79, 0x3c, 0xeb, 0xfc]);
    assert_eq!(clone.code, [0x85, 0xff, 0x0f, 0x89, 0, 0, 0, 0, 0xeb, 0xf8]);
    assert_eq!(
        clone.relocations,
        [(4, Kind::Pc32, To::There(Gva(AT + 0x40)), -4)]
    );
    // jrcxz AT+0x40 has no other form.
    let (at, reason) = refused(&function(&[0xe3, 0x3e, 0xc3]));
    assert!(
        at == 0 && matches!(reason, Reason::Immovable { .. }),
        "{reason}"
    );
}

#[test]
fn calls_of_itself_are_of_the_original_and_jumps_are_not() {
    // call AT; jmp AT
    let clone = moved(&[0xe8, 0xfb, 0xff, 0xff, 0xff, 0xeb, 0xf9]);
    assert_eq!(clone.relocations, [(1, Kind::Pc32, To::There(Gva(AT)), -4)]);
    assert_eq!(clone.code[5..], [0xeb, 0xf9]);
}

#[test]
fn what_would_run_on_does_so_in_the_original() {
    // call AT+0x100, which does not return; NOPs
    let clone = moved(&[0xe8, 0xfb, 0, 0, 0, 0x66, 0x90]);
    assert_eq!(clone.code[5..], [0x66, 0x90, 0xe9, 0, 0, 0, 0]);
    assert_eq!(
        clone.relocations[1],
        (8, Kind::Pc32, To::There(Gva(AT + 7)), -4)
    );
    assert_eq!(clone.parts[0].rules.last(), Some(&(7, Gva(AT + 7))));
}

#[test]
fn labels_go_along_and_the_beginning_does_not() {
    // lea rax, [AT+14]; lea rdx, [AT]; ret
    let lea = [
        0x48, 0x8d, 0x05, 7, 0, 0, 0, 0x48, 0x8d, 0x15, 0xf2, 0xff, 0xff, 0xff, 0xc3,
    ];
    let to: Vec<To> = moved(&lea).relocations.iter().map(|aim| aim.2).collect();
    assert_eq!(to, [To::Here(14, Gva(AT + 14)), To::There(Gva(AT))]);
    // mov rax, AT+7; ret: only where the image says that this is an address.
    let mut holds = function(&[0x48, 0xc7, 0xc0, 7, 0, 0, 0x81, 0xc3]);
    assert_eq!(Moved::of(&holds).unwrap().relocations, []);
    holds.parts[0].absolute = vec![Gva(AT + 3)];
    let clone = Moved::of(&holds).unwrap();
    assert_eq!(
        clone.relocations,
        [(3, Kind::Abs32Signed, To::Here(7, Gva(AT + 7)), 0)]
    );
    // Into the middle of an instruction; and reading it.
    let (_, reason) = refused(&function(&[0x48, 0x8d, 0x05, 0xfb, 0xff, 0xff, 0xff, 0xc3]));
    assert!(matches!(reason, Reason::Middle { .. }), "{reason}");
    let (_, reason) = refused(&function(&[0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xc3]));
    assert!(matches!(reason, Reason::Immovable { .. }), "{reason}");
}

#[test]
fn jumps_that_may_go_anywhere_are_refused() {
    let jump = [0x90, 0xff, 0xe0];
    let (at, reason) = refused(&function(&jump));
    assert!(
        at == 1 && matches!(reason, Reason::Indirect { .. }),
        "{reason}"
    );
    let mut tail = function(&jump);
    tail.parts[0].thunked = vec![Gva(AT + 1)..Gva(AT + 3)];
    assert_eq!(Moved::of(&tail).unwrap().code, jump);
    tail.parts[0].table = Some(Gva(AT + 0x1000));
    assert!(matches!(
        refused(&tail),
        (1, Reason::Table { table: Gva(_), .. })
    ));
    // The table is no matter to what only calls through a thunk.
    let mut call = function(&[0xff, 0xd0, 0xc3]);
    call.parts[0].thunked = vec![Gva(AT)..Gva(AT + 2)];
    call.parts[0].table = Some(Gva(AT + 0x1000));
    assert!(Moved::of(&call).is_ok());
    for (code, at) in [(&[0x90, 0x06][..], 1), (&[0x0f], 0)] {
        let (found, reason) = refused(&function(code));
        assert!(
            found == at && matches!(reason, Reason::Undecodable(_)),
            "{reason}"
        );
    }
    let (_, reason) = refused(&function(&[0xeb, 1, 0x48, 0x90, 0xc3]));
    assert!(
        matches!(reason, Reason::Middle { to: Gva(to) } if to == AT + 3),
        "{reason}"
    );
}

/// A function with a static branch of five bytes at `at` that leads to `to`.
fn branching(code: &[u8], at: u64, to: u64) -> Original {
    let mut original = function(code);
    original.parts[0].branches = vec![StaticBranch {
        range: Gva(AT + at)..Gva(AT + at + 5),
        to: Gva(AT + to),
        count: Gva(AT + 0x1000),
        when_on: true,
    }];
    original
}

#[test]
fn a_static_branch_becomes_a_test_where_the_flags_are_free() {
    // (five bytes); xor eax, eax; ret
    let clone = Moved::of(&branching(&[9, 9, 9, 9, 9, 0x31, 0xc0, 0xc3], 0, 7)).unwrap();
    let want = [
        0x83, 0x3d, 0, 0, 0, 0, 0, 0x0f, 0x8f, 2, 0, 0, 0, 0x31, 0xc0, 0xc3,
    ];
    assert_eq!(clone.code, want);
    assert_eq!(
        clone.relocations,
        [(2, Kind::Pc32, To::There(Gva(AT + 0x1000)), -5)]
    );
    for (code, needs) in [
        // je, at once; setc, behind an instruction that keeps the carry; adc, on the way of the branch only.
        (&[0_u8, 0, 0, 0, 0, 0x74, 0, 0xc3][..], 5),
        (&[0, 0, 0, 0, 0, 0xff, 0xc0, 0x0f, 0x92, 0xc0, 0xc3], 7),
        (&[0, 0, 0, 0, 0, 0xc3, 0x90, 0x11, 0xc0, 0xc3], 7),
    ] {
        match refused(&branching(
            code,
            0,
            code.len() as u64 - 4 + u64::from(needs == 5),
        )) {
            (0, Reason::Flags { at, .. }) => assert_eq!(at.0 - AT, needs),
            (at, other) => panic!("{at:#x}: {other}"),
        }
    }
    // An instruction that reaches into the branch.
    let (at, reason) = refused(&branching(
        &[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xc3],
        4,
        10,
    ));
    assert!(
        at == 0 && matches!(reason, Reason::Middle { .. }),
        "{reason}"
    );
}

fn fault(at: u64, to: u64) -> TableEntry {
    TableEntry {
        at: Gva(AT + at),
        bytes: vec![0; 12],
        insn: 0,
        leads: vec![(4, Gva(AT + to))],
    }
}

#[test]
fn faults_go_on_in_the_clone() {
    // mov eax, [rdi]; ret; xor eax, eax; ret
    let mut original = function(&[0x8b, 0x07, 0xc3, 0x31, 0xc0, 0xc3]);
    // One goes on within, one out of it, one is about no instruction: an alternative's.
    original.parts[0].faults = vec![fault(0, 3), fault(2, 0x80), fault(4, 3)];
    let clone = Moved::of(&original).unwrap();
    let rows = tables::fixups(&original, &clone).unwrap();
    let here = |at, of| To::Here(at, Gva(AT + of));
    let fields: Vec<_> = rows.iter().map(|row| row.fields.clone()).collect();
    let want = [
        vec![(0, here(0, 0)), (4, here(3, 3))],
        vec![(0, here(2, 2)), (4, here(6, 0x80))],
    ];
    assert_eq!(fields, want);
    assert_eq!(clone.code[6..], [0xe9, 0, 0, 0, 0]);
    assert_eq!(
        clone.relocations,
        [(7, Kind::Pc32, To::There(Gva(AT + 0x80)), -4)]
    );
    assert_eq!(clone.parts[0].range, 0..11);
    original.parts[0].faults = vec![fault(0, 4)];
    let clone = Moved::of(&original).unwrap();
    let error = tables::fixups(&original, &clone).err().unwrap();
    assert!(matches!(error.reason, Reason::Middle { .. }), "{error}");
}

/// The made-up kernel's function that has a site of every kind, from a guest that runs.
#[test]
fn a_function_with_sites_of_every_kind_is_cloned_from_a_running_kernel() {
    for form in [Form::New, Form::OldSorted] {
        let mut guest = booted(form);
        let kernel = guest.kernel();
        let made = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            package(&kernel, &guest, &names, |_| None)
        };
        let clone: Package = made(&["patched"]).unwrap();
        assert_eq!(clone.build_id(), BUILD_ID);
        let [edition] = clone.editions() else {
            panic!("one edition")
        };
        assert_eq!((edition.function.as_str(), edition.offset), ("patched", 0));
        assert_eq!(clone.functions()[0].name, "patched.clone");
        let leads = |to: u64| {
            let to = Place::At(Gva(to + SLIDE));
            clone.symbols().iter().any(|symbol| symbol.place == to)
        };
        assert!(leads(TRAMPOLINE), "static calls go by the trampoline");
        assert!(!leads(PATCHED));
        assert!(!clone.orc().is_empty());
        assert_eq!(escape(&clone), None);
        let missing = made(&["nobody"]).unwrap_err();
        assert!(matches!(missing, CloneError::Symbol(_)), "{missing}");
        let twice = made(&["patched", "patched"]).unwrap_err();
        assert!(matches!(twice, CloneError::Twice { .. }), "{twice}");
        guest.put(PATCHED + SLIDE + 0x60, 0);
        let names = ["patched".to_owned()];
        match package(&kernel, &guest, &names, |_| None).unwrap_err() {
            CloneError::Refused(error) => {
                assert!(matches!(error.reason, Reason::Changed { .. }), "{error}");
            }
            other => panic!("{other}"),
        }
    }
}
