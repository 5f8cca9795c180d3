//! The session's thread: takes one operation after the other, and records how each ends. A panic in one of them is its end, and not the thread's.

use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::patcher::{Patcher, Task, Undo, Verified};
use super::record::{BROKEN, Cost, Failing, Problem, State, Update};
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
                    let known = self.work(|patcher| patcher.kernel(deadline));
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
        let written = Cell::new(false);
        let task = Task {
            package,
            check,
            deadline,
            functions: &|functions| drop(book.change(id, |update| update.functions = functions)),
            doing: &|doing| drop(book.change(id, |update| update.doing = Some(doing))),
            written: &|| written.set(true),
        };
        let result = if Instant::now() >= deadline {
            Err(too_late())
        } else {
            self.work(|patcher| patcher.apply(&task))
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
                    // What it takes to undo it went with the panic.
                    _ if written.get() => State::Broken,
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
        let written = Cell::new(false);
        let task = Undo {
            deadline,
            doing: &|doing| drop(book.change(id, |update| update.doing = Some(doing))),
            written: &|| written.set(true),
        };
        let result = if began >= deadline {
            Err(too_late())
        } else {
            self.work(|patcher| patcher.revert(&applied, &task))
        };
        match result {
            Ok(report) => self.end(id, |update| {
                update.state = State::Reverted;
                update.reverted = Some(Cost {
                    report,
                    total: began.elapsed(),
                });
            }),
            Err(problem) => {
                let state = match problem.failing {
                    Failing::Broken => State::Broken,
                    _ if written.get() => State::Reverted,
                    _ => State::Applied,
                };
                if state == State::Applied {
                    self.applied.insert(id, (generation, applied));
                }
                Err(self.fail(id, state, problem))
            }
        }
    }

    fn verify(&mut self, id: u64, deadline: Instant) -> Result<Verified, Problem> {
        let Some((_, applied)) = self.applied.get(&id) else {
            return Err(self.book.applied(id).err().unwrap_or_else(too_late));
        };
        let result = caught(&mut self.patcher, |patcher| {
            patcher.verify(applied, deadline)
        });
        self.forget();
        result
    }

    fn view(&mut self, asked: &Asked, deadline: Instant) -> Result<Seen<View>, Problem> {
        if Instant::now() >= deadline {
            return Err(too_late());
        }
        let applied = self.applied.iter();
        let applied: Vec<_> = applied.map(|(id, (_, applied))| (*id, applied)).collect();
        caught(&mut self.patcher, |patcher| {
            patcher.view(asked, &applied, deadline)
        })
    }

    fn work<T>(&mut self, work: impl FnOnce(&mut P) -> Result<T, Problem>) -> Result<T, Problem> {
        caught(&mut self.patcher, work)
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

/// Lets the patcher work. A panic is a problem like others: on its way out what was written is undone, or the guest left paused, and else
/// let go; what the patcher knows of the guest is looked at again with each operation.
fn caught<P: Patcher, T>(
    patcher: &mut P,
    work: impl FnOnce(&mut P) -> Result<T, Problem>,
) -> Result<T, Problem> {
    catch_unwind(AssertUnwindSafe(|| work(patcher)))
        .unwrap_or_else(|panic| Err(defect(&*panic, patcher.is_sound())))
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
