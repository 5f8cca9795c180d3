//! Who is inside given code, or will return into it, by two looks that know nothing of each other.
//!
//! The word scan ([`super::stack`]) finds every word that could be a return address; the unwinder ([`super::unwind`]) finds the return
//! addresses. For code that must be free, what the first turns away stays turned away, and the second has to agree: a frame that the scan
//! missed, or a stack that cannot be followed to its end, refuses. The words alone decide where there is nothing to follow: on a stack of
//! no known task, and in a kernel that has no unwind table.
//! Which tasks are in a group of functions is told by the frames; a task whose stack cannot be followed counts as in it, and then refuses
//! nothing: of the code that must be free its words are looked at all the same.

use std::collections::HashSet;
use std::ops::Range;

use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::orc::OrcError;
use super::rested::Rested;
use super::stack::{Scan, ScanError, Scanner, Watched, Who, on_stacks};
use super::tasks::{Rest, Tasks};
use super::unwind::{End, Followed, Frame, OtherCode, Reason, Unreliable, UnwindError, Whose};
use crate::addr::Gva;
use crate::guest::{ReadPhys, Vcpu};
use crate::publish::Grace;

/// What is wrong with one stack.
#[derive(Debug, PartialEq, Eq)]
enum Objection {
    /// It has a frame in the code.
    Inside(Gva),
    /// It cannot be followed.
    Unreliable(Unreliable),
}

/// What is asked of the threads of a paused guest.
#[derive(Clone, Debug, Default)]
pub struct Question<'q> {
    /// Nothing may be in it.
    pub forbidden: &'q [Range<Gva>],
    /// Which tasks are in it?
    pub group: &'q [Range<Gva>],
    /// Is anything in one of these?
    pub watched: &'q [Range<Gva>],
    /// Have all vCPUs been at rest since?
    pub graces: &'q [Grace],
}

/// A thread that is in the code of a group, or may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inside {
    /// Its `task_struct`, if it is a task's.
    pub task: Option<Gva>,
    /// Whose stack it is.
    pub who: Who,
    /// Its stack from the innermost frame out, as far as it could be followed.
    pub frames: Vec<Frame>,
    /// Why the stack cannot be followed, if it cannot.
    pub unreliable: Option<Unreliable>,
}

/// The answer: nothing is in what is forbidden.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// What was looked at.
    pub scan: Scan,
    /// Who is in the group.
    pub inside: Vec<Inside>,
    /// For each watched code, who is in it.
    pub watched: Vec<Watched>,
    /// What is left of the periods of grace.
    pub graces: Vec<Grace>,
}

/// Looks at every thread of the paused guest, but those that have `rested` since a look with the same question. `others` is code outside the
/// kernel's image that threads may be in.
///
/// # Errors
/// [`ScanError::Hit`] when something is inside what is forbidden, and when that cannot be told.
pub fn quiescent<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    vcpus: &[Vcpu],
    question: &Question<'_>,
    others: &[OtherCode],
    mut rested: Rested,
) -> Result<Answer, ScanError> {
    let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
    let inside = rested.take_inside();
    let tasks = Tasks::read_beside(kernel, &memory, rested)?;
    let watched = question.watched.iter().cloned().map(Watched::new);
    let mut answer = Answer {
        watched: watched.collect(),
        graces: question.graces.to_vec(),
        ..Answer::default()
    };
    for grace in &mut answer.graces {
        grace.look(vcpus, &tasks);
    }
    let forbidden = question.forbidden;
    let running = on_stacks(kernel, &memory, vcpus, &tasks)?;
    let asked = (forbidden, question.group);
    let mut scanner = Scanner::new(kernel, &memory, asked, &mut answer.watched);
    answer.scan = scanner.all(vcpus, &tasks, &running)?;
    let mut objection = None;
    let followed = Followed::new(kernel, &memory, &tasks, others);
    let looked = followed.map(|mut followed| {
        followed.all(vcpus, &mut |whose, frames, end| {
            answer.scan.frames += frames.len() as u64;
            answer.note(question.group, &tasks, whose, frames, &end);
            if objection.is_none() {
                let found = judge(frames, end, forbidden);
                let found = found.filter(|found| {
                    question.group.is_empty() || matches!(found, Objection::Inside(_))
                });
                objection = found.map(|found| (whose, found));
            }
        });
    });
    answer.still(inside, &tasks);
    answer.scan.bytes_read = memory.bytes_read();
    match looked {
        Ok(()) => objection.map_or(Ok(answer), |(whose, found)| {
            Err(refusal(&tasks, whose, found))
        }),
        // By words alone nobody can be told to be outside.
        Err(UnwindError::Orc(OrcError::Absent { .. })) if question.group.is_empty() => Ok(answer),
        Err(other) => Err(other.into()),
    }
}

