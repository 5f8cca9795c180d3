//! The function to be cloned: its own part, the cold ones that it leads to, and what the kernel's tables say of them.

use std::cell::OnceCell;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};

use super::refused::{Reason, Refused};
use crate::addr::{Gva, LinkAddr};
use crate::kernel::bytes::{le_i32, le_u64};
use crate::kernel::image::{Image, Shipped};
use crate::kernel::sites::SiteKind;
use crate::kernel::symbols::Symbol;
use crate::x86::insn::{self, NOP5};

/// The most bytes of one part of a function that are moved.
const MAX_PART: u64 = 1 << 16;
/// The most parts of one function.
const MAX_PARTS: usize = 8;
/// Low bits of a static branch's key: it is a jump unless the key is on; its code is freed after boot.
const KEY_TAKEN: u64 = 1;
const KEY_FLAGS: u64 = 3;

/// Reads a range of text.
type Text<'a> = &'a dyn Fn(&Range<Gva>) -> Result<Vec<u8>, Reason>;

/// Where bytes come from: a running kernel, or an image alone.
pub(super) struct Source<'a> {
    pub(super) image: &'a Image,
    pub(super) shipped: &'a Shipped,
    /// Runtime address minus link address.
    pub(super) slide: u64,
    /// Text as it is, but for what changes at any time.
    pub(super) text: Text<'a>,
    /// So many bytes of a table.
    pub(super) table: &'a dyn Fn(Gva, usize) -> Result<Vec<u8>, Reason>,
    /// The addresses that the image's data holds, once they were needed.
    pub(super) held: &'a OnceCell<Held>,
}

impl Source<'_> {
    fn runtime(&self, at: LinkAddr) -> Gva {
        Gva(at.0.wrapping_add(self.slide))
    }

    fn link(&self, at: Gva) -> LinkAddr {
        LinkAddr(at.0.wrapping_sub(self.slide))
    }
}

/// Addresses that an image holds outside of its code, each with where it does; sorted.
#[derive(Debug)]
pub(super) struct Held(Vec<(u64, LinkAddr)>);

impl Held {
    fn of(image: &Image, shipped: &Shipped) -> Self {
        let code = image.sections().iter().filter(|section| section.executable);
        let code: Vec<Range<LinkAddr>> = code.map(|section| section.range.clone()).collect();
        let sites = shipped.relocs().absolute();
        let sites = sites.filter(|(at, _)| !code.iter().any(|code| code.contains(at)));
        let value = |(at, width): (LinkAddr, usize)| {
            let bytes = shipped.bytes(at.range(width as u64)?)?;
            let short = || Some(i64::from(le_i32(bytes, 0)?).cast_unsigned());
            Some((le_u64(bytes, 0).or_else(short)?, at))
        };
        let mut words: Vec<_> = sites.filter_map(value).collect();
        words.sort_unstable();
        Self(words)
    }

    /// The first place but those in `known` that holds an address in `range`.
    fn within(&self, range: &Range<LinkAddr>, known: &[Range<LinkAddr>]) -> Option<LinkAddr> {
        let first = self.0.partition_point(|(value, _)| *value < range.start.0);
        let rest = self.0.get(first..).unwrap_or_default().iter();
        rest.take_while(|(value, _)| *value < range.end.0)
            .map(|(_, at)| *at)
            .find(|at| !known.iter().any(|known| known.contains(at)))
    }
}

/// A static branch.
#[derive(Clone, Debug)]
pub(super) struct StaticBranch {
    pub(super) range: Range<Gva>,
    pub(super) to: Gva,
    /// Where its key's count is: the key is on when that is above zero.
    pub(super) count: Gva,
    /// Whether it jumps when the key is on, or when it is off.
    pub(super) when_on: bool,
}

/// An entry of a table about one instruction.
#[derive(Clone, Debug)]
pub(super) struct TableEntry {
    pub(super) at: Gva,
    pub(super) bytes: Vec<u8>,
    /// Offset of the distance to the instruction.
    pub(super) insn: usize,
    /// Other distances: where each field is, and what it leads to.
    pub(super) leads: Vec<(usize, Gva)>,
}

