//! Do editions work wherever the kernel's functions run: in interrupts, softirqs and NMIs, with the scheduler's and other locks held, with
//! arguments on the stack, on memory of the user that is not there?
//!
//! Each edition calls the original and adds to a number that guest programs read (`tests/editions/witness.h`): calls in the context that it is for, and
//! others. It is led to by a jump and by a handler that asks a rule, while four processors are busy.

use std::collections::BTreeMap;

use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::revert;
use crate::rules::{applied, counted, use_for};
use crate::stacking::wait_gone;
use crate::witness::{assert_clean, one_line};

/// Where editions leave what they saw.
const WITNESS: &str = "/proc/sys/kernel/panic_print";
/// What a call adds that was not as expected.
const OTHER: u64 = 1 << 40;
/// A rule that no call follows: there is no such processor.
const NEVER: &str = "cpu = 77";
/// Keeps all processors in the kernel.
const CHURN: &str = "sh -c 'renice -n 19 $$; exec probe churn 4' >/dev/null 2>&1 &";

/// A function that runs in a context of its own.
struct Case {
    /// Its edition.
    edition: &'static str,
    function: &'static str,
    /// Calls that are for the edition; there are others.
    rule: &'static str,
    /// What has it be called. What it prints last is how many calls it made.
    load: &'static str,
    /// How many of those calls the rule is for; left open where other calls follow it too.
    chosen: Option<(u64, u64)>,
    /// Prints how often the guest has called the function; left open where it does not know.
    callers: Option<&'static str>,
}

/// Timer interrupts of all processors.
const TIMERS: &str =
    "awk '/LOC:/ { for (i = 2; i <= 5; i++) n += $i } END { print n }' /proc/interrupts";
/// Datagrams of UDP that have come.
const DATAGRAMS: &str = "awk '/^Udp:/ { n = $2 + $3 + $4 } END { print n }' /proc/net/snmp";

const CASES: [Case; 6] = [
    Case {
        edition: "in_interrupt",
        function: "hrtimer_interrupt",
        rule: "cpu in 1..2",
        load: "usleep 500000; echo 0",
        chosen: None,
        callers: Some(TIMERS),
    },
    Case {
        edition: "in_softirq",
        function: "udp_rcv",
        rule: "skb->len = 16 and cpu in 1..2",
        load: "probe datagrams 200 4",
        chosen: Some((1, 2)),
        callers: Some(DATAGRAMS),
    },
    Case {
        edition: "in_scheduler",
        function: "update_rq_clock",
        rule: "rq->cpu in 1..2",
        load: "usleep 500000; echo 0",
        chosen: None,
        callers: None,
    },
    Case {
        edition: "under_spinlock",
        function: "send_signal_locked",
        rule: "sig = 12 and cpu in 1..2",
        load: "probe signals 200 4",
        chosen: Some((1, 2)),
        callers: None,
    },
    Case {
        edition: "stack_argument",
        function: "do_futex",
        rule: "op = 133 and cpu in 1..2",
        load: "probe futexes 200 4",
        chosen: Some((1, 2)),
        callers: None,
    },
    Case {
        edition: "stack_arguments",
        function: "do_mmap",
        rule: "len = 262144",
        load: "usleep 500000; echo 0",
        chosen: None,
        callers: None,
    },
];

/// One processor asks the others, none of which is idle, what they do: an NMI has each of them print its registers.
const NMI: Case = Case {
    edition: "in_nmi",
    function: "show_regs",
    rule: "regs->cs in {0x10, 0x33} and cpu in 1..2",
    load: "for i in 1 2 3 4 5; do taskset 1 sh -c 'echo l >/proc/sysrq-trigger'; done; echo 15",
    chosen: Some((2, 3)),
    callers: None,
};
/// Keeps all processors from being idle.
const BUSY: &str = "sh -c 'renice -n 19 $$; exec probe busy 4' >/dev/null 2>&1 &";

