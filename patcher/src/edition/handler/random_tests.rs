//! Random rules and calls: a handler chooses as asking the rules directly does.

use proptest::prelude::*;

use super::Owner;
use super::world::{
    ANY, ASKS, COMM, CPUS, CREDS, Call, EDITION, FLAGS, LOW, OBJECTS, PID, TGID, THUNK, UID,
    VSYSCALL, World, argument, choices, cpu, number, task,
};
use crate::addr::Gva;
use crate::edition::link::Returns;
use crate::rule::resolve::{Check, Resolved, Span, Value};
use crate::rule::{During, Order};

/// Numbers that meet each other often, and those at the ends.
fn small() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0_u64..4,
        2 => Just(!0),
        1 => Just(u64::MAX - 1),
        1 => Just(0x8000_0000),
        1 => Just(0x7f),
        1 => Just(100),
    ]
}

/// Addresses that can be read and such that must not be tried.
fn anything() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => Just(OBJECTS[0]),
        4 => Just(OBJECTS[1]),
        1 => prop::sample::select(vec![
            0, 0x1000, VSYSCALL, VSYSCALL - 8, VSYSCALL - 7, u64::MAX - 15, u64::MAX - 7, 0xffff_8880_7777_0000, 1 << 62,
        ]),
        5 => small(),
    ]
}

fn a_value() -> impl Strategy<Value = Value> {
    let sizes = || prop::sample::select(vec![1_u8, 2, 4, 8]);
    let loads = prop::collection::vec(prop::sample::select(vec![0_u32, 8, 16, 24]), 0..4);
    let bits = prop::option::of((0_u8..8, 1_u8..=8));
    prop_oneof![
        Just(task(&[PID], 4, true)),
        Just(task(&[TGID], 4, true)),
        Just(task(&[CREDS, UID], 4, false)),
        Just(task(&[], 8, false)),
        Just(cpu()),
        (0_u8..6, any::<bool>()).prop_map(|(number, signed)| argument(number, &[], 4, signed)),
        (0_u8..6, loads, sizes(), any::<bool>(), bits).prop_map(
            |(number, loads, size, signed, bits)| {
                let mut value = argument(number, &loads, size, signed);
                let whole = size * 8;
                value.bits =
                    bits.filter(|(first, count)| !loads.is_empty() && first + count <= whole);
                value
            }
        ),
    ]
}

/// A constant that `value` can be.
fn possible(value: &Value, constant: u64) -> u64 {
    let bits = value.bits.map_or(value.size * 8, |(_, count)| count);
    let above = 64 - u32::from(bits);
    if value.signed {
        ((constant << above).cast_signed() >> above).cast_unsigned()
    } else {
        (constant << above) >> above
    }
}

fn a_check() -> impl Strategy<Value = Check> {
    let orders = vec![
        Order::Equal,
        Order::NotEqual,
        Order::Below,
        Order::AtMost,
        Order::Above,
        Order::AtLeast,
    ];
    let spans = prop::collection::vec((any::<bool>(), small(), small()), 1..4);
    let named = |name: &str| During::Named(name.to_owned());
    prop_oneof![
        4 => (a_value(), prop::sample::select(orders), small()).prop_map(|(value, order, with)| {
            let with = possible(&value, with);
            Check::Order { value, order, with }
        }),
        3 => (a_value(), spans).prop_map(|(value, spans)| {
            let span = |(one, a, b)| {
                let (a, b) = (possible(&value, a), possible(&value, b));
                let ordered = number(&value, a) <= number(&value, b);
                match (one, ordered) {
                    (true, _) => Span::One(a),
                    (false, true) => Span::Range(a, b),
                    (false, false) => Span::Range(b, a),
                }
            };
            let spans = spans.into_iter().map(span).collect();
            Check::In { value, spans }
        }),
        2 => (a_value(), prop::sample::select(vec![LOW, ANY])).prop_map(|(value, set)| {
            let set = set.to_owned();
            Check::InSet { value, set }
        }),
        1 => prop::sample::select(vec![&b"nginx\0"[..], b"ngin", b"a task called\0", b"a task c", b"sixteen bytes ok"])
            .prop_map(|bytes| Check::Comm { offset: COMM, bytes: bytes.to_vec() }),
        1 => Just(Check::Kthread { flags: FLAGS }),
        1 => any::<u64>().prop_map(|last| Check::Share { last }),
        1 => (1_u64..4).prop_map(|limit| Check::First { limit }),
        1 => (1_u64..4).prop_map(|calls| Check::Rate { calls }),
        1 => any::<bool>().prop_map(move |on| Check::During(if on { During::For(1) } else { named("x") })),
        1 => Just(Check::Predicate { name: "asks".to_owned(), at: Gva(ASKS) }),
    ]
}

fn a_rule() -> impl Strategy<Value = Resolved> {
    a_check()
        .prop_map(Resolved::Check)
        .prop_recursive(3, 12, 3, |inner| {
            let several = prop::collection::vec(inner.clone(), 2..4);
            prop_oneof![
                inner.prop_map(|rule| Resolved::Not(Box::new(rule))),
                several.clone().prop_map(Resolved::All),
                several.prop_map(Resolved::Any),
            ]
        })
}

fn a_call() -> impl Strategy<Value = Call> {
    let names = [
        *b"nginx\0left over\0",
        *b"ngin\0\0\0\0\0\0\0\0\0\0\0\0",
        *b"a task called\0\0\0",
    ];
    let task = (
        small(),
        small(),
        small(),
        0..CPUS,
        prop::sample::select(names.to_vec()),
    );
    let arguments = prop::array::uniform6(anything());
    let words = prop::array::uniform8(anything());
    let answer = prop::sample::select(vec![0, 1, 0x100, 1 << 32, 0x1_0000]);
    (task, any::<bool>(), arguments, words, answer).prop_map(
        |((pid, tgid, uid, cpu, comm), kthread, arguments, words, answer)| {
            let low = |number: u64| u32::try_from(number & 0xffff_ffff).unwrap();
            Call {
                pid: low(pid).cast_signed(),
                tgid: low(tgid).cast_signed(),
                uid: low(uid),
                cpu,
                comm,
                kthread,
                arguments,
                words,
                answer,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_handler_chooses_as_its_rules_say(
        rules in prop::collection::vec(a_rule(), 0..4),
        old in prop::option::of(prop::collection::vec(a_rule(), 0..2)),
        calls in prop::collection::vec(a_call(), 1..6),
        counted in any::<bool>(),
        thunk in any::<bool>(),
    ) {
        let returns = if thunk { Returns::Thunk(Gva(THUNK)) } else { Returns::Plain };
        let old = old.map(|old| choices(&old, EDITION + 0x1000, counted));
        let mut world = World::new(choices(&rules, EDITION, counted), old, returns);
        for call in &calls {
            let want = world.want(call);
            prop_assert_eq!(world.call(call).0, want, "{:?}", call);
        }
        for (index, cell) in world.handler.cells.iter().enumerate() {
            let Owner { bound, choice } = cell.of;
            prop_assert_eq!(world.run.load(cell.at.0, 8), Some(world.model[&(bound, choice, index)]));
        }
    }
}
