//! The bytes of a unit's tables: a `struct module`, and behind it what it leads to.
//!
//! Symbols are as in an ELF file (`Elf64_Sym`, System V ABI, chapter 4), the first of them meaning nothing; the exception table is
//! sorted, as the kernel looks it up by halving; the unwind table is the unit's, moved: its addresses are distances from their own
//! places. Everything an entry points to lies in the unit's code: the kernel trusts its tables.

use std::ops::Range;

use super::layout::{FixupLayout, Layout, ModuleLayout};
use super::{Fixup, PublishError, Table, Unit};
use crate::addr::Gva;
use crate::edition::link::Placed;
use crate::edition::space::ArenaSpace;
use crate::kernel::bytes::{le_i32, le_u32};
use crate::kernel::locate::Kernel;
use crate::kernel::types::Member;

/// The section with the exception table of an object.
pub const FIXUPS: &str = "__ex_table";
/// The section with the warnings of an object.
pub const BUGS: &str = "__bug_table";
/// Alignment of a `struct module`: a cache line.
const ALIGN: u64 = 64;
/// Bytes of an `Elf64_Sym`.
const SYMBOL: usize = 24;
/// A local function (`ELF64_ST_INFO(STB_LOCAL, STT_FUNC)`).
const FUNCTION: u8 = 2;
/// A section that is not the undefined one; which one means nothing to the kernel.
const SECTION: u16 = 1;
/// A symbol in code, as `nm` writes it.
const TEXT: u8 = b't';

/// What the exception table of a package says, once it was linked.
pub(super) fn fixups(kernel: &Kernel, table: &Table) -> Result<Vec<Fixup>, PublishError> {
    let layout = Layout::resolve(kernel)?.and_then(|layout| layout.fixup);
    let layout = layout.ok_or(PublishError::Unknown { table: FIXUPS })?;
    let entry = whole(FIXUPS, table, layout.size)?;
    let mut fixups = Vec::new();
    for index in 0..table.bytes.len() / entry {
        let start = index * entry;
        let (insn, fixup) = (
            points(table, start, layout.insn),
            points(table, start, layout.fixup),
        );
        let data = within(start, layout.data).and_then(|at| le_u32(&table.bytes, at));
        match (insn, fixup, data) {
            (Some(insn), Some(fixup), Some(data)) => fixups.push(Fixup { insn, fixup, data }),
            _ => return Err(PublishError::Unknown { table: FIXUPS }),
        }
    }
    Ok(fixups)
}

/// The bytes of an entry of `table`, which holds whole ones.
fn whole(name: &'static str, table: &Table, entry: u64) -> Result<usize, PublishError> {
    let len = table.bytes.len() as u64;
    let size = usize::try_from(entry).ok().filter(|size| *size > 0);
    size.filter(|_| len.is_multiple_of(entry))
        .ok_or(PublishError::Shape {
            table: name,
            len,
            entry,
        })
}

fn within(start: usize, offset: u64) -> Option<usize> {
    start.checked_add(usize::try_from(offset).ok()?)
}

/// Where the distance in the four bytes at `offset` of the entry at `start` leads.
fn points(table: &Table, start: usize, offset: u64) -> Option<Gva> {
    let at = within(start, offset)?;
    let distance = le_i32(&table.bytes, at)?;
    let place = table.at.checked_add(at as u64)?;
    place.checked_offset(distance.into())
}

/// Every entry of the tables of `unit` is about its code.
pub(super) fn checked(unit: &Unit, layout: &Layout) -> Result<(), PublishError> {
    let inside = |table, index, at: Gva| {
        let outside = PublishError::Outside { table, index, at };
        unit.code.contains(&at).then_some(()).ok_or(outside)
    };
    for (index, fixup) in unit.fixups.iter().enumerate() {
        inside(FIXUPS, index, fixup.insn)?;
        inside(FIXUPS, index, fixup.fixup)?;
    }
    if !unit.fixups.is_empty() && (layout.fixup.is_none() || layout.module.fixups.is_none()) {
        return Err(PublishError::Unknown { table: FIXUPS });
    }
    let Some(bugs) = &unit.bugs else {
        return Ok(());
    };
    let (Some(bug), Some(_), Some(_)) = (layout.bug, layout.bugs, layout.module.bugs) else {
        return Err(PublishError::Unknown { table: BUGS });
    };
    let entry = whole(BUGS, bugs, bug.size)?;
    for index in 0..bugs.bytes.len() / entry {
        let at = points(bugs, index * entry, bug.insn);
        let at = at.ok_or(PublishError::Unknown { table: BUGS })?;
        inside(BUGS, index, at)?;
    }
    Ok(())
}

