//! Clones: a function of the running kernel, all of it, moved to code of ours, as a package like any other.
//!
//! What is moved is what the kernel has made of its image, proved byte by byte ([`crate::kernel::changed`]), but for what it may change at any
//! time: static branches become tests of their live key, static calls go through the kernel's trampolines, the tracer's site is a NOP,
//! and `lock` prefixes stay. Instructions are copied; what they reach relative to themselves is re-aimed, at the clone where it is code of the
//! function, else at what it was. Calls of the function's own beginning stay calls of the original, as a C edition's would. So the clone
//! does in its place what the original does in its own, and what cannot be moved like that is refused with the place and the reason.

mod flags;
mod moved;
mod original;
mod refused;
mod tables;

use std::cell::OnceCell;
use std::ops::Range;

use self::moved::{Moved, To};
use self::original::{Original, Source};
pub use self::refused::{CloneError, Reason, Refused};
use super::list;
use super::object::{Edition, Function, Made, Package, Place, Relocation, Section, Symbol};
use super::reloc::Kind;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::changed::{Cause, Change, compare_part};
use crate::kernel::image::Image;
use crate::kernel::locate::Kernel;
use crate::kernel::symbols::Symbol as KernelSymbol;
use crate::plan::target::Target;
use crate::publish::{BUGS, FIXUPS};

/// Most functions that are cloned at once.
pub const MAX_CLONES: usize = 64;

/// The package whose editions of the functions called `names` are their clones.
///
/// `redirected` is what is known of a function that leads to an edition already: its clone is of what it was before. The guest may run.
///
/// # Errors
/// [`CloneError`]; of a kernel that changes its text at that moment too, so that another try may succeed.
pub fn package<'r, R: ReadPhys>(
    kernel: &Kernel,
    guest: &R,
    names: &[String],
    redirected: impl Fn(Gva) -> Option<&'r list::Function>,
) -> Result<Package, CloneError> {
    let held = OnceCell::new();
    let mut maker = Maker::new(kernel.image());
    for (nth, name) in names.iter().enumerate() {
        if names.iter().take(nth).any(|other| other == name) {
            let function = name.clone();
            return Err(CloneError::Twice { function });
        }
        let symbol = kernel.image().symbols().lookup(name)?;
        let known = redirected(kernel.runtime(symbol.address)).map(|known| &known.target);
        let source = Source {
            image: kernel.image(),
            shipped: kernel.image().shipped()?,
            slide: kernel.slide(),
            text: &|range| live(kernel, guest, known, range),
            table: &|at, len| {
                let mut bytes = vec![0; len];
                kernel
                    .read(guest, at, &mut bytes)
                    .map_err(Reason::from)
                    .map(|()| bytes)
            },
            held: &held,
        };
        maker.add(&Original::of(&source, &symbol)?)?;
    }
    Ok(maker.finish())
}

/// Moves functions of an image that nobody runs, to tell which can be: as far as the image says what a kernel makes of it.
#[derive(Debug)]
pub struct Trial<'a> {
    image: &'a Image,
    held: OnceCell<original::Held>,
}

impl<'a> Trial<'a> {
    /// A trial of the functions of `image`.
    #[must_use]
    pub fn of(image: &'a Image) -> Self {
        let held = OnceCell::new();
        Self { image, held }
    }

    /// The bytes of the clone of the function behind `symbol`.
    ///
    /// # Errors
    /// [`CloneError`].
    pub fn size(&self, symbol: &KernelSymbol) -> Result<u64, CloneError> {
        let shipped = self.image.shipped()?;
        let source = Source {
            image: self.image,
            shipped,
            slide: 0,
            text: &|range| {
                shipped
                    .text(LinkAddr(range.start.0)..LinkAddr(range.end.0))
                    .map(<[u8]>::to_vec)
                    .ok_or(Reason::NotText)
            },
            table: &|at, len| {
                let range = LinkAddr(at.0).range(len as u64);
                let bytes = range.and_then(|range| shipped.bytes(range));
                bytes.map(<[u8]>::to_vec).ok_or(Reason::NotText)
            },
            held: &self.held,
        };
        let original = Original::of(&source, symbol)?;
        let mut maker = Maker::new(self.image);
        maker.add(&original)?;
        let made = maker.made.sections.first();
        Ok(made.map_or(0, |section| section.bytes.len() as u64))
    }
}

