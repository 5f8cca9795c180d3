//! Does code of a package run in the guest before and behind a switch, and has its say?

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::client::Reply;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::revert;
use crate::rules::{sum, tally};
use crate::witness::{assert_clean, one_line};

/// What the editions answer when their hook has put that down, and when not.
const PUT_DOWN: &str = "ENOTTY";
/// The longest that an update may take to be gone once its hook has ended.
const LIMIT: Duration = Duration::from_secs(90);

fn apply(guest: &Guest, stock: Stock, name: &str, deadline: &str) -> Reply {
    let package = stock.edition(name);
    let package = package.to_str().expect("UTF-8");
    guest
        .client
        .call(&["update", "apply", package, "--deadline", deadline])
}

fn applied(guest: &Guest, stock: Stock, name: &str) -> u64 {
    let reply = apply(guest, stock, name, "30s");
    let log = || guest.log.since(0).join("\n");
    assert_eq!(reply.status, 0, "{reply:?}; exopatch said:\n{}", log());
    assert_eq!(reply.json["state"], "applied", "{reply:?}");
    reply.json["id"].as_u64().expect("an id")
}

fn show(guest: &Guest, id: u64) -> Value {
    let shown = guest.client.call(&["update", "show", &id.to_string()]);
    shown.expect("the update")
}

/// How many of ten calls the edition answers.
fn answers(guest: &mut Guest) -> u64 {
    sum(&tally(&one_line(guest, "probe tally 10 1")), PUT_DOWN)
}

/// What the guest's log says of these hooks.
fn said(guest: &mut Guest) -> Vec<String> {
    let said = one_line(guest, "dmesg | grep -o 'hooks_all: .*'; true");
    said.lines().map(str::to_owned).collect()
}

/// A hook for each moment, of which the first decides what the edition answers.
fn all_four(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(2));
    assert_eq!(answers(&mut guest), 0);
    let began = Instant::now();
    let id = applied(&guest, stock, "hooks_all");
    println!("{stock:?}: applied after {:?}", began.elapsed());
    assert_eq!(answers(&mut guest), 10);
    assert_eq!(said(&mut guest), ["hooks_all: applied"]);
    revert(&guest, id);
    assert_eq!(answers(&mut guest), 0);
    let all = [
        "hooks_all: applied",
        "hooks_all: about to go",
        "hooks_all: gone",
    ];
    assert_eq!(said(&mut guest), all);
    assert_clean(&mut guest);
}

#[test]
fn hooks_run_before_and_behind_switches_of_6_1() {
    all_four(LTS_6_1);
}

#[test]
fn hooks_run_before_and_behind_switches_of_6_12() {
    all_four(NEWEST_6_12);
}

/// Waits until nothing of an update is in the guest any more.
fn wait_gone(guest: &Guest, id: u64) {
    let end = Instant::now() + LIMIT;
    loop {
        let update = show(guest, id);
        if update["editions"].as_array().is_none_or(Vec::is_empty) {
            return;
        }
        assert!(Instant::now() < end, "{update:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_hook_that_says_no_keeps_the_switch_from_being_made() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let reply = apply(&guest, stock, "hooks_busy", "30s");
        assert_eq!(reply.refusal("the apply"), "hook_refused", "{reply:?}");
        let said = reply.json.to_string();
        assert!(said.contains("says_no") && said.contains("-16"), "{said}");
        assert_eq!(show(&guest, 1)["state"], "refused");
        assert_eq!(answers(&mut guest), 0);
        wait_gone(&guest, 1);

        let id = applied(&guest, stock, "hooks_stay");
        let call = ["update", "revert", &id.to_string(), "--deadline", "30s"];
        let reply = guest.client.call(&call);
        assert_eq!(reply.refusal("the revert"), "hook_refused", "{reply:?}");
        assert_eq!(show(&guest, id)["state"], "applied");
        revert(&guest, id);
        wait_gone(&guest, id);
        assert_clean(&mut guest);
    }
}

#[test]
fn a_hook_that_oversleeps_keeps_its_code_until_it_has_ended() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let began = Instant::now();
        let reply = apply(&guest, stock, "hooks_slow", "8s");
        assert_eq!(reply.refusal("the apply"), "hook_late", "{reply:?}");
        let said = reply.json.to_string();
        assert!(said.contains("oversleeps"), "{said}");
        let update = show(&guest, 1);
        assert_eq!(update["state"], "refused", "{update:#}");
        assert_eq!(update["editions"][0]["state"], "draining", "{update:#}");
        assert_eq!(answers(&mut guest), 0);
        wait_gone(&guest, 1);
        let slept = began.elapsed();
        assert!(slept >= Duration::from_secs(20), "gone after {slept:?}");
        assert_clean(&mut guest);
    }
}
