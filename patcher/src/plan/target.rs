//! A function of the running kernel that can be redirected: all rules of [`super::checks`] hold for it.

use std::ops::Range;

use super::refusal::Refusal;
use super::reliance::{Callers, Reliance};
use super::{Lead, checks};
use crate::addr::{Gva, LinkAddr};
use crate::edition::link::Returns;
use crate::edition::list::Function;
use crate::edition::object::Edition;
use crate::guest::ReadPhys;
use crate::kernel::image::{NotShipped, Shipped};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::sites::{Site, SiteKind};
use crate::kernel::symbols::{Symbol, SymbolError};
use crate::x86::insn::{self, InsnError, JUMP_LEN};
use crate::x86::paging::PagingError;

/// What the kernel makes of a return where it needs no thunk (kernel `arch/x86/kernel/alternative.c`, `patch_return()`).
const PLAIN_RETURN: [u8; JUMP_LEN] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
/// `endbr64`, the fentry site and the displaced instructions take fewer bytes than this.
const HEAD: u64 = 64;
/// The kernel's table of what it calls in place of privileged instructions (kernel `arch/x86/kernel/paravirt.c`).
const OPERATIONS: &str = "pv_ops";
/// Most bytes of it.
const PAGE: u64 = 4096;
/// The most bytes of one function that are looked through for branches.
const MAX_FUNCTION: u64 = 1 << 20;

/// A function that can be redirected, as far as can be known while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Its first byte.
    pub function: Gva,
    /// Bytes to the next symbol.
    pub size: u64,
    /// Where the jump goes: after the fentry site, or first where there is none.
    pub jump: Gva,
    /// The bytes of the whole instructions that the jump displaces.
    pub displaced: Vec<u8>,
}

