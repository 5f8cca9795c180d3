//! Does an update notice that the guest itself leads calls of its function elsewhere before they come to it, and that it no longer does?

use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::coexist::ask;
use crate::patch::{apply, revert, wait_shown};
use crate::witness::{assert_clean, one_line};

/// Waits until the one edition of an update is in this state, and gives the reason.
fn wait_edition(guest: &Guest, id: u64, state: &str) -> String {
    let shown = wait_shown(guest, id, state, |shown| {
        shown["editions"][0]["state"] == state
    });
    let why = shown["editions"][0]["why"].as_str();
    why.unwrap_or_default().to_owned()
}

/// A livepatch that comes behind an edition, and one that was there before it.
fn livepatched(stock: Stock) {
    let module = stock.peer("livepatch_peer");
    let mut guest = Guest::boot(&Options::new(stock).files(vec![module]));
    let patch = "insmod /files/livepatch_peer.ko; while grep -q 1 /sys/kernel/livepatch/livepatch_peer/transition; do usleep 20000; done";
    let unpatch = "echo 0 >/sys/kernel/livepatch/livepatch_peer/enabled; while [ -d /sys/kernel/livepatch/livepatch_peer ]; do usleep 20000; done; rmmod livepatch_peer";
    let package = stock.edition("unix_ioctl_notty");
    let id = apply(&guest, &package);
    assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}");
    wait_edition(&guest, id, "active");
    one_line(&mut guest, patch);
    let why = wait_edition(&guest, id, "shadowed");
    assert!(why.contains("livepatch"), "{stock:?}: {why}");
    assert_eq!(ask(&mut guest), "OK", "{stock:?}: livepatched");
    one_line(&mut guest, unpatch);
    wait_edition(&guest, id, "active");
    assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}: the edition again");

    revert(&guest, id);
    one_line(&mut guest, patch);
    let id = apply(&guest, &package);
    wait_edition(&guest, id, "shadowed");
    assert_eq!(ask(&mut guest), "OK", "{stock:?}: livepatched before");
    revert(&guest, id);
    assert_eq!(ask(&mut guest), "OK", "{stock:?}: still livepatched");
    one_line(&mut guest, unpatch);
    assert_clean(&mut guest);
}

#[test]
fn a_livepatch_of_6_1_shadows_an_update() {
    livepatched(LTS_6_1);
}

#[test]
fn a_livepatch_of_6_12_shadows_an_update() {
    livepatched(NEWEST_6_12);
}

/// BPF programs that only look at a function's calls, and one that may give its result.
fn traced_by_bpf(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let id = apply(&guest, &stock.edition("security_file_permission_same"));
    wait_edition(&guest, id, "active");
    let pid = one_line(&mut guest, "probe bpf 1 >/tmp/said & echo $!");
    let why = wait_edition(&guest, id, "shadowed");
    assert!(why.contains("BPF"), "{stock:?}: {why}");
    one_line(
        &mut guest,
        &format!("kill {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said"),
    );
    wait_edition(&guest, id, "active");
    revert(&guest, id);
    assert_clean(&mut guest);
}

#[test]
fn a_bpf_program_of_6_1_shadows_an_update() {
    traced_by_bpf(LTS_6_1);
}

#[test]
fn a_bpf_program_of_6_12_shadows_an_update() {
    traced_by_bpf(NEWEST_6_12);
}
