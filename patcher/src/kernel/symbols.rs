//! The kernel's symbols by name and by address, from kallsyms.
//!
//! A name that several symbols bear is an error, never the first match: callers that know better say which
//! one they mean by its position among its namesakes, in the order of addresses.
//! The index costs eight bytes for each symbol; names stay compressed in the image.

mod index;

use std::fmt;
use std::ops::Range;

use self::index::{NameHash, index_names};
use super::bytes::le_i32;
use super::image::{Bytes, Section};
use super::kallsyms::{IMAGE_BASE, MARKER_STEP, Steps, Tables, name_len};
use crate::addr::LinkAddr;

pub use super::kallsyms::KallsymsError;

/// Neighbours of the same name that are passed by in search of another.
const MOST_NEIGHBOURS: usize = 16;
/// Longest list of alternatives in an error.
const NEAR_NAMES: usize = 5;

/// One symbol of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name.
    pub name: String,
    /// Where it is in the image; for a per-CPU symbol where it is linked: from zero on, or (from Linux 6.15 on) where the image has
    /// the first CPU's values, which are given back after boot.
    pub address: LinkAddr,
    /// The letter that nm(1) gives it: `T` and `t` are code.
    pub kind: u8,
    /// Bytes to the next symbol's address, padding included; zero for the last one in the image, and below it.
    pub size: u64,
    /// The address is that of a per-CPU variable (or another absolute value): nothing of the running kernel is there.
    pub percpu: bool,
}

/// What a symbol's address means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// It is in the image, and moves with it.
    Image,
    /// It is an offset into each CPU's area.
    PerCpu,
    /// It is a value that means itself.
    Absolute,
}

/// One of several symbols of one name, with what tells it from the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namesake {
    /// Its position among them, from 1, in the order of addresses.
    pub position: usize,
    /// Itself.
    pub symbol: Symbol,
    /// The nearest symbol of another name below it: symbols of one source file lie together.
    pub before: Option<String>,
    /// The nearest symbol of another name above it.
    pub after: Option<String>,
}

/// Why a name does not give one symbol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SymbolError {
    /// No symbol is called that.
    #[error("the kernel has no symbol {name}{}", near_names(.near))]
    Missing {
        /// The name asked for.
        name: String,
        /// Names that look similar.
        near: Vec<String>,
    },
    /// Several symbols are called that.
    #[error("{} symbols of the kernel are called {name}; say which by its position:{}", .candidates.len(), list(.candidates))]
    Ambiguous {
        /// The name asked for.
        name: String,
        /// Position (from 1) and address of each.
        candidates: Vec<(usize, LinkAddr)>,
    },
    /// There are not that many symbols of the name.
    #[error(
        "symbol {name} number {position} was asked for, but the kernel has {count} of that name"
    )]
    Position {
        /// The name asked for.
        name: String,
        /// The position asked for, from 1.
        position: usize,
        /// How many there are.
        count: usize,
    },
    /// The symbol has no single address, because each CPU has its own.
    #[error("symbol {name} is per-CPU or absolute, it has no address in the kernel's image")]
    PerCpu {
        /// The name asked for.
        name: String,
    },
}

fn near_names(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!("; it has {}", near.join(", "))
    }
}

fn list(candidates: &[(usize, LinkAddr)]) -> String {
    candidates
        .iter()
        .map(|(position, address)| format!(" {position} at {address}"))
        .collect()
}

/// All symbols of one image.
pub struct Symbols {
    bytes: Bytes,
    tables: Tables,
    /// Hash of the name in the upper half, index in the lower; sorted.
    by_name: Vec<u64>,
    /// What per-CPU symbols are linked at: from zero on, or (from Linux 6.15 on) in the image.
    percpu: Range<u64>,
}

impl Symbols {
    /// Finds and indexes the symbols in `rodata`, the section that holds kallsyms.
    pub(crate) fn parse(bytes: Bytes, rodata: &Section) -> Result<Self, KallsymsError> {
        let data: &[u8] = (*bytes).as_ref();
        let tables = Tables::find(data, &rodata.file, rodata.range.start.0, &Steps::default())?;
        Self::new(bytes, tables)
    }

    /// Indexes the symbols of `tables`, which were found in `bytes`.
    pub(crate) fn new(bytes: Bytes, tables: Tables) -> Result<Self, KallsymsError> {
        let by_name = index_names((*bytes).as_ref(), &tables)?;
        let mut symbols = Self {
            bytes,
            tables,
            by_name,
            percpu: 0..0,
        };
        // Several of one name say nothing.
        let bound = |name| match symbols.indices(name).as_slice() {
            [index] => Some(symbols.address(*index)),
            _ => None,
        };
        symbols.percpu = match (bound("__per_cpu_start"), bound("__per_cpu_end")) {
            (Some(start), Some(end)) if start >= IMAGE_BASE => start..end,
            // The end has a symbol too, and nothing else of the image is there.
            (_, Some(end)) if end < IMAGE_BASE => 0..end.saturating_add(1),
            _ => 0..0,
        };
        Ok(symbols)
    }

