//! What `exopatch top` shows: one look at the machine, with the counts of the look before.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::{clean, show, words};
use crate::api::wire::{
    BoundTask, CallList, Edition, EditionState, Pauses, Update, UpdateState, Vm, VmState,
};

/// One look.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct View {
    state: VmState,
    vcpus: u32,
    uptime_ms: u64,
    pauses: Pauses,
    /// Every function that has an edition or is counted, with each of its editions, by name.
    functions: Vec<Row>,
    /// The updates whose switch is under way.
    switching: Vec<Switching>,
    /// When the calls were counted; left out before they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    calls_at_ms: Option<u64>,
    /// Why the calls are older than the rest, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) calls_unknown: Option<String>,
}

/// One edition of a function.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Row {
    function: String,
    /// The update whose edition it is; left out for the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    update: Option<u64>,
    /// Where it stands; left out for the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<EditionState>,
    /// Why it is still there, if nothing leads to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// How many calls got to it, where that is counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    calls: Option<u64>,
    /// The same a second, since the counts before.
    #[serde(skip_serializing_if = "Option::is_none")]
    calls_per_second: Option<f64>,
}

/// An update on its way in or out.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Switching {
    update: u64,
    state: UpdateState,
    /// The tasks that have yet to leave its old side.
    bound: Vec<BoundTask>,
}

/// Whose calls: a function, and an update or the original.
type Key<'a> = (&'a str, Option<u64>);

/// Counts by whose they are. Functions may share a name: they are counted together.
fn sums(counts: &CallList) -> BTreeMap<Key<'_>, u64> {
    let mut sums: BTreeMap<Key<'_>, u64> = BTreeMap::new();
    for calls in &counts.calls {
        let sum = sums.entry((&calls.function, calls.update)).or_default();
        *sum = sum.saturating_add(calls.calls);
    }
    sums
}

impl View {
    /// What is to be seen of a machine and its updates, with the last counts and those before.
    pub(super) fn new(
        vm: &Vm,
        updates: &[Update],
        now: Option<&CallList>,
        before: Option<&CallList>,
    ) -> Self {
        let switching = updates.iter().filter_map(|update| {
            Some(Switching {
                update: update.id,
                state: update.state,
                bound: update.bound.clone()?,
            })
        });
        Self {
            state: vm.state,
            vcpus: vm.vcpus,
            uptime_ms: vm.uptime_ms,
            pauses: vm.pauses.clone(),
            functions: rows(updates, now, before),
            switching: switching.collect(),
            calls_at_ms: now.map(|counts| counts.at_ms),
            calls_unknown: None,
        }
    }

    /// The same for people.
    pub(super) fn table(&self) -> String {
        let pauses = &self.pauses;
        let last = pauses.last.iter().rev().map(|it| it.pause_us.to_string());
        let last: Vec<String> = last.collect();
        let mut table = format!(
            "{}, {} vCPUs, up {} s\npauses: {} of users, {} of exopatch with {} µs in all\n",
            show::vm_state(self.state),
            self.vcpus,
            show::seconds(self.uptime_ms),
            pauses.by_user,
            pauses.by_exopatch,
            pauses.total_us
        );
        if !last.is_empty() {
            table.push_str(&format!("the last, in µs: {}\n", last.join(" ")));
        }
        if let Some(why) = &self.calls_unknown {
            table.push_str(&format!("no new counts of calls: {}\n", clean(why)));
        }
        table.push_str(&format!(
            "\n{:<30}{:<12}{:<9}{:>15}{:>13}\n",
            "FUNCTION", "EDITION", "STATE", "CALLS", "CALLS/s"
        ));
        self.functions.iter().for_each(|row| row.line(&mut table));
        for row in &self.functions {
            if let (Some(update), Some(state), Some(_)) = (row.update, row.state, &row.why) {
                let edition = Edition {
                    function: row.function.clone(),
                    at: String::new(),
                    state,
                    why: row.why.clone(),
                };
                let stands = words::stands(&edition);
                table.push_str(&format!("\nupdate {update}: edition of {stands}\n"));
            }
        }
        for switching in &self.switching {
            let (update, state) = (switching.update, switching.state.name());
            let waits = words::waits(&switching.bound);
            table.push_str(&format!("\nupdate {update} is {state} and {waits}\n"));
            for task in &switching.bound {
                let frames = clean(&task.frames.join(" < "));
                table.push_str(&format!("  {:<24}{frames}\n", clean(&task.who)));
            }
        }
        table
    }
}

impl Row {
    fn line(&self, table: &mut String) {
        let none = || "-".to_owned();
        let edition = self.update;
        let edition = edition.map_or_else(|| "original".to_owned(), |id| format!("update {id}"));
        let state = self.state.map_or("-", EditionState::name);
        let calls = self.calls.map_or_else(none, |calls| calls.to_string());
        let rate = self.calls_per_second;
        let rate = rate.map_or_else(none, |rate| format!("{rate:.1}"));
        let function = clean(&self.function);
        table.push_str(&format!(
            "{function:<30}{edition:<12}{state:<9}{calls:>15}{rate:>13}\n"
        ));
    }
}