/// One part of a function.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) at: u64,
    /// Its bytes, the tracer's site a NOP.
    pub(super) code: Vec<u8>,
    pub(super) branches: Vec<StaticBranch>,
    /// Indirect branches through thunks.
    pub(super) thunked: Vec<Range<Gva>>,
    pub(super) faults: Vec<TableEntry>,
    pub(super) bugs: Vec<TableEntry>,
    /// Fields of four bytes that hold addresses.
    pub(super) absolute: Vec<Gva>,
    /// A word outside of all code that holds an address in it, if it was looked for.
    pub(super) table: Option<Gva>,
}

/// A function.
#[derive(Clone, Debug, Default)]
pub(super) struct Original {
    pub(super) name: String,
    pub(super) slide: u64,
    /// Its own part first.
    pub(super) parts: Vec<Part>,
}

impl Original {
    /// The function behind `symbol`.
    pub(super) fn of(source: &Source<'_>, symbol: &Symbol) -> Result<Self, Refused> {
        let refused = |at: LinkAddr, reason| Refused {
            function: symbol.name.clone(),
            at: source.runtime(at),
            reason,
        };
        if source.shipped.relocs().counts() == [0; 3] {
            return Err(refused(symbol.address, Reason::NoRelocations));
        }
        let cold = format!("{}.cold", symbol.name);
        let mut symbols = vec![symbol.clone()];
        let mut parts: Vec<Part> = Vec::new();
        while let Some(next) = symbols.get(parts.len()) {
            let part = Part::of(source, next);
            let part = part.map_err(|reason| refused(next.address, reason))?;
            for to in part.leads() {
                let found = source.image.symbols().containing(source.link(to));
                let Some((found, _)) = found else { continue };
                let known = symbols.iter().any(|it| it.address == found.address);
                if found.name.starts_with(&cold) && !known && symbols.len() < MAX_PARTS {
                    symbols.push(found);
                }
            }
            parts.push(part);
        }
        Ok(Self {
            name: symbol.name.clone(),
            slide: source.slide,
            parts,
        })
    }

    /// What people call the place at `at`.
    pub(super) fn name_of(&self, image: &Image, at: Gva) -> String {
        let link = LinkAddr(at.0.wrapping_sub(self.slide));
        match image.symbols().containing(link) {
            Some((symbol, 0)) => symbol.name,
            Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
            None => at.to_string(),
        }
    }
}

impl Part {
    fn of(source: &Source<'_>, symbol: &Symbol) -> Result<Self, Reason> {
        if symbol.size > MAX_PART {
            return Err(Reason::TooLong { bytes: symbol.size });
        }
        let link = symbol.address.range(symbol.size).ok_or(Reason::NotText)?;
        let runtime = source.runtime(link.start)..source.runtime(link.end);
        let mut part = Self {
            name: symbol.name.clone(),
            at: runtime.start.0,
            code: (source.text)(&runtime)?,
            ..Self::default()
        };
        let sites = source.shipped.sites().within(link.clone());
        for site in sites {
            let range = source.runtime(site.range.start)..source.runtime(site.range.end);
            match site.kind {
                SiteKind::Fentry => part.put(range.start, &NOP5),
                SiteKind::Retpoline => part.thunked.push(range),
                _ => {}
            }
        }
        part.branches = branches(source, &link)?;
        let types = source.image.types();
        let table = "exception_table_entry";
        let fields = [
            types.offset_of(table, "insn")?,
            types.offset_of(table, "fixup")?,
        ];
        part.faults = entries(source, SiteKind::Extable, &link, fields[0], &fields[1..])?;
        if source.shipped.sites().count(SiteKind::Bug) > 0 {
            let at = types.offset_of("bug_entry", "bug_addr_disp")?;
            let others = ["file_disp", "format_disp"];
            let others = others.map(|field| types.offset_of("bug_entry", field).ok());
            let others: Vec<u64> = others.into_iter().flatten().collect();
            part.bugs = entries(source, SiteKind::Bug, &link, at, &others)?;
        }
        let fields = (link.start.0..link.end.0).map(LinkAddr);
        let fields = fields.filter(|at| source.shipped.relocs().has_absolute(*at));
        part.absolute = fields.map(|at| source.runtime(at)).collect();
        if !part.thunked.is_empty() {
            part.table = part.held(source, &link);
        }
        Ok(part)
    }

