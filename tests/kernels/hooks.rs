//! Does code of a package run in the guest before and behind a switch, and has its say?

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::client::Reply;
use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::revert;
use crate::rules::{sum, tally};
use crate::witness::{assert_clean, one_line};

/// What the editions answer when their hook has put that down, and when not.
const PUT_DOWN: &str = "ENOTTY";
/// The longest that an update may take to be gone once its hook has ended.
const LIMIT: Duration = Duration::from_secs(90);

fn apply(guest: &Guest, stock: Stock, name: &str, deadline: &str) -> Reply {
    let package = stock.edition(name);
    let package = package.to_str().expect("UTF-8");
    guest
        .client
        .call(&["update", "apply", package, "--deadline", deadline])
}

fn applied(guest: &Guest, stock: Stock, name: &str) -> u64 {
    let reply = apply(guest, stock, name, "30s");
    let log = || guest.log.since(0).join("\n");
    assert_eq!(reply.status, 0, "{reply:?}; exopatch said:\n{}", log());
    assert_eq!(reply.json["state"], "applied", "{reply:?}");
    reply.json["id"].as_u64().expect("an id")
}

fn show(guest: &Guest, id: u64) -> Value {
    let shown = guest.client.call(&["update", "show", &id.to_string()]);
    shown.expect("the update")
}

/// How many of ten calls the edition answers.
fn answers(guest: &mut Guest) -> u64 {
    sum(&tally(&one_line(guest, "probe tally 10 1")), PUT_DOWN)
}

/// What the guest's log says of these hooks.
fn said(guest: &mut Guest) -> Vec<String> {
    let said = one_line(guest, "dmesg | grep -o 'hooks_all: .*'; true");
    said.lines().map(str::to_owned).collect()
}

/// A hook for each moment, of which the first decides what the edition answers.
fn all_four(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock).cpus(2));
    let events = Listening::to(&guest);
    assert_eq!(answers(&mut guest), 0);
    let began = Instant::now();
    let id = applied(&guest, stock, "hooks_all");
    println!("{stock:?}: applied after {:?}", began.elapsed());
    assert_eq!(answers(&mut guest), 10);
    assert_eq!(said(&mut guest), ["hooks_all: applied"]);
    revert(&guest, id);
    assert_eq!(answers(&mut guest), 0);
    let all = [
        "hooks_all: applied",
        "hooks_all: about to go",
        "hooks_all: gone",
    ];
    assert_eq!(said(&mut guest), all);
    let hooks = show(&guest, id)["hooks"].clone();
    let hooks = hooks.as_array().expect("hooks").iter();
    let became: Vec<String> = hooks
        .map(|hook| {
            format!("{} {} {}", hook["moment"], hook["state"], hook["result"]).replace('"', "")
        })
        .collect();
    let want = [
        "before-apply ended 0",
        "after-apply ended 0",
        "before-revert ended 0",
        "after-revert ended -11",
    ];
    assert_eq!(became, want, "{stock:?}");
    assert_clean(&mut guest);

    // Each is told when it begins and when it has ended, between what becomes of the update.
    let seen = events.until_end(&mut guest);
    let states = seen.iter().filter_map(|event| {
        let state = event["update"]["state"].as_str();
        event["code"].as_str().or(state).map(str::to_owned)
    });
    let mut states: Vec<String> = states.collect();
    states.dedup();
    let of = |code: &str| states.iter().filter(|state| *state == code).count();
    assert_eq!(
        (of("hook_began"), of("hook_ended"), of("hook_failed")),
        (4, 4, 0),
        "{states:?}"
    );
    let place = |code: &str| states.iter().position(|state| state == code);
    let in_order = [
        place("checking"),
        place("hook_began"),
        place("applied"),
        place("reverted"),
    ];
    assert!(in_order.is_sorted() && in_order[0].is_some(), "{states:?}");
    let times = seen
        .iter()
        .map(|event| event["at_ms"].as_u64().expect("a time"));
    assert!(times.is_sorted(), "{seen:#?}");
}

/// Events as a user sees them.
struct Listening(Child);

impl Listening {
    fn to(guest: &Guest) -> Self {
        let mut command = Command::new(stock::exopatch());
        let args = ["--json", "vm", "events", "--after", "0", "--api-sock"];
        let command = command.args(args).arg(guest.client.socket());
        let child = command.stdout(Stdio::piped()).spawn();
        Self(child.expect("exopatch starts"))
    }

    /// All of them, once the guest has been ended.
    fn until_end(self, guest: &mut Guest) -> Vec<Value> {
        guest.type_line("poweroff -f");
        assert_eq!(guest.wait_end(), 0);
        let output = self.0.wait_with_output().expect("its output");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let events = text.lines().map(serde_json::from_str);
        events.collect::<Result<_, _>>().expect("events")
    }
}

#[test]
fn hooks_run_before_and_behind_switches_of_6_1() {
    all_four(LTS_6_1);
}

#[test]
fn hooks_run_before_and_behind_switches_of_6_12() {
    all_four(NEWEST_6_12);
}

/// Waits until nothing of an update is in the guest any more.
fn wait_gone(guest: &Guest, id: u64) {
    let end = Instant::now() + LIMIT;
    loop {
        let update = show(guest, id);
        if update["editions"].as_array().is_none_or(Vec::is_empty) {
            return;
        }
        assert!(Instant::now() < end, "{update:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_hook_that_says_no_keeps_the_switch_from_being_made() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let reply = apply(&guest, stock, "hooks_busy", "30s");
        assert_eq!(reply.refusal("the apply"), "hook_refused", "{reply:?}");
        let said = reply.json.to_string();
        assert!(said.contains("says_no") && said.contains("-16"), "{said}");
        assert_eq!(show(&guest, 1)["state"], "refused");
        assert_eq!(answers(&mut guest), 0);
        wait_gone(&guest, 1);

        let id = applied(&guest, stock, "hooks_stay");
        let call = ["update", "revert", &id.to_string(), "--deadline", "30s"];
        let reply = guest.client.call(&call);
        assert_eq!(reply.refusal("the revert"), "hook_refused", "{reply:?}");
        assert_eq!(show(&guest, id)["state"], "applied");
        revert(&guest, id);
        wait_gone(&guest, id);
        assert_clean(&mut guest);
    }
}

#[test]
fn a_hook_that_oversleeps_keeps_its_code_until_it_has_ended() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let began = Instant::now();
        let reply = apply(&guest, stock, "hooks_slow", "8s");
        assert_eq!(reply.refusal("the apply"), "hook_late", "{reply:?}");
        let said = reply.json.to_string();
        assert!(said.contains("oversleeps"), "{said}");
        let update = show(&guest, 1);
        assert_eq!(update["state"], "refused", "{update:#}");
        assert_eq!(update["editions"][0]["state"], "draining", "{update:#}");
        assert_eq!(answers(&mut guest), 0);
        assert_eq!(update["hooks"][0]["state"], "failed", "{update:#}");
        wait_gone(&guest, 1);
        let hook = show(&guest, 1)["hooks"][0].clone();
        assert_eq!(hook["state"], "ended", "{hook:#}");
        let slept = began.elapsed();
        assert!(slept >= Duration::from_secs(20), "gone after {slept:?}");
        assert_clean(&mut guest);
    }
}
