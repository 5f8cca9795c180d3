//! A kernel's image from a guest's memory alone: no file is needed, and nothing is asked of the guest.
//!
//! A vCPU's interrupt table leads to code of the kernel, its page tables to all that is mapped around it. Kallsyms is found there by
//! its shape, and names the rest: types, unwind table, build-id. What comes out is an [`Image`] like that of the file, in link addresses,
//! but for what memory no longer holds ([`super::image::Shipped`]).
//!
//! Holding it proves that the symbols were whole and the only ones, that the processor handles interrupts where they say, and that the
//! kernel moved by a distance that kernels move by. The guest is believed no further: what it made up, it made up for itself, and every
//! length is bounded by the kernel's own bytes.

mod mapped;
mod parts;

use std::ops::Range;
use std::sync::Arc;

use self::mapped::{KERNEL, runs};
use super::image::{Image, Section};
use super::kallsyms::{KallsymsError, Steps, Tables};
use super::locate::{DIVIDE_ERROR, KernelError, SLIDE_END, SLIDE_STEP, Start, USER_TABLES};
use super::orc::{OrcError, OrcTable};
use super::symbols::{SymbolError, Symbols};
use super::types::{TypeError, Types};
use super::vmcoreinfo;
use crate::addr::{Gva, LinkAddr};
use crate::guest::{ReadPhys, Vcpu, VcpuState};
use crate::x86::paging::{PageTables, PagingError};

/// Where kernels are linked (`__START_KERNEL`, with the usual `CONFIG_PHYSICAL_START`), where nothing in memory says otherwise.
const LINKED: u64 = 0xffff_ffff_8100_0000;

