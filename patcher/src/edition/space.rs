//! Room in the arena: a bump allocator over the addresses where one half of it is mapped.
//!
//! Space that was taken is never handed out again: a thread may still be inside an edition that was reverted.

use std::ops::Range;

use crate::addr::Gva;

/// Nothing is placed so close to the beginning of the code half: the kernel prints so many bytes before the instruction
/// pointer when it reports a crash.
const CODE_GUARD: u64 = 64;

/// The arena half has no room left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the arena's {half} part is full: {needed} bytes are needed, {left} of {size} are left; \
     reverted updates keep their space, so restart the guest to empty it"
)]
pub struct Full {
    /// `code` or `data`.
    pub half: &'static str,
    /// Bytes asked for, alignment included.
    pub needed: u64,
    /// Bytes not yet taken.
    pub left: u64,
    /// Bytes in all.
    pub size: u64,
}

/// One half of the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    half: &'static str,
    range: Range<Gva>,
    next: Gva,
}

impl Space {
    /// All of `range` free; `half` names it in errors. The first `reserved` bytes are never handed out.
    #[must_use]
    pub fn new(half: &'static str, range: Range<Gva>, reserved: u64) -> Self {
        let next = range
            .start
            .checked_add(reserved)
            .map_or(range.end, |next| next.min(range.end));
        Self { half, range, next }
    }

    /// Takes `len` bytes aligned to `align`, a power of two.
    ///
    /// # Errors
    /// [`Full`]; nothing is taken then.
    pub fn take(&mut self, len: u64, align: u64) -> Result<Gva, Full> {
        let mask = align.max(1) - 1;
        let start = self.next.checked_add(mask).map(|at| Gva(at.0 & !mask));
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.range.end => {
                self.next = end;
                Ok(start)
            }
            _ => Err(Full {
                half: self.half,
                needed: len.saturating_add(mask),
                left: self.left(),
                size: self.range.end.0 - self.range.start.0,
            }),
        }
    }

    /// Bytes not yet taken.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.range.end.0 - self.next.0
    }

    /// The addresses of this half.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.range.clone()
    }
}

/// Both halves. A copy is a draft: linking works on one, and only a commit keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaSpace {
    /// Read-execute: editions, relocated heads.
    pub code: Space,
    /// Read-write, not executable: their constants and variables.
    pub data: Space,
}

impl ArenaSpace {
    /// An empty arena whose halves the kernel sees at `code` and `data`.
    #[must_use]
    pub fn new(code: Range<Gva>, data: Range<Gva>) -> Self {
        Self {
            code: Space::new("code", code, CODE_GUARD),
            data: Space::new("data", data, 0),
        }
    }

    /// Bytes that were handed out, of both halves.
    #[must_use]
    pub fn used(&self) -> u64 {
        [&self.code, &self.data]
            .iter()
            .map(|half| half.next.0 - half.range.start.0)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Full, Space};
    use crate::addr::Gva;

    #[test]
    fn a_full_half_says_how_full() {
        let mut space = Space::new("code", Gva(0x1000)..Gva(0x1100), 0x40);
        assert_eq!(space.take(0x80, 16), Ok(Gva(0x1040)));
        assert_eq!(
            space.take(0x41, 1),
            Err(Full {
                half: "code",
                needed: 0x41,
                left: 0x40,
                size: 0x100
            })
        );
        assert_eq!(space.take(u64::MAX, 4096).unwrap_err().left, 0x40);
        assert_eq!(
            space.take(0x40, 1),
            Ok(Gva(0x10c0)),
            "a refused request takes nothing"
        );
        assert_eq!(space.left(), 0);
    }

    #[test]
    fn the_end_of_the_address_space_is_no_wrap() {
        let mut space = Space::new("data", Gva(u64::MAX - 0xff)..Gva(u64::MAX), 0);
        assert!(space.take(0x1000, 1).is_err());
        assert!(space.take(1, 1 << 63).is_err());
    }

    proptest! {
        #[test]
        fn what_is_taken_is_aligned_inside_and_apart(
            requests in proptest::collection::vec((0_u64..300, 0_u32..10), 0..40)
        ) {
            let mut space = Space::new("code", Gva(0x10_0010)..Gva(0x10_1000), 0);
            let mut end = space.range().start;
            for (len, shift) in requests {
                if let Ok(at) = space.take(len, 1 << shift) {
                    prop_assert!(at >= end && at.0 % (1 << shift) == 0);
                    end = at.checked_add(len).unwrap();
                    prop_assert!(end <= space.range().end);
                }
            }
        }
    }
}
