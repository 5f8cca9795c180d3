//! Whether any task has come or gone since a moment at which the guest ran.
//!
//! The kernel counts the tasks that it has ever made and those that there are, and changes its lists of tasks only while it holds `tasklist_lock` for
//! writing; whoever adds a task or takes one away counts it before letting go of that (kernel `kernel/fork.c`, `copy_process()`; `kernel/exit.c`,
//! `__unhash_process()`). Tasks that change places (`fs/exec.c`, `de_thread()`) are the same ones. So where the counts were read, the lock seen free
//! *after* that, and a later look finds the lock free and the same counts, the lists have had the same members from then on: a change that began
//! and ended in between would have counted, and one that is under way would hold the lock. That tasks were made never counts down, so that no
//! other change makes up for one.

use std::sync::atomic::{Ordering, fence};

use super::image::Image;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use crate::addr::LinkAddr;
use crate::guest::ReadPhys;

/// The part of a queued lock's word that a writer fills (kernel `include/asm-generic/qrwlock.h`).
const WRITER: u32 = 0xff;

/// Where the counts and the lock are.
#[derive(Clone, Debug)]
pub(crate) struct CensusLayout {
    made: LinkAddr,
    present: LinkAddr,
    lock: LinkAddr,
}

impl CensusLayout {
    /// `None` for a kernel that has them not, or whose lock is another one (`CONFIG_PREEMPT_RT`).
    pub(crate) fn resolve(image: &Image) -> Option<Self> {
        let (symbols, types) = (image.symbols(), image.types());
        let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address).ok();
        let word = types.offset_of("rwlock_t", "raw_lock.cnts").ok()?;
        Some(Self {
            made: at("total_forks")?,
            present: at("nr_threads")?,
            lock: at("tasklist_lock")?.checked_add(word)?,
        })
    }
}

/// How many tasks there are, and how many have ever been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Census {
    made: u64,
    present: u32,
}

impl Census {
    /// Counts, before the lists are looked at; `None` while they change, and where that cannot be told.
    ///
    /// # Errors
    /// When the counts cannot be read.
    pub(crate) fn take<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
    ) -> Result<Option<Self>, KernelError> {
        let Some(layout) = &kernel.layout().census else {
            return Ok(None);
        };
        let census = Self {
            made: memory.u64(kernel.runtime(layout.made))?,
            present: memory.u32(kernel.runtime(layout.present))?,
        };
        fence(Ordering::Acquire);
        let lock = memory.u32(kernel.runtime(layout.lock))?;
        // The lists are read behind the lock.
        fence(Ordering::Acquire);
        Ok((lock & WRITER == 0).then_some(census))
    }
}

#[cfg(test)]
mod tests {
    use super::Census;
    use crate::kernel::memory::Memory;
    use crate::kernel::testing::guest::TinyGuest;
    use crate::kernel::testing::{FORMS, Form};

    #[test]
    fn what_came_went_or_is_under_way_shows() {
        for form in FORMS {
            let mut guest = TinyGuest::new(form, 4);
            let kernel = guest.kernel();
            let take = |guest: &TinyGuest| {
                Census::take(&kernel, &Memory::new(&kernel, guest).unwrap()).unwrap()
            };
            let before = take(&guest);
            // Where all locks lend their priority, this one has another form.
            assert_eq!(before.is_some(), form != Form::OldSorted, "{form:?}");
            let Some(before) = before else { continue };
            for name in ["total_forks", "nr_threads"] {
                let count = guest.get(guest.at(name));
                guest.put(guest.at(name), count + 1);
                assert!(take(&guest).is_some_and(|now| now != before), "{name}");
                guest.put(guest.at(name), count);
                assert_eq!(take(&guest), Some(before), "{name}");
            }
            for (lock, free) in [(0xff, false), (0x1ff, false), (0x100, true), (0x200, true)] {
                guest.put(guest.at("tasklist_lock"), lock);
                assert_eq!(take(&guest).is_some(), free, "{lock:#x}");
            }
        }
    }
}
