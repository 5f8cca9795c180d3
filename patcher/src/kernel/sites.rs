//! The places in kernel text that the kernel itself patches, or keeps an entry about.
//!
//! The tables are those of the image; sizes of their entries come from the kernel's types, never from its version. An
//! executable section of patch sites that is unknown here would go unseen: reading the sites therefore refuses an image
//! with a table whose shape does not fit. Sources: kernel `arch/x86/kernel/alternative.c`, `include/linux/jump_label.h`,
//! `static_call_types.h`, `arch/x86/include/asm/{extable,bug,runtime-const}.h`.

use std::fmt;
use std::ops::Range;

use super::bytes::{le_i32, le_u64};
use super::image::{Bytes, Section, bytes_at};
use super::symbols::Symbols;
use super::types::{TypeError, Types};
use crate::addr::LinkAddr;

/// No site is longer, in bytes: the length of one fits a byte.
const LONGEST_SITE: u64 = 0x100;

/// What the kernel does at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// Replaced at boot as the CPU's features demand (`.altinstructions`).
    Alternative,
    /// Replaced at boot by a direct call or inline code (`.parainstructions`).
    Paravirt,
    /// An indirect branch through a thunk, replaced at boot as the mitigations demand (`.retpoline_sites`).
    Retpoline,
    /// A return, replaced at boot as the mitigations demand (`.return_sites`).
    ReturnThunk,
    /// A direct call, changed only if calls are counted as a mitigation (`.call_sites`).
    Call,
    /// A branch that a static key switches at any time.
    JumpLabel,
    /// A call or jump whose target changes at any time, or its trampoline.
    StaticCall,
    /// Where the function tracer puts its call.
    Fentry,
    /// A `lock` prefix, dropped on a machine with one CPU.
    SmpLock,
    /// An instruction whose faults are fixed up; its bytes do not change.
    Extable,
    /// A `ud2` with an entry in the bug table; its bytes do not change.
    Bug,
    /// An `endbr64` that is overwritten at boot where the CPU has indirect branch tracking.
    IbtEndbr,
    /// A constant that is written into an instruction at boot (sections `runtime_*`).
    RuntimeConst,
}

/// One such place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// What happens there.
    pub kind: SiteKind,
    /// The bytes concerned.
    pub range: Range<LinkAddr>,
}

/// Why the tables cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SitesError {
    /// The size of an entry is not known.
    #[error("the entries of {table} cannot be understood: {cause}")]
    Entry {
        /// The table.
        table: String,
        /// What is missing.
        cause: TypeError,
    },
    /// A table is no multiple of its entries.
    #[error("table {table} has {len:#x} bytes, which is no multiple of its entries of {entry}")]
    Shape {
        /// The table.
        table: String,
        /// Its bytes.
        len: usize,
        /// Bytes of one entry.
        entry: usize,
    },
    /// A table has a beginning but no end, or lies in no section.
    #[error("table {table} is not where the symbols say")]
    Lost {
        /// The symbol at its beginning.
        table: String,
    },
}

/// How an entry says where its site is.
#[derive(Clone, Copy, Debug)]
enum At {
    /// A signed 32-bit distance from the entry's own field at this offset.
    Relative(usize),
    /// A 64-bit address at this offset.
    Absolute(usize),
}

/// How an entry says how long its site is.
#[derive(Clone, Copy, Debug)]
enum Len {
    Fixed(u64),
    /// A byte of the entry at this offset.
    Byte(usize),
    /// As long as the instruction that the image has there: two bytes for a short jump or NOP, else five.
    JumpLabel,
    /// As long as the call, jump or `endbr64` that the image has there.
    Branch,
}

#[derive(Debug)]
struct Table {
    kind: SiteKind,
    file: Range<usize>,
    address: u64,
    entry: usize,
    at: At,
    len: Len,
    /// Offset of the field that says where the kernel may go on from a site, relative to the field itself.
    to: Option<usize>,
}

/// All patch sites of one image. Asking costs one pass over the tables and no memory beyond the answer.
pub struct Sites {
    bytes: Bytes,
    sections: Vec<Section>,
    tables: Vec<Table>,
    /// Ranges of code whose every byte may change: the static calls' trampolines.
    trampolines: Vec<Range<LinkAddr>>,
}