/// Why a function cannot be redirected, or why that cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// What the kernel's file says of its text is not known, so that nothing can be told to be safe.
    #[error("no function of this kernel can be redirected: {0}")]
    NotShipped(#[from] NotShipped),
    /// The kernel has no such function, or several.
    #[error("the package replaces a function that cannot be found: {0}")]
    Symbol(#[from] SymbolError),
    /// It has the function, but it cannot be redirected.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The function's bytes cannot be read.
    #[error("{function} cannot be read in the running kernel: {cause}")]
    Unreadable {
        /// The function.
        function: String,
        /// Why not.
        cause: PagingError,
    },
    /// What the guest's own probes are cannot be told.
    #[error("the guest's own probes cannot be read: {0}")]
    Probes(#[from] KernelError),
}

impl Target {
    /// Finds the function that `edition` replaces, and checks every rule that can be checked while the guest runs.
    ///
    /// `arena` is where the kernel sees the arena: a jump there is ours. `returns` is how the kernel's functions return. `redirected` is what
    /// is known of a function that leads to an edition already: its jump must still be there.
    ///
    /// # Errors
    /// [`TargetError`]. Nothing was written.
    pub fn find<'r, R: ReadPhys>(
        kernel: &Kernel,
        guest: &R,
        edition: &Edition,
        arena: &Range<Gva>,
        returns: Returns,
        redirected: impl Fn(Gva) -> Option<&'r Function>,
    ) -> Result<Self, TargetError> {
        let shipped = kernel.image().shipped()?;
        let symbols = kernel.image().symbols();
        let symbol = match edition.position {
            0 => symbols.lookup(&edition.function)?,
            nth => symbols.lookup_nth(
                &edition.function,
                usize::try_from(nth).unwrap_or(usize::MAX),
            )?,
        };
        if let Some(known) = redirected(kernel.runtime(symbol.address)) {
            return known.target.still(kernel, guest, known.lead);
        }
        let function = Code::new(kernel, shipped, &symbol)?;
        let jump = function.jump(guest)?;
        let displaced = function.displaced_range(jump)?;
        let displaced_sites = function.sites_in(&displaced);
        checks::no_site(&symbol.name, &displaced_sites, |at| kernel.runtime(at))?;
        let runtime = kernel.runtime(displaced.start)..kernel.runtime(displaced.end);
        checks::no_kprobe(
            &symbol.name,
            &kernel.kprobes_in(guest, std::slice::from_ref(&runtime))?,
        )?;
        function.no_way_into(guest, &displaced)?;

        let unreadable = |cause| TargetError::Unreadable {
            function: symbol.name.clone(),
            cause,
        };
        let mut live =
            vec![0; usize::try_from(runtime.end.0 - runtime.start.0).unwrap_or_default()];
        kernel
            .read(guest, runtime.start, &mut live)
            .map_err(unreadable)?;
        checks::not_ours(&symbol.name, runtime.start, &live, arena)?;
        let expected = function.expected(&displaced, &live, returns)?;
        checks::unchanged(&symbol.name, runtime.start, &expected, &live)?;
        Ok(Self {
            function: kernel.runtime(symbol.address),
            size: symbol.size,
            jump: runtime.start,
            displaced: expected,
            name: symbol.name,
        })
    }

    /// The target itself, if the running kernel leads it to `lead`, as it should.
    fn still<R: ReadPhys>(
        &self,
        kernel: &Kernel,
        guest: &R,
        lead: Lead,
    ) -> Result<Self, TargetError> {
        let expected = self.bytes(lead).map_err(|cause| Refusal::Immovable {
            function: self.name.clone(),
            cause,
        })?;
        let mut live = vec![0; expected.len()];
        let read = kernel.read(guest, self.jump, &mut live);
        read.map_err(|cause| TargetError::Unreadable {
            function: self.name.clone(),
            cause,
        })?;
        checks::unchanged(&self.name, self.jump, &expected, &live)?;
        Ok(self.clone())
    }

    /// What is at the jump's place while the function leads to `lead`.
    ///
    /// # Errors
    /// When that is out of a jump's reach.
    pub fn bytes(&self, lead: Lead) -> Result<Vec<u8>, InsnError> {
        let Some(to) = lead.address() else {
            return Ok(self.displaced.clone());
        };
        let mut bytes = insn::jump(self.jump, to)?.to_vec();
        bytes.extend(insn::nops(self.displaced.len().saturating_sub(JUMP_LEN)));
        Ok(bytes)
    }

    /// All code of the function as the kernel has it: its own, and what the compiler split off. Several functions of one name have as many cold
    /// parts, and nothing says which is whose: all of them are given.
    #[must_use]
    pub fn code(&self, kernel: &Kernel) -> Vec<Range<Gva>> {
        let own = self.function.range(self.size);
        let cold = cold_parts(kernel, &self.name).into_iter();
        let cold = cold.filter_map(|part| kernel.runtime(part.address).range(part.size));
        own.into_iter().chain(cold).collect()
    }

    /// Where no thread may be or return to while the jump is written: the displaced bytes but the first.
    #[must_use]
    pub fn forbidden(&self) -> Range<Gva> {
        let end = Gva(self.jump.0.wrapping_add(self.displaced.len() as u64));
        Gva(self.jump.0.wrapping_add(1))..end
    }
}

/// A function of the image, with its code.
struct Code<'a> {
    kernel: &'a Kernel,
    shipped: &'a Shipped,
    symbol: &'a Symbol,
    code: &'a [u8],
    /// What the image lists for its first [`HEAD`] bytes: all that a jump could concern.
    sites: Vec<Site>,
}

impl<'a> Code<'a> {
    /// The function behind `symbol`, if it lies where functions may be redirected.
    fn new(kernel: &'a Kernel, shipped: &'a Shipped, symbol: &'a Symbol) -> Result<Self, Refusal> {
        let at = kernel.runtime(symbol.address);
        for region in &checks::REGIONS {
            // Asking first is cheap; the error of a missing symbol looks for similar ones.
            let (start, end) = region.bounds;
            if ![start, end]
                .iter()
                .all(|name| kernel.image().symbols().has(name))
            {
                continue;
            }
            if let (Ok(start), Ok(end)) = (kernel.symbol(start), kernel.symbol(end)) {
                checks::outside(&symbol.name, at, region, &(start..end))?;
            }
        }
        let range = symbol.address.range(symbol.size.min(MAX_FUNCTION));
        let code = range.and_then(|range| shipped.text(range));
        let code = code.ok_or_else(|| Refusal::NoFentry {
            function: symbol.name.clone(),
            at,
            why: "it is in no code of the kernel's file",
        })?;
        let head = symbol.address..LinkAddr(symbol.address.0.saturating_add(HEAD));
        Ok(Self {
            kernel,
            shipped,
            symbol,
            code,
            sites: shipped.sites().within(head),
        })
    }

