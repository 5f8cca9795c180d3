//! The encoding of BTF, the kernel's compact type information (kernel `Documentation/bpf/btf.rst`).
//!
//! One pass checks every type's extent and notes where it begins; types themselves are decoded only when asked for.

use std::ops::Range;

use super::bytes::{le_u16, le_u32};

/// `BTF_MAGIC`, little-endian.
const MAGIC: u16 = 0xeb9f;
/// `BTF_MAX_TYPE`.
const MAX_TYPES: usize = 0x000f_ffff;
/// Bytes of a name, with its zero (`KSYM_NAME_LEN`): the kernel takes no longer one. Many types may share one name.
const MAX_NAME: usize = 512;

/// Numbers of kinds (`BTF_KIND_*`).
pub(crate) mod code {
    pub(crate) const STRUCT: u8 = 4;
    pub(crate) const UNION: u8 = 5;
    pub(crate) const VOLATILE: u8 = 9;
    pub(crate) const CONST: u8 = 10;
    pub(crate) const RESTRICT: u8 = 11;
    pub(crate) const FUNCTION: u8 = 12;
    pub(crate) const PROTOTYPE: u8 = 13;
}

/// The kinds of types that matter here (`BTF_KIND_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Int,
    Ptr,
    Array,
    Struct,
    Union,
    Enum,
    Enum64,
    Fwd,
    /// A type that is called or qualified otherwise, but is laid out as the type it refers to.
    Alias,
    /// `BTF_KIND_TYPEDEF`: an alias with a name of its own.
    Typedef,
    Float,
    Other,
}

/// `struct btf_type`, decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawType {
    /// Its number.
    pub(crate) id: u32,
    pub(crate) name: u32,
    pub(crate) kind: Kind,
    /// The kind's number, for those that [`Kind`] does not tell apart.
    pub(crate) code: u8,
    /// Members or enumerators.
    pub(crate) vlen: usize,
    /// Bitfield sizes are packed into member offsets, or enumerators are signed.
    pub(crate) flag: bool,
    /// Bytes, or the type referred to.
    pub(crate) size_or_type: u32,
    /// Where what follows the common part begins, in the type section.
    pub(crate) extra: usize,
}

/// One member of a structure or union.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMember {
    pub(crate) name: u32,
    pub(crate) kind: u32,
    pub(crate) bit_offset: u32,
    /// Zero when it is no bit field.
    pub(crate) bits: u32,
}

/// Where the parts of a BTF section are, and where each type begins.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) types: Range<usize>,
    pub(crate) strings: Range<usize>,
    /// Offset of type `id` at index `id - 1`, in the type section.
    pub(crate) starts: Vec<u32>,
}