impl Sites {
    pub(crate) fn parse(
        bytes: Bytes,
        sections: &[Section],
        symbols: &Symbols,
        types: &Types,
    ) -> Result<Self, SitesError> {
        let mut tables = Vec::new();
        for section in sections {
            if let Some(shape) = section_shape(&section.name, types)? {
                tables.push(shape.table(
                    &section.name,
                    section.file.clone(),
                    section.range.start.0,
                )?);
            }
        }
        for (start, stop, shape) in symbol_shapes(types)? {
            let Ok(start_at) = symbols.lookup(start) else {
                continue;
            };
            let lost = || SitesError::Lost {
                table: start.to_owned(),
            };
            let stop_at = symbols.lookup(stop).map_err(|_| lost())?;
            let file = file_range(sections, start_at.address..stop_at.address).ok_or_else(lost)?;
            tables.push(shape.table(start, file, start_at.address.0)?);
        }
        let trampoline = |name: &str| symbols.lookup(name).ok().map(|symbol| symbol.address);
        let trampolines = match (
            trampoline("__static_call_text_start"),
            trampoline("__static_call_text_end"),
        ) {
            (Some(start), Some(end)) => vec![start..end],
            _ => Vec::new(),
        };
        Ok(Self {
            bytes,
            sections: sections.to_vec(),
            tables,
            trampolines,
        })
    }

    /// The sites that share at least one byte with `range`, in the order of their addresses.
    #[must_use]
    pub fn within(&self, range: Range<LinkAddr>) -> Vec<Site> {
        let mut found: Vec<Site> = self
            .tables
            .iter()
            .flat_map(|table| self.of_table(table, &range))
            .collect();
        let touched = |code: &&Range<LinkAddr>| code.start < range.end && range.start < code.end;
        let trampolines = self.trampolines.iter().filter(touched);
        found.extend(trampolines.map(|code| Site {
            kind: SiteKind::StaticCall,
            range: code.clone(),
        }));
        found.sort_by_key(|site| site.range.start);
        found
    }

    /// The sites from which the kernel may go on at a byte of `range` without a branch in its text that says so: static
    /// branches that lead there when switched on, and instructions whose faults are fixed up there.
    #[must_use]
    pub fn leading_into(&self, range: &Range<LinkAddr>) -> Vec<(SiteKind, LinkAddr)> {
        let data = (*self.bytes).as_ref();
        let mut found = Vec::new();
        for table in &self.tables {
            let Some(to) = table.to else { continue };
            let entries = data
                .get(table.file.clone())
                .unwrap_or_default()
                .chunks_exact(table.entry);
            for (index, entry) in entries.enumerate() {
                let target = relative(table, index, entry, to);
                if target.is_some_and(|target| range.contains(&LinkAddr(target)))
                    && let Some(from) = site_address(table, index, entry)
                {
                    found.push((table.kind, LinkAddr(from)));
                }
            }
        }
        found
    }

    /// The first `count` sites of `kind` in `range`, in the order of their table.
    #[must_use]
    pub fn first(&self, kind: SiteKind, range: &Range<LinkAddr>, count: usize) -> Vec<Site> {
        let tables = self.tables.iter().filter(|table| table.kind == kind);
        tables
            .flat_map(|table| self.of_table(table, range))
            .take(count)
            .collect()
    }

    /// How many entries the tables of `kind` have.
    #[must_use]
    pub fn count(&self, kind: SiteKind) -> usize {
        self.tables
            .iter()
            .filter(|table| table.kind == kind)
            .map(|table| table.file.len() / table.entry)
            .sum()
    }