impl Answer {
    /// Notes of those whom a first look found `inside` the group who has not run since, and is not noted yet: a vCPU may be on its stack.
    fn still(&mut self, inside: Vec<Inside>, tasks: &Tasks) {
        let noted: HashSet<Option<Gva>> = self.inside.iter().map(|inside| inside.task).collect();
        let mut stays = vec![false; inside.len()];
        for task in &tasks.tasks {
            let Rest::Inside(place) = task.rest else {
                continue;
            };
            if let Some(stays) = stays.get_mut(place) {
                *stays = !noted.contains(&Some(task.at));
            }
        }
        let inside = inside.into_iter().zip(stays);
        let inside = inside.filter_map(|(inside, stays)| stays.then_some(inside));
        self.inside.extend(inside);
    }

    /// Notes where one stack is that was followed.
    fn note(
        &mut self,
        group: &[Range<Gva>],
        tasks: &Tasks,
        whose: Whose,
        frames: &[Frame],
        end: &Result<End, Unreliable>,
    ) {
        let unreliable = end.as_ref().err();
        let unreliable = unreliable.filter(|unreliable| unreliable.reason != Reason::Unowned);
        let is_in = |range: &Range<Gva>| frames.iter().any(|frame| range.contains(&frame.ip));
        for watched in &mut self.watched {
            if unreliable.is_some() || is_in(&watched.code) {
                watched.note(|| whose.who(tasks));
            }
        }
        if !group.is_empty() && (unreliable.is_some() || group.iter().any(is_in)) {
            let task = whose.task().and_then(|index| tasks.tasks.get(index));
            self.inside.push(Inside {
                task: task.map(|task| task.at),
                who: whose.who(tasks),
                frames: frames.to_vec(),
                unreliable: unreliable.cloned(),
            });
        }
    }
}

fn refusal(tasks: &Tasks, whose: Whose, objection: Objection) -> ScanError {
    let who = whose.who(tasks);
    match objection {
        Objection::Inside(value) => ScanError::Disagree { who, value },
        Objection::Unreliable(cause) => ScanError::Stack { who, cause },
    }
}

/// What speaks against changing `forbidden` in one stack.
fn judge(
    frames: &[Frame],
    end: Result<End, Unreliable>,
    forbidden: &[Range<Gva>],
) -> Option<Objection> {
    let inside = |frame: &&Frame| forbidden.iter().any(|range| range.contains(&frame.ip));
    if forbidden.is_empty() {
        return None;
    }
    if let Some(frame) = frames.iter().find(inside) {
        return Some(Objection::Inside(frame.ip));
    }
    end.err()
        .filter(|unreliable| unreliable.reason != Reason::Unowned)
        .map(Objection::Unreliable)
}

