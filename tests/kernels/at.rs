//! Does a guest stop where it was told to, once for each that comes, and does it never know?

use serde_json::Value;
use tests::client::Client;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::{assert_clean, count, one_line};

/// Every process comes to it often.
const BUSY: &str = "handle_mm_fault";
/// Steps that a process of the guest makes meanwhile, unless `EXOPATCH_STEPS` says otherwise.
const STEPS: usize = 2000;

fn call(client: &Client, place: &str, more: &[&str]) -> tests::client::Reply {
    client.call(&[&["kernel", "stack", "--at", place], more].concat())
}

/// The stacks of `count` vCPUs that come to `place`, each of which must be reliable and begin at the same address.
fn come(guest: &Guest, place: &str, count: usize) -> String {
    let count_text = count.to_string();
    let more = ["--count", &count_text, "--deadline", "30s"];
    let seen = call(&guest.client, place, &more).expect(place);
    assert!(seen["paused_us"].as_u64() > Some(0), "{seen}");
    let stacks = seen["stacks"].as_array().expect("stacks");
    assert_eq!(stacks.len(), count, "{seen:#}");
    let address = |stack: &Value| {
        assert_eq!(stack["reliable"], true, "{stack:#}");
        assert_eq!(stack["frames"][0]["kind"], "runs", "{stack:#}");
        assert!(stack["cpu"].is_u64() && stack["pid"].is_u64(), "{stack:#}");
        stack["frames"][0]["address"]
            .as_str()
            .expect("an address")
            .to_owned()
    };
    let first = address(&stacks[0]);
    assert!(
        stacks.iter().all(|stack| address(stack) == first),
        "{seen:#}"
    );
    first
}

/// The addresses of a function's first byte and of an instruction some way in, with that instruction's offset.
fn places(guest: &Guest) -> (String, String, u64) {
    let seen = guest
        .client
        .call(&["kernel", "disasm", BUSY])
        .expect("code");
    let lines = seen["instructions"].as_array().expect("instructions");
    let inner = lines.iter().filter(|line| line["held_by"] == "both").nth(5);
    let inner = inner.expect("a sixth instruction");
    let text = |of: &Value| of["address"].as_str().expect("an address").to_owned();
    (
        text(&seen),
        text(inner),
        inner["offset"].as_u64().expect("an offset"),
    )
}

/// A process that is stepped meanwhile makes every step: debug exceptions of the guest's own reach it.
fn steps(guest: &mut Guest) {
    let wanted = count("EXOPATCH_STEPS", STEPS);
    let mark = guest.console.mark();
    guest.type_line(&format!("probe steps {wanted} &"));
    let mut stops = 0;
    let done = |guest: &Guest| {
        guest
            .console
            .since(mark)
            .iter()
            .any(|line| line.contains("steps: "))
    };
    while !done(guest) {
        let _ = come(guest, BUSY, 20);
        stops += 20;
    }
    let told = guest.wait_line(mark, "steps", |line| line.contains("steps: made"));
    let told = guest.console.since(told).swap_remove(0);
    println!("{told}, over {stops} stops");
    assert!(
        told.contains(&format!("made {wanted} of {wanted}")),
        "{told}"
    );
}

/// A guest with breakpoints of its own gets none of ours. They come and go with its tasks: until one is seen, ours may be there, and the guest's do
/// not work. Once that was seen, none is lost.
fn own_breakpoints(guest: &mut Guest) {
    let mark = guest.console.mark();
    guest.type_line(
        "(for cpu in 0 1; do probe breakpoint 6 & done; wait; echo settled; probe breakpoint 1)",
    );
    for _ in 0..2 {
        let _ = guest.wait_line(mark, "breakpoint", |line| line.contains("breakpoint: set"));
    }
    let refused = call(&guest.client, "kernel_restart", &["--deadline", "10s"]);
    assert_eq!(
        refused.refusal("own breakpoints"),
        "guest_has_breakpoints",
        "{refused:?}"
    );
    let (_, hits) = calls_and_hits(guest, mark);
    assert!(hits > 0);
    let settled = guest.wait_line(mark, "the end of both", |line| line.trim() == "settled");
    let (calls, hits) = calls_and_hits(guest, settled);
    assert!(calls == hits && calls > 0, "{hits} of {calls}");
}

/// What a program of the guest says of its breakpoint.
fn calls_and_hits(guest: &Guest, mark: usize) -> (u64, u64) {
    let told = guest.wait_line(mark, "hits", |line| line.contains("breakpoint: calls"));
    let told = guest.console.since(told).swap_remove(0);
    let mut numbers = told
        .split_whitespace()
        .filter_map(|word| word.parse::<u64>().ok());
    numbers.next().zip(numbers.next()).expect("two numbers")
}

fn refusals(guest: &Guest) {
    for (place, code) in [
        ("handle_mm_fault+1", "no_instruction"),
        ("handle_mm_fault+0x100000", "beyond_function"),
        ("no_such_function", "no_such_symbol"),
        ("jiffies", "not_a_function"),
        ("kernel_restart", "nobody_came"),
    ] {
        let reply = call(&guest.client, place, &["--deadline", "1s"]);
        assert_eq!(reply.refusal(place), code, "{reply:?}");
    }
    let _ = guest.client.call(&["vm", "pause"]).expect("the pause");
    let reply = call(&guest.client, BUSY, &[]);
    assert_eq!(reply.refusal(BUSY), "guest_paused", "{reply:?}");
    let vm = guest.client.call(&["vm", "status"]).expect("the state");
    assert_eq!(vm["state"], "paused", "{vm:#}");
    let _ = guest.client.call(&["vm", "resume"]).expect("the resume");
}

fn stops_where_it_is_told(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(2));
    let _ = one_line(&mut guest, "probe churn 2 >/dev/null 2>&1 & echo churns");
    let (entry, inner, offset) = places(&guest);
    assert_eq!(come(&guest, BUSY, 5), entry);
    assert_eq!(come(&guest, &entry, 1), entry);
    assert_eq!(come(&guest, &format!("{BUSY}+{offset:#x}"), 5), inner);
    steps(&mut guest);
    refusals(&guest);
    own_breakpoints(&mut guest);
    assert_eq!(come(&guest, BUSY, 1), entry);
    assert_clean(&mut guest);
}

#[test]
fn a_6_1_stops_where_it_is_told_and_does_not_know() {
    stops_where_it_is_told(LTS_6_1);
}

#[test]
fn a_6_12_stops_where_it_is_told_and_does_not_know() {
    stops_where_it_is_told(NEWEST_6_12);
}
