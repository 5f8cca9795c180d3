//! Views of the running kernel: each under one pause, which ends before anything is written out.
//!
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

    /// One pause.
    fn once(
        &mut self,
        guest: &mut KvmGuest,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Result<Seen<View>, ViewError>, Problem> {
        let began = Instant::now();
        let paused = guest
            .pause(deadline)
            .map_err(|error| problem::guest(&error))?;
        let vcpus = paused.vcpus();
        let runs = |kernel: &Kernel| kernel.prove_same(&paused, vcpus).is_ok();
        let view = match &self.updated {
            Some((kernel, updates)) if runs(kernel) => take(asked, kernel, &paused, updates),
            _ => {
                let kernel = match self.seen.take().filter(runs) {
                    Some(kernel) => kernel,
                    None => Kernel::locate(Arc::clone(self.image), &paused, vcpus)
                        .map_err(problem::not_seen)?,
                };
                let kernel = self.seen.insert(kernel);
                take(asked, kernel, &paused, &[])
            }
        };
        paused.resume().map_err(|error| problem::guest(&error))?;
        let took = began.elapsed();
        // One that was paused already did not stand still for us.
        let stopped = !guest.last_pause().stop.is_zero();
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        Ok(view.map(|view| Seen {
            paused_us: Some(if stopped { us } else { 0 }),
            view,
        }))
    }
}

fn take(
    asked: &Asked,
    kernel: &Kernel,
    paused: &KvmPaused<'_>,
    updates: &[Update],
) -> Result<View, ViewError> {
    let subject = Subject {
        kernel,
        guest: paused,
        vcpus: paused.vcpus(),
        updates,
    };
    views::take(asked, &subject)
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
