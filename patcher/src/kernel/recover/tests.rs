//! Recovery of the made-up kernel from the made-up guest: whole, moved, damaged and forged.

use std::sync::Arc;

use proptest::prelude::*;

use super::RecoverError;
use crate::addr::{Gva, LinkAddr};
use crate::edition::link::Returns;
use crate::edition::object::Edition;
use crate::guest::VcpuState;
use crate::kernel::agree::{Disagreement, agree};
use crate::kernel::changed::{self, ChangedError};
use crate::kernel::image::{Image, NotShipped, Source};
use crate::kernel::locate::Kernel;
use crate::kernel::testing::guest::{ENTRY_AREA, SLIDE, TinyGuest};
use crate::kernel::testing::kallsyms::{BEFORE_KALLSYMS, kallsyms, kallsyms_base};
use crate::kernel::testing::{DATA, FORMS, Form, RODATA, TEXT, image, symbols};
use crate::kernel::text::{ReturnError, TextError};
use crate::plan::target::{Target, TargetError};

/// A guest that has booted.
fn guest(form: Form, levels: u8) -> TinyGuest {
    let mut guest = TinyGuest::new(form, levels);
    guest.link();
    guest.trace_nothing();
    guest
}

fn recover(guest: &TinyGuest) -> Result<Image, RecoverError> {
    Image::from_memory(guest, &guest.vcpus)
}

fn of_file(form: Form) -> Image {
    Image::parse(Arc::new(image(form))).unwrap()
}

/// What stands in the way of a guest that `change` has been at.
fn refused(change: impl Fn(&mut TinyGuest), want: &str) {
    for form in FORMS {
        let mut guest = guest(form, 4);
        change(&mut guest);
        let got = recover(&guest).unwrap_err().to_string();
        assert!(got.contains(want), "{form:?}: {got}");
    }
}

/// Maps the kernel's data and constants by one large page that is neither written nor executed.
fn protect(guest: &mut TinyGuest) {
    let tables = guest.kernel().tables();
    let entry = tables.entry(guest, Gva(DATA + SLIDE), 2).unwrap();
    guest.put_phys(entry.at.0, entry.value & !2 | 1 << 63);
}

#[test]
fn file_and_memory_say_the_same() {
    for form in FORMS {
        for levels in [4, 5] {
            for protected in [false, true] {
                let mut guest = guest(form, levels);
                if protected {
                    protect(&mut guest);
                }
                let memory = recover(&guest).unwrap();
                assert_eq!(memory.source(), Source::Memory);
                let agreed = agree(&of_file(form), &memory).unwrap();
                assert_eq!(agreed.symbols, symbols(form).len());
                assert!(agreed.type_bytes > 0 && agreed.unwind > 0, "{agreed:?}");
                let kernel = Kernel::locate(Arc::new(memory), &guest, &guest.vcpus).unwrap();
                assert_eq!(kernel.slide(), SLIDE);
                let victim = Gva(TEXT + SLIDE + 0x300);
                assert_eq!(kernel.symbol("victim").unwrap(), victim);
                assert_eq!(kernel.link(victim), Some(LinkAddr(TEXT + 0x300)));
            }
        }
    }
}

#[test]
fn a_vcpu_on_the_users_page_tables_is_enough() {
    let mut guest = guest(Form::New, 4);
    guest.isolate();
    let memory = recover(&guest).unwrap();
    assert!(agree(&of_file(Form::New), &memory).is_ok());
}

#[test]
fn an_unwind_table_is_believed_where_functions_have_just_been_entered() {
    let check = |head: &[u8], believed: bool| {
        let mut guest = guest(Form::New, 4);
        for function in ["victim", "patient"] {
            guest.put_bytes(guest.at(function), head);
        }
        let image = recover(&guest).unwrap();
        assert_eq!(image.orc().is_ok(), believed, "{head:02x?}");
    };
    check(&[0x66, 0x66, 0x66, 0x66, 0x90], true);
    check(&[0x3e, 0x8d, 0x74, 0x26, 0], true);
    check(&[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0], true);
    // A call of code that a tracer made, and one within the kernel.
    check(&[0xe8, 0, 0, 0, 0x10], true);
    check(&[0xe8, 0, 0, 0, 0], false);
    check(&[0x55, 0x48, 0x89, 0xe5, 0x90], false);
}

