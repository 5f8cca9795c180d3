//! Whether the guest itself is about to change its text, and where it has probes.
//!
//! The guest's kernel patches its text under `text_mutex`; what prepares such patches holds one of the other locks. A
//! paused guest whose vCPU holds one may have patched half: it has to run on before its text is touched.
//! Sources: kernel `arch/x86/kernel/alternative.c` (`text_poke_bp_batch()`), `kernel/kprobes.c`, `kernel/locking/mutex.c`.

use std::ops::Range;

use super::locate::{Kernel, KernelError};
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// The locks, the one that guards all text first. Only the first must exist.
const LOCKS: [&str; 5] = [
    "text_mutex",
    "jump_label_mutex",
    "static_call_mutex",
    "kprobe_mutex",
    "module_mutex",
];
/// The low bits of a mutex's owner are flags; the rest is the task that holds it.
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
        let owner = self.image().types().offset_of("mutex", "owner")?;
        for (index, lock) in LOCKS.into_iter().enumerate() {
            if index > 0 && !self.image().symbols().has(lock) {
                continue;
            }
            let at = self.symbol(lock)?;
            let at = at.checked_add(owner).ok_or(KernelError::Unsound {
                what: lock,
                at,
                value: owner,
            })?;
            if self.read_u64(guest, at)? & !OWNER_FLAGS != 0 {
                return Ok(Some(lock));
            }
        }
        self.breakpoints_in_flux(guest)
    }

    /// Text is patched by way of breakpoints; while it is, their handler's table is referenced.
    fn breakpoints_in_flux<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
    ) -> Result<Option<&'static str>, KernelError> {
        const TABLE: &str = "bp_desc";
        let (symbols, types) = (self.image().symbols(), self.image().types());
        if !symbols.has(TABLE) || !types.has_member("bp_patching_desc", "refs") {
            return Ok(None);
        }
        let at = self.symbol(TABLE)?;
        let offset = types.offset_of("bp_patching_desc", "refs")?;
        let refs = at.checked_add(offset).ok_or(KernelError::Unsound {
            what: TABLE,
            at,
            value: offset,
        })?;
        Ok((self.read_u32(guest, refs)? != 0).then_some(TABLE))
    }

    /// Addresses of the guest's kprobes whose bytes, as far as they may be overwritten, touch `range`.
    ///
    /// # Errors
    /// When the table of probes cannot be read, or does not end.
    pub fn kprobes_in<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        range: &Range<Gva>,
    ) -> Result<Vec<Gva>, KernelError> {
        const TABLE: &str = "kprobe_table";
        let mut found = Vec::new();
        if !self.image().symbols().has(TABLE) {
            return Ok(found);
        }
        let types = self.image().types();
        let (link, address) = (
            types.offset_of("kprobe", "hlist")?,
            types.offset_of("kprobe", "addr")?,
        );
        let table = self.symbol(TABLE)?;
        let mut buckets = [0; KPROBE_BUCKETS * 8];
        self.read(guest, table, &mut buckets)?;
        let mut left = MAX_PROBES;
        for bucket in buckets.as_chunks::<8>().0 {
            let mut node = u64::from_le_bytes(*bucket);
            while node != 0 {
                let unsound = KernelError::Unsound {
                    what: TABLE,
                    at: table,
                    value: node,
                };
                left = left.checked_sub(1).ok_or(unsound)?;
                let probe = Gva(node.wrapping_sub(link));
                let at = Gva(self.read_u64(guest, Gva(probe.0.wrapping_add(address)))?);
                if at < range.end && range.start.0 < at.0.saturating_add(OPTIMIZED) {
                    found.push(at);
                }
                node = self.read_u64(guest, Gva(node))?;
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}
