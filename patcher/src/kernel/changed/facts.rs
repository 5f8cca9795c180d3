//! What decides how the kernel has changed its text: read from the guest once.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::counted::Counting;
use super::window::Window;
use super::{ChangedError, boot};
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::alternatives::Features;
use crate::kernel::bpf::{Bpf, BpfKind};
use crate::kernel::bytes::le_u64;
use crate::kernel::ftrace;
use crate::kernel::gather::Bound;
use crate::kernel::image::Shipped;
use crate::kernel::locate::Kernel;
use crate::kernel::memory::Memory;
use crate::kernel::sites::{Site, SiteKind};
use crate::kernel::text::ReturnForm;

/// Sites that are looked at to tell how all of a kind were changed.
const SAMPLE: usize = 64;
/// More users of the function tracer than any guest has.
const MAX_TRACERS: usize = 4096;
/// Flags of a kprobe (`KPROBE_FLAG_*`).
const PROBE_OFF: u32 = 1 | 2;
const PROBE_OPTIMIZED: u32 = 4;
const PROBE_TRACED: u32 = 8;

/// How indirect branches through thunks were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RetpolineForm {
    /// Not at all.
    Thunk,
    /// To an indirect branch with a fence before it, where there is room for both.
    Fenced,
    /// To an indirect branch.
    Direct,
    /// To a thunk that counts.
    Counted,
}

/// How one kprobe shows.
pub(super) enum Probe {
    Breakpoint(LinkAddr),
    /// With where its jump leads.
    Jump(LinkAddr, Gva),
}

/// All of it.
pub(super) struct Facts<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) shipped: &'a Shipped,
    pub(super) returns: ReturnForm,
    /// The thunk that only returns in the lower half of a cache line jump to.
    pub(super) its_thunk: Option<Gva>,
    pub(super) retpolines: RetpolineForm,
    /// The thunks of indirect branches: where, and the register's number.
    pub(super) thunks: HashMap<LinkAddr, u8>,
    pub(super) counting: Option<Counting>,
    pub(super) locks_dropped: bool,
    pub(super) seal: Option<[u8; 4]>,
    /// What the processor can do.
    pub(super) features: Features,
    /// The table of paravirtual operations, and where it is.
    pub(super) operations: (LinkAddr, Vec<u8>),
    /// What alternatives are replaced by.
    pub(super) replacements: Option<Window<'a>>,
    /// Sites of the function tracer that are in use, and whether by a direct call.
    pub(super) traced: HashMap<LinkAddr, bool>,
    /// Code that the tracer made: where its sites may call.
    pub(super) tracers: Vec<Range<Gva>>,
    /// Where the trampolines of BPF begin: its sites call those.
    pub(super) bpf: HashSet<Gva>,
    pub(super) probes: Vec<Probe>,
    /// The constants that are written into instructions, by the table of their sites.
    pub(super) constants: HashMap<String, [u8; 8]>,
    /// Trampolines of static calls, each with its keys: several where names are ambiguous.
    pub(super) trampolines: Vec<(LinkAddr, Vec<LinkAddr>)>,
}

