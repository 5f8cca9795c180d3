//! What the guest itself says: the answers of its system calls, and its kernel's log.

use tests::guest::{Guest, Options};

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
