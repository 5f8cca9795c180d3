//! Check and write under one pause: [`Quiescent`] proves that a plan can be done now, and committing it does it whole or not at all.
//!
//! A check never writes; a commit never decides. The guest is resumed in every case but one: when a write failed and
//! undoing the earlier ones failed too, its memory is no longer known to be sound and it stays paused. A panic is such a failure.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use crate::addr::{Gpa, Gva};
use crate::guest::{GuestError, PausedGuest, ReadPhys, Registers};
use crate::journal::{Journal, UndoError};
use crate::kernel::quiescence::Inside;
use crate::kernel::rested::Rested;
use crate::kernel::stack::Watched;
use crate::plan::refusal::Refusal;
use crate::plan::{Plan, Purpose, Write, checks};
use crate::publish::Grace;

/// What was looked through to find that nothing is in the way, and what was asked and seen on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Tasks whose stacks were looked through.
    pub tasks: u64,
    /// Words of stacks that were looked at.
    pub words: u64,
    /// How many vCPUs there are.
    pub vcpus: usize,
    /// Who is in the code that the plan watches.
    pub watched: Vec<Watched>,
    /// Who is in the code of the plan's group.
    pub inside: Vec<Inside>,
    /// What is left of the plan's periods of grace.
    pub graces: Vec<Grace>,
}

/// Why a plan cannot be done under this pause. The guest is as it was.
#[derive(Debug, thiserror::Error)]
pub enum Blocked {
    /// The guest runs another kernel by now, or nothing can be said of it.
    #[error(
        "the guest no longer runs the kernel that was found in it ({cause}); it was reset, or has started another kernel"
    )]
    OtherKernel {
        /// What is different.
        cause: String,
    },
    /// The kernel is changing its own code.
    #[error("the guest is changing its own code at this moment ({cause})")]
    InFlux {
        /// What it is doing.
        cause: String,
    },
    /// A thread is in, or will return into, bytes that would change.
    #[error("{cause}")]
    Busy {
        /// Who, where, and into which bytes.
        cause: String,
    },
    /// The guest's state cannot be read now.
    #[error("the guest's state cannot be read at this moment: {cause}")]
    Unreadable {
        /// What cannot be read.
        cause: String,
    },
    /// The checks took until after the deadline.
    #[error("the checks took too long")]
    Late,
    /// Bytes are not what they were when the plan was made.
    #[error(transparent)]
    Changed(Refusal),
}

impl Blocked {
    /// Whether trying again a little later may help.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::InFlux { .. } | Self::Busy { .. } | Self::Unreadable { .. } | Self::Late => true,
            Self::OtherKernel { .. } | Self::Changed(_) => false,
        }
    }
}

/// What a commit asks of the running kernel, under the pause.
pub trait Running {
    /// It is still the kernel that was located.
    ///
    /// # Errors
    /// [`Blocked::OtherKernel`].
    fn prove_same<G: ReadPhys + Registers>(&self, guest: &G) -> Result<(), Blocked>;
    /// It is not changing its own code.
    ///
    /// # Errors
    /// [`Blocked::InFlux`], [`Blocked::Unreadable`].
    fn settled<G: ReadPhys>(&self, guest: &G) -> Result<(), Blocked>;
    /// What can be told before the pause, `until` then at most, of who is in nothing that the plan asks about. The guest runs.
    fn first_look<G: ReadPhys>(&self, guest: &G, plan: &Plan, until: Instant) -> Rested;
    /// No thread is in, or returns into, what the plan forbids. Those that have `rested` since the first look are not looked at again.
    ///
    /// # Errors
    /// [`Blocked::Busy`], [`Blocked::Unreadable`].
    fn scan<G: ReadPhys + Registers>(
        &self,
        guest: &G,
        plan: &Plan,
        rested: Rested,
    ) -> Result<Scanned, Blocked>;
    /// The writes that make the code of `plan` known to it, and have it forget what the plan says.
    ///
    /// # Errors
    /// [`Blocked::InFlux`], [`Blocked::Unreadable`].
    fn publishing<G: ReadPhys>(&self, guest: &G, plan: &Plan) -> Result<Vec<Write>, Blocked>;
    /// Where the byte is that it sees at `at`.
    ///
    /// # Errors
    /// [`Blocked::Unreadable`].
    fn translate<G: ReadPhys>(&self, guest: &G, at: Gva) -> Result<Gpa, Blocked>;
}

/// How long the parts of a check and commit took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Proving that it is the same kernel, at rest.
    pub prove: Duration,
    /// Looking through registers and stacks.
    pub scan: Duration,
    /// Comparing the bytes that will be written.
    pub verify: Duration,
    /// Writing.
    pub write: Duration,
}

/// A paused guest in which a plan can be done: the same kernel, at rest, nothing in the way, all bytes as expected.
#[derive(Debug)]
pub struct Quiescent<'p, P> {
    paused: P,
    plan: &'p Plan,
    /// Writes that only the guest that stands still could tell, to be done before the jumps.
    found: Vec<Write>,
    /// What each of the writes will overwrite, in their order.
    old: Vec<Vec<u8>>,
    /// What was looked through.
    pub scanned: Scanned,
    /// How long it took.
    pub times: Times,
}

