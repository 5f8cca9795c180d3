//! Events in words: what happened, and of an update what is new since the event before.

use std::collections::BTreeMap;

use super::clean;
use super::show::seconds;
use crate::api::wire::{BoundTask, Edition, Event, EventBody, Update, UpdateState};

/// Tasks that are named; more are only counted.
const NAMED: usize = 4;

/// What was told so far: each update as it was then.
#[derive(Debug, Default)]
pub(super) struct Told(BTreeMap<u64, Update>);

impl Told {
    /// One line for an event.
    pub(super) fn event(&mut self, event: &Event) -> String {
        let what = match &event.body {
            EventBody::Started => "the guest runs".to_owned(),
            EventBody::Paused { stop_us } => format!("paused after {stop_us} µs"),
            EventBody::Resumed { paused_us } => {
                format!("resumed after a pause of {paused_us} µs")
            }
            EventBody::PowerButton => "the power button was pressed".to_owned(),
            EventBody::Panic { line } => {
                format!("the guest's kernel panicked: {}", clean(line))
            }
            EventBody::LeftPaused => {
                "the guest is kept paused: its memory is not known to be sound".to_owned()
            }
            EventBody::Ended { message, .. } => clean(message),
            EventBody::Update { update } => self.update(update),
            EventBody::Missed { count } => format!("{count} events were missed"),
            EventBody::Other { message, .. } => clean(message),
        };
        format!("{:>10} {:>5} {what}", seconds(event.at_ms), event.id)
    }

    fn update(&mut self, now: &Update) -> String {
        let Some(before) = self.0.insert(now.id, now.clone()) else {
            return whole(now);
        };
        let mut news = Vec::new();
        let editions = editions(&before.editions, &now.editions);
        if !editions.is_empty() {
            news.push(format!("update {}: {}", now.id, editions.join(", ")));
        }
        if (&now.rule, now.counted) != (&before.rule, before.counted) {
            news.push(format!("update {} {}", now.id, used(now)));
        }
        let other_bound = now.bound != before.bound;
        // All but what is told of one by one.
        let rest = Update {
            editions: now.editions.clone(),
            hooks: Vec::new(),
            bound: now.bound.clone(),
            rule: now.rule.clone(),
            counted: now.counted,
            ..before
        };
        if rest != *now || (news.is_empty() && !other_bound) {
            news.insert(0, whole(now));
        } else if other_bound {
            let bound = now.bound.as_deref().unwrap_or_default();
            news.push(format!("update {} {}", now.id, waits(bound)));
        }
        news.join("; ")
    }
}

/// An update whatever was told of it before.
fn whole(update: &Update) -> String {
    let mut line = format!("update {} {}", update.id, update.state.name());
    if !update.name.is_empty() {
        line.push_str(&format!(" ({})", clean(&update.name)));
    }
    let detail = match (&update.error, &update.doing, &update.bound) {
        (Some(error), _, _) => Some(format!(
            "{}: {}",
            clean(&error.message),
            clean(&error.cause)
        )),
        (None, Some(doing), _) => Some(clean(doing)),
        (None, None, Some(bound)) => Some(waits(bound)),
        (None, None, None) => None,
    };
    if let Some(detail) = detail {
        line.push_str(&format!(": {detail}"));
    }
    line
}

/// The editions that are not where they were.
fn editions(before: &[Edition], now: &[Edition]) -> Vec<String> {
    let same =
        |one: &Edition, other: &Edition| one.function == other.function && one.at == other.at;
    let changed = now.iter().filter(|edition| !before.contains(edition));
    let gone = before
        .iter()
        .filter(|edition| !now.iter().any(|other| same(edition, other)));
    let changed = changed.map(|edition| format!("edition of {}", stands(edition)));
    let gone = gone.map(|edition| format!("edition of {} is gone", clean(&edition.function)));
    changed.chain(gone).collect()
}

/// Where an edition stands, and why.
pub(super) fn stands(edition: &Edition) -> String {
    let why = edition.why.as_ref();
    let why = why.map_or_else(String::new, |why| format!(" ({})", clean(why)));
    let (function, state) = (clean(&edition.function), edition.state.name());
    format!("{function} is {state}{why}")
}

/// Whom a switch waits for.
pub(super) fn waits(bound: &[BoundTask]) -> String {
    let names = bound.iter().take(NAMED).map(|task| clean(&task.who));
    let names = names.collect::<Vec<_>>().join(", ");
    match bound.len() {
        0 => "waits for no task".to_owned(),
        1 => format!("waits for 1 task: {names}"),
        all @ 2..=NAMED => format!("waits for {all} tasks: {names}"),
        all => format!("waits for {all} tasks: {names} and {} more", all - NAMED),
    }
}

