//! What is known of a piece of code: how to find its caller, and whether an address in it is a return address.
//!
//! The image answers for its own code, without a read of the guest: what it says does not change while the kernel runs. Where what was shipped
//! is not known, the guest's code answers alone, as far as it is still there. Other code is what the caller of the unwinder says it is, a module's,
//! what BPF made, or a copy of the image's that a tracer of the guest made.

use std::cell::RefCell;
use std::ops::Range;

use super::bpf::BpfFrames;
use super::call::{BEFORE, ends_with_call, ends_with_far_return};
use super::module;
use super::reason::{Reason, Region};
use super::taken::Taken;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::arena;
use crate::kernel::orc::{Base, Orc, OrcTable};
use crate::kernel::sites::SiteKind;
use crate::x86::depth::{pushed, pushed_since};

/// Code outside the kernel's image: an update's, or all of the arena. Of several for one address the first counts.
#[derive(Clone, Debug)]
pub struct OtherCode {
    /// What it is, for reasons.
    pub name: String,
    /// Where it is.
    pub range: Range<Gva>,
    /// How to unwind there, in running addresses.
    pub table: Option<OrcTable>,
}

impl OtherCode {
    /// All of the arena's code: what nothing more is known of.
    #[must_use]
    pub fn arena() -> Self {
        Self {
            name: "the arena".to_owned(),
            range: arena::CODE,
            table: None,
        }
    }
}

/// `MODULES_VADDR` of a kernel that can move itself, and `MODULES_END`.
const MODULES: Range<Gva> = Gva(0xffff_ffff_c000_0000)..Gva(0xffff_ffff_ff00_0000);
/// The lowest address of the kernel's half.
const KERNEL_HALF: Gva = Gva(1 << 63);
const PAGE: u64 = 4096;
/// Addresses that are remembered.
const SEEN: usize = 1024;
/// The section of the code that the kernel starts with.
const START: &str = ".init.text";
/// Bytes of the longest function that is read to its interrupted instruction.
const LONGEST: u64 = 1 << 16;
/// `mov rsp, rax`.
pub(crate) const SWITCH: [u8; 3] = [0x48, 0x89, 0xc4];
/// The function tracer's site is as long as its call.
const FENTRY: u64 = 5;

/// The code of one guest, while it stands still.
pub(crate) struct Code<'a, R: ?Sized> {
    pub(crate) table: &'a OrcTable,
    pub(crate) others: &'a [OtherCode],
    pub(crate) taken: Taken<'a, R>,
    bpf: BpfFrames<'a, R>,
    /// The image's executable sections, and their bytes as they were shipped; none where that is not known.
    sections: Vec<(Range<LinkAddr>, &'a [u8])>,
    /// The code that the kernel starts with and gives back when it has booted, where what was shipped is not known: nothing can be looked up
    /// there any more. The stack of the first thread still begins in it, and that never returns there.
    given_back: Range<LinkAddr>,
    /// What has been found out, each at the place that its address gives: threads wait in few places.
    seen: RefCell<Vec<Option<(Gva, bool, Orc)>>>,
}

impl<'a, R: ReadPhys + ?Sized> Code<'a, R> {
    pub(crate) fn new(table: &'a OrcTable, others: &'a [OtherCode], taken: Taken<'a, R>) -> Self {
        let image = taken.kernel.image();
        let code = image.sections().iter().filter(|section| section.executable);
        let shipped = image.shipped().ok();
        let bytes =
            |range: &Range<LinkAddr>| shipped.and_then(|shipped| shipped.text(range.clone()));
        let start = code.clone().find(|section| section.name == START);
        let given_back = start.filter(|_| shipped.is_none());
        Self {
            table,
            others,
            sections: code
                .map(|section| {
                    let shipped = bytes(&section.range).unwrap_or_default();
                    (section.range.clone(), shipped)
                })
                .collect(),
            given_back: given_back.map_or(LinkAddr(0)..LinkAddr(0), |start| start.range.clone()),
            bpf: BpfFrames::new(taken.kernel, taken.memory),
            taken,
            seen: RefCell::new(vec![None; SEEN]),
        }
    }

    /// How to find the caller of code that was interrupted at `ip`, or begins there.
    pub(crate) fn interrupted(&self, ip: Gva) -> Result<Orc, Reason> {
        self.remember(ip, true, || {
            if self.taken.layout.thunks.contains(&self.link(ip)) {
                return Ok(Orc::ENTERED);
            }
            match self.replaced(ip)? {
                Some(rule) => Ok(rule),
                None => self.rule(ip),
            }
        })
    }

