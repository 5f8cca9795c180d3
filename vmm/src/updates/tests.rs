//! The session with a patcher that ends each operation as its package says.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::patcher::addr::Gva;
use ::patcher::apply::Report;
use ::patcher::apply::hooks::HookEvent;
use ::patcher::apply::tune::SetChange;
use ::patcher::kernel::shadow::Shadow;

use super::{
    ASKING, BROKEN, Brings, Calls, Counted, Done, Edition, Failing, InsteadOf, KernelInfo, Life,
    Order, Passing, Patcher, Problem, QUEUE, Room, Session, State, Straggler, Task, Undo, Update,
    Use, Verified,
};
use crate::events::{EventKind, Events};
use crate::views::{Asked, Seen, View};

mod settling_tests;

/// A patcher that is told by the packages what to do. Operations wait until `go` gives them leave.
struct Scripted {
    go: Receiver<()>,
    /// The next revert ends this way.
    revert: Arc<Mutex<Option<Problem>>>,
    generation: u64,
    sound: bool,
    /// The updates that are in the guest: whether they stay for a while when they are undone, and how often that was looked at since.
    present: BTreeMap<u64, (bool, usize)>,
    /// How many tasks have yet to make the switch of an update: one less with each look.
    passes: BTreeMap<u64, u8>,
    /// Of an update that is to be shadowed, how often that was looked at: the second time it is, the third time no more.
    shadowed: BTreeMap<u64, usize>,
}

fn problem(failing: Failing, code: &str) -> Problem {
    Problem::new(failing, code, "m", "c", "h")
}

impl Patcher for Scripted {
    fn apply(&mut self, task: &Task<'_>) -> Result<Report, Problem> {
        self.go.recv().unwrap();
        (task.functions)(vec!["f".to_owned()]);
        (task.doing)("scanning".to_owned());
        match task.brings.package() {
            b"refuse" => Err(problem(Failing::Refused, "no")),
            b"tear" => Err(problem(Failing::Broken, BROKEN)),
            b"panic" => panic!("as it was told"),
            b"panic late" => {
                (task.written)();
                panic!("as it was told")
            }
            b"panic, torn" => {
                self.sound = false;
                panic!("as it was told")
            }
            b"kexec" => {
                self.generation += 1;
                Err(problem(Failing::Refused, "other_kernel"))
            }
            b"kexec, then this" => {
                self.generation += 1;
                (task.written)();
                Ok(Report::default())
            }
            package => {
                if !task.check {
                    (task.written)();
                    let drains = package == b"drains";
                    if package == b"passes" {
                        self.passes.insert(task.update, 2);
                    }
                    if package == b"shadowed" {
                        self.shadowed.insert(task.update, 0);
                    }
                    self.present.insert(task.update, (drains, 0));
                    for gone in task.instead_of {
                        self.leave(*gone);
                    }
                }
                Ok(Report::default())
            }
        }
    }

    fn revert(&mut self, updates: &[u64], task: &Undo<'_>) -> Result<Report, Problem> {
        let end = self.revert.lock().unwrap().take();
        match end {
            None => {
                (task.written)();
                for update in updates {
                    self.leave(*update);
                }
                Ok(Report::default())
            }
            Some(problem) if problem.code == "panic" => panic!("as it was told"),
            Some(problem) if problem.code == "panic late" => {
                (task.written)();
                panic!("as it was told")
            }
            Some(problem) => Err(problem),
        }
    }

    fn reuse(&mut self, update: u64, how: &Use, task: &Undo<'_>) -> Result<Report, Problem> {
        if how.counted {
            return Err(problem(Failing::Refused, "no_counters"));
        }
        (task.written)();
        assert!(self.present.contains_key(&update));
        Ok(Report::default())
    }

    fn force(&mut self, update: u64, task: &Undo<'_>) -> Result<(), Problem> {
        (task.written)();
        let passes = self.passes.remove(&update);
        passes
            .map(drop)
            .ok_or_else(|| problem(Failing::Conflict, "nothing_to_force"))
    }

