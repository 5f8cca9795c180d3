//! Stacks through what a made-up guest added to its kernel: tracers, probes, modules, and code of ours.

use super::tests::{MODULES, REGISTERS, after, check, check_in, sleeps, start, task7, text};
use super::vcpu_tests::runs;
use super::{OtherCode, Who};
use crate::addr::Gva;
use crate::kernel::locate::Kernel;
use crate::kernel::orc::OrcTable;
use crate::kernel::testing::guest::TinyGuest;
use crate::kernel::testing::orc::{GRAPH, PROBE, Rule, TRACER, entry, function as f, module};
use crate::kernel::testing::{FORMS, Form, task};

/// The function graph tracer keeps `ret` of the word at `slot` for task 2, among words of others.
fn graph(guest: &mut TinyGuest, slot: u64, ret: u64) {
    let entries = guest.object(256);
    guest.put(guest.tasks[2] + task::RET_STACK, entries);
    let new = guest.form == Form::New;
    // Two entries: the second begins after a word of another tracer where several share the stack.
    let second = if new { 40 } else { 32 };
    guest.put(
        guest.tasks[2] + task::CURR_RET_STACK,
        if new { 9 } else { 1 },
    );
    for (at, ret, slot) in [(0, 1, slot + 8), (second, ret, slot)] {
        guest.put(entries + at, ret);
        guest.put(entries + at + 24, slot);
    }
}

/// Return probes keep `ret` of the word at `slot` for task 2: two of one function.
fn probed(guest: &mut TinyGuest, slot: u64, ret: u64) {
    let [first, second, third] = [(); 3].map(|()| guest.object(48));
    guest.put(guest.tasks[2] + task::RETHOOKS, first + 16);
    for (node, next, ret, slot) in [
        (first, second + 16, 1, slot - 8),
        (second, third + 16, text(PROBE), slot),
        (third, 0, ret, slot),
    ] {
        guest.put(node + 16, next);
        guest.put(node + 32, ret);
        guest.put(node + 40, slot);
    }
}

#[test]
fn return_addresses_that_tracers_took_are_given_back() {
    type Keep = fn(&mut TinyGuest, u64, u64);
    let taken = |handler: u64, keep: Keep, ret: u64, off: u64| {
        move |guest: &mut TinyGuest| {
            sleeps(guest, 2, after(f::PLAIN), &[text(handler), after(f::FIRST)]);
            let slot = guest.stack_top(2) - REGISTERS - 16;
            keep(guest, slot + off, ret);
        }
    };
    let whole = "filler_000+0x8 filler_013+0x8 filler_007+0x8 | First";
    for (handler, keep, who) in [
        (GRAPH, graph as Keep, "the function graph tracer"),
        (PROBE, probed, "a return probe"),
    ] {
        check(&task7(), taken(handler, keep, after(f::OTHERS), 0), whole);
        check(&task7(), taken(handler, keep, after(f::OTHERS), 64), who);
        check(&task7(), taken(handler, |_, _, _| {}, 0, 0), who);
        check(
            &task7(),
            taken(handler, keep, start(f::OTHERS), 0),
            "is no return address",
        );
    }
    // One over the other.
    check(
        &task7(),
        |guest| {
            taken(GRAPH, graph, text(PROBE), 0)(guest);
            let slot = guest.stack_top(2) - REGISTERS - 16;
            probed(guest, slot, after(f::OTHERS));
        },
        whole,
    );
    check(
        &task7(),
        taken(GRAPH, graph, text(GRAPH), 0),
        "the function graph tracer replaced",
    );
    // A vCPU that has just returned to one of them.
    check(
        &Who::Vcpu(0),
        |guest| {
            let sp = runs(guest, text(PROBE), &[0, after(f::FIRST)]) + 8;
            guest.enter(0, text(PROBE), sp);
            probed(guest, sp - 8, after(f::OTHERS));
        },
        "filler_013+0x8 filler_007+0x8 | First",
    );
    // In the tracer's own code its table says that the stack ends, however near its end that is.
    let returning = |kept: u64| {
        move |guest: &mut TinyGuest| {
            let sp = runs(guest, text(GRAPH) + 4, &[0, 0, after(f::FIRST)]);
            graph(guest, sp + kept, after(f::OTHERS));
        }
    };
    let vcpu = Who::Vcpu(0);
    let followed = "return_to_handler+0x4 filler_013+0x8 filler_007+0x8 | First";
    check(&vcpu, returning(8), followed);
    let lost = "the function graph tracer replaced the return address";
    check(&vcpu, returning(16), lost);
    // Traced functions that jump to each other return through one place; so they do with a probe of either between them.
    for (first, second) in [
        (after(f::OTHERS), text(GRAPH)),
        (text(GRAPH), after(f::OTHERS)),
        (after(f::OTHERS), text(PROBE)),
    ] {
        check(
            &task7(),
            |guest| {
                taken(GRAPH, graph, second, 0)(guest);
                let entries = guest.get(guest.tasks[2] + task::RET_STACK);
                let slot = guest.stack_top(2) - REGISTERS - 16;
                guest.put(entries, first);
                guest.put(entries + 24, slot);
                probed(guest, slot, text(GRAPH));
            },
            whole,
        );
    }
    // Two answers are none.
    check(
        &task7(),
        |guest| {
            taken(GRAPH, graph, after(f::OTHERS), 0)(guest);
            let entries = guest.get(guest.tasks[2] + task::RET_STACK);
            let slot = guest.stack_top(2) - REGISTERS - 16;
            guest.put(entries + 24, slot);
        },
        "stack of traced returns is unsound",
    );
}

