//! Does the list of tasks say of each what the guest's own `/proc/PID/task/TID/status` says: whose it is, its state, its user?

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::{assert_clean, one_line};

/// Threads of one process that sleep.
const THREADS: usize = 20;
/// Another than root.
const USER: u64 = 1000;
/// States that last, each of which some task is in.
const LASTING: [char; 6] = ['I', 'P', 'S', 'T', 'Z', 't'];
/// So many tasks are in another state when the guest looks than when we do, at most.
const MOST_SKIPPED: usize = 6;
/// So many tasks the smallest guest has.
const FEWEST: usize = 60;

/// What is said of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    name: String,
    tgid: u64,
    ppid: u64,
    state: char,
    uid: u64,
    kthread: Option<bool>,
}

/// Makes tasks of every state that lasts: threads, another user's process, one that is stopped, one that nobody waits for, one that its
/// tracer has stopped (and who does not go on, being stopped himself), and the threads of a CPU that is taken away.
fn populate(guest: &mut Guest) {
    let commands = [
        &format!("probe sleepers {THREADS} &"),
        &format!("mkdir /etc; echo user:x:{USER}:{USER}::/:/bin/sh >/etc/passwd;"),
        "start-stop-daemon -S -c user -n nobody -a /bin/sleep -- 9999 &",
        "sleep 9999 & kill -STOP $!;",
        "sh -c 'true & exec sleep 9999' &",
        "probe steps 999999999 & usleep 500000; kill -STOP $!;",
        "echo 0 >/sys/devices/system/cpu/cpu1/online; usleep 500000",
    ];
    let _ = one_line(
        guest,
        &format!("{{ {}; }} >/dev/null 2>&1", commands.join(" ")),
    );
}

/// The tasks that are seen from outside, by thread's id and where its `task_struct` is. Idle tasks are in no directory of the guest's.
fn seen(guest: &Guest) -> BTreeMap<(u64, String), Said> {
    let args = ["kernel", "tasks", "--deadline", "30s"];
    let seen = guest.client.call(&args).expect("the tasks");
    let tasks = seen["tasks"].as_array().expect("a list");
    let text = |of: &Value, name: &str| of[name].as_str().expect(name).to_owned();
    let number =
        |of: &Value, name: &str| of[name].as_u64().unwrap_or_else(|| panic!("{name}: {of}"));
    let tasks = tasks.iter().map(|task| {
        let said = Said {
            name: text(task, "name"),
            tgid: number(task, "tgid"),
            ppid: number(task, "ppid"),
            state: text(task, "state").chars().next().expect("a letter"),
            uid: number(task, "uid"),
            kthread: Some(task["kthread"].as_bool().expect("yes or no")),
        };
        ((number(task, "pid"), text(task, "address")), said)
    });
    tasks.filter(|((pid, _), _)| *pid != 0).collect()
}

/// What the guest says of every thread, by its id.
fn told(guest: &mut Guest) -> BTreeMap<u64, Said> {
    const FILE: &str = "/tmp/status";
    let wanted = "^(Name|State|Tgid|Pid|PPid|Uid):";
    let _ = one_line(
        guest,
        &format!("grep -hE '{wanted}' /proc/[0-9]*/task/[0-9]*/status >{FILE} 2>/dev/null; true"),
    );
    let mut told = BTreeMap::new();
    for task in format!("\n{}", guest.file(FILE)).split("\nName:\t").skip(1) {
        let word = |name: &str| {
            let found = task.lines().find_map(|line| line.strip_prefix(name));
            let word = found.and_then(|rest| rest.split_whitespace().next());
            word.unwrap_or_else(|| panic!("no {name} in {task:?}"))
        };
        let number = |name: &str| word(name).parse().expect(task);
        let said = Said {
            name: task.lines().next().expect(task).to_owned(),
            tgid: number("Tgid:"),
            ppid: number("PPid:"),
            state: word("State:").chars().next().expect(task),
            uid: number("Uid:"),
            kthread: None,
        };
        told.insert(number("Pid:"), said);
    }
    told
}

/// Holds what was seen before and after against what the guest told between; gives the tasks that were compared.
fn compare(
    before: &BTreeMap<(u64, String), Said>,
    told: &BTreeMap<u64, Said>,
    after: &BTreeMap<(u64, String), Said>,
) -> Vec<(u64, Said)> {
    let (mut compared, mut skipped) = (Vec::new(), Vec::new());
    for ((pid, at), own) in before {
        let Some(later) = after.get(&(*pid, at.clone())) else {
            skipped.push(format!("{pid} ({}) went", own.name));
            continue;
        };
        let guests = told
            .get(pid)
            .unwrap_or_else(|| panic!("{pid} ({}) is not in /proc", own.name));
        let kthread = own.kthread == Some(true);
        // Every thread of the kernel is the second process's, which starts them.
        assert_eq!(kthread, *pid == 2 || own.ppid == 2, "{pid}: {own:?}");
        // The guest tells of its own threads more than their names hold: what a worker works on.
        let named = guests.name == own.name || kthread && guests.name.starts_with(&own.name);
        assert!(named, "{pid}: {own:?} is not {guests:?}");
        let whose = |said: &Said| (said.tgid, said.ppid, said.uid);
        assert_eq!(whose(own), whose(guests), "{pid}: {own:?}");
        assert_eq!(whose(own), whose(later), "{pid}: {own:?}");
        // It ran when one of us looked, or slept in another way.
        let states = [own.state, guests.state, later.state];
        if own.state != later.state || states.iter().any(|state| "RD".contains(*state)) {
            skipped.push(format!("{pid} ({}) was {states:?}", own.name));
            continue;
        }
        assert_eq!(own.state, guests.state, "{pid}: {own:?}");
        compared.push((*pid, own.clone()));
    }
    println!("{} tasks compared; skipped: {skipped:?}", compared.len());
    assert!(skipped.len() <= MOST_SKIPPED, "{skipped:?}");
    compared
}

fn check(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(2));
    populate(&mut guest);
    let before = seen(&guest);
    let told = told(&mut guest);
    let after = seen(&guest);
    let compared = compare(&before, &told, &after);
    let mut states: BTreeMap<char, usize> = BTreeMap::new();
    for (_, said) in &compared {
        *states.entry(said.state).or_default() += 1;
    }
    println!("{stock:?}: states {states:?}");
    let lasting: BTreeSet<char> = states.into_keys().collect();
    assert_eq!(lasting, BTreeSet::from(LASTING));
    let count =
        |which: &dyn Fn(&(u64, Said)) -> bool| compared.iter().filter(|it| which(it)).count();
    assert!(compared.len() >= FEWEST, "only {}", compared.len());
    assert!(count(&|(pid, said)| *pid != said.tgid) >= THREADS);
    assert_eq!(count(&|(_, said)| said.uid == USER), 1);
    assert_clean(&mut guest);
}

#[test]
fn tasks_of_a_6_1_are_what_it_lists_itself() {
    check(LTS_6_1);
}

#[test]
fn tasks_of_a_6_12_are_what_it_lists_itself() {
    check(NEWEST_6_12);
}
