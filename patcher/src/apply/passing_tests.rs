//! Switches that go by task, on a made-up kernel in a made-up guest: who is bound to which side, and until when.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::times::{drop_time, set_time};
use super::tune::{SetChange, SetsError, change_set, drop_set, tick};
use super::whole_tests::{calling, how, live, options, started, undo_by};
use super::{ApplyError, Arena, Life, Model, Report, Request, apply, force, reuse, settle};
use crate::addr::{Gpa, Gva};
use crate::edition::list::Use;
use crate::guest::fake::FakeGuest;
use crate::kernel::locate::Kernel;
use crate::kernel::testing::guest::{SLIDE, TinyGuest};
use crate::kernel::testing::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, SAVED_REGISTERS, function};
use crate::kernel::testing::{FORMS, Form, TEXT, task};
use crate::observe::verify;
use crate::plan::Lead;
use crate::rule::{Rule, tune};

/// A guest in which task 7 sleeps in `patient`; with its `task_struct`, and where it is written where it goes on.
pub(super) fn sleeping(form: Form) -> (FakeGuest, Kernel, Arena, u64, Gpa) {
    let after = |number| TEXT + SLIDE + FUNCTIONS + number * FUNCTION + AFTER_CALL;
    let in_it = TEXT + SLIDE + 0x440 + 0x10;
    let mut tiny = TinyGuest::new(form, 4);
    let first = after(function::FIRST);
    let sleeper = tiny.task(7, "sleeper", &[0, 0, 0, 0, 0, 0, in_it, first]);
    let task = tiny.tasks[sleeper];
    let slot = tiny.get(task + task::SP) + 8 * 6;
    let (guest, kernel, arena) = started(tiny);
    let at = kernel.translate(&guest, Gva(slot)).unwrap();
    (guest, kernel, arena, task, at)
}

/// The same with a task that was preempted, and where it is written which instruction it will go on with.
pub(super) fn preempted(form: Form) -> (FakeGuest, Kernel, Arena, u64, Gpa) {
    const SAVED: usize = 7;
    const IP: usize = SAVED + 16;
    const SP: usize = SAVED + 19;
    let mut tiny = TinyGuest::new(form, 4);
    let mut words = [0; SAVED + 23];
    words[SAVED - 1] = TEXT + SLIDE + SAVED_REGISTERS;
    (words[IP], words[IP + 1]) = (ELSEWHERE, 0x10);
    words[SAVED + 22] = TEXT + SLIDE + FUNCTIONS + function::FIRST * FUNCTION + AFTER_CALL;
    let index = tiny.task(7, "preempted", &words);
    let task = tiny.tasks[index];
    let sp = tiny.get(task + task::SP);
    tiny.put(sp + 8 * SP as u64, sp + 8 * (SAVED as u64 + 22));
    let (guest, kernel, arena) = started(tiny);
    let at = kernel.translate(&guest, Gva(sp + 8 * IP as u64)).unwrap();
    (guest, kernel, arena, task, at)
}

/// A guest in which task 7 sleeps in the edition of update 1, which was applied by task and is used like this.
pub(super) fn in_an_edition(form: Form, how: Use) -> (FakeGuest, Kernel, Arena, u64, Gpa) {
    let (mut guest, kernel, mut arena, task, at) = sleeping(form);
    guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
    let package = calling(form);
    let request = Request {
        model: Model::PerTask,
        how,
        ..Request::new(1, &package)
    };
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    let edition = arena.holds.placed[&1].linked.redirections[0].edition;
    guest.poke(at, &(edition.0 + 10).to_le_bytes()).unwrap();
    (guest, kernel, arena, task, at)
}

/// Where a task goes on that has left `patient`.
pub(super) const ELSEWHERE: u64 =
    TEXT + SLIDE + FUNCTIONS + function::OTHERS * FUNCTION + AFTER_CALL;

/// The tasks that are bound, of each switch under way.
pub(super) fn bound(arena: &Arena) -> Vec<Vec<u64>> {
    let passing = arena.holds.passing.iter();
    passing
        .map(|passing| passing.set.keys().collect())
        .collect()
}

/// Takes an update back, each task when it is outside.
pub(super) fn back(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    id: u64,
) -> Result<Report, ApplyError> {
    undo_by(guest, kernel, arena, &[id], Model::PerTask)
}