/// A commit that failed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Every write was undone: memory is byte-identical, and the guest was resumed.
    #[error(
        "writing {purpose} at {at} failed ({cause}); everything was undone and the guest runs as before"
    )]
    RolledBack {
        /// What was to be written.
        purpose: Purpose,
        /// Where the kernel sees it.
        at: Gva,
        /// What the machine said.
        cause: GuestError,
    },
    /// Undoing failed too: the guest stays paused.
    #[error(
        "writing {purpose} at {at} failed ({cause}), and so did undoing it: {undo}. The guest stays paused, because its memory \
         is no longer sound; end it"
    )]
    Torn {
        /// What was to be written.
        purpose: Purpose,
        /// Where the kernel sees it.
        at: Gva,
        /// What the machine said.
        cause: GuestError,
        /// What could not be undone.
        undo: UndoError,
    },
}

impl<'p, P: PausedGuest> Quiescent<'p, P> {
    /// Checks everything that may have changed since the plan was made, before `deadline`. On an error the guest is resumed.
    ///
    /// # Errors
    /// [`Blocked`].
    pub fn check<K: Running>(
        paused: P,
        kernel: &K,
        plan: &'p Plan,
        rested: Rested,
        deadline: Instant,
    ) -> Result<Self, Blocked> {
        let mut times = Times::default();
        let mut clock = Instant::now();
        kernel.prove_same(&paused)?;
        kernel.settled(&paused)?;
        times.prove = lap(&mut clock);
        if clock > deadline {
            return Err(Blocked::Late);
        }
        let scanned = kernel.scan(&paused, plan, rested)?;
        times.scan = lap(&mut clock);
        let mut found = match &plan.binding {
            Some(binding) => binding.with(&scanned.inside)?.1,
            None => Vec::new(),
        };
        found.extend(kernel.publishing(&paused, plan)?);
        let old = ordered(plan, &found)
            .map(|write| verify(&paused, kernel, write))
            .collect::<Result<_, _>>()?;
        times.verify = lap(&mut clock);
        if clock > deadline {
            return Err(Blocked::Late);
        }
        Ok(Self {
            paused,
            plan,
            found,
            old,
            scanned,
            times,
        })
    }

    /// Does the plan. Returns the guest, still paused, and how long everything took.
    ///
    /// # Errors
    /// [`CommitError`]; the guest is then as it was, or stays paused.
    ///
    /// # Panics
    /// When a write does; the guest is then as it was, or stays paused.
    pub fn commit(mut self) -> Result<(P, Times), CommitError> {
        let mut clock = Instant::now();
        let mut journal = Journal::default();
        let writes = ordered(self.plan, &self.found).zip(self.old);
        // Neither the journal nor the guest is used for anything but the undo if this panics.
        let written = catch_unwind(AssertUnwindSafe(|| {
            for (write, old) in writes {
                let done = journal.write(&mut self.paused, write.gpa, old, &write.bytes);
                done.map_err(|cause| (write, cause))?;
            }
            Ok(())
        }));
        self.times.write = lap(&mut clock);
        let failed = match written {
            Ok(Ok(())) => return Ok((self.paused, self.times)),
            Ok(Err(failed)) => Ok(failed),
            Err(panic) => Err(panic),
        };
        let undone = journal.undo(&mut self.paused);
        if undone.is_err() {
            self.paused.leave_paused();
        }
        let (write, cause) = failed.unwrap_or_else(|panic| resume_unwind(panic));
        let (purpose, at) = (write.purpose, write.gva);
        Err(match undone {
            Ok(()) => CommitError::RolledBack { purpose, at, cause },
            Err(undo) => CommitError::Torn {
                purpose,
                at,
                cause,
                undo,
            },
        })
    }

    /// Gives the guest back, still paused, without writing.
    #[must_use]
    pub fn abandon(self) -> P {
        self.paused
    }
}

/// All writes in the order in which they are done.
fn ordered<'a>(plan: &'a Plan, found: &'a [Write]) -> impl Iterator<Item = &'a Write> {
    let (placed, jumps) = plan.writes.split_at(plan.unreachable());
    placed.iter().chain(found).chain(jumps)
}

fn lap(clock: &mut Instant) -> Duration {
    let now = Instant::now();
    let lap = now.duration_since(*clock);
    *clock = now;
    lap
}

/// Reads what `write` will overwrite, and compares it with what must be there.
fn verify<P: PausedGuest, K: Running>(
    paused: &P,
    kernel: &K,
    write: &Write,
) -> Result<Vec<u8>, Blocked> {
    let unreadable = |cause: GuestError| Blocked::Unreadable {
        cause: cause.to_string(),
    };
    if write.purpose == Purpose::Trampoline && kernel.translate(paused, write.gva)? != write.gpa {
        return Err(Blocked::OtherKernel {
            cause: format!("its text at {} has moved in memory", write.gva),
        });
    }
    let mut old = vec![0; write.bytes.len()];
    paused.read_phys(write.gpa, &mut old).map_err(unreadable)?;
    if let Some(expect) = &write.expect {
        checks::unchanged(&write.subject, write.gva, expect, &old).map_err(Blocked::Changed)?;
    }
    Ok(old)
}
