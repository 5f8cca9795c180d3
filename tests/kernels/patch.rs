//! Does an update change what guest programs see, each time, and leave nothing behind?

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::api::Api;
use tests::figures;
use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::{SETTLE, assert_clean, assert_unchanged, boot_asking, count, wait_answer};

/// What the edition `unix_ioctl_notty` makes of SIOCATMARK on a datagram socket.
const NEW: &str = "ENOTTY";
const THREADS: u32 = 4;
/// Applies and reverts in a row, unless `EXOPATCH_ROUNDS` says otherwise.
const ROUNDS: usize = 50;
/// The longest that an update takes to become what it is waited for to be, with the waits between looks.
const LIMIT: Duration = Duration::from_secs(30);

/// Applies a package and gives the update's number.
pub(crate) fn apply(guest: &Guest, package: &Path) -> u64 {
    let path = package.to_str().expect("paths of tests are UTF-8");
    let update = guest
        .client
        .call(&["update", "apply", path, "--deadline", "20s"])
        .expect("the apply");
    assert_eq!(update["state"], "applied", "{update:#}");
    update["id"].as_u64().expect("an id")
}

/// Reverts an update.
pub(crate) fn revert(guest: &Guest, id: u64) {
    let reply = guest
        .client
        .call(&["update", "revert", &id.to_string(), "--deadline", "20s"]);
    let log = || guest.log.since(0).join("\n");
    assert_eq!(reply.status, 0, "{reply:?}; exopatch said:\n{}", log());
    let update = reply.json;
    assert_eq!(update["state"], "reverted", "{update:#}");
}

/// What is shown of an update.
pub(crate) fn show(guest: &Guest, id: u64) -> Value {
    let shown = guest.client.call(&["update", "show", &id.to_string()]);
    shown.expect("the update")
}

