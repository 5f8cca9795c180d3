//! Whether something of the guest's own leads the calls of a function elsewhere before they come to what is behind its fentry site.
//!
//! What the guest puts at the site runs before that. A tracer or a probe lets the call go on; a livepatch never does, and a BPF program that may
//! give the function's result (`fmod_ret`) does as it likes. The function tracer's record of the site says who is there, and the lists of
//! livepatches and BPF trampolines say more. A kprobe that leads calls elsewhere cannot be told from one that looks at them, unless it says so.
//! Sources: kernel `kernel/livepatch/patch.c`, `kernel/bpf/trampoline.c`.

use super::ftrace;
use super::gather::Bound;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// The first byte of what a function tracer makes of a site in use: a call.
const CALL: u8 = 0xe8;
/// Buckets of BPF's table of trampolines (`TRAMPOLINE_TABLE_SIZE`).
const BUCKETS: usize = 1 << 10;
/// More of each than any guest has.
const MAX_LIVEPATCHED: usize = 1 << 16;
const MAX_TRAMPOLINES: usize = 1 << 16;

/// Who leads calls elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shadow {
    /// A livepatch: all calls.
    Livepatch,
    /// A BPF program that may give the function's result: those that it likes.
    Bpf,
    /// A user of the function tracer that says that it may.
    Tracer,
}

impl Shadow {
    /// Who that is, in words.
    #[must_use]
    pub fn who(self) -> &'static str {
        match self {
            Self::Livepatch => "a livepatch of the guest's",
            Self::Bpf => "a BPF program of the guest's that may give its result (fmod_ret)",
            Self::Tracer => "a probe of the guest's that may lead its calls elsewhere",
        }
    }
}