/// A sleeper in the function itself goes on by it, everybody else by the edition, until it was seen outside.
#[test]
fn a_task_in_the_old_side_is_bound_to_it_until_it_has_left() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        let before = live(&guest, &kernel);
        let package = calling(form);
        let request = Request {
            model: Model::Quiescent,
            ..Request::new(1, &package)
        };
        let busy = apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap_err();
        assert!(busy.to_string().contains("task 7 (sleeper)"), "{busy}");
        assert_eq!(live(&guest, &kernel), before);
        let request = Request {
            model: Model::PerTask,
            ..request
        };
        apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        let passing = arena.holds.passing[0].clone();
        assert_eq!(passing.inside[0].who.to_string(), "task 7 (sleeper)");
        let mut memory = vec![0; passing.set.bytes().len()];
        kernel
            .read(&guest, passing.set.place().at, &mut memory)
            .unwrap();
        assert_eq!(memory, passing.set.bytes(), "as handlers see it");
        let lead = |arena: &Arena| arena.holds.functions.iter().next().unwrap().lead;
        assert!(matches!(lead(&arena), Lead::Handler(_)));
        let observed = verify(&guest, &kernel, &arena.holds, 1);
        assert!(observed.differences.is_empty(), "{observed:?}");
        // Others have to wait, or this one be taken back.
        let request = Request::new(2, &package);
        let second = apply(&mut guest, &kernel, &mut arena, &request, &options(false));
        let second = second.unwrap_err().to_string();
        assert!(
            second.contains("is still being switched by update 1"),
            "{second}"
        );
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert_eq!(bound(&arena), [[task]]);
        // It wakes, and is seen elsewhere.
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert!(bound(&arena).is_empty());
        let edition = arena.holds.placed[&1].linked.redirections[0].edition;
        assert_eq!(
            lead(&arena),
            Lead::Edition(edition),
            "a jump and nothing else"
        );
        assert!(
            verify(&guest, &kernel, &arena.holds, 1)
                .differences
                .is_empty()
        );
    }
}

/// What a rule has counted, and how long it holds, go on in the handler of a switch, on the old side too.
#[test]
fn a_rule_goes_on_for_a_task_that_is_bound() {
    let (mut guest, kernel, mut arena, task, at) = sleeping(Form::New);
    guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
    let package = calling(Form::New);
    let rule = Rule::parse("for 1s or first 5").unwrap();
    let request = Request {
        how: Use {
            rule: Some(Arc::new(rule)),
            counted: false,
        },
        ..Request::new(1, &package)
    };
    let start = Instant::now();
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    let cell = |arena: &Arena, counts: bool| {
        let mut cells = arena.holds.made[0].assembled.cells.iter();
        let cell = cells.find(|cell| match cell.what {
            tune::Use::Calls => counts,
            tune::Use::During(_) => !counts,
            _ => false,
        });
        cell.unwrap().at
    };
    let calls = kernel.translate(&guest, cell(&arena, true)).unwrap();
    guest.poke(calls, &3_u64.to_le_bytes()).unwrap();
    let edition = arena.holds.placed[&1].linked.redirections[0].edition;
    let inside = edition.0 + 10;
    guest.poke(at, &inside.to_le_bytes()).unwrap();
    back(&mut guest, &kernel, &mut arena, 1).unwrap();
    assert_eq!(bound(&arena), [[task]]);
    let read = |guest: &FakeGuest, at| kernel.read_u64(guest, at).unwrap();
    assert_eq!(read(&guest, cell(&arena, true)), 3);
    tick(&mut guest, &mut arena, start + Duration::from_secs(60)).unwrap();
    assert_eq!(read(&guest, cell(&arena, false)), 0);
}

/// The same the other way: a sleeper in the edition keeps it when it is taken back, until that is forced; its room, until it has left.
#[test]
fn a_task_in_an_edition_keeps_it_until_that_is_forced() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        let before = live(&guest, &kernel);
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        let package = calling(form);
        let request = Request::new(1, &package);
        apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
        let edition = arena.holds.placed[&1].linked.redirections[0].edition;
        let inside = edition.0 + 10;
        guest.poke(at, &inside.to_le_bytes()).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        assert_eq!(bound(&arena), [[task]], "it is in the edition");
        force(&mut guest, &kernel, &mut arena, 1, &options(false)).unwrap();
        assert_eq!(live(&guest, &kernel), before);
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        let by = Some("task 7 (sleeper)".to_owned());
        assert_eq!(arena.holds.editions(1)[0].life, Life::Draining { by });
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert!(arena.holds.placed.is_empty() && !arena.holds.is_settling());
        // What all handlers call stays.
        let used = arena.holds.space.used();
        assert!(used < 4096, "{used}");
        let again = force(&mut guest, &kernel, &mut arena, 1, &options(false));
        assert!(again.unwrap_err().to_string().contains("nothing to force"));
    }
}