fn rows(updates: &[Update], now: Option<&CallList>, before: Option<&CallList>) -> Vec<Row> {
    let mut rows: BTreeMap<Key<'_>, Row> = BTreeMap::new();
    for update in updates {
        for edition in &update.editions {
            let row = rows
                .entry((&edition.function, Some(update.id)))
                .or_default();
            row.state = Some(edition.state);
            row.why.clone_from(&edition.why);
        }
    }
    let old = before.map(sums).unwrap_or_default();
    let times = now.zip(before);
    let passed = times.map_or(0, |(now, before)| now.at_ms.saturating_sub(before.at_ms));
    for (key, calls) in now.map(sums).unwrap_or_default() {
        let row = rows.entry(key).or_default();
        row.calls = Some(calls);
        // Fewer than before: they are counted anew.
        let more = old.get(&key).and_then(|old| calls.checked_sub(*old));
        row.calls_per_second = more.and_then(|more| per_second(more, passed));
    }
    let named = rows.into_iter().map(|((function, update), row)| Row {
        function: function.to_owned(),
        update,
        ..row
    });
    named.collect()
}

/// `count` in `ms` milliseconds, to a tenth. Rates are for people: those beyond 2^53 tenths may be off by one.
fn per_second(count: u64, ms: u64) -> Option<f64> {
    let tenths = count.saturating_mul(10_000).checked_div(ms)?;
    Some(tenths as f64 / 10.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::words::tests::{bound, edition, update};
    use super::View;
    use crate::api::wire::{
        CallList, Calls, EditionState, Pause, Pauses, Update, UpdateState, Vm, VmState,
    };

    fn vm() -> Vm {
        Vm {
            state: VmState::Running,
            end: None,
            vcpus: 2,
            memory_mib: 256,
            uptime_ms: 7_001,
            kernel: "bzImage".to_owned(),
            cmdline: "quiet".to_owned(),
            console: None,
            panic: None,
            pauses: Pauses {
                by_user: 1,
                by_exopatch: 2,
                total_us: 700,
                last: [400, 300]
                    .map(|pause_us| Pause { at_ms: 5, pause_us })
                    .into(),
            },
        }
    }

    /// Counts of calls at a time: of the original `f`, of an edition of it, and of another function.
    fn counts(at_ms: u64, original: u64, edition: u64, other: u64) -> CallList {
        let calls = |function: &str, update, calls| Calls {
            function: function.to_owned(),
            update,
            calls,
        };
        CallList {
            at_ms,
            calls: vec![
                calls("g", None, other),
                calls("f", Some(3), edition),
                calls("f", None, original),
            ],
        }
    }

    #[test]
    fn editions_stand_beside_their_originals_with_calls_and_rates() {
        let updates = [
            Update {
                id: 2,
                editions: vec![edition(EditionState::Draining, Some("cat"))],
                ..update(UpdateState::Replaced)
            },
            Update {
                bound: bound(&["a", "b"]),
                ..update(UpdateState::Switching)
            },
        ];
        let (now, before) = (counts(3_000, 30, 17, 5), counts(1_000, 10, 7, 9));
        let view = View::new(&vm(), &updates, Some(&now), Some(&before));
        let json = serde_json::to_value(&view).unwrap();
        let rows = json!([
            { "function": "f", "calls": 30, "calls_per_second": 10.0 },
            { "function": "f", "update": 2, "state": "draining", "why": "cat" },
            { "function": "f", "update": 3, "state": "active", "calls": 17, "calls_per_second": 5.0 },
            { "function": "g", "calls": 5 },
        ]);
        assert_eq!(json["functions"], rows);
        assert_eq!(json["switching"][0]["bound"][1]["who"], "b");
        assert_eq!(json["calls_at_ms"], 3_000);
        let table = "\
running, 2 vCPUs, up 7.001 s
pauses: 1 of users, 2 of exopatch with 700 µs in all
the last, in µs: 300 400

FUNCTION                      EDITION     STATE              CALLS      CALLS/s
f                             original    -                     30         10.0
f                             update 2    draining               -            -
f                             update 3    active                17          5.0
g                             original    -                      5            -

update 2: edition of f is draining (cat)

update 3 is switching and waits for 2 tasks: a, b
  a                       f+0x5 < g+0x9
  b                       f+0x5 < g+0x9
";
        assert_eq!(view.table(), table);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let view = View::new(&vm(), &[update(UpdateState::Applied)], None, None);
        let view = View {
            calls_unknown: Some("an operation\nis under way".to_owned()),
            ..view
        };
        let json = serde_json::to_value(&view).unwrap();
        let row = json!({ "function": "f", "update": 3, "state": "active" });
        assert_eq!(json["functions"], json!([row]));
        assert_eq!(json["calls_at_ms"], json!(null));
        let said = "no new counts of calls: an operation\\nis under way\n";
        assert!(view.table().contains(said), "{}", view.table());
        // Two looks at the same counts tell no rate.
        let same = counts(1_000, 1, 1, 1);
        let view = View::new(&vm(), &[], Some(&same), Some(&same));
        assert!(
            view.functions
                .iter()
                .all(|row| row.calls_per_second.is_none())
        );
    }
}
