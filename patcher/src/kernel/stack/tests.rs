//! Who is in given code, and who is not, on a guest made up for it.

use std::ops::Range;

use proptest::prelude::*;

use super::{Gva, Scan, ScanError, Vcpu, Who, stack_words};
use crate::kernel::tasks::Tasks;
use crate::kernel::testing::guest::{DIRECT, ENTRY_AREA, SLIDE, TinyGuest};
use crate::kernel::testing::{FORMS, Form, STACK, TEXT, task};

/// The forbidden code, and an address in it.
const START: u64 = TEXT + SLIDE + 0x308;
const INSIDE: u64 = START + 1;
const ELSEWHERE: u64 = TEXT + SLIDE + 0x1000;
const ENTRY: u64 = TEXT + SLIDE + 0x90;

fn forbidden() -> [Range<Gva>; 2] {
    [
        Gva(START)..Gva(START + 4),
        Gva(START + 0x100)..Gva(START + 0x104),
    ]
}

fn scan(guest: &mut TinyGuest) -> Result<Scan, ScanError> {
    let kernel = guest.kernel();
    let vcpus: &[Vcpu] = &guest.vcpus;
    stack_words(&kernel, guest, vcpus, &forbidden())
}

/// In every form of kernel: what `prepare` makes of a guest with a sleeping task (index 2, pid 7) ends as `want` says.
fn check(prepare: impl Fn(&mut TinyGuest), want: Result<(), &str>) {
    for form in FORMS {
        let mut guest = TinyGuest::new(form, 4);
        guest.task(7, "sleeper", &[ELSEWHERE, 1, 2]);
        prepare(&mut guest);
        match (scan(&mut guest), want) {
            (Ok(_), Ok(())) => {}
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{form:?}: {got}"),
            (got, want) => panic!("{form:?}: {got:?} instead of {want:?}"),
        }
    }
}

#[test]
fn sleeping_tasks_are_looked_at_from_their_stack_pointer_up() {
    check(|_| {}, Ok(()));
    let at = |word: u64| {
        move |guest: &mut TinyGuest| {
            guest.task(8, "victim", &[0, word, 0]);
        }
    };
    check(
        at(INSIDE),
        Err("task 8 (victim) is in code that is to be changed"),
    );
    check(at(START), Err("task 8"));
    check(at(START + 3), Err("task 8"));
    check(at(START + 0x100), Err("task 8"));
    check(at(START - 1), Ok(()));
    check(at(START + 4), Ok(()));
    // Below the stack pointer, and among the user's registers above, are no return addresses.
    let off = |distance: i64| {
        move |guest: &mut TinyGuest| {
            let sp = guest.get(guest.tasks[2] + task::SP);
            guest.put(sp.wrapping_add_signed(distance), INSIDE);
        }
    };
    check(off(-8), Ok(()));
    check(off(16), Err("task 7"));
    check(off(24), Ok(()));
}

#[test]
fn threads_and_idle_tasks_are_looked_at() {
    check(
        |guest| {
            let thread = guest.task(9, "thread", &[INSIDE]);
            let at = guest.tasks.remove(thread);
            let signal = guest.get(guest.tasks[2] + task::SIGNAL);
            guest.list(
                signal + 0x10,
                &[guest.tasks[2] + task::THREAD_NODE, at + task::THREAD_NODE],
            );
        },
        Err("task 9 (thread)"),
    );
    check(
        |guest| {
            guest.run(1, 2);
            let sp = guest.push(1, &[INSIDE]);
            guest.put(guest.tasks[1] + task::SP, sp);
        },
        Err("task 0 (swapper/1)"),
    );
}

#[test]
fn a_task_that_runs_is_where_its_vcpu_is() {
    // In the user's code: whatever its stack held when it last slept is dead.
    check(
        |guest| {
            guest.push(2, &[INSIDE, 0, 0]);
            guest.run(0, 2);
        },
        Ok(()),
    );
    let at = |words: &'static [u64], rip: u64| {
        move |guest: &mut TinyGuest| {
            guest.push(2, &[INSIDE, 0, 0]);
            let sp = guest.push(2, words);
            guest.run(0, 2);
            guest.enter(0, rip, sp);
        }
    };
    check(at(&[1, 2], ELSEWHERE), Ok(()));
    check(at(&[1, 2], INSIDE), Err("vCPU 0 is in code"));
    check(at(&[1, INSIDE], ELSEWHERE), Err("task 7"));
    check(
        |guest| {
            let sp = guest.push(0, &[]);
            guest.enter(0, ELSEWHERE, sp);
            guest.vcpus[0].gpr[0] = INSIDE;
        },
        Err("vCPU 0"),
    );
}

/// Puts vCPU 0, which runs task 2, on its interrupt stack; the interrupted stack pointer is `below`.
fn interrupt(guest: &mut TinyGuest, words: &[u64], below: u64) -> u64 {
    let top = guest.get(guest.percpu(0, "hardirq_stack_ptr"));
    guest.put(top, below);
    let sp = top - 8 * words.len() as u64;
    (sp..)
        .step_by(8)
        .zip(words)
        .for_each(|(at, word)| guest.put(at, *word));
    guest.run(0, 2);
    guest.enter(0, ELSEWHERE, sp);
    sp
}

