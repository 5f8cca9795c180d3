//! Does a guest come through pauses unharmed: nothing hangs, clocks follow the host's, no processor misses more than the pause?

use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tests::api::Api;
use tests::figures;
use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1};

use crate::witness::{assert_clean, count};

/// Pauses in a row, unless `EXOPATCH_PAUSES` says otherwise.
const PAUSES: usize = 100;

fn pause(guest: &Guest) -> Value {
    guest.client.call(&["vm", "pause"]).expect("the pause")
}

fn resume(guest: &Guest) -> Value {
    guest.client.call(&["vm", "resume"]).expect("the resume")
}

/// How far the guest's wall clock is ahead of the host's, in nanoseconds; the question's own way is part of it.
fn clock_offset_ns(guest: &mut Guest) -> i128 {
    let text = guest.sh("probe clock").text();
    let realtime = text
        .split_whitespace()
        .skip_while(|word| *word != "realtime")
        .nth(1)
        .expect("a time");
    let host = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_nanos();
    let host = i128::try_from(host).expect("a time fits");
    realtime.parse::<i128>().expect("a number") - host
}

#[test]
fn many_pauses_of_four_busy_cpus_hang_none() {
    let pauses = count("EXOPATCH_PAUSES", PAUSES);
    let mut guest = Guest::boot(
        &Options::new(LTS_6_1)
            .cpus(4)
            .cmdline("exopatch.run=probe,busy,4"),
    );
    let before = clock_offset_ns(&mut guest);
    let mut longest_us = 0;
    let mut api = Api::connect(guest.client.socket()).expect("the API");
    for _ in 0..pauses {
        let paused = api.call("POST /v1/vm/pause", b"").expect("the pause");
        longest_us = longest_us.max(paused["took_us"].as_u64().expect("a duration"));
        let _ = api.call("POST /v1/vm/resume", b"").expect("the resume");
    }
    let change_ms = (clock_offset_ns(&mut guest) - before).abs() / 1_000_000;
    println!(
        "{pauses} pauses: slowest stop {longest_us} us, largest clock offset change {change_ms} ms"
    );
    // The clocks are read through the console, which costs some milliseconds; a clock that stops in pauses is off by seconds.
    assert!(
        change_ms < 1000,
        "the guest's clock moved {change_ms} ms against the host's"
    );
    for cpu in 0..4 {
        assert_eq!(
            guest.sh(&format!("taskset -c {cpu} true")).status,
            0,
            "processor {cpu} hangs"
        );
    }
    assert_clean(&mut guest);
    figures::note(&serde_json::json!({ "pauses": pauses, "stop_us_most": longest_us }));
}

#[test]
fn a_pause_of_seconds_raises_no_soft_lockup_and_the_clocks_follow() {
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock).cmdline("exopatch.run=probe,busy,2"));
        // The watchdog reports after twice this many seconds.
        assert_eq!(
            guest.sh("echo 1 >/proc/sys/kernel/watchdog_thresh").status,
            0
        );
        let before = clock_offset_ns(&mut guest);
        let _ = pause(&guest);
        std::thread::sleep(Duration::from_secs(5));
        let _ = resume(&guest);
        let change_ms = (clock_offset_ns(&mut guest) - before).abs() / 1_000_000;
        println!("{stock:?}: clock offset change over a pause of 5 s: {change_ms} ms");
        assert!(
            change_ms < 1000,
            "{stock:?}: the guest's clock moved {change_ms} ms against the host's"
        );
        assert_clean(&mut guest);
    }
}

/// The largest gap of each processor's heartbeat, in microseconds, with and without pauses.
fn heartbeat_gaps(guest: &mut Guest, seconds: u64, meanwhile: impl FnOnce(&Guest)) -> Vec<u64> {
    let mark = guest.console.mark();
    guest.type_line(&format!("probe heartbeat {seconds}"));
    meanwhile(guest);
    let end = guest.wait_line(mark, "end of the heartbeat", |line| {
        line.starts_with("exopatch-guest: done")
    });
    let lines = guest.console.since(mark);
    lines[..end - mark]
        .iter()
        .filter(|line| line.starts_with("heartbeat: cpu"))
        .map(|line| {
            line.rsplit(' ')
                .next()
                .and_then(|gap| gap.parse().ok())
                .expect("a gap")
        })
        .collect()
}

#[test]
fn no_processor_misses_more_than_the_pause() {
    let mut guest = Guest::boot(&Options::new(LTS_6_1).cpus(4));
    let undisturbed = heartbeat_gaps(&mut guest, 8, |_| ());
    let mut paused_us = 0;
    let gaps = heartbeat_gaps(&mut guest, 8, |guest| {
        let start = Instant::now();
        let mut first = None;
        while start.elapsed() < Duration::from_secs(6) {
            let asked = Instant::now();
            let _ = pause(guest);
            std::thread::sleep(Duration::from_millis(20));
            let _ = resume(guest);
            first.get_or_insert_with(|| asked.elapsed());
            paused_us = paused_us.max(asked.elapsed().as_micros());
        }
    });
    assert_eq!(gaps.len(), 4, "a processor gave no heartbeat");
    println!(
        "largest gaps: {undisturbed:?} us undisturbed, {gaps:?} us with pauses of at most {paused_us} us"
    );
    let usual = undisturbed.iter().max().expect("four processors");
    for gap in &gaps {
        let bound = u64::try_from(paused_us).expect("a pause fits") + 3 * usual + 20_000;
        assert!(
            *gap < bound,
            "a processor missed {gap} us: more than the pause ({paused_us} us) and the usual ({usual} us)"
        );
    }
    assert_clean(&mut guest);
}
