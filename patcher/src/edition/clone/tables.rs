//! What the kernel is told of a clone: how to unwind it, and its entries of the exception and bug tables.

use super::moved::{Moved, To};
use super::original::{Original, TableEntry};
use super::refused::Refused;
use crate::addr::LinkAddr;
use crate::edition::object::OrcEntry;
use crate::kernel::image::Image;

/// An entry of a table, with where its distances lead.
pub(super) struct Row {
    pub(super) bytes: Vec<u8>,
    pub(super) fields: Vec<(usize, To)>,
}

/// The unwind entries of `moved`, which lies `base` bytes into the code: what holds at an instruction is what held where it was.
pub(super) fn unwinding(image: &Image, slide: u64, moved: &Moved, base: u64) -> Vec<OrcEntry> {
    // A kernel without a table has none to be told.
    let Ok(table) = image.orc() else {
        return Vec::new();
    };
    let mut entries: Vec<OrcEntry> = Vec::new();
    let mut put = |offset: u64, entry: Vec<u8>| {
        if entries.last().is_none_or(|last| last.entry != entry) {
            let offset = base + offset;
            entries.push(OrcEntry {
                section: super::TEXT,
                offset,
                entry,
            });
        }
    };
    for part in &moved.parts {
        for (offset, original) in &part.rules {
            let link = LinkAddr(original.0.wrapping_sub(slide));
            let entry = table.entry(link.0).map(<[u8]>::to_vec);
            put(*offset, entry.unwrap_or_else(|| table.silence()));
        }
        put(part.range.end, table.silence());
    }
    entries
}

/// The entries of the exception table. One about no instruction of the function is for code that an alternative took the place of.
pub(super) fn fixups(original: &Original, moved: &Moved) -> Result<Vec<Row>, Refused> {
    let mut rows = Vec::new();
    for entry in original.parts.iter().flat_map(|part| &part.faults) {
        let Some(here) = moved.instruction(entry.at) else {
            continue;
        };
        let mut fields = vec![(entry.insn, To::Here(here, entry.at))];
        for (field, to) in &entry.leads {
            fields.push((*field, moved.fixup(original, entry.at, *to)?));
        }
        rows.push(row(entry, fields));
    }
    Ok(rows)
}

/// The entries of the bug table.
pub(super) fn bugs(original: &Original, moved: &Moved) -> Vec<Row> {
    let entries = original.parts.iter().flat_map(|part| &part.bugs);
    let rows = entries.filter_map(|entry| {
        let here = moved.instruction(entry.at)?;
        let leads = entry
            .leads
            .iter()
            .map(|(field, to)| (*field, To::There(*to)));
        let here = (entry.insn, To::Here(here, entry.at));
        Some(row(entry, leads.chain([here]).collect()))
    });
    rows.collect()
}

fn row(entry: &TableEntry, fields: Vec<(usize, To)>) -> Row {
    let bytes = entry.bytes.clone();
    Row { bytes, fields }
}