    /// The same symbols with all that moves with the kernel `by` bytes lower.
    pub(crate) fn lowered(mut self, by: u64) -> Self {
        self.tables.encoding = self.tables.encoding.lowered(by);
        if self.percpu.start >= IMAGE_BASE {
            self.percpu = self.percpu.start.wrapping_sub(by)..self.percpu.end.wrapping_sub(by);
        }
        self
    }

    /// How many symbols there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.count
    }

    /// Whether there are none (there always are some).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tables.count == 0
    }

    /// The one symbol called `name`.
    ///
    /// # Errors
    /// [`SymbolError::Missing`], or [`SymbolError::Ambiguous`] when several are called that.
    pub fn lookup(&self, name: &str) -> Result<Symbol, SymbolError> {
        match self.indices(name).as_slice() {
            [] => Err(self.missing(name)),
            [index] => Ok(self.symbol(*index)),
            several => {
                let candidates = several
                    .iter()
                    .enumerate()
                    .map(|(at, index)| (at + 1, LinkAddr(self.address(*index))));
                Err(SymbolError::Ambiguous {
                    name: name.to_owned(),
                    candidates: candidates.collect(),
                })
            }
        }
    }

    /// The one symbol called `name`, or `None` where the kernel has none: for what only some kernels have.
    ///
    /// # Errors
    /// [`SymbolError::Ambiguous`].
    pub fn optional(&self, name: &str) -> Result<Option<Symbol>, SymbolError> {
        self.has(name).then(|| self.lookup(name)).transpose()
    }

    /// The `position`th symbol (from 1, in the order of addresses) of those called `name`.
    ///
    /// # Errors
    /// [`SymbolError::Missing`], or [`SymbolError::Position`] when there are fewer.
    pub fn lookup_nth(&self, name: &str, position: usize) -> Result<Symbol, SymbolError> {
        let indices = self.indices(name);
        if indices.is_empty() {
            return Err(self.missing(name));
        }
        let index = position
            .checked_sub(1)
            .and_then(|position| indices.get(position));
        let none = || SymbolError::Position {
            name: name.to_owned(),
            position,
            count: indices.len(),
        };
        index.map(|index| self.symbol(*index)).ok_or_else(none)
    }

    /// All symbols called `name`, each with its neighbours, in the order of addresses; none is an empty answer.
    #[must_use]
    pub fn namesakes(&self, name: &str) -> Vec<Namesake> {
        // Its own padding tells as little of it as its namesakes do.
        let padding = format!("__pfx_{name}");
        let other = |index: &usize| {
            let neighbour = self.symbol(*index).name;
            (neighbour != name && neighbour != padding).then_some(neighbour)
        };
        let indices = self.indices(name);
        let of = |(at, index): (usize, &usize)| Namesake {
            position: at + 1,
            symbol: self.symbol(*index),
            before: (0..*index)
                .rev()
                .take(MOST_NEIGHBOURS)
                .find_map(|at| other(&at)),
            after: (index + 1..self.tables.count)
                .take(MOST_NEIGHBOURS)
                .find_map(|at| other(&at)),
        };
        indices.iter().enumerate().map(of).collect()
    }

    /// What the address of `symbol`, one of these, means.
    #[must_use]
    pub fn space(&self, symbol: &Symbol) -> Space {
        if self.percpu.contains(&symbol.address.0) {
            Space::PerCpu
        } else if symbol.percpu {
            Space::Absolute
        } else {
            Space::Image
        }
    }

    /// Where the image has the per-CPU variables, from which offsets into each CPU's area count; zero where they are linked from zero on.
    #[must_use]
    pub fn percpu_start(&self) -> LinkAddr {
        LinkAddr(self.percpu.start)
    }

    /// The offset into each CPU's area of `symbol`, a per-CPU one of these.
    #[must_use]
    pub fn percpu_offset(&self, symbol: &Symbol) -> u64 {
        symbol.address.0.wrapping_sub(self.percpu.start)
    }

    /// Whether any symbol is called `name`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        !self.indices(name).is_empty()
    }

    /// The symbol whose bytes `address` is among, and how far in. Of several at one address, the first.
    #[must_use]
    pub fn containing(&self, address: LinkAddr) -> Option<(Symbol, u64)> {
        let after = self.partition_point(|candidate| candidate <= address.0);
        let at = self.address(after.checked_sub(1)?);
        let first = self.partition_point(|candidate| candidate < at);
        let symbol = self.symbol(first);
        let offset = address.offset_from(symbol.address)?;
        (offset < symbol.size).then_some((symbol, offset))
    }

    /// All symbols, in the order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = Symbol> + '_ {
        let mut at = 0;
        (0..self.tables.count).map(move |index| {
            let (len, from) = name_len(self.names(), at).unwrap_or((0, at));
            at = from + len;
            self.symbol_named(index, from..at)
        })
    }

    fn data(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    fn names(&self) -> &[u8] {
        &self.data()[self.tables.names.clone()]
    }

    fn address(&self, index: usize) -> u64 {
        let entry = le_i32(self.data(), self.tables.offsets.start + index * 4).unwrap_or(0);
        self.tables.encoding.address(index, entry)
    }

    /// The first index whose address `before` does not hold for.
    fn partition_point(&self, before: impl Fn(u64) -> bool) -> usize {
        let (mut low, mut high) = (0, self.tables.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if before(self.address(middle)) {
                low = middle + 1
            } else {
                high = middle
            }
        }
        low
    }

    fn symbol(&self, index: usize) -> Symbol {
        self.symbol_named(index, self.compressed(index))
    }

    fn symbol_named(&self, index: usize, compressed: Range<usize>) -> Symbol {
        let expanded = self.expand(compressed);
        let (kind, name) = expanded
            .split_first()
            .map_or((0, &[][..]), |(kind, name)| (*kind, name));
        let address = self.address(index);
        let next = self.partition_point_from(index, address);
        // What lies below the image does not reach up to it.
        let same_space = |next: u64| (next < IMAGE_BASE) == (address < IMAGE_BASE);
        let percpu = address < IMAGE_BASE || self.percpu.contains(&address);
        let size = match (next < self.tables.count).then(|| self.address(next)) {
            Some(next) if same_space(next) => next.wrapping_sub(address),
            _ => 0,
        };
        Symbol {
            name: String::from_utf8_lossy(name).into_owned(),
            address: LinkAddr(address),
            kind,
            size,
            percpu,
        }
    }

    /// The first index above `index` with another address.
    fn partition_point_from(&self, index: usize, address: u64) -> usize {
        let near = (index + 1..self.tables.count)
            .take(8)
            .find(|next| self.address(*next) != address);
        near.unwrap_or_else(|| self.partition_point(|candidate| candidate <= address))
    }

    /// Where the compressed name of symbol `index` lies in the names.
    fn compressed(&self, index: usize) -> Range<usize> {
        let marker = self.tables.markers.get(self.data(), index / MARKER_STEP);
        let mut at = marker.unwrap_or(0);
        for _ in 0..index % MARKER_STEP {
            let Some((len, from)) = name_len(self.names(), at) else {
                return 0..0;
            };
            at = from + len;
        }
        name_len(self.names(), at).map_or(0..0, |(len, from)| from..from + len)
    }

    fn expand(&self, compressed: Range<usize>) -> Vec<u8> {
        let mut expanded = Vec::new();
        self.expand_into(compressed, &mut expanded);
        expanded
    }

    fn expand_into(&self, compressed: Range<usize>, expanded: &mut Vec<u8>) {
        let tokens = self.names().get(compressed).unwrap_or_default();
        for token in tokens {
            expanded
                .extend_from_slice(&self.data()[self.tables.tokens[usize::from(*token)].clone()]);
        }
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        let key = u64::from(NameHash::of(name.as_bytes()).finish()) << 32;
        let first = self.by_name.partition_point(|entry| *entry < key);
        let same = self.by_name[first..]
            .iter()
            .take_while(|entry| *entry >> 32 == key >> 32);
        let index = |entry: &u64| usize::try_from(entry & 0xffff_ffff).unwrap_or(usize::MAX);
        same.map(index)
            .filter(|index| self.expand(self.compressed(*index)).get(1..) == Some(name.as_bytes()))
            .collect()
    }

    fn missing(&self, name: &str) -> SymbolError {
        SymbolError::Missing {
            name: name.to_owned(),
            near: self.near(name),
        }
    }

    /// Names that a user who wrote `name` may have meant, the nearest first.
    fn near(&self, name: &str) -> Vec<String> {
        let stem = name
            .split('.')
            .next()
            .unwrap_or(name)
            .trim_start_matches('_');
        let mut near = Vec::new();
        let (mut at, mut expanded) = (0, Vec::new());
        while let Some((len, from)) = name_len(self.names(), at) {
            at = from + len;
            expanded.clear();
            self.expand_into(from..at, &mut expanded);
            let candidate = expanded
                .get(1..)
                .and_then(|name| std::str::from_utf8(name).ok())
                .unwrap_or_default();
            let mistyped = nearly(candidate, name);
            if mistyped || stem.len() > 2 && candidate.contains(stem) {
                near.push((
                    !mistyped,
                    candidate.len().abs_diff(name.len()),
                    candidate.to_owned(),
                ));
            }
        }
        near.sort();
        near.dedup();
        near.into_iter()
            .take(NEAR_NAMES)
            .map(|(.., name)| name)
            .collect()
    }
}

impl fmt::Debug for Symbols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Symbols")
            .field("count", &self.tables.count)
            .field("encoding", &self.tables.encoding)
            .finish_non_exhaustive()
    }
}

/// Whether one changed, added or dropped character, or two neighbours swapped, turns `a` into `b`.
fn nearly(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let head = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (a, b) = (&a[head..], &b[head..]);
    let tail = a
        .iter()
        .rev()
        .zip(b.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let (a, b) = (&a[..a.len() - tail], &b[..b.len() - tail]);
    a.len() <= 1 && b.len() <= 1 || a.len() == 2 && b.len() == 2 && a[0] == b[1] && a[1] == b[0]
}

#[cfg(test)]
mod tests;
