//! Does ordinary kernel code work in an edition as it does in the kernel? Code that the kernel chooses for its processor, tests of static
//! keys, static calls, per-CPU variables, messages.

use std::collections::HashSet;

use tests::guest::{Guest, Options};
use tests::stock;

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, one_line};

const EVENT: &str = "/sys/kernel/tracing/events/power/cpu_frequency/enable";
const TRACE: &str = "/sys/kernel/tracing/trace";
const STATISTICS: &str = "/proc/sys/kernel/sched_schedstats";

/// What the edition says behind `what`, each time that it does.
fn said<'a>(answer: &'a str, what: &str) -> Vec<&'a str> {
    let lines = answer.lines();
    lines
        .filter_map(|line| line.strip_prefix(what)?.strip_prefix(' '))
        .collect()
}

/// The edition's features are those that the guest's own `/proc/cpuinfo` has.
fn assert_features(guest: &mut Guest, answer: &str) {
    let flags = one_line(guest, "grep -m1 ^flags /proc/cpuinfo");
    let flags: HashSet<&str> = flags.split_whitespace().collect();
    let said = said(answer, "feature");
    assert!(said.len() >= 16, "{answer}");
    for feature in &said {
        let (name, has) = feature.split_once(' ').expect("a name and a number");
        assert_eq!(has == "1", flags.contains(name), "{feature} of {flags:?}");
    }
    let present = said.iter().filter(|feature| feature.ends_with(" 1"));
    assert!((1..said.len()).contains(&present.count()), "{answer}");
}

/// Events of the edition in the guest's trace.
fn traced(guest: &mut Guest) -> usize {
    let trace = one_line(guest, &format!("cat {TRACE}"));
    trace.matches("cpu_frequency: state=4711").count()
}

/// Lines of the guest's log that hold `what`.
fn logged(guest: &mut Guest, what: &str) -> usize {
    let log = one_line(guest, "dmesg");
    log.lines().filter(|line| line.contains(what)).count()
}

#[test]
fn ordinary_code_does_in_an_edition_what_it_does_in_the_kernel() {
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let before = one_line(&mut guest, "cat /proc/version");
        let id = apply(&guest, &stock.edition("ordinary_code"));
        let read = "echo $$; exec cat /proc/version";

        let answer = one_line(&mut guest, read);
        assert_eq!(answer.lines().last(), Some(&*before), "{stock:?}");
        assert_features(&mut guest, &answer);
        let shell = answer.lines().next().unwrap_or_default();
        assert_eq!(said(&answer, "task"), [format!("{shell} cat")], "{stock:?}");
        for (what, want) in [
            ("cpu", "1"),
            ("own", "1 0 1 0"),
            ("weight", "8"),
            ("interrupts", "off 1, then 0"),
            ("cleared", "1"),
            ("later", "1"),
        ] {
            assert_eq!(said(&answer, what), [want], "{stock:?}: {what}");
        }

        // Keys that the guest switches meanwhile, and calls that go elsewhere from then on.
        for on in ["0", "1", "0"] {
            let switch = format!("echo {on} >{STATISTICS}; echo {on} >{EVENT}; echo >{TRACE}");
            one_line(&mut guest, &switch);
            let answer = one_line(&mut guest, read);
            let want = [on; 4].join(" ");
            assert_eq!(said(&answer, "schedstats"), [want], "{stock:?}");
            let events = usize::from(on == "1");
            assert_eq!(traced(&mut guest), events, "{stock:?}: switched to {on}");
        }

        assert_eq!(logged(&mut guest, "exopatch test: debugging"), 0);
        assert_eq!(logged(&mut guest, "exopatch test: limited"), 4);
        assert_eq!(logged(&mut guest, "exopatch test: once"), 1);
        revert(&guest, id);
        assert_eq!(one_line(&mut guest, read).lines().count(), 2, "{stock:?}");
        assert_clean(&mut guest);
    }
}
