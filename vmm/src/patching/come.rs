//! Stacks of vCPUs at the moment when they come to a place of the code, where a breakpoint stops the guest.
//!
//! The guest runs until then, and stands still for each that comes. What it was just changing can make no sense for a moment: such a moment is let go,
//! and does not count.

use std::time::Instant;

use patcher::guest::{Guest, PausedGuest};

use super::look::Known;
use super::problem;
use crate::guest::KvmGuest;
use crate::trial;
use crate::updates::Problem;
use crate::views::stack::Stacks;
use crate::views::{Seen, View, at};

/// Moments that are let go for one call at most: whoever comes to a place often would stand still for each of them.
const TRIES: u32 = 5;

impl Known<'_> {
    /// Waits for vCPUs to come to the place that was asked for, and takes their stacks.
    pub(super) fn come(
        &mut self,
        guest: &mut KvmGuest,
        asked: &at::Asked,
        deadline: Instant,
    ) -> Result<Seen<View>, Problem> {
        if !trial::breakpoints_work().map_err(|error| problem::trial(&error))? {
            return Err(problem::no_breakpoints());
        }
        let began = Instant::now();
        let paused = guest
            .pause(deadline)
            .map_err(|error| problem::guest(&error))?;
        let subject = self.subject(&paused)?;
        let place = at::address(&subject, asked).map_err(|error| problem::view(&error))?;
        paused.resume().map_err(|error| problem::guest(&error))?;
        if guest.last_pause().stop.is_zero() {
            return Err(problem::stands_still());
        }
        let (mut stood_still, mut stacks, mut left) = (began.elapsed(), Vec::new(), TRIES);
        let mut breakpoint = guest.break_at(place);
        while stacks.len() < asked.count {
            let (paused, came) = breakpoint
                .next(deadline)
                .map_err(|error| problem::breakpoint(&error))?;
            let began = Instant::now();
            let subject = self.subject(&paused)?;
            let seen = at::stacks(&subject, &came);
            paused.resume().map_err(|error| problem::guest(&error))?;
            stood_still += breakpoint.last_pause().stop + began.elapsed();
            match seen {
                Ok(seen) => stacks.extend(seen),
                Err(error) if left == 0 || !error.passes() => return Err(problem::view(&error)),
                Err(error) => {
                    tracing::debug!(%error, left, "the next is waited for");
                    left -= 1;
                }
            }
        }
        stacks.truncate(asked.count);
        let paused_us = u64::try_from(stood_still.as_micros()).unwrap_or(u64::MAX);
        Ok(Seen {
            paused_us: Some(paused_us),
            view: View::Stack(Stacks::of(stacks)),
        })
    }
}
