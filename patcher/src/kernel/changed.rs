//! What the running kernel's text holds beside what its image says, and why: each difference has its cause, or none.
//!
//! For every byte of the kernel's text it is worked out what must be there: the image, relocated; what the kernel made of
//! it at boot, as its tables and its processor say; and what it switches since, by the keys as they are now. What
//! is there must be that, byte for byte; only NOPs may be of any encoding, since kernels differ in how they choose it.
//! A mechanism that is in use and not known here is an error, never a difference that is passed by.
//! Sources: kernel `arch/x86/kernel/{alternative,callthunks,jump_label,static_call,ftrace}.c`, `arch/x86/kernel/kprobes/core.c`.

mod boot;
mod counted;
mod facts;
mod moved;
mod same;
mod switched;
mod window;

use std::collections::BTreeMap;
use std::ops::Range;

use self::facts::Facts;
use self::window::Window;
use super::boot::BootState;
use super::image::NotShipped;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::relocs::RelocError;
use super::symbols::SymbolError;
use super::text::ReturnError;
use super::types::TypeError;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::x86::paging::PagingError;

/// Bytes of text that are worked on at a time.
const STEP: u64 = 1 << 20;
/// No site is longer: each that touches a step is whole within this around it.
const MARGIN: u64 = 0x100;
/// Unexplained differences that are kept; all are counted.
const KEPT: usize = 1000;

/// Why text differs from the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// A better alternative for the processor, or NOPs that were made longer.
    Alternative,
    /// A paravirtual call made direct, or taken out.
    Paravirt,
    /// An indirect branch, as the mitigations demand.
    Retpoline,
    /// A return, as the mitigations demand.
    ReturnThunk,
    /// A call that is counted as a mitigation, or the code that counts.
    CallThunk,
    /// A `lock` prefix dropped on a machine with one CPU.
    SmpLock,
    /// An `endbr64` that no indirect branch may lead to any more.
    IbtEndbr,
    /// A constant that became known at boot.
    RuntimeConst,
    /// A static branch.
    JumpLabel,
    /// A static call or its trampoline.
    StaticCall,
    /// The function tracer's site at a function's beginning: idle, or in use.
    Fentry,
    /// The function tracer's site of a function that BPF programs trace.
    Bpf,
    /// The function tracer's own code.
    Tracer,
    /// A kprobe, or the jump of an optimised one.
    Kprobe,
    /// A trampoline of ours.
    Ours,
    /// Nothing that is known.
    Unexplained,
}

/// One difference: neighbouring bytes of one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where.
    pub range: Range<Gva>,
    /// Why.
    pub cause: Cause,
    /// The function that it is in, and how far in.
    pub function: Option<(String, u64)>,
    /// What the image says, relocated.
    pub image: Vec<u8>,
    /// What must be there.
    pub expected: Vec<u8>,
    /// What is there.
    pub live: Vec<u8>,
}

/// How many differences of one cause there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Places.
    pub places: u64,
    /// Bytes that differ.
    pub bytes: u64,
}

/// All differences, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of text that were compared.
    pub compared: u64,
    /// Differences by cause.
    pub causes: BTreeMap<Cause, Count>,
    /// The first unexplained ones.
    pub unexplained: Vec<Change>,
}

