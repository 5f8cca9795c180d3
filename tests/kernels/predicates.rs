//! Is a call for the edition that a predicate of the package says? Judged by guest programs that tell which one answered.

use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::rules::{applied, apply, counted, sum, tally, use_for};
use crate::witness::{assert_clean, one_line};

/// The edition with predicates.
const ASKED: &str = "unix_ioctl_predicates";
/// What it answers where it is asked.
const NEW: &str = "ENOTTY";

/// A rule, what calls, and how many of these calls of each thread are for the edition.
const ASKS: &[(&str, &str, &[u64])] = &[
    ("predicate asks_for_mark", "probe tally 10 2", &[10, 10]),
    ("predicate asks_for_other", "probe tally 10 2", &[0, 0]),
    ("not predicate asks_for_other", "probe tally 10 1", &[10]),
    ("predicate of_packets", "probe tally 10 1", &[0]),
    ("predicate of_packets", "probe tally 10 1 5", &[10]),
    ("predicate on_odd_cpu", "probe tally 10 4", &[0, 10, 0, 10]),
    ("predicate finds_nothing", "probe tally 10 1", &[10]),
    ("predicate every_other", "probe tally 10 1", &[5]),
    (
        "cpu < 2 and predicate asks_for_mark and not predicate on_odd_cpu",
        "probe tally 10 4",
        &[10, 0, 0, 0],
    ),
    (
        "predicate of_packets or predicate on_odd_cpu and uid = 0",
        "probe tally 10 4",
        &[0, 10, 0, 10],
    ),
];

/// One predicate after the other of one update, and another update on top that has predicates of the same names.
fn asked(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let id = applied(&guest, stock, ASKED, &["--when", ASKS[0].0]);
    let mut wrong = Vec::new();
    for (rule, command, want) in ASKS {
        use_for(&guest, id, &["--when", rule]);
        let said = one_line(&mut guest, command);
        let tally = tally(&said);
        let new = tally.iter().map(|counts| counts.get(NEW).copied());
        let got: Vec<u64> = new.map(Option::unwrap_or_default).collect();
        if got != *want {
            wrong.push(format!(
                "`{rule}` of `{command}`: {got:?}, not {want:?}\n{said}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{stock:?}:\n{}", wrong.join("\n"));

    use_for(&guest, id, &["--when", "predicate every_other", "--count"]);
    let on_top = ["--when", "predicate every_other", "--count"];
    let top = applied(&guest, stock, ASKED, &on_top);
    let calls = tally(&one_line(&mut guest, "probe tally 400 1"));
    // Half of the calls are for the one on top, and of those that get beneath it half again.
    assert_eq!(sum(&calls, NEW), 300, "{stock:?}: {calls:?}");
    let got = counted(&guest, "unix_ioctl");
    assert_eq!(
        got,
        [(0, 100), (id, 100), (top, 200)].into(),
        "{stock:?}: {got:?}"
    );
    assert_clean(&mut guest);
}

#[test]
fn predicates_tell_calls_of_6_1_apart() {
    asked(LTS_6_1);
}

#[test]
fn predicates_tell_calls_of_6_12_apart() {
    asked(NEWEST_6_12);
}

/// The predicate changes while programs call, and the update goes: every call has an answer, and nothing is said in the guest's log.
fn changes(stock: Stock) {
    const RULES: [&str; 3] = [
        "predicate every_other",
        "predicate on_odd_cpu",
        "predicate finds_nothing and predicate every_other",
    ];
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let pid = one_line(&mut guest, "probe tally 0 4 >/tmp/said & echo $!");
    for _ in 0..4 {
        let id = applied(&guest, stock, ASKED, &["--when", RULES[0]]);
        for rule in [RULES, RULES].concat() {
            use_for(&guest, id, &["--when", rule]);
        }
        let id = id.to_string();
        let reverted = ["update", "revert", &id, "--deadline", "20s"];
        let reverted = guest.client.call(&reverted).expect("the revert");
        assert_eq!(reverted["state"], "reverted", "{reverted:#}");
    }
    let end =
        format!("kill -USR2 {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said");
    let tally = tally(&one_line(&mut guest, &end));
    let (new, all) = (sum(&tally, NEW), sum(&tally, ""));
    println!("{stock:?}: {new} of {all} calls for the edition, of {tally:?}");
    assert!(0 < new && new < all, "{tally:?}");
    assert_clean(&mut guest);
}

#[test]
fn a_predicate_changes_while_programs_of_6_1_call() {
    changes(LTS_6_1);
}

#[test]
fn a_predicate_changes_while_programs_of_6_12_call() {
    changes(NEWEST_6_12);
}

#[test]
fn a_predicate_that_could_come_to_a_redirected_function_is_refused() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock));
        for (name, predicate, names) in [
            ("refused_predicate_calls", "prints", "`_printk`"),
            ("refused_predicate_edition", "tries_it", "unix_ioctl"),
        ] {
            let package = stock.edition(name);
            let package = package.to_str().expect("UTF-8");
            let rule = format!("predicate {predicate}");
            let reply = apply(&guest, package, &["--when", &rule]);
            let said = reply.json.to_string();
            let right = reply.status != 0 && reply.json["code"] == "predicate_not_askable";
            assert!(right, "{stock:?}, {name}: {reply:?}");
            for word in [predicate, names, "EXOPATCH_PREDICATE"] {
                assert!(said.contains(word), "{stock:?}, {name}: {said}");
            }
        }
        let package = stock.edition(ASKED);
        let package = package.to_str().expect("UTF-8");
        let reply = apply(&guest, package, &["--when", "predicate nobody"]);
        let said = reply.json.to_string();
        assert_eq!(reply.json["code"], "rule_not_resolvable", "{reply:?}");
        // It says which there are.
        assert!(said.contains("nobody") && said.contains("on_odd_cpu"));
        let tally = tally(&one_line(&mut guest, "probe tally 5 1"));
        assert_eq!(sum(&tally, NEW), 0, "{tally:?}");
        assert_clean(&mut guest);
    }
}