/// Where each table is in the block.
struct Parts {
    symbols: Range<u64>,
    ips: Range<u64>,
    fixups: Range<u64>,
    entries: Range<u64>,
    types: Range<u64>,
    strings: Range<u64>,
    len: u64,
}

impl Parts {
    /// One behind the other, those with the largest alignment first: none needs a gap but the first.
    fn of(unit: &Unit, layout: &Layout) -> Self {
        let mut end = layout.module.size.next_multiple_of(ALIGN);
        let mut take = |len: usize| {
            let start = end;
            end = end.saturating_add(len as u64);
            start..end
        };
        let (ips, entries) = unit.orc.as_ref().map_or((0, 0), |orc| {
            let (ips, entries) = orc.arrays();
            (ips.len(), entries.len())
        });
        let entry = layout.fixup.map_or(0, |fixup| fixup.size);
        let entry = usize::try_from(entry).unwrap_or(0);
        let count = unit.symbols.len() + 1;
        let names = unit.symbols.iter().map(|symbol| symbol.name.len() + 1);
        Self {
            symbols: take(count * SYMBOL),
            ips: take(ips),
            fixups: take(unit.fixups.len().saturating_mul(entry)),
            entries: take(entries),
            types: take(count),
            strings: take(names.sum::<usize>() + 1),
            len: end,
        }
    }
}

/// A block of bytes with its place.
struct Block {
    at: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn at(&self, offset: u64) -> u64 {
        self.at.wrapping_add(offset)
    }

    /// Puts `bytes` at `offset`; the block was made long enough.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let room = start
            .checked_add(bytes.len())
            .and_then(|end| self.bytes.get_mut(start..end));
        if let Some(room) = room {
            room.copy_from_slice(bytes);
        }
    }

    /// Puts the distance from `offset` to `to` there.
    fn put_distance(&mut self, offset: u64, to: u64) -> Result<(), PublishError> {
        let at = self.at(offset);
        let distance = i32::try_from(to.wrapping_sub(at).cast_signed());
        let far = |_| PublishError::Far {
            at: Gva(at),
            to: Gva(to),
        };
        self.put(offset, &distance.map_err(far)?.to_le_bytes());
        Ok(())
    }

    /// Gives a member its value, as many bytes of it as the member has.
    fn set(&mut self, member: &Member, value: u64) {
        let bytes = value.to_le_bytes();
        let len = usize::try_from(member.size).unwrap_or(8).min(8);
        self.put(member.offset, bytes.get(..len).unwrap_or_default());
    }
}

/// Makes the block for `unit`: its first bytes are the `struct module`, of which only the links of the kernel's own lists are left open.
pub(super) fn place(
    unit: &Unit,
    layout: &Layout,
    space: &mut ArenaSpace,
) -> Result<Placed, PublishError> {
    let parts = Parts::of(unit, layout);
    let at = space.data.take(parts.len, ALIGN)?.0;
    let len = usize::try_from(parts.len).unwrap_or(0);
    let mut block = Block {
        at,
        bytes: vec![0; len],
    };
    describe(&mut block, unit, &layout.module);
    symbols(&mut block, unit, &layout.module, &parts);
    unwinding(&mut block, unit, &layout.module, &parts)?;
    if let (Some(entry), Some([table, count])) = (layout.fixup, layout.module.fixups) {
        exceptions(&mut block, &unit.fixups, entry, parts.fixups.start)?;
        block.set(&table, at.wrapping_add(parts.fixups.start));
        block.set(&count, unit.fixups.len() as u64);
    }
    if let (Some(bugs), Some(bug), Some([table, count])) =
        (&unit.bugs, layout.bug, layout.module.bugs)
    {
        block.set(&table, bugs.at.0);
        block.set(&count, bugs.bytes.len() as u64 / bug.size.max(1));
    }
    Ok(Placed {
        at,
        bytes: block.bytes,
    })
}

