//! Stacks of a made-up guest, one for each way in which one goes on, ends, or cannot be believed.

use super::{Frame, OtherCode, Stack, Stacks, Who, stacks};
use crate::kernel::locate::Kernel;
use crate::kernel::testing::guest::{ENTRY_AREA, SLIDE, TinyGuest};
use crate::kernel::testing::orc::{
    AFTER_CALL, FORKED, FUNCTION, FUNCTIONS, SAVED_REGISTERS, function as f,
};
use crate::kernel::testing::{DATA, FORMS, Form, TEXT, task};

/// Bytes of the registers that are saved at the top of a stack.
pub(super) const REGISTERS: u64 = 168;
pub(super) const USER: u64 = 0x33;
pub(super) const KERNEL: u64 = 0x10;
/// A page where the kernel has modules and trampolines.
pub(super) const MODULES: u64 = 0xffff_ffff_c0a0_0000;

pub(super) fn text(offset: u64) -> u64 {
    TEXT + SLIDE + offset
}

/// The function of a number: its first byte, and where it goes on after its call.
pub(super) fn start(number: u64) -> u64 {
    text(FUNCTIONS + number * FUNCTION)
}

pub(super) fn after(number: u64) -> u64 {
    start(number) + AFTER_CALL
}

/// Makes task `index` sleep in a function that will go on at `ip`, with `words` above that up to the user's registers.
pub(super) fn sleeps(guest: &mut TinyGuest, index: usize, ip: u64, words: &[u64]) {
    sleeps_with(guest, index, (ip, 0), words.len(), |_| words.to_vec());
}

/// As [`sleeps`], with a frame pointer, and `count` words that may depend on where they are.
pub(super) fn sleeps_with(
    guest: &mut TinyGuest,
    index: usize,
    (ip, bp): (u64, u64),
    count: usize,
    words: impl FnOnce(&dyn Fn(u64) -> u64) -> Vec<u64>,
) {
    let first = guest.stack_top(index) - REGISTERS - 8 * count as u64;
    let words = words(&|word| first + 8 * word);
    assert_eq!(words.len(), count);
    let bp = if bp == 0 { 0 } else { first + 8 * (bp - 1) };
    let inactive = [0, 0, 0, 0, 0, bp, ip];
    let sp = guest.push(index, &[&inactive[..], &words].concat());
    guest.put(guest.tasks[index] + task::SP, sp);
    guest.put(guest.stack_top(index) - REGISTERS + 136, USER);
}

/// Writes saved registers at `at`.
pub(super) fn saved(guest: &mut TinyGuest, at: u64, (ip, cs, sp): (u64, u64, u64), bp: u64) {
    for (offset, value) in [(32, bp), (56, sp), (128, ip), (136, cs), (152, sp)] {
        guest.put(at + offset, value);
    }
}

/// What the processor pushes at `at` when it interrupts code.
pub(super) fn pushed(guest: &mut TinyGuest, at: u64, (ip, cs, sp): (u64, u64, u64)) {
    for (offset, value) in [(0, ip), (8, cs), (16, 2), (24, sp), (32, 0x18)] {
        guest.put(at + offset, value);
    }
}

/// Writes `words` where they end at `top`; returns where they begin.
pub(super) fn fill(guest: &mut TinyGuest, top: u64, words: &[u64]) -> u64 {
    let at = top - 8 * words.len() as u64;
    (at..)
        .step_by(8)
        .zip(words)
        .for_each(|(at, word)| guest.put(at, *word));
    at
}

pub(super) fn irq_top(guest: &TinyGuest) -> u64 {
    guest.get(guest.percpu(0, "hardirq_stack_ptr")) + 8
}

/// The top of the stack for NMIs of CPU 0.
pub(super) const NMI_TOP: u64 = ENTRY_AREA + 4096 + 0x2000 + 0x6000;
/// The top of the one for double faults.
pub(super) const FAULT_TOP: u64 = ENTRY_AREA + 4096 + 0x2000 + 0x3000;
/// The top of the stack on which CPU 0 enters the kernel.
pub(super) const ENTRY_TOP: u64 = ENTRY_AREA + 4096 + 0x2000;

pub(super) fn unwound(
    guest: &mut TinyGuest,
    others: impl Fn(&Kernel) -> Vec<OtherCode>,
) -> (Kernel, Stacks) {
    let kernel = guest.kernel();
    let others = others(&kernel);
    let found = stacks(&kernel, guest, &guest.vcpus, &others).unwrap();
    (kernel, found)
}

/// Functions without their sizes and the end of their names; then how the stack ends.
pub(super) fn told(kernel: &Kernel, stack: &Stack) -> String {
    let name = |frame: &Frame| {
        let whole = frame
            .describe(kernel)
            .replace("_of_many", "")
            .replace("_asm", "");
        whole.split('/').next().unwrap_or_default().to_owned()
    };
    let frames: Vec<String> = stack.frames.iter().map(name).collect();
    let end = match &stack.end {
        Ok(end) => format!("{end:?}"),
        Err(unreliable) => unreliable.to_string(),
    };
    format!("{} | {end}", frames.join(" "))
}

