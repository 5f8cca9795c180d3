//! Do functions that belong together change together, while programs call them? A pair of editions hands on what only its own generation can read:
//! a call that got to two generations says so.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::api::Api;
use tests::figures;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{show, wait_state};
use crate::rules::{Tally, applied, counted, sum, tally};
use crate::stacking::wait_gone;
use crate::witness::{assert_clean, count, one_line};

/// What a call answers that was handed on to another generation than its own.
pub(crate) const MIXED: [&str; 2] = ["EBADE", "EFAULT"];
/// What the generations answer: the kernel's own, `pair_one`, `pair_two`.
const ANSWERS: [&str; 3] = ["OK", "EXDEV", "ETIME"];
/// Switches in a row, unless `EXOPATCH_SWITCHES` says otherwise.
const SWITCHES: usize = 200;
/// The longest that a switch takes until nobody is bound.
const LIMIT: Duration = Duration::from_secs(30);
/// Callers: so many that some always are between the two functions, while none always is.
const CALLERS: &str = "probe tally 0 8 1 500 >/tmp/said & echo $!";
/// Callers of whom often none is between the two functions, for switches that wait for that.
const FEW_CALLERS: &str = "probe tally 0 2 1 100000 >/tmp/said & echo $!";
/// Switches of those.
const FEW_SWITCHES: usize = 40;
/// The model that waits until no thread is in a function of the pair.
const QUIESCENT: &str = "&model=quiescent";

/// A machine's updates, over one connection.
struct Updates {
    api: Api,
    packages: [Vec<u8>; 2],
}

impl Updates {
    fn of(guest: &Guest, stock: Stock) -> Self {
        let package = |name| std::fs::read(stock.edition(name)).expect("a package");
        Self {
            api: Api::connect(guest.client.socket()).expect("the API"),
            packages: ["pair_one", "pair_two"].map(package),
        }
    }

    fn call(&mut self, guest: &Guest, call: &str, body: &[u8]) -> Value {
        let answer = self.api.call(call, body);
        answer.unwrap_or_else(|why| panic!("{why}\n{}", guest.condition()))
    }

    /// Applies a generation and gives its number; all have switched then.
    fn apply(&mut self, guest: &Guest, generation: usize, options: &str) -> u64 {
        let body = self.packages[generation].clone();
        let call = format!("POST /v1/updates?deadline_ms=20000{options}");
        let id = self.call(guest, &call, &body)["id"].as_u64();
        let id = id.expect("an id");
        self.wait(guest, id, "applied");
        id
    }

    /// Uses a generation for other calls; all have switched then.
    fn reuse(&mut self, guest: &Guest, id: u64, how: &str) {
        let call = format!("POST /v1/updates/{id}/use{how}&deadline_ms=20000");
        let _ = self.call(guest, &call, b"");
        self.wait(guest, id, "applied");
    }

    fn revert(&mut self, guest: &Guest, id: u64) {
        let call = format!("POST /v1/updates/{id}/revert?deadline_ms=20000");
        let _ = self.call(guest, &call, b"");
        self.wait(guest, id, "reverted");
    }

