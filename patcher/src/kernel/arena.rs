//! Where the arena is mapped in the kernel's address space, and by which entries of its page tables.
//!
//! The last megabytes of the fixmap's 1 GiB region are used by no kernel: `level2_fixmap_pgt[508..511]`, 2 MiB each, are
//! shared by every address space at four and at five levels. Code is mapped read-execute, data read-write and not executable,
//! the third is spare. Entries: Intel SDM vol. 3A, table 4-18.

use std::ops::Range;

use super::locate::{Kernel, KernelError};
use crate::addr::{Gpa, Gva};
use crate::guest::ReadPhys;
use crate::x86::paging::{Entry, PagingError};

/// The table that holds the entries.
const TABLE: &str = "level2_fixmap_pgt";
/// First address that the table maps.
const TABLE_START: Gva = Gva(0xffff_ffff_c000_0000);
const FIRST_SLOT: u64 = 508;
/// Bytes that one entry maps.
pub const SLOT_SIZE: u64 = 2 << 20;
/// Present, accessed, large page. Not dirty: dirty but not writable would mean a shadow stack.
const READ_EXECUTE: u64 = 0xa1;
/// Present, writable, accessed, dirty, large page, no-execute.
const READ_WRITE: u64 = 1 << 63 | 0xe3;
/// Accessed and dirty: the processor sets them by itself.
const SET_BY_CPU: u64 = 1 << 5 | 1 << 6;
/// The level of the entries.
const LEVEL: u8 = 2;

/// Where code in the arena is, once it is mapped.
pub const CODE: Range<Gva> =
    Gva(TABLE_START.0 + FIRST_SLOT * SLOT_SIZE)..Gva(TABLE_START.0 + (FIRST_SLOT + 1) * SLOT_SIZE);

/// Why the arena cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The arena is too small, or not aligned.
    #[error("the arena {arena:x?} does not hold two aligned pages of {SLOT_SIZE:#x} bytes")]
    Shape {
        /// Its memory.
        arena: Range<Gpa>,
    },
    /// The address is not mapped by the expected table.
    #[error(
        "{at} is translated by an entry at {found}, not at {expected} in {TABLE}: this kernel's address space is laid out otherwise"
    )]
    OtherTable {
        /// The address.
        at: Gva,
        /// Where its entry is.
        found: Gpa,
        /// Where it should be.
        expected: Gpa,
    },
    /// Something else is mapped there.
    #[error("the kernel already maps something at {at}: its entry is {entry:#x}")]
    Taken {
        /// The address.
        at: Gva,
        /// Its entry.
        entry: u64,
    },
    /// The kernel cannot be read.
    #[error("where the arena can be mapped cannot be read: {0}")]
    Kernel(#[from] KernelError),
}

impl From<PagingError> for ArenaError {
    fn from(error: PagingError) -> Self {
        Self::Kernel(error.into())
    }
}

/// One 2 MiB part of the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaPart {
    /// Where the kernel sees it.
    pub at: Gva,
    /// Its memory.
    pub memory: Range<Gpa>,
    /// Where the page-table entry that maps it goes.
    pub entry_at: Gpa,
    /// The entry.
    pub entry: u64,
}

impl ArenaPart {
    /// The guest-physical address behind `at`, or `None` when the `len` bytes there are not all in this part.
    #[must_use]
    pub fn physical(&self, at: Gva, len: u64) -> Option<Gpa> {
        let offset = at.offset_from(self.at)?;
        (offset.checked_add(len)? <= SLOT_SIZE)
            .then(|| self.memory.start.checked_add(offset))
            .flatten()
    }

    /// Whether the part is mapped as it should be, in `guest`.
    ///
    /// # Errors
    /// [`ArenaError::Taken`] when something else is mapped there, and when it cannot be read.
    pub fn mapped<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<bool, ArenaError> {
        match kernel.tables().entry(guest, self.at, LEVEL)?.value {
            0 => Ok(false),
            entry if entry | SET_BY_CPU == self.entry | SET_BY_CPU => Ok(true),
            entry => Err(ArenaError::Taken { at: self.at, entry }),
        }
    }
}

/// Where the parts of the arena are mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// Read and execute.
    pub code: ArenaPart,
    /// Read and write.
    pub data: ArenaPart,
}

