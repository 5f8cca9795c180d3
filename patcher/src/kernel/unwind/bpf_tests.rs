//! Stacks of a made-up guest through programs, trampolines and dispatchers of BPF.

use super::Who;
use super::tests::{MODULES, after, check, check_by_file, sleeps_with, task7, text};
use super::vcpu_tests::runs;
use crate::kernel::testing::guest::TinyGuest;
use crate::kernel::testing::orc::function as f;

const PROGRAM: u64 = MODULES + 0x100;
const TRAMPOLINE: u64 = MODULES + 0x200;
const DISPATCHER: u64 = MODULES + 0x300;
const ODD: u64 = MODULES + 0x400;
/// push rbp; mov rbp, rsp; call elsewhere; leave
const FRAME: [u8; 10] = [0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 8, 0, 0, 0xc9];
/// Where both go on after their calls.
const BACK: u64 = 9;

/// A program, a trampoline that drops the frame of what it was called from, a dispatcher in the second half of its memory, and code
/// that nobody can follow.
fn prepare(guest: &mut TinyGuest) {
    let page = guest.page();
    guest.map(MODULES, page, 1);
    guest.put(guest.at("ftrace_ops_list"), guest.at("ftrace_list_end"));
    guest.put_bytes(PROGRAM, &[&FRAME[..], &[0xc3]].concat());
    guest.put_bytes(
        TRAMPOLINE,
        &[&FRAME[..], &[0x48, 0x83, 0xc4, 8, 0xc3]].concat(),
    );
    // cmp rdx, 1; jmp rdx
    guest.put_bytes(DISPATCHER + 0x80, &[0x48, 0x83, 0xfa, 1, 0xff, 0xe2]);
    // mov rsp, rax; call elsewhere
    guest.put_bytes(ODD, &[0x48, 0x89, 0xc4, 0xe8, 0, 8, 0, 0]);
    guest.bpf(&[
        (PROGRAM, PROGRAM + 0x40, "bpf_prog_1", true),
        (TRAMPOLINE, TRAMPOLINE + 0x100, "bpf_trampoline_1", false),
        (DISPATCHER, DISPATCHER + 0x100, "bpf_dispatcher_1", false),
        (ODD, ODD + 0x100, "bpf_prog_2", true),
    ]);
}

/// A task sleeps in what was called from code that goes on at `back`, whose own caller goes on at `caller`.
fn beneath(back: u64, caller: u64, want: &str) {
    check(&task7(), |guest| sleeps_beneath(guest, back, caller), want);
}

fn sleeps_beneath(guest: &mut TinyGuest, back: u64, caller: u64) {
    prepare(guest);
    let words = |_: &dyn Fn(u64) -> u64| vec![back, 1, 0, caller, after(f::FIRST)];
    sleeps_with(guest, 2, (after(f::PLAIN), 3), 5, words);
}

#[test]
fn frames_of_programs_and_trampolines_are_found_by_the_frame_pointer() {
    beneath(
        PROGRAM + BACK,
        after(f::OTHERS),
        "filler_000+0x8 0xffffffffc0a00109 filler_013+0x8 filler_007+0x8 | First",
    );
    // The trampoline was called at the beginning of a function that goes on behind the tracer's site, if it is not dropped.
    check_by_file(
        &task7(),
        |guest| sleeps_beneath(guest, TRAMPOLINE + BACK, text(0x305)),
        "filler_000+0x8 0xffffffffc0a00209 victim+0x5 filler_007+0x8 | First",
    );
    beneath(
        PROGRAM + BACK + 1,
        after(f::OTHERS),
        "0xffffffffc0a0010a at",
    );
    beneath(
        ODD + 8,
        after(f::OTHERS),
        "what the code from 0xffffffffc0a00400 on has on the stack at 0xffffffffc0a00407 cannot be told: \
         it is not clear at 0xffffffffc0a00400",
    );
}

#[test]
fn a_vcpu_may_be_anywhere_in_them() {
    let at = |rip: u64, words: &[u64], want: &str| {
        check(
            &Who::Vcpu(0),
            |guest| {
                prepare(guest);
                let words = [words, &[after(f::FIRST)]].concat();
                runs(guest, rip, &words);
            },
            &format!("{rip:#x} filler_007+0x8 | {want}"),
        );
    };
    at(PROGRAM, &[], "First");
    at(PROGRAM + 1, &[0], "First");
    at(PROGRAM + 10, &[], "First");
    // About to drop its frame, and with none: the second goes back to the caller of the function that it was called in.
    at(TRAMPOLINE + 14, &[], "First");
    at(DISPATCHER + 0x84, &[], "First");
    check(
        &Who::Vcpu(0),
        |guest| {
            prepare(guest);
            let sp = runs(guest, PROGRAM + 4, &[0, 0, after(f::FIRST)]);
            guest.vcpus[0].gpr[5] = sp + 8;
        },
        "0xffffffffc0a00104 filler_007+0x8 | First",
    );
    check_by_file(
        &Who::Vcpu(0),
        |guest| {
            prepare(guest);
            runs(guest, TRAMPOLINE + 10, &[text(0x305), after(f::FIRST)]);
        },
        "0xffffffffc0a0020a victim+0x5 filler_007+0x8 | First",
    );
    // Behind the last instruction that a way leads to.
    for rip in [PROGRAM + 11, DISPATCHER + 0x86] {
        check(
            &Who::Vcpu(0),
            |guest| {
                prepare(guest);
                runs(guest, rip, &[after(f::FIRST)]);
            },
            "cannot be told",
        );
    }
}
