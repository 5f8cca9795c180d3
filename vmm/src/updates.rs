//! The update session: every update that was handed to this VM, where it stands, and the one thread that works on them.
//!
//! Operations run one at a time, in the order in which they came, on a thread of the session's own: nobody who asked
//! for one has to stay. Each change of an update's state is an event. What an operation does to the guest is the
//! [`Patcher`]'s part; it leaves an update applied whole or not at all.

pub mod patcher;
mod record;
mod worker;

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use self::patcher::{KernelInfo, Patcher, Room, Running, Task, Undo, Verified};
pub use self::record::{BROKEN, Cost, Failing, Passing, Problem, State, Straggler, Update};
use self::worker::Worker;
use crate::events::{EventKind, Events};
use crate::views::{Asked, Seen, View};
use ::patcher::apply::hooks::{HookEvent, Stage};
use ::patcher::apply::tune::SetChange;
pub use ::patcher::apply::{Calls, Edition, Life, Model};
pub use ::patcher::edition::list::Use;

/// Operations that may wait behind the one under way.
const QUEUE: usize = 16;
/// Who may ask at the same time what is counted. They take one place among the operations.
const ASKING: usize = 256;
/// Updates that are kept to be shown; the oldest that are over give way.
const KEPT: usize = 1024;
/// Stack of the session's thread, in bytes.
const STACK: usize = 1 << 20;

/// Called once, on the session's thread, with an operation's end.
pub type Done<T> = Box<dyn FnOnce(Result<T, Problem>) + Send>;

/// An update that is handed in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// A name for people.
    pub name: String,
    /// What it brings.
    pub brings: Brings,
    /// Do everything but write.
    pub check: bool,
    /// Whose place it takes.
    pub instead_of: InsteadOf,
    /// Who may be where at the switch; told by the package if this says nothing.
    pub model: Option<Model>,
    /// How its editions are used.
    pub how: Use,
    /// When to give up.
    pub deadline: Instant,
}

/// What an update brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Brings {
    /// The editions of a package: its bytes.
    Package(Vec<u8>),
    /// Clones of the kernel's own functions, by their names.
    Clones(Vec<String>),
}

impl Brings {
    /// The package's bytes; none of clones.
    #[must_use]
    pub fn package(&self) -> &[u8] {
        match self {
            Self::Package(bytes) => bytes,
            Self::Clones(_) => &[],
        }
    }

    /// The functions to be cloned; none of a package.
    #[must_use]
    pub fn clones(&self) -> &[String] {
        match self {
            Self::Package(_) => &[],
            Self::Clones(names) => names,
        }
    }
}

/// The updates that go when another one comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InsteadOf {
    /// These.
    These(Vec<u64>),
    /// All that are in effect.
    All,
}

/// What is counted in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// When it was read, since the VM's start.
    pub at: Duration,
    /// How often editions were called.
    pub calls: Vec<Calls>,
    /// The memory for editions.
    pub room: Room,
}

enum Job {
    Apply(u64, Order, Done<Update>),
    Revert(u64, Option<Model>, Instant, Done<Update>),
    Reuse(u64, Use, Instant, Done<Update>),
    Force(u64, Instant, Done<Update>),
    ChangeSet(String, SetChange, Done<usize>),
    DropSet(String, Done<()>),
    Sets(Done<Vec<(String, Vec<u64>)>>),
    SetTime(String, bool, Done<()>),
    DropTime(String, Done<()>),
    Times(Done<Vec<(String, bool)>>),
    Count,
    Verify(u64, Instant, Done<Verified>),
    Kernel(Instant, Done<KernelInfo>),
    View(Asked, Instant, Done<Seen<View>>),
}

/// The session. Clones share it.
#[derive(Clone, Debug)]
pub struct Session {
    book: Arc<Book>,
    jobs: SyncSender<Job>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Apply(..) => "Apply",
            Self::Revert(..) => "Revert",
            Self::Reuse(..) => "Reuse",
            Self::Force(..) => "Force",
            Self::ChangeSet(..) => "ChangeSet",
            Self::DropSet(..) => "DropSet",
            Self::Sets(..) => "Sets",
            Self::SetTime(..) => "SetTime",
            Self::DropTime(..) => "DropTime",
            Self::Times(..) => "Times",
            Self::Count => "Count",
            Self::Verify(..) => "Verify",
            Self::Kernel(..) => "Kernel",
            Self::View(..) => "View",
        })
    }
}