    /// The word of data that holds an address in the part, but for its first byte. Those of the kernel's tables of sites do not count.
    fn held(&self, source: &Source<'_>, link: &Range<LinkAddr>) -> Option<Gva> {
        let held = || Held::of(source.image, source.shipped);
        let held = source.held.get_or_init(held);
        let kinds = [SiteKind::Fentry, SiteKind::Paravirt];
        let known = kinds.into_iter().flat_map(|kind| {
            let entries = source.shipped.sites().entries(kind, link);
            entries.filter_map(|entry| entry.at.range(entry.bytes.len() as u64))
        });
        let known: Vec<Range<LinkAddr>> = known.collect();
        let inner = LinkAddr(link.start.0.saturating_add(1))..link.end;
        held.within(&inner, &known).map(|at| source.runtime(at))
    }

    /// Where instructions and tables lead from here, be it out of here.
    fn leads(&self) -> Vec<Gva> {
        let mut decoder = Decoder::with_ip(64, &self.code, self.at, DecoderOptions::NONE);
        let mut leads = Vec::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if insn::has_near_target(&instruction) {
                leads.push(Gva(instruction.near_branch_target()));
            }
        }
        leads.extend(self.branches.iter().map(|branch| branch.to));
        let fixups = self.faults.iter().flat_map(|fault| &fault.leads);
        leads.extend(fixups.map(|(_, to)| *to));
        leads
    }

    fn put(&mut self, at: Gva, bytes: &[u8]) {
        let start = at.0.wrapping_sub(self.at);
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let room = self.code.get_mut(start..).unwrap_or_default().iter_mut();
        room.zip(bytes).for_each(|(byte, of)| *byte = *of);
    }
}

fn branches(source: &Source<'_>, link: &Range<LinkAddr>) -> Result<Vec<StaticBranch>, Reason> {
    let types = source.image.types();
    let of = |path| types.offset_of("jump_entry", path);
    let mut branches = Vec::new();
    for entry in source.shipped.sites().entries(SiteKind::JumpLabel, link) {
        let (target, key) = (of("target")?, of("key")?);
        let enabled = types.offset_of("static_key", "enabled")?;
        let field = usize::try_from(key).ok();
        let field = field.and_then(|at| le_u64(entry.bytes, at));
        let (Some(distance), Some(to)) = (field, entry.relative(target)) else {
            continue;
        };
        let at = entry.at.0.wrapping_add(key).wrapping_add(distance);
        let count = LinkAddr((at & !KEY_FLAGS).wrapping_add(enabled));
        let range = entry.site.range;
        branches.push(StaticBranch {
            range: source.runtime(range.start)..source.runtime(range.end),
            to: source.runtime(to),
            count: source.runtime(count),
            when_on: at & KEY_TAKEN == 0,
        });
    }
    Ok(branches)
}

/// The entries of the tables of `kind` about instructions in `link`, as the running kernel has them by now.
fn entries(
    source: &Source<'_>,
    kind: SiteKind,
    link: &Range<LinkAddr>,
    insn: u64,
    others: &[u64],
) -> Result<Vec<TableEntry>, Reason> {
    let mut found = Vec::new();
    for entry in source.shipped.sites().entries(kind, link) {
        // The image's distances: the kernel sorts some tables, and none of them changes what an entry is about.
        let leads = others.iter().filter_map(|field| {
            let at = usize::try_from(*field).ok()?;
            Some((at, source.runtime(entry.relative(*field)?)))
        });
        let leads = leads.collect();
        let bytes = match kind {
            // What was warned of once is marked there.
            SiteKind::Bug => (source.table)(source.runtime(entry.at), entry.bytes.len())?,
            _ => entry.bytes.to_vec(),
        };
        found.push(TableEntry {
            at: source.runtime(entry.site.range.start),
            bytes,
            insn: usize::try_from(insn).unwrap_or(usize::MAX),
            leads,
        });
    }
    Ok(found)
}
