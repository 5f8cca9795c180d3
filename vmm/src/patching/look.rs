//! Views of the running kernel: each under one pause, which ends before anything is written out.
//!
//! The kernel's text is large and rarely changes: it is compared while the guest runs, and under the pause only if that found anything
//! that nothing explains.
//! What the guest was just changing makes no sense for a moment; it is then let go, and looked at again a little later.

use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::apply::Applied;
use patcher::guest::{Guest, PausedGuest, Registers};
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::plan::Purpose;

use super::problem;
use crate::guest::{KvmGuest, KvmPaused};
use crate::updates::Problem;
use crate::views::{self, Asked, Seen, Subject, Update, View, ViewError};

/// Pauses that are made for one view at most.
const TRIES: u32 = 5;
/// How long the guest runs between two of them.
const BETWEEN: Duration = Duration::from_millis(10);

/// What is known of a guest that is looked at.
pub(super) struct Known<'a> {
    /// The image that it was booted with.
    pub(super) image: &'a Arc<Image>,
    /// The kernel that updates were applied to, if there is one, and those in effect.
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
        let mut left = TRIES;
        loop {
            let error = match self.once(guest, asked, deadline)? {
                Ok(seen) => return Ok(seen),
                Err(error) => error,
            };
            left -= 1;
            if left == 0 || !error.passes() || Instant::now() + BETWEEN >= deadline {
                return Err(problem::view(&error));
            }
            tracing::debug!(%error, left, "the guest is looked at again");
            std::thread::sleep(BETWEEN);
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
        let (kernel, updates) = self.kernel(&paused)?;
        let subject = Subject {
            kernel,
            guest: &paused,
            vcpus: paused.vcpus(),
            updates,
        };
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

    /// The kernel that the guest runs, and the updates that are in effect in it.
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

/// What an update has put into the guest.
pub(super) fn update(id: u64, applied: &Applied) -> Update {
    let jumps = applied.plan.writes.iter();
    let jumps = jumps.filter(|write| write.purpose == Purpose::Trampoline);
    let jumps = jumps.filter_map(|write| write.gva.range(write.bytes.len() as u64));
    let linked = &applied.linked;
    let mut pieces = Vec::new();
    for redirection in &linked.redirections {
        let name = &redirection.target.name;
        pieces.push((redirection.edition, name.clone()));
        pieces.push((redirection.head.at, format!("exopatch_original_{name}")));
    }
    pieces.sort();
    let end = linked
        .code
        .at
        .saturating_add(linked.code.bytes.len() as u64);
    let ends = pieces.iter().skip(1).map(|(at, _)| at.0).chain([end]);
    let ends: Vec<u64> = ends.collect();
    let code = pieces
        .into_iter()
        .zip(ends)
        .filter_map(|((at, name), end)| {
            let range = at.range(end.checked_sub(at.0)?)?;
            Some((range, name))
        });
    Update {
        id,
        jumps: jumps.collect(),
        code: code.collect(),
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::{Gpa, Gva};
    use patcher::apply::Applied;
    use patcher::edition::link::{Linked, Placed, Redirection};
    use patcher::plan::target::Target;
    use patcher::plan::{Plan, Purpose, Write};
    use patcher::x86::insn::Head;

    fn redirection(name: &str, edition: u64, head: u64) -> Redirection {
        Redirection {
            target: Target {
                name: name.to_owned(),
                function: Gva(0x10),
                size: 0x20,
                jump: Gva(0x15),
                displaced: Vec::new(),
            },
            edition: Gva(edition),
            head: Head {
                at: Gva(head),
                bytes: Vec::new(),
                moved: Vec::new(),
            },
        }
    }

    fn write(purpose: Purpose, at: u64) -> Write {
        Write {
            purpose,
            subject: String::new(),
            gva: Gva(at),
            gpa: Gpa(0),
            expect: None,
            bytes: vec![0; 5],
        }
    }

    #[test]
    fn the_code_of_an_update_has_names_and_its_jumps_are_ours() {
        let linked = Linked {
            code: Placed {
                at: 0x1000,
                bytes: vec![0; 0x100],
            },
            redirections: vec![
                redirection("f", 0x1000, 0x1080),
                redirection("g", 0x1040, 0x10c0),
            ],
            data: Placed::default(),
            orc: Vec::new(),
        };
        let writes = vec![
            write(Purpose::Arena, 0x1000),
            write(Purpose::Trampoline, 0x15),
        ];
        let forbidden = Vec::new();
        let plan = Plan { writes, forbidden };
        let update = super::update(3, &Applied { linked, plan });
        assert_eq!(update.jumps, [Gva(0x15)..Gva(0x1a)]);
        let code = update.code.iter();
        let code: Vec<_> = code
            .map(|(range, name)| (range.start.0, range.end.0, name.as_str()))
            .collect();
        let want = [
            (0x1000, 0x1040, "f"),
            (0x1040, 0x1080, "g"),
            (0x1080, 0x10c0, "exopatch_original_f"),
            (0x10c0, 0x1100, "exopatch_original_g"),
        ];
        assert_eq!(code, want);
    }
}
