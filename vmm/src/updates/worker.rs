//! The session's thread: takes one operation after the other, and records how each ends. A panic in one of them is its end, and not the thread's.

use std::any::Any;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ::patcher::apply::hooks::HookEvent;

use super::patcher::{Patcher, Task, Undo, Verified};
use super::record::{BROKEN, Cost, Failing, Problem, State, Update};
use super::{Book, Counted, InsteadOf, Job, Model, Order, Use};
use crate::views::{Asked, Seen, View};

/// The session's thread.
pub(super) struct Worker<P: Patcher> {
    book: Arc<Book>,
    patcher: P,
    /// For each update that is in effect, the generation of the kernel that it is applied to.
    applied: BTreeMap<u64, u64>,
    /// Updates of which something may be in the guest: those in effect, and those that threads have yet to leave.
    present: BTreeSet<u64>,
    /// How long to wait for the guest's threads to go on before they are looked at again.
    wait: Duration,
    /// When they were looked at last.
    looked: Instant,
    /// When it was looked at last whether the guest leads calls elsewhere.
    watched: Instant,
}

/// How often the clocks of rules go on.
const TICK: Duration = Duration::from_millis(100);
/// How often it is looked at whether the guest leads calls elsewhere.
const WATCH: Duration = Duration::from_secs(1);
/// First wait for the guest's threads to go on, and the wait behind a look that found that bound tasks had.
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// What one look at them may take.
const LOOK: Duration = Duration::from_millis(500);

impl<P: Patcher> Worker<P> {
    pub(super) fn new(book: Arc<Book>, patcher: P) -> Self {
        Self {
            book,
            patcher,
            applied: BTreeMap::new(),
            present: BTreeSet::new(),
            wait: FIRST_WAIT,
            looked: Instant::now(),
            watched: Instant::now(),
        }
    }

    /// Works until nobody can hand in anything any more.
    pub(super) fn run(mut self, queue: &Receiver<Job>) {
        loop {
            let job = match self.next(queue) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            match job {
                Job::Apply(id, order, done) => done(self.apply(id, &order)),
                Job::Revert(id, model, deadline, done) => done(self.revert(id, model, deadline)),
                Job::Reuse(id, how, deadline, done) => done(self.reuse(id, &how, deadline)),
                Job::Force(id, deadline, done) => done(self.force(id, deadline)),
                Job::ChangeSet(name, change, done) => {
                    done(self.work(|patcher| patcher.change_set(&name, &change)));
                }
                Job::DropSet(name, done) => done(self.work(|patcher| patcher.drop_set(&name))),
                Job::Sets(done) => done(Ok(self.patcher.sets())),
                Job::SetTime(name, on, done) => {
                    done(self.work(|patcher| patcher.set_time(&name, on)));
                }
                Job::DropTime(name, done) => done(self.work(|patcher| patcher.drop_time(&name))),
                Job::Times(done) => done(Ok(self.patcher.times())),
                Job::Count => self.count(),
                Job::Verify(id, deadline, done) => done(self.verify(id, deadline)),
                Job::Kernel(deadline, done) => {
                    let known = self.work(|patcher| patcher.kernel(deadline));
                    self.forget();
                    done(known);
                }
                Job::View(asked, deadline, done) => done(self.view(&asked, deadline)),
            }
        }
    }

    /// The next operation; while there is none, clocks go on, and what waits for the guest's threads is looked at.
    fn next(&mut self, queue: &Receiver<Job>) -> Result<Job, RecvTimeoutError> {
        let settles = self.patcher.is_settling();
        let due = settles.then(|| self.looked + self.wait);
        let ticks = self.patcher.has_clocks();
        let tick = ticks.then(|| Instant::now() + TICK);
        let watches = self.patcher.is_watching();
        let watch = watches.then(|| self.watched + WATCH);
        let job = match due.into_iter().chain(tick).chain(watch).min() {
            None => return queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(when) => queue.recv_timeout(when.saturating_duration_since(Instant::now())),
        };
        if ticks && let Err(problem) = self.work(P::tick) {
            tracing::debug!(?problem, "the clocks of rules could not go on");
        }
        if watch.is_some_and(|watch| watch <= Instant::now()) {
            self.watch();
        }
        if job.is_err() && due.is_some_and(|due| due <= Instant::now()) {
            self.settle();
        }
        job
    }