/// What the running kernel's text at `range` is but for what changes at any time, of which it is what the image says.
fn live<R: ReadPhys>(
    kernel: &Kernel,
    guest: &R,
    redirected: Option<&Target>,
    range: &Range<Gva>,
) -> Result<Vec<u8>, Reason> {
    let mut code = kernel.shipped_text(range.clone())?;
    let mut put = |at: Gva, bytes: &[u8]| {
        let Some(start) = at.offset_from(range.start) else {
            return;
        };
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let room = code.get_mut(start..).unwrap_or_default().iter_mut();
        room.zip(bytes).for_each(|(byte, of)| *byte = *of);
    };
    let jump = redirected.and_then(|target| target.jump.range(target.displaced.len() as u64));
    let mut changes = Vec::new();
    let ours = jump.as_slice();
    let each = |change: &Change| changes.push(change.clone());
    let summary = compare_part(kernel, guest, ours, range, each)?;
    // What is given back after boot is not compared, and no function any more.
    if range.end.offset_from(range.start) != Some(summary.compared) {
        return Err(Reason::NotText);
    }
    for change in changes {
        use Cause::{Alternative, CallThunk, Paravirt, Retpoline, ReturnThunk, RuntimeConst};
        match change.cause {
            Alternative | Paravirt | Retpoline | ReturnThunk | CallThunk | RuntimeConst => {
                put(change.range.start, &change.expected);
            }
            Cause::SmpLock
            | Cause::IbtEndbr
            | Cause::JumpLabel
            | Cause::StaticCall
            | Cause::Fentry
            | Cause::Bpf
            | Cause::Ours => {}
            cause @ (Cause::Tracer | Cause::Kprobe | Cause::Unexplained) => {
                let at = change.range.start;
                return Err(Reason::Changed { at, cause });
            }
        }
    }
    if let Some(target) = redirected {
        put(target.jump, &target.displaced);
    }
    Ok(code)
}

/// A package in the making: its code first, its tables behind.
struct Maker<'a> {
    image: &'a Image,
    made: Made,
    fixups: Section,
    bugs: Section,
}

/// Index of the code among the sections.
const TEXT: usize = 0;

fn section(name: &str, code: bool, align: u64) -> Section {
    Section {
        name: name.to_owned(),
        code,
        bytes: Vec::new(),
        align,
        relocations: Vec::new(),
    }
}

impl<'a> Maker<'a> {
    fn new(image: &'a Image) -> Self {
        Self {
            image,
            made: Made {
                build_id: image.build_id().to_vec(),
                sections: vec![section(".text", true, moved::ALIGN)],
                ..Made::default()
            },
            fixups: section(FIXUPS, false, 4),
            bugs: section(BUGS, false, 4),
        }
    }

    /// Adds the clone of `original`.
    fn add(&mut self, original: &Original) -> Result<(), Refused> {
        let moved = Moved::of(original)?;
        let base = self
            .made
            .sections
            .first()
            .map_or(0, |text| text.bytes.len());
        let base = base.next_multiple_of(usize::try_from(moved::ALIGN).unwrap_or(1));
        let offset = base as u64;
        for (at, kind, to, addend) in &moved.relocations {
            let relocation = self.relocation(original, base + at, *kind, offset, *to, *addend);
            if let Some(text) = self.made.sections.first_mut() {
                text.relocations.push(relocation);
            }
        }
        if let Some(text) = self.made.sections.first_mut() {
            text.bytes.resize(base, moved::GAP);
            text.bytes.extend(&moved.code);
        }
        for part in &moved.parts {
            self.made.functions.push(Function {
                name: format!("{}.clone", part.name),
                section: TEXT,
                offset: offset + part.range.start,
                size: part.range.end - part.range.start,
            });
        }
        self.made.editions.push(Edition {
            function: original.name.clone(),
            position: 0,
            section: TEXT,
            offset,
        });
        self.made.orc.extend(tables::unwinding(
            self.image,
            original.slide,
            &moved,
            offset,
        ));
        for row in tables::fixups(original, &moved)? {
            self.table(original, |maker| &mut maker.fixups, offset, row);
        }
        for row in tables::bugs(original, &moved) {
            self.table(original, |maker| &mut maker.bugs, offset, row);
        }
        Ok(())
    }

    fn table(
        &mut self,
        original: &Original,
        of: impl Fn(&mut Self) -> &mut Section,
        offset: u64,
        row: tables::Row,
    ) {
        let base = of(self).bytes.len();
        for (field, to) in row.fields {
            let relocation = self.relocation(original, base + field, Kind::Pc32, offset, to, 0);
            of(self).relocations.push(relocation);
        }
        of(self).bytes.extend(row.bytes);
    }

    fn relocation(
        &mut self,
        original: &Original,
        offset: usize,
        kind: Kind,
        base: u64,
        to: To,
        addend: i64,
    ) -> Relocation {
        let (place, at) = match to {
            To::Here(at, of) => (Place::Here(TEXT, base + at), of),
            To::There(at) => (Place::At(at), at),
        };
        let symbols = &mut self.made.symbols;
        let known = symbols.iter().position(|symbol| symbol.place == place);
        let symbol = known.unwrap_or_else(|| {
            let name = original.name_of(self.image, at);
            symbols.push(Symbol { name, place });
            symbols.len() - 1
        });
        Relocation {
            offset,
            kind,
            symbol,
            addend,
        }
    }

    fn finish(mut self) -> Package {
        for table in [self.fixups, self.bugs] {
            if !table.bytes.is_empty() {
                self.made.sections.push(table);
            }
        }
        self.made.into()
    }
}

#[cfg(test)]
mod run_tests;
#[cfg(test)]
mod tests;
