//! The kernel's symbols by name and by address, from kallsyms.
//!
//! A name that several symbols bear is an error, never the first match: callers that know better say which
//! one they mean by its position among its namesakes, in the order of addresses.
//! The index costs eight bytes for each symbol; names stay compressed in the image.

use std::fmt;
use std::ops::Range;

use super::bytes::le_i32;
use super::image::{Bytes, Section};
use super::kallsyms::{IMAGE_BASE, MARKER_STEP, MAX_NAME, Steps, Tables, name_len};
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

/// A hash that can be put together from the hashes of a name's tokens.
#[derive(Clone, Copy)]
struct NameHash {
    sum: u64,
    /// `FACTOR` to the power of the length.
    shift: u64,
}

impl NameHash {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    const EMPTY: Self = Self { sum: 0, shift: 1 };

    fn of(bytes: &[u8]) -> Self {
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

    fn finish(self) -> u32 {
        let [.., a, b, c, d] = (self.sum ^ self.sum >> 29)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
            .to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

/// The hashes of all names without expanding any: each token is hashed once, and a name's is put together from them.
fn index_names(data: &[u8], tables: &Tables) -> Result<Vec<u64>, KallsymsError> {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{KallsymsError, LinkAddr, Section, Space, SymbolError, Symbols};
    use crate::kernel::testing::kallsyms::{BEFORE_KALLSYMS, ORDERS, Order, kallsyms_in};
    use crate::kernel::testing::{FORMS, Form, RODATA, Sym, TEXT, symbols};

    fn parse(bytes: Vec<u8>) -> Result<Symbols, KallsymsError> {
        let file = 0..bytes.len();
        let range = LinkAddr(RODATA)..LinkAddr(RODATA + bytes.len() as u64);
        let section = Section {
            name: ".rodata".to_owned(),
            range,
            file,
            executable: false,
        };
        Symbols::parse(Arc::new(bytes), &section)
    }

    fn kallsyms(form: Form, symbols: &[Sym]) -> Vec<u8> {
        crate::kernel::testing::kallsyms::kallsyms(form, symbols)
    }

    fn of(form: Form) -> Symbols {
        parse(kallsyms(form, &symbols(form))).unwrap()
    }

    /// The symbols as `order` has them: per-CPU ones in the image where addresses are told from their own places.
    fn symbols_in(order: Order) -> Vec<Sym> {
        let mut all = symbols(Form::New);
        if matches!(order, Order::FromItself | Order::Tight) {
            let percpu = |(at, kind, name): &Sym| (PERCPU + at, *kind, name.clone());
            let (low, high) = all.split_at(all.partition_point(|(at, ..)| *at < TEXT));
            let start = (PERCPU, 'A', "__per_cpu_start".to_owned());
            let moved = low.iter().map(percpu);
            all = high.iter().cloned().chain([start]).chain(moved).collect();
        }
        all
    }

    /// Where per-CPU symbols are linked by such kernels.
    const PERCPU: u64 = RODATA + 0x10_0000;

    #[test]
    fn every_symbol_is_found_in_every_layout() {
        for order in ORDERS {
            let want = symbols_in(order);
            let found = parse(kallsyms_in(order, &want)).unwrap();
            assert_eq!(found.len(), want.len());
            for (symbol, (address, kind, name)) in found.iter().zip(&want) {
                assert_eq!(
                    (symbol.address.0, char::from(symbol.kind), &symbol.name),
                    (*address, *kind, name)
                );
                // The end of the per-CPU symbols is one of the image where those are.
                let percpu = *kind == 'A' && *address != PERCPU + 0x180;
                assert_eq!(symbol.percpu, percpu, "{name}");
                if name == "runqueues" {
                    assert_eq!(found.percpu_offset(&symbol), 0x40, "{order:?}");
                }
                let space = if percpu { Space::PerCpu } else { Space::Image };
                assert_eq!(found.space(&symbol), space, "{name}");
                if name != "twin" {
                    assert_eq!(found.lookup(name).as_ref(), Ok(&symbol), "{order:?}");
                }
            }
        }
    }

    #[test]
    fn a_search_that_anybody_may_drag_out_ends() {
        // Tokens that are whole, and before them nothing but what could be markers.
        let order = Order::New;
        let bytes = kallsyms_in(order, &symbols_in(order));
        let found = parse(bytes.clone()).unwrap();
        let tokens = found.tables.tokens[0].start;
        let mut all: Vec<u8> = (0..8_u32 << 20)
            .flat_map(|word| (word % 4 * 0x8000).to_le_bytes())
            .collect();
        all.extend(&bytes[tokens..]);
        assert!(matches!(parse(all), Err(KallsymsError::Endless)));
    }

    #[test]
    fn long_names_have_two_bytes_of_length() {
        let mut all = symbols(Form::New);
        let long = "x".repeat(300);
        all[20].2.clone_from(&long);
        let found = parse(kallsyms(Form::New, &all)).unwrap();
        assert_eq!(found.lookup(&long).unwrap().address.0, all[20].0);
        assert_eq!(found.lookup(&all[21].2).unwrap().address.0, all[21].0);
    }

    #[test]
    fn a_name_that_would_be_endless_is_damaged() {
        let mut all = symbols(Form::New);
        all[20].2 = "x".repeat(513);
        let found = parse(kallsyms(Form::New, &all));
        assert!(matches!(found, Err(KallsymsError::Name { index: 20 })));
        all[20].2 = "x".repeat(512);
        assert!(parse(kallsyms(Form::New, &all)).is_ok());
    }

    #[test]
    fn an_ambiguous_name_is_never_the_first_match() {
        let found = of(Form::OldSorted);
        let Err(SymbolError::Ambiguous { candidates, .. }) = found.lookup("twin") else {
            panic!("not ambiguous")
        };
        assert_eq!(
            candidates,
            [(1, LinkAddr(TEXT + 0x340)), (2, LinkAddr(TEXT + 0x380))]
        );
        assert_eq!(
            found.lookup_nth("twin", 2).unwrap().address,
            LinkAddr(TEXT + 0x380)
        );
        for position in [0, 3] {
            let none = Err(SymbolError::Position {
                name: "twin".to_owned(),
                position,
                count: 2,
            });
            assert_eq!(found.lookup_nth("twin", position), none);
        }
        assert!(found.optional("twin").is_err());
        assert_eq!(found.optional("triplet"), Ok(None));
    }

    #[test]
    fn a_missing_name_tells_of_near_ones() {
        let found = of(Form::New);
        let check = |name: &str, want: &str| match found.lookup(name) {
            Err(SymbolError::Missing { near, .. }) => {
                assert_eq!(near.first().map(String::as_str), Some(want))
            }
            other => panic!("{other:?}"),
        };
        check("victm", "victim");
        check("vcitim", "victim");
        check("victim.constprop.0", "victim");
        check("per_cpu_offset", "__per_cpu_offset");
    }

    #[test]
    fn namesakes_are_told_apart_by_their_neighbours() {
        for form in FORMS {
            let found = of(form);
            let seen: Vec<_> = found
                .namesakes("twin")
                .into_iter()
                .map(|twin| {
                    (
                        twin.position,
                        twin.symbol.address.0 - TEXT,
                        twin.before,
                        twin.after,
                    )
                })
                .collect();
            let (before, after) = ("victim".to_owned(), "thread_stack_free_rcu".to_owned());
            let want = [
                (1, 0x340, Some(before.clone()), Some(after.clone())),
                (2, 0x380, Some(before), Some(after)),
            ];
            assert_eq!(seen, want, "{form:?}");
            assert_eq!(found.namesakes("triplet"), []);
        }
    }

    #[test]
    fn what_lies_below_the_image_is_per_cpu_or_absolute() {
        let mut all = symbols(Form::New);
        let last = all
            .iter()
            .position(|(.., name)| name == "__per_cpu_end")
            .unwrap();
        all.insert(last + 1, (0x5000, 'A', "a_value".to_owned()));
        let found = parse(kallsyms(Form::New, &all)).unwrap();
        let space = |name: &str| found.space(&found.lookup(name).unwrap());
        assert_eq!(space("pcpu_hot"), Space::PerCpu);
        assert_eq!(space("a_value"), Space::Absolute);
        assert_eq!(space("victim"), Space::Image);
        // The last of them does not reach up to the image.
        assert_eq!(found.lookup("a_value").unwrap().size, 0);
        assert_eq!(found.containing(LinkAddr(0x5001)), None);
        assert_eq!(
            found
                .containing(LinkAddr(0x21))
                .map(|(symbol, at)| (symbol.name, at)),
            Some(("cea_exception_stacks".to_owned(), 1))
        );
    }

    #[test]
    fn addresses_belong_to_symbols() {
        let found = of(Form::Old);
        let at = |address: u64| {
            found
                .containing(LinkAddr(address))
                .map(|(symbol, offset)| (symbol.name, offset))
        };
        assert_eq!(at(TEXT + 0x33f), Some(("victim".to_owned(), 0x3f)));
        assert_eq!(at(TEXT + 0x340), Some(("twin".to_owned(), 0)));
        assert_eq!(at(u64::MAX), None);
        assert_eq!(found.lookup("victim").unwrap().size, 0x40);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let mut bytes = kallsyms(Form::New, &symbols(Form::New));
        assert!(matches!(
            parse(bytes[..0x4000].to_vec()),
            Err(KallsymsError::NoTokens)
        ));
        // The last name's length says that it goes on: markers and names no longer agree.
        let found = parse(bytes.clone()).unwrap();
        let markers = found.tables.markers.at;
        bytes[markers + 4] ^= 1;
        assert!(matches!(
            parse(bytes.clone()),
            Err(KallsymsError::NoNames { .. })
        ));
        bytes[markers + 4] ^= 1;
        // Addresses that do not ascend are no addresses.
        bytes[found.tables.offsets.start + 3] = 0x7f;
        assert!(matches!(
            parse(bytes),
            Err(KallsymsError::NoAddresses { .. })
        ));
    }

    proptest! {
        #[test]
        fn damage_never_panics(
            order in 0..ORDERS.len(),
            changes in proptest::collection::vec((0..usize::MAX, any::<u8>()), 1..6),
            cut: Option<usize>,
        ) {
            let mut bytes = kallsyms_in(ORDERS[order], &symbols_in(ORDERS[order]));
            let len = bytes.len();
            for (at, value) in changes {
                bytes[BEFORE_KALLSYMS + at % (len - BEFORE_KALLSYMS)] = value;
            }
            bytes.truncate(cut.map_or(len, |cut| cut % len));
            if let Ok(symbols) = parse(bytes) {
                let _ = symbols.lookup("victim");
                let _ = symbols.lookup("nothing of the kind");
                let _ = symbols.containing(LinkAddr(TEXT + 0x301));
                let _ = symbols.iter().count();
            }
        }
    }
}
