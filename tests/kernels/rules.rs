//! Is a call for the edition that the update's rule says? Judged by guest programs that tell which one answered, and by what is counted outside.

use std::collections::BTreeMap;

use serde_json::Value;
use tests::client::Reply;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::{assert_clean, one_line};

/// What the edition `unix_ioctl_notty` makes of SIOCATMARK on a socket that is not of streams.
const NEW: &str = "ENOTTY";
/// Calls that each thread makes where a rule decides by who calls, or for what.
const CALLS: u64 = 10;

/// How often each answer came, for each thread.
pub(crate) type Tally = Vec<BTreeMap<String, u64>>;

/// What `probe tally` said.
pub(crate) fn tally(said: &str) -> Tally {
    let mut threads = BTreeMap::new();
    for line in said.lines() {
        let Some((thread, counts)) = line
            .strip_prefix("tally: thread ")
            .and_then(|line| line.split_once(':'))
        else {
            continue;
        };
        let words: Vec<&str> = counts.split_whitespace().collect();
        let count = |pair: &[&str]| (pair[0].to_owned(), pair[1].parse().expect(line));
        let counts = words.chunks(2).map(count).collect();
        threads.insert(thread.parse::<u32>().expect(line), counts);
    }
    threads.into_values().collect()
}

/// How often `answer` came on all threads; all answers if it is empty.
pub(crate) fn sum(tally: &Tally, answer: &str) -> u64 {
    let counts = tally.iter().flatten();
    let counts = counts.filter(|(name, _)| answer.is_empty() || *name == answer);
    counts.map(|(_, count)| count).sum()
}

/// Calls `exopatch update ID... --when RULE...`.
fn apply(guest: &Guest, package: &str, options: &[&str]) -> Reply {
    let call = ["update", "apply", package, "--deadline", "20s"];
    guest.client.call(&[&call, options].concat())
}

/// Applies a package of this kernel and gives the update's number.
pub(crate) fn applied(guest: &Guest, stock: Stock, name: &str, options: &[&str]) -> u64 {
    let package = stock.edition(name);
    let reply = apply(guest, package.to_str().expect("UTF-8"), options);
    let update = reply.expect("the apply");
    assert_eq!(update["state"], "applied", "{update:#}");
    update["id"].as_u64().expect("an id")
}

/// Has an update be used for the calls of a rule.
pub(crate) fn use_for(guest: &Guest, id: u64, options: &[&str]) {
    let id = id.to_string();
    let call = ["update", "use", &id, "--deadline", "20s"];
    let update = guest.client.call(&[&call, options].concat());
    let update = update.expect("the use");
    assert_eq!(update["state"], "applied", "{options:?}: {update:#}");
}

/// The counted calls of a function, by the update that answered: 0 for the original.
pub(crate) fn counted(guest: &Guest, function: &str) -> BTreeMap<u64, u64> {
    let calls = guest.client.call(&["update", "calls"]).expect("the calls");
    let calls = calls["calls"].as_array().expect("calls").iter();
    let of_it = calls.filter(|calls| calls["function"] == function);
    let number = |calls: &Value, name: &str| calls[name].as_u64();
    of_it
        .map(|calls| {
            let by = number(calls, "update").unwrap_or(0);
            (by, number(calls, "calls").expect("a number"))
        })
        .collect()
}

/// Starts a process of the guest that waits until it is let go, and gives its number.
fn waiting(guest: &mut Guest, command: &str) -> String {
    let start = format!(
        "rm -f /tmp/go /tmp/said; mkfifo /tmp/go; \
         sh -c 'read go </tmp/go; exec {command}' >/tmp/said 2>&1 & echo $!"
    );
    one_line(guest, &start)
}

/// Lets that process go, and gives what it said until its end.
fn let_go(guest: &mut Guest, pid: &str) -> String {
    let go =
        format!("echo >/tmp/go; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said");
    one_line(guest, &go)
}

