//! Is what a client asked for done wholly or not at all, when the client is killed at any moment?

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::api::Api;
use tests::figures;
use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

use crate::adaptive::MIXED;
use crate::rules::{sum, tally};
use crate::witness::{assert_clean, count, one_line};

/// Clients that are killed, unless `EXOPATCH_KILLS` says otherwise.
const KILLS: usize = 40;
/// The longest that an operation takes to its end.
const LIMIT: Duration = Duration::from_secs(30);

/// Numbers that are spread evenly from 0 to 1, the same each time (after H. Weyl, 1916: multiples of an irrational number).
fn part(nth: usize) -> f64 {
    (nth as f64 * 0.618_033_988_749_894_9).fract()
}

/// All updates, once none of them is on its way.
fn settled(guest: &Guest) -> Vec<Value> {
    let end = Instant::now() + LIMIT;
    // A connection that is not used for long is closed.
    let mut api = Api::connect(guest.client.socket()).expect("the API");
    loop {
        let all = api.call("GET /v1/updates", b"").expect("the updates");
        let all = all["updates"].as_array().cloned().unwrap_or_default();
        let settled = |update: &Value| {
            let states = ["applied", "reverted", "refused"];
            states.iter().any(|state| update["state"] == *state)
        };
        if all.iter().all(settled) {
            return all;
        }
        assert!(Instant::now() < end, "not settled: {all:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The number of the update in effect.
fn in_effect(updates: &[Value]) -> Option<u64> {
    let update = updates.iter().find(|update| update["state"] == "applied");
    update.and_then(|update| update["id"].as_u64())
}

/// A client that is yet to be waited for.
fn client(guest: &Guest, args: &[&str]) -> std::process::Child {
    Command::new(stock::exopatch())
        .arg("--api-sock")
        .arg(guest.client.socket())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("exopatch starts")
}

fn killed(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(4));
    let callers = "probe tally 0 4 1 5000 >/tmp/said & echo $!";
    let pid = one_line(&mut guest, callers);
    let package = stock.edition("pair_one");
    let package = package.to_str().expect("UTF-8");
    let revert = |id: u64| ["update".to_owned(), "revert".to_owned(), id.to_string()];
    let apply = ["update", "apply", package].map(str::to_owned);
    let run = |guest: &Guest, args: &[String], time: Option<Duration>| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let began = Instant::now();
        let mut client = client(guest, &args);
        match time {
            Some(time) => {
                std::thread::sleep(time);
                client.kill().expect("it can be killed");
                client.wait().expect("it ends");
            }
            None => assert!(client.wait().expect("it ends").success(), "{args:?}"),
        }
        began.elapsed()
    };
    // The first one reads the kernel's image, too.
    run(&guest, &apply, None);
    run(&guest, &revert(1), None);
    let usual = run(&guest, &apply, None);
    run(&guest, &revert(2), None);

    let (mut done, mut left) = (0, 0);
    for nth in 0..count("EXOPATCH_KILLS", KILLS) {
        let before = in_effect(&settled(&guest));
        let operation = before.map_or_else(|| apply.to_vec(), |id| revert(id).to_vec());
        run(&guest, &operation, Some(usual.mul_f64(part(nth))));
        let after = in_effect(&settled(&guest));
        let changed = before.is_some() != after.is_some();
        *(if changed { &mut done } else { &mut left }) += 1;
        let said = one_line(&mut guest, "probe tally 1 0 1");
        let want = if after.is_some() { "EXDEV" } else { "OK" };
        assert!(said.contains(want), "{stock:?}, {nth}: {said}");
    }
    println!("{stock:?}: {done} done, {left} not, in {usual:?} at most each");
    assert!(done > 0 && left > 0, "{done} {left}");
    if let Some(id) = in_effect(&settled(&guest)) {
        run(&guest, &revert(id), None);
    }
    let end =
        format!("kill -USR2 {pid}; while [ -d /proc/{pid} ]; do usleep 20000; done; cat /tmp/said");
    let tally = tally(&one_line(&mut guest, &end));
    for answer in MIXED {
        assert_eq!(sum(&tally, answer), 0, "{answer}: {tally:?}");
    }
    assert_clean(&mut guest);
    figures::note(&serde_json::json!({ "kills": done + left, "killed_before_the_switch": left }));
}

#[test]
fn what_killed_clients_of_6_1_asked_for_is_done_or_not() {
    killed(LTS_6_1);
}

#[test]
fn what_killed_clients_of_6_12_asked_for_is_done_or_not() {
    killed(NEWEST_6_12);
}
