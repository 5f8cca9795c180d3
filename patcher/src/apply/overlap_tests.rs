//! Updates that share some of their functions, on a made-up kernel in a made-up guest: each keeps its own together.

use super::back_tests::in_the_way;
use super::passing_tests::{ELSEWHERE, back, bound, preempted, sleeping};
use super::whole_tests::{calling_all, how, options, undo_by};
use super::{Arena, Model, Request, apply, reuse, settle};
use crate::addr::Gpa;
use crate::edition::list::Use;
use crate::edition::object::Package;
use crate::guest::fake::FakeGuest;
use crate::kernel::locate::Kernel;
use crate::kernel::testing::guest::SLIDE;
use crate::kernel::testing::{FORMS, Form, TEXT};

const BOTH: [&str; 2] = ["patient", "behind_patient"];
/// In the first of them, behind what a jump displaces.
const IN_ORIGINAL: u64 = TEXT + SLIDE + 0x44e;

/// Where update 1 has its edition of a function, behind a call.
fn in_edition(arena: &Arena, function: &str) -> u64 {
    let redirections = &arena.holds.placed[&1].linked.redirections;
    let mut of_it = redirections.iter();
    let of_it = of_it.find(|it| it.target.name == function).unwrap();
    of_it.edition.0 + 10
}

/// Applies `package` as update `id`, task by task, for calls of `rule`.
fn come(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    id: u64,
    package: &Package,
    rule: Option<&str>,
) {
    let request = Request {
        model: Model::PerTask,
        how: rule.map(how).unwrap_or_default(),
        ..Request::new(id, package)
    };
    apply(guest, kernel, arena, &request, &options(false)).unwrap();
    assert!(arena.holds.passing.is_empty(), "nobody is within");
}

/// Whoever is in a function that another update covers is bound when the rule of what lies beneath changes, by one store or not.
#[test]
fn what_is_covered_belongs_to_the_old_side() {
    let other = |counted| Use {
        counted,
        ..how(if counted { "pid = 100" } else { "pid = 300" })
    };
    for form in FORMS {
        for (in_it, to) in [(true, false), (true, true), (false, false), (false, true)] {
            let (mut guest, kernel, mut arena, task, at) = preempted(form);
            guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
            let (both, second) = (calling_all(form, &BOTH), calling_all(form, &BOTH[..1]));
            come(&mut guest, &kernel, &mut arena, 1, &both, Some("pid = 100"));
            come(&mut guest, &kernel, &mut arena, 2, &second, None);
            let asleep = if in_it {
                in_edition(&arena, BOTH[0])
            } else {
                IN_ORIGINAL
            };
            guest.poke(at, &asleep.to_le_bytes()).unwrap();
            reuse(
                &mut guest,
                &kernel,
                &mut arena,
                1,
                other(to),
                &options(false),
            )
            .unwrap();
            assert_eq!(bound(&arena), [[task]], "{form:?}: {in_it}, {to}");
            let reliable = arena.holds.passing[0].inside[0].unreliable.is_none();
            assert!(reliable, "{form:?}: {in_it}, {to}");
            guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
            settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
            assert!(arena.holds.passing.is_empty(), "{form:?}: {in_it}, {to}");
        }
    }
}

/// A guest with update 1 of both functions and update 2 of `second` on top, and its sleeper in update 1's.
fn covered(form: Form, second: &[&str], model: Model) -> (FakeGuest, Kernel, Arena, u64, Gpa) {
    let (mut guest, kernel, mut arena, task, at) = sleeping(form);
    guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
    let (both, second) = (calling_all(form, &BOTH), calling_all(form, second));
    come(&mut guest, &kernel, &mut arena, 1, &both, None);
    guest
        .poke(at, &in_edition(&arena, BOTH[1]).to_le_bytes())
        .unwrap();
    let request = Request {
        model,
        ..Request::new(2, &second)
    };
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    (guest, kernel, arena, task, at)
}

/// What is switched for one function is not brought to light for another meanwhile.
#[test]
fn what_is_being_switched_stays_covered() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = covered(form, &BOTH[..1], Model::Immediate);
        reuse(
            &mut guest,
            &kernel,
            &mut arena,
            1,
            how("pid = 1"),
            &options(false),
        )
        .unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        for model in [Model::PerTask, Model::Quiescent] {
            let result = undo_by(&mut guest, &kernel, &mut arena, &[2], model);
            in_the_way(result, BOTH[1], 1);
        }
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        back(&mut guest, &kernel, &mut arena, 2).unwrap();
        assert!(arena.holds.passing.is_empty(), "{form:?}");
    }
}

/// An update that tasks are bound to does not go, nor is it used otherwise, while they are.
#[test]
fn what_tasks_are_bound_to_stays_as_it_is() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = covered(form, &BOTH, Model::PerTask);
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        in_the_way(back(&mut guest, &kernel, &mut arena, 1), BOTH[0], 2);
        let otherwise = reuse(
            &mut guest,
            &kernel,
            &mut arena,
            1,
            how("pid = 1"),
            &options(false),
        );
        in_the_way(otherwise, BOTH[0], 2);
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
    }
}
