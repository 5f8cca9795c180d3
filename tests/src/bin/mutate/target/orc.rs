//! A kernel's unwind table alone: what it says of the places where threads of a recorded guest are, and stretches of it, small enough that most of
//! them is damaged.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use patcher::guest::Registers as _;
use patcher::guest::dump::Dump;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::orc::OrcTable;
use patcher::kernel::unwind::stacks;

use super::{Subject, read, unpacked};
use crate::Options;
use crate::damage::{Random, Undo, damage, mend};

/// Bytes of an address of the table.
const SLOT: usize = 4;
/// One case in so many follows stacks: each reads the whole image.
const STACKS: usize = 8;

/// The table in the kernel's file.
struct Table {
    ips: Range<usize>,
    entries: Range<usize>,
    /// Bytes of an entry.
    size: usize,
    /// Entries that the stacks of the recorded guest need.
    used: Vec<usize>,
}

impl Table {
    fn find(image: &Image, kernel: &Kernel, dump: &Dump) -> Result<Self, String> {
        let section = |name: &str| {
            let found = image.sections().iter().find(|section| section.name == name);
            let found = found.map(|section| section.file.clone());
            found.ok_or_else(|| format!("the image has no {name}"))
        };
        let orc = image.orc().map_err(|error| error.to_string())?;
        let followed = stacks(kernel, dump, dump.vcpus(), &[]);
        let followed = followed.map_err(|error| error.to_string())?;
        let frames = followed.stacks.iter().flat_map(|stack| &stack.frames);
        let links = frames.filter_map(|frame| kernel.link(frame.ip));
        let used: BTreeSet<usize> = links
            .map(|link| first_above(orc, link.0).saturating_sub(1))
            .collect();
        let (ips, entries) = (section(".orc_unwind_ip")?, section(".orc_unwind")?);
        Ok(Self {
            size: entries.len() / orc.len().max(1),
            ips,
            entries,
            used: used.into_iter().collect(),
        })
    }

    /// Damages some of what stacks need.
    fn damage(&self, file: &mut [u8], random: &mut Random) -> Undo {
        let mut undo = Undo::new();
        for _ in 0..=random.below(8) {
            let index = self.used[random.below(self.used.len())];
            let entry = self.entries.start + index * self.size;
            let place = match random.below(8) {
                0 => self.ips.clone(),
                1 => self.ips.start + index * SLOT..self.ips.start + (index + 1) * SLOT,
                2 => self.entries.clone(),
                _ => entry..entry + self.size,
            };
            undo.extend(damage(file, place, random));
        }
        undo
    }
}

/// The address that slot `index` of the table is for.
fn address(orc: &OrcTable, index: usize) -> u64 {
    let (ips, _) = orc.arrays();
    let slot = ips.get(index * SLOT..).and_then(|slot| slot.first_chunk());
    let distance = slot.map_or(0, |slot| i32::from_le_bytes(*slot));
    let slot = orc.at().wrapping_add((index * SLOT) as u64);
    slot.wrapping_add_signed(distance.into())
}

/// Index of the first entry that is for code behind `at`.
fn first_above(orc: &OrcTable, at: u64) -> usize {
    let (mut low, mut high) = (0, orc.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        if address(orc, middle) <= at {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Looks up addresses in a damaged stretch of the table.
fn look_up(orc: &OrcTable, random: &mut Random) {
    const LONGEST: usize = 256;
    const LOOKUPS: u64 = 64;
    let (ips, entries) = orc.arrays();
    let size = entries.len() / orc.len().max(1);
    let count = 1 + random.below(LONGEST);
    let first = random.below(orc.len() - count);
    let mut ips = ips[first * SLOT..(first + count) * SLOT].to_vec();
    let mut entries = entries[first * size..(first + count) * size].to_vec();
    let mut code = address(orc, first)..address(orc, first + count);
    let mut at = orc.at() + (first * SLOT) as u64;
    let (ends, all) = (ips.len(), entries.len());
    drop(damage(&mut ips, 0..ends, random));
    drop(damage(&mut entries, 0..all, random));
    match random.below(8) {
        0 => ips.truncate(random.below(ends + 1)),
        1 => entries.truncate(random.below(all + 1)),
        2 => code.end = random.next(),
        3 => code.start = random.next(),
        // A table of code at the ends of the address space, and for all of it.
        4 => (at, code) = (0_u64.wrapping_sub(random.next() % 4096), 0..u64::MAX),
        5 | 6 => code = 0..u64::MAX,
        _ => {}
    }
    let Ok(table) = OrcTable::like(orc, at, ips, entries, &code) else {
        return;
    };
    for step in 0..LOOKUPS {
        let near = address(&table, random.below(table.len())).wrapping_add(step % 3);
        for at in [near.wrapping_sub(1), random.next(), step, u64::MAX - step] {
            let _ = table.entry(at);
        }
    }
}

/// The unwind table of a kernel.
pub(super) fn orc(options: &Options) -> Result<Subject, String> {
    let dump = Dump::parse(Arc::new(read(&options.dump)?)).map_err(|error| error.to_string())?;
    let mut file = Arc::new(unpacked(options)?);
    let whole = Arc::new((*file).clone());
    let image = Arc::new(Image::parse(whole).map_err(|error| error.to_string())?);
    let kernel = Kernel::locate(image.clone(), &dump, dump.vcpus());
    let kernel = kernel.map_err(|error| error.to_string())?;
    let table = Table::find(&image, &kernel, &dump)?;
    drop(kernel);
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        if random.below(STACKS) != 0 {
            if let Ok(orc) = image.orc() {
                look_up(orc, &mut random);
            }
            return;
        }
        let Some(bytes) = Arc::get_mut(&mut file) else {
            panic!("the case before this one kept the image");
        };
        let undo = table.damage(bytes, &mut random);
        if let Ok(image) = Image::parse(file.clone())
            && let Ok(kernel) = Kernel::locate(Arc::new(image), &dump, dump.vcpus())
        {
            drop(stacks(&kernel, &dump, dump.vcpus(), &[]));
        }
        if let Some(bytes) = Arc::get_mut(&mut file) {
            mend(bytes, undo);
        }
    }))
}
