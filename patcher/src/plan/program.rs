//! A kernel's code as the question needs it who relies on what: its functions, what each of them is, and where it is branched to from.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};

use crate::addr::LinkAddr;
use crate::kernel::image::{Image, NotShipped, Shipped};
use crate::kernel::sites::SiteKind;
use crate::x86::insn::{ENDBR64, has_near_target};
use crate::x86::registers::Registers;

/// No site is longer, in bytes: the kernel's tables have one byte for the length.
const LONGEST_SITE: u64 = 0x100;
/// Reach of a branch of two bytes, in bytes.
const SHORT: u64 = 130;

/// What a piece of code is to those who call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A C function with a fentry site. The compiler that was told to make those keeps nothing in registers that a callee leaves alone, in all of the file.
    /// With the registers that may carry its arguments.
    Traced(Registers),
    /// Another C function, with the same.
    Plain(Registers),
    /// What was split off a C function, which `function` is, if there is but one of that name.
    Part { function: Option<LinkAddr> },
    /// Where an indirect branch goes, which is made by jumping there.
    IndirectThunk,
    /// Where a return goes, likewise.
    ReturnThunk,
    /// Nothing runs there.
    Padding,
    /// Assembly, or what nothing is known of.
    Unknown,
}

/// The code around an address, from one symbol to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Function<'a> {
    pub(crate) entry: LinkAddr,
    pub(crate) code: &'a [u8],
    pub(crate) kind: Kind,
}

impl Function<'_> {
    /// The first address behind it.
    pub(crate) fn end(&self) -> LinkAddr {
        LinkAddr(self.entry.0.saturating_add(self.code.len() as u64))
    }
}

/// Code whose callers are asked about.
pub(crate) trait Program {
    /// The function whose code `at` is among.
    fn function(&self, at: LinkAddr) -> Option<Function<'_>>;

    /// Where something like a direct branch to `entry` is in any code; it may be none.
    fn branches_to(&self, entry: LinkAddr) -> Vec<LinkAddr>;

    /// Whether the kernel puts other instructions in the place of some of these, or goes elsewhere from them.
    fn changes(&self, code: &Range<LinkAddr>) -> bool;
}

/// The code of a kernel's image.
#[derive(Debug)]
pub(crate) struct ImageProgram<'a> {
    image: &'a Image,
    shipped: &'a Shipped,
    /// Fentry sites, and where the kernel changes code in other ways, both in the order of addresses.
    fentry: Vec<LinkAddr>,
    changing: Vec<Range<LinkAddr>>,
    /// Targets of what may be branches with a displacement of four bytes, with where those are; in order.
    branches: Vec<(LinkAddr, LinkAddr)>,
}

impl<'a> ImageProgram<'a> {
    /// Looks through all code of `image` once.
    ///
    /// # Errors
    /// When the image was recovered from memory.
    pub(crate) fn new(image: &'a Image) -> Result<Self, NotShipped> {
        let shipped = image.shipped()?;
        let all = LinkAddr(0)..LinkAddr(u64::MAX);
        let (mut fentry, mut changing) = (Vec::new(), Vec::new());
        for site in shipped.sites().within(all) {
            match site.kind {
                SiteKind::Fentry => fentry.push(site.range.start),
                SiteKind::Alternative
                | SiteKind::Paravirt
                | SiteKind::JumpLabel
                | SiteKind::StaticCall
                | SiteKind::Extable => changing.push(site.range),
                SiteKind::Retpoline
                | SiteKind::ReturnThunk
                | SiteKind::Call
                | SiteKind::SmpLock
                | SiteKind::Bug
                | SiteKind::IbtEndbr
                | SiteKind::RuntimeConst => {}
            }
        }
        let mut branches = Vec::new();
        let sections = image.sections().iter().filter(|section| section.executable);
        let text: Vec<_> = sections.map(|section| section.range.clone()).collect();
        for range in &text {
            let code = shipped.text(range.clone()).unwrap_or_default();
            long_branches(code, range.start, &text, &mut branches);
        }
        branches.sort_unstable();
        Ok(Self {
            image,
            shipped,
            fentry,
            changing,
            branches,
        })
    }

    fn is_traced(&self, entry: LinkAddr) -> bool {
        let behind = LinkAddr(entry.0.saturating_add(ENDBR64.len() as u64));
        [entry, behind]
            .iter()
            .any(|at| self.fentry.binary_search(at).is_ok())
    }