    /// Looks whether the guest leads calls of redirected functions elsewhere.
    fn watch(&mut self) {
        self.watched = Instant::now();
        match self.work(P::watch) {
            Ok(true) => self.refresh(),
            Ok(false) => {}
            // It may just be changing that: it is looked at again.
            Err(problem) => tracing::debug!(?problem, "what comes before editions cannot be told"),
        }
    }

    /// Tells all who have asked what is counted.
    fn count(&mut self) {
        // Whoever asks from here on has to wait for the next time.
        let asking = std::mem::take(&mut *self.book.asking());
        let at = self.book.events.elapsed();
        let counted = self.work(|patcher| {
            let calls = patcher.calls()?;
            let room = patcher.room();
            Ok(Counted { at, calls, room })
        });
        for done in asking {
            done(counted.clone());
        }
    }

    /// Does what has waited for the guest's threads to go on.
    fn settle(&mut self) {
        let deadline = Instant::now() + LOOK;
        let before = self.bound();
        let book = Arc::clone(&self.book);
        let hook = |hook: &HookEvent| book.tell_hook(hook);
        if let Err(problem) = self.work(|patcher| patcher.settle(deadline, &hook)) {
            tracing::debug!(?problem, "the guest's threads could not be looked at");
        }
        self.forget();
        self.refresh();
        self.wait = next_wait(self.wait, before, self.bound());
        self.looked = Instant::now();
    }

    /// How many tasks have yet to make a switch that is under way, as the book has it: asking the patcher has it name every frame of theirs.
    fn bound(&self) -> usize {
        let updates = self.book.lock();
        let passing = updates.iter().filter_map(|update| update.passing.as_ref());
        passing.map(|passing| passing.tasks.len()).sum()
    }

    /// Tells where the editions of all updates stand by now.
    fn refresh(&mut self) {
        let (book, patcher, applied) = (&self.book, &self.patcher, &self.applied);
        self.present.retain(|id| {
            let (editions, passing) = (patcher.editions(*id), patcher.passing(*id));
            let in_effect = applied.contains_key(id);
            let stays = !editions.is_empty() || in_effect;
            book.change(*id, |update| {
                update.state = match update.state {
                    State::Switching if passing.is_none() && in_effect => State::Applied,
                    State::Reverting if passing.is_none() && !in_effect => State::Reverted,
                    State::Applied if passing.is_some() => State::Switching,
                    State::Reverted if passing.is_some() => State::Reverting,
                    other => other,
                };
                update.editions = editions;
                update.passing = passing;
            });
            stays
        });
    }

    fn apply(&mut self, id: u64, order: &Order) -> Result<Update, Problem> {
        let book = Arc::clone(&self.book);
        let instead_of: Vec<u64> = match &order.instead_of {
            InsteadOf::These(these) => these.clone(),
            InsteadOf::All => self.applied.keys().copied().collect(),
        };
        let began = book.change(id, |update| {
            update.state = State::Checking;
            update.instead_of.clone_from(&instead_of);
        });
        let submitted = began.map_or(Duration::ZERO, |update| update.submitted);
        let written = Cell::new(false);
        let task = Task {
            update: id,
            instead_of: &instead_of,
            model: order.model,
            how: &order.how,
            brings: &order.brings,
            check: order.check,
            deadline: order.deadline,
            functions: &|functions| drop(book.change(id, |update| update.functions = functions)),
            doing: &|doing| drop(book.change(id, |update| update.doing = Some(doing))),
            written: &|| written.set(true),
            hook: &|hook| book.tell_hook(hook),
        };
        let result = if Instant::now() >= order.deadline {
            Err(too_late())
        } else {
            self.work(|patcher| patcher.apply(&task))
        };
        if written.get() {
            self.took_effect(id, &instead_of);
            self.watch();
        } else if !self.patcher.editions(id).is_empty() {
            // Its hooks have run: its code is there, and on its way out.
            self.present.insert(id);
        }
        self.forget();
        self.wait = FIRST_WAIT;
        let ended = match result {
            Ok(report) => {
                let state = match self.patcher.passing(id) {
                    _ if order.check => State::Checked,
                    Some(_) => State::Switching,
                    None => State::Applied,
                };
                let total = book.events.elapsed().saturating_sub(submitted);
                self.end(id, |update| {
                    update.state = state;
                    update.applied = Some(Cost { report, total });
                })
            }
            Err(problem) => {
                let state = match problem.failing {
                    Failing::Broken => State::Broken,
                    // It is in effect, whatever went wrong behind that.
                    _ if written.get() => State::Applied,
                    _ => State::Refused,
                };
                Err(self.fail(id, state, problem))
            }
        };
        self.refreshed(id, ended)
    }

