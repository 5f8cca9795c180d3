//! What is read as which rule, what is none, and that each rule prints as what reads as itself.

use proptest::prelude::*;

use super::{MAX_DEPTH, MAX_TESTS, MAX_TEXT};
use crate::rule::{
    Argument, Comparison, During, Instant, Literal, Operand, Order, Path, Rule, Span, Step, Test,
};

/// `text` is a rule that prints as `canonical`, which is read as the same one.
fn check(text: &str, canonical: &str) {
    let rule = Rule::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(rule.to_string(), canonical);
    assert_eq!(Rule::parse(canonical), Ok(rule), "{canonical}");
}

#[test]
fn rules_are_read_whatever_their_spaces() {
    for (text, canonical) in [
        ("pid=7", "pid = 7"),
        (" tgid\n!= 0x10 ", "tgid != 16"),
        ("cpu in 0 .. 3", "cpu in 0..3"),
        ("uid in{1,2,5..9}", "uid in {1, 2, 5..9}"),
        ("uid in {5..9}", "uid in 5..9"),
        ("pid in {5}", "pid in {5}"),
        ("arg1 >= -1 and arg2<=3", "arg1 >= -1 and arg2 <= 3"),
        ("cmd == 0x8905", "cmd = 35077"),
        (
            "sock -> type in {SOCK_DGRAM, 6}",
            "sock->type in {SOCK_DGRAM, 6}",
        ),
        ("arg2.x[3].y->z > 1", "arg2.x[3].y->z > 1"),
        ("task->pid = 3", "task->pid = 3"),
        ("not.a = 1", "not.a = 1"),
        ("not not kthread", "not not kthread"),
        ("comm = \"nginx\"", "comm = \"nginx\""),
        ("comm != \"ngin*\"", "not comm = \"ngin*\""),
        ("css_set in set web", "cgroup in set web"),
        (
            "task in set old or sock in set s",
            "task in set old or sock in set s",
        ),
        ("x in set..y", "x in set..y"),
        ("share 10%", "share 1/10"),
        ("share 2.5 %", "share 1/40"),
        ("share 100%", "share 1/1"),
        ("share 2/100 or first 5", "share 1/50 or first 5"),
        ("rate 5/s", "rate 5/s"),
        ("during night", "during night"),
        ("for 2m or for 1500ms", "for 120s or for 1500ms"),
        ("until 2026-01-01T00:00:00Z", "until 2026-01-01T00:00:00Z"),
        ("after 2026-01-01T00:00:00Z", "after 2026-01-01T00:00:00Z"),
        ("predicate big_write", "predicate big_write"),
        (
            "pid=1 or pid=2 and (cpu=1 or not(kthread and cpu=0))",
            "pid = 1 or pid = 2 and (cpu = 1 or not (kthread and cpu = 0))",
        ),
        ("((pid = 1))", "pid = 1"),
        ("android = 1", "android = 1"),
        ("x = 18446744073709551615", "x = 18446744073709551615"),
        ("x = -9223372036854775808", "x = -9223372036854775808"),
    ] {
        check(text, canonical);
    }
}

#[test]
fn what_is_no_rule_is_told_where() {
    for (text, column, want) in [
        ("", 1, "the end where a test"),
        ("pid", 4, "the end where `=`"),
        ("pid = ", 7, "a number or the name of an enumerator"),
        ("pid = 1 cpu = 2", 9, "`cpu` where `and`, `or` or the end"),
        ("(pid = 1", 9, "the end where `and`, `or` or `)`"),
        ("pid in 1", 9, "`..` and the last value"),
        ("pid in 5..1", 11, "ends no lower than it begins"),
        ("pid in {1 2}", 11, "`,` or `}`"),
        ("and", 1, "`and` where a test"),
        ("arg0 = 1", 1, "the first argument is `arg1`"),
        ("x = 18446744073709551616", 5, "64 bits"),
        ("x = -9223372036854775809", 5, "64 bits"),
        ("comm = nginx", 8, "a name in quotes"),
        ("comm = \"nginx", 14, "`\"` behind the name"),
        ("comm = \"\"", 9, "1 to 15 bytes"),
        ("comm = \"a name of sixtee\"", 9, "1 to 15 bytes"),
        ("comm < \"a\"", 6, "a name in quotes"),
        ("task = 3", 6, "`in set`"),
        ("share 0%", 7, "more than nothing"),
        ("share 101%", 7, "at most all"),
        ("share 1/0", 7, "at most all"),
        ("share 0.1234567%", 7, "9 digits"),
        ("first 0", 7, "from 1"),
        ("rate 5/m", 8, "by the second"),
        ("for 0s", 5, "from 1ms"),
        ("for 99999999999h", 5, "from 1ms"),
        ("for 5", 6, "`ms`, `s`"),
        ("until 2026-02-30T00:00:00Z", 7, "from 1970 on"),
        ("x.1 = 2", 3, "the name of a member"),
        ("x[3 = 2", 5, "`]`"),
        ("x = 1 ü", 7, "`ü`"),
    ] {
        let error = Rule::parse(text).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("column {column}:")),
            "{text}: {error}"
        );
        assert!(error.contains(want), "{text}: {error}");
    }
}

