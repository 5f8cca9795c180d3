//! Does a clone of a kernel's own function answer as the original does, in all that its code is made of?

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::client::Reply;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::first_class::told;
use crate::patch::{apply, revert};
use crate::rules::{counted, sum, tally};
use crate::witness::{assert_clean, one_line};

/// The longest that a thread takes to fall asleep.
const LIMIT: Duration = Duration::from_secs(20);
/// With an answer for each call; with faults in the user's memory; with an event in it; one that sleeps beneath; with cold parts and much else.
const FUNCTIONS: [&str; 10] = [
    "unix_ioctl",
    "filldir64",
    "do_exit",
    "hrtimer_nanosleep",
    "vfs_read",
    "vfs_write",
    "handle_mm_fault",
    "sock_ioctl",
    "do_sys_openat2",
    "copy_process",
];
/// Calls that are counted.
const CALLS: u64 = 100;

fn clone(guest: &Guest, functions: &[&str], options: &[&str]) -> Reply {
    let call = [
        &["update", "clone"],
        functions,
        &["--deadline", "30s"],
        options,
    ]
    .concat();
    guest.client.call(&call)
}

fn number(update: &Value) -> u64 {
    assert_eq!(update["state"], "applied", "{update:#}");
    update["id"].as_u64().expect("an id")
}

/// What programs of the guest see of the functions.
fn answers(guest: &mut Guest) -> (String, u64) {
    let entries = one_line(guest, "probe entries");
    assert_eq!(entries, "entries: EFAULT, then some");
    let said = tally(&one_line(guest, &format!("probe tally {CALLS} 0")));
    (format!("{said:?}"), sum(&said, ""))
}

/// How many processes the guest's own event saw end, of three.
fn exits(guest: &mut Guest) -> usize {
    let tracing = "/sys/kernel/tracing";
    let event = format!("{tracing}/events/sched/sched_process_exit/enable");
    let run = "for i in 1 2 3; do /bin/busybox true; done";
    let _ = one_line(
        guest,
        &format!("echo >{tracing}/trace; echo 1 >{event}; {run}; echo 0 >{event}"),
    );
    let seen = one_line(
        guest,
        &format!("grep -c 'sched_process_exit: comm=busybox' {tracing}/trace; true"),
    );
    seen.trim().parse().expect("a number")
}

fn clones(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(2));
    let _ = guest.sh("mount -t tracefs tracefs /sys/kernel/tracing");
    let before = answers(&mut guest);
    assert_eq!(exits(&mut guest), 3);
    let asked = ["--count", "--model", "immediate"];
    let update = clone(&guest, &FUNCTIONS, &asked).expect("the clones");
    let id = number(&update);
    let calls = |guest: &Guest, function| counted(guest, function).get(&id).copied().unwrap_or(0);

    let answered = calls(&guest, "unix_ioctl");
    assert_eq!(answers(&mut guest), before, "{stock:?}");
    assert_eq!(
        calls(&guest, "unix_ioctl") - answered,
        before.1,
        "{stock:?}"
    );
    // The branch that leads to the event is switched while the clone is what runs.
    assert_eq!(exits(&mut guest), 3, "{stock:?}");
    assert_eq!(
        one_line(
            &mut guest,
            "find / -xdev | wc -l | grep -q .. && dd if=/dev/zero of=/tmp/f bs=4096 count=512 2>/dev/null && md5sum </tmp/f"
        ),
        "b2d1236c286a3c0704224fe4105eca49  -"
    );

    let pid = one_line(&mut guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    let end = Instant::now() + LIMIT;
    let frames = loop {
        let frames = told(&mut guest, pid.trim());
        if frames
            .iter()
            .any(|frame| frame == "hrtimer_nanosleep.clone [exopatch]")
        {
            break frames;
        }
        assert!(Instant::now() < end, "{pid} does not sleep: {frames:?}");
    };
    assert!(
        frames
            .last()
            .is_some_and(|last| last.starts_with("entry_SYSCALL_64")),
        "{frames:?}"
    );
    let seen = guest
        .client
        .call(&["kernel", "stack", pid.trim()])
        .expect("the stack");
    assert_eq!(seen["stacks"][0]["reliable"], true, "{seen:#}");
    for function in FUNCTIONS {
        let calls = calls(&guest, function);
        println!("{stock:?}: {function} was called {calls} times");
        assert!(calls > 0, "{stock:?}: no call of {function}'s clone");
    }
    // Functions of one update go together: who sleeps in one would hold the others.
    let _ = one_line(&mut guest, &format!("kill {}", pid.trim()));
    revert(&guest, id);
    assert_eq!(answers(&mut guest), before, "{stock:?}");
    let refused = |functions: &[&str]| clone(&guest, functions, &["--check"]).json["code"].clone();
    assert_eq!(refused(&["___bpf_prog_run"]), "clone_not_possible");
    assert_eq!(refused(&["no_such_function"]), "symbol_missing");
    assert_eq!(refused(&["vfs_read", "vfs_read"]), "clone_twice");
    assert_clean(&mut guest);
}

/// A clone warns as its original does, and the guest says that it was the clone.
fn warns(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let provoked = apply(&guest, &stock.edition("version_proc_show_unbalanced"));
    let warned = |guest: &mut Guest| {
        let _ = one_line(guest, "dmesg -c >/dev/null; cat /proc/version");
        let log = one_line(guest, "dmesg");
        let of = |what: &str| log.lines().filter(|line| line.contains(what)).count();
        assert_eq!(of("Unbalanced enable for IRQ"), 1, "{log}");
        let ip = log.lines().find_map(|line| line.split_once(" RIP: 0010:"));
        ip.expect("where it was").1.to_owned()
    };
    let by_original = warned(&mut guest);
    assert!(by_original.starts_with("__enable_irq+0x"), "{by_original}");
    let update = clone(&guest, &["__enable_irq"], &[]).expect("the clone");
    let id = number(&update);
    for _ in 0..3 {
        let by_clone = warned(&mut guest);
        assert!(by_clone.starts_with("__enable_irq.clone+0x"), "{by_clone}");
        assert!(by_clone.ends_with("[exopatch]"), "{by_clone}");
    }
    revert(&guest, id);
    assert_eq!(warned(&mut guest), by_original);
    revert(&guest, provoked);
    let version = one_line(&mut guest, "dmesg -c >/dev/null; cat /proc/version; dmesg");
    assert!(!version.contains("Unbalanced"), "{version}");
}

#[test]
fn warnings_in_a_clone_are_its_own() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        warns(stock);
    }
}

#[test]
fn a_6_1_answers_by_clones_of_its_own_functions() {
    clones(LTS_6_1);
}

#[test]
fn a_6_12_answers_by_clones_of_its_own_functions() {
    clones(NEWEST_6_12);
}
