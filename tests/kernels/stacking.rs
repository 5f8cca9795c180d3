//! Do updates lie on each other, go in any order that is sound, and take each other's place, as guest programs see it?

use std::path::Path;

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert, show, wait_shown};
use crate::witness::{assert_clean, one_line};

/// What SIOCATMARK on a datagram socket answers, and how many lines /proc/version has.
fn asked(guest: &mut Guest) -> (String, usize) {
    let said = one_line(guest, "probe siocatmark 1");
    let answer = said.rsplit(' ').next().unwrap_or_default().to_owned();
    let lines = guest.sh("cat /proc/version").text().lines().count();
    (answer, lines)
}

/// The states of an update's editions.
fn states(shown: &Value) -> Vec<String> {
    let editions = shown["editions"].as_array().expect("editions").iter();
    let state = |edition: &Value| edition["state"].as_str().expect("a state").to_owned();
    editions.map(state).collect()
}

/// Waits until nothing of an update is in the guest any more.
pub(crate) fn wait_gone(guest: &Guest, id: u64) {
    let _ = wait_shown(guest, id, "gone", |shown| states(shown).is_empty());
}

/// Applies a package in the place of others.
fn replace(guest: &Guest, package: &Path, others: &str) -> u64 {
    let path = package.to_str().expect("paths of tests are UTF-8");
    let call = ["update", "apply", path, "--instead-of", others];
    let update = guest.client.call(&call).expect("the apply");
    assert_eq!(update["state"], "applied", "{update:#}");
    update["id"].as_u64().expect("an id")
}

fn stacks(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let (one, two) = (
        stock.edition("unix_ioctl_notty"),
        stock.edition("two_functions"),
    );
    let (old, plain) = asked(&mut guest);
    let is = |guest: &mut Guest, answer: &str, lines: usize| {
        assert_eq!(asked(guest), (answer.to_owned(), lines), "{stock:?}");
    };
    let first = apply(&guest, &one);
    is(&mut guest, "ENOTTY", plain);
    let second = apply(&guest, &two);
    is(&mut guest, "EXDEV", plain + 1);
    assert_eq!(states(&show(&guest, first)), ["placed"]);
    assert_eq!(states(&show(&guest, second)), ["active", "active"]);
    // All of it lies beneath the second one: nobody sees it go.
    revert(&guest, first);
    is(&mut guest, "EXDEV", plain + 1);
    wait_gone(&guest, first);
    let third = apply(&guest, &one);
    is(&mut guest, "ENOTTY", plain + 1);
    // The second one would go by half.
    let reply = guest
        .client
        .call(&["update", "revert", &second.to_string()]);
    let refused = reply.refusal("a revert beneath another");
    assert!(refused.contains("update_beneath_another"), "{refused}");
    is(&mut guest, "ENOTTY", plain + 1);
    revert(&guest, third);
    is(&mut guest, "EXDEV", plain + 1);

    let fourth = replace(&guest, &one, &second.to_string());
    is(&mut guest, "ENOTTY", plain);
    assert_eq!(show(&guest, second)["state"], "replaced");
    let fifth = replace(&guest, &two, "all");
    is(&mut guest, "EXDEV", plain + 1);
    assert_eq!(show(&guest, fourth)["state"], "replaced");
    let bad = guest.client.call(&[
        "update",
        "apply",
        one.to_str().expect("UTF-8"),
        "--instead-of",
        "77",
    ]);
    let refused = bad.refusal("a place that nobody has");
    assert!(refused.contains("update_not_applied"), "{refused}");
    is(&mut guest, "EXDEV", plain + 1);
    revert(&guest, fifth);
    is(&mut guest, &old, plain);
    for id in [second, third, fourth, fifth] {
        wait_gone(&guest, id);
    }
    // Its room is used again.
    let kernel = guest.client.call(&["kernel", "info"]).expect("the kernel");
    let used = kernel["arena"]["used_bytes"].as_u64().expect("bytes");
    let _ = apply(&guest, &two);
    let again = guest.client.call(&["kernel", "info"]).expect("the kernel");
    println!(
        "{stock:?}: {used} bytes of the arena are used by nothing, then {}",
        again["arena"]["used_bytes"]
    );
    assert!(used < 4096, "{kernel:#}");
    is(&mut guest, "EXDEV", plain + 1);
    assert_clean(&mut guest);
}

#[test]
fn updates_of_6_1_lie_on_each_other_and_go() {
    stacks(LTS_6_1);
}

#[test]
fn updates_of_6_12_lie_on_each_other_and_go() {
    stacks(NEWEST_6_12);
}
