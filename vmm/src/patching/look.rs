//! Views of the running kernel: each under one pause, which ends before anything is written out.
//!
//! The kernel's text is large and rarely changes: it is compared while the guest runs, and under the pause only if that found anything
//! that nothing explains.
//! What the guest was just changing makes no sense for a moment; it is then let go, and looked at again a little later, until the deadline.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::apply::Holdings;
use patcher::apply::arena::Placed;
use patcher::apply::handlers::Made;
use patcher::edition::list::Function;
use patcher::edition::resident::Resident;
use patcher::guest::{Guest, PausedGuest, Registers};
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;

use super::problem;
use crate::guest::{KvmGuest, KvmPaused};
use crate::updates::{Failing, Problem};
use crate::views::{self, Asked, Seen, Subject, Update, View, ViewError};

/// How long the guest runs between the first two pauses for one view; each time after that twice as long,
const BETWEEN: Duration = Duration::from_millis(10);
/// but no longer than this.
const BETWEEN_AT_MOST: Duration = Duration::from_millis(160);

/// What is known of a guest that is looked at.
pub(super) struct Known<'a> {
    /// The image that it was booted with.
    pub(super) image: &'a Arc<Image>,
    /// The kernel that updates were applied to, if there is one, and those of which something is in it.
    pub(super) updated: Option<(&'a Kernel, Vec<Update>)>,
    /// The kernel that was found by the last look, kept for the next one.
    pub(super) seen: &'a mut Option<Kernel>,
}

impl Known<'_> {
    /// Takes a view.
    pub(super) fn view(
        &mut self,
        guest: &mut KvmGuest,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Seen<View>, Problem> {
        if let Asked::At(asked) = asked {
            return self.come(guest, asked, deadline);
        }
        let (mut between, mut last) = (BETWEEN, None);
        loop {
            let error = match self.once(guest, asked, deadline) {
                Ok(Ok(seen)) => return Ok(seen),
                Ok(Err(error)) => error,
                // What is left of the time may be too short for another pause: what was in the way is what counts.
                Err(late) if late.failing == Failing::Deadline => {
                    return Err(last.as_ref().map_or(late, problem::view));
                }
                Err(problem) => return Err(problem),
            };
            if !error.passes() || Instant::now() + between >= deadline {
                return Err(problem::view(&error));
            }
            tracing::debug!(%error, ?between, "the guest is looked at again");
            std::thread::sleep(between);
            between = (between * 2).min(BETWEEN_AT_MOST);
            last = Some(error);
        }
    }

    /// One look: at the guest as it runs where that is enough, else at the guest as it stands still.
    fn once(
        &mut self,
        guest: &mut KvmGuest,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Result<Seen<View>, ViewError>, Problem> {
        if asked.is_of_text()
            && let Some(seen) = self.running(guest, asked, deadline)?
        {
            return Ok(Ok(seen));
        }
        let began = Instant::now();
        let paused = guest
            .pause(deadline)
            .map_err(|error| problem::guest(&error))?;
        let subject = self.subject(&paused)?;
        let view = views::take(asked, &subject);
        paused.resume().map_err(|error| problem::guest(&error))?;
        let paused_us = paused_us(guest, began);
        Ok(view.map(|view| Seen { paused_us, view }))
    }

    /// A view of the guest as it runs, which stands still only until its kernel is known; `None` when that view leaves anything open.
    fn running(
        &mut self,
        guest: &mut KvmGuest,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Option<Seen<View>>, Problem> {
        let began = Instant::now();
        let paused = guest
            .pause(deadline)
            .map_err(|error| problem::guest(&error))?;
        let (kernel, updates) = self.kernel(&paused)?;
        paused.resume().map_err(|error| problem::guest(&error))?;
        let paused_us = paused_us(guest, began);
        let subject = Subject {
            kernel,
            guest,
            vcpus: &[],
            updates,
        };
        let view = views::take(asked, &subject).ok();
        let view = view.filter(View::is_explained);
        Ok(view.map(|view| Seen { paused_us, view }))
    }

    /// What views are taken of, of a guest that stands still.
    pub(super) fn subject<'s>(
        &'s mut self,
        paused: &'s KvmPaused<'_>,
    ) -> Result<Subject<'s>, Problem> {
        let (kernel, updates) = self.kernel(paused)?;
        Ok(Subject {
            kernel,
            guest: paused,
            vcpus: paused.vcpus(),
            updates,
        })
    }

    /// The kernel that the guest runs, and the updates of which something is in it.
    fn kernel(&mut self, paused: &KvmPaused<'_>) -> Result<(&Kernel, &[Update]), Problem> {
        let vcpus = paused.vcpus();
        let runs = |kernel: &Kernel| kernel.prove_same(paused, vcpus).is_ok();
        if let Some((kernel, updates)) = &self.updated
            && runs(kernel)
        {
            return Ok((kernel, updates));
        }
        let kernel = match self.seen.take().filter(runs) {
            Some(kernel) => kernel,
            None => {
                Kernel::locate(Arc::clone(self.image), paused, vcpus).map_err(problem::not_seen)?
            }
        };
        Ok((self.seen.insert(kernel), &[]))
    }
}

/// How long a guest stood still that was stopped at `began` and has just been let go. One that was paused already did not for us.
fn paused_us(guest: &KvmGuest, began: Instant) -> Option<u64> {
    let stopped = !guest.last_pause().stop.is_zero();
    let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    Some(if stopped { took } else { 0 })
}

/// What updates have put into the guest: those in effect, those that threads have yet to leave, and the handlers that choose between them.
pub(super) fn updates(kernel: &Kernel, holds: &Holdings) -> Vec<Update> {
    let of = |(id, placed): (&u64, &Arc<Placed>)| Update {
        id: holds.functions.of(*id).next().map(|_| *id),
        jumps: jumps_into(holds, &placed.resident.code.range),
        code: placed.resident.clone(),
    };
    let handlers = holds.handlers(kernel).ok().flatten().map(|code| {
        let name = |made: &Made| {
            let function = holds.functions.get(made.function);
            let name = function.map_or("a function", |function| &function.target.name);
            (made.code.clone(), format!("handler of {name}"))
        };
        let mut pieces: Vec<_> = holds.all_made().map(name).collect();
        pieces.sort_by_key(|(range, _)| range.start);
        Update {
            id: None,
            jumps: jumps_into(holds, &code.range),
            code: Resident { pieces, code },
        }
    });
    holds.placed.iter().map(of).chain(handlers).collect()
}

/// The jumps in the kernel's text that lead into `code`.
fn jumps_into(holds: &Holdings, code: &Range<Gva>) -> Vec<Range<Gva>> {
    let leads = |function: &&Function| {
        let to = function.lead.address();
        to.is_some_and(|to| code.contains(&to))
    };
    let functions = holds.functions.iter().filter(leads);
    let jump = |function: &Function| {
        let target = &function.target;
        target.jump.range(target.displaced.len() as u64)
    };
    functions.filter_map(jump).collect()
}