    fn passing(&self, update: u64) -> Option<Passing> {
        let looks = self.passes.get(&update)?;
        let task = |nth: &u8| Straggler {
            who: nth.to_string(),
            frames: Vec::new(),
            unreliable: None,
        };
        Some(Passing {
            tasks: (0..*looks).map(|nth| task(&nth)).collect(),
        })
    }

    fn change_set(&mut self, _: &str, change: &SetChange) -> Result<usize, Problem> {
        Ok(change.add.len())
    }

    fn drop_set(&mut self, _: &str) -> Result<(), Problem> {
        Err(problem(Failing::Unknown, "no_such_set"))
    }

    fn sets(&self) -> Vec<(String, Vec<u64>)> {
        Vec::new()
    }

    fn set_time(&mut self, _: &str, _: bool) -> Result<(), Problem> {
        Ok(())
    }

    fn drop_time(&mut self, _: &str) -> Result<(), Problem> {
        Err(problem(Failing::Unknown, "no_such_time"))
    }

    fn times(&self) -> Vec<(String, bool)> {
        Vec::new()
    }

    fn is_watching(&self) -> bool {
        !self.shadowed.is_empty()
    }

    fn watch(&mut self) -> Result<bool, Problem> {
        let looks = self.shadowed.values_mut();
        looks.for_each(|looks| *looks += 1);
        Ok(self.shadowed.values().any(|looks| [2, 3].contains(looks)))
    }

    fn has_clocks(&self) -> bool {
        false
    }

    fn tick(&mut self) -> Result<(), Problem> {
        Ok(())
    }

    fn calls(&mut self) -> Result<Vec<Calls>, Problem> {
        Ok(Vec::new())
    }

    fn room(&self) -> Room {
        Room {
            start: 1 << 32,
            bytes: 4096,
            used: 0,
        }
    }

    fn is_sound(&self) -> bool {
        self.sound
    }

    fn editions(&self, update: u64) -> Vec<Edition> {
        let Some((_, looks)) = self.present.get(&update) else {
            return Vec::new();
        };
        let life = match looks {
            0 if self.shadowed.get(&update) == Some(&2) => Life::Shadowed {
                by: Shadow::Livepatch,
            },
            0 => Life::Active,
            looks => Life::Draining {
                by: Some(looks.to_string()),
            },
        };
        vec![Edition {
            function: "f".to_owned(),
            at: Gva(0),
            life,
        }]
    }

    fn is_settling(&self) -> bool {
        !self.passes.is_empty() || self.present.values().any(|(_, looks)| *looks > 0)
    }

    fn settle(&mut self, deadline: Instant, _: &dyn Fn(&HookEvent)) -> Result<(), Problem> {
        assert!(deadline > Instant::now());
        self.present.retain(|_, (_, looks)| {
            *looks += usize::from(*looks > 0);
            *looks < 4
        });
        self.passes.retain(|_, left| {
            *left -= 1;
            *left > 0
        });
        Ok(())
    }