    /// The end of an operation on an update, as that is once it is told where its editions stand.
    fn refreshed(&mut self, id: u64, ended: Result<Update, Problem>) -> Result<Update, Problem> {
        self.refresh();
        ended.and_then(|_| self.book.find(id))
    }

    /// Uses the editions of an update in another way.
    fn reuse(&mut self, id: u64, how: &Use, deadline: Instant) -> Result<Update, Problem> {
        if !self.applied.contains_key(&id) {
            return Err(self.book.applied(id).err().unwrap_or_else(too_late));
        }
        let written = Cell::new(false);
        let result = self.undertake(id, deadline, &written, |patcher, task| {
            patcher.reuse(id, how, task).map(drop)
        });
        if written.get() {
            self.book.change(id, |update| update.how = how.clone());
        }
        self.ended(id, result)
    }

    /// Ends the switch of an update for all.
    fn force(&mut self, id: u64, deadline: Instant) -> Result<Update, Problem> {
        let written = Cell::new(false);
        let result = self.undertake(id, deadline, &written, |patcher, task| {
            patcher.force(id, task)
        });
        self.ended(id, result)
    }

    /// Lets the patcher do something to an update, and notes whether that was written.
    fn undertake<T>(
        &mut self,
        id: u64,
        deadline: Instant,
        written: &Cell<bool>,
        work: impl FnOnce(&mut P, &Undo<'_>) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        if Instant::now() >= deadline {
            return Err(too_late());
        }
        let book = Arc::clone(&self.book);
        let task = Undo {
            deadline,
            model: None,
            doing: &|doing| drop(book.change(id, |update| update.doing = Some(doing))),
            written: &|| written.set(true),
            hook: &|hook| book.tell_hook(hook),
        };
        self.wait = FIRST_WAIT;
        self.work(|patcher| work(patcher, &task))
    }

    /// Records how something ended that leaves the state of its update as it is, unless the guest is not sound any more.
    fn ended(&mut self, id: u64, result: Result<(), Problem>) -> Result<Update, Problem> {
        let ended = match result {
            Ok(()) => self.end(id, |_| {}),
            Err(problem) if problem.failing == Failing::Broken => {
                Err(self.fail(id, State::Broken, problem))
            }
            Err(problem) => {
                self.book.change(id, |update| {
                    update.doing = None;
                    update.problem = Some(problem.clone());
                });
                self.forget();
                Err(problem)
            }
        };
        self.refreshed(id, ended)
    }

    /// Notes that an update is in effect, and those whose place it took are not.
    fn took_effect(&mut self, id: u64, instead_of: &[u64]) {
        self.applied.insert(id, self.patcher.generation());
        self.present.insert(id);
        for gone in instead_of {
            if self.applied.remove(gone).is_some() {
                let state = State::Replaced;
                self.book.change(*gone, |update| update.state = state);
            }
        }
    }