/// Why no kernel was recovered from memory.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// No vCPU runs.
    #[error("no vCPU of the guest has been started")]
    NoVcpu,
    /// A vCPU does not run a kernel's address space (yet).
    #[error("vCPU {vcpu} does not run a kernel, or has not got that far in its boot: {source}")]
    Paging {
        /// Index of the vCPU.
        vcpu: usize,
        /// What its page tables say.
        source: PagingError,
    },
    /// Interrupt 0 is handled outside where kernels are.
    #[error(
        "vCPU {vcpu} handles interrupt 0 at {handler}, where no Linux kernel is: it has not got that far in its boot, or runs something else"
    )]
    Elsewhere {
        /// Index of the vCPU.
        vcpu: usize,
        /// Its handler.
        handler: Gva,
    },
    /// So much is mapped that no kernel is that large.
    #[error(
        "{bytes:#x} bytes are mapped where the guest's kernel should be, more than any kernel has"
    )]
    TooLarge {
        /// How many.
        bytes: u64,
    },
    /// No symbols are there, or damaged ones.
    #[error("no kernel's symbols are in the guest's memory: {0}")]
    Symbols(#[from] KallsymsError),
    /// Two tables of symbols are there.
    #[error(
        "the guest's memory holds two kernels' symbols, at {first} and {second}: which it runs cannot be told"
    )]
    Ambiguous {
        /// Where one is.
        first: Gva,
        /// Where another is.
        second: Gva,
    },
    /// The kernel lacks a symbol that is needed.
    #[error("the kernel in the guest's memory cannot be understood: {0}")]
    Symbol(#[from] SymbolError),
    /// The symbols are not those of the kernel that runs.
    #[error(
        "the symbols in the guest's memory say that interrupt 0 is handled at {symbol}, but vCPU {vcpu} handles it at {handler}"
    )]
    Handler {
        /// Index of the vCPU.
        vcpu: usize,
        /// Its handler.
        handler: Gva,
        /// What the symbols say.
        symbol: Gva,
    },
    /// The kernel lies where it cannot have moved to.
    #[error(
        "the kernel in the guest's memory begins at {text}, {slide:#x} from where it was linked, which no kernel moves by"
    )]
    Slide {
        /// Its first byte.
        text: Gva,
        /// The distance.
        slide: u64,
    },
    /// Two symbols do not bound a part of the kernel.
    #[error(
        "the kernel's {part} in the guest's memory would be from {} to {}, which is no part of it", .range.start, .range.end
    )]
    Part {
        /// The part.
        part: &'static str,
        /// Where it would be.
        range: Range<LinkAddr>,
    },
    /// The kernel carries no build-id.
    #[error(
        "the kernel in the guest's memory has no build-id, so that it could not be told from others"
    )]
    BuildId,
    /// The types are there, but damaged.
    #[error("the types in the guest's memory cannot be read: {0}")]
    Types(#[from] TypeError),
    /// Something of the kernel cannot be read, or is unsound.
    #[error("the kernel in the guest's memory cannot be read: {0}")]
    Kernel(#[from] KernelError),
}

impl From<PagingError> for RecoverError {
    fn from(error: PagingError) -> Self {
        Self::Kernel(error.into())
    }
}

/// What was recovered.
pub(crate) struct Recovered {
    pub(crate) sections: Vec<Section>,
    /// The build-id, and where it is.
    pub(crate) build_id: (Vec<u8>, LinkAddr),
    pub(crate) symbols: Symbols,
    pub(crate) types: Types,
    pub(crate) orc: Result<OrcTable, OrcError>,
}

impl Image {
    /// Recovers the image of the kernel that `guest` runs from its memory, by the registers of any vCPU that has been started.
    ///
    /// It costs copies of the kernel's symbols, types and unwind table, and a moment's copy of its constants.
    ///
    /// # Errors
    /// When the guest runs no kernel yet, or none that can be understood without its file, or its memory is damaged.
    pub fn from_memory<R: ReadPhys + ?Sized>(
        guest: &R,
        vcpus: &[Vcpu],
    ) -> Result<Self, RecoverError> {
        let mut failure = RecoverError::NoVcpu;
        for (vcpu, registers) in vcpus
            .iter()
            .enumerate()
            .filter(|(_, vcpu)| vcpu.state != VcpuState::Offline)
        {
            for user_tables in [0, USER_TABLES] {
                if user_tables != 0 && registers.cr3 & user_tables == 0 {
                    continue;
                }
                let start = Start {
                    vcpu,
                    registers,
                    user_tables,
                };
                match recover(guest, &start) {
                    Ok(recovered) => return Ok(Self::recovered(recovered)),
                    // Of user's tables, which map next to nothing, there is nothing to be said that the kernel's do not say better.
                    Err(RecoverError::Paging { .. })
                        if !matches!(failure, RecoverError::NoVcpu) => {}
                    Err(error) => failure = error,
                }
            }
        }
        Err(failure)
    }
}

fn recover<R: ReadPhys + ?Sized>(guest: &R, start: &Start<'_>) -> Result<Recovered, RecoverError> {
    let vcpu = start.vcpu;
    let gate = start
        .gate(guest)
        .map_err(|source| RecoverError::Paging { vcpu, source })?;
    let handler = gate.handler;
    if !KERNEL.contains(&handler) {
        return Err(RecoverError::Elsewhere { vcpu, handler });
    }
    let symbols = symbols(guest, gate.tables)?;
    // Nothing has been taken off its addresses yet.
    let running = |name: &str| {
        let symbol = symbols.lookup(name)?;
        Ok::<Gva, SymbolError>(Gva(symbol.address.0))
    };
    let symbol = running(DIVIDE_ERROR)?;
    if symbol != handler {
        return Err(RecoverError::Handler {
            vcpu,
            handler,
            symbol,
        });
    }
    let text = running("_text")?;
    let slide = slide(guest, gate.tables, &symbols, text)?;
    let memory = parts::Memory {
        guest,
        tables: gate.tables,
        slide,
    };
    parts::all(&memory, symbols.lowered(slide))
}

/// Tables of symbols that were found: where they are, their bytes, and themselves.
type Found = (Gva, Vec<u8>, Tables);

/// The symbols among all that is mapped where kernels are, in running addresses.
fn symbols<R: ReadPhys + ?Sized>(guest: &R, tables: PageTables) -> Result<Symbols, RecoverError> {
    let (steps, mut failure) = (Steps::default(), KallsymsError::NoTokens);
    // A kernel that has booted keeps its constants where nobody writes or executes; one that still boots has not told them apart yet.
    for constant in [true, false] {
        let mut found: Vec<Found> = Vec::new();
        for run in runs(guest, tables, constant)? {
            let damaged = search(guest, tables, &run, &steps, &mut found)?;
            failure = damaged.unwrap_or(failure);
        }
        if let Some((_, bytes, tables)) = found.pop() {
            return Ok(Symbols::new(Arc::new(bytes), tables)?);
        }
    }
    Err(failure.into())
}

/// Adds the tables in `run` to what was `found`, of which there may be but one. Gives back what looked like more, but is damaged.
fn search<R: ReadPhys + ?Sized>(
    guest: &R,
    tables: PageTables,
    run: &Range<Gva>,
    steps: &Steps,
    found: &mut Vec<Found>,
) -> Result<Option<KallsymsError>, RecoverError> {
    let len = run.end.0 - run.start.0;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    if tables.read(guest, run.start, &mut bytes).is_err() {
        // Pages that lie in no memory hold nothing; what else is there goes on being looked at.
        return Ok(None);
    }
    let mut within = 0..bytes.len();
    loop {
        let at = run.start.0.wrapping_add(within.start as u64);
        let tables = match Tables::find(&bytes, &within, at, steps) {
            Ok(tables) => tables,
            Err(KallsymsError::NoTokens) => return Ok(None),
            Err(endless @ KallsymsError::Endless) => return Err(endless.into()),
            Err(damaged) => return Ok(Some(damaged)),
        };
        let extent = tables.extent();
        let at = Gva(run.start.0.wrapping_add(extent.start as u64));
        if let Some((first, ..)) = found.first() {
            return Err(RecoverError::Ambiguous {
                first: *first,
                second: at,
            });
        }
        within.start = extent.end;
        let own = bytes.get(extent.clone()).unwrap_or_default().to_vec();
        found.push((at, own, tables.moved(extent.start)));
    }
}

/// How far the kernel that begins at `text` has moved: what it says of itself, or else the distance from where kernels are linked.
fn slide<R: ReadPhys + ?Sized>(
    guest: &R,
    tables: PageTables,
    symbols: &Symbols,
    text: Gva,
) -> Result<u64, RecoverError> {
    let at = |name: &str| Ok::<_, SymbolError>(symbols.optional(name)?.map(|of| Gva(of.address.0)));
    let said = match (at("vmcoreinfo_data")?, at("vmcoreinfo_size")?) {
        (Some(data), Some(size)) => vmcoreinfo::text(guest, tables, data, size)?,
        _ => None,
    };
    let said = said.and_then(|text| vmcoreinfo::slide(&text));
    let slide = said.unwrap_or_else(|| text.0.wrapping_sub(LINKED));
    if slide.is_multiple_of(SLIDE_STEP) && slide < SLIDE_END {
        Ok(slide)
    } else {
        Err(RecoverError::Slide { text, slide })
    }
}

#[cfg(test)]
mod tests;