impl<'a> Facts<'a> {
    pub(super) fn read<R: ReadPhys + ?Sized>(
        kernel: &'a Kernel,
        guest: &R,
        memory: &Memory<'_, R>,
    ) -> Result<Self, ChangedError> {
        let symbols = kernel.image().symbols();
        let its = symbols.optional("its_return_thunk")?;
        let shipped = kernel.image().shipped()?;
        let returns = kernel.return_form(guest)?;
        let mut facts = Self {
            kernel,
            shipped,
            returns,
            counting: Counting::of(kernel, returns)?,
            its_thunk: its.map(|thunk| kernel.runtime(thunk.address)),
            retpolines: RetpolineForm::Thunk,
            thunks: boot::thunks(kernel)?,
            locks_dropped: false,
            seal: None,
            features: Features::read(kernel, guest)?,
            operations: operations(kernel, memory)?,
            replacements: None,
            traced: traced(kernel, memory)?,
            tracers: tracers(kernel, memory)?,
            bpf: bpf(kernel, memory)?,
            probes: probes(kernel, guest, memory)?,
            constants: constants(kernel, memory)?,
            trampolines: trampolines(kernel),
        };
        let text = super::text(kernel)?;
        let alone = |kind| alone(shipped, kind, &text);
        facts.retpolines = facts.retpoline_form(memory, &alone(SiteKind::Retpoline))?;
        if let Some(site) = alone(SiteKind::SmpLock).first() {
            let mut byte = [0];
            memory.read(kernel.runtime(site.range.start), &mut byte)?;
            facts.locks_dropped = byte == [boot::NO_LOCK];
        }
        if let Some(site) = alone(SiteKind::IbtEndbr).first() {
            let mut bytes = [0; 4];
            memory.read(kernel.runtime(site.range.start), &mut bytes)?;
            facts.seal = Some(bytes);
        }
        let sections = kernel.image().sections();
        let replacements = sections
            .iter()
            .find(|section| section.name == ".altinstr_replacement");
        if let Some(section) = replacements {
            let mut window = Window::of(kernel, section.range.clone())?;
            boot::apply_first(&facts, &mut window)?;
            facts.replacements = Some(window);
        }
        Ok(facts)
    }

    fn retpoline_form<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        sites: &[Site],
    ) -> Result<RetpolineForm, ChangedError> {
        use RetpolineForm::{Counted, Direct, Fenced, Thunk};
        let mut forms = vec![Thunk, Fenced, Direct];
        if self.counting.is_some() {
            forms.push(Counted);
        }
        for site in sites {
            let image = self.shipped.text(site.range.clone()).unwrap_or_default();
            let mut live = vec![0; image.len()];
            let at = self.kernel.runtime(site.range.start);
            memory.read(at, &mut live)?;
            forms.retain(|form| {
                let want = boot::retpoline(self, *form, site.range.start, image);
                want.is_some_and(|want| super::same::same(&want, &live, at))
            });
            if forms.is_empty() {
                return Err(ChangedError::Unknown {
                    what: "indirect branch",
                    at,
                    value: live,
                });
            }
        }
        Ok(forms.first().copied().unwrap_or(Thunk))
    }
}

/// The first sites of `kind` that no alternative replaces.
fn alone(shipped: &Shipped, kind: SiteKind, text: &Range<LinkAddr>) -> Vec<Site> {
    let sites = shipped.sites();
    let mut found = sites.first(kind, text, SAMPLE);
    found.retain(|site| {
        sites
            .first(SiteKind::Alternative, &site.range, 1)
            .is_empty()
    });
    found
}

fn operations<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<(LinkAddr, Vec<u8>), ChangedError> {
    let Some(table) = kernel.image().symbols().optional("pv_ops")? else {
        return Ok((LinkAddr(0), Vec::new()));
    };
    let size = kernel.image().types().size_of("paravirt_patch_template")?;
    let mut bytes = vec![0; usize::try_from(size.min(1 << 16)).unwrap_or(0)];
    memory.read(kernel.runtime(table.address), &mut bytes)?;
    Ok((table.address, bytes))
}

/// The function tracer's records of sites that are in use.
fn traced<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<HashMap<LinkAddr, bool>, ChangedError> {
    let link = |at: Gva| LinkAddr(at.0.wrapping_sub(kernel.slide()));
    let records = ftrace::in_use(kernel, memory)?.into_iter();
    Ok(records
        .map(|(at, flags)| (link(at), flags.direct()))
        .collect())
}

/// The trampolines that the function tracer made for its users.
fn tracers<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<Vec<Range<Gva>>, ChangedError> {
    let mut tracers = Vec::new();
    let Some(list) = kernel.image().symbols().optional("ftrace_ops_list")? else {
        return Ok(tracers);
    };
    let types = kernel.image().types();
    let of = |path| types.offset_of("ftrace_ops", path);
    let (next, at, size) = (of("next")?, of("trampoline")?, of("trampoline_size")?);
    let mut bound = Bound::new("list of tracers", MAX_TRACERS);
    let mut ops = memory.u64(kernel.runtime(list.address))?;
    while ops != 0 {
        bound.step(ops)?;
        let word = |offset: u64| memory.u64(Gva(ops.wrapping_add(offset)));
        let start = Gva(word(at)?);
        tracers.extend(start.range(word(size)?).filter(|range| !range.is_empty()));
        ops = word(next)?;
    }
    Ok(tracers)
}

