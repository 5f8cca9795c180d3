//! Is the stack of every task that sleeps what the guest's own `/proc/PID/stack` says, while the guest is busy?
//!
//! All stacks are followed before and after the guest has read its own. A task that was asleep at both moments may still have run between: it is
//! then looked at again, a few times. Whoever never agrees must have been seen at several places: he is hardly ever at rest. What the guest leaves out (its scheduler's and its locks' functions) is left out here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use patcher::guest::{Guest as _, PausedGuest as _, Registers as _};
use patcher::kernel::locate::Kernel;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::stacks;
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

const CPUS: u32 = 2;
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
/// How often a task is looked at until both agree.
const ROUNDS: usize = 6;
/// The process that waits while another reads for it, and asks when nobody does: it is never seen at the same place twice.
const READER: u32 = 1;
/// So many tasks sleep in the smallest guest.
const FEWEST: usize = 30;
/// Tasks that go to sleep and wake in many ways, and some that only sleep.
const LOAD: &str = "renice -n 19 $$; probe churn 4 & sleep 9999 & cat /dev/kmsg >/dev/null & \
    while :; do usleep 50000; done";

/// What sleeps, by the thread's id: its name, and the functions that it returns into.
type Asleep = BTreeMap<u32, (String, Vec<String>)>;

/// The functions whose frames the guest leaves out, as ranges of addresses.
fn left_out(kernel: &Kernel) -> [std::ops::Range<u64>; 2] {
    ["sched", "lock"].map(|part| {
        let of = |end| {
            let symbol = format!("__{part}_text_{end}");
            kernel.symbol(&symbol).expect(&symbol).0
        };
        of("start")..of("end")
    })
}

/// The tasks that sleep now, as they are seen from outside: each must have a reliable stack.
fn seen(guest: &Inside, kernel: &Kernel) -> Asleep {
    let left_out = left_out(kernel);
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let paused = machine
        .pause(Instant::now() + PAUSE_LIMIT)
        .expect("a pause");
    let found = stacks(kernel, &paused, paused.vcpus(), &[]).expect("the stacks");
    paused.resume().expect("a guest that goes on");
    let asleep = found.stacks.iter().filter_map(|stack| {
        let Who::Task { pid, name } = &stack.who else {
            return None;
        };
        let frames = stack.frames.iter();
        let shown = frames.filter(|frame| !left_out.iter().any(|text| text.contains(&frame.ip.0)));
        let shown: Vec<_> = shown.map(|frame| frame.describe(kernel)).collect();
        assert!(
            stack.end.is_ok(),
            "{pid} ({name}): {:?} after {shown:?}",
            stack.end
        );
        let compared = *pid != 0 && *pid != READER;
        compared.then(|| (*pid, (name.clone(), shown)))
    });
    asleep.collect()
}

/// What the guest says of every thread.
fn told(guest: &Inside) -> BTreeMap<u32, Vec<String>> {
    let _ = guest.must("grep -H . /proc/[0-9]*/task/[0-9]*/stack >/tmp/stacks 2>/dev/null; true");
    let mut told: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for line in guest.file("/tmp/stacks").lines() {
        let (thread, frame) = line.split_once("/stack:[<0>] ").expect(line);
        let (_, pid) = thread.rsplit_once('/').expect(line);
        let frames = told.entry(pid.parse().expect(line)).or_default();
        frames.push(frame.to_owned());
    }
    told
}

fn every_sleeper(stock: Stock) {
    let guest = Inside::boot(stock, CPUS);
    let kernel = guest.kernel(stock);
    let _ = guest.must(&format!("sh -c '{LOAD}' >/dev/null 2>&1 &"));
    let (mut equal, mut moved, mut retries) = (BTreeSet::new(), BTreeMap::new(), 0);
    let mut places: BTreeMap<u32, BTreeSet<Vec<String>>> = BTreeMap::new();
    for round in 0..ROUNDS {
        let before = seen(&guest, &kernel);
        let told = told(&guest);
        let after = seen(&guest, &kernel);
        moved.clear();
        for (pid, (_, frames)) in before.iter().chain(&after) {
            places.entry(*pid).or_default().insert(frames.clone());
        }
        for (pid, asleep) in before {
            let stayed = after.get(&pid) == Some(&asleep);
            let (name, frames) = asleep;
            match told.get(&pid) {
                Some(told) if stayed && *told == frames => drop(equal.insert(pid)),
                // It was gone before the guest could say anything of it.
                None if !after.contains_key(&pid) => {}
                told if !equal.contains(&pid) => {
                    moved.insert(pid, (name, frames, told.cloned()));
                }
                _ => {}
            }
        }
        if moved.is_empty() && round > 0 {
            break;
        }
        retries += moved.len();
    }
    println!(
        "{stock:?}: {} sleeping tasks equal, {retries} times looked again, {} never at rest",
        equal.len(),
        moved.len()
    );
    moved.retain(|pid, _| places.get(pid).is_none_or(|places| places.len() < 2));
    assert!(equal.len() >= FEWEST, "only {} tasks", equal.len());
    assert!(moved.is_empty(), "{moved:#?}");
}

#[test]
fn every_sleeping_stack_of_a_busy_6_1_is_its_own() {
    every_sleeper(LTS_6_1);
}

#[test]
fn every_sleeping_stack_of_a_busy_6_12_is_its_own() {
    every_sleeper(NEWEST_6_12);
}
