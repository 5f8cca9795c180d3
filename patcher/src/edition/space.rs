//! Room in the arena: what of the addresses where one half of it is mapped is taken, and what is free.
//!
//! Whoever gives room back has proved that no thread is in it, and that nothing in the guest still knows its address.

use std::ops::Range;

use crate::addr::Gva;

/// Nothing is placed so close to the beginning of the code half: the kernel prints so many bytes before the instruction
/// pointer when it reports a crash.
const CODE_GUARD: u64 = 64;
/// Bytes at the beginning of the code half that are for redirection handlers.
pub const HANDLERS: u64 = 256 << 10;

/// The arena half has no room left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the arena's {half} part is full: {needed} bytes are needed in one piece, {left} of {size} are left; \
     reverted updates keep their space while something in the guest may know their addresses, so restart the guest to empty it"
)]
pub struct Full {
    /// `code`, `handler` or `data`.
    pub half: &'static str,
    /// Bytes asked for, alignment included.
    pub needed: u64,
    /// Bytes not taken, not all of them in one piece.
    pub left: u64,
    /// Bytes in all.
    pub size: u64,
}

/// One part of the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    half: &'static str,
    range: Range<Gva>,
    /// What is free, by address; no two of them touch.
    free: Vec<Range<u64>>,
}

impl Space {
    /// All of `range` free; `half` names it in errors. The first `reserved` bytes are never handed out.
    #[must_use]
    pub fn new(half: &'static str, range: Range<Gva>, reserved: u64) -> Self {
        let start = range.start.0.saturating_add(reserved).min(range.end.0);
        let all = start..range.end.0;
        let free = Some(all).filter(|all| !all.is_empty());
        let free = free.into_iter().collect();
        Self { half, range, free }
    }

    /// Takes `len` bytes aligned to `align`, a power of two: the lowest that are free.
    ///
    /// # Errors
    /// [`Full`]; nothing is taken then.
    pub fn take(&mut self, len: u64, align: u64) -> Result<Gva, Full> {
        let mask = align.max(1) - 1;
        let fits = |piece: &Range<u64>| {
            let start = piece.start.checked_add(mask)? & !mask;
            let end = start.checked_add(len)?;
            (end <= piece.end).then_some(start..end)
        };
        let found = self
            .free
            .iter()
            .enumerate()
            .find_map(|(index, piece)| Some((index, fits(piece)?)));
        let Some((index, taken)) = found else {
            return Err(Full {
                half: self.half,
                needed: len.saturating_add(mask),
                left: self.left(),
                size: self.range.end.0 - self.range.start.0,
            });
        };
        let piece = self.free.remove(index);
        let rest = [piece.start..taken.start, taken.end..piece.end];
        let rest = rest.into_iter().filter(|rest| !rest.is_empty());
        self.free.splice(index..index, rest);
        Ok(Gva(taken.start))
    }

    /// Gives `len` bytes from `at` back. What was not taken stays free.
    pub fn give(&mut self, at: Gva, len: u64) {
        let end = at.0.saturating_add(len).min(self.range.end.0);
        let given = at.0.max(self.range.start.0)..end;
        if given.is_empty() {
            return;
        }
        self.free.push(given);
        self.free.sort_by_key(|piece| piece.start);
        let mut whole: Vec<Range<u64>> = Vec::with_capacity(self.free.len());
        for piece in self.free.drain(..) {
            match whole.last_mut() {
                Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
                _ => whole.push(piece),
            }
        }
        self.free = whole;
    }

    /// Bytes not taken.
    #[must_use]
    pub fn left(&self) -> u64 {
        let pieces = self.free.iter();
        pieces.map(|piece| piece.end - piece.start).sum()
    }

    /// The addresses of this half.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.range.clone()
    }
}

/// All parts. A copy is a draft: linking works on one, and only a commit keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaSpace {
    /// Read-execute: redirection handlers.
    pub handlers: Space,
    /// Read-execute: editions, relocated heads.
    pub code: Space,
    /// Read-write, not executable: constants and variables, what handlers look up and count.
    pub data: Space,
}

impl ArenaSpace {
    /// An empty arena whose halves the kernel sees at `code` and `data`.
    #[must_use]
    pub fn new(code: Range<Gva>, data: Range<Gva>) -> Self {
        let border = Gva(code.start.0.saturating_add(HANDLERS)).min(code.end);
        Self {
            handlers: Space::new("handler", code.start..border, CODE_GUARD),
            code: Space::new("code", border..code.end, 0),
            data: Space::new("data", data, 0),
        }
    }

    /// Bytes that were handed out, of all parts.
    #[must_use]
    pub fn used(&self) -> u64 {
        [&self.handlers, &self.code, &self.data]
            .iter()
            .map(|part| part.range.end.0 - part.range.start.0 - part.left())
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

    #[test]
    fn what_is_given_back_is_whole_again() {
        let mut space = Space::new("code", Gva(0x1000)..Gva(0x1100), 0x10);
        let all = space.clone();
        let taken: Vec<Gva> = (0..5).map(|_| space.take(0x30, 16).unwrap()).collect();
        assert!(space.take(0x30, 16).is_err());
        for index in [1, 3, 0, 4, 2] {
            space.give(taken[index], 0x30);
        }
        assert_eq!(space, all);
        space.give(Gva(0x0), 0x1000);
        space.give(Gva(0x1100), u64::MAX);
        assert_eq!(space, all, "what lies outside is not its to have");
    }

    proptest! {
        #[test]
        fn what_is_taken_is_aligned_inside_and_apart(
            requests in proptest::collection::vec((0_u64..300, 0_u32..10, any::<bool>()), 0..60)
        ) {
            let mut space = Space::new("code", Gva(0x10_0010)..Gva(0x10_1000), 0);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (len, shift, give) in requests {
                if give && !taken.is_empty() {
                    let (at, len) = taken.remove(usize::try_from(len).unwrap() % taken.len());
                    space.give(Gva(at), len);
                } else if let Ok(at) = space.take(len, 1 << shift) {
                    let end = at.checked_add(len).unwrap();
                    prop_assert!(at >= space.range().start && end <= space.range().end);
                    prop_assert!(at.0 % (1 << shift) == 0);
                    for (other, of) in &taken {
                        prop_assert!(len == 0 || *of == 0 || end.0 <= *other || other + of <= at.0);
                    }
                    taken.push((at.0, len));
                }
                let held: u64 = taken.iter().map(|(_, len)| len).sum();
                prop_assert_eq!(space.left(), 0xff0 - held);
            }
        }
    }
}