/// The calls that editions saw: in the context that they are for, and others.
fn witnessed(guest: &mut Guest) -> (u64, u64) {
    let seen = one_line(guest, &format!("cat {WITNESS}"));
    let seen: u64 = seen.trim().parse().expect("a number");
    (seen % OTHER, seen / OTHER)
}

/// The number that a command prints last.
fn number(guest: &mut Guest, command: &str) -> u64 {
    let said = one_line(guest, command);
    let word = said.split_whitespace().last();
    word.and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no number at the end of {said:?}"))
}

/// What is called and counted between two moments is as many on either side; what is under way at one of them may be on one side alone.
fn assert_as_many(case: &Case, counted: [u64; 2], callers: [u64; 4]) {
    let function = case.function;
    let calls = counted[1] - counted[0];
    let (fewest, most) = (callers[2] - callers[1], callers[3] - callers[0]);
    println!("{function}: {calls} calls counted, {fewest} to {most} made");
    let under_way = 4;
    assert!(
        fewest <= calls + under_way && calls <= most + under_way,
        "{function}: {calls} of {fewest} to {most}"
    );
}

/// All counted calls of a function.
fn all(counted: &BTreeMap<u64, u64>) -> u64 {
    counted.values().sum()
}

/// An edition whose function jumps to it, and nothing else.
fn jumps(guest: &mut Guest, stock: Stock, case: &Case) -> u64 {
    let id = applied(guest, stock, case.edition, &[]);
    let made = number(guest, case.load);
    revert(guest, id);
    // Who had come to it before is past its beginning by then.
    let _ = number(guest, case.load);
    let (seen, others) = witnessed(guest);
    println!("{stock:?} {}: {seen} by a jump", case.function);
    assert!(seen > 0 && seen >= made, "{}: {seen}", case.function);
    assert_eq!(others, 0, "{}", case.function);
    // Nobody comes to it any more.
    let _ = number(guest, case.load);
    assert_eq!(witnessed(guest), (seen, 0), "{}", case.function);
    id
}

/// The same behind a handler that asks a rule and counts.
fn chooses(guest: &mut Guest, stock: Stock, case: &Case) -> u64 {
    let Case { function, load, .. } = *case;
    let id = applied(guest, stock, case.edition, &["--when", NEVER, "--count"]);
    let _ = number(guest, load);
    assert_eq!(witnessed(guest), (0, 0), "{function}: for no call");
    let callers = |guest: &mut Guest| case.callers.map_or(0, |callers| number(guest, callers));

    let mut made = [callers(guest); 4];
    let before = counted(guest, function);
    made[1] = callers(guest);
    use_for(guest, id, &["--when", case.rule, "--count"]);
    let calls = number(guest, load);
    use_for(guest, id, &["--when", NEVER, "--count"]);
    made[2] = callers(guest);
    let after = counted(guest, function);
    made[3] = callers(guest);
    if case.callers.is_some() {
        assert_as_many(case, [all(&before), all(&after)], made);
    }
    let (chosen, others) = (after[&id], after[&0]);
    println!("{stock:?} {function}: {chosen} by the rule, {others} not");
    assert_eq!(witnessed(guest), (chosen, 0), "{function}");
    assert!(chosen > 0 && others > before[&0], "{function}: {after:?}");
    if let Some((part, of)) = case.chosen {
        assert_eq!(chosen, calls * part / of, "{function}: {after:?}");
    }

    // Back to a jump, and to the original.
    use_for(guest, id, &[]);
    let calls = number(guest, load);
    let (seen, others) = witnessed(guest);
    assert!(seen > chosen && seen >= chosen + calls, "{function}");
    assert_eq!(others, 0, "{function}");
    revert(guest, id);
    id
}

/// One case, both ways; the updates that were applied and reverted.
fn runs(guest: &mut Guest, stock: Stock, case: &Case) -> [u64; 2] {
    [jumps, chooses].map(|way| {
        let _ = one_line(guest, &format!("echo 0 >{WITNESS}"));
        way(guest, stock, case)
    })
}

/// Has what keeps the processors busy end, without which editions are soon left by all and gone.
fn rest(guest: &mut Guest, updates: impl IntoIterator<Item = u64>) {
    let _ = one_line(guest, "kill $(pidof probe)");
    for id in updates {
        wait_gone(guest, id);
    }
}

