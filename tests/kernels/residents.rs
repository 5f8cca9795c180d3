//! Are threads that sleep in code of ours seen there, and left in peace, as long as they stay?

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert, show};
use crate::stacking::wait_gone;
use crate::witness::{assert_clean, one_line};

/// The longest that a thread takes to fall asleep.
const LIMIT: Duration = Duration::from_secs(20);

/// The places of a reliable stack, from the innermost out: `function [of what]`; `None` while it is not one that `wanted` accepts.
fn places(guest: &Guest, pid: &str, wanted: &str) -> Option<Vec<String>> {
    let seen = guest
        .client
        .call(&["kernel", "stack", pid, "--deadline", "30s"]);
    let seen = seen.expect("the stack");
    let stacks = seen["stacks"].as_array().expect("stacks");
    let [stack] = stacks.as_slice() else {
        panic!("not one stack: {seen}");
    };
    assert_eq!(stack["reliable"], true, "{stack:#}");
    let place = |frame: &Value| {
        let place = frame["place"].as_str().expect("every frame has a name");
        let (function, rest) = place.split_once('+').expect("an offset");
        let of = rest.split_once(' ').map(|(_, of)| format!(" {of}"));
        format!("{function}{}", of.unwrap_or_default())
    };
    let frames = stack["frames"].as_array().expect("frames").iter();
    let frames: Vec<String> = frames.map(place).collect();
    frames.iter().any(|frame| frame == wanted).then_some(frames)
}

/// Starts a process that sleeps, and waits until it does so beneath `function`.
fn sleeper(guest: &mut Guest, function: &str) -> (String, Vec<String>) {
    let pid = one_line(guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    let pid = pid.trim().to_owned();
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = places(guest, &pid, function) {
            return (pid, found);
        }
        assert!(Instant::now() < end, "{pid} does not sleep in {function}");
    }
}

/// The frames from the sleeping function out to its caller, with what `of` says between.
fn assert_beneath(frames: &[String], of: &str) {
    let first = frames
        .iter()
        .position(|frame| frame == "hrtimer_nanosleep")
        .unwrap_or_else(|| panic!("no original in {frames:?}"));
    let edition = format!("hrtimer_nanosleep [{of}]");
    assert_eq!(frames.get(first + 1), Some(&edition), "{frames:?}");
    let beyond = frames.get(first + 2).expect("a caller");
    assert!(beyond.contains("sleep"), "{frames:?}");
}

/// Threads sleep in an edition while it is in effect, when it is reverted, and when another takes its place.
fn sleeps(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let package = stock.edition("hrtimer_nanosleep_same");
    let (before, plain) = sleeper(&mut guest, "hrtimer_nanosleep");
    assert!(plain.iter().all(|frame| !frame.contains('[')), "{plain:?}");
    let first = apply(&guest, &package);
    let edition = format!("hrtimer_nanosleep [update {first}]");
    let (old, frames) = sleeper(&mut guest, &edition);
    println!("{stock:?}: {frames:?}");
    assert_beneath(&frames, &format!("update {first}"));
    // The one that fell asleep earlier is not in it.
    let still = places(&guest, &before, "hrtimer_nanosleep").expect("it sleeps");
    assert_eq!(still, plain);

    revert(&guest, first);
    let reverted = "hrtimer_nanosleep [a reverted update]";
    let frames = places(&guest, &old, reverted).expect("it still sleeps there");
    assert_beneath(&frames, "a reverted update");
    // Its room stays its own as long as that takes.
    assert_drains(&guest, first, &old);
    let second = apply(&guest, &package);
    assert_ne!(place_of(&guest, second), place_of(&guest, first));
    let (new, frames) = sleeper(&mut guest, &format!("hrtimer_nanosleep [update {second}]"));
    assert_beneath(&frames, &format!("update {second}"));
    let frames = places(&guest, &old, reverted).expect("it still sleeps there");
    assert_beneath(&frames, "a reverted update");

    // All of them come back through where they sleep.
    one_line(&mut guest, &format!("kill {before} {old} {new}"));
    let gone = format!(
        "while [ -e /proc/{before} -o -e /proc/{old} -o -e /proc/{new} ]; do usleep 1000; done"
    );
    one_line(&mut guest, &gone);
    revert(&guest, second);
    wait_gone(&guest, first);
    wait_gone(&guest, second);
    assert_clean(&mut guest);
}

/// The only edition of an update.
fn edition(guest: &Guest, id: u64) -> Value {
    show(guest, id)["editions"][0].clone()
}

fn place_of(guest: &Guest, id: u64) -> String {
    let edition = edition(guest, id);
    edition["at"].as_str().expect("a place").to_owned()
}

/// The update has yet to be left by the thread `pid`, and says so.
fn assert_drains(guest: &Guest, id: u64, pid: &str) {
    let end = Instant::now() + LIMIT;
    loop {
        let edition = edition(guest, id);
        assert_eq!(edition["state"], "draining", "{edition:#}");
        let why = edition["why"].as_str().unwrap_or_default();
        if why.contains(&format!("task {pid} ")) {
            return;
        }
        assert!(Instant::now() < end, "{edition:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn threads_sleep_in_editions_of_6_1_and_are_seen_there() {
    sleeps(LTS_6_1);
}

#[test]
fn threads_sleep_in_editions_of_6_12_and_are_seen_there() {
    sleeps(NEWEST_6_12);
}
