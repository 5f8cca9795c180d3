//! Stacks of the vCPUs of a made-up guest: in the kernel, on the way in and out, in interrupts and exceptions, between two tasks.

use proptest::prelude::*;

use super::tests::{
    ENTRY_TOP, FAULT_TOP, KERNEL, NMI_TOP, REGISTERS, USER, after, check, fill, irq_top, of,
    pushed, saved, sleeps, start, task7, text, unwound,
};
use super::{Who, stacks};
use crate::kernel::testing::guest::{DIRECT, TinyGuest};
use crate::kernel::testing::orc::{
    AFTER_CALL, BEFORE_KERNEL, FORKED, FRAME_BY_DX, GRAPH, PROBE, PROCESSOR_FRAME, SAVED_REGISTERS,
    THUNK, function as f,
};
use crate::kernel::testing::patched::PUSHES;
use crate::kernel::testing::{Form, STACK, task};

/// vCPU 0 runs task 2 and is at `ip`, with `words` on the task's stack.
pub(super) fn runs(guest: &mut TinyGuest, ip: u64, words: &[u64]) -> u64 {
    let sp = guest.push(2, words);
    guest.put(guest.stack_top(2) - REGISTERS + 136, USER);
    guest.run(0, 2);
    guest.enter(0, ip, sp);
    sp
}

#[test]
fn vcpus_are_followed_from_their_registers() {
    let at = |ip: u64, words: Vec<u64>| {
        move |guest: &mut TinyGuest| {
            runs(guest, ip, &words);
        }
    };
    let vcpu = Who::Vcpu(0);
    check(&vcpu, |_| {}, " | User");
    check(
        &vcpu,
        at(start(f::PLAIN), vec![after(f::FIRST)]),
        "filler_000+0x0 filler_007+0x8 | First",
    );
    check(
        &vcpu,
        at(start(f::PLAIN) + 3, vec![text(SAVED_REGISTERS)]),
        "filler_000+0x3 asm_exc_divide_error+0x18 | User",
    );
    check(
        &vcpu,
        at(text(SAVED_REGISTERS), vec![]),
        "asm_exc_divide_error+0x18 | User",
    );
    check(
        &vcpu,
        at(0, vec![]),
        "in the user's half of the address space",
    );
    check(
        &vcpu,
        |guest| {
            let sp = runs(guest, start(f::BY_R13), &[0, 0, after(f::FIRST)]);
            guest.vcpus[0].gpr[13] = sp + 24;
        },
        "filler_006+0x0 filler_007+0x8 | First",
    );
    check(
        &vcpu,
        |guest| {
            let sp = runs(guest, start(f::FRAME_POINTER), &[0, 0, 0, after(f::FIRST)]);
            guest.vcpus[0].gpr[5] = sp + 16;
        },
        "filler_002+0x0 filler_007+0x8 | First",
    );
    // In code that is shipped, and in what the kernel put in its place, which pushes a word.
    let place = start(f::REPLACED) + AFTER_CALL;
    let put = |ip: u64, words: Vec<u64>| {
        move |guest: &mut TinyGuest| {
            runs(guest, ip, &words);
            guest.put(place, u64::from_le_bytes(PUSHES));
        }
    };
    let flags = || vec![0x246, after(f::FIRST)];
    let shipped = "filler_040+0x9 filler_007+0x8 | First";
    check(&vcpu, at(place + 1, vec![after(f::FIRST)]), shipped);
    check(&vcpu, put(place + 1, flags()), shipped);
    check(
        &vcpu,
        put(place + 4, vec![after(f::FIRST)]),
        "filler_040+0xc filler_007+0x8 | First",
    );
    check(
        &vcpu,
        put(place + 1, vec![after(f::FIRST)]),
        "filler_040+0x9 | ",
    );
    // In a thunk that leads to a function the stack is as at the function's entry.
    let thunk = "__x86_indirect_thunk_rax+0x0 filler_007+0x8 | First";
    check(&vcpu, at(text(THUNK), vec![after(f::FIRST)]), thunk);
    let silent = "__x86_indirect_thunk_rax+0x1 | the unwind table says nothing of";
    check(&vcpu, at(text(THUNK) + 1, vec![after(f::FIRST)]), silent);
    // A task that is run for the first time; only there may a stack end at an instruction.
    let begins = "filler_000+0x0 ret_from_fork+0x0 | First";
    check(&vcpu, at(start(f::PLAIN), vec![text(FORKED)]), begins);
    check(
        &vcpu,
        at(text(FORKED) + 4, vec![]),
        "ret_from_fork+0x4 | First",
    );
    check(&vcpu, at(start(f::FIRST), vec![]), "ends the stack at");
    // The task that runs is not also asleep.
    check(&task7(), at(start(f::PLAIN), vec![after(f::FIRST)]), "none");
    check(
        &vcpu,
        |guest| {
            runs(guest, start(f::PLAIN), &[after(f::FIRST)]);
            guest.vcpus[0].gpr[4] += 4;
        },
        "is outside the live part of its stack",
    );
    let mut offline = TinyGuest::new(Form::New, 4);
    offline.vcpus[1].state = crate::guest::VcpuState::Offline;
    offline.put(offline.at("__cpu_online_mask"), 1);
    let (_, found) = unwound(&mut offline, |_| Vec::new());
    assert!(of(&found, &Who::Vcpu(1)).is_none());
}

