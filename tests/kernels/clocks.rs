//! Do rules that go by time, by rates and by sets keep to them while programs call, and do switches end as their deadline says? Times are the host's, and
//! so slow a guest's are not: what is told is how many calls got where, between moments of the host.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::adaptive::{asked, sleeper, woken};
use crate::patch::{revert, show, wait_state};
use crate::rules::{Tally, applied, counted, sum, tally, use_for};
use crate::stacking::wait_gone;
use crate::witness::{assert_clean, one_line};

/// What the edition answers.
const NEW: &str = "ENOTTY";
/// The longest that calls take to get where they should.
const LIMIT: Duration = Duration::from_secs(30);
/// So many calls are watched to say that none gets elsewhere.
const MANY: u64 = 500;
/// A rule that no call follows: there is no such processor.
const NEVER: &str = "cpu = 77";

/// A guest in which four threads, one on each processor, ask without end.
struct Asking {
    guest: Guest,
    /// The update whose edition answers `NEW`.
    id: u64,
    /// The process that asks.
    pid: String,
}

/// How many calls got to the edition, and to the original.
#[derive(Clone, Copy, Debug)]
struct Got {
    new: u64,
    old: u64,
}

impl Asking {
    fn begin(stock: Stock, rule: &str) -> Self {
        let mut guest = Guest::boot(&Options::new(stock).cpus(4));
        Self::make_set(&guest, rule);
        let id = applied(
            &guest,
            stock,
            "unix_ioctl_notty",
            &["--when", rule, "--count"],
        );
        let pid = one_line(&mut guest, "probe tally 0 4 >/tmp/said & echo $!");
        Self { guest, id, pid }
    }

    /// Makes the set that a rule asks for.
    fn make_set(guest: &Guest, rule: &str) {
        if let Some((_, set)) = rule.split_once("in set ") {
            let _ = guest.client.call(&["set", "add", set]).expect("a set");
        }
    }

    fn use_for(&self, rule: &str) {
        use_for(&self.guest, self.id, &["--when", rule, "--count"]);
    }

    fn got(&self) -> Got {
        let counted = counted(&self.guest, "unix_ioctl");
        let of = |id| counted.get(&id).copied().unwrap_or(0);
        Got {
            new: of(self.id),
            old: of(0),
        }
    }