    /// Waits until an update is in this state.
    fn wait(&mut self, guest: &Guest, id: u64, state: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            let update = self.call(guest, &format!("GET /v1/updates/{id}"), b"");
            if update["state"] == state {
                return;
            }
            assert!(Instant::now() < end, "not {state}: {update:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Has the callers end, and gives what they counted.
fn end(guest: &mut Guest, pid: &str) -> Tally {
    let end =
        format!("kill -USR2 {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said");
    tally(&one_line(guest, &end))
}

/// Switches between generations in every way that there is: on the original, in another's place, on top of another, used for other calls, taken
/// back. Gives how many switches there were.
fn switch(guest: &Guest, updates: &mut Updates, switches: usize, model: &str) -> usize {
    let mut done = 0;
    for round in (0..3).cycle() {
        if done >= switches {
            break;
        }
        let rule = ["", "&rule=share%201%2F1", "&count=true"][round];
        let one = updates.apply(guest, 0, &format!("{model}{rule}"));
        let instead = format!("{model}&instead_of={one}");
        let two = updates.apply(guest, 1, &instead);
        let three = updates.apply(guest, 0, model);
        // For nobody any more, and for all but nobody: that is everybody, by a handler.
        updates.reuse(guest, three, "?rule=cpu%20%3D%2077");
        updates.reuse(guest, three, "?rule=cpu%20%3C%2077");
        updates.revert(guest, three);
        updates.revert(guest, two);
        done += 7;
        if done % 70 == 0 {
            println!("{done} switches");
        }
    }
    done
}

/// No call gets to two generations, however often these change by a model.
fn never_mixed(stock: Stock, model: &str, callers: &str, switches: usize) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let pid = one_line(&mut guest, callers);
    let mut updates = Updates::of(&guest, stock);
    let done = switch(&guest, &mut updates, switches, model);
    let tally = end(&mut guest, &pid);
    println!(
        "{stock:?}: {done} switches under {} calls: {tally:?}",
        sum(&tally, "")
    );
    let mixed: u64 = MIXED.iter().map(|answer| sum(&tally, answer)).sum();
    // Before it is judged: what was seen counts, however often this is tried.
    figures::note(&serde_json::json!({ "switches": done, "calls_of_two_generations": mixed }));
    assert_eq!(mixed, 0, "{tally:?}");
    let all: u64 = ANSWERS.iter().map(|answer| sum(&tally, answer)).sum();
    assert_eq!(all, sum(&tally, ""), "{tally:?}");
    for answer in ANSWERS {
        assert!(sum(&tally, answer) > 0, "{answer}: {tally:?}");
    }
    assert_clean(&mut guest);
}

#[test]
fn a_pair_of_6_1_is_never_of_two_generations() {
    never_mixed(LTS_6_1, "", CALLERS, count("EXOPATCH_SWITCHES", SWITCHES));
}

#[test]
fn a_pair_of_6_12_is_never_of_two_generations() {
    never_mixed(
        NEWEST_6_12,
        "",
        CALLERS,
        count("EXOPATCH_SWITCHES", SWITCHES),
    );
}

#[test]
fn a_pair_of_6_1_that_waits_for_nobody_within_is_never_of_two_generations() {
    never_mixed(LTS_6_1, QUIESCENT, FEW_CALLERS, FEW_SWITCHES);
}

#[test]
fn a_pair_of_6_12_that_waits_for_nobody_within_is_never_of_two_generations() {
    never_mixed(NEWEST_6_12, QUIESCENT, FEW_CALLERS, FEW_SWITCHES);
}

/// The witness itself: without a model that keeps them together, calls do get to two generations.
fn mixed(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let pid = one_line(&mut guest, CALLERS);
    let mut updates = Updates::of(&guest, stock);
    let one = updates.apply(&guest, 0, "&model=immediate");
    for _ in 0..10 {
        let two = updates.apply(&guest, 1, "&model=immediate");
        // Of several functions, a revert keeps together what it finds together.
        updates.revert(&guest, two);
    }
    updates.revert(&guest, one);
    let tally = end(&mut guest, &pid);
    println!("{stock:?}: {tally:?}");
    assert!(sum(&tally, "EBADE") > 0, "{tally:?}");
    assert_clean(&mut guest);
}

#[test]
fn a_pair_of_6_1_that_is_not_kept_together_is_seen() {
    mixed(LTS_6_1);
}

#[test]
fn a_pair_of_6_12_that_is_not_kept_together_is_seen() {
    mixed(NEWEST_6_12);
}

/// Every call is counted once, by the generation that answered it, while these change.
fn none_lost(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let one = applied(&guest, stock, "pair_one", &["--count"]);
    let pid = one_line(&mut guest, CALLERS);
    let mut updates = Updates::of(&guest, stock);
    for _ in 0..10 {
        let two = updates.apply(&guest, 1, "&count=true");
        std::thread::sleep(Duration::from_millis(100));
        updates.revert(&guest, two);
    }
    let tally = end(&mut guest, &pid);
    let counted = counted(&guest, "unix_ioctl");
    println!("{stock:?}: {counted:?}, {tally:?}");
    // The others have gone, and their counts with them.
    assert_eq!(counted.get(&one), Some(&sum(&tally, "EXDEV")), "{tally:?}");
    let two = sum(&tally, "ETIME");
    assert!(
        two > 0 && two + sum(&tally, "EXDEV") == sum(&tally, ""),
        "{tally:?}"
    );
    assert_clean(&mut guest);
}

#[test]
fn every_call_of_a_pair_of_6_1_is_counted() {
    none_lost(LTS_6_1);
}

#[test]
fn every_call_of_a_pair_of_6_12_is_counted() {
    none_lost(NEWEST_6_12);
}

/// Starts one that sleeps between the two functions, and gives its number.
pub(crate) fn sleeper(guest: &mut Guest) -> String {
    let start = "cp /bin/probe /tmp/sleeper; /tmp/sleeper tally 1 0 1 >/tmp/slept & echo $!";
    let pid = one_line(guest, start);
    let asleep = format!("until grep -q sock_ioctl /proc/{pid}/stack; do usleep 20000; done");
    let _ = one_line(guest, &asleep);
    pid
}

/// Wakes the sleeper, and gives what its call answered.
pub(crate) fn woken(guest: &mut Guest, pid: &str) -> String {
    let wake = format!(
        "kill -USR1 {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/slept"
    );
    one_line(guest, &wake)
}

/// What a call answers that begins now.
pub(crate) fn asked(guest: &mut Guest) -> String {
    let said = one_line(guest, "probe tally 1 0 1");
    said.split_whitespace()
        .nth(3)
        .unwrap_or_default()
        .to_owned()
}

/// A switch that one task is too deep asleep to make: all others make it, and this one is named until it has.
fn one_asleep(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let one = applied(&guest, stock, "pair_one", &[]);
    let package = stock.edition("pair_two");
    let package = package.to_str().expect("UTF-8");
    let begin = |guest: &Guest| {
        let call = ["update", "apply", package, "--deadline", "2s"];
        let update = guest.client.call(&call).expect("an apply that goes on");
        assert_eq!(update["state"], "switching", "{update:#}");
        update["id"].as_u64().expect("an id")
    };
    let named = |guest: &Guest, id: u64, pid: &str| {
        let shown = show(guest, id);
        let bound = shown["bound"].as_array().cloned().unwrap_or_default();
        assert_eq!(bound.len(), 1, "{shown:#}");
        let who = bound[0]["who"].as_str().unwrap_or_default();
        assert!(who.contains(pid) && who.contains("sleeper"), "{shown:#}");
        let frames = bound[0]["frames"].to_string();
        let ours = |frame: &&str| frame.contains("sock_ioctl+") && frame.contains("[exopatch]");
        assert!(frames.split(',').any(|frame| ours(&frame)), "{shown:#}");
    };

    // Drained when it wakes.
    let pid = sleeper(&mut guest);
    let two = begin(&guest);
    named(&guest, two, &pid);
    assert_eq!(asked(&mut guest), "ETIME", "{stock:?}");
    let refused = guest
        .client
        .call(&["update", "apply", package, "--deadline", "2s"]);
    assert_eq!(refused.refusal("another switch of it"), "update_switching");
    let slept = woken(&mut guest, &pid);
    assert!(slept.contains("EXDEV 1"), "{stock:?}: {slept}");
    wait_state(&guest, two, "applied");
    assert!(show(&guest, two)["bound"].is_null());

    // A revert, in which one sleeps in what goes; it is waited for, too.
    let pid = sleeper(&mut guest);
    let call = ["update", "revert", &two.to_string(), "--deadline", "2s"];
    let update = guest.client.call(&call).expect("a revert that goes on");
    assert_eq!(update["state"], "reverting", "{update:#}");
    named(&guest, two, &pid);
    assert_eq!(asked(&mut guest), "EXDEV", "{stock:?}");
    assert!(woken(&mut guest, &pid).contains("ETIME 1"), "{stock:?}");
    wait_state(&guest, two, "reverted");
    wait_gone(&guest, two);

    // Taken back while it is under way: nobody notices. The sleeper could not go on with a third side.
    let pid = sleeper(&mut guest);
    let two = begin(&guest);
    let instead_of = two.to_string();
    let third = ["update", "apply", package, "--instead-of", &instead_of];
    let refused = guest.client.call(&third);
    assert_eq!(refused.refusal("a third side"), "update_switching");
    let call = ["update", "revert", &two.to_string(), "--deadline", "5s"];
    let update = guest.client.call(&call).expect("the revert");
    assert_eq!(update["state"], "reverted", "{update:#}");
    assert_eq!(asked(&mut guest), "EXDEV", "{stock:?}");
    assert!(woken(&mut guest, &pid).contains("EXDEV 1"), "{stock:?}");
    wait_gone(&guest, two);

    // Forced: the sleeper's call is of two generations, and says so.
    let pid = sleeper(&mut guest);
    let two = begin(&guest);
    let call = ["update", "force", &two.to_string()];
    let update = guest.client.call(&call).expect("the force");
    assert_eq!(update["state"], "applied", "{update:#}");
    let again = guest.client.call(&call);
    assert_eq!(again.refusal("nothing to force"), "nothing_to_force");
    assert_eq!(asked(&mut guest), "ETIME", "{stock:?}");
    assert!(woken(&mut guest, &pid).contains("EBADE 1"), "{stock:?}");
    for id in [two, one] {
        let call = ["update", "revert", &id.to_string()];
        let _ = guest.client.call(&call).expect("the revert");
        wait_state(&guest, id, "reverted");
        wait_gone(&guest, id);
    }
    assert_eq!(asked(&mut guest), "OK", "{stock:?}");
    assert_clean(&mut guest);
}

#[test]
fn one_asleep_in_6_1_holds_up_nobody_else() {
    one_asleep(LTS_6_1);
}

#[test]
fn one_asleep_in_6_12_holds_up_nobody_else() {
    one_asleep(NEWEST_6_12);
}
