//! Where kallsyms keeps its tables, found by their shape in a kernel's image or in memory.
//!
//! The kernel's own symbol table is stripped, so nothing names the tables. Three orders occur (kernel
//! `scripts/kallsyms.c`, `write_src()`): up to Linux 6.3 the addresses come before the names and the alphabetical order,
//! where there is one, between markers and tokens; from 6.4 the addresses come after the tokens; from 7.0 on each of them is a distance
//! from its own place, and there is no base. Which of them a kernel has is probed, because stable kernels mix them: Debian's 6.1.170
//! carries the alphabetical order of 6.2. Every table found is checked against the others before it is believed, and the
//! search ends after a bounded number of steps whatever the bytes are.

use std::cell::Cell;
use std::ops::Range;

use super::bytes::{le_i32, le_u16, le_u32, le_u64};

/// Tables begin at multiples of this: of 8 in most kernels, of 4 from Linux 7.2 on.
const ALIGN: usize = 4;
/// The larger of the two.
const WIDE: usize = 8;
/// One marker is kept for this many names.
pub(crate) const MARKER_STEP: usize = 256;
/// `KSYM_NAME_LEN` is 512 from Linux 6.1 on; a token is shorter than a name.
pub(crate) const MAX_NAME: usize = 512;
/// Everything that is not a moved kernel symbol (per-CPU offsets, absolute values) lies below the kernel's image.
pub(crate) const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;
/// More symbols than any kernel has.
const MAX_SYMBOLS: u64 = 1 << 22;
/// Steps of a search, each of a few comparisons; kernels take some hundred thousand.
const MOST_STEPS: u64 = 1 << 26;

/// The steps that may still be taken in a search, of however many parts.
#[derive(Debug)]
pub(crate) struct Steps(Cell<u64>);

impl Default for Steps {
    fn default() -> Self {
        Self(Cell::new(MOST_STEPS))
    }
}

impl Steps {
    /// Takes one, if any is left.
    fn take(&self) -> Option<()> {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        (left > 1).then_some(())
    }

    fn are_gone(&self) -> bool {
        self.0.get() == 0
    }
}

/// Why the symbol tables were not found or not believed.
#[derive(Debug, thiserror::Error)]
pub enum KallsymsError {
    /// No token table: the kernel has no kallsyms.
    #[error("no kallsyms token table is in the kernel's constants (CONFIG_KALLSYMS)")]
    NoTokens,
    /// The names do not lie before the token table.
    #[error(
        "a kallsyms token table is at offset {tokens:#x}, but no names and markers that fit it are before it"
    )]
    NoNames {
        /// Offset of the token table in the bytes searched.
        tokens: usize,
    },
    /// No addresses fit the names.
    #[error(
        "{count} kallsyms names are at offset {names:#x}, but no table of addresses fits them: an unknown layout"
    )]
    NoAddresses {
        /// Symbols counted.
        count: usize,
        /// Offset of the names in the bytes searched.
        names: usize,
    },
    /// The bytes were made to be searched for ever.
    #[error("so much looks like kallsyms that the search for it was given up")]
    Endless,
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
    AbsolutePercpu { base: u64 },
    /// An unsigned distance from the base.
    Relative { base: u64 },
    /// A signed distance from the entry itself; the first of them is at this address.
    FromItself { first: u64 },
}

impl Encoding {
    pub(crate) fn address(self, index: usize, entry: i32) -> u64 {
        match self {
            Self::AbsolutePercpu { .. } if entry >= 0 => u64::from(entry.unsigned_abs()),
            Self::AbsolutePercpu { base } => base
                .wrapping_sub(1)
                .wrapping_sub(i64::from(entry).cast_unsigned()),
            Self::Relative { base } => base.wrapping_add(u64::from(entry.cast_unsigned())),
            Self::FromItself { first } => first
                .wrapping_add(index as u64 * 4)
                .wrapping_add_signed(entry.into()),
        }
    }

    /// The same with all that moves with the kernel `by` bytes lower.
    pub(crate) fn lowered(self, by: u64) -> Self {
        match self {
            Self::AbsolutePercpu { base } => Self::AbsolutePercpu {
                base: base.wrapping_sub(by),
            },
            Self::Relative { base } => Self::Relative {
                base: base.wrapping_sub(by),
            },
            Self::FromItself { first } => Self::FromItself {
                first: first.wrapping_sub(by),
            },
        }
    }
}

/// The tables, as ranges of the bytes that they were found in.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) count: usize,
    /// The compressed names, one after another.
    pub(crate) names: Range<usize>,
    /// Offset into `names` of every 256th.
    pub(crate) markers: Markers,
    /// The 256 tokens' bytes.
    pub(crate) tokens: Vec<Range<usize>>,
    /// One `i32` for each symbol, in the order of addresses.
    pub(crate) offsets: Range<usize>,
    pub(crate) encoding: Encoding,
}

/// The markers, of four bytes each; of eight before Linux 4.20.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Markers {
    pub(crate) at: usize,
    width: usize,
}

