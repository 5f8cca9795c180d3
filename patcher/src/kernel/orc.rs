//! How the caller of a piece of kernel code is found on the stack: ORC tables, looked up in place.
//!
//! A table is two arrays: where each stretch of code begins (signed 32-bit distances, each from its own slot), and how to unwind there.
//! The layout of the second comes from BTF (`orc_entry`), and what its numbers mean is proved on the table itself: at the entry of a traced
//! function the return address is the word that the stack pointer points at. Holding an [`OrcTable`] proves that it is sorted and
//! describes the code that it is said to describe, and no other.
//! Sources: kernel `arch/x86/include/asm/orc_types.h`, `arch/x86/kernel/unwind_orc.c`, `scripts/sorttable.h`.

mod entry;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use self::entry::OrcFormat;
pub(crate) use self::entry::{Base, Content, FramePointer, Orc};
use super::bytes::le_i32;
use super::image::{Bytes, Section};
use super::types::{TypeError, Types};
use crate::addr::LinkAddr;

/// Bytes of a slot of the array of addresses.
const SLOT: usize = 4;
/// Bytes of code that one step of the index is for.
const BLOCK: u64 = 4096;
/// Bytes of code that one table can be for: each address lies at most half as far from its slot, on either side, as 32 bits count. With more room
/// than that for the slots themselves, addresses that lie further apart have gone around the end of the address space.
const REACH: u64 = 1 << 33;
/// Traced functions whose entry must read as a call, for the meaning of the numbers to be believed.
const PROOFS: usize = 64;

/// Why a table cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrcError {
    /// The image has none: the kernel finds its own way otherwise.
    #[error(
        "the kernel's image has no section {section}, which says how to unwind its stacks (CONFIG_UNWINDER_ORC)"
    )]
    Absent {
        /// The section.
        section: &'static str,
    },
    /// The layout of an entry is not among the kernel's types, or is none that is known.
    #[error("the layout of the unwind table's entries cannot be told: {0}")]
    Type(#[from] TypeError),
    /// A field of an entry is larger than this reads.
    #[error("field {field} of the unwind table's entries is not within its first eight bytes")]
    Field {
        /// The field.
        field: &'static str,
    },
    /// The two arrays do not have equally many elements, or none.
    #[error(
        "the unwind table has {ips:#x} bytes of addresses and {entries:#x} of entries, which do not match"
    )]
    Shape {
        /// Bytes of addresses.
        ips: usize,
        /// Bytes of entries.
        entries: usize,
    },
    /// An address is below the one before it.
    #[error(
        "the unwind table is not sorted: its entry {index} is for {at:#x}, below the one before"
    )]
    Unsorted {
        /// Index of the entry.
        index: usize,
        /// Its address.
        at: u64,
    },
    /// It describes something else.
    #[error(
        "the unwind table is for {from:#x} to {to:#x}, which is not the code that it should be for"
    )]
    Elsewhere {
        /// Its first address.
        from: u64,
        /// Its last one.
        to: u64,
    },
    /// A function's entry does not read as one: the numbers mean something else in this kernel.
    #[error(
        "the unwind table does not describe the entry of the function at {at} as one: its numbers are not understood"
    )]
    Meaning {
        /// The function's fentry site.
        at: LinkAddr,
    },
}

/// One table.
#[derive(Clone)]
pub struct OrcTable {
    format: OrcFormat,
    ips: Bytes,
    entries: Bytes,
    /// Where the arrays are in those bytes.
    ips_in: Range<usize>,
    entries_in: Range<usize>,
    /// Address of the first slot, in the space that addresses are looked up in.
    at: u64,
    /// The table's first address, and for each block of code from it on how many entries are for code before the block: halving
    /// within one block touches little memory, halving the whole table touches much.
    blocks: (u64, Vec<u32>),
}