    fn revert(
        &mut self,
        id: u64,
        model: Option<Model>,
        deadline: Instant,
    ) -> Result<Update, Problem> {
        let book = Arc::clone(&self.book);
        // The operations before this one may have ended it.
        if !self.applied.contains_key(&id) {
            return Err(book.applied(id).err().unwrap_or_else(too_late));
        }
        book.change(id, |update| update.state = State::Reverting);
        let began = Instant::now();
        let written = Cell::new(false);
        let result = self.undertake(id, deadline, &written, |patcher, task| {
            patcher.revert(&[id], &Undo { model, ..*task })
        });
        if written.get() {
            self.applied.remove(&id);
        }
        let reverted = match self.patcher.passing(id) {
            Some(_) => State::Reverting,
            None => State::Reverted,
        };
        let ended = match result {
            Ok(report) => self.end(id, |update| {
                update.state = reverted;
                update.reverted = Some(Cost {
                    report,
                    total: began.elapsed(),
                });
            }),
            Err(problem) => {
                let state = match problem.failing {
                    Failing::Broken => State::Broken,
                    _ if written.get() => reverted,
                    _ => State::Applied,
                };
                Err(self.fail(id, state, problem))
            }
        };
        self.refreshed(id, ended)
    }

    fn verify(&mut self, id: u64, deadline: Instant) -> Result<Verified, Problem> {
        if !self.applied.contains_key(&id) {
            return Err(self.book.applied(id).err().unwrap_or_else(too_late));
        }
        let result = self.work(|patcher| patcher.verify(id, deadline));
        self.forget();
        result
    }

    fn view(&mut self, asked: &Asked, deadline: Instant) -> Result<Seen<View>, Problem> {
        if Instant::now() >= deadline {
            return Err(too_late());
        }
        self.work(|patcher| patcher.view(asked, deadline))
    }

    /// Lets the patcher work. A panic is a problem like others: on its way out what was written is undone, or the guest left paused, and else
    /// let go; what the patcher knows of the guest is looked at again with each operation.
    fn work<T>(&mut self, work: impl FnOnce(&mut P) -> Result<T, Problem>) -> Result<T, Problem> {
        let patcher = &mut self.patcher;
        catch_unwind(AssertUnwindSafe(|| work(patcher)))
            .unwrap_or_else(|panic| Err(defect(&*panic, patcher.is_sound())))
    }

    /// Records the good end of an operation.
    fn end(&self, id: u64, change: impl FnOnce(&mut Update)) -> Result<Update, Problem> {
        let ended = self.book.change(id, |update| {
            update.doing = None;
            update.problem = None;
            change(update);
        });
        ended.ok_or_else(too_late)
    }

    /// Records the bad end of an operation.
    fn fail(&mut self, id: u64, state: State, problem: Problem) -> Problem {
        self.book.change(id, |update| {
            update.doing = None;
            update.state = state;
            update.problem = Some(problem.clone());
        });
        self.forget();
        problem
    }

    /// Drops what was applied to a kernel that is gone.
    fn forget(&mut self) {
        let now = self.patcher.generation();
        let book = &self.book;
        self.applied.retain(|id, generation| {
            let stays = *generation == now;
            if !stays {
                book.change(*id, |update| update.state = State::Lost);
            }
            stays
        });
    }
}

/// How long to wait behind a look that came `wait` behind the one before it, at the tasks that were bound before and after it. Whoever calls
/// a function without rest is outside of it only now and then, so tasks that leave one by one are looked at often; those that sleep, seldom.
pub(super) fn next_wait(wait: Duration, before: usize, after: usize) -> Duration {
    if (1..before).contains(&after) {
        FIRST_WAIT
    } else {
        (wait * 5 / 4).min(LONGEST_WAIT)
    }
}

fn defect(panic: &(dyn Any + Send), sound: bool) -> Problem {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
    let (failing, code, hint) = if sound {
        (
            Failing::Failed,
            "defect",
            "the guest runs on; please report this with the VMM's log",
        )
    } else {
        (
            Failing::Broken,
            BROKEN,
            "the guest's memory is not known to be sound: dump what is needed, kill it, and please report this with the VMM's log",
        )
    };
    Problem::new(
        failing,
        code,
        "the operation ended by a defect of exopatch",
        format!(
            "its thread panicked: {}",
            said.unwrap_or("it did not say why")
        ),
        hint,
    )
}

fn too_late() -> Problem {
    Problem::new(
        Failing::Deadline,
        "deadline_passed",
        "the operation was not begun",
        "its deadline passed while the operations before it were carried out",
        "try again, or give it a later --deadline",
    )
}