fn contexts(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let _ = one_line(
        &mut guest,
        &format!("ifconfig lo 127.0.0.1 up; {CHURN} true"),
    );
    let runs = CASES.iter().map(|case| runs(&mut guest, stock, case));
    let updates: Vec<u64> = runs.flatten().collect();
    rest(&mut guest, updates);
    assert_clean(&mut guest);
}

#[test]
fn editions_of_6_1_run_where_its_functions_run() {
    contexts(LTS_6_1);
}

#[test]
fn editions_of_6_12_run_where_its_functions_run() {
    contexts(NEWEST_6_12);
}

/// In NMIs. The stacks that the guest then prints would count as complaints, so what it complains of is looked for apart.
fn nmi(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let _ = one_line(&mut guest, &format!("{BUSY} true"));
    let updates = runs(&mut guest, stock, &NMI);
    rest(&mut guest, updates);
    let bad = "WARNING:|BUG:|Oops|general protection|lockup|LOCKUP| stall";
    let found = guest.sh(&format!("dmesg | grep -E '{bad}'"));
    assert_eq!(found.status, 1, "{stock:?}: {}", found.text());
}

#[test]
fn editions_of_6_1_run_in_nmis() {
    nmi(LTS_6_1);
}

#[test]
fn editions_of_6_12_run_in_nmis() {
    nmi(NEWEST_6_12);
}

/// A rule cannot ask what is on the stack, and says so.
fn on_the_stack(stock: Stock) {
    let guest = Guest::boot(&Options::new(stock));
    let package = stock.edition("stack_argument");
    let package = package.to_str().expect("UTF-8");
    for rule in ["arg7 = 1", "val3 = 1"] {
        let reply = guest
            .client
            .call(&["update", "apply", package, "--when", rule]);
        assert_eq!(reply.refusal(rule), "rule_not_resolvable");
        assert!(reply.json.to_string().contains("stack"), "{reply:?}");
    }
}

#[test]
fn a_rule_about_an_argument_on_the_stack_is_refused() {
    on_the_stack(LTS_6_1);
}

/// What an edition answers that adds one to a number of the user's: it cannot be written, or not be read.
const USERS: [(&str, &str); 5] = [
    ("present", "OK"),
    ("absent", "OK"),
    ("read-only", "ETIME"),
    ("nowhere", "EXDEV"),
    ("kernel", "EXDEV"),
];

/// An edition reads and writes memory of users: faults bring what is to be there, and what is not there is an error.
fn of_users(stock: Stock) {
    const EACH: u64 = 50;
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let _ = one_line(&mut guest, &format!("{CHURN} true"));
    let id = applied(&guest, stock, "unix_ioctl_user", &[]);
    for (options, part) in [
        (&[][..], 4),
        (&["--when", "cmd = 0x8905 and cpu in 1..2"], 2),
    ] {
        use_for(&guest, id, options);
        let said = one_line(&mut guest, &format!("probe marks {EACH} 4"));
        println!("{stock:?} {options:?}: {said}");
        for (kind, answer) in USERS {
            let line = said
                .lines()
                .find(|line| line.starts_with(&format!("marks: {kind} ")));
            let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
            let answers: BTreeMap<&str, &str> = words[2..]
                .chunks(2)
                .map(|pair| (pair[0], pair[1]))
                .collect();
            let calls = (part * EACH).to_string();
            assert_eq!(answers.get(answer), Some(&&*calls), "{stock:?}: {said}");
            // The original's own answer, whatever that is.
            assert_eq!(answers.len(), if part == 4 { 1 } else { 2 }, "{said}");
        }
    }
    revert(&guest, id);
    rest(&mut guest, [id]);
    assert_clean(&mut guest);
}

#[test]
fn editions_of_6_1_get_at_memory_of_users() {
    of_users(LTS_6_1);
}

#[test]
fn editions_of_6_12_get_at_memory_of_users() {
    of_users(NEWEST_6_12);
}
