//! Damage that looks like what a hostile or unlucky writer would do: bits flipped, numbers made extreme, parts moved over others, ends cut off.

use std::ops::Range;

/// A row of numbers that looks random and depends on the case alone (Steele, Lea and Flood's SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(case: u64) -> Self {
        Self(case)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`; zero when there is none.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.next() % end).unwrap_or(0)
    }
}

/// What was where damage is now, in the order in which it was done.
pub(crate) type Undo = Vec<(usize, Vec<u8>)>;

/// Numbers that lengths, counts and offsets break at.
pub(crate) const EXTREMES: [u64; 8] =
    [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// Damages some bytes of `bytes` within `range`. Returns what was there, to be put back in reverse.
pub(crate) fn damage(bytes: &mut [u8], range: Range<usize>, random: &mut Random) -> Undo {
    let mut undo = Vec::new();
    for _ in 0..=random.below(6) {
        let at = range.start + random.below(range.len());
        let new = change(bytes, at, range.end, random);
        let Some(old) = bytes.get_mut(at..at + new.len()) else {
            continue;
        };
        undo.push((at, old.to_vec()));
        old.copy_from_slice(&new);
    }
    undo
}

/// Puts back what [`damage`] changed.
pub(crate) fn mend(bytes: &mut [u8], undo: Undo) {
    for (at, old) in undo.into_iter().rev() {
        if let Some(there) = bytes.get_mut(at..at + old.len()) {
            there.copy_from_slice(&old);
        }
    }
}

/// What to put at `at`, below `end`.
fn change(bytes: &[u8], at: usize, end: usize, random: &mut Random) -> Vec<u8> {
    /// The longest part that is moved over another.
    const PART: usize = 64;
    let room = end - at;
    match random.below(4) {
        0 => {
            let bit = 1_u8 << random.below(8);
            vec![bytes.get(at).copied().unwrap_or_default() ^ bit]
        }
        1 => {
            let width = [1, 2, 4, 8][random.below(4)].min(room);
            EXTREMES[random.below(EXTREMES.len())].to_le_bytes()[..width].to_vec()
        }
        2 => {
            // A small step is what an off-by-one makes of a number.
            let old = bytes.get(at).copied().unwrap_or_default();
            vec![old.wrapping_add([1, 255, 4, 252][random.below(4)])]
        }
        _ => {
            let len = (1 + random.below(PART)).min(room);
            let from = random.below(bytes.len().saturating_sub(len));
            bytes.get(from..from + len).unwrap_or_default().to_vec()
        }
    }
}
