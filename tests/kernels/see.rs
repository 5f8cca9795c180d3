//! Is a running kernel seen from outside as it sees itself? Each view is compared with what the guest's own files say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, one_line};

/// A line for the guest's log that nothing else writes.
const MARKER: &str = "exopatch looks at itself from outside";

/// Takes a view of a guest that runs: it stood still for it.
fn see(guest: &Guest, view: &[&str]) -> Value {
    let args = [&["kernel"], view, &["--deadline", "30s"]].concat();
    let seen = guest.client.call(&args).expect(view[0]);
    let paused_us = seen["paused_us"].as_u64().expect("how long it stood still");
    println!("{view:?}: the guest stood still for {paused_us} us");
    assert_eq!(paused_us == 0, view[0] == "types", "{view:?}: {paused_us}");
    seen
}

fn list<'a>(of: &'a Value, name: &str) -> &'a [Value] {
    of[name]
        .as_array()
        .unwrap_or_else(|| panic!("no list {name} in {of}"))
}

fn text<'a>(of: &'a Value, name: &str) -> &'a str {
    of[name]
        .as_str()
        .unwrap_or_else(|| panic!("no text {name} in {of}"))
}

fn number(of: &Value, name: &str) -> u64 {
    of[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {name} in {of}"))
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .unwrap_or_else(|error| panic!("{text:?} is no address: {error}"))
}

/// `kernel modules` and `/proc/modules`: names, sizes, counts and addresses, in the same order.
fn modules(guest: &mut Guest) {
    let told = guest.sh("cat /proc/modules");
    let told: Vec<String> = told
        .lines
        .iter()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = hexadecimal(words[5]);
            format!("{} {} {} {at:#x}", words[0], words[1], words[2])
        })
        .collect();
    let seen = see(guest, &["modules"]);
    let seen = list(&seen, "modules").iter().map(|module| {
        let text_part = list(module, "parts")
            .iter()
            .find(|part| part["kind"] == "text");
        let at = hexadecimal(text(text_part.expect("code"), "start"));
        let references = module["references"].as_i64().expect("a count");
        format!(
            "{} {} {references} {at:#x}",
            text(module, "name"),
            number(module, "size")
        )
    });
    assert_eq!(seen.collect::<Vec<_>>(), told);
    println!("{} modules", told.len());
}

/// The tasks that are seen: each thread's id with where its `task_struct` is, and its name.
fn threads(guest: &Guest) -> BTreeMap<(u64, String), String> {
    let seen = see(guest, &["tasks"]);
    let tasks = list(&seen, "tasks").iter().map(|task| {
        let key = (number(task, "pid"), text(task, "address").to_owned());
        (key, text(task, "name").to_owned())
    });
    tasks.filter(|((pid, _), _)| *pid != 0).collect()
}

/// `kernel tasks` and `/proc/PID/task/TID/comm`: what is there before and after is there between.
fn tasks(guest: &mut Guest) {
    let before = threads(guest);
    let command = "cd /proc; for t in [0-9]*/task/[0-9]*; do read -r c <$t/comm && echo -n \"${t##*/}=$c \"; done; echo";
    let told = one_line(guest, command);
    let after = threads(guest);
    let told: BTreeMap<u64, &str> = told
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .map(|(pid, name)| (pid.parse().expect("a thread's id"), name))
        .collect();
    let mut stayed = 0;
    for ((pid, at), name) in &before {
        if !after.contains_key(&(*pid, at.clone())) {
            continue;
        }
        stayed += 1;
        // The guest tells of its own threads more than their names hold: what a worker works on.
        let own = told
            .get(pid)
            .unwrap_or_else(|| panic!("thread {pid} ({name}) is not in /proc"));
        assert!(own.starts_with(name.as_str()), "{pid} is {name}, not {own}");
    }
    let seen: BTreeSet<u64> = before
        .keys()
        .chain(after.keys())
        .map(|(pid, _)| *pid)
        .collect();
    let unseen: Vec<_> = told.iter().filter(|(pid, _)| !seen.contains(pid)).collect();
    println!(
        "{} threads in /proc, {stayed} compared, unseen: {unseen:?}",
        told.len()
    );
    // The shell that looked came and went between the two looks.
    assert!(unseen.len() <= 1, "{unseen:?}");
    assert!(stayed > 20, "only {stayed} threads stayed");
}

