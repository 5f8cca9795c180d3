//! Does the guest's own kernel know code of ours as it knows its own: by name, on stacks, in warnings and faults?

use std::time::{Duration, Instant};

use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, one_line};

/// The longest that a thread takes to fall asleep.
const LIMIT: Duration = Duration::from_secs(20);

/// The functions of `/proc/PID/stack` from the innermost out, each with what stands in brackets behind it.
fn told(guest: &mut Guest, pid: &str) -> Vec<String> {
    let stack = guest.file(&format!("/proc/{pid}/stack"));
    let frame = |line: &str| {
        let place = line.strip_prefix("[<0>] ").expect("a frame");
        let (function, rest) = place.split_once('+').expect("an offset");
        let module = rest.split_once(' ').map(|(_, module)| format!(" {module}"));
        format!("{function}{}", module.unwrap_or_default())
    };
    stack.lines().map(frame).collect()
}

/// A process that sleeps beneath the edition is seen there by the guest, before and after the update is reverted.
fn sleeps(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let modules = guest.file("/proc/modules");
    let update = apply(&guest, &stock.edition("hrtimer_nanosleep_same"));
    let pid = one_line(&mut guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    let pid = pid.trim().to_owned();
    let edition = "nanosleep_same [exopatch]".to_owned();
    let end = Instant::now() + LIMIT;
    let frames = loop {
        let frames = told(&mut guest, &pid);
        if frames.contains(&edition) {
            break frames;
        }
        assert!(Instant::now() < end, "{pid} does not sleep: {frames:?}");
    };
    println!("{stock:?}: {frames:?}");
    // From the edition on in both directions: what it calls goes on in the kernel's own function, and its caller is there to the end.
    let at = frames.iter().position(|frame| *frame == edition);
    let (inner, outer) = frames.split_at(at.expect("it was found"));
    assert_eq!(inner.last().map(String::as_str), Some("hrtimer_nanosleep"));
    let last = outer.last().expect("a last frame");
    assert!(last.starts_with("entry_SYSCALL_64"), "{frames:?}");
    revert(&guest, update);
    assert_eq!(told(&mut guest, &pid), frames);
    assert_eq!(guest.file("/proc/modules"), modules);
    one_line(&mut guest, &format!("kill {pid}"));
    assert_clean(&mut guest);
}

#[test]
fn a_6_1_sees_who_sleeps_in_an_edition() {
    sleeps(LTS_6_1);
}

#[test]
fn a_6_12_sees_who_sleeps_in_an_edition() {
    sleeps(NEWEST_6_12);
}
