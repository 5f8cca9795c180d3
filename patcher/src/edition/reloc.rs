//! The relocations that gcc makes for the kernel's code model, with their overflow checks.
//!
//! Names and formulas: System V ABI, AMD64 supplement, table 4.9. The kernel's code model (`-mcmodel=kernel`) keeps all
//! addresses in the top 2 GiB, so what is far from there overflows and is refused.

/// A relocation type that is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `R_X86_64_64`: S + A.
    Abs64,
    /// `R_X86_64_32`: S + A, zero-extended from 32 bits.
    Abs32,
    /// `R_X86_64_32S`: S + A, sign-extended from 32 bits.
    Abs32Signed,
    /// `R_X86_64_PC32` and `R_X86_64_PLT32`: S + A - P.
    Pc32,
    /// `R_X86_64_PC64`: S + A - P.
    Pc64,
}

/// The value does not fit where it has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:#x} does not fit in {name}")]
pub struct Overflow {
    /// What would have to be stored.
    pub value: u64,
    /// The relocation's ELF name.
    pub name: &'static str,
}

/// ELF numbers and names of relocation types; the last that have no [`Kind`] are named in refusals.
const TYPES: &[(u32, &str, Option<Kind>)] = &[
    (1, "R_X86_64_64", Some(Kind::Abs64)),
    (2, "R_X86_64_PC32", Some(Kind::Pc32)),
    (4, "R_X86_64_PLT32", Some(Kind::Pc32)),
    (10, "R_X86_64_32", Some(Kind::Abs32)),
    (11, "R_X86_64_32S", Some(Kind::Abs32Signed)),
    (24, "R_X86_64_PC64", Some(Kind::Pc64)),
    (3, "R_X86_64_GOT32", None),
    (9, "R_X86_64_GOTPCREL", None),
    (12, "R_X86_64_16", None),
    (13, "R_X86_64_PC16", None),
    (14, "R_X86_64_8", None),
    (15, "R_X86_64_PC8", None),
    (19, "R_X86_64_TLSGD", None),
    (22, "R_X86_64_GOTTPOFF", None),
    (23, "R_X86_64_TPOFF32", None),
    (32, "R_X86_64_SIZE32", None),
    (33, "R_X86_64_SIZE64", None),
    (41, "R_X86_64_GOTPCRELX", None),
    (42, "R_X86_64_REX_GOTPCRELX", None),
];

/// The name of ELF relocation type `number`, for messages.
#[must_use]
pub fn type_name(number: u32) -> String {
    TYPES.iter().find(|&&(n, ..)| n == number).map_or_else(
        || format!("relocation type {number}"),
        |&(_, name, _)| name.into(),
    )
}

impl Kind {
    /// The kind of ELF relocation type `number`, or `None` for one that is not applied.
    #[must_use]
    pub fn from_elf(number: u32) -> Option<Self> {
        TYPES
            .iter()
            .find(|&&(n, ..)| n == number)
            .and_then(|&(.., kind)| kind)
    }

    /// How many bytes it fills in.
    #[must_use]
    pub fn width(self) -> usize {
        match self {
            Self::Abs64 | Self::Pc64 => 8,
            Self::Abs32 | Self::Abs32Signed | Self::Pc32 => 4,
        }
    }

    /// The bytes to store at `place` for a symbol at `symbol` with `addend`, little endian, [`Self::width`] of them.
    ///
    /// # Errors
    /// [`Overflow`] when they do not hold the value.
    pub fn bytes(self, symbol: u64, addend: i64, place: u64) -> Result<Vec<u8>, Overflow> {
        let absolute = symbol.wrapping_add_signed(addend);
        let relative = absolute.wrapping_sub(place);
        let signed = |value: u64, name| {
            i32::try_from(value.cast_signed())
                .map(|v| v.to_le_bytes().to_vec())
                .map_err(|_| Overflow { value, name })
        };
        match self {
            Self::Abs64 => Ok(absolute.to_le_bytes().to_vec()),
            Self::Pc64 => Ok(relative.to_le_bytes().to_vec()),
            Self::Abs32 => u32::try_from(absolute)
                .map(|v| v.to_le_bytes().to_vec())
                .map_err(|_| Overflow {
                    value: absolute,
                    name: "R_X86_64_32",
                }),
            Self::Abs32Signed => signed(absolute, "R_X86_64_32S"),
            Self::Pc32 => signed(relative, "R_X86_64_PC32"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, type_name};

    const TEXT: u64 = 0xffff_ffff_8123_4567;
    const ARENA: u64 = 0xffff_ffff_ff80_0010;

    #[test]
    fn values_fit_or_are_refused() {
        let check = |kind: Kind, symbol: u64, addend: i64, place: u64, want: Option<i128>| {
            let got = kind
                .bytes(symbol, addend, place)
                .ok()
                .map(|bytes| match kind {
                    Kind::Abs32 => i128::from(u32::from_le_bytes(bytes.try_into().unwrap())),
                    Kind::Abs64 => i128::from(u64::from_le_bytes(bytes.try_into().unwrap())),
                    Kind::Pc64 => i128::from(i64::from_le_bytes(bytes.try_into().unwrap())),
                    Kind::Abs32Signed | Kind::Pc32 => {
                        i128::from(i32::from_le_bytes(bytes.try_into().unwrap()))
                    }
                });
            assert_eq!(got, want, "{kind:?} {symbol:#x} {addend} {place:#x}");
        };
        check(
            Kind::Pc32,
            TEXT,
            -4,
            ARENA,
            Some(i128::from(TEXT) - 4 - i128::from(ARENA)),
        );
        check(Kind::Pc32, 0xffff_8880_0000_0000, -4, ARENA, None);
        check(
            Kind::Abs32Signed,
            TEXT,
            0,
            ARENA,
            Some(i128::from(TEXT.cast_signed())),
        );
        check(Kind::Abs32Signed, 0xffff_ffff, 0, ARENA, None);
        check(Kind::Abs32, TEXT, 0, ARENA, None);
        check(Kind::Abs32, 0x1_ac00, 0x10, ARENA, Some(0x1_ac10));
        check(Kind::Abs64, TEXT, 8, ARENA, Some(i128::from(TEXT) + 8));
        check(
            Kind::Pc64,
            0xffff_8880_0000_0000,
            0,
            ARENA,
            Some(0xffff_8880_0000_0000_i128 - i128::from(ARENA)),
        );
        // A per-CPU variable, reached relative to the instruction pointer.
        check(
            Kind::Pc32,
            0x1_ac00,
            -4,
            ARENA,
            Some(0x1_ac00 - 4 + 0x7f_fff0),
        );
    }

    #[test]
    fn what_is_not_applied_has_a_name() {
        assert_eq!(Kind::from_elf(9), None);
        assert_eq!(type_name(9), "R_X86_64_GOTPCREL");
        assert_eq!(type_name(4711), "relocation type 4711");
    }
}
