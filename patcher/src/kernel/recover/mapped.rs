//! What a guest's page tables map where kernels are: the gigabyte that an image and its slide stay within.
//!
//! The walk takes a bounded number of steps whatever the tables say, and what they map in all is bounded too.
//! Sources: kernel `arch/x86/include/asm/page_64_types.h` (`KERNEL_IMAGE_SIZE`), `arch/x86/mm/init_64.c` (`cleanup_highmap()`,
//! `mark_rodata_ro()`).

use std::ops::Range;

use super::RecoverError;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::x86::paging::{PageTables, PagingError};

/// Where kernels are (`__START_KERNEL_map` and `KERNEL_IMAGE_SIZE`).
pub(super) const KERNEL: Range<Gva> = Gva(0xffff_ffff_8000_0000)..Gva(0xffff_ffff_c000_0000);
/// More bytes than any kernel has.
const MOST: u64 = 256 << 20;

/// The stretches that are mapped without a gap: all, or of pages alone that hold constants, which are neither written nor executed.
pub(super) fn runs<R: ReadPhys + ?Sized>(
    guest: &R,
    tables: PageTables,
    constant: bool,
) -> Result<Vec<Range<Gva>>, RecoverError> {
    let mut runs: Vec<Range<Gva>> = Vec::new();
    let (mut at, mut bytes) = (KERNEL.start, 0);
    while at < KERNEL.end {
        let (size, wanted) = match tables.translate(guest, at) {
            Ok(page) => {
                let wanted = !constant || !page.writable && !page.executable;
                (page.page_size, wanted)
            }
            // What a damaged table maps is as absent as what none does.
            Err(
                PagingError::NotPresent { level, .. }
                | PagingError::Reserved { level, .. }
                | PagingError::Memory { level, .. },
            ) => (1 << (12 + 9 * (u32::from(level.max(1)) - 1)), false),
            Err(other) => return Err(other.into()),
        };
        let end = Gva((at.0 | (size - 1)).saturating_add(1)).min(KERNEL.end);
        if wanted {
            bytes += end.0 - at.0;
            match runs.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => runs.push(at..end),
            }
        }
        if bytes > MOST {
            return Err(RecoverError::TooLarge { bytes });
        }
        at = end;
    }
    Ok(runs)
}