/// The lines of the log, and whether the marker is one of them.
fn log_lines(guest: &Guest) -> (usize, bool) {
    let seen = see(guest, &["log"]);
    // As the guest's first program set it.
    assert_eq!(seen["console_level"], 1, "{}", seen["console_level"]);
    let records = list(&seen, "records");
    let lines = records
        .iter()
        .map(|record| text(record, "text").split('\n').count());
    let marked = records.iter().any(|record| {
        // Written by a user, not by the kernel.
        record["text"] == MARKER && record["facility"] == 1
    });
    (lines.sum(), marked)
}

/// `kernel log` and `dmesg`.
fn log(guest: &mut Guest) {
    let (before, marked) = log_lines(guest);
    assert!(!marked, "the marker is there before it was written");
    let told = one_line(guest, &format!("echo '{MARKER}' >/dev/kmsg; dmesg | wc -l"));
    let told: usize = told.trim().parse().expect("a number of lines");
    let (after, marked) = log_lines(guest);
    println!("log: {before} lines seen, {told} by dmesg, {after} seen");
    assert!(marked, "the marker is not seen");
    assert!(
        before < told && told <= after,
        "{before} < {told} <= {after}"
    );
}

fn address_of(guest: &Guest, symbol: &str) -> u64 {
    let seen = see(guest, &["symbols", symbol]);
    let [only] = list(&seen, "symbols") else {
        panic!("not one {symbol}: {seen}");
    };
    hexadecimal(text(only, "address"))
}

/// `kernel symbols` and `/proc/kallsyms`.
fn symbols(guest: &mut Guest) {
    let told = one_line(guest, "grep ' unix_ioctl$' /proc/kallsyms");
    let at = told.split(' ').next().expect("an address");
    assert_eq!(address_of(guest, "unix_ioctl"), hexadecimal(at), "{told}");
    let there = see(guest, &["symbols", &format!("0x{at}")]);
    assert_eq!(
        (text(&there, "symbol"), number(&there, "offset")),
        ("unix_ioctl", 0)
    );
}

/// `kernel stack` of a sleeping process and its `/proc/PID/stack`, which leaves out the scheduler's functions.
fn stack(guest: &mut Guest) {
    let pid = one_line(guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    let pid = pid.trim();
    let hidden = ["sched", "lock"].map(|part| {
        let of = |end| address_of(guest, &format!("__{part}_text_{end}"));
        of("start")..of("end")
    });
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        let told = guest.sh(&format!("cat /proc/{pid}/stack"));
        let told: Vec<&str> = told
            .lines
            .iter()
            .map(|line| line.trim_start_matches("[<0>] "))
            .collect();
        let seen = see(guest, &["stack", pid]);
        let [only] = list(&seen, "stacks") else {
            panic!("not one stack: {seen}");
        };
        assert_eq!(only["name"], "sleep", "{only}");
        assert_eq!(only["reliable"], true, "{only}");
        let frames = list(only, "frames").iter().filter(|frame| {
            let at = hexadecimal(text(frame, "address"));
            !hidden.iter().any(|range| range.contains(&at))
        });
        let frames: Vec<&str> = frames.map(|frame| text(frame, "place")).collect();
        if frames == told && frames.len() > 2 {
            println!("stack of {pid}: {frames:?}");
            break;
        }
        // It may not have come to sleep yet.
        assert!(Instant::now() < limit, "{frames:?} is not {told:?}");
    }
    let _ = guest.sh(&format!("kill {pid}"));
}

/// `kernel stack --all`: no sleeping task is unreliable, and every vCPU is there.
fn stacks(guest: &Guest, cpus: u64) {
    let seen = see(guest, &["stack", "--all"]);
    let all = list(&seen, "stacks");
    let doubtful: Vec<_> = all
        .iter()
        .filter(|stack| stack["reliable"] != true)
        .collect();
    println!(
        "{} stacks, {} of them unreliable: {doubtful:#?}",
        all.len(),
        doubtful.len()
    );
    assert!(
        doubtful.iter().all(|stack| stack["cpu"].is_u64()),
        "{doubtful:#?}"
    );
    for cpu in 0..cpus {
        assert!(all.iter().any(|stack| stack["cpu"] == cpu), "no vCPU {cpu}");
    }
}

