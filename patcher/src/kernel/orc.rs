//! How the caller of a piece of kernel code is found on the stack: ORC tables, looked up in place.
//!
//! A table is two arrays: where each stretch of code begins (signed 32-bit distances, each from its own slot), and how to unwind there.
//! The layout of the second comes from BTF (`orc_entry`), and what its numbers mean is proved on the table itself: at the entry of a traced
//! function the return address is the word that the stack pointer points at. Holding an [`OrcTable`] proves that it is sorted and
//! describes the code that it is said to describe, and no other.
//! Sources: kernel `arch/x86/include/asm/orc_types.h`, `arch/x86/kernel/unwind_orc.c`, `scripts/sorttable.h`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::bytes::le_i32;
use super::image::{Bytes, Section};
use super::types::{Member, TypeError, Types};
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

/// The register that the caller's stack pointer is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    Sp,
    Bp,
    /// What the stack pointer points at; the offset is added after.
    AtSp,
    /// What lies at an offset from the frame pointer.
    AtBp,
    R10,
    R13,
    Di,
    Dx,
}

/// Where the caller's frame pointer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FramePointer {
    /// Still in its register.
    Kept,
    /// At this distance from the caller's stack pointer.
    FromCallerSp(i16),
    /// At this distance from what the register points at.
    FromBp(i16),
}

/// What lies at the place that [`Base`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// A return address, just below it.
    Call,
    /// All registers of what was interrupted, from it up.
    Registers,
    /// The part of them that the processor pushes.
    ProcessorFrame,
}

/// How to find the caller at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orc {
    /// Nobody says; or what is said is not understood.
    Undefined,
    /// There is no caller.
    End,
    /// By these rules.
    Caller {
        base: Base,
        offset: i16,
        bp: FramePointer,
        content: Content,
        /// The address found is where code was interrupted, or begins: no call lies before it.
        signal: bool,
    },
}

impl Orc {
    /// At the entry of a function: the return address is the word that the stack pointer points at.
    pub(crate) const ENTERED: Self = Self::Caller {
        base: Base::Sp,
        offset: 8,
        bp: FramePointer::Kept,
        content: Content::Call,
        signal: false,
    };

    /// What holds where `pushed` more bytes are on the stack.
    pub(crate) fn lower(self, pushed: i16) -> Self {
        let Self::Caller {
            base,
            offset,
            bp,
            content,
            signal,
        } = self
        else {
            return self;
        };
        let offset = match base {
            Base::Sp => offset.checked_add(pushed),
            Base::AtSp if pushed != 0 => None,
            _ => Some(offset),
        };
        offset.map_or(Self::Undefined, |offset| Self::Caller {
            base,
            offset,
            bp,
            content,
            signal,
        })
    }
}

/// A field of an entry: its first bit, and how many bits it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Field {
    first: u32,
    bits: u32,
}

impl Field {
    fn of(field: &'static str, member: Member) -> Result<Self, OrcError> {
        let (start, bits) = match member.bits {
            Some((first, bits)) => (u64::from(first), u64::from(bits)),
            None => (0, member.size.saturating_mul(8)),
        };
        let first = member.offset.saturating_mul(8).saturating_add(start);
        let whole = first.saturating_add(bits) <= 64 && (1..=16).contains(&bits);
        match (u32::try_from(first), u32::try_from(bits)) {
            (Ok(first), Ok(bits)) if whole => Ok(Self { first, bits }),
            _ => Err(OrcError::Field { field }),
        }
    }

    fn get(self, entry: u64) -> u16 {
        let bits = entry >> self.first & ((1 << self.bits) - 1);
        u16::try_from(bits).unwrap_or(u16::MAX)
    }
}

/// The layout of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OrcFormat {
    size: usize,
    sp_offset: Field,
    bp_offset: Field,
    sp_reg: Field,
    bp_reg: Field,
    kind: Field,
    signal: Option<Field>,
    /// A bit for the end of the stack; where there is none, it is a kind.
    end: Option<Field>,
}

impl OrcFormat {
    pub(crate) fn of(types: &Types) -> Result<Self, OrcError> {
        const ENTRY: &str = "orc_entry";
        let field = |name| Field::of(name, types.member(ENTRY, name)?);
        let maybe = |name| match types.member(ENTRY, name) {
            Ok(member) => Field::of(name, member).map(Some),
            Err(TypeError::NoMember { .. }) => Ok(None),
            Err(other) => Err(other.into()),
        };
        let size = usize::try_from(types.size_of(ENTRY)?).unwrap_or(usize::MAX);
        if !(1..=8).contains(&size) {
            return Err(OrcError::Field { field: ENTRY });
        }
        Ok(Self {
            size,
            sp_offset: field("sp_offset")?,
            bp_offset: field("bp_offset")?,
            sp_reg: field("sp_reg")?,
            bp_reg: field("bp_reg")?,
            kind: field("type")?,
            signal: maybe("signal")?,
            end: maybe("end")?,
        })
    }