    /// Waits until what got where is as `wanted` says.
    fn wait(&self, what: &str, wanted: impl Fn(Got) -> bool) -> Got {
        let end = Instant::now() + LIMIT;
        loop {
            let got = self.got();
            if wanted(got) {
                return got;
            }
            assert!(Instant::now() < end, "{what}: {got:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// No call gets to the edition any more.
    fn assert_only_old(&self, what: &str) {
        let before = self.got();
        let after = self.wait(what, |got| got.old > before.old + MANY);
        assert_eq!(before.new, after.new, "{what}");
    }

    /// No call gets to the original any more.
    fn assert_only_new(&self, what: &str) {
        let before = self.got();
        let after = self.wait(what, |got| got.new > before.new + MANY);
        assert_eq!(before.old, after.old, "{what}");
    }

    /// Waits until no call gets to the edition, which it does for a time, and gives how many did since `from`.
    fn wait_over(&self, what: &str, from: Got) -> u64 {
        let end = Instant::now() + LIMIT;
        let mut last = self.wait(what, |got| got.new > from.new);
        loop {
            let got = self.wait(what, |got| got.old + got.new > last.old + last.new + MANY);
            if got.new == last.new {
                return got.new - from.new;
            }
            assert!(Instant::now() < end, "{what}: {got:?}");
            last = got;
        }
    }

    /// Has the threads end: every call was counted where it was answered.
    fn end(mut self) -> Tally {
        let got = format!(
            "kill -USR2 {0}; while [ -d /proc/{0} ]; do usleep 20000; done; cat /tmp/said",
            self.pid
        );
        let tally = tally(&one_line(&mut self.guest, &got));
        let new = sum(&tally, NEW);
        let want = BTreeMap::from([(0, sum(&tally, "") - new), (self.id, new)]);
        assert_eq!(counted(&self.guest, "unix_ioctl"), want, "{tally:?}");
        assert_clean(&mut self.guest);
        tally
    }
}

/// A time so many seconds from now, and as rules write it.
fn in_seconds(seconds: i64) -> (SystemTime, String) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let at = now.expect("a clock").as_secs();
    let at = at.saturating_add_signed(seconds);
    let mut date = Command::new("date");
    let date = date.args(["-u", "-d", &format!("@{at}"), "+%Y-%m-%dT%H:%M:%SZ"]);
    let text = date.output().expect("date starts").stdout;
    let text = String::from_utf8(text).expect("a date");
    (UNIX_EPOCH + Duration::from_secs(at), text.trim().to_owned())
}

/// Times that are begun and ended while all ask, without a pause.
fn by_named_time(asking: &Asking) {
    let time = |how: &str, name: &str| asking.guest.client.call(&["time", how, name]);
    let id = asking.id.to_string();
    let unknown = ["update", "use", &id, "--when", "during lunch"];
    let unknown = asking.guest.client.call(&unknown);
    assert_eq!(unknown.refusal("an unknown time"), "rule_not_resolvable");
    assert_eq!(time("begin", "2nd").refusal("no name"), "time_name");
    assert_eq!(time("drop", "lunch").refusal("no time"), "no_such_time");

    let _ = time("end", "lunch").expect("a time");
    asking.use_for("during lunch");
    asking.assert_only_old("before lunch");
    for _ in 0..3 {
        let _ = time("begin", "lunch").expect("lunch begins");
        asking.assert_only_new("during lunch");
        let _ = time("end", "lunch").expect("lunch ends");
        asking.assert_only_old("after lunch");
    }
    // A time that has begun is shown by a handler that is made later.
    let _ = time("begin", "lunch").expect("lunch begins");
    asking.use_for("during lunch and cpu < 77");
    asking.assert_only_new("during lunch, otherwise");
    asking.use_for("not during lunch");
    asking.assert_only_old("not during lunch");
    assert_eq!(
        time("drop", "lunch").refusal("a time in use"),
        "time_in_use"
    );
    let list = asking.guest.client.call(&["time", "list"]).expect("times");
    let lunch = serde_json::json!({ "times": [{ "name": "lunch", "on": true }] });
    assert_eq!(list, lunch);
    asking.use_for(NEVER);
    let _ = time("drop", "lunch").expect("a time that no rule goes by");
}

/// Rules that hold for a time, or from one on.
fn by_time(stock: Stock) {
    let asking = Asking::begin(stock, NEVER);
    asking.assert_only_old("never");
    by_named_time(&asking);

    // Each time that such a rule takes effect, its time begins.
    for round in 0..2 {
        let from = asking.got();
        let began = Instant::now();
        asking.use_for("for 1s");
        let got = asking.wait_over("for 1s", from);
        println!(
            "{stock:?}: {got} calls within 1s of round {round}, seen over after {:?}",
            began.elapsed()
        );
        asking.assert_only_old("for 1s, later");
        asking.use_for(NEVER);
    }

    for (seconds, new) in [("until", false), ("after", true)] {
        let (_, past) = in_seconds(-5);
        let (_, future) = in_seconds(3600);
        let from = asking.got();
        asking.use_for(&format!("{seconds} {past}"));
        // A call that had asked before may still be on its way.
        let check = |new: bool, what: &str| {
            if new {
                asking.assert_only_new(what);
            } else {
                asking.assert_only_old(what);
            }
        };
        check(new, &format!("{seconds} the past"));
        if !new {
            assert_eq!(asking.got().new, from.new, "until the past");
        }
        asking.use_for(&format!("{seconds} {future}"));
        check(!new, &format!("{seconds} the future"));
    }

    let (at, text) = in_seconds(4);
    let from = asking.got();
    asking.use_for(&format!("until {text}"));
    let got = asking.wait_over("until soon", from);
    assert!(SystemTime::now() >= at, "over before {text}");
    println!("{stock:?}: {got} calls until {text}");

    let (at, text) = in_seconds(4);
    let from = asking.got();
    asking.use_for(&format!("after {text}"));
    loop {
        let got = asking.got();
        if SystemTime::now() >= at {
            break;
        }
        assert_eq!(got.new, from.new, "before {text}");
    }
    asking.wait("after soon", |got| got.new > from.new + MANY);
    asking.assert_only_new("after soon");
    let _ = asking.end();
}

#[test]
fn rules_by_time_hold_on_6_1() {
    by_time(LTS_6_1);
}

#[test]
fn rules_by_time_hold_on_6_12() {
    by_time(NEWEST_6_12);
}

/// So many calls in each second: within so many seconds as have begun, and one more for calls that took effect before and after.
fn by_rate(stock: Stock) {
    let asking = Asking::begin(stock, NEVER);
    for (rate, want) in [(5, 20), (50, 150)] {
        let (from, began) = (asking.got(), Instant::now());
        asking.use_for(&format!("rate {rate}/s"));
        let got = asking.wait("a rate", |got| got.new >= from.new + want);
        let (calls, time) = (got.new - from.new, began.elapsed());
        println!(
            "{stock:?}: {calls} calls at {rate}/s in {time:?}, {} others",
            got.old - from.old
        );
        let seconds = time.as_secs() + 2;
        assert!(calls <= rate * seconds, "{calls} calls in {time:?}");
        assert!(got.old > from.old, "{got:?}");
    }
    // A rate of those that another test lets through.
    let from = asking.got();
    asking.use_for("rate 5/s and cpu = 2");
    asking.wait("a rate of one processor", |got| got.new >= from.new + 10);

    // The rate before would let more through, until the next rule is in force.
    asking.use_for("cpu = 77");
    // Of first calls, more of them by one store; and then no more.
    for (first, more) in [(10, 10), (25, 15)] {
        let from = asking.got();
        asking.use_for(&format!("first {first}"));
        // What was told before the rule was in force tells nothing of it.
        let since = asking.got();
        let got = asking.wait("first calls", |got| got.old > since.old + MANY);
        assert_eq!(got.new - from.new, more, "first {first}");
    }

    // Shares of what the other tests leave, while all four ask.
    for (rule, part, of) in [("share 20%", 1, 5), ("cpu in 0..3 and share 2/3", 2, 3)] {
        asking.use_for(rule);
        let from = asking.got();
        let to = asking.wait(rule, |got| {
            got.new + got.old > from.new + from.old + 20 * MANY
        });
        let (new, calls) = (to.new - from.new, to.new + to.old - from.new - from.old);
        println!("{stock:?}: `{rule}`: {new} of {calls}");
        // Both counts are read one after the other, while calls go on.
        assert!(
            (new * of).abs_diff(calls * part) <= calls * of / 50,
            "`{rule}`: {new} of {calls}"
        );
    }
    let _ = asking.end();
}

#[test]
fn rates_and_shares_hold_on_6_1() {
    by_rate(LTS_6_1);
}

#[test]
fn rates_and_shares_hold_on_6_12() {
    by_rate(NEWEST_6_12);
}

/// The threads of a process, in the order in which they began, once there are so many.
fn threads(guest: &mut Guest, pid: &str, count: usize) -> Vec<String> {
    let begun =
        format!("until [ $(ls /proc/{pid}/task | wc -l) -ge {count} ]; do usleep 20000; done");
    let all = one_line(guest, &format!("{begun}; ls /proc/{pid}/task | sort -n"));
    all.split_whitespace().map(str::to_owned).collect()
}

/// Changes a set: `add` or `remove`.
fn set(guest: &Guest, how: &str, name: &str, keys: &[&str]) {
    let call = [&["set", how, name], keys].concat();
    let _ = guest.client.call(&call).expect(how);
}

/// Sets that are filled, changed and emptied while threads ask.
fn by_set(stock: Stock) {
    let mut asking = Asking::begin(stock, "pid in set chosen");
    let pid = asking.pid.clone();
    let threads = threads(&mut asking.guest, &pid, 5);
    assert_eq!(threads.len(), 5, "{threads:?}");
    asking.assert_only_old("an empty set");
    // The first one only waits for the others.
    let (first, second) = (threads[2].as_str(), threads[3].as_str());
    for round in 0..20 {
        let from = asking.got();
        set(&asking.guest, "add", "chosen", &[first]);
        asking.wait("one in the set", |got| got.new > from.new + 10);
        set(&asking.guest, "add", "chosen", &[second]);
        set(&asking.guest, "remove", "chosen", &[first]);
        let from = asking.got();
        asking.wait("another in the set", |got| got.new > from.new + 10);
        set(&asking.guest, "remove", "chosen", &[second]);
        if round % 5 == 0 {
            asking.assert_only_old("a set that is empty again");
        }
    }

    // Numbers that nobody has change nothing, and hide nobody.
    let others: Vec<String> = (100_000..100_050)
        .map(|number| number.to_string())
        .collect();
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    set(&asking.guest, "add", "chosen", &others);
    asking.assert_only_old("others in the set");
    set(&asking.guest, "add", "chosen", &[first]);
    let from = asking.got();
    asking.wait("one among others", |got| got.new > from.new + 10);
    let listed = asking
        .guest
        .client
        .call(&["set", "list"])
        .expect("the sets");
    println!("{stock:?}: {} bytes of sets", listed.to_string().len());
    set(&asking.guest, "remove", "chosen", &others);
    let from = asking.got();
    asking.wait("one without others", |got| got.new > from.new + 10);
    set(&asking.guest, "remove", "chosen", &[first]);

    // What is reached through an argument, in another set.
    set(&asking.guest, "add", "kinds", &["1"]);
    asking.use_for("sock->type in set kinds");
    asking.assert_only_old("another kind");
    let large = ["set", "add", "large", "--room", "0"];
    assert_eq!(
        asking.guest.client.call(&large).refusal("no room"),
        "set_room"
    );
    set(&asking.guest, "add", "kinds", &["2"]);
    asking.assert_only_new("their kind");
    let used = asking.guest.client.call(&["set", "drop", "kinds"]);
    println!("{stock:?}: {}: {}", used.refusal("a set in use"), used.json);
    asking.use_for("pid in set chosen");
    let dropped = asking.guest.client.call(&["set", "drop", "kinds"]);
    let _ = dropped.expect("a set that no rule asks for");
    asking.assert_only_old("the first set again");

    by_half(&mut asking);

    asking.use_for("not pid in set chosen");
    asking.assert_only_new("all that are not in it");
    set(&asking.guest, "add", "chosen", &[first]);
    let from = asking.got();
    asking.wait("one that is", |got| got.old > from.old + 10);
    let _ = asking.end();
}

/// A set that is looked into for 32 bits takes no key for which these could be taken, until it is looked into otherwise.
fn by_half(asking: &mut Asking) {
    // The lower half of it is what they all ask for.
    let wide = ["set", "add", "orders", "0x100008905"];
    set(&asking.guest, "add", "orders", &["0x8904"]);
    asking.use_for("cmd in set orders");
    asking.assert_only_old("another order");
    set(&asking.guest, "add", "orders", &["0x8905"]);
    asking.assert_only_new("their order");
    let refused = asking.guest.client.call(&wide);
    assert_eq!(refused.refusal("a key of more bits"), "set_key_wide");
    asking.assert_only_new("the set as it was");
    asking.use_for("pid in set chosen");
    // A thread may still be in the handler of the rule before.
    let end = Instant::now() + Duration::from_secs(30);
    let mut added = asking.guest.client.call(&wide);
    while added.status != 0 && Instant::now() < end {
        assert_eq!(added.refusal("a handler that is worn"), "set_key_wide");
        added = asking.guest.client.call(&wide);
    }
    let _ = added.expect("a key of more bits in a set that no rule asks for");
    set(&asking.guest, "remove", "orders", &["0x8905"]);
    asking.use_for("cmd in set orders");
    asking.assert_only_old("a key that is theirs but for its upper half");
    set(&asking.guest, "add", "orders", &["0x8905"]);
    asking.assert_only_new("their order beside it");
    asking.use_for("pid in set chosen");
    let dropped = asking.guest.client.call(&["set", "drop", "orders"]);
    let _ = dropped.expect("a set that no rule asks for");
}

#[test]
fn sets_are_filled_and_emptied_while_6_1_calls() {
    by_set(LTS_6_1);
}

#[test]
fn sets_are_filled_and_emptied_while_6_12_calls() {
    by_set(NEWEST_6_12);
}

/// A switch that one sleeps through, as its user wants it to end.
fn on_deadline(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let one = applied(&guest, stock, "pair_one", &[]);
    let package = stock.edition("pair_two");
    let package = package.to_str().expect("UTF-8");
    for (choice, state, now, slept) in [
        ("keep", "switching", "ETIME", "EXDEV"),
        ("revert", "reverted", "EXDEV", "EXDEV"),
        // Its call is of two generations, as was accepted.
        ("force", "applied", "ETIME", "EBADE"),
    ] {
        let pid = sleeper(&mut guest);
        let call = [
            "update",
            "apply",
            package,
            "--deadline",
            "2s",
            "--on-deadline",
            choice,
        ];
        let update = guest.client.call(&call).expect("an apply");
        assert_eq!(update["state"], state, "{choice}: {update:#}");
        assert_eq!(asked(&mut guest), now, "{choice}");
        let woken = woken(&mut guest, &pid);
        println!("{stock:?}: {choice}: {state}, then {woken}");
        assert!(woken.contains(&format!("{slept} 1")), "{choice}: {woken}");
        let two = update["id"].as_u64().expect("an id");
        if state != "reverted" {
            wait_state(&guest, two, "applied");
            assert!(show(&guest, two)["bound"].is_null());
            revert(&guest, two);
        }
        wait_gone(&guest, two);
        assert_eq!(asked(&mut guest), "EXDEV", "{choice}: reverted");
    }

    // Another rule is a switch too: who is within stays with whom he began.
    let pid = sleeper(&mut guest);
    let id = one.to_string();
    let used = ["update", "use", &id, "--when", NEVER, "--deadline", "2s"];
    let update = guest.client.call(&used).expect("the use");
    assert_eq!(update["state"], "switching", "{update:#}");
    assert_eq!(asked(&mut guest), "OK", "by the rule for nobody");
    let woken = woken(&mut guest, &pid);
    assert!(woken.contains("EXDEV 1"), "{woken}");
    wait_state(&guest, one, "applied");
    revert(&guest, one);
    wait_gone(&guest, one);
    assert_clean(&mut guest);
}

#[test]
fn switches_of_6_1_end_as_is_wanted() {
    on_deadline(LTS_6_1);
}

#[test]
fn switches_of_6_12_end_as_is_wanted() {
    on_deadline(NEWEST_6_12);
}
