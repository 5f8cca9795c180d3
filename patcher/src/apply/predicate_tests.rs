//! Packages with predicates, applied to a made-up kernel: who asks which, and how long what is asked stays.

use std::sync::Arc;

use iced_x86::Mnemonic;

use super::whole_tests::{how, options, started, undo};
use super::{ApplyError, Arena, Request, apply, reuse, settle};
use crate::addr::Gva;
use crate::edition::link::LinkError;
use crate::edition::object::Package;
use crate::edition::object::tests::Maker;
use crate::guest::fake::FakeGuest;
use crate::kernel::locate::Kernel;
use crate::kernel::stack::Who;
use crate::kernel::testing::guest::{SLIDE, TinyGuest};
use crate::kernel::testing::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, Rule, entry, function};
use crate::kernel::testing::{BUILD_ID, FORMS, Form, TEXT, task};
use crate::kernel::unwind::{End, Stack, stacks};
use crate::x86::insn::whole_instructions;

/// Where the predicate returns to from the function that it calls.
const IN_PREDICATE: u64 = 0x15;
/// Where the task returns to in the function that it began with.
const FIRST: u64 = TEXT + SLIDE + FUNCTIONS + function::FIRST * FUNCTION + AFTER_CALL;
/// Words that a thunk has pushed when it asks.
const PUSHED: usize = 6;

/// An edition of `patient` that calls the original, and a predicate that calls another function.
fn package(form: Form) -> Package {
    let mut code = vec![0xcc; 0x30];
    code[..11].copy_from_slice(&[0xe8, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0xc3]);
    code[0x10..0x16].copy_from_slice(&[0xe8, 0x0b, 0, 0, 0, 0xc3]);
    code[0x20] = 0xc3;
    let mut maker = Maker::for_kernel(&code, &BUILD_ID);
    maker.relocate_text(1, 4, "__fentry__", -4);
    maker.relocate_text(6, 4, "exopatch_original_patient", -4);
    maker.edition("patient", 0, 0);
    maker.predicate("asks", 0x10);
    maker.orc_entry(entry(form, Rule::Call((5, 8), (0, 0))));
    Package::parse(&maker.finish()).unwrap()
}

fn come(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    (id, package): (u64, &Package),
    rule: &str,
) -> Result<(), ApplyError> {
    let request = Request {
        how: how(rule),
        ..Request::new(id, package)
    };
    apply(guest, kernel, arena, &request, &options(false)).map(drop)
}

/// Whom the only handler in force calls, and the addresses behind these calls.
fn calls(arena: &Arena) -> Vec<(Gva, Gva)> {
    let [made] = &arena.holds.made[..] else {
        panic!("{} handlers", arena.holds.made.len())
    };
    let bytes = &made.assembled.bytes;
    let code = whole_instructions(bytes, made.assembled.at, bytes.len()).unwrap();
    let calls = code.iter().filter(|it| it.mnemonic() == Mnemonic::Call);
    calls
        .map(|it| (Gva(it.near_branch_target()), Gva(it.next_ip())))
        .collect()
}

/// The thunk of an update's predicate.
fn thunk(arena: &Arena, id: u64) -> Gva {
    let placed = &arena.holds.placed[&id];
    let asks = placed.linked.predicates()["asks"];
    assert!(placed.resident.code.range.contains(&asks));
    asks
}

/// A guest with a task that sleeps in the function that it began with, and where that task's stack pointer is kept.
fn sleeping(form: Form) -> (FakeGuest, Kernel, Arena, Gva) {
    let mut tiny = TinyGuest::new(form, 4);
    let sleeper = tiny.task(7, "sleeper", &[0, 0, 0, 0, 0, 0, FIRST]);
    let pointer = Gva(tiny.tasks[sleeper] + task::SP);
    let (guest, kernel, arena) = started(tiny);
    (guest, kernel, arena, pointer)
}

/// Has the task sleep beneath these return addresses and saved words, and `before` so many of them.
fn sleep(guest: &mut FakeGuest, kernel: &Kernel, pointer: Gva, before: usize, words: &[u64]) {
    let sp = kernel.read_u64(&*guest, pointer).unwrap();
    let sp = sp + 8 * before as u64 - 8 * words.len() as u64;
    let mut poke = |at: u64, word: u64| {
        let at = kernel.translate(&*guest, Gva(at)).unwrap();
        guest.poke(at, &word.to_le_bytes()).unwrap();
    };
    for (word, nth) in [0; 6].iter().chain(words).zip(0..) {
        poke(sp + 8 * nth, *word);
    }
    poke(pointer.0, sp);
}