impl Session {
    /// Starts a session; `patcher` is made on the session's thread. The thread ends with the last clone.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start<P: Patcher>(
        events: Arc<Events>,
        patcher: impl FnOnce() -> P + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = sync_channel(QUEUE);
        let book = Arc::new(Book {
            events,
            updates: Mutex::default(),
            asking: Mutex::default(),
        });
        let worker_book = Arc::clone(&book);
        std::thread::Builder::new()
            .name("patcher".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                Worker::new(worker_book, patcher()).run(&queue);
            })?;
        Ok(Self { book, jobs })
    }

    /// All updates, oldest first.
    #[must_use]
    pub fn updates(&self) -> Vec<Update> {
        self.book.lock().clone()
    }

    /// Hands in a package; the update as it was queued. `done` gets the end.
    ///
    /// # Errors
    /// [`Failing::Busy`] when too many operations wait.
    pub fn apply(&self, order: Order, done: Done<Update>) -> Result<Update, Problem> {
        let update = self.book.open(&order);
        self.hand_in(Job::Apply(update.id, order, done))
            .inspect_err(|problem| self.book.refuse(update.id, problem))?;
        Ok(update)
    }

    /// Asks for an update to be undone, by the model with which it came or this one; the update as it is. `done` gets the end.
    ///
    /// # Errors
    /// When it is not applied, or too many operations wait.
    pub fn revert(
        &self,
        id: u64,
        model: Option<Model>,
        deadline: Instant,
        done: Done<Update>,
    ) -> Result<Update, Problem> {
        let update = self.book.applied(id)?;
        self.hand_in(Job::Revert(id, model, deadline, done))?;
        Ok(update)
    }

    /// Asks for an update's editions to be used in another way; the update as it is. `done` gets the end.
    ///
    /// # Errors
    /// When it is not applied, or too many operations wait.
    pub fn reuse(
        &self,
        id: u64,
        how: Use,
        deadline: Instant,
        done: Done<Update>,
    ) -> Result<Update, Problem> {
        let update = self.book.applied(id)?;
        self.hand_in(Job::Reuse(id, how, deadline, done))?;
        Ok(update)
    }

    /// Asks for an update's switch to be ended for all; the update as it is. `done` gets the end.
    ///
    /// # Errors
    /// When there is no such update, or too many operations wait.
    pub fn force(&self, id: u64, deadline: Instant, done: Done<Update>) -> Result<Update, Problem> {
        let update = self.book.find(id)?;
        self.hand_in(Job::Force(id, deadline, done))?;
        Ok(update)
    }

    /// Asks what is counted. Those who watch ask again and again, and may not keep operations out: all who ask before it is their turn
    /// get one answer.
    ///
    /// # Errors
    /// When too many operations, or too many who ask, wait.
    pub fn counted(&self, done: Done<Counted>) -> Result<(), Problem> {
        let mut asking = self.book.asking();
        if asking.len() >= ASKING {
            return Err(busy(format!("{ASKING} who ask for counts wait already")));
        }
        if asking.is_empty() {
            self.hand_in(Job::Count)?;
        }
        asking.push(done);
        Ok(())
    }

    /// Puts keys into a set and takes others out; `done` gets how many it then has.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn change_set(
        &self,
        name: String,
        change: SetChange,
        done: Done<usize>,
    ) -> Result<(), Problem> {
        self.hand_in(Job::ChangeSet(name, change, done))
    }

    /// Does away with a set.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn drop_set(&self, name: String, done: Done<()>) -> Result<(), Problem> {
        self.hand_in(Job::DropSet(name, done))
    }

    /// Asks for all sets, with their keys.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn sets(&self, done: Done<Vec<(String, Vec<u64>)>>) -> Result<(), Problem> {
        self.hand_in(Job::Sets(done))
    }

    /// Begins or ends a time that rules go by.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn set_time(&self, name: String, on: bool, done: Done<()>) -> Result<(), Problem> {
        self.hand_in(Job::SetTime(name, on, done))
    }

    /// Does away with a time.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn drop_time(&self, name: String, done: Done<()>) -> Result<(), Problem> {
        self.hand_in(Job::DropTime(name, done))
    }

    /// Asks for all times, and whether each is now.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn times(&self, done: Done<Vec<(String, bool)>>) -> Result<(), Problem> {
        self.hand_in(Job::Times(done))
    }

    /// Asks whether the guest still holds what an update wrote.
    ///
    /// # Errors
    /// When it is not applied, or too many operations wait.
    pub fn verify(&self, id: u64, deadline: Instant, done: Done<Verified>) -> Result<(), Problem> {
        self.book.applied(id)?;
        self.hand_in(Job::Verify(id, deadline, done))
    }

    /// Asks what is known of the kernel.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn kernel(&self, deadline: Instant, done: Done<KernelInfo>) -> Result<(), Problem> {
        self.hand_in(Job::Kernel(deadline, done))
    }

    /// Asks for a view of the kernel.
    ///
    /// # Errors
    /// When too many operations wait.
    pub fn view(
        &self,
        asked: Asked,
        deadline: Instant,
        done: Done<Seen<View>>,
    ) -> Result<(), Problem> {
        self.hand_in(Job::View(asked, deadline, done))
    }

    fn hand_in(&self, job: Job) -> Result<(), Problem> {
        let cause = match self.jobs.try_send(job) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(_)) => format!("{QUEUE} operations wait already"),
            Err(TrySendError::Disconnected(_)) => {
                return Err(Problem::new(
                    Failing::Failed,
                    "patcher_gone",
                    "no operation can be carried out any more",
                    "the patcher's thread has ended by a defect of exopatch",
                    "the guest runs on; please report this with the VMM's log",
                ));
            }
        };
        Err(busy(cause))
    }
}

