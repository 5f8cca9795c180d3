//! The bytes that were there before, so that every write can be undone, in reverse.

use crate::addr::Gpa;
use crate::guest::{GuestError, PausedGuest};

/// One write that was done.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    at: Gpa,
    old: Vec<u8>,
}

/// An undo that failed: memory from here down the journal is not what it was.
#[derive(Debug, thiserror::Error)]
#[error(
    "{left} of {total} writes could not be undone, the first of them at guest-physical {at}: {cause}"
)]
pub struct UndoError {
    /// Where the undo failed.
    pub at: Gpa,
    /// How many writes are still in place.
    pub left: usize,
    /// How many there were.
    pub total: usize,
    /// What the machine said.
    pub cause: GuestError,
}

/// What was overwritten under one pause, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    entries: Vec<Entry>,
}

impl Journal {
    /// Writes `bytes` to guest-physical `at`, whose bytes are `old`.
    ///
    /// The write is in the journal even if it fails: undoing a write that was not done changes nothing.
    ///
    /// # Errors
    /// What the machine below reports.
    pub fn write<P: PausedGuest>(
        &mut self,
        guest: &mut P,
        at: Gpa,
        old: Vec<u8>,
        bytes: &[u8],
    ) -> Result<(), GuestError> {
        self.entries.push(Entry { at, old });
        guest.write_phys(at, bytes)
    }

    /// Puts everything back, last write first.
    ///
    /// # Errors
    /// [`UndoError`] at the first write that cannot be undone; those before it stay in place too.
    pub fn undo<P: PausedGuest>(&self, guest: &mut P) -> Result<(), UndoError> {
        for (left, entry) in self.entries.iter().enumerate().rev() {
            guest
                .write_phys(entry.at, &entry.old)
                .map_err(|cause| UndoError {
                    at: entry.at,
                    left: left + 1,
                    total: self.entries.len(),
                    cause,
                })?;
        }
        Ok(())
    }
}