    fn decode(&self, entry: u64) -> Orc {
        let kind = self.kind.get(entry);
        let no_base = self.sp_reg.get(entry) == 0;
        let content = match self.end {
            Some(end) if no_base => {
                return if end.get(entry) == 0 {
                    Orc::Undefined
                } else {
                    Orc::End
                };
            }
            // With the bit, the kinds are counted from the call on; without it, from the undefined one on.
            Some(_) => kind,
            None if kind == 1 => return Orc::End,
            None => kind.wrapping_sub(2),
        };
        let content = match content {
            0 => Content::Call,
            1 => Content::Registers,
            2 => Content::ProcessorFrame,
            _ => return Orc::Undefined,
        };
        let base = match self.sp_reg.get(entry) {
            2 => Base::Dx,
            3 => Base::Di,
            4 => Base::Bp,
            5 => Base::Sp,
            6 => Base::R10,
            7 => Base::R13,
            8 => Base::AtBp,
            9 => Base::AtSp,
            _ => return Orc::Undefined,
        };
        let bp_offset = self.bp_offset.get(entry).cast_signed();
        let bp = match self.bp_reg.get(entry) {
            0 => FramePointer::Kept,
            1 => FramePointer::FromCallerSp(bp_offset),
            4 => FramePointer::FromBp(bp_offset),
            _ => return Orc::Undefined,
        };
        let interrupted = content != Content::Call;
        let signal = self.signal.is_some_and(|signal| signal.get(entry) != 0);
        Orc::Caller {
            base,
            offset: self.sp_offset.get(entry).cast_signed(),
            bp,
            content,
            signal: signal || interrupted,
        }
    }
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
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{Base, Content, FramePointer, Orc, OrcError, OrcTable};
    use crate::kernel::image::Image;
    use crate::kernel::testing::orc::{ENTRIES, FUNCTIONS, IPS, Rule, entry, function, rules};
    use crate::kernel::testing::{FORMS, Form, Part, TEXT, elf, parts};

    /// The image of `form` with its sections changed by `change`.
    fn image(form: Form, change: impl Fn(&mut Part)) -> Image {
        let mut parts = parts(form);
        parts.iter_mut().for_each(change);
        parts.retain(|part| !part.bytes.is_empty());
        Image::parse(Arc::new(elf(&parts, &[&[], &[], &[]]))).unwrap()
    }

    fn call(base: Base, offset: i16, bp: FramePointer) -> Orc {
        Orc::Caller {
            base,
            offset,
            bp,
            content: Content::Call,
            signal: false,
        }
    }

    #[test]
    fn both_forms_of_entries_are_understood() {
        let at = |number: u64| FUNCTIONS + number * 16;
        let saved = FramePointer::FromCallerSp(-16);
        let other = |content| Orc::Caller {
            base: Base::Sp,
            offset: 0,
            bp: FramePointer::Kept,
            content,
            signal: true,
        };
        let kept = FramePointer::Kept;
        for form in FORMS {
            let image = image(form, |_| {});
            let table = image.orc().unwrap();
            for (offset, want) in [
                (0, Orc::Undefined),
                (0x7f, Orc::Undefined),
                (0x80, Orc::End),
                (0xff, Orc::End),
                (0x100, other(Content::ProcessorFrame)),
                (0x110, other(Content::Registers)),
                (0x305, call(Base::Sp, 8, kept)),
                (0x306, call(Base::Sp, 16, saved)),
                (0x600, Orc::Undefined),
                (at(function::FRAME_POINTER), call(Base::Bp, 16, saved)),
                (at(function::OVER_ANOTHER_STACK), call(Base::AtSp, 8, kept)),
                (at(function::REALIGNED), call(Base::AtBp, -8, kept)),
                (at(function::BY_R10), call(Base::R10, 0, kept)),
                (at(function::BY_R13), call(Base::R13, 0, kept)),
                (
                    at(function::BP_FROM_BP),
                    call(Base::Sp, 24, FramePointer::FromBp(0)),
                ),
                (at(function::UNKNOWN), Orc::Undefined),
                (at(function::OTHERS), call(Base::Sp, 8, kept)),
                (0x3fff, Orc::Undefined),
            ] {
                assert_eq!(
                    table.lookup(TEXT + offset),
                    Some(want),
                    "{form:?} {offset:#x}"
                );
            }
            assert_eq!(table.lookup(TEXT - 1), None);
            for offset in 0..0x4000 {
                let rules = rules().filter(|(at, _)| *at <= offset);
                let (_, rule) = rules.last().unwrap();
                let mut bytes = [0; 8];
                bytes[..6].copy_from_slice(&entry(form, rule));
                let got = table.lookup(TEXT + offset);
                assert_eq!(got, Some(table.decode(bytes)), "{form:?} {offset:#x}");
            }
        }
    }