/// Gives the guest a page of trampolines, with a call before `MODULES + 0x10`.
fn trampolines(guest: &mut TinyGuest) {
    let page = guest.page();
    guest.map(MODULES, page, 1);
    guest.put(MODULES + 8, 0xe8 << 24);
    let end = guest.at("ftrace_list_end");
    guest.put(guest.at("ftrace_ops_list"), end);
}

#[test]
fn copies_of_the_kernels_code_are_followed_like_it() {
    let tracer = |flags: u64, size: u64| {
        move |guest: &mut TinyGuest| {
            trampolines(guest);
            let words = [MODULES + 0x10, 1, 2, after(f::FIRST), 4, after(f::FIRST)];
            sleeps(guest, 2, after(f::PLAIN), &words);
            let ops = guest.object(64);
            let end = guest.at("ftrace_list_end");
            for (at, value) in [(0, end), (24, flags), (8, MODULES), (16, size)] {
                guest.put(ops + at, value);
            }
            guest.put(guest.at("ftrace_ops_list"), ops);
        }
    };
    let want = "filler_007+0x8 | First";
    assert_eq!(TRACER % 16, 0);
    check(&task7(), tracer(0, 0x40), want);
    let unknown = "in the area of modules, BPF programs and trampolines";
    check(&task7(), tracer(0, 0xf), unknown);
    // Saving all registers it leaves a larger frame.
    check(
        &task7(),
        |guest| {
            tracer(4, 0x40)(guest);
            let first = guest.stack_top(2) - REGISTERS - 8 * 6;
            guest.put(first + 24, 3);
            guest.put(first + 32, after(f::FIRST));
        },
        want,
    );
    let probe = |rip: u64| {
        move |guest: &mut TinyGuest| {
            trampolines(guest);
            let probe = guest.object(80);
            guest.put(guest.at("kprobe_table") + 8 * 3, probe);
            for (at, value) in [(40, text(0x305)), (56, MODULES + 0x20), (68, 1)] {
                guest.put(probe + at, value);
            }
            runs(guest, rip, &[0, after(f::FIRST)]);
        }
    };
    // Behind the copy of the instruction that pushes the frame pointer, one word more is on the stack.
    check(
        &Who::Vcpu(0),
        probe(MODULES + 0x21),
        "filler_007+0x8 | First",
    );
    check(&Who::Vcpu(0), probe(MODULES + 0x20), "is no return address");
    check(&Who::Vcpu(0), probe(MODULES + 0x22), unknown);
}