#[test]
fn entry_code_on_the_users_stack_is_the_end() {
    let at = |ip: u64, sp: u64| {
        move |guest: &mut TinyGuest| {
            guest.run(0, 2);
            guest.enter(0, ip, sp);
        }
    };
    let vcpu = Who::Vcpu(0);
    check(
        &vcpu,
        at(text(BEFORE_KERNEL), 0x7fff_1230),
        "__entry_text_start+0x10 | Entry",
    );
    check(
        &vcpu,
        at(text(BEFORE_KERNEL), ENTRY_TOP),
        "__entry_text_start+0x10 | Entry",
    );
    // A user may choose another task's stack for one: that task is asleep all the same.
    for distance in [0, 8, 176] {
        let prepare = |guest: &mut TinyGuest| {
            let other = guest.task(8, "other", &[]);
            sleeps(guest, other, after(f::PLAIN), &[after(f::FIRST)]);
            let sp = guest.stack_top(other) - distance;
            at(text(BEFORE_KERNEL), sp)(guest);
        };
        check(&vcpu, prepare, "__entry_text_start+0x10 | Entry");
        let other = Who::Task {
            pid: 8,
            name: String::new(),
        };
        check(&other, prepare, "filler_000+0x8 filler_007+0x8 | First");
    }
    // The user's registers, before they are on the task's stack, and when that has been come to without them.
    check(
        &vcpu,
        |guest| {
            pushed(guest, ENTRY_TOP - 40, (0x40_1000, USER, 0x7fff_0000));
            at(text(PROCESSOR_FRAME), ENTRY_TOP - 40)(guest);
        },
        "asm_exc_divide_error+0x4 | User",
    );
    // The same, moved to the task's stack, which entry code is about to go on with; also when it is interrupted there.
    let switch = text(SAVED_REGISTERS) - 11;
    let about_to_switch = |guest: &mut TinyGuest| {
        at(switch, ENTRY_TOP - 0x90)(guest);
        let code = guest.get(switch) & !0xff_ffff | 0xc4_8948;
        guest.put(switch, code);
        let registers = guest.stack_top(2) - REGISTERS;
        guest.put(registers + 136, USER);
        guest.vcpus[0].gpr[0] = registers;
    };
    check(&vcpu, about_to_switch, "asm_exc_divide_error+0xd | User");
    check(
        &vcpu,
        |guest| {
            about_to_switch(guest);
            let whole = NMI_TOP - REGISTERS;
            saved(guest, whole, (switch, KERNEL, ENTRY_TOP - 0x90), 0);
            guest.put(whole + 80, guest.vcpus[0].gpr[0]);
            let sp = fill(guest, whole, &[text(SAVED_REGISTERS)]);
            guest.enter(0, start(f::OTHERS), sp);
        },
        "filler_013+0x0 asm_exc_divide_error+0x18 asm_exc_divide_error+0xd | User",
    );
    check(
        &vcpu,
        |guest| {
            about_to_switch(guest);
            nmi(guest, (switch, KERNEL), ENTRY_TOP - 0x90);
        },
        "filler_013+0x0 asm_exc_divide_error+0x4 | the caller is found by register rax, whose",
    );
    let aside = |cs: u64| {
        move |guest: &mut TinyGuest| {
            let below = fill(guest, irq_top(guest), &[0; 8]);
            pushed(guest, NMI_TOP - 40, (start(f::PLAIN), cs, below));
            at(text(FRAME_BY_DX), guest.stack_top(2))(guest);
            guest.vcpus[0].gpr[2] = NMI_TOP - 40;
        }
    };
    check(&vcpu, aside(USER), "asm_exc_divide_error+0x44 | User");
    check(
        &vcpu,
        aside(KERNEL),
        "is in a stack that does not lie beneath this one",
    );
}

