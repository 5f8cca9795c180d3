//! Translation of guest-virtual addresses by the guest's own page tables.
//!
//! Four and five levels are one loop. Every entry is the guest's word: a table outside its memory, a set reserved bit
//! or an address that is not canonical is an error, never a wrong answer.
//! Follows Intel SDM vol. 3A, 4.5 (4-level and 5-level paging).

use crate::addr::{Gpa, Gva};
use crate::guest::{GuestError, ReadPhys, Vcpu};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51 to 12: the address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// In a leaf above the last level bit 12 is PAT, not address.
const LARGE_PAT: u64 = 1 << 12;
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Why an address does not translate, or its bytes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    /// The vCPU is not in 64-bit mode.
    #[error("the vCPU does not translate addresses in 64-bit mode (CR0 {cr0:#x}, EFER {efer:#x})")]
    Mode {
        /// Its control register 0.
        cr0: u64,
        /// Its extended feature enable register.
        efer: u64,
    },
    /// The upper bits of the address are not copies of its highest translated bit.
    #[error("guest-virtual {at} is not canonical")]
    NotCanonical {
        /// The address.
        at: Gva,
    },
    /// Nothing is mapped there.
    #[error("guest-virtual {at} is not mapped: its level {level} entry is {entry:#x}")]
    NotPresent {
        /// The address.
        at: Gva,
        /// The level of the entry, 1 for the last.
        level: u8,
        /// The entry.
        entry: u64,
    },
    /// The entry has bits set that the processor reserves.
    #[error("guest-virtual {at} is mapped by a malformed level {level} entry {entry:#x}")]
    Reserved {
        /// The address.
        at: Gva,
        /// The level of the entry, 1 for the last.
        level: u8,
        /// The entry.
        entry: u64,
    },
    /// A table, or the byte itself (level 0), is outside the guest's memory.
    #[error("guest-virtual {at} cannot be read, at level {level} of its translation: {source}")]
    Memory {
        /// The address.
        at: Gva,
        /// The level of the table, 0 for the memory that was asked for.
        level: u8,
        /// What the machine said.
        source: GuestError,
    },
}

/// The root of a set of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTables {
    /// Where the topmost table is.
    pub root: Gpa,
    /// Levels: 4 or 5.
    pub levels: u8,
}

/// What an address is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The byte itself.
    pub at: Gpa,
    /// Bytes of the page that it is in: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Every level allows writes.
    pub writable: bool,
    /// Every level allows the user.
    pub user: bool,
    /// No level forbids execution.
    pub executable: bool,
    /// The table that holds the last entry of the walk.
    pub table: Gpa,
}

/// One entry on the way of a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub at: Gpa,
    /// What it holds.
    pub value: u64,
}

impl Entry {
    /// Where the next table or the page is.
    #[must_use]
    pub fn target(&self) -> Gpa {
        Gpa(self.value & ADDRESS)
    }
}

impl PageTables {
    /// The tables that `vcpu` uses. Bits 11 to 0 of CR3 are flags or a PCID.
    ///
    /// # Errors
    /// [`PagingError::Mode`] when it is not in 64-bit mode.
    pub fn of(vcpu: &Vcpu) -> Result<Self, PagingError> {
        if vcpu.cr0 & CR0_PG == 0 || vcpu.efer & EFER_LMA == 0 {
            return Err(PagingError::Mode {
                cr0: vcpu.cr0,
                efer: vcpu.efer,
            });
        }
        let levels = if vcpu.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
        Ok(Self {
            root: Gpa(vcpu.cr3 & ADDRESS),
            levels,
        })
    }

