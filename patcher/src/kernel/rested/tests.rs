//! A first look at a made-up guest, what happens behind it, and what the look under the pause says then.

use std::time::{Duration, Instant};

use super::Rested;
use crate::addr::Gva;
use crate::kernel::locate::Kernel;
use crate::kernel::quiescence::{Question, quiescent};
use crate::kernel::stack::Who;
use crate::kernel::tasks::Rest;
use crate::kernel::testing::guest::{SLIDE, TinyGuest};
use crate::kernel::testing::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, function};
use crate::kernel::testing::{FORMS, Form, TEXT, task};

fn after(number: u64) -> u64 {
    TEXT + SLIDE + FUNCTIONS + number * FUNCTION + AFTER_CALL
}

/// A guest with a task, of index 2, that sleeps in `at`; and the place of that word.
fn sleeping(form: Form, at: u64) -> (TinyGuest, Kernel, u64) {
    let mut guest = TinyGuest::new(form, 4);
    let words = [0, 0, 0, 0, 0, 0, at, after(function::FIRST)];
    let sleeper = guest.task(7, "sleeper", &words);
    let slot = guest.get(guest.tasks[sleeper] + task::SP) + 6 * 8;
    let kernel = guest.kernel();
    (guest, kernel, slot)
}

/// More time than a look takes.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// What is called so, and is done to a guest.
type Change = (&'static str, fn(&mut TinyGuest));

/// What is asked: that nothing be in the first function.
fn forbidden() -> [std::ops::Range<Gva>; 1] {
    let first = TEXT + SLIDE + FUNCTIONS;
    [Gva(first)..Gva(first + FUNCTION)]
}

/// A first look, then what `happens`, and the look under the pause: how many words were looked at, or what is in the way.
fn looked(form: Form, at: u64, happens: impl Fn(&mut TinyGuest, u64)) -> Result<u64, String> {
    let (mut guest, kernel, slot) = sleeping(form, at);
    let forbidden = forbidden();
    let question = Question {
        forbidden: &forbidden,
        ..Question::default()
    };
    let rested = Rested::look(&kernel, &guest, &question, &[], soon()).unwrap();
    happens(&mut guest, slot);
    let answer = quiescent(&kernel, &guest, &guest.vcpus, &question, &[], rested);
    answer
        .map(|answer| answer.scan.words)
        .map_err(|error| error.to_string())
}

#[test]
fn who_has_not_run_is_not_looked_at_again() {
    for form in FORMS {
        let other = after(function::OTHERS);
        let words = looked(form, other, |_, _| {}).unwrap();
        let all = looked(form, other, |guest, _| {
            guest.put(guest.tasks[2] + task::NVCSW, 1);
        });
        assert_eq!(all.unwrap(), words + 8, "{form:?}");
        // What nobody looks at is not seen. A task that has not run has changed nothing there.
        let unseen = looked(form, other, |guest, slot| {
            guest.put(slot, after(function::PLAIN));
        });
        assert_eq!(unseen.unwrap(), words, "{form:?}");
    }
}

#[test]
fn a_look_ends_when_its_time_is_over() {
    for form in FORMS {
        let (guest, kernel, _) = sleeping(form, after(function::OTHERS));
        let forbidden = forbidden();
        let question = Question {
            forbidden: &forbidden,
            ..Question::default()
        };
        let rested = |until| Rested::look(&kernel, &guest, &question, &[], until).unwrap();
        let at_rest = |rested: &Rested| {
            let mut listed = rested.listed.iter();
            listed.any(|task| task.rest == Rest::Outside)
        };
        assert!(at_rest(&rested(soon())), "{form:?}");
        let late = rested(Instant::now());
        assert!(!at_rest(&late), "{form:?}");
        let answer = quiescent(&kernel, &guest, &guest.vcpus, &question, &[], late);
        assert!(answer.is_ok(), "what is left is looked at then: {answer:?}");
    }
}

#[test]
fn who_has_run_is_looked_at_again() {
    let changes: [Change; 5] = [
        ("it wanted to stop", |guest| {
            guest.put(guest.tasks[2] + task::NVCSW, 1);
        }),
        ("it had to", |guest| {
            guest.put(guest.tasks[2] + task::NIVCSW, 1);
        }),
        ("another one in its place", |guest| {
            guest.put(guest.tasks[2] + task::START_TIME, 5);
        }),
        ("it runs", |guest| {
            guest.run(1, 2);
            let sp = guest.get(guest.tasks[2] + task::SP) + 6 * 8;
            guest.enter(1, after(function::OTHERS), sp);
        }),
        ("it is being switched to", |guest| {
            let sp = guest.get(guest.tasks[2] + task::SP);
            guest.enter(1, after(function::OTHERS), sp);
        }),
    ];
    for form in FORMS {
        for (what, change) in changes {
            let seen = looked(form, after(function::OTHERS), |guest, slot| {
                change(guest);
                guest.put(slot, after(function::PLAIN));
            });
            let why = seen.unwrap_err();
            assert!(why.contains("is in code"), "{form:?}: {what}: {why}");
        }
    }
}

/// Whether the sleeper is one of those that a first look finds, after `prepare`.
fn is_rested(form: Form, question: &Question<'_>, prepare: impl Fn(&mut TinyGuest, u64)) -> bool {
    let (mut guest, kernel, slot) = sleeping(form, after(function::OTHERS));
    prepare(&mut guest, slot);
    let rested = Rested::look(&kernel, &guest, question, &[], soon()).unwrap();
    rested
        .listed
        .iter()
        .any(|task| task.pid == 7 && task.rest == Rest::Outside)
}

#[test]
fn only_who_is_at_rest_and_elsewhere_need_not_be_looked_at() {
    let forbidden = forbidden();
    let plain = |guest: &mut TinyGuest, slot| guest.put(slot, after(function::PLAIN));
    for form in FORMS {
        let asked = Question {
            forbidden: &forbidden,
            ..Question::default()
        };
        assert!(is_rested(form, &asked, |_, _| {}), "{form:?}");
        assert!(!is_rested(form, &asked, plain), "{form:?}: forbidden");
        let watched = Question {
            watched: &forbidden,
            ..Question::default()
        };
        assert!(!is_rested(form, &watched, plain), "{form:?}: watched");
        let runs = |guest: &mut TinyGuest, _| guest.put(guest.tasks[2] + task::ON_CPU, 1);
        assert!(!is_rested(form, &asked, runs), "{form:?}: on its way");
        let current = |guest: &mut TinyGuest, _| guest.run(1, 2);
        assert!(!is_rested(form, &asked, current), "{form:?}: current");
        let dead = |guest: &mut TinyGuest, _| guest.put(guest.tasks[2] + task::EXIT_STATE, 0x20);
        assert!(!is_rested(form, &asked, dead), "{form:?}: dead");
        let silent = |guest: &mut TinyGuest, slot| guest.put(slot, after(function::SILENT));
        assert!(!is_rested(form, &asked, silent), "{form:?}: unreliable");
    }
}

/// Who is in the group after a first look and what `happens` behind it; the sleeper is in it at first.
fn members(form: Form, happens: impl Fn(&mut TinyGuest, u64)) -> Vec<Who> {
    let (mut guest, kernel, slot) = sleeping(form, after(function::PLAIN));
    let group = forbidden();
    let question = Question {
        group: &group,
        ..Question::default()
    };
    let rested = Rested::look(&kernel, &guest, &question, &[], soon()).unwrap();
    happens(&mut guest, slot);
    let answer = quiescent(&kernel, &guest, &guest.vcpus, &question, &[], rested).unwrap();
    // An idle task that has just been left has nothing on its stack here.
    let inside = answer.inside.into_iter();
    let inside = inside.filter(|inside| inside.unreliable.is_none());
    inside.map(|inside| inside.who).collect()
}

#[test]
fn who_has_rested_in_the_group_is_still_in_it() {
    let outside = |guest: &mut TinyGuest, slot| guest.put(slot, after(function::OTHERS));
    let has_run = |guest: &mut TinyGuest| guest.put(guest.tasks[2] + task::NVCSW, 1);
    let sleeper = [Who::Task {
        pid: 7,
        name: "sleeper".into(),
    }];
    for form in FORMS {
        assert_eq!(members(form, |_, _| {}), sleeper, "{form:?}");
        // Nobody looks at it again, until it has run.
        assert_eq!(members(form, outside), sleeper, "{form:?}");
        assert_eq!(
            members(form, |guest, _| has_run(guest)),
            sleeper,
            "{form:?}"
        );
        let gone = members(form, |guest, slot| {
            has_run(guest);
            outside(guest, slot);
        });
        assert_eq!(gone, [], "{form:?}");
        let runs = members(form, |guest, slot| {
            guest.run(1, 2);
            guest.enter(1, after(function::PLAIN), slot + 8);
        });
        assert_eq!(runs, [Who::Vcpu(1)], "{form:?}");
        let switched_to = members(form, |guest, slot| {
            guest.enter(1, after(function::PLAIN), slot + 8);
        });
        assert_eq!(switched_to, [Who::Vcpu(1)], "{form:?}");
        // A user may have any stack pointer while the kernel has yet to take its own.
        let entered = members(form, |guest, slot| {
            guest.enter(1, guest.at("__entry_text_start") + 0x10, slot);
        });
        assert_eq!(entered, sleeper, "{form:?}");
    }
}

/// What is counted one higher.
fn count(guest: &mut TinyGuest, name: &str) {
    let at = guest.at(name);
    guest.put(at, guest.get(at) + 1);
}

#[test]
fn lists_are_walked_again_only_when_a_task_has_come_or_gone() {
    let cut = |guest: &mut TinyGuest| guest.put(guest.tasks[0] + task::TASKS, 0);
    for form in FORMS {
        let other = after(function::OTHERS);
        let unseen = looked(form, other, |guest, _| cut(guest));
        // Where nobody can tell, they always are.
        assert_eq!(unseen.is_ok(), form != Form::OldSorted, "{form:?}");
        for name in ["total_forks", "nr_threads"] {
            let seen = looked(form, other, |guest, _| {
                cut(guest);
                count(guest, name);
            });
            let why = seen.unwrap_err();
            assert!(why.contains("cannot be read"), "{form:?}: {name}: {why}");
        }
        let held = looked(form, other, |guest, _| {
            cut(guest);
            guest.put(guest.at("tasklist_lock"), 0xff);
        });
        assert!(held.is_err(), "{form:?}");
    }
}

#[test]
fn who_came_since_is_looked_at() {
    for form in FORMS {
        for (listed, counted) in [(true, true), (false, false)] {
            let mut guest = TinyGuest::new(form, 4);
            let others = [
                0,
                0,
                0,
                0,
                0,
                0,
                after(function::OTHERS),
                after(function::FIRST),
            ];
            let within = [
                0,
                0,
                0,
                0,
                0,
                0,
                after(function::PLAIN),
                after(function::FIRST),
            ];
            guest.task(7, "sleeper", &others);
            guest.task(8, "comes", &within);
            let kernel = guest.kernel();
            let [first, sleeper, comes] = [0, 2, 3].map(|index| guest.tasks[index] + task::TASKS);
            guest.list(first, &[sleeper]);
            let forbidden = forbidden();
            let question = Question {
                forbidden: &forbidden,
                ..Question::default()
            };
            // Its stack is one of no known task before.
            let sp = guest.get(guest.tasks[3] + task::SP);
            guest.put(guest.tasks[3] + task::SP, 0);
            let rested = Rested::look(&kernel, &guest, &question, &[], soon()).unwrap();
            guest.put(guest.tasks[3] + task::SP, sp);
            if listed {
                guest.list(first, &[sleeper, comes]);
            } else {
                // It has left the lists already, and runs.
                guest.run(1, 3);
                guest.enter(1, after(function::OTHERS), sp + 6 * 8);
            }
            if counted {
                count(&mut guest, "total_forks");
                count(&mut guest, "nr_threads");
            }
            let answer = quiescent(&kernel, &guest, &guest.vcpus, &question, &[], rested);
            let error = answer.unwrap_err().to_string();
            let who = "task 8 (comes)";
            assert!(error.contains(who), "{form:?}: {listed}: {error}");
        }
    }
}
