//! The index of symbols by name: a hash of each name beside its number, made without expanding any name.

use std::ops::Range;

use crate::kernel::kallsyms::{KallsymsError, MAX_NAME, Tables, name_len};

/// A hash that can be put together from the hashes of a name's tokens.
#[derive(Clone, Copy)]
pub(super) struct NameHash {
    sum: u64,
    /// `FACTOR` to the power of the length.
    shift: u64,
}

impl NameHash {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    const EMPTY: Self = Self { sum: 0, shift: 1 };

    pub(super) fn of(bytes: &[u8]) -> Self {
        bytes.iter().fold(Self::EMPTY, |hash, byte| {
            hash.then(Self {
                sum: u64::from(*byte) + 1,
                shift: Self::FACTOR,
            })
        })
    }

    fn then(self, next: Self) -> Self {
        Self {
            sum: self.sum.wrapping_mul(next.shift).wrapping_add(next.sum),
            shift: self.shift.wrapping_mul(next.shift),
        }
    }

    pub(super) fn finish(self) -> u32 {
        let [.., a, b, c, d] = (self.sum ^ self.sum >> 29)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
            .to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

/// The hashes of all names without expanding any: each token is hashed once, and a name's is put together from them.
pub(super) fn index_names(data: &[u8], tables: &Tables) -> Result<Vec<u64>, KallsymsError> {
    let token = |range: &Range<usize>| data.get(range.clone()).unwrap_or_default();
    let whole: Vec<NameHash> = tables
        .tokens
        .iter()
        .map(|range| NameHash::of(token(range)))
        .collect();
    // The first character of the first token is the symbol's kind, not part of its name.
    let first: Vec<NameHash> = tables
        .tokens
        .iter()
        .map(|range| NameHash::of(token(range).get(1..).unwrap_or_default()))
        .collect();
    let names = data.get(tables.names.clone()).unwrap_or_default();
    let mut by_name = Vec::with_capacity(tables.count);
    let mut at = 0;
    for index in 0..tables.count {
        let damaged = KallsymsError::Name { index };
        let (len, from) = name_len(names, at).ok_or(KallsymsError::Name { index })?;
        let Some((head, tail)) = names.get(from..from + len).and_then(<[u8]>::split_first) else {
            return Err(damaged);
        };
        let start = first[usize::from(*head)];
        // The first character is the symbol's kind.
        let tokens = tables.tokens.as_slice();
        let len_of = |token: &u8| tokens[usize::from(*token)].len();
        if len_of(head) + tail.iter().map(len_of).sum::<usize>() > MAX_NAME + 1 {
            return Err(damaged);
        }
        let hash = tail
            .iter()
            .fold(start, |hash, token| hash.then(whole[usize::from(*token)]));
        by_name.push(u64::from(hash.finish()) << 32 | index as u64);
        at = from + len;
    }
    by_name.sort_unstable();
    Ok(by_name)
}