/// Waits until what is shown of an update is as `wanted`, called `what`, and gives it.
pub(crate) fn wait_shown(
    guest: &Guest,
    id: u64,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let end = Instant::now() + LIMIT;
    loop {
        let shown = show(guest, id);
        if wanted(&shown) {
            return shown;
        }
        assert!(Instant::now() < end, "not {what}: {shown:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until an update is in this state.
pub(crate) fn wait_state(guest: &Guest, id: u64, state: &str) {
    let _ = wait_shown(guest, id, state, |shown| shown["state"] == state);
}

/// What the guest can tell of itself and must not change: modules, taint, and that it was never booted anew.
fn identity(guest: &mut Guest) -> String {
    guest
        .sh("cat /proc/modules /proc/sys/kernel/tainted /proc/sys/kernel/random/boot_id")
        .text()
}

/// Applies and reverts in a row; after each, every thread in the guest is seen to get the new, then the old answer.
fn rounds(stock: Stock, rounds: usize) {
    let mut guest = boot_asking(&Options::new(stock).cpus(THREADS), THREADS);
    let old = wait_answer(&guest, 0, 0, |_| true);
    assert_ne!(old, NEW);
    let before = identity(&mut guest);
    let package = fs::read(stock.edition("unix_ioctl_notty")).expect("a package");
    let mut api = Api::connect(guest.client.socket()).expect("the API");
    let mut call = |call: &str, body: &[u8], state: &str| {
        let update = api.call(call, body);
        let update = update.unwrap_or_else(|why| panic!("{why}\n{}", guest.condition()));
        assert_eq!(update["state"], state, "{update:#}");
        update["id"].as_u64().expect("an id")
    };
    for round in 0..rounds {
        if round % 50 == 0 {
            println!("{stock:?}: round {round}");
        }
        let mark = guest.console.mark();
        let id = call("POST /v1/updates?deadline_ms=20000", &package, "applied");
        for thread in 0..THREADS {
            let _ = wait_answer(&guest, mark, thread, |answer| answer == NEW);
        }
        let mark = guest.console.mark();
        let revert = format!("POST /v1/updates/{id}/revert?deadline_ms=20000");
        let _ = call(&revert, b"", "reverted");
        for thread in 0..THREADS {
            let _ = wait_answer(&guest, mark, thread, |answer| answer == old);
        }
    }
    assert_eq!(identity(&mut guest), before);
    assert_clean(&mut guest);
    figures::note(&serde_json::json!({ "applies": rounds }));
}

#[test]
fn applies_and_reverts_in_a_row_under_four_callers_on_6_1() {
    rounds(LTS_6_1, count("EXOPATCH_ROUNDS", ROUNDS));
}

#[test]
fn applies_and_reverts_in_a_row_under_four_callers_on_the_newest_6_1() {
    rounds(stock::NEWEST_6_1, count("EXOPATCH_ROUNDS", ROUNDS));
}

#[test]
fn applies_and_reverts_in_a_row_under_four_callers_on_6_12() {
    rounds(NEWEST_6_12, count("EXOPATCH_ROUNDS", ROUNDS));
}

#[test]
fn an_edition_can_call_the_original() {
    for stock in stock::ALL {
        let guest = boot_asking(&Options::new(stock), 1);
        let mark = guest.console.mark();
        let id = apply(&guest, &stock.edition("unix_ioctl_same"));
        assert_unchanged(&guest, mark, SETTLE, stock.0);
        let state = guest
            .client
            .call(&["update", "verify", &id.to_string()])
            .expect("the verification");
        assert_eq!(state["intact"], true, "{state:#}");
    }
}

#[test]
fn a_check_writes_nothing() {
    let guest = boot_asking(&Options::new(LTS_6_1), 1);
    let mark = guest.console.mark();
    let package = LTS_6_1.edition("unix_ioctl_notty");
    let path = package.to_str().expect("paths of tests are UTF-8");
    let update = guest
        .client
        .call(&["update", "apply", path, "--check"])
        .expect("the check");
    assert_eq!(update["state"], "checked", "{update:#}");
    assert_eq!(update["applied"]["bytes_written"], 0, "{update:#}");
    assert_unchanged(&guest, mark, SETTLE, "a check");
}

/// Applies at moments spread over a boot: each waits or is refused, and the guest comes up whole.
fn applies_during_boot(stock: Stock) {
    for round in 0..6u64 {
        let mut guest = Guest::start(&Options::new(stock).cmdline("exopatch.run=probe,answers,1"));
        let started = Instant::now();
        while !guest.client.socket().exists() {
            assert!(started.elapsed() < Duration::from_secs(30), "no API socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(round * 600));
        let package = stock.edition("unix_ioctl_notty");
        let deadline = if round % 2 == 0 { "60s" } else { "10ms" };
        let path = package.to_str().expect("paths of tests are UTF-8");
        let reply = guest
            .client
            .call(&["update", "apply", path, "--deadline", deadline]);
        let applied = reply.json["state"] == "applied";
        println!(
            "{stock:?}, {} ms into the boot: {}",
            round * 600,
            summary(&reply.json)
        );
        assert!(applied || reply.status != 0, "{reply:?}");
        assert!(
            applied || deadline == "10ms",
            "an apply with time enough was refused: {reply:?}"
        );
        guest.wait_ready();
        if applied {
            let _ = wait_answer(&guest, 0, 0, |answer| answer == NEW);
        }
        assert_clean(&mut guest);
    }
}

#[test]
fn an_apply_during_boot_of_6_1_waits_or_is_refused() {
    applies_during_boot(LTS_6_1);
}

#[test]
fn an_apply_during_boot_of_6_12_waits_or_is_refused() {
    applies_during_boot(NEWEST_6_12);
}

fn summary(reply: &Value) -> String {
    let field = |name: &str| reply[name].as_str().unwrap_or_default().to_owned();
    format!("{} {}", field("state"), field("code"))
}

/// A guest that has gone to another kernel by kexec is known to have, and its updates are lost.
fn applies_after_kexec(stock: Stock, other: Stock) {
    let files = vec![other.file("vmlinuz"), other.file("initramfs.cpio.gz")];
    let mut guest = Guest::boot(&Options::new(stock).memory_mib(512).files(files));
    let id = apply(&guest, &stock.edition("unix_ioctl_notty"));
    let mark = guest.console.mark();
    guest.type_line("probe kexec /files/vmlinuz /files/initramfs.cpio.gz 'console=ttyS0 quiet'");
    let _ = guest.wait_line(mark, "second boot", |line| {
        line.contains("exopatch-guest: ready")
    });
    let reply = guest.client.call(&["update", "revert", &id.to_string()]);
    assert_ne!(reply.status, 0, "a revert in another kernel: {reply:?}");
    let listed = show(&guest, id);
    assert_eq!(listed["state"], "lost", "{listed:#}");
    let path = stock.edition("unix_ioctl_notty");
    let reply = guest
        .client
        .call(&["update", "apply", path.to_str().expect("UTF-8")]);
    println!("{stock:?} to {other:?}: {}", summary(&reply.json));
    assert_eq!(reply.status == 0, stock == other, "{reply:?}");
    assert_clean(&mut guest);
}

#[test]
fn an_apply_after_a_kexec_to_6_12_knows_that_this_is_another_kernel() {
    applies_after_kexec(LTS_6_1, NEWEST_6_12);
}

#[test]
fn an_apply_after_a_kexec_to_6_1_knows_that_this_is_another_kernel() {
    applies_after_kexec(NEWEST_6_12, LTS_6_1);
}

#[test]
fn an_apply_after_a_kexec_to_the_same_kernel_knows_that_it_was_started_anew() {
    applies_after_kexec(LTS_6_1, LTS_6_1);
}

/// An edition with a constant, a variable of its own, calls of the kernel and of the original works on every kernel.
#[test]
fn an_edition_keeps_data_of_its_own() {
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock));
        let before = guest.sh("cat /proc/version").text();
        let id = apply(&guest, &stock.edition("version_proc_show"));
        for reads in 1..=3 {
            let now = guest.sh("cat /proc/version").text();
            assert_eq!(now, format!("{before}\nedition {reads}"), "{stock:?}");
        }
        revert(&guest, id);
        assert_eq!(guest.sh("cat /proc/version").text(), before, "{stock:?}");
        assert_clean(&mut guest);
    }
}