    fn verify(&mut self, update: u64, _: Instant) -> Result<Verified, Problem> {
        Ok(Verified {
            bytes: update,
            differences: Vec::new(),
        })
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn kernel(&mut self, deadline: Instant) -> Result<KernelInfo, Problem> {
        assert!(deadline > Instant::now(), "a kernel in the past");
        Err(problem(Failing::Refused, "no_image"))
    }

    fn view(&mut self, _: &Asked, _: Instant) -> Result<Seen<View>, Problem> {
        Err(problem(Failing::Unknown, "no_view"))
    }
}

impl Scripted {
    /// An update is no longer in effect; those that drain are gone at the third look.
    fn leave(&mut self, update: u64) {
        let drains = self.present.get_mut(&update);
        match drains {
            Some((true, looks)) => *looks = 1,
            _ => drop(self.present.remove(&update)),
        }
    }
}

struct Fixture {
    session: Session,
    events: Arc<Events>,
    go: std::sync::mpsc::Sender<()>,
    revert: Arc<Mutex<Option<Problem>>>,
}

fn order(package: &[u8], check: bool, deadline: Instant) -> Order {
    Order {
        name: "n".to_owned(),
        brings: Brings::Package(package.to_vec()),
        check,
        instead_of: InsteadOf::These(Vec::new()),
        model: None,
        how: Use::default(),
        deadline,
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A callback, and where its value arrives.
fn reply<T: Send + 'static>() -> (Done<T>, Receiver<Result<T, Problem>>) {
    let (send, receive) = channel();
    (Box::new(move |end| drop(send.send(end))), receive)
}

impl Fixture {
    fn new() -> Self {
        let events = Arc::new(Events::new());
        let (go, leave) = channel();
        let revert = Arc::new(Mutex::new(None));
        let told = Arc::clone(&revert);
        let session = Session::start(Arc::clone(&events), move || Scripted {
            go: leave,
            revert: told,
            generation: 0,
            sound: true,
            present: BTreeMap::new(),
            passes: BTreeMap::new(),
            shadowed: BTreeMap::new(),
        });
        Self {
            session: session.unwrap(),
            events,
            go,
            revert,
        }
    }

    fn hand_in(
        &self,
        package: &[u8],
        check: bool,
        deadline: Instant,
    ) -> Receiver<Result<Update, Problem>> {
        let (done, end) = reply();
        let order = order(package, check, deadline);
        let queued = self.session.apply(order, done).unwrap();
        assert_eq!(queued.state, State::Queued);
        end
    }

    fn apply_instead_of(&self, instead_of: InsteadOf) -> Result<Update, Problem> {
        self.go.send(()).unwrap();
        let (done, end) = reply();
        let order = Order {
            instead_of,
            ..order(b"good", false, soon())
        };
        self.session.apply(order, done).unwrap();
        end.recv().unwrap()
    }

    fn apply(&self, package: &[u8]) -> Result<Update, Problem> {
        self.go.send(()).unwrap();
        self.hand_in(package, false, soon()).recv().unwrap()
    }

    fn revert(&self, id: u64, end: Option<Problem>) -> Result<Update, Problem> {
        *self.revert.lock().unwrap() = end;
        let (done, end) = reply();
        self.session.revert(id, None, soon(), done)?;
        end.recv().unwrap()
    }

    /// Compares all updates' states, and the states of all events.
    fn check(&self, states: &[State], told: &[(u64, State)]) {
        let now: Vec<State> = self.session.updates().iter().map(|u| u.state).collect();
        assert_eq!(now, states);
        let (past, _) = self.events.subscribe(0);
        let mut changes: Vec<(u64, State)> = Vec::new();
        for event in past {
            let EventKind::Update(update) = event.kind else {
                panic!("{event:?}");
            };
            changes.push((update.id, update.state));
        }
        changes.dedup();
        assert_eq!(changes, told);
    }
}

#[test]
fn an_update_goes_its_way() {
    use State::{Applied, Checked, Checking, Queued, Refused, Reverted, Reverting};
    let f = Fixture::new();
    let applied = f.apply(b"good").unwrap();
    assert_eq!(
        (applied.state, applied.functions.as_slice()),
        (Applied, &["f".to_owned()][..])
    );
    assert_eq!(applied.doing, None);
    assert!(applied.applied.is_some());
    let (done, end) = reply();
    f.session.verify(1, soon(), done).unwrap();
    assert_eq!(end.recv().unwrap().unwrap().bytes, 1);
    assert_eq!(f.revert(1, None).unwrap().state, Reverted);

    f.go.send(()).unwrap();
    let checked = f.hand_in(b"good", true, soon()).recv().unwrap().unwrap();
    assert_eq!(checked.state, Checked);
    assert_eq!(f.apply(b"refuse").unwrap_err().code, "no");
    f.check(
        &[Reverted, Checked, Refused],
        &[
            (1, Queued),
            (1, Checking),
            (1, Applied),
            (1, Reverting),
            (1, Reverted),
            (2, Queued),
            (2, Checking),
            (2, Checked),
            (3, Queued),
            (3, Checking),
            (3, Refused),
        ],
    );
}

#[test]
fn only_what_is_applied_can_be_reverted_or_verified() {
    let f = Fixture::new();
    let code = |id| f.revert(id, None).unwrap_err().code;
    assert_eq!(code(1), "no_such_update");
    f.apply(b"refuse").unwrap_err();
    assert_eq!(code(1), "update_not_applied");
    f.apply(b"good").unwrap();
    f.revert(2, None).unwrap();
    assert_eq!(code(2), "update_not_applied");
    f.apply(b"tear").unwrap_err();
    assert_eq!(code(3), BROKEN);
    let (done, _) = reply();
    assert_eq!(
        f.session.verify(2, soon(), done).unwrap_err().code,
        "update_not_applied"
    );
}

#[test]
fn a_failed_revert_leaves_it_applied_unless_memory_is_torn() {
    let f = Fixture::new();
    f.apply(b"a").unwrap();
    f.apply(b"b").unwrap();
    let late = problem(Failing::Deadline, "not_quiescent");
    assert_eq!(f.revert(1, Some(late.clone())).unwrap_err(), late);
    assert_eq!(f.session.updates()[0].problem, Some(late));
    assert_eq!(f.session.updates()[0].state, State::Applied);
    assert_eq!(f.revert(1, None).unwrap().problem, None);
    f.revert(2, Some(problem(Failing::Broken, BROKEN)))
        .unwrap_err();
    assert_eq!(f.session.updates()[1].state, State::Broken);
}

#[test]
fn a_panic_ends_its_operation_and_no_other() {
    use State::{Applied, Broken, Refused, Reverted};
    let f = Fixture::new();
    let ends = |package: &[u8], code: &str, state| {
        let problem = f.apply(package).unwrap_err();
        assert_eq!(problem.code, code, "{problem:?}");
        assert!(problem.cause.contains("as it was told"), "{problem:?}");
        assert_eq!(f.session.updates().last().unwrap().state, state);
    };
    ends(b"panic", "defect", Refused);
    ends(b"panic late", "defect", Applied);
    let id = f.apply(b"good").unwrap().id;
    let revert = |code: &str| {
        f.revert(id, Some(problem(Failing::Failed, code)))
            .unwrap_err()
    };
    let state = || f.session.updates().last().unwrap().state;
    assert_eq!(
        (revert("panic").code.as_str(), state()),
        ("defect", Applied)
    );
    assert_eq!(
        (revert("panic late").code.as_str(), state()),
        ("defect", Reverted)
    );
    let (done, end) = reply();
    f.session.kernel(Instant::now(), done).unwrap();
    let past = end.recv().unwrap().unwrap_err();
    assert_eq!(past.code, "defect");
    assert!(past.cause.contains("a kernel in the past"), "{past:?}");
    ends(b"panic, torn", BROKEN, Broken);
}

#[test]
fn updates_are_lost_with_their_kernel() {
    let f = Fixture::new();
    f.apply(b"a").unwrap();
    f.apply(b"b").unwrap();
    f.revert(2, None).unwrap();
    f.apply(b"kexec").unwrap_err();
    let states: Vec<State> = f.session.updates().iter().map(|u| u.state).collect();
    assert_eq!(states, [State::Lost, State::Reverted, State::Refused]);
    assert_eq!(f.revert(1, None).unwrap_err().code, "update_lost");
    f.apply(b"c").unwrap();
    let applied = f.apply(b"kexec, then this").unwrap();
    assert_eq!(applied.state, State::Applied);
    let states: Vec<State> = f.session.updates().iter().map(|u| u.state).collect();
    assert_eq!(states[3..], [State::Lost, State::Applied]);
}

#[test]
fn operations_wait_their_turn_and_not_for_ever() {
    let f = Fixture::new();
    let first = f.hand_in(b"a", false, soon());
    let late = f.hand_in(b"b", false, Instant::now());
    // One may have been taken from the queue already.
    let mut waiting = Vec::new();
    let busy = loop {
        let (done, end) = reply();
        match f.session.apply(order(b"c", false, soon()), done) {
            Ok(_) => waiting.push(end),
            Err(problem) => break problem,
        }
        assert!(waiting.len() <= QUEUE);
    };
    assert_eq!(busy.failing, Failing::Busy);
    assert_eq!(f.session.updates().last().unwrap().state, State::Refused);
    for _ in 0..=waiting.len() {
        f.go.send(()).unwrap();
    }
    assert_eq!(first.recv().unwrap().unwrap().state, State::Applied);
    assert_eq!(late.recv().unwrap().unwrap_err().code, "deadline_passed");
    for end in waiting {
        assert_eq!(end.recv().unwrap().unwrap().state, State::Applied);
    }
}

#[test]
fn all_who_ask_for_counts_take_one_place_and_get_one_answer() {
    let f = Fixture::new();
    let ask = || {
        let (done, answer) = reply();
        f.session.counted(done).map(|()| answer)
    };
    // An operation is under way, and nobody is told anything before its end.
    let end = f.hand_in(b"good", false, soon());
    while f.session.updates()[0].state != State::Checking {
        std::thread::yield_now();
    }
    let asked: Vec<_> = (0..ASKING).map(|_| ask().unwrap()).collect();
    assert_eq!(ask().unwrap_err().failing, Failing::Busy);
    let others: Vec<_> = (1..QUEUE)
        .map(|_| f.hand_in(b"good", false, soon()))
        .collect();
    assert!(asked.iter().all(|answer| answer.try_recv().is_err()));
    (0..QUEUE).for_each(|_| f.go.send(()).unwrap());
    end.recv().unwrap().unwrap();
    let answers: Vec<Counted> = asked
        .into_iter()
        .map(|answer| answer.recv().unwrap().unwrap())
        .collect();
    assert_eq!(answers[0].room.bytes, 4096);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    others
        .into_iter()
        .for_each(|end| drop(end.recv().unwrap().unwrap()));
    let later = ask().unwrap().recv().unwrap().unwrap();
    assert!(later.at > answers[0].at);
}

#[test]
fn a_revert_that_waited_sees_what_came_before_it() {
    let f = Fixture::new();
    f.apply(b"a").unwrap();
    let slow = f.hand_in(b"b", false, soon());
    let (done, first) = reply();
    f.session.revert(1, None, soon(), done).unwrap();
    let (done, second) = reply();
    f.session.revert(1, None, soon(), done).unwrap();
    f.go.send(()).unwrap();
    slow.recv().unwrap().unwrap();
    assert_eq!(first.recv().unwrap().unwrap().state, State::Reverted);
    assert_eq!(
        second.recv().unwrap().unwrap_err().code,
        "update_not_applied"
    );
}

#[test]
fn an_update_takes_the_place_of_others() {
    use State::{Applied, Replaced, Reverted};
    let f = Fixture::new();
    let states = || -> Vec<State> { f.session.updates().iter().map(|u| u.state).collect() };
    for package in [b"a", b"b", b"c"] {
        f.apply(package).unwrap();
    }
    let update = f.apply_instead_of(InsteadOf::These(vec![1, 3])).unwrap();
    assert_eq!(update.instead_of, [1, 3]);
    assert_eq!(states(), [Replaced, Applied, Replaced, Applied]);
    assert_eq!(f.revert(1, None).unwrap_err().code, "update_not_applied");
    let update = f.apply_instead_of(InsteadOf::All).unwrap();
    assert_eq!(update.instead_of, [2, 4]);
    f.revert(update.id, None).unwrap();
    assert_eq!(states(), [Replaced, Replaced, Replaced, Replaced, Reverted]);
}