impl Markers {
    /// Marker `index`.
    pub(crate) fn get(self, data: &[u8], index: usize) -> Option<usize> {
        let at = self.at.checked_add(index.checked_mul(self.width)?)?;
        match self.width {
            4 => le_u32(data, at).map(|marker| marker as usize),
            _ => le_u64(data, at).and_then(|marker| usize::try_from(marker).ok()),
        }
    }
}

impl Tables {
    /// Finds the tables in `within`, a range of `data` whose first byte is at address `at` of the kernel.
    pub(crate) fn find(
        data: &[u8],
        within: &Range<usize>,
        at: u64,
        steps: &Steps,
    ) -> Result<Self, KallsymsError> {
        let search = Search {
            data,
            within,
            at,
            steps,
        };
        let mut failure = KallsymsError::NoTokens;
        let mut from = within.start.next_multiple_of(ALIGN);
        while let Some((tokens, index)) = search.tokens(from) {
            match search.tables(tokens, index) {
                Ok(tables) => return Ok(tables),
                Err(error) => failure = error,
            }
            from = index + ALIGN;
        }
        if steps.are_gone() {
            return Err(KallsymsError::Endless);
        }
        Err(failure)
    }

    /// The range that all of the tables lie in.
    pub(crate) fn extent(&self) -> Range<usize> {
        let last = self.tokens.iter().map(|token| token.end + 1).max();
        let start = self.names.start.min(self.offsets.start);
        start..last.unwrap_or(start).max(self.offsets.end)
    }

    /// The same tables in bytes that lack the first `by`.
    pub(crate) fn moved(mut self, by: usize) -> Self {
        let earlier = |range: &mut Range<usize>| *range = range.start - by..range.end - by;
        earlier(&mut self.names);
        earlier(&mut self.offsets);
        self.tokens.iter_mut().for_each(earlier);
        self.markers.at -= by;
        self
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

struct Names {
    count: usize,
    count_at: usize,
    names: Range<usize>,
    markers: Markers,
}

/// A search in bytes that anybody may have made up.
struct Search<'a> {
    data: &'a [u8],
    within: &'a Range<usize>,
    /// The address of the first byte of `within`.
    at: u64,
    steps: &'a Steps,
}

impl Search<'_> {
    /// All tables, by their tokens and where the index of those is.
    fn tables(&self, tokens: Vec<Range<usize>>, index: usize) -> Result<Tables, KallsymsError> {
        let start = tokens[0].start;
        let names = self
            .names(start)
            .ok_or(KallsymsError::NoNames { tokens: start })?;
        let before = self.addresses_before(&names);
        let found = before.or_else(|| self.addresses_after(index + 512, names.count));
        let (offsets, encoding) = found.ok_or(KallsymsError::NoAddresses {
            count: names.count,
            names: names.names.start,
        })?;
        Ok(Tables {
            count: names.count,
            names: names.names,
            markers: names.markers,
            tokens,
            offsets,
            encoding,
        })
    }

    /// The first tokens from `from` on, and the offset of their index: 256 ascending offsets that point just behind the zero bytes of a
    /// string table that ends where the index begins.
    fn tokens(&self, from: usize) -> Option<(Vec<Range<usize>>, usize)> {
        let data = self.data.get(..self.within.end)?;
        let mut at = from;
        while at + 512 <= data.len() {
            if le_u16(data, at) == Some(0)
                && le_u16(data, at + 2).is_some_and(|second| (2..64).contains(&second))
                && let Some(tokens) = self.tokens_before(data, at)
            {
                return Some((tokens, at));
            }
            at += ALIGN;
        }
        None
    }