impl OrcTable {
    /// The table of an image, in link addresses. Costs one pass over the addresses, and no memory. `entered` finds the first so many places
    /// in some code where a function has just been entered.
    pub(crate) fn of_image(
        bytes: &Bytes,
        sections: &[Section],
        types: &Types,
        entered: impl FnOnce(&Range<LinkAddr>, usize) -> Vec<LinkAddr>,
    ) -> Result<Self, OrcError> {
        let find = |name| {
            let section = sections.iter().find(|section| section.name == name);
            section.ok_or(OrcError::Absent { section: name })
        };
        let (ips, entries) = (find(".orc_unwind_ip")?, find(".orc_unwind")?);
        let mut table = Self {
            format: OrcFormat::of(types)?,
            ips: bytes.clone(),
            entries: bytes.clone(),
            ips_in: ips.file.clone(),
            entries_in: entries.file.clone(),
            at: ips.range.start.0,
            blocks: (0, Vec::new()),
        };
        let code = || sections.iter().filter(|section| section.executable);
        let start = code().map(|section| section.range.start).min();
        let end = code().map(|section| section.range.end).max();
        let code = start.unwrap_or(LinkAddr(0))..end.unwrap_or(LinkAddr(0));
        table.validate(&(code.start.0..code.end.0))?;
        table.prove(entered(&code, PROOFS), code.start)?;
        Ok(table)
    }

    /// A table of the image in memory of its own: the bytes of its addresses, whose first slot is at `at`, and of its entries, for `code`.
    pub(crate) fn recovered(
        at: LinkAddr,
        ips: Vec<u8>,
        entries: Vec<u8>,
        types: &Types,
        code: &Range<LinkAddr>,
        entered: impl FnOnce(&Range<LinkAddr>, usize) -> Vec<LinkAddr>,
    ) -> Result<Self, OrcError> {
        let mut table = Self {
            format: OrcFormat::of(types)?,
            ips_in: 0..ips.len(),
            entries_in: 0..entries.len(),
            ips: Arc::new(ips),
            entries: Arc::new(entries),
            at: at.0,
            blocks: (0, Vec::new()),
        };
        table.validate(&(code.start.0..code.end.0))?;
        table.prove(entered(code, PROOFS), code.start)?;
        Ok(table)
    }

    /// A table in memory of its own: the bytes of its addresses, whose first slot is at `at`, and of its entries, for
    /// `code` and entries laid out as in `like`. Addresses are those that it will be looked up by.
    ///
    /// # Errors
    /// When it is not sorted, or not for that code.
    pub fn like(
        like: &Self,
        at: u64,
        ips: Vec<u8>,
        entries: Vec<u8>,
        code: &Range<u64>,
    ) -> Result<Self, OrcError> {
        let mut table = Self {
            format: like.format,
            ips_in: 0..ips.len(),
            entries_in: 0..entries.len(),
            ips: Arc::new(ips),
            entries: Arc::new(entries),
            at,
            blocks: (0, Vec::new()),
        };
        table.validate(code)?;
        Ok(table)
    }