/// `kernel text` and `kernel disasm`: everything is explained, with an update in effect and without.
fn code(guest: &mut Guest, stock: Stock) {
    let unexplained = |guest: &Guest| {
        let seen = see(guest, &["text", "--changed"]);
        println!("text: {}", seen["causes"]);
        assert!(seen["causes"]["unexplained"].is_null(), "{seen:#}");
        seen["causes"]["ours"]["places"].as_u64()
    };
    let function = |guest: &Guest| {
        let seen = see(guest, &["disasm", "unix_ioctl"]);
        assert!(seen["not_compared"].is_null(), "{}", seen["not_compared"]);
        let lines = list(&seen, "instructions").to_vec();
        let jump = lines
            .iter()
            .find(|line| line["causes"] == serde_json::json!(["ours"]));
        let target = jump.map(|line| text(line, "target").to_owned());
        let fentry = lines
            .iter()
            .any(|line| line["causes"] == serde_json::json!(["fentry"]));
        assert!(fentry, "{lines:#?}");
        target
    };
    assert_eq!((unexplained(guest), function(guest)), (None, None));
    let id = apply(guest, &stock.edition("unix_ioctl_notty"));
    assert!(unexplained(guest) > Some(0));
    let target = function(guest).expect("a jump of ours");
    let update = format!("[update {id}]");
    assert!(
        target.starts_with("unix_ioctl+0x0/") && target.ends_with(&update),
        "{target}"
    );
    revert(guest, id);
    assert_eq!((unexplained(guest), function(guest)), (None, None));
}

/// A guest that was paused already does not stand still for a view, and is still paused behind it.
fn paused(guest: &Guest) {
    let _ = guest.client.call(&["vm", "pause"]).expect("the pause");
    let seen = guest
        .client
        .call(&["kernel", "modules"])
        .expect("the modules");
    assert_eq!(seen["paused_us"], 0);
    let vm = guest.client.call(&["vm", "status"]).expect("the state");
    assert_eq!(vm["state"], "paused", "{vm:#}");
    let _ = guest.client.call(&["vm", "resume"]).expect("the resume");
}

/// What is not there is said so, with a code.
fn refusals(guest: &Guest) {
    for (view, code) in [
        (["symbols", "no_such_function"], "no_such_symbol"),
        (["types", "no_such_type"], "no_such_type"),
        (["stack", "4194305"], "no_such_task"),
        (["stack", "cpu99"], "no_such_vcpu"),
        (["stack", "nobody"], "no_stack_owner"),
        (["disasm", "jiffies"], "not_a_function"),
        (["disasm", "unix_ioctl+0x100000"], "beyond_function"),
    ] {
        let reply = guest.client.call(&[["kernel"].as_slice(), &view].concat());
        assert_eq!(reply.refusal(view[1]), code, "{reply:?}");
    }
}

/// The types that a module brought are found where they are asked for, and there alone.
fn module_types(guest: &Guest) {
    const MODULE: &str = "evdev";
    let of_module = ["types", "--module", MODULE, "evdev_client", "head"];
    let args = [&["kernel"], &of_module[..], &["--deadline", "30s"]].concat();
    let seen = guest.client.call(&args).expect("a type of a module");
    assert_eq!(number(&seen, "size"), 4, "{seen}");
    let of_kernel = ["kernel", "types", "--module", MODULE, "task_struct", "pid"];
    let (theirs, own) = (
        guest.client.call(&of_kernel).expect("a type of the kernel"),
        see(guest, &["types", "task_struct", "pid"]),
    );
    assert_eq!(theirs["offset"], own["offset"]);
    for (args, code) in [
        (&["evdev_client"][..], "no_such_type"),
        (&["--module", "nothing", "list_head"], "no_such_module"),
    ] {
        let reply = guest.client.call(&[&["kernel", "types"], args].concat());
        assert_eq!(reply.refusal("types"), code, "{reply:?}");
    }
}

pub(crate) fn all_views(stock: Stock) {
    const CPUS: u32 = 2;
    let mut guest = Guest::boot(&Options::new(stock).cpus(CPUS));
    let types = see(&guest, &["types", "task_struct", "thread.sp"]);
    assert!(number(&types, "offset") > 0, "{types}");
    modules(&mut guest);
    tasks(&mut guest);
    log(&mut guest);
    symbols(&mut guest);
    stack(&mut guest);
    stacks(&guest, CPUS.into());
    code(&mut guest, stock);
    module_types(&guest);
    paused(&guest);
    refusals(&guest);
    assert_clean(&mut guest);
}

#[test]
fn a_running_6_1_is_seen_as_it_sees_itself() {
    all_views(LTS_6_1);
}

#[test]
fn a_running_6_12_is_seen_as_it_sees_itself() {
    all_views(NEWEST_6_12);
}
