//! Alternatives: code that the kernel replaces as its processor demands, and what decides it.
//!
//! An entry of their table says where code is, what may take its place, and which feature the processor must have for that, or must
//! not have. Entries have a field for flags, or one flag in the highest bit of the feature's number: types tell.
//! Follows the kernel's `apply_alternatives()` (`arch/x86/kernel/alternative.c`) and `boot_cpu_has()` (`arch/x86/include/asm/cpufeature.h`).

use super::bytes::{le_u16, le_u32};
use super::locate::{Kernel, KernelError};
use super::types::{TypeError, Types};
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// More bytes of features than any kernel keeps.
const MAX_FEATURES: u64 = 4096;
/// In the number of a feature: it must be absent (`ALTINSTR_FLAG_INV`). Where there are flags: `ALT_FLAG_*`.
const ABSENT_IN_NUMBER: u16 = 1 << 15;
const ABSENT: u16 = 1;
const DIRECT_CALL: u16 = 2;

/// What a kernel's alternatives are chosen by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternatives {
    /// Where an entry of the table has what.
    pub layout: AlternativeLayout,
    /// What the processor can do.
    pub features: Features,
}

impl Alternatives {
    /// Those of `kernel`, which runs in `guest` and has booted.
    ///
    /// # Errors
    /// When the kernel lacks a symbol or type of them, or its memory cannot be read.
    pub fn read<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Self, KernelError> {
        Ok(Self {
            layout: AlternativeLayout::of(kernel.image().types())?,
            features: Features::read(kernel, guest)?,
        })
    }
}

/// The features of the processor that the kernel booted on, as the kernel counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features(Vec<u8>);

impl Features {
    /// From the words of `boot_cpu_data.x86_capability`, of 32 features each.
    #[must_use]
    pub fn new(words: Vec<u8>) -> Self {
        Self(words)
    }

    /// Reads them from `guest`.
    ///
    /// # Errors
    /// When the kernel lacks the symbol or the type, or its memory cannot be read.
    pub(crate) fn read<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        guest: &R,
    ) -> Result<Self, KernelError> {
        let types = kernel.image().types();
        let field = types.member("cpuinfo_x86", "x86_capability")?;
        let at = kernel.symbol("boot_cpu_data")?;
        let mut words = vec![0; usize::try_from(field.size.min(MAX_FEATURES)).unwrap_or(0)];
        kernel.read(guest, Gva(at.0.wrapping_add(field.offset)), &mut words)?;
        Ok(Self(words))
    }

    /// Whether the processor has feature `number`; `None` for one that the kernel does not keep.
    #[must_use]
    pub fn has(&self, number: u16) -> Option<bool> {
        let word = le_u32(&self.0, usize::from(number / 32) * 4)?;
        Some(word >> (number % 32) & 1 != 0)
    }
}

/// Where an entry of the table (`struct alt_instr`) has what: offsets and its size, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlternativeLayout {
    /// Bytes of an entry.
    pub size: usize,
    /// Distance to the code, from this field itself.
    pub place: usize,
    /// Distance to what may take its place, from this field itself.
    pub replacement: usize,
    feature: usize,
    flags: Option<usize>,
    len: usize,
    replacement_len: usize,
}

/// What an entry says, apart from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alternative {
    /// The feature's number.
    pub feature: u16,
    /// It must be absent.
    pub absent: bool,
    /// What takes the place is no code: the indirect call there becomes a direct one.
    pub direct_call: bool,
    /// Bytes of the code.
    pub len: usize,
    /// Bytes of what may take its place.
    pub replacement_len: usize,
}