/// A module in use, of this code alone, that nobody can unload: it has a reference more than any module's own.
fn describe(block: &mut Block, unit: &Unit, module: &ModuleLayout) {
    let room = usize::try_from(module.name.size.saturating_sub(1)).unwrap_or(0);
    let name = unit.name.as_bytes();
    block.put(module.name.offset, name.get(..room).unwrap_or(name));
    block.set(&module.state, module.live);
    if let Some(references) = &module.references {
        block.set(references, 2);
    }
    for list in &module.lists {
        let here = block.at(*list).to_le_bytes();
        block.put(*list, &[here, here].concat());
    }
    let size = unit.code.end.0.saturating_sub(unit.code.start.0);
    block.set(&module.base, unit.code.start.0);
    for member in &module.sizes {
        block.set(member, size);
    }
    block.set(&module.owner, block.at);
}

fn symbols(block: &mut Block, unit: &Unit, module: &ModuleLayout, parts: &Parts) {
    let Some(layout) = &module.symbols else {
        return;
    };
    block.set(&layout.pointer, block.at(layout.to));
    block.set(&layout.table, block.at(parts.symbols.start));
    block.set(&layout.count, unit.symbols.len() as u64 + 1);
    block.set(&layout.strings, block.at(parts.strings.start));
    if let Some(types) = &layout.types {
        block.set(types, block.at(parts.types.start));
    }
    // The first symbol, and the first byte of the strings, are zeros.
    let (mut name, mut at) = (1_u64, parts.symbols.start);
    for (symbol, kind) in unit.symbols.iter().zip(parts.types.start + 1..) {
        at += SYMBOL as u64;
        let mut bytes = [0; SYMBOL];
        let fields: [&[u8]; 6] = [
            &u32::try_from(name).unwrap_or(0).to_le_bytes(),
            &[FUNCTION],
            &[0],
            &SECTION.to_le_bytes(),
            &symbol.at.0.to_le_bytes(),
            &symbol.size.to_le_bytes(),
        ];
        bytes.copy_from_slice(&fields.concat());
        block.put(at, &bytes);
        block.put(kind, &[TEXT]);
        block.put(parts.strings.start + name, symbol.name.as_bytes());
        name += symbol.name.len() as u64 + 1;
    }
}

fn unwinding(
    block: &mut Block,
    unit: &Unit,
    module: &ModuleLayout,
    parts: &Parts,
) -> Result<(), PublishError> {
    let (Some(layout), Some(orc)) = (&module.orc, &unit.orc) else {
        return Ok(());
    };
    let (ips, entries) = orc.arrays();
    for (offset, ip) in (0..).step_by(4).zip(ips.as_chunks::<4>().0) {
        let distance = i64::from(i32::from_le_bytes(*ip));
        let to = orc.at().wrapping_add(offset).wrapping_add_signed(distance);
        block.put_distance(parts.ips.start + offset, to)?;
    }
    block.put(parts.entries.start, entries);
    block.set(&layout.count, ips.len() as u64 / 4);
    block.set(&layout.ips, block.at(parts.ips.start));
    block.set(&layout.entries, block.at(parts.entries.start));
    Ok(())
}

fn exceptions(
    block: &mut Block,
    fixups: &[Fixup],
    entry: FixupLayout,
    start: u64,
) -> Result<(), PublishError> {
    let mut sorted = fixups.to_vec();
    sorted.sort_by_key(|fixup| fixup.insn);
    for pair in sorted.windows(2) {
        if let [first, second] = pair
            && first.insn == second.insn
        {
            return Err(PublishError::Twice {
                table: FIXUPS,
                at: first.insn,
            });
        }
    }
    for (index, fixup) in sorted.iter().enumerate() {
        let at = start + index as u64 * entry.size;
        block.put_distance(at + entry.insn, fixup.insn.0)?;
        block.put_distance(at + entry.fixup, fixup.fixup.0)?;
        block.put(at + entry.data, &fixup.data.to_le_bytes());
    }
    Ok(())
}