    #[test]
    fn tables_that_are_not_sound_are_refused() {
        type Change = fn(&mut Vec<u8>);
        let shape = |ips, entries| OrcError::Shape { ips, entries };
        let cases: [(u64, Change, OrcError); 6] = [
            (IPS, |bytes| bytes.truncate(4 * 10), shape(40, 6 * 36)),
            (
                ENTRIES,
                |bytes| bytes.truncate(6 * 30 + 1),
                shape(4 * 36, 181),
            ),
            (
                IPS,
                Vec::clear,
                OrcError::Absent {
                    section: ".orc_unwind_ip",
                },
            ),
            // The fourth address drops below the third.
            (
                IPS,
                |bytes| bytes[12..16].copy_from_slice(&(-0x38_2000_i32).to_le_bytes()),
                OrcError::Unsorted {
                    index: 3,
                    at: TEXT + 12,
                },
            ),
            (
                IPS,
                |bytes| bytes[3] = 0x80,
                OrcError::Elsewhere { from: 0, to: 0 },
            ),
            // The entry of a traced function is said to have a frame already.
            (
                ENTRIES,
                |bytes| bytes[6 * 9] = 16,
                OrcError::Meaning {
                    at: crate::addr::LinkAddr(TEXT + 0x300),
                },
            ),
        ];
        for (section, change, want) in cases {
            let image = image(Form::Old, |part| {
                if part.at == section {
                    change(&mut part.bytes);
                }
            });
            let got = image.orc().unwrap_err().clone();
            let same = match (&got, &want) {
                (OrcError::Elsewhere { .. }, OrcError::Elsewhere { .. }) => true,
                _ => got == want,
            };
            assert!(same, "{got:?} instead of {want:?}");
        }
    }

    #[test]
    fn other_tables_are_read_like_the_images() {
        let image = image(Form::New, |_| {});
        let like = image.orc().unwrap();
        let entries: Vec<u8> = [Rule::End, Rule::Call((5, 24), (0, 0))]
            .into_iter()
            .flat_map(|rule| entry(Form::New, rule))
            .collect();
        let table = |at: u64, ips: [i32; 2]| {
            let ips = ips.iter().flat_map(|ip| ip.to_le_bytes()).collect();
            OrcTable::like(like, at, ips, entries.clone(), &(0x1_0000..0x2_0000))
        };
        let found = table(0x3_0000, [-0x2_0000, -0x1_fff4]).unwrap();
        assert_eq!(found.lookup(0x1_0007), Some(Orc::End));
        assert_eq!(found.entry(0x1_0007), Some(&entries[..6]));
        for form in FORMS {
            let image = super::tests::image(form, |_| {});
            let table = image.orc().unwrap();
            assert_eq!(table.silence().len(), table.entry_size());
            assert_eq!(table.decode([0; 8]), Orc::Undefined);
        }
        // A rule goes on over the edge of a block of the index.
        let over = table(0x3_0000, [-0x2_0000, -0x1_f000]).unwrap();
        assert_eq!(over.lookup(0x1_1003), Some(Orc::End));
        assert_ne!(over.lookup(0x1_1004), Some(Orc::End));
        assert_eq!(
            found.lookup(0x1_0010),
            Some(call(Base::Sp, 24, FramePointer::Kept))
        );
        assert!(matches!(
            table(0x3_0000, [-0x2_0000, -0x2_1000]),
            Err(OrcError::Unsorted { .. })
        ));
        assert!(matches!(
            table(0x4_0000, [-0x2_0000, -0x1_f000]),
            Err(OrcError::Elsewhere { .. })
        ));
        // The first address lies behind the end of the address space, the second before it.
        let ips = [1 << 12, -1 << 12]
            .iter()
            .flat_map(|ip: &i32| ip.to_le_bytes());
        let around = OrcTable::like(
            like,
            0_u64.wrapping_sub(8),
            ips.collect(),
            entries.clone(),
            &(0..u64::MAX),
        );
        assert!(matches!(around, Err(OrcError::Elsewhere { .. })));
    }

    proptest! {
        #[test]
        fn damage_never_panics(
            changes in proptest::collection::vec((any::<bool>(), any::<usize>(), any::<u8>()), 1..8),
            cut: Option<(bool, usize)>,
            at: u16,
        ) {
            let image = image(Form::New, |part| {
                for (ips, index, value) in &changes {
                    if part.at == (if *ips { IPS } else { ENTRIES }) {
                        let len = part.bytes.len();
                        part.bytes[index % len] = *value;
                    }
                }
                if let Some((ips, len)) = cut && part.at == (if ips { IPS } else { ENTRIES }) {
                    part.bytes.truncate(1 + len % part.bytes.len());
                }
            });
            if let Ok(table) = image.orc() {
                let _ = table.lookup(TEXT + u64::from(at));
            }
        }
    }
}
