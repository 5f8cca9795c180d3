//! Whether the guest itself is about to change its text, and where it has probes.
//!
//! The guest's kernel patches its text under `text_mutex`; what prepares such patches holds one of the other locks. A
//! paused guest whose vCPU holds one may have patched half: it has to run on before its text is touched.
//! Sources: kernel `arch/x86/kernel/alternative.c` (`text_poke_bp_batch()`), `kernel/kprobes.c`, `kernel/locking/mutex.c`,
//! `kernel/locking/rtmutex.c`.

use std::ops::Range;

use super::locate::{Kernel, KernelError};
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// The low bits of a mutex's owner are flags (one of them, where mutexes lend their priority); the rest is the task that holds it.
const OWNER_FLAGS: u64 = 7;
/// `KPROBE_TABLE_SIZE`.
const KPROBE_BUCKETS: usize = 64;
/// More probes than any guest has.
const MAX_PROBES: usize = 1 << 16;
/// An optimised probe overwrites so many bytes from its address on.
const OPTIMIZED: u64 = 5;

impl Kernel {
    /// Why the kernel's text may be changing by the guest's own hand, or `None` when nothing of the kind is under way.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn text_in_flux<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
    ) -> Result<Option<&'static str>, KernelError> {
        let layout = &self.layout().flux;
        for (name, owner) in &layout.locks {
            if self.read_u64(guest, self.runtime(*owner))? & !OWNER_FLAGS != 0 {
                return Ok(Some(name));
            }
        }
        // Text is patched by way of breakpoints; while it is, their handler's table is referenced.
        match layout.breakpoints {
            Some(refs) if self.read_u32(guest, self.runtime(refs))? != 0 => Ok(Some("bp_desc")),
            _ => Ok(None),
        }
    }

    /// Addresses of the guest's kprobes whose bytes, as far as they may be overwritten, touch one of `ranges`.
    ///
    /// # Errors
    /// When the table of probes cannot be read, or does not end.
    pub fn kprobes_in<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        ranges: &[Range<Gva>],
    ) -> Result<Vec<Gva>, KernelError> {
        let probes = self.kprobes(guest)?.into_iter().map(|(at, _)| at);
        let touches = |at: &Gva| {
            let mut ranges = ranges.iter();
            ranges.any(|range| *at < range.end && range.start.0 < at.0.saturating_add(OPTIMIZED))
        };
        let mut found: Vec<Gva> = probes.filter(touches).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// Address and `struct kprobe` of each of the guest's kprobes.
    pub(crate) fn kprobes<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
    ) -> Result<Vec<(Gva, Gva)>, KernelError> {
        let mut found = Vec::new();
        let Some(layout) = &self.layout().flux.probes else {
            return Ok(found);
        };
        let table = self.runtime(layout.table);
        let mut buckets = [0; KPROBE_BUCKETS * 8];
        self.read(guest, table, &mut buckets)?;
        let mut left = MAX_PROBES;
        for bucket in buckets.as_chunks::<8>().0 {
            let mut node = u64::from_le_bytes(*bucket);
            while node != 0 {
                let unsound = KernelError::Unsound {
                    what: "table of kprobes",
                    at: table,
                    value: node,
                };
                left = left.checked_sub(1).ok_or(unsound)?;
                let probe = Gva(node.wrapping_sub(layout.link));
                let at = Gva(self.read_u64(guest, Gva(probe.0.wrapping_add(layout.address)))?);
                found.push((at, probe));
                node = self.read_u64(guest, Gva(node))?;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::Gva;
    use crate::kernel::testing::guest::TinyGuest;
    use crate::kernel::testing::{FORMS, Form};

    #[test]
    fn a_held_lock_or_a_half_done_patch_is_named() {
        for form in FORMS {
            let owner = form.mutex_owner();
            for (name, offset, value, want) in [
                (
                    "text_mutex",
                    owner,
                    0xffff_8880_0020_0001,
                    Some("text_mutex"),
                ),
                (
                    "module_mutex",
                    owner,
                    0xffff_8880_0020_0000,
                    Some("module_mutex"),
                ),
                ("bp_desc", 8, 1 << 32, Some("bp_desc")),
                // Waiters alone are nobody who holds it.
                ("text_mutex", owner, 7, None),
            ] {
                let mut guest = TinyGuest::new(form, 4);
                guest.put(guest.at(name) + offset, value);
                let kernel = guest.kernel();
                assert_eq!(kernel.text_in_flux(&guest).unwrap(), want, "{name}");
            }
        }
    }

    #[test]
    fn probes_are_found_and_circles_end() {
        let mut guest = TinyGuest::new(Form::New, 4);
        let (first, second) = (guest.object(64), guest.object(64));
        guest.put(guest.at("kprobe_table") + 8 * 9, first);
        guest.put(first, second);
        guest.put(first + 40, 0x2000);
        guest.put(second + 40, 0x1ffb);
        let kernel = guest.kernel();
        let probes = |range| kernel.kprobes_in(&guest, &[range]).unwrap();
        assert_eq!(probes(Gva(0x2000)..Gva(0x2001)), [Gva(0x2000)]);
        assert_eq!(probes(Gva(0x1fff)..Gva(0x2001)), [Gva(0x1ffb), Gva(0x2000)]);
        assert_eq!(probes(Gva(0x2005)..Gva(0x2010)), []);
        guest.put(second, first);
        assert!(kernel.kprobes_in(&guest, &[Gva(0)..Gva(1)]).is_err());
    }
}