#[test]
fn length_depth_and_number_are_limited() {
    let nested = |depth| format!("{}kthread{}", "(".repeat(depth), ")".repeat(depth));
    let many = |count: usize| vec!["kthread"; count].join(" or ");
    let listed = |count: usize| format!("pid in {{{}}}", vec!["1"; count].join(","));
    for (fits, more, want) in [
        (nested(MAX_DEPTH), nested(MAX_DEPTH + 1), "parentheses"),
        (many(MAX_TESTS), many(MAX_TESTS + 1), "tests and values"),
        (listed(MAX_TESTS), listed(MAX_TESTS + 1), "tests and values"),
        (
            format!("{:MAX_TEXT$}", "kthread"),
            format!("{:1$}", "kthread", MAX_TEXT + 1),
            "bytes long",
        ),
        (
            "x.a.a.a.a.a.a.a.a = 1".to_owned(),
            "x.a.a.a.a.a.a.a.a.a = 1".to_owned(),
            "8 steps",
        ),
    ] {
        assert!(Rule::parse(&fits).is_ok(), "{fits}");
        let error = Rule::parse(&more).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z_][a-zA-Z0-9_]{0,6}".prop_map(|name| format!("n{name}"))
}

fn literal() -> impl Strategy<Value = Literal> {
    prop_oneof![
        any::<i64>().prop_map(|number| Literal::Number(number.into())),
        any::<u64>().prop_map(|number| Literal::Number(number.into())),
        name().prop_map(Literal::Name),
    ]
}

fn operand() -> impl Strategy<Value = Operand> {
    let step = prop_oneof![
        (name(), any::<bool>()).prop_map(|(name, arrow)| Step::Member { name, arrow }),
        (0_u32..1 << 31).prop_map(Step::Index),
    ];
    let argument = prop_oneof![
        (1_u8..).prop_map(Argument::Number),
        name().prop_map(Argument::Name),
    ];
    prop_oneof![
        Just(Operand::Pid),
        Just(Operand::Tgid),
        Just(Operand::Uid),
        Just(Operand::Cpu),
        (argument, prop::collection::vec(step, 0..8))
            .prop_map(|(argument, steps)| Operand::Argument(Path { argument, steps })),
    ]
}

fn test() -> impl Strategy<Value = Test> {
    let orders = [
        Order::Equal,
        Order::NotEqual,
        Order::Below,
        Order::AtMost,
        Order::Above,
        Order::AtLeast,
    ];
    let span = prop_oneof![
        literal().prop_map(Span::One),
        (any::<i32>(), any::<u32>()).prop_map(|(low, more)| {
            let low = i128::from(low);
            Span::Range(
                Literal::Number(low),
                Literal::Number(low + i128::from(more)),
            )
        }),
        (name(), name())
            .prop_map(|(low, high)| Span::Range(Literal::Name(low), Literal::Name(high))),
    ];
    let with = prop_oneof![
        (prop::sample::select(orders.to_vec()), literal())
            .prop_map(|(order, literal)| Comparison::Order(order, literal)),
        prop::collection::vec(span, 1..4).prop_map(Comparison::In),
    ];
    let set = prop_oneof![operand(), Just(Operand::Task), Just(Operand::Cgroup)];
    let instant = || (0_u64..253_402_300_800).prop_map(Instant);
    prop_oneof![
        4 => (operand(), with).prop_map(|(what, with)| Test::Compare { what, with }),
        1 => ("[a-z ()=ü]{1,7}", any::<bool>()).prop_map(|(name, prefix)| Test::Comm { name, prefix }),
        1 => Just(Test::Kthread),
        1 => (set, name()).prop_map(|(what, set)| Test::InSet { what, set }),
        1 => (1_u64..100).prop_map(|part| Test::Share { part, of: part + 1 }),
        1 => (1_u64..1 << 63).prop_map(Test::First),
        1 => (1_u64..1 << 63).prop_map(Test::Rate),
        1 => name().prop_map(|name| Test::During(During::Named(name))),
        1 => (1_u64..1 << 33).prop_map(|ms| Test::During(During::For(ms))),
        1 => instant().prop_map(|then| Test::During(During::Until(then))),
        1 => instant().prop_map(|then| Test::During(During::After(then))),
        1 => name().prop_map(Test::Predicate),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    test()
        .prop_map(Rule::Test)
        .prop_recursive(4, 12, 3, |inner| {
            let several = prop::collection::vec(inner.clone(), 2..4);
            prop_oneof![
                inner.prop_map(|rule| Rule::Not(Box::new(rule))),
                several.clone().prop_map(Rule::All),
                several.prop_map(Rule::Any),
            ]
        })
}

proptest! {
    #[test]
    fn a_rule_prints_as_what_reads_as_itself(rule in rule()) {
        let text = rule.to_string();
        if text.len() <= MAX_TEXT {
            prop_assert_eq!(Rule::parse(&text), Ok(rule), "{}", text);
        }
    }

    #[test]
    fn no_text_panics(text in "[ -~ü]{0,60}", words in prop::collection::vec("(pid|arg1|->|\\.|\\.\\.|in|set|not|and|=|<|1|\\{|\\}|,|\\(|\\)|\"|share|%|for|x|\\[|\\])", 0..12)) {
        for text in [text, words.join(" "), words.concat()] {
            if let Ok(rule) = Rule::parse(&text) {
                prop_assert_eq!(Rule::parse(&rule.to_string()), Ok(rule));
            }
        }
    }
}