/// Who calls, or for what: a rule, in which PID is the process that calls; the process, and how many calls of each thread are for the edition.
const BY_CALL: &[(&str, &str, &[u64])] = &[
    ("pid = PID", "probe tally 10 0", &[CALLS]),
    ("pid != PID", "probe tally 10 0", &[0]),
    // Threads have numbers of their own.
    ("pid = PID", "probe tally 10 2", &[0, 0]),
    ("tgid = PID", "probe tally 10 2", &[CALLS, CALLS]),
    ("not tgid = PID", "probe tally 10 2", &[0, 0]),
    ("uid = 1000", "probe as 1000 probe tally 10 1", &[CALLS]),
    ("uid = 1000", "probe tally 10 1", &[0]),
    ("uid in 500..999", "probe as 1000 probe tally 10 1", &[0]),
    (
        "uid in {7, 1000..2000}",
        "probe as 1000 probe tally 10 1",
        &[CALLS],
    ),
    ("cpu = 1", "probe tally 10 4", &[0, CALLS, 0, 0]),
    ("cpu in 2..3", "probe tally 10 4", &[0, 0, CALLS, CALLS]),
    ("comm = \"probe\"", "probe tally 10 1", &[CALLS]),
    ("comm = \"prob\"", "probe tally 10 1", &[0]),
    ("comm = \"prob*\"", "probe tally 10 1", &[CALLS]),
    (
        "comm = \"nginx-worker-17\"",
        "/tmp/nginx-worker-17 tally 10 1",
        &[CALLS],
    ),
    (
        "comm = \"nginx-worker-1*\"",
        "/tmp/nginx-worker-17 tally 10 1",
        &[CALLS],
    ),
    ("comm = \"nginx*\"", "probe tally 10 1", &[0]),
    ("kthread", "probe tally 10 1", &[0]),
    ("not kthread", "probe tally 10 1", &[CALLS]),
    ("cmd = 0x8905", "probe tally 10 1", &[CALLS]),
    ("cmd = 0x8906", "probe tally 10 1", &[0]),
    ("arg2 = 0x8905", "probe tally 10 1", &[CALLS]),
    ("sock->type = 2", "probe tally 10 1", &[CALLS]),
    ("sock->type = 2", "probe tally 10 1 5", &[0]),
    ("sock->type = 5", "probe tally 10 1 5", &[CALLS]),
    ("sock->sk->sk_type = 5", "probe tally 10 1 5", &[CALLS]),
    ("sock->sk->sk_type = 5", "probe tally 10 1", &[0]),
    (
        "sock->sk->__sk_common.skc_family = 1",
        "probe tally 10 1",
        &[CALLS],
    ),
    (
        "sock->sk->__sk_common.skc_family = 2",
        "probe tally 10 1",
        &[0],
    ),
    (
        "cmd = 0x8905 and cpu = 2",
        "probe tally 10 4",
        &[0, 0, CALLS, 0],
    ),
    (
        "cpu = 0 or cpu = 3",
        "probe tally 10 4",
        &[CALLS, 0, 0, CALLS],
    ),
    (
        "not (cpu = 0 or cpu = 3) and uid = 0",
        "probe tally 10 4",
        &[0, CALLS, CALLS, 0],
    ),
    ("first 4", "probe tally 10 0", &[4]),
];