    fn of_table<'a>(
        &'a self,
        table: &'a Table,
        range: &Range<LinkAddr>,
    ) -> impl Iterator<Item = Site> + use<'a> {
        let data = (*self.bytes).as_ref();
        let range = range.clone();
        // A kernel has some hundred thousand entries: each is turned away by one addition and one comparison.
        let first = range.start.0.saturating_sub(LONGEST_SITE);
        let span = range.end.0.saturating_sub(first);
        let (at, relative) = match table.at {
            At::Relative(at) => (at, true),
            At::Absolute(at) => (at, false),
        };
        let mut field = table.address.wrapping_add(at as u64);
        let entries = data
            .get(table.file.clone())
            .unwrap_or_default()
            .chunks_exact(table.entry);
        entries.filter_map(move |entry| {
            let here = field;
            field = field.wrapping_add(table.entry as u64);
            let start = if relative {
                here.wrapping_add_signed(le_i32(entry, at)?.into())
            } else {
                le_u64(entry, at)?
            };
            if start.wrapping_sub(first) >= span {
                return None;
            }
            let end = LinkAddr(start.checked_add(self.site_len(table, entry, start))?);
            (range.start < end).then_some(Site {
                kind: table.kind,
                range: LinkAddr(start)..end,
            })
        })
    }

    fn site_len(&self, table: &Table, entry: &[u8], start: u64) -> u64 {
        let text = |len: u64| {
            let range = LinkAddr(start).range(len)?;
            bytes_at((*self.bytes).as_ref(), &self.sections, range, true)
        };
        match table.len {
            Len::Fixed(len) => len,
            Len::Byte(at) => entry.get(at).copied().map_or(1, u64::from),
            Len::JumpLabel => match text(2) {
                Some([0xeb, _] | [0x66, 0x90]) => 2,
                _ => 5,
            },
            // A conditional jump to a thunk has six bytes, a call or jump five, `endbr64` four.
            Len::Branch => match text(2) {
                Some([0x0f, 0x80..=0x8f]) => 6,
                Some([0xf3, 0x0f]) => 4,
                Some([0x2e, _]) => 6,
                _ => 5,
            },
        }
    }
}

impl fmt::Debug for Sites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self
            .tables
            .iter()
            .map(|table| (table.kind, table.file.len() / table.entry));
        f.debug_map().entries(counts).finish()
    }
}

fn site_address(table: &Table, index: usize, entry: &[u8]) -> Option<u64> {
    match table.at {
        At::Absolute(at) => le_u64(entry, at),
        At::Relative(at) => relative(table, index, entry, at),
    }
}

/// What the field at offset `at` of an entry refers to, relative to itself.
fn relative(table: &Table, index: usize, entry: &[u8], at: usize) -> Option<u64> {
    let field = table
        .address
        .checked_add(u64::try_from(index * table.entry + at).ok()?)?;
    field.checked_add_signed(le_i32(entry, at)?.into())
}

/// The shape of one table's entries.
struct Shape {
    kind: SiteKind,
    entry: usize,
    at: At,
    len: Len,
    to: Option<usize>,
}

impl Shape {
    const fn relative(kind: SiteKind, entry: usize, len: Len) -> Self {
        Self {
            kind,
            entry,
            at: At::Relative(0),
            len,
            to: None,
        }
    }

    fn table(&self, name: &str, file: Range<usize>, address: u64) -> Result<Table, SitesError> {
        // Sections may be padded to their alignment, but never by a whole entry.
        let whole = file.len() / self.entry * self.entry;
        let padded = name == ".parainstructions" || name == ".smp_locks";
        if whole != file.len() && !padded {
            return Err(SitesError::Shape {
                table: name.to_owned(),
                len: file.len(),
                entry: self.entry,
            });
        }
        let file = file.start..file.start + whole;
        Ok(Table {
            kind: self.kind,
            file,
            address,
            entry: self.entry,
            at: self.at,
            len: self.len,
            to: self.to,
        })
    }
}