/// vCPU 0 is on its interrupt stack, over task 2, with `words` on the task's stack.
fn interrupt(guest: &mut TinyGuest, words: &[u64]) -> u64 {
    let below = runs(guest, 0, words);
    let sp = fill(
        guest,
        irq_top(guest),
        &[after(f::OVER_ANOTHER_STACK), below],
    );
    guest.enter(0, start(f::OTHERS), sp);
    sp
}

#[test]
fn interrupt_stacks_lead_to_the_tasks() {
    let vcpu = Who::Vcpu(0);
    check(
        &vcpu,
        |guest| {
            interrupt(guest, &[after(f::OTHERS), text(SAVED_REGISTERS)]);
        },
        "filler_013+0x0 filler_003+0x8 filler_013+0x8 asm_exc_divide_error+0x18 | User",
    );
    let beneath = |of: fn(&TinyGuest) -> u64| {
        move |guest: &mut TinyGuest| {
            interrupt(guest, &[after(f::FIRST)]);
            guest.put(irq_top(guest) - 8, of(guest));
        }
    };
    let misaligned = |guest: &TinyGuest| guest.stack_top(2) - 177;
    check(
        &vcpu,
        beneath(misaligned),
        "is outside the live part of its stack",
    );
    let itself = |guest: &TinyGuest| irq_top(guest) - 8;
    check(&vcpu, beneath(itself), "which is in no code of the kernel");
    let of_another_cpu = |guest: &TinyGuest| guest.get(guest.percpu(1, "hardirq_stack_ptr")) - 8;
    check(
        &vcpu,
        beneath(of_another_cpu),
        "is in a stack that does not lie beneath this one",
    );
    check(&vcpu, beneath(|_| DIRECT), "is in no stack of the kernel");
}

/// As [`interrupt`], and an NMI came at `ip`, which found the stack pointer `sp` there.
fn nmi(guest: &mut TinyGuest, (ip, cs): (u64, u64), sp: u64) {
    pushed(guest, NMI_TOP - 40, (ip, cs, sp));
    let sp = fill(guest, NMI_TOP - 40, &[text(PROCESSOR_FRAME)]);
    guest.enter(0, start(f::OTHERS), sp);
}

#[test]
fn exception_stacks_lead_to_what_was_interrupted() {
    let vcpu = Who::Vcpu(0);
    check(
        &vcpu,
        |guest| {
            let sp = interrupt(guest, &[after(f::FIRST)]);
            nmi(guest, (start(f::PLAIN), KERNEL), sp);
        },
        "filler_013+0x0 asm_exc_divide_error+0x4 filler_000+0x0 filler_003+0x8 filler_007+0x8 | First",
    );
    check(
        &vcpu,
        |guest| {
            guest.run(0, 2);
            nmi(guest, (0x40_1000, USER), 0x7fff_0000);
        },
        "filler_013+0x0 asm_exc_divide_error+0x4 | User",
    );
    check(
        &vcpu,
        |guest| {
            guest.run(0, 2);
            nmi(guest, (text(BEFORE_KERNEL), KERNEL), 0x7fff_0000);
        },
        "asm_exc_divide_error+0x4 __entry_text_start+0x10 | Entry",
    );
    // No CPU interrupts another one's work.
    check(
        &vcpu,
        |guest| {
            interrupt(guest, &[after(f::FIRST)]);
            let other = guest.get(guest.percpu(1, "hardirq_stack_ptr")) - 64;
            nmi(guest, (start(f::PLAIN), KERNEL), other);
        },
        "is in a stack that does not lie beneath this one",
    );
    // By way of the stack for double faults, back onto the one that was left.
    check(
        &vcpu,
        |guest| {
            interrupt(guest, &[after(f::FIRST)]);
            nmi(guest, (start(f::PLAIN), KERNEL), FAULT_TOP - 48);
            pushed(
                guest,
                FAULT_TOP - 40,
                (start(f::PLAIN), KERNEL, NMI_TOP - 400),
            );
            fill(guest, FAULT_TOP - 40, &[text(PROCESSOR_FRAME)]);
        },
        "is in a stack that does not lie beneath this one, or was left before",
    );
    // Back onto the stack that was left.
    check(
        &vcpu,
        |guest| {
            interrupt(guest, &[after(f::FIRST)]);
            nmi(guest, (start(f::PLAIN), KERNEL), NMI_TOP - 48);
        },
        "the stack does not get further",
    );
}