    /// The sites that share a byte with `range`, which lies in the first [`HEAD`] bytes.
    fn sites_in(&self, range: &Range<LinkAddr>) -> Vec<Site> {
        let shares = |site: &&Site| site.range.start < range.end && range.start < site.range.end;
        self.sites.iter().filter(shares).cloned().collect()
    }

    /// Where in the image the jump goes: behind the fentry site, or where that would be.
    fn jump<R: ReadPhys>(&self, guest: &R) -> Result<LinkAddr, TargetError> {
        let (name, first) = (&self.symbol.name, self.symbol.address);
        let offset = match checks::after_fentry(self.code, first, &self.sites) {
            Some(offset) => offset,
            None => {
                self.does_without_fentry(guest)?;
                checks::before_all(self.code)
            }
        };
        checks::room(name, self.symbol.size, offset)?;
        let too_short = || Refusal::TooShort {
            function: name.clone(),
            room: 0,
            needed: JUMP_LEN as u64,
        };
        Ok(first.checked_add(offset).ok_or_else(too_short)?)
    }

    /// The function may be replaced though it has no fentry site: it is C, and no caller relies on what it leaves alone.
    fn does_without_fentry<R: ReadPhys>(&self, guest: &R) -> Result<(), TargetError> {
        let (name, first) = (&self.symbol.name, self.symbol.address);
        let (image, at) = (self.kernel.image(), self.kernel.runtime(first));
        let in_types = image.types().has_prototype(name);
        checks::compiled(name, at, in_types, image.symbols().namesakes(name).len())?;
        checks::no_operation(name, at, &self.operations(guest)?)?;
        let callers = Callers::of(image)?;
        let relies = |found: Reliance| Refusal::Reliance {
            function: name.clone(),
            caller: self.kernel.runtime(found.caller),
            registers: found.registers,
            at: self.kernel.runtime(found.at),
            why: found.why,
        };
        Ok(callers.none_relies(first).map_err(relies)?)
    }

    /// What the running kernel calls in place of privileged instructions, if it has a table of that.
    fn operations<R: ReadPhys>(&self, guest: &R) -> Result<Vec<u64>, TargetError> {
        let symbols = self.kernel.image().symbols();
        let Some(table) = symbols.optional(OPERATIONS)? else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; usize::try_from(table.size.min(PAGE)).unwrap_or_default()];
        let read = self
            .kernel
            .read(guest, self.kernel.runtime(table.address), &mut bytes);
        read.map_err(|cause| TargetError::Unreadable {
            function: OPERATIONS.into(),
            cause,
        })?;
        let words = bytes.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// The whole instructions of the image that a jump at `jump` displaces.
    fn displaced_range(&self, jump: LinkAddr) -> Result<Range<LinkAddr>, Refusal> {
        let part = || self.symbol.name.clone();
        let offset = jump
            .offset_from(self.symbol.address)
            .and_then(|offset| usize::try_from(offset).ok());
        let code = offset
            .and_then(|offset| self.code.get(offset..))
            .unwrap_or_default();
        let instructions = insn::whole_instructions(code, self.kernel.runtime(jump), JUMP_LEN)
            .map_err(|cause| Refusal::Undecodable {
                part: part(),
                cause,
            })?;
        let len = instructions
            .iter()
            .map(|instruction| instruction.len() as u64)
            .sum();
        jump.range(len).ok_or_else(|| Refusal::TooShort {
            function: part(),
            room: 0,
            needed: JUMP_LEN as u64,
        })
    }

