//! The parts of a kernel that its symbols bound, copied from memory: build-id, types, unwind table. Sections have no headers there; the ones
//! that an address can be in are made up from symbols too (kernel `include/asm-generic/vmlinux.lds.h`).

use std::ops::Range;
use std::sync::Arc;

use super::{RecoverError, Recovered};
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::entered::entered;
use crate::kernel::image::{Section, build_id_in};
use crate::kernel::orc::{OrcError, OrcTable};
use crate::kernel::symbols::Symbols;
use crate::kernel::types::Types;
use crate::x86::paging::{PageTables, PagingError};

/// More bytes than any part of a kernel has that is copied.
const MOST: u64 = 64 << 20;
/// What needs types needs this.
const NEED_BTF: &str = "its memory has nothing from __start_BTF on (CONFIG_DEBUG_INFO_BTF)";

/// The kernel's sections as its symbols tell them, those within others first: name, start, end, whether it holds instructions.
const SECTIONS: [(&str, &str, &str, bool); 7] = [
    (".text", "_text", "_etext", true),
    (".rodata", "__start_rodata", "__end_rodata", false),
    (".data", "_sdata", "_edata", false),
    (".init.text", "_sinittext", "_einittext", true),
    (".init.data", "__init_begin", "__init_end", false),
    (".bss", "__bss_start", "__bss_stop", false),
    ("image", "_text", "_end", false),
];

/// A guest's memory, where its kernel has moved by `slide`.
pub(super) struct Memory<'a, R: ?Sized> {
    pub(super) guest: &'a R,
    pub(super) tables: PageTables,
    pub(super) slide: u64,
}

impl<R: ReadPhys + ?Sized> Memory<'_, R> {
    fn read(&self, at: LinkAddr, buf: &mut [u8]) -> Result<(), PagingError> {
        let at = Gva(at.0.wrapping_add(self.slide));
        self.tables.read(self.guest, at, buf)
    }
}

/// Parts of one kernel.
struct Parts<'a, R: ?Sized> {
    memory: &'a Memory<'a, R>,
    symbols: &'a Symbols,
    /// All of the kernel.
    whole: Range<LinkAddr>,
}

/// All parts.
pub(super) fn all<R: ReadPhys + ?Sized>(
    memory: &Memory<'_, R>,
    symbols: Symbols,
) -> Result<Recovered, RecoverError> {
    let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address);
    let parts = Parts {
        memory,
        symbols: &symbols,
        whole: at("_text")?..at("_end")?,
    };
    let notes = parts.between("notes", "__start_notes", "__stop_notes")?;
    let build_id = match notes {
        Some(range) => build_id_in(&parts.copy(&range)?, range.start),
        None => None,
    };
    let types = match parts.between("types", "__start_BTF", "__stop_BTF")? {
        Some(range) => {
            let bytes = parts.copy(&range)?;
            let section = 0..bytes.len();
            Types::parse(Arc::new(bytes), section)?
        }
        None => Types::absent(NEED_BTF),
    };
    let orc = parts.orc(&types)?;
    let sections = parts.sections()?;
    Ok(Recovered {
        sections,
        build_id: build_id.ok_or(RecoverError::BuildId)?,
        types,
        orc,
        symbols,
    })
}

impl<R: ReadPhys + ?Sized> Parts<'_, R> {
    /// The part of the kernel from symbol `start` to symbol `end`, where it has both.
    fn between(
        &self,
        part: &'static str,
        start: &str,
        end: &str,
    ) -> Result<Option<Range<LinkAddr>>, RecoverError> {
        let bounds = (self.symbols.optional(start)?, self.symbols.optional(end)?);
        let (Some(start), Some(end)) = bounds else {
            return Ok(None);
        };
        let range = start.address..end.address;
        let within = self.whole.start <= range.start && range.end <= self.whole.end;
        if within && range.start < range.end {
            Ok(Some(range))
        } else {
            Err(RecoverError::Part { part, range })
        }
    }

    fn copy(&self, range: &Range<LinkAddr>) -> Result<Vec<u8>, RecoverError> {
        let len = range.end.offset_from(range.start);
        let len = len.filter(|len| *len <= MOST);
        let len = len.and_then(|len| usize::try_from(len).ok());
        let mut bytes = vec![
            0;
            len.ok_or_else(|| RecoverError::Part {
                part: "part that is copied",
                range: range.clone(),
            })?
        ];
        self.memory.read(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// How to unwind; a kernel can be seen without that.
    fn orc(&self, types: &Types) -> Result<Result<OrcTable, OrcError>, RecoverError> {
        let (ips, entries) = ("__start_orc_unwind_ip", "__start_orc_unwind");
        let ips = self.between("unwind table's addresses", ips, "__stop_orc_unwind_ip")?;
        let entries = self.between("unwind table", entries, "__stop_orc_unwind")?;
        let (Some(ips), Some(entries)) = (ips, entries) else {
            let section = ".orc_unwind";
            return Ok(Err(OrcError::Absent { section }));
        };
        let text = self.between("text", "_text", "_etext")?;
        let text = text.unwrap_or_else(|| self.whole.clone());
        Ok(OrcTable::recovered(
            ips.start,
            self.copy(&ips)?,
            self.copy(&entries)?,
            types,
            &self.whole,
            // Of what lies behind the text nothing may be left.
            |_, count| {
                entered(self.symbols, &text, count, |at, head| {
                    self.memory.read(at, head).is_ok()
                })
            },
        ))
    }

    fn sections(&self) -> Result<Vec<Section>, RecoverError> {
        let mut sections = Vec::new();
        for (name, start, end, executable) in SECTIONS {
            let range = self.between("section", start, end)?;
            sections.extend(range.map(|range| Section {
                name: name.to_owned(),
                range,
                file: 0..0,
                executable,
            }));
        }
        Ok(sections)
    }
}
