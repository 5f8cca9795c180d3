//! Type information alone: a kernel's with single records damaged, and some made up from nothing, of a kernel and of a module that stands on it.
//!
//! Damage of a whole image seldom meets the few types that anyone asks about. Here the damage knows the encoding (kernel
//! `Documentation/bpf/btf.rst`): it makes types that contain themselves, numbers that lead anywhere, lists that swallow what is behind them, and
//! names without end.

use std::collections::BTreeSet;
use std::sync::Arc;

use patcher::kernel::image::Image;
use patcher::kernel::types::Types;

use super::{Subject, unpacked};
use crate::Options;
use crate::damage::{EXTREMES, Random, Undo, damage, mend};

/// Bytes of the header, and of what each type begins with.
const HEADER: usize = 24;
const COMMON: usize = 12;
/// Types that are asked about.
const ROOTS: [&str; 8] = [
    "task_struct",
    "module",
    "rq",
    "orc_entry",
    "pt_regs",
    "btf",
    "printk_info",
    "module_state",
];
/// How far from them others are damaged.
const REACH: usize = 4000;
const PATHS: [&str; 8] = [
    "thread.sp",
    "mem[1].base",
    "a",
    "a.b",
    "a[0].b[1]",
    "a[4294967295]",
    "b.b.b.b.b",
    "list.next",
];

/// One type of a section.
#[derive(Clone, Debug)]
struct Record {
    /// Where it is in the section, and its bytes.
    at: usize,
    len: usize,
    id: u32,
    name: String,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_le_bytes)
}

/// Bytes of each element behind the common part, and of what is there without any.
fn extra(kind: u32) -> (usize, usize) {
    match kind {
        1 | 14 | 17 => (0, 4),
        3 => (0, 12),
        4 | 5 | 15 | 19 => (12, 0),
        6 | 13 => (8, 0),
        _ => (0, 0),
    }
}

/// The types of an undamaged section, in order.
fn records(btf: &[u8]) -> Vec<Record> {
    let (types, strings) = (word(btf, 12) as usize, word(btf, 16) as usize);
    let mut found = Vec::new();
    let mut at = HEADER;
    while at < HEADER + types {
        let info = word(btf, at + 4);
        let (each, fixed) = extra(info >> 24 & 0x1f);
        let len = COMMON + fixed + each * (info & 0xffff) as usize;
        let name = &btf[HEADER + strings + word(btf, at) as usize..];
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        found.push(Record {
            at,
            len,
            id: u32::try_from(found.len() + 1).unwrap_or(u32::MAX),
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
        });
        at += len;
    }
    found
}

/// Indices of the types that those called [`ROOTS`] refer to, near ones first. Any number within a type may be a reference.
fn reached(btf: &[u8], records: &[Record]) -> Vec<usize> {
    let roots = records.iter().enumerate();
    let roots = roots.filter(|(_, record)| ROOTS.contains(&record.name.as_str()));
    let mut found: Vec<usize> = roots.map(|(index, _)| index).collect();
    let mut seen: BTreeSet<usize> = found.iter().copied().collect();
    let mut next = 0;
    while let Some(record) = found.get(next).map(|index| &records[*index])
        && found.len() < REACH
    {
        next += 1;
        for at in (record.at + 8..record.at + record.len).step_by(4) {
            let index = (word(btf, at) as usize).wrapping_sub(1);
            if index < records.len() && seen.insert(index) {
                found.push(index);
            }
        }
    }
    found
}

fn put(bytes: &mut [u8], at: usize, value: u32, undo: &mut Undo) {
    if let Some(there) = bytes.get_mut(at..at + 4) {
        undo.push((at, there.to_vec()));
        there.copy_from_slice(&value.to_le_bytes());
    }
}

/// A number of a type: itself, one near it, any, or none.
fn reference(random: &mut Random, own: u32, count: u32) -> u32 {
    let any = u32::try_from(random.below(count as usize + 3)).unwrap_or(0);
    let extreme = u32::try_from(EXTREMES[random.below(EXTREMES.len())] & 0xffff_ffff);
    match random.below(6) {
        0 | 1 => own,
        2 => own.saturating_sub(any % 4),
        3 => own.saturating_add(any % 4),
        4 => any,
        _ => extreme.unwrap_or(0),
    }
}

