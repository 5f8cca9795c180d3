//! Can the editions of a running kernel be watched from outside while a guest program calls: in `/metrics` and `exopatch top`?

use std::collections::BTreeMap;

use serde_json::Value;
use tests::api::Api;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::assert_clean;

/// Calls of the guest's program, under its own name and under another.
const CALLS: u32 = 40;
const OTHERS: u32 = 25;

/// The samples of the page, by name with labels.
fn metrics(guest: &Guest) -> BTreeMap<String, f64> {
    let mut api = Api::connect(guest.client.socket()).expect("the API");
    let page = api.text("GET /metrics", b"").expect("the page");
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    let samples = samples.map(|line| {
        let (name, value) = line.rsplit_once(' ').expect("a sample");
        (name.to_owned(), value.parse().expect("a number"))
    });
    samples.collect()
}

/// What one look of `exopatch top` says of `unix_ioctl`, by edition: its calls, and how many a second.
fn top(guest: &Guest) -> (Value, BTreeMap<Option<u64>, (u64, f64)>) {
    let args = ["top", "--once", "--json", "--interval", "2s"];
    let seen = guest.client.call(&args).expect("a look");
    let rows = seen["functions"].as_array().expect("functions").iter();
    let rows = rows.filter(|row| row["function"] == "unix_ioctl");
    let figures = rows.map(|row| {
        let calls = row["calls"].as_u64().expect("calls");
        let rate = row["calls_per_second"].as_f64().expect("a rate");
        (row["update"].as_u64(), (calls, rate))
    });
    let figures = figures.collect();
    (seen, figures)
}

fn is_watched(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let package = stock.edition("unix_ioctl_notty");
    let path = package.to_str().expect("paths of tests are UTF-8");
    let before = metrics(&guest);
    assert_eq!(before["exopatch_vcpus"], 2.0, "{before:#?}");
    assert_eq!(before["exopatch_pauses_total{by=\"exopatch\"}"], 0.0);
    let rule = ["--count", "--when", "comm = \"other\"", "--deadline", "20s"];
    let update = guest
        .client
        .call(&[&["update", "apply", path], &rule[..]].concat())
        .expect("the apply");
    assert_eq!(update["counted"], true, "{update:#}");

    // So many for each edition, and not one more.
    let asked = guest.sh(&format!("probe siocatmark {CALLS} 1 >/dev/null"));
    assert_eq!(asked.status, 0, "{}", asked.text());
    let others = guest.sh(&format!(
        "cp /bin/probe /tmp/other && /tmp/other siocatmark {OTHERS} 1 | tail -n 1"
    ));
    assert!(others.text().contains("ENOTTY"), "{}", others.text());
    let counted = metrics(&guest);
    let calls = |edition: &str| {
        let name = format!("exopatch_calls_total{{function=\"unix_ioctl\",edition=\"{edition}\"}}");
        counted.get(&name).copied()
    };
    assert_eq!(calls("original"), Some(f64::from(CALLS)), "{counted:#?}");
    assert_eq!(calls("1"), Some(f64::from(OTHERS)), "{counted:#?}");
    assert_eq!(counted["exopatch_updates{state=\"applied\"}"], 1.0);
    assert_eq!(counted["exopatch_editions{state=\"active\"}"], 1.0);
    let pauses = counted["exopatch_pause_seconds_count"];
    assert!(pauses >= 1.0 && counted["exopatch_pause_seconds_sum"] > 0.0);
    assert!(counted["exopatch_last_pause_seconds"] > 0.0);
    let used = counted["exopatch_arena_used_bytes"];
    assert!(0.0 < used && used < counted["exopatch_arena_bytes"]);

    // Calls that go on are seen to go on; and watching stops nobody.
    let started = guest.sh("probe siocatmark 0 1 >/dev/null & echo $! >/tmp/pid");
    assert_eq!(started.status, 0, "{}", started.text());
    let (seen, figures) = top(&guest);
    println!("{stock:?}: {figures:?}");
    let (original, rate) = figures[&None];
    assert!(original > u64::from(CALLS) && rate > 0.0, "{seen:#}");
    assert_eq!(figures[&Some(1)], (u64::from(OTHERS), 0.0), "{seen:#}");
    assert_eq!(metrics(&guest)["exopatch_pause_seconds_count"], pauses);
    assert_eq!(seen["pauses"]["by_exopatch"].as_f64(), Some(pauses));
    let ended = guest.sh("kill $(cat /tmp/pid)");
    assert_eq!(ended.status, 0, "{}", ended.text());
    assert_clean(&mut guest);
}

#[test]
fn editions_of_6_1_are_watched() {
    is_watched(LTS_6_1);
}

#[test]
fn editions_of_6_12_are_watched() {
    is_watched(NEWEST_6_12);
}