impl AlternativeLayout {
    /// That of the kernel whose types these are.
    ///
    /// # Errors
    /// When they lack it.
    pub fn of(types: &Types) -> Result<Self, TypeError> {
        let of = |path| {
            let at = types.offset_of("alt_instr", path)?;
            Ok::<_, TypeError>(usize::try_from(at).unwrap_or(usize::MAX))
        };
        let size = types.size_of("alt_instr")?.max(1);
        Ok(Self {
            size: usize::try_from(size).unwrap_or(usize::MAX),
            place: of("instr_offset")?,
            replacement: of("repl_offset")?,
            feature: of("cpuid")?,
            flags: of("flags").ok(),
            len: of("instrlen")?,
            replacement_len: of("replacementlen")?,
        })
    }

    /// What `entry` says; `None` when it is cut off, or has a flag that is not known here.
    #[must_use]
    pub fn decode(&self, entry: &[u8]) -> Option<Alternative> {
        let number = le_u16(entry, self.feature)?;
        let (feature, flags) = match self.flags {
            Some(flags) => (number, le_u16(entry, flags)?),
            None if number & ABSENT_IN_NUMBER != 0 => (number & !ABSENT_IN_NUMBER, ABSENT),
            None => (number, 0),
        };
        (flags & !(ABSENT | DIRECT_CALL) == 0).then_some(Alternative {
            feature,
            absent: flags & ABSENT != 0,
            direct_call: flags & DIRECT_CALL != 0,
            len: usize::from(*entry.get(self.len)?),
            replacement_len: usize::from(*entry.get(self.replacement_len)?),
        })
    }
}

impl Alternative {
    /// Whether a processor with `features` calls for it; `None` when the feature is not one of them.
    #[must_use]
    pub fn is_wanted(&self, features: &Features) -> Option<bool> {
        Some(features.has(self.feature)? != self.absent)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Alternative, AlternativeLayout, Features};

    /// The layout whose entries have 14 bytes with flags, or 12 without.
    pub(crate) fn layout(flags: bool) -> AlternativeLayout {
        let behind = if flags { 12 } else { 10 };
        AlternativeLayout {
            size: behind + 2,
            place: 0,
            replacement: 4,
            feature: 8,
            flags: flags.then_some(10),
            len: behind,
            replacement_len: behind + 1,
        }
    }

    #[test]
    fn entries_of_both_layouts_are_understood() {
        let check = |flags: bool, tail: &[u8], want: Option<(u16, bool, bool)>| {
            let entry = [&[0; 8][..], tail].concat();
            let got = layout(flags).decode(&entry);
            let want = want.map(|(feature, absent, direct_call)| Alternative {
                feature,
                absent,
                direct_call,
                len: 6,
                replacement_len: 5,
            });
            assert_eq!(got, want, "{tail:02x?}");
        };
        check(false, &[0x34, 0x02, 6, 5], Some((0x234, false, false)));
        check(false, &[0x34, 0x82, 6, 5], Some((0x234, true, false)));
        check(true, &[0x34, 0x02, 0, 0, 6, 5], Some((0x234, false, false)));
        check(true, &[0x34, 0x02, 1, 0, 6, 5], Some((0x234, true, false)));
        check(true, &[0x34, 0x02, 2, 0, 6, 5], Some((0x234, false, true)));
        check(true, &[0x34, 0x02, 4, 0, 6, 5], None);
        check(true, &[0x34, 0x02, 0, 0, 6], None);
    }

    #[test]
    fn features_are_those_of_the_processor() {
        let features = Features::new(vec![0, 0, 0, 0, 2, 0, 0, 0x80]);
        let check = |number: u16, want: Option<bool>| assert_eq!(features.has(number), want);
        check(31, Some(false));
        check(33, Some(true));
        check(63, Some(true));
        check(64, None);
        check(u16::MAX, None);
        let wanted = |feature, absent| {
            let alternative = Alternative {
                feature,
                absent,
                direct_call: false,
                len: 0,
                replacement_len: 0,
            };
            alternative.is_wanted(&features)
        };
        assert_eq!(wanted(33, false), Some(true));
        assert_eq!(wanted(33, true), Some(false));
        assert_eq!(wanted(32, true), Some(true));
        assert_eq!(wanted(64, true), None);
    }
}
