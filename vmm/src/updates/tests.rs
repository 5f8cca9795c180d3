//! The session with a patcher that ends each operation as its package says.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::patcher::apply::Report;

use super::{
    BROKEN, Done, Failing, KernelInfo, Patcher, Problem, QUEUE, Session, State, Task, Undo, Update,
    Verified,
};
use crate::events::{EventKind, Events};
use crate::views::{Asked, Seen, View};

/// A patcher that is told by the packages what to do. Operations wait until `go` gives them leave.
struct Scripted {
    go: Receiver<()>,
    /// The next revert ends this way.
    revert: Arc<Mutex<Option<Problem>>>,
    generation: u64,
    sound: bool,
}

fn problem(failing: Failing, code: &str) -> Problem {
    Problem::new(failing, code, "m", "c", "h")
}

impl Patcher for Scripted {
    type Applied = Vec<u8>;

    fn apply(&mut self, task: &Task<'_>) -> Result<(Option<Vec<u8>>, Report), Problem> {
        self.go.recv().unwrap();
        (task.functions)(vec!["f".to_owned()]);
        (task.doing)("scanning".to_owned());
        match task.package {
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
                Ok((Some(Vec::new()), Report::default()))
            }
            package => Ok(((!task.check).then(|| package.to_vec()), Report::default())),
        }
    }

    fn revert(&mut self, _: &Vec<u8>, task: &Undo<'_>) -> Result<Report, Problem> {
        let end = self.revert.lock().unwrap().take();
        match end {
            None => Ok(Report::default()),
            Some(problem) if problem.code == "panic" => panic!("as it was told"),
            Some(problem) if problem.code == "panic late" => {
                (task.written)();
                panic!("as it was told")
            }
            Some(problem) => Err(problem),
        }
    }

    fn is_sound(&self) -> bool {
        self.sound
    }

    fn verify(&mut self, applied: &Vec<u8>, _: Instant) -> Result<Verified, Problem> {
        Ok(Verified {
            bytes: u64::try_from(applied.len()).unwrap(),
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

    fn view(
        &mut self,
        _: &Asked,
        applied: &[(u64, &Vec<u8>)],
        _: Instant,
    ) -> Result<Seen<View>, Problem> {
        let ids: Vec<String> = applied.iter().map(|(id, _)| id.to_string()).collect();
        Err(problem(Failing::Unknown, &ids.join(",")))
    }
}

struct Fixture {
    session: Session,
    events: Arc<Events>,
    go: std::sync::mpsc::Sender<()>,
    revert: Arc<Mutex<Option<Problem>>>,
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
        let queued = self
            .session
            .apply("n".to_owned(), package.to_vec(), check, deadline, done)
            .unwrap();
        assert_eq!(queued.state, State::Queued);
        end
    }

    fn apply(&self, package: &[u8]) -> Result<Update, Problem> {
        self.go.send(()).unwrap();
        self.hand_in(package, false, soon()).recv().unwrap()
    }

    fn revert(&self, id: u64, end: Option<Problem>) -> Result<Update, Problem> {
        *self.revert.lock().unwrap() = end;
        let (done, end) = reply();
        self.session.revert(id, soon(), done)?;
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
    assert_eq!(end.recv().unwrap().unwrap().bytes, 4);
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
    ends(b"panic late", "defect", Broken);
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
        let queued = f
            .session
            .apply(String::new(), b"c".to_vec(), false, soon(), done);
        match queued {
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
fn a_revert_that_waited_sees_what_came_before_it() {
    let f = Fixture::new();
    f.apply(b"a").unwrap();
    let slow = f.hand_in(b"b", false, soon());
    let (done, first) = reply();
    f.session.revert(1, soon(), done).unwrap();
    let (done, second) = reply();
    f.session.revert(1, soon(), done).unwrap();
    f.go.send(()).unwrap();
    slow.recv().unwrap().unwrap();
    assert_eq!(first.recv().unwrap().unwrap().state, State::Reverted);
    assert_eq!(
        second.recv().unwrap().unwrap_err().code,
        "update_not_applied"
    );
}