#[test]
fn no_stack_is_two_vcpus() {
    check(
        &Who::Vcpu(1),
        |guest| {
            let sp = runs(guest, start(f::PLAIN), &[after(f::FIRST)]);
            guest.enter(1, start(f::PLAIN), sp);
        },
        "another stack already leads into this one",
    );
    // Nor is one in the middle of another.
    check(
        &task7(),
        |guest| {
            let other = guest.task(8, "other", &[]);
            let stack = guest.get(guest.tasks[2] + task::STACK);
            guest.put(guest.tasks[other] + task::STACK, stack);
        },
        "is in no stack of the kernel",
    );
    check(
        &Who::Unowned,
        |guest| {
            guest.stack(true);
        },
        "no known task is on this stack",
    );
}

#[test]
fn both_sides_of_a_task_switch_are_followed() {
    let switch = |guest: &mut TinyGuest| {
        let next = guest.task(8, "next", &[]);
        sleeps(guest, next, after(f::PLAIN), &[after(f::FIRST)]);
        guest.run(0, 2);
        let sp = guest.push(next, &[after(f::OTHERS), after(f::FIRST)]);
        guest.enter(0, start(f::PLAIN), sp);
    };
    check(
        &Who::Vcpu(0),
        switch,
        "filler_000+0x0 filler_013+0x8 filler_007+0x8 | First",
    );
    check(&task7(), switch, "filler_000+0x8 filler_007+0x8 | First");
    let next = Who::Task {
        pid: 8,
        name: String::new(),
    };
    check(&next, switch, "none");
    // What another vCPU runs in the user's code was not left: what it saved is of long ago.
    let user = |guest: &mut TinyGuest| {
        switch(guest);
        let user = guest.task(9, "user", &[]);
        sleeps(guest, user, after(f::PLAIN), &[0x1234]);
        guest.run(1, user);
    };
    let runs = Who::Task {
        pid: 9,
        name: String::new(),
    };
    check(&runs, user, "none");
    check(&task7(), user, "filler_000+0x8 filler_007+0x8 | First");
    // Unless it cannot be told which CPU it was.
    let stray = |guest: &mut TinyGuest| {
        user(guest);
        guest.vcpus[0].gs_base = 0;
    };
    check(&runs, stray, "nothing says how to unwind 0x1233");
    check(&task7(), stray, "filler_000+0x8 filler_007+0x8 | First");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the stacks and the heap hold, every stack ends, within its bounds.
    #[test]
    fn hostile_stacks_never_panic(
        changes in proptest::collection::vec((0..6_u8, any::<u16>(), 0..5_u8, any::<u64>()), 1..60),
        rip in 0..0x2000_u64,
    ) {
        let mut guest = TinyGuest::new(Form::New, 4);
        guest.task(7, "sleeper", &[]);
        guest.task(8, "other", &[]);
        sleeps(&mut guest, 3, after(f::PLAIN), &[0; 200]);
        let sp = interrupt(&mut guest, &[after(f::OTHERS), text(SAVED_REGISTERS)]);
        nmi(&mut guest, (start(f::PLAIN), KERNEL), sp);
        guest.vcpus[0].rip = text(rip);
        let kernel = guest.kernel();
        let tops = [guest.stack_top(2), guest.stack_top(3), irq_top(&guest), NMI_TOP, ENTRY_TOP];
        for (place, at, kind, value) in changes {
            let base = tops.get(usize::from(place)).map_or(DIRECT + 0x20_1000, |top| *top);
            let at = base - 8 - u64::from(at) % 0x100 * 8;
            let value = match kind {
                0 => value,
                1 => after(value % 14),
                2 => tops[usize::try_from(value % 5).unwrap()] - value % 0x400,
                3 => text([SAVED_REGISTERS, PROCESSOR_FRAME, GRAPH, PROBE][usize::try_from(value % 4).unwrap()]),
                _ => guest.get(at) ^ 1 << (value % 64),
            };
            guest.put(at, value);
        }
        if let Ok(found) = stacks(&kernel, &guest, &guest.vcpus, &[]) {
            let most = usize::try_from(STACK / 8).unwrap() * 4;
            prop_assert!(found.stacks.iter().all(|stack| stack.frames.len() <= most));
        }
    }
}