    fn tokens_before(&self, data: &[u8], index_at: usize) -> Option<Vec<Range<usize>>> {
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
            self.steps.take()?;
            let start = first_try.checked_sub(step * ALIGN)?;
            let end = start
                + last
                + data
                    .get(start + last..index_at)?
                    .iter()
                    .position(|byte| *byte == 0)?;
            let padding = data.get(end..index_at)?;
            if padding.len() > WIDE || padding.iter().any(|byte| *byte != 0) {
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

    /// The names and their markers, before the token table at `tokens`.
    fn names(&self, tokens: usize) -> Option<Names> {
        let mut at = tokens.checked_sub(ALIGN)? & !(ALIGN - 1);
        while at >= self.within.start.checked_add(WIDE)? {
            self.steps.take()?;
            for width in [4, 8] {
                let markers = Markers { at, width };
                let begins = markers.get(self.data, 0) == Some(0)
                    && markers_step(0, markers.get(self.data, 1));
                if begins && let Some(names) = self.names_before(markers, tokens) {
                    return Some(names);
                }
            }
            at -= ALIGN;
        }
        None
    }

    /// The names that `markers` speak of, if they lie right before them.
    fn names_before(&self, markers: Markers, tokens: usize) -> Option<Names> {
        let entry = |index: usize| {
            let inside = markers.at + index * markers.width < tokens;
            markers.get(self.data, index).filter(|_| inside)
        };
        let mut run = 1;
        while entry(run - 1).is_some_and(|marker| markers_step(marker, entry(run))) {
            self.steps.take()?;
            run += 1;
        }
        // What follows the markers can look like one more of them, and the last may belong to a single name.
        [run, run - 1]
            .into_iter()
            .filter(|run| *run > 1)
            .find_map(|run| {
                let nearest = markers.at.checked_sub(entry(run - 1)? + 2)? & !(ALIGN - 1);
                (0..MAX_NAME * MARKER_STEP / ALIGN).find_map(|step| {
                    self.steps.take()?;
                    let start = nearest.checked_sub(step * ALIGN)?;
                    let wide = start.checked_sub(WIDE)?;
                    let tight = start.checked_sub(ALIGN)?;
                    let counts = [
                        (wide, le_u64(self.data, wide)),
                        (tight, le_u32(self.data, tight).map(u64::from)),
                    ];
                    let of = |(count_at, count): (usize, Option<u64>)| {
                        self.names_at(start, markers, run, (count_at, count?))
                    };
                    counts.into_iter().find_map(of)
                })
            })
    }

    /// The names from `start` on, if there are as many as `count` says and `run` of `markers` belong to them.
    fn names_at(
        &self,
        start: usize,
        markers: Markers,
        run: usize,
        (count_at, count): (usize, u64),
    ) -> Option<Names> {
        let count = Some(count).filter(|count| *count <= MAX_SYMBOLS)?;
        let count = usize::try_from(count).ok()?;
        if count.div_ceil(MARKER_STEP) != run {
            return None;
        }
        let end = self.names_end(start, markers, count)?;
        Some(Names {
            count,
            count_at,
            names: start..end,
            markers,
        })
    }

    /// Where `count` names that begin at `start` end, if every marker agrees and only padding is left before those.
    fn names_end(&self, start: usize, markers: Markers, count: usize) -> Option<usize> {
        let mut at = start;
        for index in 0..count {
            self.steps.take()?;
            if index % MARKER_STEP == 0
                && markers.get(self.data, index / MARKER_STEP)? != at - start
            {
                return None;
            }
            let (len, from) = name_len(self.data, at)?;
            at = from + len;
            if len == 0 || at > markers.at {
                return None;
            }
        }
        let padding = self.data.get(at..markers.at)?;
        (padding.len() < WIDE && padding.iter().all(|byte| *byte == 0)).then_some(at)
    }

    /// The oldest order: offsets, base, count, names.
    fn addresses_before(&self, names: &Names) -> Option<(Range<usize>, Encoding)> {
        let base_at = names.count_at.checked_sub(WIDE)?;
        let start = base_at.checked_sub((names.count * 4).next_multiple_of(WIDE))?;
        self.of_base(start..start + names.count * 4, base_at)
    }

    /// The newer orders: token index, offsets; and a base, or none.
    fn addresses_after(&self, start: usize, count: usize) -> Option<(Range<usize>, Encoding)> {
        let end = start.checked_add(count.checked_mul(4)?)?;
        let offsets = start..end;
        let base = self.of_base(offsets.clone(), end.next_multiple_of(WIDE));
        base.or_else(|| {
            let place = self
                .at
                .wrapping_add(start.checked_sub(self.within.start)? as u64);
            let encoding = Encoding::FromItself { first: place };
            // The kernel goes on on both sides of its symbols; zeros would lead to themselves.
            let of = |index| {
                let entry = le_i32(self.data, start + index * 4)?;
                Some(encoding.address(index, entry))
            };
            let around = of(0)? < place && of(count.checked_sub(1)?)? > place + count as u64 * 4;
            (around && self.fits(&offsets, encoding)).then_some((offsets, encoding))
        })
    }

    /// The offsets with the base at `base_at`, in the encoding in which they ascend and reach the kernel's image.
    fn of_base(&self, offsets: Range<usize>, base_at: usize) -> Option<(Range<usize>, Encoding)> {
        let base = le_u64(self.data, base_at)?;
        if base < IMAGE_BASE || !base.is_multiple_of(4096) {
            return None;
        }
        [
            Encoding::AbsolutePercpu { base },
            Encoding::Relative { base },
        ]
        .into_iter()
        .find(|encoding| self.fits(&offsets, *encoding))
        .map(|encoding| (offsets, encoding))
    }

    /// Whether the addresses ascend and reach the kernel's image.
    fn fits(&self, offsets: &Range<usize>, encoding: Encoding) -> bool {
        let Some(offsets) = self.data.get(offsets.clone()) else {
            return false;
        };
        let mut previous = match encoding {
            // What is a distance from the kernel lies in it.
            Encoding::FromItself { .. } => IMAGE_BASE,
            _ => 0,
        };
        let mut addresses = (0..offsets.len() / 4)
            .filter_map(|index| Some(encoding.address(index, le_i32(offsets, index * 4)?)));
        let sorted = addresses.all(|address| std::mem::replace(&mut previous, address) <= address);
        sorted && previous >= IMAGE_BASE
    }
}

/// Whether `next` can be the marker after `marker`: 256 names, of two to 512 bytes each, lie between them.
fn markers_step(marker: usize, next: Option<usize>) -> bool {
    next.and_then(|next| next.checked_sub(marker))
        .is_some_and(|step| (512..=0x2_0000).contains(&step))
}