/// Damages the type at `index`.
fn damage_record(
    btf: &mut [u8],
    records: &[Record],
    index: usize,
    random: &mut Random,
    undo: &mut Undo,
) {
    /// Types that a list may swallow.
    const SWALLOWED: usize = 400;
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    let Record { at, len, id, .. } = records[index];
    let info = word(btf, at + 4);
    let (each, _) = extra(info >> 24 & 0x1f);
    match random.below(8) {
        // Any word of it, its name and references alike.
        0 | 1 => {
            let at = at + 4 * random.below(len / 4);
            let value = reference(random, id, count);
            put(btf, at, value, undo);
        }
        // What it refers to, or its size.
        2 => {
            let value = reference(random, id, count);
            put(btf, at + 8, value, undo);
        }
        // The type of one of its members.
        3 if len > COMMON + 4 => {
            let member = COMMON + 12 * random.below((len - COMMON) / 12) + 4;
            let value = reference(random, id, count);
            put(btf, at + member, value, undo);
            // Without a name it is looked into.
            if random.below(2) == 0 {
                put(btf, at + member - 4, 0, undo);
            }
        }
        // Another kind, as long as it was.
        4 => {
            let kinds = (0..32).filter(|kind| extra(*kind) == extra(info >> 24 & 0x1f));
            let kinds: Vec<u32> = kinds.collect();
            let kind = kinds[random.below(kinds.len())];
            put(btf, at + 4, info & !(0x1f << 24) | kind << 24, undo);
        }
        5 => put(btf, at + 4, info ^ 1 << 31, undo),
        // Its list goes on over the types behind it, up to where another begins.
        6 if each > 0 => {
            let behind = records[index + 1..].iter().take(SWALLOWED);
            let ends = behind.map(|record| record.at + record.len - at - COMMON);
            let fit: Vec<usize> = ends.filter(|len| len % each == 0).collect();
            if let Some(len) = fit.get(random.below(fit.len())) {
                let vlen = u32::try_from(len / each).unwrap_or(0).min(0xffff);
                put(btf, at + 4, info & !0xffff | vlen, undo);
            }
        }
        _ => {
            let other = &records[random.below(records.len())];
            let name = word(btf, other.at);
            put(btf, at, name, undo);
        }
    }
}

/// Takes the ends of names away, so that they run into the next ones.
fn lengthen(btf: &mut [u8], random: &mut Random, undo: &mut Undo) {
    let start = HEADER + word(btf, 16) as usize;
    let from = start + random.below(btf.len() - start);
    let len = 1_usize << random.below(23);
    let end = from.saturating_add(len).min(btf.len() - 1);
    undo.push((from, btf[from..end].to_vec()));
    let names = btf[from..end].iter_mut();
    names
        .filter(|byte| **byte == 0)
        .for_each(|byte| *byte = b'x');
}

/// Asks for everything about the types called `name`.
fn ask(types: &Types, name: &str) {
    drop(types.members(name));
    drop(types.enumerators(name));
    let _ = types.size_of(name);
    for path in PATHS {
        let _ = types.member(name, path);
    }
    let layouts = types.layouts(name).unwrap_or_default();
    for layout in layouts {
        drop(layout.to_string());
    }
}

/// The types of a kernel.
pub(super) fn btf(options: &Options) -> Result<Subject, String> {
    let file = Arc::new(unpacked(options)?);
    let image = Image::parse(file).map_err(|error| error.to_string())?;
    let mut btf = Arc::new(image.types().section().to_vec());
    drop(image);
    let records = records(&btf);
    let near = reached(&btf, &records);
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let Some(bytes) = Arc::get_mut(&mut btf) else {
            panic!("the case before this one kept the types");
        };
        let mut undo = Undo::new();
        let mut names: BTreeSet<&str> = ROOTS.into();
        let all = 0..bytes.len();
        match random.below(16) {
            0 => undo = damage(bytes, 0..HEADER, &mut random),
            1 => undo = damage(bytes, all, &mut random),
            2 => lengthen(bytes, &mut random, &mut undo),
            _ => {}
        }
        for _ in 0..=random.below(12) {
            let index = near[random.below(near.len())];
            damage_record(bytes, &records, index, &mut random, &mut undo);
            names.insert(&records[index].name);
        }
        if let Ok(types) = Types::parse(btf.clone(), 0..btf.len()) {
            names.into_iter().for_each(|name| ask(&types, name));
        }
        if let Some(bytes) = Arc::get_mut(&mut btf) {
            mend(bytes, undo);
        }
    }))
}