    /// How to find the caller of code that will go on at `ip`, a return address that was found at `slot`.
    pub(crate) fn calling(&self, ip: Gva, slot: Gva) -> Result<Orc, Reason> {
        self.remember(ip, false, || {
            let not_call = Reason::NotCall { value: ip, slot };
            // A call may be the last instruction of its function: what holds at the call is what counts.
            let call = ip.checked_sub(1).ok_or_else(|| not_call.clone())?;
            let rule = self.rule(call)?;
            if self.follows_call(ip, rule)? {
                Ok(rule)
            } else {
                Err(not_call)
            }
        })
    }

    /// Whether the instruction at `ip` goes on with the stack that RAX says.
    pub(crate) fn switches_stack(&self, ip: Gva) -> Result<bool, Reason> {
        let mut live = [0; SWITCH.len()];
        let read = self.taken.memory.read(ip, &mut live);
        read.map(|()| live == SWITCH).map_err(Reason::unreadable)
    }

    fn remember(
        &self,
        ip: Gva,
        interrupted: bool,
        find: impl FnOnce() -> Result<Orc, Reason>,
    ) -> Result<Orc, Reason> {
        // Multiplied by an odd number without pattern, the upper bits depend on all lower ones.
        let mixed = (ip.0 << 1 | u64::from(interrupted)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = usize::try_from(mixed >> 32).unwrap_or(0) % SEEN;
        if let Some(Some((at, was, known))) = self.seen.borrow().get(place)
            && (*at, *was) == (ip, interrupted)
        {
            return Ok(*known);
        }
        let found = find()?;
        if let Some(seen) = self.seen.borrow_mut().get_mut(place) {
            *seen = Some((ip, interrupted, found));
        }
        Ok(found)
    }

    fn link(&self, at: Gva) -> LinkAddr {
        LinkAddr(at.0.wrapping_sub(self.taken.kernel.slide()))
    }

    fn of_image(&self, at: LinkAddr) -> bool {
        self.sections
            .iter()
            .any(|(section, _)| section.contains(&at))
    }

    /// The image's bytes before `at`, as many as a call may have.
    fn image_before(&self, at: LinkAddr) -> Option<&[u8]> {
        let holds = |(section, _): &&(Range<LinkAddr>, _)| section.start < at && at <= section.end;
        let (section, bytes) = self.sections.iter().find(holds)?;
        let end = usize::try_from(at.offset_from(section.start)?).ok()?;
        bytes.get(end.saturating_sub(BEFORE)..end)
    }

    fn rule(&self, at: Gva) -> Result<Orc, Reason> {
        let link = self.link(at);
        let found = if self.of_image(link) {
            self.table.lookup(link.0)
        } else if let Some(other) = self.others.iter().find(|other| other.range.contains(&at)) {
            let region = Region::Given(other.name.clone());
            let table = other.table.as_ref().ok_or(Reason::NoTable { at, region })?;
            table.lookup(at.0)
        } else {
            match self.region(at) {
                Region::Modules => return self.of_modules(at),
                region => return Err(Reason::NoTable { at, region }),
            }
        };
        Ok(found.unwrap_or(Orc::Undefined))
    }

    /// Within code that the kernel put in another's place and that moves the stack pointer: what held where it begins, and what it has pushed since.
    fn replaced(&self, ip: Gva) -> Result<Option<Orc>, Reason> {
        let link = self.link(ip);
        let Some(unlevel) = &self.taken.layout.unlevel else {
            return self.pushed_by_live(ip);
        };
        let mut places = unlevel.iter();
        let Some(place) = places.find(|place| place.start < link && link < place.end) else {
            return Ok(None);
        };
        let kernel = self.taken.kernel;
        let start = kernel.runtime(place.start);
        let shipped = kernel.image().shipped().ok();
        let shipped = shipped.and_then(|shipped| shipped.text(place.clone()));
        let shipped = shipped.unwrap_or_default();
        let mut live = vec![0; shipped.len()];
        let read = self.taken.memory.read(start, &mut live);
        read.map_err(Reason::unreadable)?;
        if live == shipped {
            return Ok(None);
        }
        let before = link.offset_from(place.start);
        let before = before.and_then(|len| live.get(..usize::try_from(len).ok()?));
        let pushed = before
            .and_then(pushed)
            .and_then(|by| i16::try_from(by).ok());
        Ok(Some(match (self.rule(start)?, pushed) {
            (rule, Some(by)) => rule.lower(by),
            (_, None) => Orc::Undefined,
        }))
    }

    /// Where it is not known which code the kernel replaced: the rule that the table has for `ip`, and what the guest's code pushes between the
    /// first byte that the rule is for and `ip`. The table has a rule of its own behind each push that it knows of.
    fn pushed_by_live(&self, ip: Gva) -> Result<Option<Orc>, Reason> {
        let link = self.link(ip);
        if !self.of_image(link) {
            return Ok(None);
        }
        let rule = self.rule(ip)?;
        let by_sp = matches!(
            rule,
            Orc::Caller {
                base: Base::Sp | Base::AtSp,
                ..
            }
        );
        let start = self.table.start(link.0).filter(|start| *start < link.0);
        let Some(start) = start.filter(|_| by_sp) else {
            return Ok(None);
        };
        let symbols = self.taken.kernel.image().symbols();
        let function = symbols.containing(link).map(|(symbol, _)| symbol.address);
        let len = function.and_then(|function| link.offset_from(function));
        let (Some(function), Some(len)) = (function, len.filter(|len| *len <= LONGEST)) else {
            return Ok(Some(Orc::Undefined));
        };
        let mut live = vec![0; usize::try_from(len).unwrap_or(0)];
        let at = self.taken.kernel.runtime(function);
        let read = self.taken.memory.read(at, &mut live);
        read.map_err(Reason::unreadable)?;
        // A rule may be for the padding before the function too.
        let from = usize::try_from(start.saturating_sub(function.0)).unwrap_or(usize::MAX);
        let pushed = pushed_since(&live, from).and_then(|by| i16::try_from(by).ok());
        Ok(Some(pushed.map_or(Orc::Undefined, |by| rule.lower(by))))
    }

    /// In a module, in what BPF made, or in a copy of the image's code.
    fn of_modules(&self, at: Gva) -> Result<Orc, Reason> {
        let Taken {
            kernel,
            memory,
            layout,
        } = self.taken;
        if let Some(layout) = &layout.module {
            let rule = module::rule(kernel, memory, layout, self.table, at);
            if let Some(rule) = rule.map_err(Reason::unreadable)? {
                return Ok(rule);
            }
        }
        if let Some(rule) = self.bpf.rule(at)? {
            return Ok(rule);
        }
        let copied = self.taken.copied_from(at).map_err(Reason::unreadable)?;
        let region = Region::Modules;
        let copied = copied.filter(|copied| self.of_image(*copied));
        let copied = copied.ok_or(Reason::NoTable { at, region })?;
        Ok(self.table.lookup(copied.0).unwrap_or(Orc::Undefined))
    }

    fn region(&self, at: Gva) -> Region {
        let link = self.link(at);
        let sections = self.taken.kernel.image().sections();
        let section = sections
            .iter()
            .find(|section| section.range.contains(&link));
        match section {
            _ if at < KERNEL_HALF => Region::User,
            Some(section) => Region::Image(section.name.clone()),
            None if MODULES.contains(&at) => Region::Modules,
            None => Region::Kernel,
        }
    }

    /// Whether a call lies before `ip`: in the image, or else in the guest, where the kernel may have put it since.
    fn follows_call(&self, ip: Gva, rule: Orc) -> Result<bool, Reason> {
        let link = self.link(ip);
        // The first code of a CPU pushes its own return address, which is where its stack ends.
        let called =
            |code: &[u8]| ends_with_call(code) || rule == Orc::End && ends_with_far_return(code);
        if self.image_before(link).is_some_and(called)
            || self.given_back.contains(&link)
            || called(&self.live_before(ip)?)
        {
            return Ok(true);
        }
        // The tracer takes its call away while threads may still be in what it called.
        let site = link.checked_sub(FENTRY).map(|start| start..link);
        let shipped = self.taken.kernel.image().shipped().ok();
        Ok(site.zip(shipped).is_some_and(|(site, shipped)| {
            shipped
                .sites()
                .first(SiteKind::Fentry, &site, 1)
                .first()
                .is_some_and(|found| found.range == site)
        }))
    }

    /// The guest's bytes before `ip`: fewer where those lie in the first bytes of what is mapped.
    fn live_before(&self, ip: Gva) -> Result<Vec<u8>, Reason> {
        let mut last = None;
        for len in [BEFORE as u64, ip.0 % PAGE] {
            let mut live = vec![0; usize::try_from(len.min(BEFORE as u64)).unwrap_or(0)];
            let start = Gva(ip.0.wrapping_sub(live.len() as u64));
            match self.taken.memory.read(start, &mut live) {
                Ok(()) => return Ok(live),
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(Vec::new()), |error| Err(Reason::unreadable(error)))
    }
}