fn bpf<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<HashSet<Gva>, ChangedError> {
    let code = Bpf::read_from(kernel, memory)?;
    let pieces = code.pieces().iter();
    let trampolines = pieces.filter(|piece| piece.kind == BpfKind::Trampoline);
    Ok(trampolines.map(|piece| piece.range.start).collect())
}

fn probes<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    memory: &Memory<'_, R>,
) -> Result<Vec<Probe>, ChangedError> {
    let types = kernel.image().types();
    let mut probes = Vec::new();
    for (at, probe) in kernel.kprobes(guest)? {
        let link = LinkAddr(at.0.wrapping_sub(kernel.slide()));
        let flags = types.offset_of("kprobe", "flags")?;
        let flags = memory.u32(Gva(probe.0.wrapping_add(flags)))?;
        if flags & (PROBE_OFF | PROBE_TRACED) != 0 {
            continue;
        }
        if flags & PROBE_OPTIMIZED == 0 {
            probes.push(Probe::Breakpoint(link));
            continue;
        }
        // An optimised probe begins with the plain one.
        let of = |path| types.offset_of("optimized_kprobe", path);
        let detour = of("optinsn.insn")?.wrapping_sub(of("kp")?);
        let detour = memory.u64(Gva(probe.0.wrapping_add(detour)))?;
        probes.push(Probe::Jump(link, Gva(detour)));
    }
    Ok(probes)
}

/// The constants, each in the variable that its table is named after.
fn constants<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<HashMap<String, [u8; 8]>, ChangedError> {
    let mut constants = HashMap::new();
    for section in kernel.image().sections() {
        let name = section.name.strip_prefix("runtime_");
        let Some((kind, name)) = name.and_then(|name| name.split_once('_')) else {
            continue;
        };
        let at = kernel.symbol(name)?;
        let value = match kind {
            "ptr" => memory.u64(at)?,
            "shift" => memory.u32(at)?.into(),
            _ => {
                return Err(ChangedError::Unknown {
                    what: "kind of constant",
                    at,
                    value: section.name.clone().into_bytes(),
                });
            }
        };
        constants.insert(section.name.clone(), value.to_le_bytes());
    }
    Ok(constants)
}

/// The trampolines of static calls: their names tell their keys.
fn trampolines(kernel: &Kernel) -> Vec<(LinkAddr, Vec<LinkAddr>)> {
    let symbols = kernel.image().symbols();
    let mut found = Vec::new();
    for symbol in symbols.iter() {
        let Some(name) = symbol.name.strip_prefix("__SCT__") else {
            continue;
        };
        let keys = symbols.namesakes(&format!("__SCK__{name}"));
        let keys = keys.into_iter().map(|key| key.symbol.address);
        found.push((symbol.address, keys.collect()));
    }
    found
}

impl Facts<'_> {
    /// The operation at `slot` of the table of paravirtual operations.
    pub(super) fn operation(&self, slot: LinkAddr) -> Option<Gva> {
        let offset = usize::try_from(slot.offset_from(self.operations.0)?).ok()?;
        le_u64(&self.operations.1, offset).map(Gva)
    }

    /// How the return at `at` must be.
    pub(super) fn return_at(&self, at: LinkAddr) -> Vec<u8> {
        const UPPER_HALF: u64 = 0x20;
        match self.returns {
            ReturnForm::Jump(thunk) if Some(thunk) != self.its_thunk || at.0 & UPPER_HALF == 0 => {
                boot::branch(&[0xe9], self.kernel.runtime(at), thunk)
            }
            _ => vec![0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        }
    }
}