impl Kernel {
    /// Who leads calls of `function` elsewhere at its fentry site at `site`, if anybody does. The guest may run.
    ///
    /// # Errors
    /// When what the guest says of the site cannot be read: while the guest changes it, that may pass.
    pub fn shadow<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        function: Gva,
        site: Gva,
    ) -> Result<Option<Shadow>, KernelError> {
        let memory = Memory::new(self, guest)?;
        let mut first = [0];
        memory.read(site, &mut first)?;
        if first != [CALL] {
            return Ok(None);
        }
        let flags = ftrace::flags_of(self, &memory, site)?;
        let Some(flags) = flags.filter(|flags| flags.in_use()) else {
            return Ok(None);
        };
        if flags.modified() {
            let livepatched = self.is_livepatched(&memory, function)?;
            return Ok(Some(if livepatched {
                Shadow::Livepatch
            } else {
                Shadow::Tracer
            }));
        }
        let bpf = flags.direct() && self.may_give_result(&memory, function)?;
        Ok(bpf.then_some(Shadow::Bpf))
    }

    /// Whether a livepatch leads calls of `function` elsewhere: the newest of those that it has, if that has any code of its own.
    fn is_livepatched<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        function: Gva,
    ) -> Result<bool, KernelError> {
        let Some(list) = self.image().symbols().optional("klp_ops")? else {
            return Ok(false);
        };
        let types = self.image().types();
        let (node, stack) = (
            types.offset_of("klp_ops", "node")?,
            types.offset_of("klp_ops", "func_stack")?,
        );
        let of = |path| types.offset_of("klp_func", path);
        let (stacked, old, nop) = (of("stack_node")?, of("old_func")?, of("nop")?);
        let head = self.runtime(list.address).0;
        let mut bound = Bound::new("list of livepatched functions", MAX_LIVEPATCHED);
        let mut link = memory.u64(Gva(head))?;
        while link != head {
            bound.step(link)?;
            let top = link.wrapping_sub(node).wrapping_add(stack);
            let newest = memory.u64(Gva(top))?;
            if newest != top {
                let of = newest.wrapping_sub(stacked);
                let mut is_nop = [0];
                memory.read(Gva(of.wrapping_add(nop)), &mut is_nop)?;
                if memory.u64(Gva(of.wrapping_add(old)))? == function.0 {
                    return Ok(is_nop == [0]);
                }
            }
            link = memory.u64(Gva(link))?;
        }
        Ok(false)
    }

    /// Whether a BPF program that may give the result is attached to `function`.
    fn may_give_result<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        function: Gva,
    ) -> Result<bool, KernelError> {
        let Some(table) = self.image().symbols().optional("trampoline_table")? else {
            return Ok(false);
        };
        let types = self.image().types();
        let of = |path| types.offset_of("bpf_trampoline", path);
        let (link, address, counts) = (of("hlist")?, of("func.addr")?, of("progs_cnt")?);
        let kind = types.enumerator("bpf_tramp_prog_type", "BPF_TRAMP_MODIFY_RETURN")?;
        let count = counts.wrapping_add(u64::try_from(kind).unwrap_or(0).wrapping_mul(4));
        let mut buckets = vec![0; BUCKETS * 8];
        memory.read(self.runtime(table.address), &mut buckets)?;
        let mut bound = Bound::new("table of BPF trampolines", MAX_TRAMPOLINES);
        for bucket in buckets.as_chunks::<8>().0 {
            let mut node = u64::from_le_bytes(*bucket);
            while node != 0 {
                bound.step(node)?;
                let trampoline = node.wrapping_sub(link);
                if memory.u64(Gva(trampoline.wrapping_add(address)))? == function.0 {
                    return Ok(memory.u32(Gva(trampoline.wrapping_add(count)))? > 0);
                }
                node = memory.u64(Gva(node))?;
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::Shadow;
    use crate::addr::Gva;
    use crate::kernel::testing::guest::{SLIDE, TinyGuest};
    use crate::kernel::testing::shadow::{BUCKET, livepatch, trampoline};
    use crate::kernel::testing::{FORMS, TEXT};

    const FUNCTION: u64 = TEXT + 0x300 + SLIDE;
    const OTHER: u64 = TEXT + 0x340 + SLIDE;
    const IN_USE: u64 = 1 << 31 | 1;

    /// A record of the function tracer for the function, between those of others, on the second page.
    fn traced(guest: &mut TinyGuest, flags: u64) {
        let (page, last, records) = (guest.object(24), guest.object(24), guest.object(48));
        let pages = guest.at("ftrace_pages_start");
        guest.put(pages, page);
        guest.put(page, last);
        guest.put(last + 8, records);
        guest.put(last + 16, 3);
        for (nth, at) in [FUNCTION - 64, FUNCTION, FUNCTION + 64]
            .into_iter()
            .enumerate()
        {
            let record = records + nth as u64 * 16;
            guest.put(record, at);
            guest.put(record + 8, if at == FUNCTION { flags } else { u64::MAX });
        }
        guest.put_bytes(FUNCTION, &[0xe8, 0, 0, 0, 0]);
    }

    fn check(what: &str, prepare: impl Fn(&mut TinyGuest), want: Result<Option<Shadow>, &str>) {
        for form in FORMS {
            let mut guest = TinyGuest::new(form, 4);
            let list = guest.at("klp_ops");
            guest.list(list, &[]);
            guest.put_bytes(FUNCTION, &[0x0f, 0x1f, 0x44, 0, 0]);
            prepare(&mut guest);
            let kernel = guest.kernel();
            let found = kernel.shadow(&guest, Gva(FUNCTION), Gva(FUNCTION));
            match (found, want) {
                (Ok(found), Ok(want)) => assert_eq!(found, want, "{what}, {form:?}"),
                (Err(error), Err(words)) => {
                    assert!(
                        error.to_string().contains(words),
                        "{what}, {form:?}: {error}"
                    );
                }
                (found, want) => panic!("{what}, {form:?}: {found:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn who_may_lead_calls_elsewhere_is_told_from_who_only_looks() {
        let none = Ok(None);
        check("nobody", |_| {}, none);
        check("a tracer", |guest| traced(guest, IN_USE), none);
        check(
            "a site that is not in use",
            |guest| traced(guest, 1 << 26),
            none,
        );
        check(
            "a probe",
            |guest| traced(guest, IN_USE | 1 << 26),
            Ok(Some(Shadow::Tracer)),
        );
        let patched = |of: &'static [(u64, &'static [bool])]| {
            move |guest: &mut TinyGuest| {
                traced(guest, IN_USE | 1 << 26);
                livepatch(guest, of);
            }
        };
        check(
            "a livepatch",
            patched(&[(OTHER, &[false]), (FUNCTION, &[false, true])]),
            Ok(Some(Shadow::Livepatch)),
        );
        check(
            "one that the newest takes back",
            patched(&[(FUNCTION, &[true, false])]),
            Ok(Some(Shadow::Tracer)),
        );
        check(
            "one of another function",
            patched(&[(OTHER, &[false])]),
            Ok(Some(Shadow::Tracer)),
        );
        let attached = |function: u64, programs: [u32; 3]| {
            move |guest: &mut TinyGuest| {
                traced(guest, IN_USE | 1 << 23);
                trampoline(guest, function, programs);
            }
        };
        check("programs that look", attached(FUNCTION, [1, 1, 0]), none);
        check("of another function", attached(OTHER, [0, 0, 1]), none);
        check(
            "a program that gives the result",
            attached(FUNCTION, [1, 0, 2]),
            Ok(Some(Shadow::Bpf)),
        );
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let endless = |guest: &mut TinyGuest| {
            traced(guest, IN_USE);
            let page = guest.get(guest.at("ftrace_pages_start"));
            guest.put(page, page);
        };
        check(
            "pages in a circle",
            endless,
            Err("list of traced functions"),
        );
        let many = |guest: &mut TinyGuest| {
            traced(guest, IN_USE);
            let page = guest.get(guest.at("ftrace_pages_start"));
            guest.put(page + 16, u64::from(u32::MAX));
        };
        check("too many records", many, Err("count of traced functions"));
        let lost = |guest: &mut TinyGuest| {
            traced(guest, IN_USE | 1 << 26);
            let list = guest.at("klp_ops");
            let node = guest.object(32);
            guest.put(list, node);
            guest.put(node, node);
            guest.put(node + 16, node + 16);
        };
        check("livepatches in a circle", lost, Err("list of livepatched"));
        let round = |guest: &mut TinyGuest| {
            traced(guest, IN_USE | 1 << 23);
            let node = guest.object(64);
            let table = guest.at("trampoline_table");
            guest.put(table + BUCKET, node);
            guest.put(node, node);
        };
        check(
            "trampolines in a circle",
            round,
            Err("table of BPF trampolines"),
        );
    }
}
