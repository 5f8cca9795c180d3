//! Where kallsyms keeps its tables in a kernel image, found by their shape.
//!
//! The image's own symbol table is stripped, so nothing names the tables. Two orders occur (kernel
//! `scripts/kallsyms.c`, `write_src()`): up to Linux 6.3 the addresses come before the names and the alphabetical order,
//! where there is one, between markers and tokens; from 6.4 the addresses come after the tokens. Which of them an
//! image has is probed, because stable kernels mix them: Debian's 6.1.170 carries the alphabetical order of 6.2.
//! Every table found is checked against the others before it is believed.

use std::ops::Range;

use super::bytes::{le_i32, le_u16, le_u32, le_u64};

/// Tables begin at multiples of this (`.balign 8` of `write_label()`).
const ALIGN: usize = 8;
/// One marker is kept for this many names.
pub(crate) const MARKER_STEP: usize = 256;
/// `KSYM_NAME_LEN` is 512 from Linux 6.1 on; a token is shorter than a name.
const MAX_NAME: usize = 512;
/// Everything that is not a moved kernel symbol (per-CPU offsets, absolute values) lies below the kernel's image.
pub(crate) const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// Why the symbol tables were not found or not believed.
#[derive(Debug, thiserror::Error)]
pub enum KallsymsError {
    /// No token table: the kernel has no kallsyms.
    #[error("no kallsyms token table is in .rodata (CONFIG_KALLSYMS)")]
    NoTokens,
    /// The names do not lie before the token table.
    #[error(
        "a kallsyms token table is at {tokens:#x} of the file, but no names and markers that fit it are before it"
    )]
    NoNames {
        /// Offset of the token table in the file.
        tokens: usize,
    },
    /// No addresses fit the names.
    #[error(
        "{count} kallsyms names are at {names:#x} of the file, but no table of addresses fits them: an unknown layout"
    )]
    NoAddresses {
        /// Symbols counted.
        count: usize,
        /// Offset of the names in the file.
        names: usize,
    },
    /// A name cannot be expanded.
    #[error("kallsyms name {index} is damaged")]
    Name {
        /// Index of the symbol.
        index: usize,
    },
}

/// How a table entry becomes an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Not negative: the address itself; negative: downwards from one below the base (`KALLSYMS_ABSOLUTE_PERCPU`).
    AbsolutePercpu,
    /// An unsigned distance from the base.
    Relative,
}

impl Encoding {
    pub(crate) fn address(self, base: u64, entry: i32) -> u64 {
        match self {
            Self::AbsolutePercpu if entry >= 0 => u64::from(entry.unsigned_abs()),
            Self::AbsolutePercpu => base
                .wrapping_sub(1)
                .wrapping_sub(i64::from(entry).cast_unsigned()),
            Self::Relative => base.wrapping_add(u64::from(entry.cast_unsigned())),
        }
    }
}

/// The tables, as ranges of the file.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) count: usize,
    /// The compressed names, one after another.
    pub(crate) names: Range<usize>,
    /// Offset into `names` of every 256th, as `u32`.
    pub(crate) markers: Range<usize>,
    /// The 256 tokens' bytes.
    pub(crate) tokens: Vec<Range<usize>>,
    /// One `i32` for each symbol, in the order of addresses.
    pub(crate) offsets: Range<usize>,
    pub(crate) base: u64,
    pub(crate) encoding: Encoding,
}

impl Tables {
    /// Finds the tables in `within`, a range of the file `data`.
    pub(crate) fn find(data: &[u8], within: &Range<usize>) -> Result<Self, KallsymsError> {
        let (tokens, token_index) = tokens(data, within).ok_or(KallsymsError::NoTokens)?;
        let start = tokens[0].start;
        let names = names(data, within, start).ok_or(KallsymsError::NoNames { tokens: start })?;
        let count = names.count;
        let before = addresses_before(&names);
        let after = addresses_after(data, token_index, count);
        let fits = |(offsets, base): (Range<usize>, u64)| {
            let encoding = encoding(data.get(offsets.clone())?, base)?;
            Some((offsets, base, encoding))
        };
        let base_before =
            before.and_then(|offsets| Some((offsets, le_u64(data, names.count_at - ALIGN)?)));
        let (offsets, base, encoding) = base_before
            .and_then(fits)
            .or_else(|| after.and_then(fits))
            .ok_or(KallsymsError::NoAddresses {
                count,
                names: names.names.start,
            })?;
        Ok(Self {
            count,
            names: names.names,
            markers: names.markers,
            tokens,
            offsets,
            base,
            encoding,
        })
    }
}

/// The length of the compressed name at `at` and where its bytes begin.
pub(crate) fn name_len(data: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*data.get(at)?);
    if first & 0x80 == 0 {
        return Some((first, at + 1));
    }
    Some((first & 0x7f | usize::from(*data.get(at + 1)?) << 7, at + 2))
}

/// The tokens and the offset of their index: 256 ascending offsets that point just behind the zero bytes of a string
/// table that ends where the index begins.
fn tokens(data: &[u8], within: &Range<usize>) -> Option<(Vec<Range<usize>>, usize)> {
    let data = data.get(..within.end)?;
    let mut at = within.start.next_multiple_of(ALIGN);
    while at + 512 <= data.len() {
        if le_u16(data, at) == Some(0)
            && le_u16(data, at + 2).is_some_and(|second| (2..64).contains(&second))
            && let Some(tokens) = tokens_before(data, at)
        {
            return Some((tokens, at));
        }
        at += ALIGN;
    }
    None
}

