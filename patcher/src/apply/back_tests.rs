//! Switches under way that another operation ends, on a made-up kernel in a made-up guest: only if who is bound goes on as everybody will.

use super::passing_tests::{ELSEWHERE, back, bound, in_a_head, in_an_edition, sleeping};
use super::whole_tests::{calling, how, live, options, package, undo_by};
use super::{ApplyError, Model, Report, Request, apply, reuse, settle};
use crate::edition::list::{ListError, Use};
use crate::kernel::testing::{BUILD_ID, FORMS};

/// Asserts that the switch of `function` by update `by` is in the way.
pub(super) fn in_the_way(result: Result<Report, ApplyError>, function: &str, by: u64) {
    match result {
        Err(ApplyError::List(ListError::Passing {
            function: of,
            by: is,
        })) => {
            assert_eq!((of.as_str(), is), (function, by));
        }
        other => panic!("{other:?}"),
    }
}

/// Who is bound to the original does not come to a third side, which would be new code beneath old.
#[test]
fn another_update_does_not_take_the_place_of_one_that_is_being_switched() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        let (package, options) = (calling(form), options(false));
        let request = |id, instead_of| Request {
            model: Model::PerTask,
            instead_of,
            ..Request::new(id, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &request(1, &[]), &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        let before = live(&guest, &kernel);
        let second = request(2, &[1]);
        in_the_way(
            apply(&mut guest, &kernel, &mut arena, &second, &options),
            "patient",
            1,
        );
        assert_eq!(live(&guest, &kernel), before, "{form:?}");
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        apply(&mut guest, &kernel, &mut arena, &second, &options).unwrap();
        assert!(arena.holds.passing.is_empty(), "{form:?}");
    }
}

/// Who is bound to the update beneath goes back to that, and only behind that to the original.
#[test]
fn two_updates_do_not_go_at_once_while_one_is_bound_to_the_lower() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, _) = in_an_edition(form, Use::default());
        let (package, options) = (calling(form), options(false));
        let second = Request {
            model: Model::PerTask,
            ..Request::new(2, &package)
        };
        apply(&mut guest, &kernel, &mut arena, &second, &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        for model in [Model::PerTask, Model::Immediate] {
            let both = undo_by(&mut guest, &kernel, &mut arena, &[2, 1], model);
            in_the_way(both, "patient", 2);
        }
        back(&mut guest, &kernel, &mut arena, 2).unwrap();
        assert!(bound(&arena).concat().is_empty(), "{form:?}");
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        assert_eq!(bound(&arena), [[task]], "he is in its edition: {form:?}");
    }
}

/// Who is bound to a rule goes by that until he has left, or everybody goes by it again.
#[test]
fn a_rule_is_taken_back_before_its_update_is() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, _) = in_an_edition(form, how("cpu < 5"));
        let options = options(false);
        reuse(&mut guest, &kernel, &mut arena, 1, how("pid = 1"), &options).unwrap();
        assert_eq!(bound(&arena), [[task]], "{form:?}");
        in_the_way(back(&mut guest, &kernel, &mut arena, 1), "patient", 1);
        let third = reuse(&mut guest, &kernel, &mut arena, 1, how("pid = 2"), &options);
        in_the_way(third, "patient", 1);
        assert_eq!(arena.holds.uses[&1], how("pid = 1"), "{form:?}");
        reuse(&mut guest, &kernel, &mut arena, 1, how("cpu < 5"), &options).unwrap();
        assert!(bound(&arena).concat().is_empty(), "{form:?}");
        settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        assert_eq!(bound(&arena), [[task]], "he is in its edition: {form:?}");
    }
}

/// Who is bound to one side of one function may be in any side of another: that one goes by itself.
#[test]
fn a_switch_is_taken_back_by_itself() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, task, at) = sleeping(form);
        let (first, options) = (calling(form), options(false));
        let second = package("behind_patient", 0, &BUILD_ID);
        for (id, package) in [(1, &first), (2, &second)] {
            let request = Request {
                model: Model::PerTask,
                ..Request::new(id, package)
            };
            apply(&mut guest, &kernel, &mut arena, &request, &options).unwrap();
        }
        // His stack cannot be followed: he may be in either.
        assert_eq!(bound(&arena), [[task], [task]], "{form:?}");
        let both = undo_by(&mut guest, &kernel, &mut arena, &[1, 2], Model::PerTask);
        in_the_way(both, "patient", 1);
        for (update, left) in [(1, &[task][..]), (2, &[])] {
            back(&mut guest, &kernel, &mut arena, update).unwrap();
            assert_eq!(bound(&arena).concat(), left, "{form:?}");
        }
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        while arena.holds.is_settling() {
            settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        }
        assert!(arena.holds.placed.is_empty(), "{form:?}");
    }
}

/// Who sleeps in a call within a head goes on with the original, which is where a switch that is taken back leads him too.
#[test]
fn who_is_in_a_head_does_not_keep_a_switch_from_being_taken_back() {
    for form in FORMS {
        let (mut guest, kernel, mut arena, _, at) = in_a_head(form);
        let options = options(false);
        back(&mut guest, &kernel, &mut arena, 1).unwrap();
        assert!(arena.holds.functions.of(1).next().is_none(), "{form:?}");
        assert!(bound(&arena).concat().is_empty(), "{form:?}");
        for _ in 0..4 {
            settle(&mut guest, &kernel, &mut arena, &options).unwrap();
            assert!(arena.holds.placed.contains_key(&1), "he is in it: {form:?}");
        }
        assert!(arena.holds.passing.is_empty(), "{form:?}");
        guest.poke(at, &ELSEWHERE.to_le_bytes()).unwrap();
        while arena.holds.is_settling() {
            settle(&mut guest, &kernel, &mut arena, &options).unwrap();
        }
        assert!(arena.holds.placed.is_empty(), "{form:?}");
    }
}