#[test]
fn other_code_is_followed_by_its_own_table() {
    let prepare = |guest: &mut TinyGuest| {
        trampolines(guest);
        let words = [MODULES + 0x10, 1, 2, after(f::FIRST)];
        sleeps(guest, 2, after(f::PLAIN), &words);
    };
    let code = |table: Option<OrcTable>| {
        vec![OtherCode {
            name: "the arena".to_owned(),
            range: Gva(MODULES)..Gva(MODULES + 0x100),
            table,
        }]
    };
    let described = |kernel: &Kernel| {
        let like = kernel.image().orc().unwrap();
        let at = MODULES + 0x1000;
        let (ips, entries) = (
            (-0x1000_i32).to_le_bytes(),
            entry(Form::New, Rule::Call((5, 24), (0, 0))),
        );
        let range = MODULES..MODULES + 0x100;
        code(Some(
            OrcTable::like(like, at, ips.to_vec(), entries.to_vec(), &range).unwrap(),
        ))
    };
    let want = "filler_000+0x8 0xffffffffc0a00010 filler_007+0x8 | First";
    check_in(&[Form::New], &task7(), prepare, described, want);
    check_in(
        &FORMS,
        &task7(),
        prepare,
        |_| code(None),
        "which is in the arena",
    );
}

#[test]
fn modules_are_followed_by_their_own_tables() {
    let loaded = |count: u64, ip: u64| {
        move |guest: &mut TinyGuest| {
            trampolines(guest);
            let words = [ip, 1, 2, after(f::FIRST)];
            sleeps(guest, 2, after(f::PLAIN), &words);
            let [other, module, table] = [0x200, 0x200, 64].map(|len| guest.object(len));
            guest.list(
                guest.at("modules"),
                &[other + module::LIST, module + module::LIST],
            );
            // The table's slots are out of reach of the module's code, so that it has them at its end, as modules do.
            let ips = MODULES + 0x800;
            let distance = |at: u64, slot: u64| (at.wrapping_sub(ips + 4 * slot)) & 0xffff_ffff;
            let (first, second) = (distance(MODULES, 0), distance(MODULES + 0xf, 1));
            guest.put(ips, first | second << 32);
            guest.put(ips + 8, distance(MODULES + 0x20, 2));
            let rules = [Rule::Undefined, Rule::Call((5, 24), (0, 0)), Rule::End];
            for (index, rule) in (0..).zip(rules) {
                let bytes = entry(guest.form, rule);
                for (half, at) in [(0, 0), (2, 2), (4, 4)] {
                    let word = u64::from(u16::from_le_bytes([bytes[half], bytes[half + 1]]));
                    let at = table + 6 * index + at;
                    guest.put(at, word);
                }
            }
            for (at, value) in [
                (module::size(guest.form), 0x30),
                (module::BASE, MODULES),
                (module::COUNT, count),
                (module::IPS, ips),
                (module::ENTRIES, table),
            ] {
                guest.put(module + at, value);
            }
        }
    };
    let check = |count: u64, ip: u64, want: &str| check(&task7(), loaded(count, ip), want);
    let whole = "filler_000+0x8 0xffffffffc0a00010 filler_007+0x8 | First";
    check(3, MODULES + 0x10, whole);
    check(2, MODULES + 0x10, whole);
    check(3, MODULES + 0x40, "in the area of modules, BPF programs");
    check(0, MODULES + 0x10, "in the area of modules, BPF programs");
    check(1 << 23, MODULES + 0x10, "module's unwind table is unsound");
    // Code of a module, but no call.
    check(3, MODULES + 0x14, "is no return address");
}