/// Puts vCPU 0 on its stack for NMIs, which interrupted `rip` with the stack pointer `below`, in code segment `cs`.
fn nmi(guest: &mut TinyGuest, word: u64, (rip, cs, below): (u64, u64, u64)) {
    let top = ENTRY_AREA + 4096 + 0x2000 + 0x6000;
    for (at, value) in [
        (8, 0x18),
        (16, below),
        (24, 2),
        (32, cs),
        (40, rip),
        (48, word),
    ] {
        guest.put(top - at, value);
    }
    guest.run(0, 2);
    guest.enter(0, ELSEWHERE, top - 48);
}

#[test]
fn interrupt_stacks_lead_down_to_the_task() {
    let on_irq = |irq: &'static [u64], words: &'static [u64]| {
        move |guest: &mut TinyGuest| {
            guest.push(2, &[INSIDE, 0, 0]);
            let below = guest.push(2, words);
            interrupt(guest, irq, below);
        }
    };
    check(on_irq(&[1, 2, 3], &[4]), Ok(()));
    check(
        on_irq(&[1, INSIDE, 3], &[4]),
        Err("an interrupt or exception on vCPU 0"),
    );
    check(on_irq(&[1, 2, 3], &[INSIDE]), Err("task 7"));
    check(
        |guest| {
            interrupt(guest, &[1], 0xdead_0000);
        },
        Err("its stack pointer is in no stack of the kernel"),
    );
    check(
        |guest| {
            let top = guest.get(guest.percpu(0, "hardirq_stack_ptr"));
            interrupt(guest, &[1], top - 64);
        },
        Err("its stacks do not end"),
    );
}

#[test]
fn exception_stacks_lead_down_too() {
    let on_nmi = |word: u64, rip: u64, words: &'static [u64]| {
        move |guest: &mut TinyGuest| {
            guest.push(2, &[INSIDE, 0, 0]);
            let below = guest.push(2, words);
            let irq = interrupt(guest, &[5], below);
            nmi(guest, word, (rip, 0x10, irq));
        }
    };
    check(on_nmi(1, ELSEWHERE, &[2]), Ok(()));
    check(
        on_nmi(INSIDE, ELSEWHERE, &[2]),
        Err("an interrupt or exception"),
    );
    check(on_nmi(1, INSIDE, &[2]), Err("an interrupt or exception"));
    check(on_nmi(1, ELSEWHERE, &[INSIDE]), Err("task 7"));
    // From the user's code there is nothing beneath.
    check(
        |guest| {
            guest.push(2, &[INSIDE, 0, 0]);
            nmi(guest, 1, (0x40_1000, 0x33, 0x7fff_0000));
        },
        Ok(()),
    );
    // Nor from entry code that is still on the user's stack.
    check(|guest| nmi(guest, 1, (ENTRY, 0x10, 0x7fff_0000)), Ok(()));
    check(
        |guest| nmi(guest, 1, (ELSEWHERE, 0x10, 0x7fff_0000)),
        Err("in no stack of the kernel"),
    );
}

#[test]
fn entry_code_may_be_on_the_users_stack() {
    let at = |rip: u64, sp: u64| {
        move |guest: &mut TinyGuest| {
            guest.push(2, &[INSIDE, 0, 0]);
            guest.run(0, 2);
            guest.enter(0, rip, sp);
        }
    };
    check(at(ENTRY, 0x7fff_1230), Ok(()));
    check(
        at(ELSEWHERE, 0x7fff_1230),
        Err("where vCPU 0 is cannot be told"),
    );
    check(
        at(ENTRY, 0xffff_f123_4567_0000),
        Err("where vCPU 0 is cannot be told"),
    );
    check(at(ENTRY, ENTRY_AREA + 4096 + 0x1ff0), Ok(()));
}

#[test]
fn both_sides_of_a_task_switch_are_looked_at() {
    // The stack pointer is the next task's already, the current task still the one before.
    let switch = |old: u64, new: u64| {
        move |guest: &mut TinyGuest| {
            let next = guest.task(8, "next", &[0, new]);
            let sp = guest.push(2, &[old]);
            guest.put(guest.tasks[2] + task::SP, sp);
            guest.run(0, 2);
            let sp = guest.get(guest.tasks[next] + task::SP);
            guest.enter(0, ELSEWHERE, sp);
        }
    };
    check(switch(0, 0), Ok(()));
    check(switch(INSIDE, 0), Err("task 7"));
    check(switch(0, INSIDE), Err("task 8"));
    // A stack pointer in a sleeping task's stack may also be a user's invention: nothing of that task is left out.
    check(
        |guest| {
            let other = guest.task(8, "other", &[INSIDE, 0]);
            let sp = guest.get(guest.tasks[other] + task::SP) + 8;
            guest.enter(0, ENTRY, sp);
        },
        Err("task 8"),
    );
}