#[cfg(test)]
mod tests {
    use super::{
        End, Frame, Gva, Objection, OtherCode, Question, Reason, Rested, Unreliable, judge,
    };
    use crate::kernel::stack::Scan;
    use crate::kernel::testing::guest::{SLIDE, TinyGuest};
    use crate::kernel::testing::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, function};
    use crate::kernel::testing::{FORMS, STACK, TEXT};
    use crate::kernel::unwind::{Region, Via};

    const ARENA: u64 = 0xffff_ffff_ff80_0000;

    fn after(number: u64) -> u64 {
        TEXT + SLIDE + FUNCTIONS + number * FUNCTION + AFTER_CALL
    }

    /// Of a guest with a task (index 2, pid 7) that will go on at `ip`, with `words` above that; all functions but the first are free.
    fn check(ip: u64, words: &[u64], prepare: impl Fn(&mut TinyGuest), want: Result<u64, &str>) {
        for form in FORMS {
            let mut guest = TinyGuest::new(form, 4);
            let stack = [&[0, 0, 0, 0, 0, 0, ip], words].concat();
            guest.task(7, "sleeper", &stack);
            prepare(&mut guest);
            let kernel = guest.kernel();
            let first = TEXT + SLIDE + FUNCTIONS;
            let forbidden = [Gva(first)..Gva(first + FUNCTION)];
            let arena = [OtherCode::arena()];
            let question = Question {
                forbidden: &forbidden,
                ..Question::default()
            };
            let rested = Rested::default();
            let got = super::quiescent(&kernel, &guest, &guest.vcpus, &question, &arena, rested);
            match (got.as_ref().map(|answer| answer.scan), want) {
                (Ok(Scan { frames, .. }), Ok(want)) => assert_eq!(frames, want),
                (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
                _ => panic!("{form:?}: {got:?} instead of {want:?}"),
            }
        }
    }

    #[test]
    fn words_and_frames_must_agree() {
        let (other, end) = (after(function::OTHERS), after(function::FIRST));
        let nothing = |_: &mut TinyGuest| {};
        check(other, &[end], nothing, Ok(2));
        let hit = "task 7 (sleeper) is in code that is to be changed";
        check(after(function::PLAIN), &[end], nothing, Err(hit));
        // A word that no frame is: the scan alone refuses.
        let pushes = after(function::PUSHES_BP);
        check(pushes, &[after(function::PLAIN), end], nothing, Err(hit));
        let silent = "task 7 (sleeper) cannot be followed: the unwind table says nothing of";
        check(other, &[after(function::SILENT)], nothing, Err(silent));
        let unknown = "nothing says how to unwind 0xffffffffff80000f, which is in the arena";
        check(other, &[ARENA + 0x10], nothing, Err(unknown));
        let unowned = |guest: &mut TinyGuest| {
            guest.stack(true);
        };
        check(other, &[end], unowned, Ok(2));
        let hidden = |guest: &mut TinyGuest| {
            let stack = guest.stack(true);
            guest.put(stack + STACK / 2, after(function::PLAIN));
        };
        check(other, &[end], hidden, Err("a stack of no known task"));
    }

    #[test]
    fn one_stack_is_judged_by_its_frames_and_its_end() {
        let frame = |ip: u64| Frame {
            ip: Gva(ip),
            via: Via::Call,
            at: None,
        };
        let unreliable = |reason| Unreliable {
            ip: Gva(1),
            sp: Gva(2),
            reason,
        };
        let table = |region| Reason::NoTable { at: Gva(9), region };
        let modules = unreliable(table(Region::Modules));
        let deep = unreliable(Reason::TooDeep);
        let forbidden = [Gva(10)..Gva(20), Gva(30)..Gva(31)];
        for (ips, end, want) in [
            (&[9, 20, 31][..], Ok(End::User), None),
            (&[9, 19], Ok(End::User), Some(Objection::Inside(Gva(19)))),
            (&[30], Err(deep.clone()), Some(Objection::Inside(Gva(30)))),
            (&[9], Err(deep.clone()), Some(Objection::Unreliable(deep))),
            (
                &[],
                Err(modules.clone()),
                Some(Objection::Unreliable(modules)),
            ),
            (&[], Err(unreliable(Reason::Unowned)), None),
        ] {
            let frames: Vec<Frame> = ips.iter().map(|ip| frame(*ip)).collect();
            assert_eq!(judge(&frames, end, &forbidden), want, "{ips:?}");
        }
    }
}