#[test]
fn each_update_has_its_own_predicates_asked() {
    let (mut guest, kernel, mut arena, _) = sleeping(Form::New);
    let package = package(Form::New);
    let one = (1, &package);
    let none = come(&mut guest, &kernel, &mut arena, one, "predicate nobody");
    let none = none.unwrap_err().to_string();
    assert!(
        none.contains("called nobody, only asks") && none.contains("EXOPATCH_PREDICATE(nobody"),
        "{none}"
    );
    come(&mut guest, &kernel, &mut arena, one, "predicate asks").unwrap();
    let asked = |arena: &Arena| -> Vec<Gva> { calls(arena).iter().map(|(to, _)| *to).collect() };
    assert_eq!(asked(&arena), [thunk(&arena, 1)]);
    // One on top, by the same name.
    let rule = "cpu = 1 and not predicate asks";
    come(&mut guest, &kernel, &mut arena, (2, &package), rule).unwrap();
    assert_eq!(asked(&arena), [thunk(&arena, 2), thunk(&arena, 1)]);
    // A number of a rule is still one store; another question is another handler.
    let rule = how("cpu = 2 and not predicate asks");
    let report = reuse(&mut guest, &kernel, &mut arena, 2, rule, &options(false));
    assert_eq!(report.unwrap().pauses, 0);
    let plain = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("cpu = 0"),
        &options(false),
    );
    assert_eq!(plain.unwrap().pauses, 1);
    assert_eq!(asked(&arena), [thunk(&arena, 2)]);
    let wrong = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("predicate asked"),
        &options(false),
    );
    assert!(wrong.unwrap_err().to_string().contains("called asked"));
    assert_eq!(asked(&arena), [thunk(&arena, 2)], "it is as before");
}

/// A thread in a predicate is followed through the thunk and the handler to the function's caller, and holds the code of both.
#[test]
fn what_is_asked_stays_while_a_thread_is_in_it() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, pointer) = sleeping(form);
        let package = package(form);
        let used = arena.holds.space.used();
        come(
            &mut guest,
            &kernel,
            &mut arena,
            (1, &package),
            "predicate asks",
        )
        .unwrap();
        let placed = Arc::clone(&arena.holds.placed[&1]);
        let edition = placed.linked.redirections[0].edition.0;
        let asks = thunk(&arena, 1).0;
        let pushes = placed.linked.thunks[0].pushed();
        // Six pushes of one or two bytes, and the call.
        let in_thunk = pushes.take(PUSHED + 1).last().unwrap().0.0 + 5;
        assert!(in_thunk - asks == 13);
        let in_handler = calls(&arena)[0].1.0;
        let mut words = vec![edition + IN_PREDICATE, in_thunk];
        words.extend([0; PUSHED]);
        words.extend([in_handler, FIRST]);
        sleep(&mut guest, &kernel, pointer, 1, &words);
        let vcpus = guest.vcpus_mut().clone();
        let follow = |guest: &FakeGuest, arena: &Arena| {
            let others = arena.inhabited(&kernel).unwrap().others;
            let found = stacks(&kernel, guest, &vcpus, &others).unwrap();
            let of_it = |stack: &Stack| matches!(&stack.who, Who::Task { pid: 7, .. });
            let stack = found.stacks.into_iter().find(of_it).unwrap();
            let ips: Vec<u64> = stack.frames.iter().map(|frame| frame.ip.0).collect();
            (ips, stack.end.map_err(|unreliable| unreliable.reason))
        };
        let frames = vec![edition + IN_PREDICATE, in_thunk, in_handler, FIRST];
        let whole = (frames, Ok(End::First));
        assert_eq!(follow(&guest, &arena), whole, "{form:?}");
        // Another handler takes the place of the one that it is in, then the update goes.
        let other = how("not predicate asks");
        reuse(&mut guest, &kernel, &mut arena, 1, other, &options(false)).unwrap();
        undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
        for _ in 0..3 {
            settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        }
        assert_eq!(follow(&guest, &arena), whole, "{form:?}, reverted");
        assert!(arena.holds.placed.contains_key(&1) && !arena.holds.worn.is_empty());
        // It is back in the handler: that may still go on to the edition.
        let returned = [in_handler, FIRST];
        sleep(&mut guest, &kernel, pointer, words.len(), &returned);
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert!(arena.holds.placed.contains_key(&1));
        sleep(&mut guest, &kernel, pointer, 2, &[FIRST]);
        while arena.holds.is_settling() {
            settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        }
        assert!(arena.holds.placed.is_empty());
        assert!(
            arena.holds.space.used() > used,
            "what all handlers call stays"
        );
    }
}

#[test]
fn a_predicate_that_leaves_its_package_is_refused() {
    let mut code = vec![0xcc; 0x20];
    code[..10].copy_from_slice(&[0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
    code[0x10..0x15].copy_from_slice(&[0xe9, 0, 0, 0, 0]);
    let mut maker = Maker::for_kernel(&code, &BUILD_ID);
    maker.relocate_text(1, 4, "__fentry__", -4);
    maker.relocate_text(6, 4, "exopatch_original_patient", -4);
    maker.relocate_text(0x11, 4, "exopatch_original_patient", -4);
    maker.edition("patient", 0, 0);
    maker.predicate("asks", 0x10);
    maker.orc();
    let package = Package::parse(&maker.finish()).unwrap();
    let (mut guest, kernel, mut arena, _) = sleeping(Form::New);
    let before = (guest.memory().to_vec(), arena.holds.space.used());
    // Whether a rule asks it or not: one may later.
    let refused = come(&mut guest, &kernel, &mut arena, (1, &package), "cpu = 1");
    let refused = refused.unwrap_err();
    assert!(
        matches!(&refused, ApplyError::Link(LinkError::Predicate(error)) if error.predicate == "asks"),
        "{refused}"
    );
    assert_eq!((guest.memory().to_vec(), arena.holds.space.used()), before);
}