#[test]
fn what_differs_is_named() {
    let check = |change: fn(&mut TinyGuest), want: &Disagreement| {
        let mut guest = guest(Form::New, 4);
        change(&mut guest);
        let memory = recover(&guest).unwrap();
        assert_eq!(agree(&of_file(Form::New), &memory).as_ref(), Err(want));
    };
    check(
        |guest| guest.put(RODATA + SLIDE + 0x7_0030, 0),
        &Disagreement::BuildId,
    );
    // Behind the types themselves nothing is read of them.
    let end = Disagreement::Types { at: 0x3ff8 };
    check(
        |guest| guest.put(RODATA + SLIDE + 0x7_1000 + 0x3ff8, 1),
        &end,
    );
    check(
        |guest| guest.put(RODATA + SLIDE + 0x8_4000, 0xff),
        &Disagreement::Unwind,
    );
    let other = agree(&of_file(Form::New), &of_file(Form::Old));
    assert!(
        matches!(other, Err(Disagreement::Count { .. })),
        "{other:?}"
    );
}

#[test]
fn nothing_is_told_of_text_that_memory_does_not_hold_as_it_was() {
    let mut guest = guest(Form::New, 4);
    let kernel = guest.recovered();
    let shipped = kernel.image().shipped();
    assert_eq!(shipped.err(), Some(NotShipped::FromMemory));
    assert_eq!(
        kernel.image().bytes(LinkAddr(TEXT)..LinkAddr(TEXT + 4)),
        None
    );
    let victim = Gva(TEXT + SLIDE + 0x305)..Gva(TEXT + SLIDE + 0x310);
    let text = kernel.expected_text(victim);
    assert!(matches!(text, Err(TextError::NotShipped(_))), "{text:?}");
    let returns = kernel.return_form(&guest);
    assert!(
        matches!(returns, Err(ReturnError::NotShipped(_))),
        "{returns:?}"
    );
    let edition = Edition {
        function: "patient".to_owned(),
        position: 0,
        section: 0,
        offset: 0,
    };
    let arena = Gva(0)..Gva(0);
    let target = Target::find(&kernel, &guest, &edition, &arena, Returns::Plain, |_| None);
    assert!(
        matches!(target, Err(TargetError::NotShipped(_))),
        "{target:?}"
    );
    let changed = changed::compare(&kernel, &guest, &[], |_| {});
    assert!(
        matches!(changed, Err(ChangedError::NotShipped(_))),
        "{changed:?}"
    );
}

#[test]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let each = |change: fn(&mut crate::guest::Vcpu)| {
        move |guest: &mut TinyGuest| guest.vcpus.iter_mut().for_each(change)
    };
    refused(each(|vcpu| vcpu.state = VcpuState::Offline), "no vCPU");
    refused(each(|vcpu| vcpu.cr0 = 1), "does not translate addresses");
    refused(each(|vcpu| vcpu.idt_base = 0x1000), "is not mapped");
    // The upper half of the handler's address.
    let gate = ENTRY_AREA + 8;
    refused(
        move |guest| guest.put(gate, 0xffff_8880),
        "where no Linux kernel is",
    );
    let other = |guest: &mut TinyGuest| guest.put(ENTRY_AREA, guest.get(ENTRY_AREA) + 16);
    refused(other, "say that interrupt 0 is handled at");
    let base = |guest: &mut TinyGuest, at: u64| {
        let base = kallsyms_base(guest.form) + SLIDE;
        guest.put(base, at);
    };
    refused(
        move |guest| base(guest, TEXT),
        "is handled at 0xffffffff81000100",
    );
    refused(
        move |guest| base(guest, 0x1000),
        "no table of addresses fits them",
    );
    let none = |guest: &mut TinyGuest| {
        let at = RODATA + SLIDE + 0x7_0018;
        guest.put(at, 0);
    };
    refused(none, "has no build-id");
    let broken = |guest: &mut TinyGuest| guest.put(RODATA + SLIDE + 0x7_1000, 0);
    refused(broken, "no BTF magic number");
}