/// An edition may jump to its original: whoever is in that when the edition goes is on its side. One who is bound to the original is not.
#[test]
fn who_goes_on_for_an_edition_is_told_from_who_never_came_to_it() {
    for form in FORMS {
        let after = |number| TEXT + SLIDE + FUNCTIONS + number * FUNCTION + AFTER_CALL;
        let in_it = TEXT + SLIDE + 0x440 + 0x10;
        let first = after(function::FIRST);
        let mut tiny = TinyGuest::new(form, 4);
        let one = tiny.task(7, "one", &[0, 0, 0, 0, 0, 0, in_it, first]);
        let other = after(function::OTHERS);
        let two = tiny.task(8, "two", &[0, 0, 0, 0, 0, 0, other, first]);
        let tasks = [one, two].map(|task| tiny.tasks[task]);
        let slots = tasks.map(|task| tiny.get(task + task::SP) + 8 * 6);
        let (mut guest, kernel, mut arena) = started(tiny);
        let [at_one, at_two] = slots.map(|slot| kernel.translate(&guest, Gva(slot)).unwrap());
        let package = calling(form);
        let request = |id, instead_of| Request {
            instead_of,
            model: Model::PerTask,
            ..Request::new(id, &package)
        };
        let options = options(false);
        let bound = |arena: &Arena, task: u64| {
            let mut passing = arena.holds.passing.iter();
            passing.any(|passing| passing.set.contains(task))
        };
        apply(&mut guest, &kernel, &mut arena, &request(1, &[]), &options).unwrap();
        assert!(
            bound(&arena, tasks[0]) && !bound(&arena, tasks[1]),
            "{form:?}"
        );
        guest.poke(at_two, &in_it.to_le_bytes()).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        assert!(
            !bound(&arena, tasks[0]) && bound(&arena, tasks[1]),
            "{form:?}"
        );

        for at in [at_one, at_two] {
            guest.poke(at, &other.to_le_bytes()).unwrap();
        }
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        apply(&mut guest, &kernel, &mut arena, &request(2, &[]), &options).unwrap();
        assert!(arena.holds.passing.is_empty());
        // Who is bound to what is replaced cannot go on by it once the other one goes, too.
        let edition = arena.holds.placed[&2].linked.redirections[0].edition;
        let inside = (edition.0 + 10).to_le_bytes();
        guest.poke(at_one, &inside).unwrap();
        apply(&mut guest, &kernel, &mut arena, &request(3, &[2]), &options).unwrap();
        assert!(bound(&arena, tasks[0]));
        let refused = back(&mut guest, &kernel, &mut arena, 3)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("still being switched by update 3"),
            "{refused}"
        );
        guest.poke(at_one, &other.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        back(&mut guest, &kernel, &mut arena, 3).unwrap();
        assert!(arena.holds.passing.is_empty());
    }
}

/// Who sleeps in an edition that was taken back by force keeps nobody from taking back the next one: what he is bound to is the original.
#[test]
fn what_drains_does_not_keep_the_next_update() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        let package = calling(form);
        let options = options(false);
        let apply = |guest: &mut FakeGuest, arena: &mut Arena, id| {
            let request = Request {
                model: Model::PerTask,
                ..Request::new(id, &package)
            };
            apply(guest, &kernel, arena, &request, &options)
        };
        apply(&mut guest, &mut arena, 1).unwrap();
        let edition = arena.holds.placed[&1].linked.redirections[0].edition;
        guest.poke(at, &(edition.0 + 10).to_le_bytes()).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        force(&mut guest, &kernel, &mut arena, 1, &options).unwrap();
        apply(&mut guest, &mut arena, 2).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        back(&mut guest, &kernel, &mut arena, 2).unwrap();
        assert!(arena.holds.passing.is_empty(), "{form:?}");
        assert!(arena.holds.placed.contains_key(&1), "he is still in it");
    }
}

/// Other calls for the editions are a switch too, by the model with which they came: who is within goes on by the rule that he began with.
#[test]
fn another_rule_waits_for_who_is_within() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = in_an_edition(form, Use::default());
        let options = options(false);
        reuse(
            &mut guest,
            &kernel,
            &mut arena,
            1,
            how("cpu = 77"),
            &options,
        )
        .unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        let bound_way = &arena.holds.made.last().unwrap().bound;
        assert!(bound_way[0].rule.is_none() && bound_way[0].update == Some(1));
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert!(arena.holds.passing.is_empty(), "{form:?}");
        assert!(arena.holds.placed.contains_key(&1));
    }
}