#[test]
fn stacks_without_a_task_are_looked_at_whole() {
    check(
        |guest| {
            let stack = guest.stack(true);
            guest.put(stack + STACK / 2, INSIDE);
        },
        Err("a stack of no known task"),
    );
    // Not those that are kept for reuse, wait to be freed, are not mapped (yet), or are no stacks.
    check(
        |guest| {
            let stack = guest.stack(true);
            guest.put(stack + STACK / 2, INSIDE);
            guest.put(guest.percpu(1, "cached_stacks"), guest.last_vm());
        },
        Ok(()),
    );
    check(
        |guest| {
            let stack = guest.stack(true);
            guest.put(stack + STACK / 2, INSIDE);
            guest.put(stack + 8, guest.at("thread_stack_free_rcu"));
            guest.put(stack + 16, guest.last_vm());
        },
        Ok(()),
    );
    check(
        |guest| {
            let stack = guest.stack(true);
            guest.put(stack + STACK / 2, INSIDE);
            guest.unmap(stack);
        },
        Ok(()),
    );
    check(
        |guest| {
            let stack = guest.stack(false);
            guest.put(stack + STACK / 2, INSIDE);
        },
        Ok(()),
    );
}

#[test]
fn a_stack_that_is_no_area_is_refused() {
    check(
        |guest| {
            let elsewhere = guest.object(STACK);
            guest.put(guest.tasks[2] + task::STACK, elsewhere);
            guest.put(guest.tasks[2] + task::SP, elsewhere + STACK - 176);
        },
        Err("task's stack, which is no mapped area"),
    );
}

#[test]
fn return_addresses_that_tracers_took_are_found() {
    let traced = |last_old: u64, last_new: u64, at: u64| {
        move |guest: &mut TinyGuest| {
            let entries = guest.object(256);
            let last = if guest.form == Form::New {
                last_new
            } else {
                last_old
            };
            guest.put(guest.tasks[2] + task::RET_STACK, entries);
            guest.put(guest.tasks[2] + task::CURR_RET_STACK, last);
            guest.put(entries + at, INSIDE);
        }
    };
    check(traced(1, 5, 32), Err("task 7"));
    check(traced(0, 4, 32), Ok(()));
    check(traced(0xffff_ffff, 0, 0), Ok(()));
    check(
        traced(0x7fff_ffff, 0x7fff_ffff, 0),
        Err("stack of traced returns is unsound"),
    );
    check(
        |guest| {
            let (first, second) = (guest.object(40), guest.object(40));
            guest.put(guest.tasks[2] + task::RETHOOKS, first + 16);
            guest.put(first + 16, second + 16);
            guest.put(second + 32, INSIDE);
        },
        Err("task 7"),
    );
    check(
        |guest| {
            let first = guest.object(40);
            guest.put(guest.tasks[2] + task::RETHOOKS, first + 16);
            guest.put(first + 16, first + 16);
        },
        Err("list of return probes is unsound"),
    );
}

#[test]
fn lists_that_do_not_end_are_errors() {
    let mut guest = TinyGuest::new(Form::New, 5);
    for pid in 10..40 {
        guest.task(pid, "many", &[]);
    }
    let kernel = guest.kernel();
    assert_eq!(Tasks::read(&kernel, &guest).unwrap().tasks.len(), 32);
    let (at, back) = (guest.tasks[31] + task::TASKS, guest.tasks[9] + task::TASKS);
    guest.put(at, back);
    let got = Tasks::read(&kernel, &guest).unwrap_err().to_string();
    assert!(got.contains("list of processes is unsound"), "{got}");
}

#[test]
fn a_hit_says_whose_and_where() {
    let mut guest = TinyGuest::new(Form::New, 4);
    guest.task(7, "sleeper", &[0, INSIDE]);
    let sp = guest.get(guest.tasks[2] + task::SP);
    match scan(&mut guest) {
        Err(ScanError::Hit(hit)) => {
            assert_eq!(
                hit.who,
                Who::Task {
                    pid: 7,
                    name: "sleeper".to_owned()
                }
            );
            assert_eq!((hit.at, hit.value), (Some(Gva(sp + 8)), Gva(INSIDE)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn more_running_tasks_than_vcpus_cannot_be() {
    check(
        |guest| {
            guest.vcpus.truncate(1);
        },
        Err("more tasks run than vCPUs"),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the kernel's heap holds, looking ends and nothing panics.
    #[test]
    fn hostile_memory_never_panics(changes in proptest::collection::vec((0..0x800_u64, 0..3_u8, any::<u64>()), 1..40)) {
        let mut guest = TinyGuest::new(Form::New, 4);
        guest.task(7, "sleeper", &[ELSEWHERE, 1, 2]);
        guest.task(8, "other", &[ELSEWHERE]);
        let kernel = guest.kernel();
        for (slot, kind, value) in changes {
            let value = match kind {
                0 => value,
                1 => DIRECT + 0x20_0000 + value % 0x2000,
                _ => guest.get(DIRECT + 0x20_0000 + value % 0x800 / 8 * 8),
            };
            guest.put(DIRECT + 0x20_0000 + slot * 8 % 0x1000, value);
        }
        let _ = stack_words(&kernel, &guest, &guest.vcpus, &forbidden());
    }
}