/// Every test by who calls and for what, one rule after the other of one update.
fn by_call(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let _ = one_line(&mut guest, "cp /bin/probe /tmp/nginx-worker-17");
    let id = applied(&guest, stock, "unix_ioctl_notty", &["--when", "cpu = 77"]);
    let mut wrong = Vec::new();
    for (rule, command, want) in BY_CALL {
        let pid = waiting(&mut guest, command);
        use_for(&guest, id, &["--when", &rule.replace("PID", &pid)]);
        let said = let_go(&mut guest, &pid);
        let tally = tally(&said);
        let new = |counts: &BTreeMap<String, u64>| counts.get(NEW).copied().unwrap_or(0);
        let got: Vec<u64> = tally.iter().map(new).collect();
        let threads = want.len() as u64;
        if got != *want || sum(&tally, "") != CALLS * threads {
            wrong.push(format!(
                "`{rule}` of `{command}`: {got:?}, not {want:?}\n{said}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{stock:?}:\n{}", wrong.join("\n"));
    assert_clean(&mut guest);
}

#[test]
fn rules_tell_calls_of_6_1_apart() {
    by_call(LTS_6_1);
}

#[test]
fn rules_tell_calls_of_6_12_apart() {
    by_call(NEWEST_6_12);
}

/// So many of the calls, and all of them counted.
fn by_number(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let id = applied(
        &guest,
        stock,
        "unix_ioctl_notty",
        &["--when", "share 25%", "--count"],
    );
    let (mut new, mut old) = (0, 0);
    let mut check = |guest: &mut Guest, rule: &str, calls: u64, want: u64, spare: u64| {
        use_for(guest, id, &["--when", rule, "--count"]);
        let tally = tally(&one_line(guest, &format!("probe tally {} 4", calls / 4)));
        let (got, all) = (sum(&tally, NEW), sum(&tally, ""));
        assert_eq!(all, calls, "{tally:?}");
        assert!(got.abs_diff(want) <= spare, "`{rule}`: {got} of {calls}");
        println!("{stock:?}: `{rule}`: {got} of {calls}");
        (new, old) = (new + got, old + all - got);
        let counted = counted(guest, "unix_ioctl");
        assert_eq!(counted, BTreeMap::from([(0, old), (id, new)]), "`{rule}`");
    };
    check(&mut guest, "share 25%", 8000, 2000, 10);
    check(&mut guest, "share 1/7", 7000, 1000, 10);
    check(&mut guest, "share 100%", 4000, 4000, 0);
    check(&mut guest, "first 10", 4000, 10, 0);
    check(&mut guest, "first 10 or share 50%", 4000, 2005, 10);
    assert_clean(&mut guest);
}

#[test]
fn so_many_calls_of_6_1_are_for_an_edition_and_all_are_counted() {
    by_number(LTS_6_1);
}

#[test]
fn so_many_calls_of_6_12_are_for_an_edition_and_all_are_counted() {
    by_number(NEWEST_6_12);
}

/// A rule that changes while programs call: no call is lost, and each is counted where it was answered.
fn changes(stock: Stock) {
    const RULES: [&str; 4] = ["cpu in 0..1", "share 1/3", "not cpu = 0", "uid = 1"];
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let id = applied(
        &guest,
        stock,
        "unix_ioctl_notty",
        &["--when", RULES[3], "--count"],
    );
    let pid = one_line(&mut guest, "probe tally 0 4 >/tmp/said & echo $!");
    for round in 0..40 {
        use_for(
            &guest,
            id,
            &["--when", RULES[round % RULES.len()], "--count"],
        );
    }
    use_for(&guest, id, &["--count"]);
    let end =
        format!("kill -USR2 {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said");
    let tally = tally(&one_line(&mut guest, &end));
    let (new, all) = (sum(&tally, NEW), sum(&tally, ""));
    println!("{stock:?}: {new} of {all} calls for the edition, of {tally:?}");
    assert!(0 < new && new < all, "{tally:?}");
    let counted = counted(&guest, "unix_ioctl");
    let want = BTreeMap::from([(0, all - new), (id, new)]);
    assert_eq!(counted, want, "{stock:?}: {tally:?}");
    assert_clean(&mut guest);
}

#[test]
fn a_rule_changes_while_programs_of_6_1_call() {
    changes(LTS_6_1);
}

#[test]
fn a_rule_changes_while_programs_of_6_12_call() {
    changes(NEWEST_6_12);
}

/// Kernel threads are told from other tasks: the edition warns of these.
fn kernel_threads(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let id = applied(
        &guest,
        stock,
        "schedule_timeout_kthread",
        &["--when", "kthread", "--count"],
    );
    // The kernel's own threads wait for grace periods and their turn, and one of these for what a socket brings.
    let _ = one_line(&mut guest, "probe sleepers 7 >/dev/null & sleep 5");
    let counted = counted(&guest, "schedule_timeout");
    println!("{stock:?}: {counted:?}");
    for (by, calls) in [(id, counted.get(&id)), (0, counted.get(&0))] {
        assert!(
            calls.is_some_and(|calls| *calls > 0),
            "by {by}: {counted:?}"
        );
    }
    assert_clean(&mut guest);
}

#[test]
fn kernel_threads_of_6_1_are_told_from_other_tasks() {
    kernel_threads(LTS_6_1);
}

#[test]
fn kernel_threads_of_6_12_are_told_from_other_tasks() {
    kernel_threads(NEWEST_6_12);
}

/// A rule holds for all functions of an update; what it asks must be there in each.
fn of_two(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let lines = |guest: &mut Guest, command: &str| one_line(guest, command).lines().count();
    let (read, other) = ("cat /proc/version", "probe as 1000 cat /proc/version");
    let plain = lines(&mut guest, read);
    let id = applied(
        &guest,
        stock,
        "two_functions",
        &["--when", "uid = 1000", "--count"],
    );
    assert_eq!(lines(&mut guest, read), plain, "{stock:?}");
    assert_eq!(lines(&mut guest, other), plain + 1, "{stock:?}");
    for (command, want) in [("probe tally 3 1", 0), ("probe as 1000 probe tally 3 1", 3)] {
        let tally = tally(&one_line(&mut guest, command));
        assert_eq!(sum(&tally, "EXDEV"), want, "{stock:?}: {command}");
    }
    assert_eq!(
        counted(&guest, "unix_ioctl"),
        BTreeMap::from([(0, 3), (id, 3)])
    );
    assert_eq!(
        counted(&guest, "version_proc_show"),
        BTreeMap::from([(0, 1), (id, 1)])
    );
    assert_clean(&mut guest);
}

#[test]
fn a_rule_is_for_both_functions_of_an_update() {
    of_two(LTS_6_1);
    of_two(NEWEST_6_12);
}

/// Rules that mean nothing here, with the code of the refusal and what it must name.
const REFUSED: &[(&str, &str, &str)] = &[
    ("sock->nothing = 1", "rule_not_resolvable", "nothing"),
    ("nobody = 1", "rule_not_resolvable", "nobody"),
    ("arg9 = 1", "rule_not_resolvable", "arg9"),
    ("cmd = -1", "rule_not_resolvable", "cmd"),
    (
        "sock->sk = SOCK_NOTHING",
        "rule_not_resolvable",
        "SOCK_NOTHING",
    ),
    ("pid in set nobodys", "cannot_choose", "nobodys"),
    ("predicate none", "cannot_choose", "none"),
    ("during night", "rule_not_resolvable", "night"),
    ("share 0%", "rule_malformed", "column"),
    ("uid =", "rule_malformed", "column"),
];

#[test]
fn a_rule_that_means_nothing_is_refused() {
    let stock = LTS_6_1;
    let mut guest = Guest::boot(&Options::new(stock));
    let package = stock.edition("unix_ioctl_notty");
    let package = package.to_str().expect("UTF-8");
    let mut wrong = Vec::new();
    let id = applied(&guest, stock, "unix_ioctl_notty", &["--when", "uid = 1"]);
    for (rule, code, names) in REFUSED {
        let as_used = guest
            .client
            .call(&["update", "use", &id.to_string(), "--when", rule]);
        for reply in [apply(&guest, package, &["--when", rule]), as_used] {
            let said = reply.json.to_string();
            let hint = reply.json["hint"].as_str().unwrap_or_default();
            let right = reply.status != 0
                && reply.json["code"].as_str().is_some_and(|it| it == *code)
                && said.contains(names)
                && !hint.is_empty();
            if !right {
                wrong.push(format!("`{rule}`: {reply:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The one in effect is as it was.
    for (command, want) in [("probe tally 5 1", 0), ("probe as 1 probe tally 5 1", 5)] {
        let tally = tally(&one_line(&mut guest, command));
        assert_eq!(sum(&tally, NEW), want, "{command}: {tally:?}");
    }
    assert_clean(&mut guest);
}