#[test]
fn a_kernel_says_itself_how_far_it_moved() {
    let says = |guest: &mut TinyGuest, text: &str| {
        let page = guest.object(4096);
        guest.put_bytes(page, text.as_bytes());
        let (data, size) = (guest.at("vmcoreinfo_data"), guest.at("vmcoreinfo_size"));
        guest.put(data, page);
        guest.put(size, text.len() as u64);
    };
    let text =
        |slide: u64| format!("OSRELEASE=6\nPAGESIZE=4096\nSYMBOL(a)=1\nKERNELOFFSET={slide:x}\n");
    let mut guest = guest(Form::New, 4);
    says(&mut guest, &text(SLIDE - (4 << 20)));
    // It was linked elsewhere than kernels usually are.
    let victim = recover(&guest).unwrap().symbols().lookup("victim").unwrap();
    assert_eq!(victim.address, LinkAddr(TEXT + 0x300 + (4 << 20)));
    refused(
        |guest| says(guest, &text(SLIDE + 0x1000)),
        "which no kernel moves by",
    );
    refused(
        |guest| says(guest, &text(1 << 30)),
        "which no kernel moves by",
    );
    refused(|guest| says(guest, "OSRELEASE="), "vmcoreinfo is unsound");
}

#[test]
fn two_kernels_symbols_are_none() {
    refused(
        |guest| {
            let tables = kallsyms(guest.form, &symbols(guest.form));
            let own = guest.get(kallsyms_base(guest.form) + SLIDE);
            let at = TEXT + SLIDE + 0x80_0000;
            for (page, bytes) in tables[BEFORE_KALLSYMS..].chunks(4096).enumerate() {
                let to = guest.page();
                guest.map(at + page as u64 * 4096, to, 1);
                guest.put_bytes(at + page as u64 * 4096, bytes);
            }
            let base = kallsyms_base(guest.form) - RODATA - BEFORE_KALLSYMS as u64;
            guest.put(at + base, own);
        },
        "holds two kernels' symbols",
    );
}

#[test]
fn what_is_mapped_without_end_is_not_read() {
    refused(
        |guest| {
            for large in 0..200 {
                guest.map(TEXT + SLIDE + 0x80_0000 + large * 0x20_0000, 0, 2);
            }
        },
        "more than any kernel has",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn damage_never_panics(
        form in 0..3_usize,
        changes in proptest::collection::vec((any::<bool>(), any::<u32>(), any::<u8>()), 1..12),
    ) {
        let mut guest = guest(FORMS[form], 4);
        let base = kallsyms_base(FORMS[form]) - TEXT;
        for (symbols, at, value) in changes {
            // Among the symbols, the types and the unwind table; or anywhere, page tables and the interrupt table too.
            let at = u64::from(at);
            let at = if symbols { 0x40_0000 + base + at % 0x9_0000 } else { at % (16 << 20) };
            let at = usize::try_from(at).unwrap() % guest.memory.len();
            guest.memory[at] = value;
        }
        if let Ok(image) = recover(&guest) {
            let _ = image.symbols().iter().count();
            let _ = image.types().member("task_struct", "thread.sp");
            if let Ok(kernel) = Kernel::locate(Arc::new(image), &guest, &guest.vcpus) {
                let _ = crate::kernel::unwind::stacks(&kernel, &guest, &guest.vcpus, &[]);
            }
        }
    }
}