/// What only a task that is bound still goes by stays, until it has left.
#[test]
fn a_set_and_a_time_stay_for_who_is_bound() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        let options = options(false);
        let add = SetChange {
            add: vec![7],
            ..SetChange::default()
        };
        change_set(&mut guest, &mut arena, "some", &add).unwrap();
        set_time(&mut guest, &mut arena, "lunch", true).unwrap();
        let package = calling(form);
        let request = Request {
            model: Model::PerTask,
            how: how("pid in set some and during lunch"),
            ..Request::new(1, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &request, &options).unwrap();
        let edition = arena.holds.placed[&1].linked.redirections[0].edition;
        guest.poke(at, &(edition.0 + 10).to_le_bytes()).unwrap();
        reuse(&mut guest, &kernel, &mut arena, 1, how("cpu = 1"), &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        for used in [drop_set(&mut arena, "some"), drop_time(&mut arena, "lunch")] {
            assert!(
                matches!(used, Err(SetsError::Used { update: 1, .. })),
                "{form:?}"
            );
        }
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        drop_set(&mut arena, "some").unwrap();
        drop_time(&mut arena, "lunch").unwrap();
    }
}

/// A handler that nothing leads to any more still leads whoever is in it: to the side that is old by the next switch.
#[test]
fn who_is_in_a_worn_handler_is_bound_too() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = preempted(form);
        let (package, options) = (calling(form), options(false));
        let request = Request {
            model: Model::PerTask,
            how: Use {
                rule: None,
                counted: true,
            },
            ..Request::new(1, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &request, &options).unwrap();
        let handler = arena.holds.made.last().unwrap().code.clone();
        let use_all = Use::default();
        reuse(&mut guest, &kernel, &mut arena, 1, use_all, &options).unwrap();
        assert!(arena.holds.made.is_empty(), "a jump and nothing else");
        guest.poke(at, &handler.start.0.to_le_bytes()).unwrap();
        let second = Request {
            model: Model::PerTask,
            instead_of: &[1],
            ..Request::new(2, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &second, &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert!(bound(&arena).is_empty(), "{form:?}");
    }
}

/// A guest in which task 7 is bound to the original by the switch of update 1, and in the head that leads there.
pub(super) fn in_a_head(form: Form) -> (FakeGuest, Kernel, Arena, u64, Gpa) {
    let (mut guest, kernel, mut arena, task, at) = preempted(form);
    let package = calling(form);
    let request = Request {
        model: Model::PerTask,
        ..Request::new(1, &package)
    };
    guest
        .poke(at, &(TEXT + SLIDE + 0x440).to_le_bytes())
        .unwrap();
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    assert_eq!(bound(&arena), [[task]], "{form:?}");
    let head = arena.holds.placed[&1].linked.redirections[0].head.at;
    guest.poke(at, &head.0.to_le_bytes()).unwrap();
    (guest, kernel, arena, task, at)
}

/// A task that is bound to the original comes to it by a head, which is the new update's.
#[test]
fn who_is_on_the_way_to_the_original_stays_bound() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = in_a_head(form);
        let options = options(false);
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert!(bound(&arena).is_empty(), "{form:?}");
    }
}

/// A set that is done away with while handlers are worn waits for all of them, and each of them gives its room back once.
#[test]
fn worn_handlers_give_their_room_back_once() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, _, at) = preempted(form);
        let (package, options) = (calling(form), options(false));
        change_set(&mut guest, &mut arena, "some", &SetChange::default()).unwrap();
        let counted = Use {
            rule: None,
            counted: true,
        };
        let request = Request {
            how: counted.clone(),
            ..Request::new(1, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &request, &options).unwrap();
        let mut worn = Vec::new();
        for _ in 0..2 {
            let handler = arena.holds.made.last().unwrap().code.clone();
            // He is in this one while it is worn, and in the next later.
            guest.poke(at, &handler.start.0.to_le_bytes()).unwrap();
            worn.push(handler);
            for how in [Use::default(), counted.clone()] {
                reuse(&mut guest, &kernel, &mut arena, 1, how, &options).unwrap();
            }
        }
        let rooms = |arena: &Arena| -> Vec<Range<Gva>> {
            let mut rooms: Vec<_> = arena.holds.all_made().map(|it| it.code.clone()).collect();
            rooms.sort_by_key(|room| room.start);
            rooms
        };
        let before = rooms(&arena);
        assert!(worn.iter().all(|room| before.contains(room)), "{form:?}");
        drop_set(&mut arena, "some").unwrap();
        assert_eq!(rooms(&arena), before, "{form:?}");
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert!(rooms(&arena).contains(&worn[1]), "{form:?}: he is in it");
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        assert_eq!(rooms(&arena).len(), 1, "{form:?}");
    }
}
