//! Is BPF code in the guest seen from outside: its names, the calls that it put into functions, and threads asleep beneath it?

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, one_line};

/// The longest that a thread takes to fall asleep.
const LIMIT: Duration = Duration::from_secs(20);
/// Functions of the guest's load that BPF programs trace.
const TRACED: [&str; 6] = [
    "handle_mm_fault",
    "hrtimer_nanosleep",
    "security_file_permission",
    "unix_ioctl",
    "vfs_read",
    "vfs_write",
];

fn call(guest: &Guest, view: &[&str]) -> Value {
    let args = [&["kernel"], view, &["--deadline", "30s"]].concat();
    guest.client.call(&args).expect(view[0])
}

/// Boots a guest with programs attached, which a process keeps there.
fn boot(stock: Stock) -> Guest {
    let mut guest = Guest::boot(&Options::new(stock));
    let mark = guest.console.mark();
    one_line(
        &mut guest,
        "probe bpf 1 >/tmp/bpf 2>&1 & until grep -q . /tmp/bpf; do usleep 10000; done; cat /tmp/bpf",
    );
    let said = guest.console.since(mark).join(" ");
    assert!(said.contains("bpf: 8 programs"), "{said}");
    guest
}

/// Names and addresses of BPF's code, as `/proc/kallsyms` has them.
fn names(guest: &mut Guest) {
    let told = one_line(guest, "grep -F '[bpf]' /proc/kallsyms");
    let told: Vec<String> = told
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [at, kind, name, module] = words[..] else {
                panic!("{line:?} is no symbol");
            };
            let at = u64::from_str_radix(at, 16).expect("an address");
            format!("{at:#x} {kind} {name} {module}")
        })
        .collect();
    let seen = call(guest, &["symbols"]);
    let symbols = seen["symbols"].as_array().expect("symbols").iter();
    let text = |symbol: &Value, field: &str| symbol[field].as_str().unwrap_or_default().to_owned();
    let mut seen: Vec<String> = symbols
        .filter(|symbol| symbol["module"] == "bpf")
        .map(|symbol| {
            let field = |name| text(symbol, name);
            format!(
                "{} {} {} [{}]",
                field("address"),
                field("kind"),
                field("name"),
                field("module")
            )
        })
        .collect();
    let mut told = told;
    told.sort();
    seen.sort();
    println!("BPF's code: {seen:?}");
    assert_eq!(seen, told);
    for kind in ["bpf_prog_", "bpf_trampoline_", "bpf_dispatcher_"] {
        assert!(seen.iter().any(|name| name.contains(kind)), "no {kind}");
    }
}

/// The text differs from the image where BPF put its calls, and that is known.
fn text(guest: &Guest) {
    let seen = call(guest, &["text", "--changed", "--each"]);
    let causes = &seen["causes"];
    println!("text: {causes}");
    assert!(causes["unexplained"].is_null(), "{causes}");
    // A byte of a call may happen to be as it was: one call is one or several places.
    let differences = seen["differences"].as_array().expect("differences").iter();
    let bpf = differences.filter(|found| found["cause"] == "bpf");
    let functions: BTreeSet<_> = bpf.filter_map(|found| found["function"].as_str()).collect();
    assert_eq!(functions, BTreeSet::from(TRACED));
    // Each run of the packet program makes the kernel patch the way to it: meanwhile nothing is compared.
    let end = Instant::now() + LIMIT;
    let seen = loop {
        let seen = call(guest, &["disasm", "unix_ioctl"]);
        if seen["not_compared"].is_null() {
            break seen;
        }
        assert!(Instant::now() < end, "{}", seen["not_compared"]);
    };
    let lines = seen["instructions"].as_array().expect("instructions");
    let call = lines
        .iter()
        .find(|line| line["causes"] == serde_json::json!(["bpf"]));
    let call = call.unwrap_or_else(|| panic!("no call of BPF's: {seen:#}"));
    let target = call["target"].as_str();
    let target = target.expect("a name");
    assert!(
        target.starts_with("bpf_trampoline_") && target.ends_with(" [bpf]"),
        "{target}"
    );
}

/// The places of a stack that must be reliable, from the innermost out.
fn places(guest: &Guest, pid: &str) -> Vec<String> {
    let seen = call(guest, &["stack", pid]);
    let stack = &seen["stacks"][0];
    assert_eq!(stack["reliable"], true, "{stack:#}");
    let frames = stack["frames"].as_array().expect("frames").iter();
    frames
        .map(|frame| frame["place"].as_str().expect("a name").to_owned())
        .collect()
}

fn sleeper(guest: &mut Guest) -> String {
    let pid = one_line(guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    pid.trim().to_owned()
}

/// The stack of a process that sleeps beneath a trampoline, as the guest itself tells it and as it is seen.
fn stack(guest: &mut Guest) -> String {
    let pid = sleeper(guest);
    let end = Instant::now() + LIMIT;
    loop {
        let told = one_line(guest, &format!("cat /proc/{pid}/stack"));
        let told = told.lines().map(|line| line.trim_start_matches("[<0>] "));
        let told: Vec<&str> = told.collect();
        let seen = places(guest, &pid);
        // The guest does not name the scheduler's functions, nor say whose code it is.
        let frames: Vec<&str> = seen
            .iter()
            .map(|place| place.split(' ').next().unwrap_or_default())
            .skip_while(|place| Some(place) != told.first())
            .collect();
        if frames == told && frames.len() > 2 {
            println!("stack: {seen:?}");
            let through = seen.iter().position(|place| place.ends_with(" [bpf]"));
            let through = through.unwrap_or_else(|| panic!("no BPF in {seen:?}"));
            // The traced function twice: called past the tracer's site, and where that site's call comes back to.
            let traced = |place: Option<&String>| {
                place.is_some_and(|place| place.starts_with("hrtimer_nanosleep+"))
            };
            assert!(
                traced(seen.get(through - 1)) && traced(seen.get(through + 1)),
                "{seen:?}"
            );
            return pid;
        }
        // It may not have come to sleep yet.
        assert!(Instant::now() < end, "{seen:#?} is not {told:#?}");
    }
}

/// A function that BPF traces, and that a thread sleeps in beneath the trampoline, can be redirected and is traced on.
fn update(guest: &mut Guest, stock: Stock) {
    let before = sleeper(guest);
    let id = apply(guest, &stock.edition("hrtimer_nanosleep_same"));
    let pid = sleeper(guest);
    let ours = format!(" [update {id}]");
    let end = Instant::now() + LIMIT;
    let seen = loop {
        let seen = places(guest, &pid);
        if seen.iter().any(|place| place.ends_with(&ours)) {
            break seen;
        }
        assert!(Instant::now() < end, "{seen:#?}");
    };
    println!("stack: {seen:?}");
    let edition = seen.iter().position(|place| place.ends_with(&ours));
    let beyond = edition.and_then(|edition| seen.get(edition + 1));
    assert!(
        beyond.is_some_and(|place| place.ends_with(" [bpf]")),
        "{seen:?}"
    );
    revert(guest, id);
    one_line(guest, &format!("kill {pid} {before}"));
}

fn seen(stock: Stock) {
    let mut guest = boot(stock);
    names(&mut guest);
    text(&guest);
    let pid = stack(&mut guest);
    update(&mut guest, stock);
    one_line(&mut guest, &format!("kill {pid}; killall probe"));
    assert_clean(&mut guest);
}

#[test]
fn bpf_is_seen_in_6_1() {
    seen(LTS_6_1);
}

#[test]
fn bpf_is_seen_in_6_12() {
    seen(NEWEST_6_12);
}