pub(super) fn of<'a>(found: &'a Stacks, who: &Who) -> Option<&'a Stack> {
    found.stacks.iter().find(|stack| match (&stack.who, who) {
        (Who::Task { pid: a, .. }, Who::Task { pid: b, .. }) => a == b,
        (a, b) => a == b,
    })
}

pub(super) fn task7() -> Who {
    Who::Task {
        pid: 7,
        name: String::new(),
    }
}

/// In every form of kernel: the stack of `who`, of what `prepare` makes of a guest with a task (index 2, pid 7), begins as `want` says,
/// a reason up to where it says who saw it.
pub(super) fn check(who: &Who, prepare: impl Fn(&mut TinyGuest), want: &str) {
    check_in(&FORMS, who, prepare, |_| Vec::new(), want);
}

pub(super) fn check_in(
    forms: &[Form],
    who: &Who,
    prepare: impl Fn(&mut TinyGuest),
    others: impl Fn(&Kernel) -> Vec<OtherCode>,
    want: &str,
) {
    for form in forms {
        let mut guest = prepared(*form, &prepare);
        // By the kernel's file, and by what is left of it in memory.
        for kernel in [guest.kernel(), guest.recovered()] {
            tells(&guest, &kernel, who, &others(&kernel), want);
        }
    }
}

/// As [`check`], of what the kernel's file alone tells: that a call lay where the tracer's site is.
pub(super) fn check_by_file(who: &Who, prepare: impl Fn(&mut TinyGuest), want: &str) {
    for form in FORMS {
        let mut guest = prepared(form, &prepare);
        let kernel = guest.kernel();
        tells(&guest, &kernel, who, &[], want);
    }
}

fn prepared(form: Form, prepare: impl Fn(&mut TinyGuest)) -> TinyGuest {
    let mut guest = TinyGuest::new(form, 4);
    guest.task(7, "sleeper", &[]);
    sleeps(&mut guest, 2, after(f::PLAIN), &[after(f::FIRST)]);
    prepare(&mut guest);
    guest
}

fn tells(guest: &TinyGuest, kernel: &Kernel, who: &Who, others: &[OtherCode], want: &str) {
    let found = stacks(kernel, guest, &guest.vcpus, others).unwrap();
    let got = of(&found, who).map_or("none".to_owned(), |stack| told(kernel, stack));
    let (form, source) = (guest.form, kernel.image().source());
    assert!(
        got.contains(want),
        "{form:?} {source:?}: {got}\n instead of {want}"
    );
}

/// Of a sleeping task with these words above its first return address.
pub(super) fn asleep(ip: u64, words: &'static [u64], want: &str) {
    check(&task7(), |guest| sleeps(guest, 2, ip, words), want);
}

#[test]
fn sleeping_tasks_are_followed_to_the_end() {
    check(&task7(), |_| {}, "filler_000+0x8 filler_007+0x8 | First");
    check(
        &task7(),
        |guest| {
            sleeps(
                guest,
                2,
                after(f::PLAIN),
                &[after(f::OTHERS), text(SAVED_REGISTERS)],
            )
        },
        "filler_000+0x8 filler_013+0x8 asm_exc_divide_error+0x18 | User",
    );
    check(
        &task7(),
        |guest| {
            sleeps(
                guest,
                2,
                after(f::PUSHES_BP),
                &[0, after(f::OTHERS), after(f::FIRST)],
            )
        },
        "filler_001+0x8 filler_013+0x8 filler_007+0x8 | First",
    );
    // The frame pointer is where an outer function left it: over one that keeps it and one that saves it.
    check(
        &task7(),
        |guest| {
            let words = |at: &dyn Fn(u64) -> u64| {
                vec![
                    after(f::PUSHES_BP),
                    at(4),
                    after(f::FRAME_POINTER),
                    1,
                    0,
                    after(f::FIRST),
                ]
            };
            sleeps_with(guest, 2, (after(f::PLAIN), 0), 6, words);
        },
        "filler_000+0x8 filler_001+0x8 filler_002+0x8 filler_007+0x8 | First",
    );
    check(
        &task7(),
        |guest| {
            // Its frame pointer is the third word; at the word below is where its caller's frame ends.
            let words = |at: &dyn Fn(u64) -> u64| vec![1, at(5), 2, 3, after(f::FIRST)];
            sleeps_with(guest, 2, (after(f::REALIGNED), 3), 5, words);
        },
        "filler_004+0x8 filler_007+0x8 | First",
    );
    check(
        &task7(),
        |guest| {
            let words = |at: &dyn Fn(u64) -> u64| {
                vec![at(4), 1, after(f::FRAME_POINTER), 2, 0, after(f::FIRST)]
            };
            sleeps_with(guest, 2, (after(f::BP_FROM_BP), 1), 6, words);
        },
        "filler_012+0x8 filler_002+0x8 filler_007+0x8 | First",
    );
}

