//! Handlers, run: each call's choice is what asking the rules directly gives, and nothing else changes.

use std::collections::BTreeMap;

use super::world::{
    ANY, ASKS, CELLS, CODE, COUNTERS, CPUS, Call, EDITION, HANDLER, LOW, OBJECTS, PID, PREDICATE,
    TASK, World, argument, asks, choices, cpu, per_cpu, task,
};
use super::{Choice, HandlerError, Region, Spec, Thunk, assemble};
use crate::addr::Gva;
use crate::edition::link::Returns;
use crate::rule::Order;
use crate::rule::resolve::{Check, Resolved, Span, Value};

fn is(value: Value, with: u64) -> Resolved {
    let order = Order::Equal;
    Resolved::Check(Check::Order { value, order, with })
}

fn within(value: Value, low: u64, high: u64) -> Resolved {
    let spans = vec![Span::Range(low, high)];
    Resolved::Check(Check::In { value, spans })
}

fn in_set(value: Value, set: &str) -> Resolved {
    let set = set.to_owned();
    Resolved::Check(Check::InSet { value, set })
}

/// Most instructions before the last jump, over calls that match each rule and none.
fn longest(rules: &[Resolved]) -> usize {
    let mut world = World::new(choices(rules, EDITION, false), None, Returns::Plain);
    let calls = [
        Call::default(),
        Call {
            pid: 7,
            ..Call::default()
        },
        Call {
            cpu: 3,
            ..Call::default()
        },
        Call {
            arguments: [9, 5, 0, 0, 0, 0],
            ..Call::default()
        },
        Call {
            arguments: [1, 99, 0, 0, 0, 0],
            ..Call::default()
        },
        Call {
            arguments: [0x777, 99, 0, 0, 0, 0],
            ..Call::default()
        },
    ];
    let steps = calls.iter().map(|call| {
        let want = world.want(call);
        let (got, steps) = world.call(call);
        assert_eq!(got, want);
        steps
    });
    steps.max().unwrap()
}

#[test]
fn common_rules_cost_few_instructions() {
    let pid = is(task(&[PID], 4, true), 7);
    let four = [
        pid.clone(),
        is(cpu(), 3),
        within(argument(1, &[], 4, false), 5, 9),
        in_set(argument(0, &[], 4, false), LOW),
    ];
    let whole = [in_set(argument(0, &[], 8, false), ANY)];
    for (what, rules, most) in [
        ("none", &[][..], 0),
        ("pid", &four[..1], 4),
        ("cpu", &four[1..2], 3),
        ("argument", &[is(argument(1, &[], 4, false), 5)], 2),
        ("argument in a range", &four[2..3], 3),
        ("set", &four[3..], 10),
        ("address in a set", &whole, 9),
        ("task in a set", &[in_set(task(&[], 8, false), ANY)], 10),
        ("four", &four, 20),
    ] {
        let steps = longest(rules);
        assert!(steps <= most, "{what}: {steps}");
    }
    let mut world = World::new(
        choices(&[Resolved::All(four.to_vec())], EDITION, false),
        None,
        Returns::Plain,
    );
    let call = Call {
        pid: 7,
        cpu: 3,
        // What is above an `int` is anything.
        arguments: [0x5555_0000_0001, 0x5555_0000_0005, 0, 0, 0, 0],
        ..Call::default()
    };
    assert_eq!(world.call(&call), (Gva(EDITION), 13));
}

/// Keys are told from others of which the lower halves are theirs.
#[test]
fn a_set_is_asked_for_as_many_bits_as_there_are() {
    for (size, set, argument_is, is_in) in [
        (4, LOW, 1, true),
        (4, LOW, OBJECTS[0] << 32 | 1, true),
        (4, LOW, 3, false),
        (4, LOW, 0, false),
        (4, ANY, OBJECTS[0] << 32 | 1, true),
        (4, ANY, OBJECTS[0], false),
        (4, ANY, TASK, false),
        (8, ANY, OBJECTS[0], true),
        (8, ANY, OBJECTS[0] & 0xffff_ffff, false),
        (8, LOW, OBJECTS[0] << 32 | 1, false),
    ] {
        let rule = in_set(argument(0, &[], size, false), set);
        let mut world = World::new(choices(&[rule], EDITION, false), None, Returns::Plain);
        let call = Call {
            arguments: [argument_is, 0, 0, 0, 0, 0],
            ..Call::default()
        };
        let came = world.call(&call).0 == Gva(EDITION);
        assert_eq!(came, is_in, "{argument_is:#x} of {size} bytes in {set}");
        let halves = &world.handler.halves;
        assert_eq!(halves.contains(LOW), size == 4 && set == LOW);
        assert!(!halves.contains(ANY));
    }
}