/// Why text cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum ChangedError {
    /// What the image says of its text is not known.
    #[error("the kernel's text cannot be compared: {0}")]
    NotShipped(#[from] NotShipped),
    /// Something of the kernel could not be found, read, or is unsound.
    #[error("the kernel's text cannot be compared: {0}")]
    Kernel(#[from] KernelError),
    /// The image's relocations do not say.
    #[error("the kernel's text cannot be compared: {0}")]
    Reloc(#[from] RelocError),
    /// How the kernel returns cannot be told.
    #[error("the kernel's text cannot be compared: {0}")]
    Returns(#[from] ReturnError),
    /// The kernel still boots, or is on its way down.
    #[error("the kernel's text cannot be compared: it is in state {state}")]
    Boot {
        /// The kernel's name for its state.
        state: String,
    },
    /// The kernel is changing its text.
    #[error("the kernel's text cannot be compared: {lock} is held, so that it may be half changed")]
    InFlux {
        /// What says so.
        lock: &'static str,
    },
    /// A mechanism is in use that is not known here.
    #[error(
        "the kernel's text cannot be compared: its {what} at {at} is {value:02x?}, which is not known here"
    )]
    Unknown {
        /// The mechanism.
        what: &'static str,
        /// A place where it shows.
        at: Gva,
        /// What is there.
        value: Vec<u8>,
    },
}

impl From<SymbolError> for ChangedError {
    fn from(error: SymbolError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<TypeError> for ChangedError {
    fn from(error: TypeError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<PagingError> for ChangedError {
    fn from(error: PagingError) -> Self {
        Self::Kernel(error.into())
    }
}

/// Compares all text of `kernel` in `guest`, which must stand still, with what must be there. `ours` are the
/// trampolines that were written on purpose; `each` is given every difference, in the order of addresses.
///
/// # Errors
/// When the guest is not in a state to be compared, or changes its text in a way that is not known here.
pub fn compare<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    ours: &[Range<Gva>],
    each: impl FnMut(&Change),
) -> Result<Summary, ChangedError> {
    compare_link(kernel, guest, ours, &text(kernel)?, each)
}

/// As [`compare`], of `part` of the text only: what of it is no text of the kernel that stays is not compared.
///
/// # Errors
/// As [`compare`].
pub fn compare_part<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    ours: &[Range<Gva>],
    part: &Range<Gva>,
    each: impl FnMut(&Change),
) -> Result<Summary, ChangedError> {
    let (text, part) = (text(kernel)?, link(kernel, part));
    let start = part.start.clamp(text.start, text.end);
    let end = part.end.clamp(start, text.end);
    compare_link(kernel, guest, ours, &(start..end), each)
}

/// Compares `part`, which lies in the text, in steps of bounded length.
fn compare_link<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    ours: &[Range<Gva>],
    part: &Range<LinkAddr>,
    mut each: impl FnMut(&Change),
) -> Result<Summary, ChangedError> {
    match kernel.boot_state(guest)? {
        BootState::Running => {}
        BootState::NotFinished { state } | BootState::Ending { state } => {
            return Err(ChangedError::Boot { state });
        }
    }
    if let Some(lock) = kernel.text_in_flux(guest)? {
        return Err(ChangedError::InFlux { lock });
    }
    let memory = Memory::new(kernel, guest)?;
    let facts = Facts::read(kernel, guest, &memory)?;
    let text = text(kernel)?;
    let mut summary = Summary::default();
    let mut start = part.start;
    while start < part.end {
        let core = start..LinkAddr(start.0.saturating_add(STEP)).min(part.end);
        let around = LinkAddr(core.start.0.saturating_sub(MARGIN)).max(text.start)
            ..LinkAddr(core.end.0.saturating_add(MARGIN)).min(text.end);
        let mut window = Window::of(kernel, around)?;
        boot::apply(&facts, &mut window)?;
        switched::apply(&facts, &memory, &mut window)?;
        for range in ours {
            window.give(&link(kernel, range), Cause::Ours);
        }
        window.compare(&memory, &core, &mut |change| {
            summary.add(&change);
            each(&change);
        })?;
        summary.compared += core.end.0 - core.start.0;
        start = core.end;
    }
    Ok(summary)
}

impl Summary {
    fn add(&mut self, change: &Change) {
        let count = self.causes.entry(change.cause).or_default();
        count.places += 1;
        count.bytes += change.range.end.0 - change.range.start.0;
        if change.cause == Cause::Unexplained && self.unexplained.len() < KEPT {
            self.unexplained.push(change.clone());
        }
    }
}

fn link(kernel: &Kernel, range: &Range<Gva>) -> Range<LinkAddr> {
    let of = |at: Gva| LinkAddr(at.0.wrapping_sub(kernel.slide()));
    of(range.start)..of(range.end)
}

/// The text that stays when the kernel has booted: what lies behind it in its section is given back.
fn text(kernel: &Kernel) -> Result<Range<LinkAddr>, ChangedError> {
    let image = kernel.image();
    let section = image
        .sections()
        .iter()
        .find(|section| section.name == ".text");
    let missing = || {
        ChangedError::Kernel(KernelError::Unsound {
            what: "image, which has no section .text,",
            at: Gva(0),
            value: 0,
        })
    };
    let section = section.ok_or_else(missing)?.range.clone();
    let end = match image.symbols().optional("_etext")? {
        Some(end) if section.contains(&end.address) => end.address,
        _ => section.end,
    };
    Ok(section.start..end)
}

#[cfg(test)]
pub(crate) mod tests;
