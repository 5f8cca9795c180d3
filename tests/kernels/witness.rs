//! What the guest itself says: the answers of its system calls, and its kernel's log.

use std::time::Duration;

use tests::guest::{Guest, Options};
use tests::stock::LTS_6_1;

/// Long enough for a thread that asks without end to see a changed answer, in the slowest lab.
pub(crate) const SETTLE: Duration = Duration::from_millis(1000);

/// Boots a guest in which `threads` threads ask SIOCATMARK without end and print each change of the answer.
pub(crate) fn boot_asking(options: &Options, threads: u32) -> Guest {
    let guest = Guest::boot(
        &options
            .clone()
            .cmdline(&format!("exopatch.run=probe,answers,{threads}")),
    );
    for thread in 0..threads {
        let _ = wait_answer(&guest, 0, thread, |_| true);
    }
    guest
}

/// Waits until `thread` reports an answer that `wanted` accepts, and gives the answer.
pub(crate) fn wait_answer(
    guest: &Guest,
    mark: usize,
    thread: u32,
    wanted: impl Fn(&str) -> bool,
) -> String {
    let place = guest.wait_line(mark, &format!("answer of thread {thread}"), |line| {
        answer_of(line).is_some_and(|(answer, from)| from == thread && wanted(answer))
    });
    let line = guest.console.since(place).swap_remove(0);
    answer_of(&line)
        .expect("the line was accepted")
        .0
        .to_owned()
}

/// `answer NAME at SEQ thread T`, wherever in the line it begins: other output may stand before it.
fn answer_of(line: &str) -> Option<(&str, u32)> {
    let (_, rest) = line.split_once("answer ")?;
    let (answer, rest) = rest.split_once(" at ")?;
    let (_, thread) = rest.split_once(" thread ")?;
    Some((answer, thread.trim().parse().ok()?))
}

/// No thread of the guest reports another answer from `mark` on and for `time` from now.
pub(crate) fn assert_unchanged(guest: &Guest, mark: usize, time: Duration, what: &str) {
    std::thread::sleep(time);
    let mut changed = guest.console.since(mark);
    changed.retain(|line| answer_of(line).is_some());
    assert!(changed.is_empty(), "{what}: the answer became {changed:?}");
}

/// What a command that must succeed prints in the guest.
pub(crate) fn one_line(guest: &mut Guest, command: &str) -> String {
    let answer = guest.sh(command);
    assert_eq!(answer.status, 0, "'{command}': {}", answer.text());
    answer.text()
}

/// No warning, oops, lockup or firmware complaint stands in the guest's log.
pub(crate) fn assert_clean(guest: &mut Guest) {
    let complaints = guest.complaints();
    assert!(
        complaints.is_empty(),
        "the guest complains: {complaints:#?}"
    );
}

/// The number in an environment variable, or `usual`.
pub(crate) fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is not a number"))
    })
}

/// The witness itself: it tells a complaint of the kernel from what programs print meanwhile.
#[test]
fn a_complaint_is_seen_and_nothing_else() {
    let mut guest = boot_asking(&Options::new(LTS_6_1), 4);
    assert_clean(&mut guest);
    let planted = guest.sh("echo 'WARNING: planted' >/dev/kmsg; probe answers 1 & usleep 100000");
    assert_eq!(planted.status, 0, "{}", planted.text());
    let complaints = guest.complaints();
    assert_eq!(complaints.len(), 1, "{complaints:#?}");
    assert!(
        complaints[0].ends_with("WARNING: planted"),
        "{complaints:#?}"
    );
}