fn busy(cause: String) -> Problem {
    Problem::new(
        Failing::Busy,
        "busy",
        "the operation was not taken",
        cause,
        "try again when those before it are done (exopatch update list)",
    )
}

/// The updates as they are shown, and who waits to be told what is counted.
struct Book {
    events: Arc<Events>,
    updates: Mutex<Vec<Update>>,
    asking: Mutex<Vec<Done<Counted>>>,
}

impl std::fmt::Debug for Book {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Book");
        shown
            .field("updates", &self.updates)
            .finish_non_exhaustive()
    }
}

impl Book {
    fn asking(&self) -> MutexGuard<'_, Vec<Done<Counted>>> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Update>> {
        self.updates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a new update.
    fn open(&self, order: &Order) -> Update {
        let mut updates = self.lock();
        if updates.len() >= KEPT {
            let over = updates.iter().position(|update| {
                matches!(
                    update.state,
                    State::Checked
                        | State::Reverted
                        | State::Replaced
                        | State::Refused
                        | State::Lost
                ) && update.editions.is_empty()
            });
            if let Some(oldest) = over {
                updates.remove(oldest);
            }
        }
        let update = Update {
            id: updates.last().map_or(1, |last| last.id + 1),
            name: order.name.clone(),
            state: State::Queued,
            doing: None,
            check: order.check,
            package_bytes: order.brings.package().len(),
            functions: Vec::new(),
            instead_of: Vec::new(),
            model: order.model,
            how: order.how.clone(),
            passing: None,
            editions: Vec::new(),
            hooks: Vec::new(),
            submitted: self.events.elapsed(),
            changed: self.events.elapsed(),
            applied: None,
            reverted: None,
            problem: None,
        };
        updates.push(update.clone());
        drop(updates);
        self.tell(&update);
        update
    }

    /// Ends an update that was not taken.
    fn refuse(&self, id: u64, problem: &Problem) {
        self.change(id, |update| {
            update.state = State::Refused;
            update.problem = Some(problem.clone());
        });
    }

    fn find(&self, id: u64) -> Result<Update, Problem> {
        let updates = self.lock();
        let found = updates.iter().find(|update| update.id == id);
        found.cloned().ok_or_else(|| {
            Problem::new(
                Failing::Unknown,
                "no_such_update",
                format!("there is no update {id}"),
                "no update with this number was handed to this VM",
                "exopatch update list shows all updates",
            )
        })
    }

    /// The update, if it can be reverted.
    fn applied(&self, id: u64) -> Result<Update, Problem> {
        let update = self.find(id)?;
        if matches!(
            update.state,
            State::Applied | State::Switching | State::Reverting
        ) {
            return Ok(update);
        }
        let (code, cause) = match update.state {
            State::Lost => (
                "update_lost",
                "the kernel in which it was applied no longer runs",
            ),
            State::Reverted => ("update_not_applied", "it was reverted already"),
            State::Replaced => ("update_not_applied", "another update has taken its place"),
            State::Broken => (
                BROKEN,
                "it failed half-way: the guest's memory is not known to be sound",
            ),
            State::Queued | State::Checking => ("update_not_applied", "it is still being applied"),
            _ => ("update_not_applied", "it was never applied"),
        };
        Err(Problem::new(
            Failing::Conflict,
            code,
            format!("update {id} is not applied"),
            cause,
            "exopatch update list shows the state of all updates",
        ))
    }

    /// Changes an update and tells the world, if there is anything new; the update afterwards.
    fn change(&self, id: u64, change: impl FnOnce(&mut Update)) -> Option<Update> {
        let mut updates = self.lock();
        let update = updates.iter_mut().find(|update| update.id == id)?;
        let before = update.clone();
        change(update);
        if *update == before {
            return Some(before);
        }
        if update.state != before.state {
            update.changed = self.events.elapsed();
        }
        let update = update.clone();
        drop(updates);
        self.tell(&update);
        Some(update)
    }

    /// Tells of a hook that began or ended.
    fn tell_hook(&self, hook: &HookEvent) {
        let HookEvent {
            update,
            name,
            moment,
            stage,
        } = hook;
        let (code, what) = match stage {
            Stage::Began => ("hook_began", format!("began ({moment})")),
            Stage::Ended { result, after } => {
                let ms = after.as_millis();
                ("hook_ended", format!("ended with {result} after {ms} ms"))
            }
            Stage::Failed { why, after } => {
                let ms = after.as_millis();
                ("hook_failed", format!("failed after {ms} ms: {why}"))
            }
        };
        self.events.publish(EventKind::Other {
            code: code.to_owned(),
            message: format!("hook {name} of update {update} {what}"),
        });
        self.change(*update, |update| {
            let same = |known: &&mut HookEvent| (&known.name, known.moment) == (name, *moment);
            match update.hooks.iter_mut().find(same) {
                Some(known) => known.clone_from(hook),
                None => update.hooks.push(hook.clone()),
            }
        });
    }

    fn tell(&self, update: &Update) {
        self.events
            .publish(EventKind::Update(Box::new(update.clone())));
    }
}

#[cfg(test)]
mod tests;