/// Makes up a section whose types are numbered from `first`, and whose strings begin at `first_string`.
fn made(random: &mut Random, first: u32, first_string: u32) -> Vec<u8> {
    /// Names that are asked for.
    const NAMES: [&str; 4] = ["a", "b", "c", "list"];
    /// Bytes of the longest name.
    const LONGEST: usize = 1 << 20;
    let mut strings = vec![0];
    let mut names = vec![0];
    for name in NAMES {
        names.push(strings.len());
        strings.extend(name.bytes().chain([0]));
    }
    if random.below(4) == 0 {
        names.push(strings.len());
        strings.resize(strings.len() + random.below(LONGEST), b'x');
        strings.push(0);
    }
    // Some sections have one name and one type for all.
    let alike = random.below(4) == 0;
    let some = names[random.below(names.len())];
    let of = random.below(4);
    let most = [8, 8, 100, 100, 100, 1000, 1000, 50_000][random.below(8)];
    let count = 1 + random.below(most);
    let longest = [4, 4, 4, 40, 40, 400, 4000, 0xffff][random.below(8)];
    let mut types = Vec::new();
    let mut words = |words: &[u32]| {
        words
            .iter()
            .for_each(|word| types.extend(word.to_le_bytes()));
        types.len()
    };
    for index in 0..count {
        let own = first.saturating_add(u32::try_from(index).unwrap_or(0));
        let total = u32::try_from(count).unwrap_or(0).saturating_add(first);
        let name = |random: &mut Random| {
            let at = if alike {
                some
            } else {
                names[random.below(names.len())]
            };
            first_string.saturating_add(u32::try_from(at).unwrap_or(0))
        };
        let kind = match random.below(3) {
            0 => 4,
            _ => u32::try_from(1 + random.below(19)).unwrap_or(0),
        };
        let (each, fixed) = extra(kind);
        let vlen = if each > 0 {
            random.below(longest + 1)
        } else {
            0
        };
        let flag = u32::from(random.below(4) == 0) << 31;
        let called = name(random);
        let refers = reference(random, own, total);
        let info = kind << 24 | flag | u32::try_from(vlen).unwrap_or(0);
        words(&[called, info, refers]);
        let member = u32::try_from(of).unwrap_or(0).saturating_add(first);
        for _ in 0..vlen {
            let called = if random.below(2) == 0 {
                0
            } else {
                name(random)
            };
            let refers = if alike {
                member
            } else {
                reference(random, own, total)
            };
            let place = u32::try_from(random.next() & 0x00ff_ffff).unwrap_or(0);
            words(&[called, refers, place][..each / 4]);
        }
        let refers = reference(random, own, total);
        let many = reference(random, own, total);
        if words(&[refers, refers, many][..fixed / 4]) > SECTION {
            break;
        }
    }
    section(&types, &strings)
}

/// Bytes of the types that are made up for one section: as many as hold a few of the longest lists.
const SECTION: usize = 2 << 20;

/// A section of these types and strings.
fn section(types: &[u8], strings: &[u8]) -> Vec<u8> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let header = [0x0001_eb9f, 24, 0, len(types), len(types), len(strings)];
    let header = header.iter().flat_map(|word: &u32| word.to_le_bytes());
    header
        .chain(types.iter().copied())
        .chain(strings.iter().copied())
        .collect()
}

/// Types that are made up: of a kernel, and of a module.
#[expect(
    clippy::unnecessary_wraps,
    reason = "it has the form of every other target"
)]
pub(super) fn made_up(_: &Options) -> Result<Subject, String> {
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let own = made(&mut random, 1, 0);
        let strings = word(&own, 20);
        let len = own.len();
        let Ok(kernel) = Types::parse(Arc::new(own), 0..len) else {
            return;
        };
        for name in ["a", "b", "struct a", "c"] {
            ask(&kernel, name);
        }
        let behind = u32::try_from(kernel.len() + 1).unwrap_or(u32::MAX);
        let mut module = made(&mut random, behind, strings);
        let end = module.len();
        if random.below(4) == 0 {
            drop(damage(&mut module, 0..end, &mut random));
        }
        if let Ok(types) = Types::parse_module(Arc::new(module), Arc::new(kernel)) {
            for name in ["a", "b", "union b", "list"] {
                ask(&types, name);
            }
        }
    }))
}