    /// The bytes that the running kernel must have at `displaced`, where it has `live`.
    ///
    /// A return is what the kernel made of it at boot: plain, or a jump to its thunk. Both may occur in one kernel.
    fn expected(
        &self,
        displaced: &Range<LinkAddr>,
        live: &[u8],
        returns: Returns,
    ) -> Result<Vec<u8>, Refusal> {
        let kernel = self.kernel;
        let mut sites = self.sites_in(displaced);
        sites.retain(|site| {
            site.kind == SiteKind::ReturnThunk
                && site.range.end <= displaced.end
                && site.range.end.offset_from(site.range.start) == Some(JUMP_LEN as u64)
        });
        let (mut expected, mut at) = (Vec::new(), displaced.start);
        for site in sites {
            expected.extend(self.text(at..site.range.start)?);
            let jump = match returns {
                Returns::Plain => None,
                Returns::Thunk(thunk) => insn::jump(kernel.runtime(site.range.start), thunk).ok(),
            };
            let found = live
                .get(expected.len()..)
                .and_then(|live| live.first_chunk::<JUMP_LEN>());
            let jump = jump.filter(|jump| found == Some(jump));
            expected.extend(jump.unwrap_or(PLAIN_RETURN));
            at = site.range.end;
        }
        expected.extend(self.text(at..displaced.end)?);
        Ok(expected)
    }

    /// What the image says about `range`.
    fn text(&self, range: Range<LinkAddr>) -> Result<Vec<u8>, Refusal> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let runtime = self.kernel.runtime(range.start)..self.kernel.runtime(range.end);
        self.kernel
            .expected_text(runtime)
            .map_err(|error| Refusal::Unpredictable {
                function: self.symbol.name.clone(),
                cause: error.to_string(),
            })
    }

    /// Nothing of the function leads to the middle of the displaced bytes: no branch of it or its cold part, as the image
    /// or the running kernel has them, no static branch that is switched off now, no exception fixup.
    fn no_way_into<R: ReadPhys>(
        &self,
        guest: &R,
        displaced: &Range<LinkAddr>,
    ) -> Result<(), TargetError> {
        let kernel = self.kernel;
        let runtime = kernel.runtime(displaced.start)..kernel.runtime(displaced.end);
        let leading = self.shipped.sites().leading_into(displaced);
        if let Some(&(kind, from)) = leading.first() {
            let part = if kind == SiteKind::JumpLabel {
                "a static branch"
            } else {
                "an exception fixup"
            };
            let part = format!("{part} of {}", self.symbol.name);
            return Err(Refusal::BranchInto {
                part,
                from: kernel.runtime(from),
                to: runtime.start,
            }
            .into());
        }
        checks::no_branch_into(
            &self.symbol.name,
            self.code,
            kernel.runtime(self.symbol.address),
            &runtime,
        )?;
        self.no_live_branch_into(guest, self.symbol, &runtime)?;
        for cold in cold_parts(kernel, &self.symbol.name) {
            let range = cold.address.range(cold.size.min(MAX_FUNCTION));
            let code = range
                .and_then(|range| self.shipped.text(range))
                .unwrap_or_default();
            checks::no_branch_into(&cold.name, code, kernel.runtime(cold.address), &runtime)?;
            self.no_live_branch_into(guest, &cold, &runtime)?;
        }
        Ok(())
    }

    /// Where the kernel has patched itself, live branches may lead elsewhere than those of the image.
    ///
    /// Breakpoints of the guest's own make live code undecodable here and there; what the image says was checked already.
    fn no_live_branch_into<R: ReadPhys>(
        &self,
        guest: &R,
        part: &Symbol,
        displaced: &Range<Gva>,
    ) -> Result<(), TargetError> {
        let at = self.kernel.runtime(part.address);
        let mut live = vec![0; usize::try_from(part.size.min(MAX_FUNCTION)).unwrap_or_default()];
        let unreadable = |cause| TargetError::Unreadable {
            function: part.name.clone(),
            cause,
        };
        self.kernel.read(guest, at, &mut live).map_err(unreadable)?;
        match checks::no_branch_into(&part.name, &live, at, displaced) {
            Err(Refusal::Undecodable { .. }) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// What the compiler split off the functions called `name`.
fn cold_parts(kernel: &Kernel, name: &str) -> Vec<Symbol> {
    let symbols = kernel.image().symbols();
    let name = format!("{name}.cold");
    if !symbols.has(&name) {
        return Vec::new();
    }
    (1..)
        .map_while(|nth| symbols.lookup_nth(&name, nth).ok())
        .collect()
}