#[test]
fn a_task_that_has_never_run_has_one_frame() {
    asleep(0, &[], "is no return address");
    check(
        &task7(),
        |guest| sleeps(guest, 2, text(FORKED), &[]),
        "ret_from_fork+0x0 | First",
    );
}

#[test]
fn what_is_not_believed_is_named() {
    let deep = &[1; 40];
    asleep(
        after(f::SILENT),
        &[],
        "filler_008+0x8 | the unwind table says nothing of",
    );
    asleep(
        after(f::UNKNOWN),
        &[],
        "filler_011+0x8 | the unwind table says nothing of",
    );
    asleep(
        after(f::STANDS_STILL),
        &[],
        "the stack does not get further",
    );
    asleep(
        after(f::BY_R10),
        &[],
        "by register r10, whose value is not known",
    );
    asleep(
        after(f::BY_R13),
        &[],
        "by register r13, whose value is not known",
    );
    asleep(after(f::FIRST), deep, "ends the stack at");
    asleep(
        start(f::PLAIN) + 4,
        &[],
        "is no return address: no call lies before it",
    );
    asleep(
        after(f::FRAME_POINTER),
        &[],
        "0x8 is outside the live part of its stack",
    );
    for (word, want) in [
        (TEXT, "which is in no code of the kernel"),
        (start(f::PLAIN) + 7, "is no return address"),
        (0x40_1000, "in the user's half of the address space"),
        (DATA + SLIDE + 8, "in section .data of the kernel's image"),
        (
            MODULES + 8,
            "in the area of modules, BPF programs and trampolines",
        ),
        (0, "is no return address"),
    ] {
        let words = [word, after(f::FIRST)];
        check(
            &task7(),
            |guest| sleeps(guest, 2, after(f::PLAIN), &words),
            want,
        );
    }
    // A user's registers are at the top of the stack, and of a user.
    asleep(
        text(SAVED_REGISTERS),
        &[0; 2],
        "nothing says how to unwind 0x0",
    );
    check(
        &task7(),
        |guest| {
            sleeps(guest, 2, text(SAVED_REGISTERS), &[0; 21]);
            guest.put(guest.stack_top(2) - 2 * REGISTERS + 136, USER);
        },
        "which is not the top of a stack",
    );
    check(
        &task7(),
        |guest| {
            sleeps(guest, 2, text(SAVED_REGISTERS), &[]);
            guest.put(guest.stack_top(2) - REGISTERS + 136, 0x11);
        },
        "is 0x11, neither the kernel's nor a user's",
    );
    let off = |guest: &mut TinyGuest, distance: i64| {
        let top = guest.stack_top(2);
        guest.put(guest.tasks[2] + task::SP, top.wrapping_add_signed(distance));
    };
    check(
        &task7(),
        |guest| off(guest, 8),
        "its stack pointer is not within its stack",
    );
    check(
        &task7(),
        |guest| off(guest, -225),
        "is outside the live part of its stack",
    );
    check(
        &task7(),
        |guest| off(guest, -16),
        "is outside the live part of its stack",
    );
}

#[test]
fn a_caller_that_was_interrupted_has_no_call_before_it() {
    let prepare = |guest: &mut TinyGuest| {
        sleeps(
            guest,
            2,
            after(f::INTERRUPTS),
            &[start(f::OTHERS), after(f::FIRST)],
        );
    };
    let none = |_: &Kernel| Vec::new();
    check_in(
        &[Form::New],
        &task7(),
        prepare,
        none,
        "filler_013+0x0 filler_007+0x8 | First",
    );
    check_in(
        &[Form::Old],
        &task7(),
        prepare,
        none,
        "is no return address",
    );
}

#[test]
fn interrupted_code_goes_on_where_its_registers_say() {
    // A fault: all registers are saved, so that a caller may be found by one of them.
    let fault = |cs: u64, ip: u64| {
        move |guest: &mut TinyGuest| {
            sleeps(guest, 2, text(SAVED_REGISTERS), &[0; 23]);
            let first = guest.stack_top(2) - REGISTERS - 8 * 23;
            guest.put(first + 8 * 22, after(f::FIRST));
            saved(guest, first, (ip, cs, first + 8 * 22), 0);
            guest.put(first + 56, first + 8 * 23);
        }
    };
    let want = "asm_exc_divide_error+0x18 filler_000+0x3 filler_007+0x8 | First";
    check(&task7(), fault(KERNEL, start(f::PLAIN) + 3), want);
    let want = "asm_exc_divide_error+0x18 filler_005+0x0 filler_007+0x8 | First";
    check(&task7(), fault(KERNEL, start(f::BY_R10)), want);
    check(
        &task7(),
        fault(USER, start(f::PLAIN)),
        "which is not the top of a stack",
    );
    // The frame ends below where it began.
    check(
        &task7(),
        |guest| {
            fault(KERNEL, start(f::PLAIN))(guest);
            let first = guest.stack_top(2) - REGISTERS - 8 * 23;
            guest.put(first + 152, first - 8);
        },
        "the stack does not get further",
    );
}