    /// What `at` is mapped to.
    ///
    /// # Errors
    /// Any but [`PagingError::Mode`].
    pub fn translate<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        at: Gva,
    ) -> Result<Mapping, PagingError> {
        let mut permissions = (true, true, true);
        let mut table = self.first(at)?;
        for level in (1..=self.levels).rev() {
            let Entry { value: entry, .. } = read_entry(guest, table, at, level)?;
            let malformed = PagingError::Reserved { at, level, entry };
            if entry & PRESENT == 0 {
                return Err(PagingError::NotPresent { at, level, entry });
            }
            let (writable, user, executable) = permissions;
            permissions = (
                writable && entry & WRITABLE != 0,
                user && entry & USER != 0,
                executable && entry & NO_EXECUTE == 0,
            );
            let leaf = level == 1 || entry & LARGE != 0;
            if !leaf {
                table = Gpa(entry & ADDRESS);
                continue;
            }
            let page_size = page_size(level);
            let pat = if level == 1 { 0 } else { LARGE_PAT };
            let base = entry & ADDRESS & !pat;
            if level > 3 || base & (page_size - 1) != 0 {
                return Err(malformed);
            }
            let (writable, user, executable) = permissions;
            let at = Gpa(base | at.0 & (page_size - 1));
            return Ok(Mapping {
                at,
                page_size,
                writable,
                user,
                executable,
                table,
            });
        }
        Err(PagingError::NotCanonical { at })
    }

    /// The entry of level `level` (1 for the last) that translates `at`, whether or not it is present.
    ///
    /// # Errors
    /// When a table above it is absent or malformed.
    pub fn entry<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        at: Gva,
        level: u8,
    ) -> Result<Entry, PagingError> {
        let mut table = self.first(at)?;
        let mut current = self.levels;
        loop {
            let entry = read_entry(guest, table, at, current)?;
            if current <= level {
                return Ok(entry);
            }
            if entry.value & PRESENT == 0 {
                return Err(PagingError::NotPresent {
                    at,
                    level: current,
                    entry: entry.value,
                });
            }
            if entry.value & LARGE != 0 {
                return Err(PagingError::Reserved {
                    at,
                    level: current,
                    entry: entry.value,
                });
            }
            table = entry.target();
            current -= 1;
        }
    }

    /// The present entry for `at` of `table`, a table of the last level that an earlier walk ended at.
    ///
    /// # Errors
    /// [`PagingError::NotPresent`] or [`PagingError::Memory`].
    pub fn last_entry<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        table: Gpa,
        at: Gva,
    ) -> Result<Entry, PagingError> {
        let entry = read_entry(guest, table, at, 1)?;
        let absent = PagingError::NotPresent {
            at,
            level: 1,
            entry: entry.value,
        };
        if entry.value & PRESENT == 0 {
            Err(absent)
        } else {
            Ok(entry)
        }
    }

    /// Fills `buf` from guest-virtual `at`, page by page.
    ///
    /// # Errors
    /// When any page of it is not mapped or not memory; `buf` is then unspecified.
    pub fn read<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        at: Gva,
        buf: &mut [u8],
    ) -> Result<(), PagingError> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let mapping = self.translate(guest, at)?;
            let left = mapping.page_size - at.0 % mapping.page_size;
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (part, tail) = rest.split_at_mut(len);
            guest
                .read_phys(mapping.at, part)
                .map_err(|source| PagingError::Memory {
                    at,
                    level: 0,
                    source,
                })?;
            rest = tail;
            if !rest.is_empty() {
                at = at
                    .checked_add(left)
                    .ok_or(PagingError::NotCanonical { at })?;
            }
        }
        Ok(())
    }

    /// The topmost table, if `at` is canonical.
    fn first(&self, at: Gva) -> Result<Gpa, PagingError> {
        let unused = 64 - (12 + 9 * u32::from(self.levels));
        let extended = (at.0.cast_signed() << unused >> unused).cast_unsigned();
        if extended == at.0 {
            Ok(self.root)
        } else {
            Err(PagingError::NotCanonical { at })
        }
    }
}

/// Bytes that one entry of `level` maps.
fn page_size(level: u8) -> u64 {
    1 << shift(level)
}

fn shift(level: u8) -> u32 {
    12 + 9 * (u32::from(level) - 1)
}