#[test]
fn bound_tasks_go_by_their_own_choices() {
    let old = choices(&[is(cpu(), 1)], EDITION + 0x1000, true);
    let new = choices(&[is(cpu(), 1)], EDITION, true);
    let mut world = World::new(new, Some(old), Returns::Plain);
    let call = Call::default();
    assert_eq!(world.call(&call).0, Gva(EDITION + 0x1000));
    let set = world.sets.get_mut(ANY).unwrap();
    let store = set.remove(TASK).unwrap();
    world.run.store(store.at.0, 8, store.value);
    assert_eq!(world.call(&call).0, Gva(EDITION));
    let other = Call { cpu: 0, ..call };
    assert_eq!(world.call(&other).0, Gva(EDITION + 16));
}

#[test]
fn calls_are_counted_where_they_run_and_nowhere_else() {
    let mut world = World::new(
        choices(&[is(cpu(), 1)], EDITION, true),
        None,
        Returns::Plain,
    );
    for cpu in [1, 1, 1, 0, 2, 3, 4, u32::MAX, 0x400_0001] {
        world.call(&Call {
            cpu,
            ..Call::default()
        });
    }
    let cells =
        |base: u64| [0, 1, 2, 3, 4, 5].map(|cpu| world.run.load(base + cpu * 64, 8).unwrap());
    assert_eq!(cells(COUNTERS), [0, 3, 0, 0, 0, 0]);
    assert_eq!(cells(COUNTERS + 0x1000), [1, 0, 1, 1, 0, 0]);
}

#[test]
fn shares_firsts_and_rates_are_exact() {
    let half = Resolved::Check(Check::Share {
        last: u64::MAX / 10,
    });
    let first = Resolved::Check(Check::First { limit: 3 });
    let rate = Resolved::Check(Check::Rate { calls: 5 });
    for (rule, calls, want) in [
        (half, 1000, 99..=101),
        (first, 50, 3..=3),
        (rate, 50, 5..=5),
    ] {
        let mut world = World::new(choices(&[rule], EDITION, false), None, Returns::Plain);
        let hits = (0..calls).filter(|_| world.call(&Call::default()).0 == Gva(EDITION));
        let hits = hits.count();
        assert!(want.contains(&hits), "{hits}");
    }
}

#[test]
fn what_cannot_be_reached_or_found_is_an_error() {
    let region = Region::new(Gva(CODE), Returns::Plain).unwrap();
    let check = |choices: &[Choice], at: u64, want: &str| {
        let spec = Spec {
            region: &region,
            per_cpu: per_cpu(),
            cpus: CPUS,
            bound: None,
            choices,
            sets: &BTreeMap::new(),
            cells: Gva(CELLS),
        };
        let error = assemble(&spec, Gva(at)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    let rules = |rule| choices(&[rule], EDITION, false);
    let default = choices(&[], EDITION, false);
    check(&[], HANDLER, "no edition to choose");
    check(&rules(is(cpu(), 1))[..1], HANDLER, "has a rule");
    check(
        &[default.clone(), default.clone()].concat(),
        HANDLER,
        "never made",
    );
    check(&default, 0x1000, "out of a handler's reach");
    check(
        &choices(&[], 0x1000, false),
        HANDLER,
        "an edition at 0x1000",
    );
    check(&rules(in_set(cpu(), ANY)), HANDLER, "no set is called any");
    check(&rules(asks(0x1000)), HANDLER, "what asks a predicate");
    let thunk = |predicate: u64, at: u64| {
        let thunk = Thunk::new("asks", Gva(predicate), Gva(at), Returns::Plain);
        thunk.unwrap_err().to_string()
    };
    assert!(thunk(0x1000, ASKS).contains("a predicate at 0x1000"));
    assert!(thunk(PREDICATE, 0x1000).contains("what asks a predicate at 0x1000"));
    let far = Region::new(Gva(CODE), Returns::Thunk(Gva(8)));
    assert!(matches!(far, Err(HandlerError::OutOfReach { .. })));
}
