//! The session's thread: takes one operation after the other, and records how each ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::patcher::{Patcher, Task, Verified};
use super::record::{Cost, Failing, Problem, State, Update};
use super::{Book, Job};
use crate::views::{Asked, Seen, View};

/// The session's thread.
pub(super) struct Worker<P: Patcher> {
    book: Arc<Book>,
    patcher: P,
    /// What is needed to revert each applied update, and the generation of the kernel that it is applied to.
    applied: BTreeMap<u64, (u64, P::Applied)>,
}

impl<P: Patcher> Worker<P> {
    pub(super) fn new(book: Arc<Book>, patcher: P) -> Self {
        Self {
            book,
            patcher,
            applied: BTreeMap::new(),
        }
    }

    /// Works until nobody can hand in anything any more.
    pub(super) fn run(mut self, queue: &Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            match job {
                Job::Apply(id, package, deadline, done) => done(self.apply(id, &package, deadline)),
                Job::Revert(id, deadline, done) => done(self.revert(id, deadline)),
                Job::Verify(id, deadline, done) => done(self.verify(id, deadline)),
                Job::Kernel(deadline, done) => {
                    let known = self.patcher.kernel(deadline);
                    self.forget();
                    done(known);
                }
                Job::View(asked, deadline, done) => done(self.view(&asked, deadline)),
            }
        }
    }

    fn apply(&mut self, id: u64, package: &[u8], deadline: Instant) -> Result<Update, Problem> {
        let book = Arc::clone(&self.book);
        let began = book.change(id, |update| update.state = State::Checking);
        let (check, submitted) = began.map_or((true, Duration::ZERO), |update| {
            (update.check, update.submitted)
        });
        let task = Task {
            package,
            check,
            deadline,
            functions: &|functions| drop(book.change(id, |update| update.functions = functions)),
            doing: &|doing| drop(book.change(id, |update| update.doing = Some(doing))),
        };
        let result = if Instant::now() >= deadline {
            Err(too_late())
        } else {
            self.patcher.apply(&task)
        };
        match result {
            Ok((applied, report)) => {
                let state = if applied.is_some() {
                    State::Applied
                } else {
                    State::Checked
                };
                let generation = self.patcher.generation();
                self.applied
                    .extend(applied.map(|applied| (id, (generation, applied))));
                self.forget();
                let total = book.events.elapsed().saturating_sub(submitted);
                self.end(id, |update| {
                    update.state = state;
                    update.applied = Some(Cost { report, total });
                })
            }
            Err(problem) => {
                let state = match problem.failing {
                    Failing::Broken => State::Broken,
                    _ => State::Refused,
                };
                Err(self.fail(id, state, problem))
            }
        }
    }

    fn revert(&mut self, id: u64, deadline: Instant) -> Result<Update, Problem> {
        let book = Arc::clone(&self.book);
        // The operations before this one may have ended it.
        let Some((generation, applied)) = self.applied.remove(&id) else {
            return Err(book.applied(id).err().unwrap_or_else(too_late));
        };
        book.change(id, |update| update.state = State::Reverting);
        let began = Instant::now();
        let doing = |doing| drop(book.change(id, |update| update.doing = Some(doing)));
        let result = if began >= deadline {
            Err((too_late(), Some(applied)))
        } else {
            self.patcher.revert(applied, deadline, &doing)
        };
        match result {
            Ok(report) => self.end(id, |update| {
                update.state = State::Reverted;
                update.reverted = Some(Cost {
                    report,
                    total: began.elapsed(),
                });
            }),
            Err((problem, kept)) => {
                let state = match (problem.failing, &kept) {
                    (Failing::Broken, _) | (_, None) => State::Broken,
                    _ => State::Applied,
                };
                self.applied
                    .extend(kept.map(|kept| (id, (generation, kept))));
                Err(self.fail(id, state, problem))
            }
        }
    }

    fn verify(&mut self, id: u64, deadline: Instant) -> Result<Verified, Problem> {
        let Some((_, applied)) = self.applied.get(&id) else {
            return Err(self.book.applied(id).err().unwrap_or_else(too_late));
        };
        let result = self.patcher.verify(applied, deadline);
        self.forget();
        result
    }

    fn view(&mut self, asked: &Asked, deadline: Instant) -> Result<Seen<View>, Problem> {
        if Instant::now() >= deadline {
            return Err(too_late());
        }
        let applied = self.applied.iter();
        let applied: Vec<_> = applied.map(|(id, (_, applied))| (*id, applied)).collect();
        self.patcher.view(asked, &applied, deadline)
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
        self.applied.retain(|id, (generation, _)| {
            let stays = *generation == now;
            if !stays {
                book.change(*id, |update| update.state = State::Lost);
            }
            stays
        });
    }
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
