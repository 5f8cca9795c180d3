//! The places in kernel text that the kernel itself patches, or keeps an entry about.
//!
//! The tables are those of the image; sizes of their entries come from the kernel's types, never from its version. A table
//! that does not fit its entries is refused, and so is a section that is called one of sites and not known here: what it
//! changes would go unseen. Sources: kernel `arch/x86/kernel/alternative.c`, `include/linux/jump_label.h`,
//! `static_call_types.h`, `arch/x86/include/asm/{extable,bug,runtime-const}.h`.

mod shape;

use std::fmt;
use std::ops::Range;

use self::shape::{At, Len, Table, section_shape, symbol_shapes};
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

/// One entry of a table.
pub(crate) struct Entry<'a> {
    pub(crate) site: Site,
    /// Where the entry itself is: its distances are relative to their own fields.
    pub(crate) at: LinkAddr,
    pub(crate) bytes: &'a [u8],
    /// The table's name: its section, or the symbol at its beginning.
    pub(crate) table: &'a str,
}

impl Entry<'_> {
    /// What the signed 32-bit distance at offset `field` leads to.
    pub(crate) fn relative(&self, field: u64) -> Option<LinkAddr> {
        let distance = le_i32(self.bytes, usize::try_from(field).ok()?)?;
        self.at.checked_add(field)?.checked_offset(distance.into())
    }
}

/// Why the tables cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
    /// A section of patch sites that is not known here: what it would change could not be told.
    #[error("the kernel patches itself by section {table}, which is not known here")]
    Unknown {
        /// The section.
        table: String,
    },
    /// A table has a beginning but no end, or lies in no section.
    #[error("table {table} is not where the symbols say")]
    Lost {
        /// The symbol at its beginning.
        table: String,
    },
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

    /// The first `count` places in `code` where a traced function has just been entered.
    pub(crate) fn entered(&self, code: &Range<LinkAddr>, count: usize) -> Vec<LinkAddr> {
        let sites = self.first(SiteKind::Fentry, code, count).into_iter();
        sites.map(|site| site.range.start).collect()
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
        self.entries_of(table, range).map(|entry| entry.site)
    }

    /// The entries of `kind` whose sites share at least one byte with `range`, in the order of their tables.
    pub(crate) fn entries<'a>(
        &'a self,
        kind: SiteKind,
        range: &Range<LinkAddr>,
    ) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        let range = range.clone();
        let tables = self.tables.iter().filter(move |table| table.kind == kind);
        tables.flat_map(move |table| self.entries_of(table, &range))
    }

    fn entries_of<'a>(
        &'a self,
        table: &'a Table,
        range: &Range<LinkAddr>,
    ) -> impl Iterator<Item = Entry<'a>> + use<'a> {
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
            (range.start < end).then_some(Entry {
                site: Site {
                    kind: table.kind,
                    range: LinkAddr(start)..end,
                },
                at: LinkAddr(here.wrapping_sub(at as u64)),
                bytes: entry,
                table: &table.name,
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{LinkAddr, SiteKind};
    use crate::kernel::image::Image;
    use crate::kernel::testing::{Form, Part, RODATA, TEXT, elf, parts, relative};

    const TABLE: u64 = RODATA + 0x8_2000;

    /// The image with one more table.
    fn image(name: &'static str, bytes: Vec<u8>) -> Result<Image, String> {
        let mut parts = parts(Form::New);
        parts.push(Part {
            name,
            at: TABLE,
            bytes,
            code: false,
        });
        Image::parse(Arc::new(elf(&parts, &[&[], &[], &[]])))
            .map_err(|error| error.to_string())
            .and_then(|image| match image.shipped() {
                Ok(_) => Ok(image),
                Err(error) => Err(error.to_string()),
            })
    }

    fn check(name: &'static str, bytes: Vec<u8>, kind: SiteKind, len: u64) {
        let image = image(name, bytes).unwrap();
        let start = TEXT + 0x1100;
        let touching = |from: u64, to: u64| {
            let sites = image.shipped().unwrap().sites();
            let found = sites.within(LinkAddr(from)..LinkAddr(to));
            found
                .into_iter()
                .map(|site| (site.kind, site.range.start.0, site.range.end.0))
                .collect::<Vec<_>>()
        };
        let site = vec![(kind, start, start + len)];
        assert_eq!(touching(start, start + 1), site, "{name}");
        assert_eq!(touching(start + len - 1, start + 64), site, "{name}");
        assert_eq!(touching(start - 64, start), [], "{name}");
        assert_eq!(touching(start + len, start + 64), [], "{name}");
    }

    #[test]
    fn sites_are_as_long_as_their_tables_say() {
        let site = TEXT + 0x1100;
        let mut alternative = relative(TABLE, 14, &[site]);
        alternative[12] = 9;
        check(".altinstructions", alternative, SiteKind::Alternative, 9);
        check(
            ".retpoline_sites",
            relative(TABLE, 4, &[site]),
            SiteKind::Retpoline,
            5,
        );
        check(
            ".ibt_endbr_seal",
            relative(TABLE, 4, &[TEXT + 0x2000, site]),
            SiteKind::IbtEndbr,
            4,
        );
        check(
            ".smp_locks",
            relative(TABLE, 4, &[site]),
            SiteKind::SmpLock,
            1,
        );
        check(
            "__ex_table",
            relative(TABLE, 12, &[site]),
            SiteKind::Extable,
            1,
        );
        check(
            "runtime_shift_d_hash_shift",
            relative(TABLE, 4, &[site]),
            SiteKind::RuntimeConst,
            1,
        );
        check(
            "runtime_ptr_USER_PTR_MAX",
            relative(TABLE, 4, &[site]),
            SiteKind::RuntimeConst,
            8,
        );
    }

    #[test]
    fn tables_that_are_not_understood_are_refused() {
        let refused = |name, len, want: &str| {
            let got = image(name, vec![0; len]).err().unwrap_or_default();
            assert!(got.contains(want), "{got}");
        };
        refused(
            ".cfi_sites",
            8,
            "section .cfi_sites, which is not known here",
        );
        refused(
            ".altinstructions",
            15,
            "has 0xf bytes, which is no multiple of its entries of 14",
        );
        refused(
            ".parainstructions",
            16,
            "the kernel has no type paravirt_patch_site",
        );
    }
}
