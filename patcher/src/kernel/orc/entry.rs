//! What an entry of an unwind table says, and how its layout is found.
//!
//! The layout comes from BTF (`orc_entry`); what the numbers in it mean is in the kernel's `arch/x86/include/asm/orc_types.h`.

use super::OrcError;
use crate::kernel::types::{Member, TypeError, Types};

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

    /// `entry` with `value` there, as many bits of it as the field has.
    fn put(self, entry: u64, value: u16) -> u64 {
        let bits = ((1 << self.bits) - 1) << self.first;
        entry & !bits | u64::from(value) << self.first & bits
    }
}

/// The layout of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OrcFormat {
    pub(super) size: usize,
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
    pub(super) fn of(types: &Types) -> Result<Self, OrcError> {
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

    /// `entry` with another offset from the register that the caller's stack pointer is found by.
    pub(super) fn with_offset(&self, entry: u64, offset: i16) -> u64 {
        self.sp_offset.put(entry, offset.cast_unsigned())
    }

    pub(super) fn decode(&self, entry: u64) -> Orc {
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