/// What is wrong with a BTF section: a description and where, in bytes from its start.
pub(crate) type Damage = (&'static str, usize);

impl Layout {
    /// Reads the header of `btf` and visits each type once; `each` gets its id (from 1) and itself.
    pub(crate) fn parse(btf: &[u8], mut each: impl FnMut(u32, &RawType)) -> Result<Self, Damage> {
        if le_u16(btf, 0) != Some(MAGIC) {
            return Err(("no BTF magic number", 0));
        }
        let field = |at: usize| {
            le_u32(btf, at)
                .map(|value| value as usize)
                .ok_or(("a truncated header", at))
        };
        let header = field(4)?;
        let part = |offset: usize, len: usize| {
            let start = header.checked_add(offset)?;
            let range = start..start.checked_add(len)?;
            btf.get(range.clone()).map(|_| range)
        };
        let types = part(field(8)?, field(12)?).ok_or(("types beyond its end", 8))?;
        let strings = part(field(16)?, field(20)?).ok_or(("strings beyond its end", 16))?;
        let mut starts = Vec::with_capacity(types.len() / 32);
        let section = &btf[types.clone()];
        let mut at = 0;
        while at < section.len() {
            let (raw, next) = decode(section, at)
                .ok_or(("a type of unknown kind or length", types.start + at))?;
            starts.push(u32::try_from(at).map_err(|_| ("too many types", at))?);
            if starts.len() > MAX_TYPES || next > section.len() {
                return Err(("a type that runs over the end", types.start + at));
            }
            each(u32::try_from(starts.len()).unwrap_or(u32::MAX), &raw);
            at = next;
        }
        starts.shrink_to_fit();
        Ok(Self {
            types,
            strings,
            starts,
        })
    }

    /// Type `id` of `btf`; 0 is `void`, which is nothing.
    pub(crate) fn get(&self, btf: &[u8], id: u32) -> Option<RawType> {
        let index = usize::try_from(id.checked_sub(1)?).ok()?;
        let start = *self.starts.get(index)? as usize;
        decode(btf.get(self.types.clone())?, start).map(|(raw, _)| RawType { id, ..raw })
    }

    /// The string at `offset` of the string section, without its zero; one that is too long for a name is none.
    pub(crate) fn string<'a>(&self, btf: &'a [u8], offset: u32) -> &'a [u8] {
        let strings = btf.get(self.strings.clone()).unwrap_or_default();
        let tail = strings.get(offset as usize..).unwrap_or_default();
        let tail = &tail[..tail.len().min(MAX_NAME)];
        let end = tail.iter().position(|byte| *byte == 0).unwrap_or(0);
        &tail[..end]
    }

    /// Member `index` of a structure or union.
    pub(crate) fn member(&self, btf: &[u8], of: &RawType, index: usize) -> Option<RawMember> {
        let section = btf.get(self.types.clone())?;
        let at = of.extra + index * 12;
        let offset = le_u32(section, at + 8)?;
        let (bit_offset, bits) = if of.flag {
            (offset & 0x00ff_ffff, offset >> 24)
        } else {
            (offset, 0)
        };
        Some(RawMember {
            name: le_u32(section, at)?,
            kind: le_u32(section, at + 4)?,
            bit_offset,
            bits,
        })
    }

    /// Name and type of parameter `index` of a function's prototype; the last is nothing where any may follow.
    pub(crate) fn parameter(&self, btf: &[u8], of: &RawType, index: usize) -> Option<(u32, u32)> {
        let section = btf.get(self.types.clone())?;
        let at = of.extra + index * 8;
        Some((le_u32(section, at)?, le_u32(section, at + 4)?))
    }

    /// Element type and count of an array.
    pub(crate) fn array(&self, btf: &[u8], of: &RawType) -> Option<(u32, u32)> {
        let section = btf.get(self.types.clone())?;
        Some((le_u32(section, of.extra)?, le_u32(section, of.extra + 8)?))
    }

    /// Whether an integer has a sign (`BTF_INT_SIGNED`).
    pub(crate) fn is_signed(&self, btf: &[u8], of: &RawType) -> bool {
        let section = btf.get(self.types.clone()).unwrap_or_default();
        le_u32(section, of.extra).is_some_and(|encoding| encoding >> 24 & 1 != 0)
    }

    /// Name and value of enumerator `index`; the value is sign- or zero-extended as its type says.
    pub(crate) fn enumerator(&self, btf: &[u8], of: &RawType, index: usize) -> Option<(u32, i64)> {
        let section = btf.get(self.types.clone())?;
        let step = if of.kind == Kind::Enum64 { 12 } else { 8 };
        let at = of.extra + index * step;
        let low = le_u32(section, at + 4)?;
        let value = match of.kind {
            Kind::Enum64 => {
                (u64::from(le_u32(section, at + 8)?) << 32 | u64::from(low)).cast_signed()
            }
            _ if of.flag => i64::from(low.cast_signed()),
            _ => i64::from(low),
        };
        Some((le_u32(section, at)?, value))
    }
}

/// The type at `at` of the type section, and where the next one begins.
fn decode(section: &[u8], at: usize) -> Option<(RawType, usize)> {
    let info = le_u32(section, at + 4)?;
    let vlen = (info & 0xffff) as usize;
    let code = u8::try_from(info >> 24 & 0x1f).ok()?;
    let (kind, extra) = match code {
        1 => (Kind::Int, 4),
        2 => (Kind::Ptr, 0),
        3 => (Kind::Array, 12),
        4 => (Kind::Struct, vlen * 12),
        5 => (Kind::Union, vlen * 12),
        6 => (Kind::Enum, vlen * 8),
        7 => (Kind::Fwd, 0),
        8 => (Kind::Typedef, 0),
        // volatile, const, restrict, type tag
        9..=11 | 18 => (Kind::Alias, 0),
        12 => (Kind::Other, 0),
        13 => (Kind::Other, vlen * 8),
        14 | 17 => (Kind::Other, 4),
        15 => (Kind::Other, vlen * 12),
        16 => (Kind::Float, 0),
        19 => (Kind::Enum64, vlen * 12),
        _ => return None,
    };
    let raw = RawType {
        id: 0,
        name: le_u32(section, at)?,
        kind,
        code,
        vlen,
        flag: info >> 31 != 0,
        size_or_type: le_u32(section, at + 8)?,
        extra: at + 12,
    };
    Some((raw, at + 12 + extra))
}