fn read_entry<R: ReadPhys + ?Sized>(
    guest: &R,
    table: Gpa,
    at: Gva,
    level: u8,
) -> Result<Entry, PagingError> {
    let entry_at = Gpa(table.0 | ((at.0 >> shift(level) & 0x1ff) * 8));
    let mut bytes = [0; 8];
    guest
        .read_phys(entry_at, &mut bytes)
        .map_err(|source| PagingError::Memory { at, level, source })?;
    Ok(Entry {
        at: entry_at,
        value: u64::from_le_bytes(bytes),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Gpa, Gva, Mapping, PageTables, PagingError};
    use crate::guest::{GuestError, ReadPhys};

    /// Physical memory from zero up.
    struct Memory(Vec<u8>);

    impl ReadPhys for Memory {
        fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
            let start = usize::try_from(at.0).unwrap_or(usize::MAX);
            let none = || GuestError::NoMemory { at, len: buf.len() };
            let bytes = start
                .checked_add(buf.len())
                .and_then(|end| self.0.get(start..end))
                .ok_or_else(none)?;
            buf.copy_from_slice(bytes);
            Ok(())
        }
    }

    impl Memory {
        fn set(&mut self, table: usize, index: usize, entry: u64) {
            self.0[table + index * 8..table + index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        }
    }

    const AT: Gva = Gva(0xffff_ffff_8123_4567);

    /// Tables that map `AT` by a leaf of `leaf_level`, whose entry is `leaf`; the path above it is all one entry a table.
    fn mapped(levels: u8, leaf_level: u8, leaf: u64) -> (Memory, PageTables) {
        let mut memory = Memory(vec![0; 0x8000]);
        for level in (leaf_level..=levels).rev() {
            let table = 0x1000 * usize::from(level);
            let index = usize::try_from(AT.0 >> super::shift(level) & 0x1ff).unwrap();
            let next = table as u64 - 0x1000;
            memory.set(
                table,
                index,
                if level == leaf_level { leaf } else { next | 3 },
            );
        }
        (
            memory,
            PageTables {
                root: Gpa(0x1000 * u64::from(levels)),
                levels,
            },
        )
    }

    fn check(levels: u8, leaf_level: u8, leaf: u64, want: Result<Mapping, &str>) {
        let (memory, tables) = mapped(levels, leaf_level, leaf);
        match (tables.translate(&memory, AT), want) {
            (Ok(got), Ok(want)) => assert_eq!(
                Mapping {
                    table: Gpa(0),
                    ..got
                },
                want
            ),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }

    fn page(
        at: u64,
        page_size: u64,
        writable: bool,
        executable: bool,
    ) -> Result<Mapping, &'static str> {
        Ok(Mapping {
            at: Gpa(at),
            page_size,
            writable,
            user: false,
            executable,
            table: Gpa(0),
        })
    }

    #[test]
    fn leaves_of_every_size_translate_with_four_and_five_levels() {
        for levels in [4, 5] {
            check(levels, 1, 0x7003, page(0x7567, 0x1000, true, true));
            check(
                levels,
                1,
                0x8000_0000_0000_7001,
                page(0x7567, 0x1000, false, false),
            );
            check(
                levels,
                2,
                0x4000_00e1,
                page(0x4003_4567, 0x20_0000, false, true),
            );
            check(
                levels,
                2,
                0x4000_10e1,
                page(0x4003_4567, 0x20_0000, false, true),
            );
            check(
                levels,
                3,
                0x4000_00e3,
                page(0x4123_4567, 0x4000_0000, true, true),
            );
        }
    }

    #[test]
    fn malformed_entries_are_errors() {
        check(
            4,
            1,
            0x7002,
            Err("is not mapped: its level 1 entry is 0x7002"),
        );
        check(4, 2, 0x4000_20e1, Err("malformed level 2"));
        check(4, 4, 0x4000_00e1, Err("malformed level 4"));
        check(5, 5, 0x4000_00e1, Err("malformed level 5"));
        check(4, 4, 0xe1, Err("malformed level 4"));
        check(5, 5, 0xe1, Err("malformed level 5"));
        check(
            4,
            3,
            0x000f_ffff_0000_0003,
            Err("at level 2 of its translation"),
        );
        let (memory, tables) = mapped(4, 1, 0x7003);
        let got = tables.translate(&memory, Gva(0x1234_5678_9abc_def0));
        assert!(
            matches!(got, Err(PagingError::NotCanonical { .. })),
            "{got:?}"
        );
    }

    #[test]
    fn a_table_that_points_at_itself_ends() {
        let mut memory = Memory(vec![0; 0x1000]);
        (0..512).for_each(|index| memory.set(0, index, 3));
        let tables = PageTables {
            root: Gpa(0),
            levels: 5,
        };
        assert_eq!(tables.translate(&memory, AT).unwrap().at, Gpa(0x567));
    }

    #[test]
    fn reads_cross_pages() {
        let (mut memory, tables) = mapped(4, 1, 0x7003);
        let next = usize::try_from(AT.0 >> 12 & 0x1ff).unwrap() + 1;
        memory.set(0x1000, next, 0x6003);
        memory.0[0x7fff] = 1;
        memory.0[0x6000] = 2;
        let mut buf = [0; 2];
        tables.read(&memory, Gva(AT.0 | 0xfff), &mut buf).unwrap();
        assert_eq!(buf, [1, 2]);
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0x2000), at: u64, five: bool) {
            let tables = PageTables { root: Gpa(0x1000), levels: if five { 5 } else { 4 } };
            let _ = tables.translate(&Memory(bytes.clone()), Gva(at));
            let _ = tables.entry(&Memory(bytes.clone()), Gva(at), 2);
            let _ = tables.read(&Memory(bytes), Gva(at), &mut [0; 64]);
        }
    }
}