impl ArenaLayout {
    /// Lays `arena` out in the address space of `kernel`, and checks that nothing else is mapped there.
    ///
    /// # Errors
    /// When the arena is too small, or the places are taken or not where this kernel's tables say.
    pub fn plan<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        guest: &R,
        arena: &Range<Gpa>,
    ) -> Result<Self, ArenaError> {
        let layout = Self {
            code: part(kernel, guest, arena, 0, READ_EXECUTE)?,
            data: part(kernel, guest, arena, 1, READ_WRITE)?,
        };
        for part in layout.parts() {
            part.mapped(kernel, guest)?;
        }
        Ok(layout)
    }

    /// The parts, code first.
    #[must_use]
    pub fn parts(&self) -> [&ArenaPart; 2] {
        [&self.code, &self.data]
    }
}

fn part<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    arena: &Range<Gpa>,
    index: u64,
    flags: u64,
) -> Result<ArenaPart, ArenaError> {
    let shape = || ArenaError::Shape {
        arena: arena.clone(),
    };
    let offset = index * SLOT_SIZE;
    let memory = arena
        .start
        .checked_add(offset)
        .and_then(|start| start.range(SLOT_SIZE))
        .ok_or_else(shape)?;
    if memory.end > arena.end || !memory.start.0.is_multiple_of(SLOT_SIZE) {
        return Err(shape());
    }
    let slot = FIRST_SLOT + index;
    let at = Gva(TABLE_START.0 + slot * SLOT_SIZE);
    let table = kernel.symbol(TABLE).map_err(KernelError::from)?;
    let expected = kernel.translate(guest, Gva(table.0.wrapping_add(slot * 8)))?;
    let Entry { at: found, .. } = kernel.tables().entry(guest, at, LEVEL)?;
    if found != expected {
        return Err(ArenaError::OtherTable {
            at,
            found,
            expected,
        });
    }
    Ok(ArenaPart {
        at,
        entry: memory.start.0 | flags,
        memory,
        entry_at: found,
    })
}

#[cfg(test)]
mod tests {
    use super::{ArenaLayout, Gpa, Gva};
    use crate::kernel::testing::Form;
    use crate::kernel::testing::guest::TinyGuest;

    const ARENA: u64 = 0x1_0000_0000;

    #[test]
    fn the_parts_lie_where_no_kernel_maps_anything() {
        for levels in [4, 5] {
            let mut guest = TinyGuest::new(Form::New, levels);
            let kernel = guest.kernel();
            let arena = Gpa(ARENA)..Gpa(ARENA + 0x60_0000);
            let layout = ArenaLayout::plan(&kernel, &guest, &arena).unwrap();
            let [code, data] = layout.parts();
            assert_eq!(
                (code.at, code.entry),
                (Gva(0xffff_ffff_ff80_0000), ARENA | 0xa1)
            );
            assert_eq!(
                (data.at, data.entry),
                (Gva(0xffff_ffff_ffa0_0000), 0x8000_0001_0020_00e3)
            );
            assert_eq!(
                data.physical(Gva(0xffff_ffff_ffa0_0010), 8),
                Some(Gpa(ARENA + 0x20_0010))
            );
            assert_eq!(data.physical(Gva(0xffff_ffff_ffbf_fffc), 8), None);
            assert!(!code.mapped(&kernel, &guest).unwrap());
            guest.put_phys(code.entry_at.0, code.entry & !0x20);
            assert!(code.mapped(&kernel, &guest).unwrap());
            assert!(ArenaLayout::plan(&kernel, &guest, &arena).is_ok());
            guest.put_phys(data.entry_at.0, 0x1234_0063);
            let got = ArenaLayout::plan(&kernel, &guest, &arena)
                .unwrap_err()
                .to_string();
            assert!(
                got.contains("already maps something at 0xffffffffffa00000"),
                "{got}"
            );
        }
    }

    #[test]
    fn an_arena_that_does_not_fit_is_refused() {
        let mut guest = TinyGuest::new(Form::Old, 4);
        let kernel = guest.kernel();
        for (start, len) in [
            (ARENA, 0x20_0000),
            (ARENA + 0x1000, 0x60_0000),
            (u64::MAX - 0xfff, 0xfff),
        ] {
            let arena = Gpa(start)..Gpa(start.saturating_add(len));
            assert!(
                ArenaLayout::plan(&kernel, &guest, &arena).is_err(),
                "{arena:?}"
            );
        }
    }
}
