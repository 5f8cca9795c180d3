//! What waits for the guest: to leave code, to make switches, to no longer lead calls elsewhere.

use std::sync::Arc;
use std::time::Duration;

use ::patcher::kernel::shadow::Shadow;
use ::patcher::rule::Rule;

use super::super::worker::next_wait;
use super::super::{Done, Life, Problem, State, Update, Use};
use super::{Fixture, reply, soon};
use crate::events::EventKind;

#[test]
fn what_drains_is_looked_at_until_it_is_gone() {
    let f = Fixture::new();
    f.apply(b"drains").unwrap();
    let (_, mut live) = f.events.subscribe(0);
    f.revert(1, None).unwrap();
    let mut seen = Vec::new();
    while seen.last() != Some(&None) {
        let event = live.blocking_recv().unwrap();
        if let EventKind::Update(update) = event.kind
            && update.state == State::Reverted
        {
            let edition = update.editions.first();
            seen.push(edition.map(|edition| edition.life.clone()));
        }
    }
    let draining = |looks: &str| {
        Some(Life::Draining {
            by: Some(looks.to_owned()),
        })
    };
    let want = [
        Some(Life::Active),
        draining("1"),
        draining("2"),
        draining("3"),
        None,
    ];
    assert_eq!(seen, want);
}

#[test]
fn an_update_that_the_guest_shadows_says_so_for_as_long_as_it_does() {
    let f = Fixture::new();
    let (_, mut live) = f.events.subscribe(0);
    f.apply(b"shadowed").unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = live.blocking_recv().unwrap();
        if let EventKind::Update(update) = event.kind
            && let [edition] = update.editions.as_slice()
            && seen.last() != Some(&edition.life)
        {
            seen.push(edition.life.clone());
        }
    }
    let shadowed = Life::Shadowed {
        by: Shadow::Livepatch,
    };
    assert_eq!(seen, [Life::Active, shadowed, Life::Active]);
}

#[test]
fn tasks_that_leave_one_by_one_are_looked_at_often_and_sleepers_seldom() {
    let ms = Duration::from_millis;
    for (wait, before, after, want) in [
        // Nobody is bound, code drains.
        (ms(100), 0, 0, ms(125)),
        (ms(4001), 0, 0, ms(5000)),
        // The last has gone.
        (ms(1000), 1, 0, ms(1250)),
        // Some have.
        (ms(1000), 8, 7, ms(10)),
        // None has.
        (ms(10), 7, 7, ms(12) + Duration::from_micros(500)),
        (ms(4800), 7, 7, ms(5000)),
        // A switch began meanwhile.
        (ms(100), 0, 3, ms(125)),
    ] {
        let got = next_wait(wait, before, after);
        assert_eq!(got, want, "{wait:?} from {before} to {after}");
    }
}

#[test]
fn an_update_is_switching_until_all_tasks_have_made_its_switch() {
    let f = Fixture::new();
    let (_, mut live) = f.events.subscribe(0);
    let update = f.apply(b"passes").unwrap();
    assert_eq!(update.state, State::Switching);
    assert_eq!(update.passing.map(|passing| passing.tasks.len()), Some(2));
    let mut seen = Vec::new();
    while seen.last() != Some(&(State::Applied, None)) {
        let event = live.blocking_recv().unwrap();
        if let EventKind::Update(update) = event.kind
            && update.applied.is_some()
        {
            let left = update.passing.map(|passing| passing.tasks.len());
            seen.push((update.state, left));
        }
    }
    let switching = |left| (State::Switching, left);
    assert_eq!(
        seen[1..],
        [
            switching(Some(2)),
            switching(Some(1)),
            (State::Applied, None)
        ]
    );

    // It can be forced, and taken back, while it is under way; and used otherwise.
    f.apply(b"passes").unwrap();
    let ask = |ask: &dyn Fn(Done<Update>) -> Result<Update, Problem>| {
        let (done, end) = reply();
        ask(done)?;
        end.recv().unwrap()
    };
    let forced = ask(&|done| f.session.force(2, soon(), done)).unwrap();
    assert_eq!((forced.state, forced.passing), (State::Applied, None));
    let again = ask(&|done| f.session.force(2, soon(), done)).unwrap_err();
    assert_eq!(again.code, "nothing_to_force");
    let how = |counted| Use {
        rule: Some(Arc::new(Rule::parse("pid = 1").unwrap())),
        counted,
    };
    let used = ask(&|done| f.session.reuse(2, how(false), soon(), done)).unwrap();
    assert_eq!((used.how, used.state), (how(false), State::Applied));
    let refused = ask(&|done| f.session.reuse(2, how(true), soon(), done)).unwrap_err();
    assert_eq!(refused.code, "no_counters");
    assert_eq!(f.session.updates()[1].how, how(false));
    let none = ask(&|done| f.session.reuse(9, how(false), soon(), done)).unwrap_err();
    assert_eq!(none.code, "no_such_update");
}