fn tokens_before(data: &[u8], index_at: usize) -> Option<Vec<Range<usize>>> {
    let (index, _) = data.get(index_at..index_at + 512)?.as_chunks::<2>();
    let index: Vec<usize> = index
        .iter()
        .map(|entry| usize::from(u16::from_le_bytes(*entry)))
        .collect();
    if !index.is_sorted_by(|a, b| a + 1 < *b) {
        return None;
    }
    let last = *index.last()?;
    let first_try = index_at.checked_sub((last + 2).next_multiple_of(ALIGN))?;
    (0..MAX_NAME / ALIGN).find_map(|step| {
        let start = first_try.checked_sub(step * ALIGN)?;
        let end = start
            + last
            + data
                .get(start + last..index_at)?
                .iter()
                .position(|byte| *byte == 0)?;
        let padding = data.get(end..index_at)?;
        if padding.len() > ALIGN || padding.iter().any(|byte| *byte != 0) {
            return None;
        }
        let ends = index[1..].iter().map(|next| start + next - 1).chain([end]);
        let tokens: Vec<Range<usize>> = index
            .iter()
            .zip(ends)
            .map(|(from, end)| start + from..end)
            .collect();
        let whole =
            |token: &Range<usize>| data[token.end] == 0 && !data[token.clone()].contains(&0);
        tokens.iter().all(whole).then_some(tokens)
    })
}

struct Names {
    count: usize,
    count_at: usize,
    names: Range<usize>,
    markers: Range<usize>,
}

/// The names and their markers, before the token table at `tokens`.
fn names(data: &[u8], within: &Range<usize>, tokens: usize) -> Option<Names> {
    let mut at = tokens.checked_sub(ALIGN)? & !(ALIGN - 1);
    while at >= within.start.checked_add(ALIGN)? {
        if le_u32(data, at) == Some(0)
            && markers_step(0, le_u32(data, at + 4))
            && let Some(names) = names_before(data, at, tokens)
        {
            return Some(names);
        }
        at -= ALIGN;
    }
    None
}

/// Whether `next` can be the marker after `marker`: 256 names, of two to 512 bytes each, lie between them.
fn markers_step(marker: u32, next: Option<u32>) -> bool {
    next.and_then(|next| next.checked_sub(marker))
        .is_some_and(|step| (512..=0x2_0000).contains(&step))
}

/// The names that the markers at `markers` speak of, if they lie right before it.
fn names_before(data: &[u8], markers: usize, tokens: usize) -> Option<Names> {
    let entry =
        |index: usize| le_u32(data, markers + index * 4).filter(|_| markers + index * 4 < tokens);
    let mut run = 1;
    while entry(run - 1).is_some_and(|marker| markers_step(marker, entry(run))) {
        run += 1;
    }
    // What follows the markers can look like one more of them, and the last may belong to a single name.
    [run, run.checked_sub(1)?]
        .into_iter()
        .filter(|run| *run > 1)
        .find_map(|run| {
            let last = entry(run - 1)? as usize;
            let longest = MAX_NAME * MARKER_STEP;
            let nearest = markers.checked_sub(last + 2)? & !(ALIGN - 1);
            (0..longest / ALIGN).find_map(|step| {
                let start = nearest.checked_sub(step * ALIGN)?;
                let count_at = start.checked_sub(ALIGN)?;
                let count = le_u64(data, count_at).and_then(|count| usize::try_from(count).ok())?;
                if count.div_ceil(MARKER_STEP) != run {
                    return None;
                }
                let end = names_end(data, start..markers, markers, count)?;
                let stop = markers + run * 4;
                Some(Names {
                    count,
                    count_at,
                    names: start..end,
                    markers: markers..stop,
                })
            })
        })
}

/// Where `count` names that begin at `room.start` end, if every marker agrees and only padding is left before them.
fn names_end(data: &[u8], room: Range<usize>, markers: usize, count: usize) -> Option<usize> {
    let mut at = room.start;
    for index in 0..count {
        if index % MARKER_STEP == 0 {
            let marker = le_u32(data, markers + index / MARKER_STEP * 4)?;
            if marker as usize != at - room.start {
                return None;
            }
        }
        let (len, from) = name_len(data, at)?;
        at = from + len;
        if len == 0 || at > room.end {
            return None;
        }
    }
    (at.next_multiple_of(ALIGN) == room.end).then_some(at)
}

/// The older order: offsets, base, count, names.
fn addresses_before(names: &Names) -> Option<Range<usize>> {
    let end = names.count_at.checked_sub(ALIGN)?;
    let start = end.checked_sub((names.count * 4).next_multiple_of(ALIGN))?;
    Some(start..start + names.count * 4)
}

/// The newer order: token index, offsets, base.
fn addresses_after(data: &[u8], token_index: usize, count: usize) -> Option<(Range<usize>, u64)> {
    let start = token_index + 512;
    let end = start.checked_add(count.checked_mul(4)?)?;
    Some((start..end, le_u64(data, end.next_multiple_of(ALIGN))?))
}

/// The encoding in which `offsets` ascend and reach the kernel's image.
fn encoding(offsets: &[u8], base: u64) -> Option<Encoding> {
    if base < IMAGE_BASE || !base.is_multiple_of(4096) {
        return None;
    }
    let fits = |encoding: Encoding| {
        let addresses = (0..offsets.len() / 4).filter_map(|index| le_i32(offsets, index * 4));
        let mut addresses = addresses.map(|entry| encoding.address(base, entry));
        let mut previous = 0;
        let sorted = addresses.all(|address| std::mem::replace(&mut previous, address) <= address);
        sorted && previous >= IMAGE_BASE
    };
    [Encoding::AbsolutePercpu, Encoding::Relative]
        .into_iter()
        .find(|encoding| fits(*encoding))
}