    /// What begins at `entry` by the name of `name`.
    fn kind(&self, entry: LinkAddr, name: &str) -> Kind {
        if name.starts_with("__pfx_") {
            return Kind::Padding;
        }
        if name.starts_with("__x86_indirect_") {
            return Kind::IndirectThunk;
        }
        if name == "__x86_return_thunk" {
            return Kind::ReturnThunk;
        }
        let symbols = self.image.symbols();
        if let Some(whole) = name.strip_suffix(".cold") {
            let function = symbols.lookup(whole).ok().map(|symbol| symbol.address);
            return Kind::Part { function };
        }
        let types = self.image.types();
        let arguments = types.argument_registers(name);
        if self.is_traced(entry) {
            let arguments = arguments.map_or(Registers::PASSED, Registers::arguments);
            return Kind::Traced(arguments);
        }
        // One of several namesakes may be assembly.
        match arguments {
            Ok(count) if types.has_prototype(name) && symbols.lookup(name).is_ok() => {
                Kind::Plain(Registers::arguments(count))
            }
            _ => Kind::Unknown,
        }
    }
}

impl Program for ImageProgram<'_> {
    fn function(&self, at: LinkAddr) -> Option<Function<'_>> {
        let (symbol, _) = self.image.symbols().containing(at)?;
        let code = self.shipped.text(symbol.address.range(symbol.size)?)?;
        let kind = self.kind(symbol.address, &symbol.name);
        Some(Function {
            entry: symbol.address,
            code,
            kind,
        })
    }

    fn branches_to(&self, entry: LinkAddr) -> Vec<LinkAddr> {
        let first = self.branches.partition_point(|(to, _)| *to < entry);
        let same = self.branches.get(first..).unwrap_or_default().iter();
        let long = same.take_while(|(to, _)| *to == entry);
        let mut found: Vec<_> = long.map(|(_, from)| *from).collect();
        let around =
            LinkAddr(entry.0.saturating_sub(SHORT))..LinkAddr(entry.0.saturating_add(SHORT));
        let section = self
            .image
            .sections()
            .iter()
            .find(|section| section.executable && section.range.contains(&entry));
        if let Some(section) = section {
            let start = around.start.max(section.range.start);
            let end = around.end.min(section.range.end);
            let code = self.shipped.text(start..end).unwrap_or_default();
            short_branches(code, start, entry, &mut found);
        }
        found
    }

    fn changes(&self, code: &Range<LinkAddr>) -> bool {
        let behind = self.changing.partition_point(|site| site.start < code.end);
        let before = self.changing.get(..behind).unwrap_or_default().iter().rev();
        before
            .take_while(|site| code.start.0.saturating_sub(site.start.0) < LONGEST_SITE)
            .any(|site| code.start < site.end)
    }
}

/// Adds what may be a branch by four bytes in `code`, which lies at `base`, to somewhere in `text`: wherever a byte looks like it.
fn long_branches(
    code: &[u8],
    base: LinkAddr,
    text: &[Range<LinkAddr>],
    found: &mut Vec<(LinkAddr, LinkAddr)>,
) {
    for (offset, window) in code.windows(6).enumerate() {
        let (from, distance) = match window {
            [0xe8 | 0xe9, a, b, c, d, _] => (5, [*a, *b, *c, *d]),
            [0x0f, 0x80..=0x8f, a, b, c, d] => (6, [*a, *b, *c, *d]),
            _ => continue,
        };
        let at = LinkAddr(base.0.wrapping_add(offset as u64));
        let next = at.0.wrapping_add(from);
        let to = LinkAddr(next.wrapping_add_signed(i32::from_le_bytes(distance).into()));
        if text.iter().any(|range| range.contains(&to)) {
            found.push((to, at));
        }
    }
    // The last five bytes are no whole window.
    if let Some(&[0xe8 | 0xe9, a, b, c, d]) = code.last_chunk::<5>() {
        let next = base.0.wrapping_add(code.len() as u64);
        let to = next.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into());
        found.push((LinkAddr(to), LinkAddr(next.wrapping_sub(5))));
    }
}

/// Adds what may be a branch by one byte in `code`, which lies at `base`, to `entry`.
fn short_branches(code: &[u8], base: LinkAddr, entry: LinkAddr, found: &mut Vec<LinkAddr>) {
    for (offset, window) in code.windows(2).enumerate() {
        if let [0xeb | 0x70..=0x7f | 0xe0..=0xe3, distance] = window {
            let at = LinkAddr(base.0.wrapping_add(offset as u64));
            let next = at.0.wrapping_add(2);
            if next.wrapping_add_signed(distance.cast_signed().into()) == entry.0 {
                found.push(at);
            }
        }
    }
}

/// Whether an instruction of `function` begins at `at` and branches to `to`; `None` if its code cannot be decoded so far.
pub(crate) fn branches(function: &Function<'_>, at: LinkAddr, to: LinkAddr) -> Option<bool> {
    let mut decoder = Decoder::with_ip(64, function.code, function.entry.0, DecoderOptions::NONE);
    while decoder.ip() < at.0 {
        if !decoder.can_decode() || decoder.decode().is_invalid() {
            return None;
        }
    }
    if decoder.ip() > at.0 {
        return Some(false);
    }
    let instruction = decoder.decode();
    Some(has_near_target(&instruction) && instruction.near_branch_target() == to.0)
}