/// The shape of the table in section `name`, if it is one of patch sites.
fn section_shape(name: &str, types: &Types) -> Result<Option<Shape>, SitesError> {
    let ask = |answer: Result<u64, TypeError>| {
        let answer = answer.map_err(|cause| SitesError::Entry {
            table: name.to_owned(),
            cause,
        })?;
        Ok::<usize, SitesError>(usize::try_from(answer).unwrap_or(usize::MAX))
    };
    let member = |of: &str, path: &str| ask(types.offset_of(of, path));
    Ok(Some(match name {
        ".altinstructions" => Shape {
            kind: SiteKind::Alternative,
            entry: ask(types.size_of("alt_instr"))?.max(1),
            at: At::Relative(member("alt_instr", "instr_offset")?),
            len: Len::Byte(member("alt_instr", "instrlen")?),
            to: None,
        },
        ".parainstructions" => Shape {
            kind: SiteKind::Paravirt,
            entry: ask(types.size_of("paravirt_patch_site"))?.max(1),
            at: At::Absolute(member("paravirt_patch_site", "instr")?),
            len: Len::Byte(member("paravirt_patch_site", "len")?),
            to: None,
        },
        ".retpoline_sites" => Shape::relative(SiteKind::Retpoline, 4, Len::Branch),
        ".return_sites" => Shape::relative(SiteKind::ReturnThunk, 4, Len::Branch),
        ".call_sites" => Shape::relative(SiteKind::Call, 4, Len::Branch),
        ".ibt_endbr_seal" => Shape::relative(SiteKind::IbtEndbr, 4, Len::Fixed(4)),
        ".smp_locks" => Shape::relative(SiteKind::SmpLock, 4, Len::Fixed(1)),
        "__ex_table" => Shape {
            kind: SiteKind::Extable,
            entry: ask(types.size_of("exception_table_entry"))?.max(1),
            at: At::Relative(member("exception_table_entry", "insn")?),
            len: Len::Fixed(1),
            to: Some(member("exception_table_entry", "fixup")?),
        },
        "__bug_table" => Shape {
            kind: SiteKind::Bug,
            entry: ask(types.size_of("bug_entry"))?.max(1),
            at: At::Relative(member("bug_entry", "bug_addr_disp")?),
            len: Len::Fixed(2),
            to: None,
        },
        _ if name.starts_with("runtime_shift_") => {
            Shape::relative(SiteKind::RuntimeConst, 4, Len::Fixed(1))
        }
        _ if name.starts_with("runtime_") => {
            Shape::relative(SiteKind::RuntimeConst, 4, Len::Fixed(8))
        }
        _ => return Ok(None),
    }))
}

/// The tables that lie inside other sections: the symbols around each, and its shape.
fn symbol_shapes(types: &Types) -> Result<[(&'static str, &'static str, Shape); 3], SitesError> {
    let size = |name: &str| {
        let size = types.size_of(name).map_err(|cause| SitesError::Entry {
            table: name.to_owned(),
            cause,
        })?;
        Ok::<usize, SitesError>(usize::try_from(size).unwrap_or(usize::MAX).max(1))
    };
    let mcount = Shape {
        kind: SiteKind::Fentry,
        entry: 8,
        at: At::Absolute(0),
        len: Len::Fixed(5),
        to: None,
    };
    let jump_target =
        types
            .offset_of("jump_entry", "target")
            .map_err(|cause| SitesError::Entry {
                table: "jump_entry".to_owned(),
                cause,
            })?;
    let jumps = Shape {
        to: Some(usize::try_from(jump_target).unwrap_or(usize::MAX)),
        ..Shape::relative(SiteKind::JumpLabel, size("jump_entry")?, Len::JumpLabel)
    };
    Ok([
        ("__start___jump_table", "__stop___jump_table", jumps),
        (
            "__start_static_call_sites",
            "__stop_static_call_sites",
            Shape::relative(
                SiteKind::StaticCall,
                size("static_call_site")?,
                Len::Fixed(5),
            ),
        ),
        ("__start_mcount_loc", "__stop_mcount_loc", mcount),
    ])
}

/// Where the bytes at `range` are in the file.
fn file_range(sections: &[Section], range: Range<LinkAddr>) -> Option<Range<usize>> {
    let holds =
        |section: &&Section| section.range.start <= range.start && range.end <= section.range.end;
    let section = sections.iter().find(holds)?;
    let start = section
        .file
        .start
        .checked_add(usize::try_from(range.start.offset_from(section.range.start)?).ok()?)?;
    let end = start.checked_add(usize::try_from(range.end.offset_from(range.start)?).ok()?)?;
    (end <= section.file.end).then_some(start..end)
}
