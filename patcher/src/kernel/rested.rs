//! Tasks whose stacks were looked through while the guest ran, found to be in nothing that was asked about, and that have not run since: under
//! the pause nobody has to look at those again.
//!
//! A task that stops running is counted first (`nvcsw`, `nivcsw`) and let go last (`on_cpu`; kernel `kernel/sched/core.c`, `__schedule()` and
//! `finish_task()`). So one that was found let go *after* its count was read, and whose stack was read after that, had stopped for good with that
//! count or a higher one. If it has the same one under the pause, is no CPU's current task, and no vCPU is on its stack, it has not run in
//! between: its stack is as it was read. What was read in motion is never believed: it does not fit, and the task is looked at again.

use std::sync::atomic::{Ordering, fence};

use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::quiescence::Question;
use super::stack::{ScanError, Scanner};
use super::tasks::{Reader, Task, Tasks, Turns};
use super::unwind::{Followed, OtherCode};
use super::vmap;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// Tasks ahead among which the next one is looked for, before all are: lists change little between two looks.
const AHEAD: usize = 8;

/// The tasks that were found so.
#[derive(Clone, Debug, Default)]
pub struct Rested {
    /// In the order of the kernel's lists.
    tasks: Vec<Task>,
    /// Where they are, sorted, and the index of each.
    places: Vec<(Gva, usize)>,
    /// All tasks, rested or not, in that order.
    order: Vec<Gva>,
    /// The descriptions of areas that are mapped like stacks, in the order of their list.
    areas: Vec<Gva>,
}

impl Rested {
    /// Looks at every task of the running guest that is at rest, for a look under a pause with the same `question`. What cannot be read now is left
    /// to that.
    ///
    /// # Errors
    /// When the tasks cannot be listed, or no stack of the kernel can be followed.
    pub fn look<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        guest: &R,
        question: &Question<'_>,
        others: &[OtherCode],
    ) -> Result<Self, ScanError> {
        let Some(layout) = &kernel.layout().task.turns else {
            return Ok(Self::default());
        };
        let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
        let tasks = Tasks::listed(kernel, &memory, &Self::default())?;
        // Counts are read before it is asked who was let go.
        fence(Ordering::Acquire);
        let asked = [question.forbidden, question.watched].concat();
        let within = [&asked, question.group].concat();
        let is_in = |ip: Gva| within.iter().any(|range| range.contains(&ip));
        let mut scanner = Scanner::new(kernel, &memory, (&asked, &[]), &mut []);
        let mut followed = Followed::new(kernel, &memory, &tasks, others)?;
        let reader = Reader::new(kernel);
        let mut reading = reader.reading(&memory);
        let mut rested = Vec::new();
        let asleep = tasks.tasks.iter().enumerate();
        for (index, task) in asleep.filter(|(_, task)| task.cpu.is_none()) {
            let let_go = memory.u32(Gva(task.at.0.wrapping_add(layout.on_cpu)));
            if !let_go.is_ok_and(|on_cpu| on_cpu == 0) {
                continue;
            }
            // And everything else behind that.
            fence(Ordering::Acquire);
            let Ok(task) = reading.task(task.at, task.turns) else {
                continue;
            };
            let outside = scanner.task(&task, Some(task.saved_sp)).is_ok()
                && followed.is_outside(index, &task, is_in);
            if outside {
                rested.push(Task {
                    rested: true,
                    ..task
                });
            }
        }
        let places = rested.iter().enumerate();
        let mut places: Vec<_> = places.map(|(index, task)| (task.at, index)).collect();
        places.sort_unstable();
        let areas = vmap::areas(kernel, &memory, &[])?;
        let rested = Self {
            tasks: rested,
            places,
            order: tasks.tasks.iter().map(|task| task.at).collect(),
            areas: areas.iter().map(|area| area.at).collect(),
        };
        // Once as it will be done under the pause: what is read there is near then.
        drop(Tasks::read_beside(kernel, &memory, &rested));
        Ok(rested)
    }

    /// The tasks, rested or not, in the order in which they were found.
    pub(crate) fn order(&self) -> &[Gva] {
        &self.order
    }

    /// The descriptions of areas that are mapped like stacks, in the order in which they were found.
    pub(crate) fn areas(&self) -> &[Gva] {
        &self.areas
    }

    /// What is known of them, for a walk through the kernel's lists.
    pub(crate) fn recall(&self) -> Recall<'_> {
        Recall {
            rested: self,
            next: 0,
        }
    }
}

/// The tasks as they are come to in the kernel's lists.
pub(crate) struct Recall<'a> {
    rested: &'a Rested,
    next: usize,
}

impl<'a> Recall<'a> {
    /// The task at `at`, if it is one of them and has had the same turns.
    pub(crate) fn task(&mut self, at: Gva, turns: Option<Turns>) -> Option<&'a Task> {
        let Rested { tasks, places, .. } = self.rested;
        let ahead = tasks.iter().skip(self.next).take(AHEAD);
        let ahead = ahead.enumerate().find(|(_, task)| task.at == at);
        let index = match ahead {
            Some((distance, _)) => self.next + distance,
            None => {
                let place = places.binary_search_by_key(&at, |(at, _)| *at).ok()?;
                places.get(place)?.1
            }
        };
        self.next = index + 1;
        tasks.get(index).filter(|task| task.turns == turns)
    }
}

#[cfg(test)]
mod tests {
    use super::Rested;
    use crate::addr::Gva;
    use crate::kernel::locate::Kernel;
    use crate::kernel::quiescence::{Answer, Question, quiescent};
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
        let rested = Rested::look(&kernel, &guest, &question, &[]).unwrap();
        happens(&mut guest, slot);
        let answer = quiescent(&kernel, &guest, &guest.vcpus, &question, &[], &rested);
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
    fn is_rested(
        form: Form,
        question: &Question<'_>,
        prepare: impl Fn(&mut TinyGuest, u64),
    ) -> bool {
        let (mut guest, kernel, slot) = sleeping(form, after(function::OTHERS));
        prepare(&mut guest, slot);
        let rested = Rested::look(&kernel, &guest, question, &[]).unwrap();
        rested.tasks.iter().any(|task| task.pid == 7)
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
            let group = Question {
                group: &forbidden,
                ..Question::default()
            };
            assert!(!is_rested(form, &group, plain), "{form:?}: of the group");
            let runs = |guest: &mut TinyGuest, _| guest.put(guest.tasks[2] + task::ON_CPU, 1);
            assert!(!is_rested(form, &asked, runs), "{form:?}: on its way");
            let current = |guest: &mut TinyGuest, _| guest.run(1, 2);
            assert!(!is_rested(form, &asked, current), "{form:?}: current");
            let silent = |guest: &mut TinyGuest, slot| guest.put(slot, after(function::SILENT));
            assert!(!is_rested(form, &asked, silent), "{form:?}: unreliable");
        }
    }

    #[test]
    fn a_group_has_its_members_after_a_first_look() {
        let (mut guest, kernel, slot) = sleeping(Form::New, after(function::OTHERS));
        let group = forbidden();
        let question = Question {
            group: &group,
            ..Question::default()
        };
        let members = |guest: &TinyGuest| -> Answer {
            let rested = Rested::look(&kernel, guest, &question, &[]).unwrap();
            quiescent(&kernel, guest, &guest.vcpus, &question, &[], &rested).unwrap()
        };
        assert!(members(&guest).inside.is_empty());
        guest.put(slot, after(function::PLAIN));
        assert_eq!(members(&guest).inside.len(), 1);
    }
}