/// How an update's editions are used.
fn used(update: &Update) -> String {
    let rule = update.rule.as_ref();
    let rule = rule.map_or_else(
        || "is for all calls".to_owned(),
        |rule| format!("is for calls with {}", clean(rule)),
    );
    let counted = if update.counted { "" } else { "not " };
    format!("{rule}, {counted}counted")
}

/// The state of an update, with the number of tasks that its switch waits for.
pub(super) fn state(update: &Update) -> String {
    let name = update.state.name();
    match (&update.bound, update.state) {
        (Some(bound), UpdateState::Switching | UpdateState::Reverting) => {
            format!("{name} ({})", bound.len())
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Told, state};
    use crate::api::wire::{
        BoundTask, Edition, EditionState, ErrorBody, Event, EventBody, Update, UpdateState,
    };

    /// An update number 3 with one edition.
    pub(in crate::client) fn update(state: UpdateState) -> Update {
        Update {
            id: 3,
            name: "fix.xpu".to_owned(),
            state,
            doing: None,
            check: false,
            package_bytes: 1,
            functions: vec!["f".to_owned()],
            instead_of: Vec::new(),
            model: None,
            rule: None,
            counted: false,
            editions: vec![edition(EditionState::Active, None)],
            hooks: Vec::new(),
            bound: None,
            submitted_at_ms: 1,
            changed_at_ms: 1,
            applied: None,
            reverted: None,
            error: None,
        }
    }

    pub(in crate::client) fn edition(state: EditionState, why: Option<&str>) -> Edition {
        Edition {
            function: "f".to_owned(),
            at: "0x10".to_owned(),
            state,
            why: why.map(str::to_owned),
        }
    }

    /// Tasks by name.
    pub(in crate::client) fn bound(names: &[&str]) -> Option<Vec<BoundTask>> {
        let tasks = names.iter().map(|who| BoundTask {
            who: (*who).to_owned(),
            frames: vec!["f+0x5".to_owned(), "g+0x9".to_owned()],
            unreliable: None,
        });
        Some(tasks.collect())
    }

    #[test]
    fn an_event_says_what_is_new_in_its_update() {
        let mut told = Told::default();
        let mut check = |update: Update, line: &str| {
            let body = EventBody::Update {
                update: Box::new(update),
            };
            let event = Event {
                id: 9,
                at_ms: 1500,
                body,
            };
            assert_eq!(told.event(&event), format!("     1.500     9 {line}"));
        };
        let applied = update(UpdateState::Applied);
        let waiting = |names| Update {
            bound: bound(names),
            ..update(UpdateState::Switching)
        };
        let with = |editions| Update {
            editions,
            ..update(UpdateState::Applied)
        };
        let draining = |why| vec![edition(EditionState::Draining, why)];
        check(applied.clone(), "update 3 applied (fix.xpu)");
        check(
            with(draining(Some("cat\u{1b}"))),
            "update 3: edition of f is draining (cat\\u{1b})",
        );
        check(with(draining(None)), "update 3: edition of f is draining");
        check(with(Vec::new()), "update 3: edition of f is gone");
        check(applied.clone(), "update 3: edition of f is active");
        check(
            waiting(&["a", "b"]),
            "update 3 switching (fix.xpu): waits for 2 tasks: a, b",
        );
        check(waiting(&["b"]), "update 3 waits for 1 task: b");
        check(
            waiting(&["a", "b", "c", "d", "e", "f"]),
            "update 3 waits for 6 tasks: a, b, c, d and 2 more",
        );
        check(waiting(&[]), "update 3 waits for no task");
        let both = Update {
            editions: draining(None),
            ..waiting(&["a"])
        };
        check(
            both,
            "update 3: edition of f is draining; update 3 waits for 1 task: a",
        );
        check(with(draining(None)), "update 3 applied (fix.xpu)");
        let reverted = Update {
            editions: Vec::new(),
            ..update(UpdateState::Reverted)
        };
        check(
            reverted.clone(),
            "update 3 reverted (fix.xpu); update 3: edition of f is gone",
        );
        let ruled = Update {
            rule: Some("uid = 1".to_owned()),
            counted: true,
            ..reverted.clone()
        };
        check(ruled, "update 3 is for calls with uid = 1, counted");
        check(reverted.clone(), "update 3 is for all calls, not counted");
        let failed = Update {
            error: Some(ErrorBody {
                code: "c".to_owned(),
                message: "m".to_owned(),
                cause: "because".to_owned(),
                hint: "h".to_owned(),
            }),
            ..reverted
        };
        check(failed.clone(), "update 3 reverted (fix.xpu): m: because");
        check(failed, "update 3 reverted (fix.xpu): m: because");
    }

    #[test]
    fn a_switch_shows_how_many_tasks_it_waits_for() {
        let mut update = update(UpdateState::Switching);
        update.bound = bound(&["a", "b"]);
        assert_eq!(state(&update), "switching (2)");
        update.state = UpdateState::Applied;
        assert_eq!(state(&update), "applied");
    }
}