    /// How many entries it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ips_in.len() / SLOT
    }

    /// Whether it has none (it always has some).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ips_in.is_empty()
    }

    /// Checks the table, and makes its index of blocks.
    fn validate(&mut self, code: &Range<u64>) -> Result<(), OrcError> {
        let (ips, entries) = (self.ips_in.len(), self.entries_in.len());
        let whole = (*self.ips).as_ref().get(self.ips_in.clone()).is_some()
            && (*self.entries)
                .as_ref()
                .get(self.entries_in.clone())
                .is_some();
        let count = ips / SLOT;
        if !whole
            || count == 0
            || ips % SLOT != 0
            || count.checked_mul(self.format.size) != Some(entries)
        {
            return Err(OrcError::Shape { ips, entries });
        }
        let first = self.address(0);
        let elsewhere = |to| OrcError::Elsewhere { from: first, to };
        if first < code.start {
            return Err(elsewhere(self.address(count - 1)));
        }
        let mut last = first;
        let mut blocks = vec![0];
        for index in 1..count {
            let at = self.address(index);
            if at < last {
                return Err(OrcError::Unsorted { index, at });
            }
            if at - first > REACH {
                return Err(elsewhere(at));
            }
            // Of code that the table is not for there may be any number of blocks.
            while at - first >= blocks.len() as u64 * BLOCK && at <= code.end {
                blocks.push(u32::try_from(index).unwrap_or(u32::MAX));
            }
            last = at;
        }
        // A table may end with an entry for the first byte behind its code.
        if last > code.end {
            return Err(elsewhere(last));
        }
        self.blocks = (first, blocks);
        Ok(())
    }

    /// Proves the meaning of the numbers at places where a traced function has just been entered.
    fn prove(&self, entered: Vec<LinkAddr>, code: LinkAddr) -> Result<(), OrcError> {
        // Of some functions, whose assembly could not be followed when the table was made, it says nothing.
        let mut proved = false;
        for at in entered {
            match self.lookup(at.0) {
                Some(Orc::Undefined) => {}
                Some(Orc::ENTERED) => proved = true,
                _ => return Err(OrcError::Meaning { at }),
            }
        }
        if proved {
            Ok(())
        } else {
            Err(OrcError::Meaning { at: code })
        }
    }

    /// The bytes of its addresses and of its entries, as the kernel has them.
    #[must_use]
    pub fn arrays(&self) -> (&[u8], &[u8]) {
        let ips = (*self.ips).as_ref().get(self.ips_in.clone());
        let entries = (*self.entries).as_ref().get(self.entries_in.clone());
        (ips.unwrap_or_default(), entries.unwrap_or_default())
    }

    /// Where its first slot is: each address is a distance from its own.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at
    }

    fn address(&self, index: usize) -> u64 {
        let at = self.ips_in.start + index * SLOT;
        let distance = le_i32((*self.ips).as_ref(), at).unwrap_or(0);
        let slot = self.at.wrapping_add((index * SLOT) as u64);
        slot.wrapping_add_signed(distance.into())
    }

    /// What the table says of `address`; `None` below its first one. Of several entries for one address the last counts.
    pub(crate) fn lookup(&self, address: u64) -> Option<Orc> {
        let entry = self.entry(address)?;
        let mut bytes = [0; 8];
        bytes.get_mut(..entry.len())?.copy_from_slice(entry);
        Some(self.decode(bytes))
    }

    /// The first address that what it says of `address` is for.
    pub(crate) fn start(&self, address: u64) -> Option<u64> {
        Some(self.address(self.index(address)?))
    }

    /// The entry for `address` as the kernel has it; `None` below the first one.
    #[must_use]
    pub fn entry(&self, address: u64) -> Option<&[u8]> {
        let at = self.entries_in.start + self.index(address)? * self.format.size;
        (*self.entries).as_ref().get(at..at + self.format.size)
    }

    /// An entry for code that has pushed so many bytes since it was entered; `None` if the table has no word for it.
    pub(crate) fn entered(&self, pushed: i16) -> Option<Vec<u8>> {
        let rule = Orc::ENTERED.lower(pushed);
        let Orc::Caller { offset, .. } = rule else {
            return None;
        };
        let word = |entry: &[u8]| {
            let mut bytes = [0; 8];
            bytes
                .iter_mut()
                .zip(entry)
                .for_each(|(byte, of)| *byte = *of);
            bytes
        };
        let entries = self.arrays().1.chunks_exact(self.entry_size());
        let mut like = entries
            .map(word)
            .filter(|entry| self.decode(*entry) == Orc::ENTERED);
        let like = u64::from_le_bytes(like.next()?);
        let entry = self.format.with_offset(like, offset).to_le_bytes();
        let says = self.decode(entry) == rule;
        says.then(|| entry.into_iter().take(self.format.size).collect())
    }

    /// An entry that says nothing: zeros do so in every form.
    pub(crate) fn silence(&self) -> Vec<u8> {
        vec![0; self.format.size]
    }

    /// Which entry is for `address`.
    fn index(&self, address: u64) -> Option<usize> {
        let (first, blocks) = &self.blocks;
        let block = usize::try_from(address.checked_sub(*first)? / BLOCK).unwrap_or(usize::MAX);
        let within = |block: usize| blocks.get(block).map(|index| *index as usize);
        let last = blocks.last().map_or(0, |index| *index as usize);
        let mut low = within(block).unwrap_or(last);
        let mut high = block.checked_add(1).and_then(within).unwrap_or(self.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.address(middle) <= address {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low.checked_sub(1)
    }

    /// Bytes of an entry, at most eight.
    pub(crate) fn entry_size(&self) -> usize {
        self.format.size
    }

    /// What an entry says, with zeros behind it.
    pub(crate) fn decode(&self, entry: [u8; 8]) -> Orc {
        self.format.decode(u64::from_le_bytes(entry))
    }
}

impl fmt::Debug for OrcTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OrcTable")
            .field("at", &self.at)
            .field("entries", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
