//! The code that the guest's BPF has made: programs with their subprograms, trampolines and dispatchers.
//!
//! It is what the kernel lists for its own look-ups of names and exceptions: a stretch stays listed as long as it can be entered
//! anew. Classic filters (of sockets, seccomp) are not listed by the kernel, nor by this.
//! Sources: kernel `kernel/bpf/{core,trampoline,dispatcher}.c`, `include/linux/bpf.h` (`struct bpf_ksym`).

use std::ops::Range;

use super::gather::{Bound, Gather};
use super::image::Image;
use super::layout::LayoutError;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;

/// More pieces of code than any guest has.
const MAX_PIECES: usize = 1 << 16;
/// Bytes that one piece may have: a million instructions of the largest program, each made into some.
const MAX_LEN: u64 = 32 << 20;
/// How the names of dispatchers begin.
const DISPATCHER: &[u8; 15] = b"bpf_dispatcher_";
/// The longest name that is read (`KSYM_NAME_LEN`).
const MAX_NAME: u64 = 512;

/// Where the kernel lists it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BpfLayout {
    head: LinkAddr,
    link: u64,
    start: u64,
    end: u64,
    name: u64,
    name_len: u64,
    program: u64,
}

impl BpfLayout {
    /// `None` for a kernel that lists none.
    pub(crate) fn resolve(image: &Image) -> Result<Option<Self>, LayoutError> {
        const ENTRY: &str = "bpf_ksym";
        let types = image.types();
        // Before Linux 5.7 programs alone were listed, each in a structure of its own.
        if !types.has_member(ENTRY, "lnode") {
            return Ok(None);
        }
        let Some(head) = image.symbols().optional("bpf_kallsyms")? else {
            return Ok(None);
        };
        let name = types.member(ENTRY, "name")?;
        Ok(Some(Self {
            head: head.address,
            link: types.offset_of(ENTRY, "lnode")?,
            start: types.offset_of(ENTRY, "start")?,
            end: types.offset_of(ENTRY, "end")?,
            name: name.offset,
            name_len: name.size.min(MAX_NAME),
            program: types.offset_of(ENTRY, "prog")?,
        }))
    }
}

/// What a piece of code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BpfKind {
    /// A program, or a subprogram of one.
    Program,
    /// Between a function and the programs that trace it, or other code that the kernel made for programs.
    Trampoline,
    /// Branches to programs, in either half of its memory.
    Dispatcher,
}

/// One piece of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpfCode {
    /// Where the kernel describes it (`struct bpf_ksym`).
    pub at: Gva,
    /// Where it is.
    pub range: Range<Gva>,
    /// What it is.
    pub kind: BpfKind,
}

/// All of it, in the order of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bpf(Vec<BpfCode>);

impl Bpf {
    /// Reads what `kernel` has in `guest`, which must stand still.
    ///
    /// # Errors
    /// When the list cannot be read, or does not end.
    pub fn read<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Self, KernelError> {
        Self::read_from(kernel, &Memory::new(kernel, guest)?)
    }

    pub(crate) fn read_from<R: ReadPhys + ?Sized>(
        kernel: &Kernel,
        memory: &Memory<'_, R>,
    ) -> Result<Self, KernelError> {
        let Some(layout) = kernel.layout().bpf.as_ref() else {
            return Ok(Self::default());
        };
        let begin = DISPATCHER.len() as u64;
        let gather = Gather::new(&[
            (layout.link, 8),
            (layout.start, 8),
            (layout.end, 8),
            (layout.name, begin),
            (layout.program, 1),
        ]);
        let mut fields = gather.fields();
        let mut bound = Bound::new("list of BPF code", MAX_PIECES);
        let head = kernel.runtime(layout.head).0;
        let mut pieces = Vec::new();
        let mut node = memory.u64(Gva(head))?;
        while node != head {
            bound.step(node)?;
            let at = Gva(node.wrapping_sub(layout.link));
            fields.read(memory, at)?;
            let (start, end) = (fields.u64(layout.start), fields.u64(layout.end));
            if start > end || end - start > MAX_LEN {
                return Err(KernelError::Unsound {
                    what: "BPF code",
                    at,
                    value: end,
                });
            }
            let kind = if fields.array(layout.program) != [0] {
                BpfKind::Program
            } else if fields.array(layout.name) == *DISPATCHER {
                BpfKind::Dispatcher
            } else {
                BpfKind::Trampoline
            };
            pieces.push(BpfCode {
                at,
                range: Gva(start)..Gva(end),
                kind,
            });
            node = fields.u64(layout.link);
        }
        pieces.sort_by_key(|piece| piece.range.start);
        Ok(Self(pieces))
    }

    /// All pieces, in the order of addresses.
    #[must_use]
    pub fn pieces(&self) -> &[BpfCode] {
        &self.0
    }

    /// The one piece that `at` is in. Of pieces that overlap, which no kernel has, none is believed.
    #[must_use]
    pub fn at(&self, at: Gva) -> Option<&BpfCode> {
        let after = self.0.partition_point(|piece| piece.range.start <= at);
        let index = after.checked_sub(1)?;
        let piece = self.0.get(index)?;
        let before = index.checked_sub(1).and_then(|before| self.0.get(before));
        let overlaps = before.is_some_and(|before| before.range.end > piece.range.start)
            || self
                .0
                .get(after)
                .is_some_and(|next| next.range.start < piece.range.end);
        (piece.range.contains(&at) && !overlaps).then_some(piece)
    }
}

impl BpfCode {
    /// Its name, as the kernel shows it: `bpf_prog_TAG_NAME`, `bpf_trampoline_KEY`, `bpf_dispatcher_NAME`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn name<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<String, KernelError> {
        let Some(layout) = kernel.layout().bpf.as_ref() else {
            return Ok(String::new());
        };
        let mut bytes = vec![0; usize::try_from(layout.name_len).unwrap_or(0)];
        let at = Gva(self.at.0.wrapping_add(layout.name));
        kernel.read(guest, at, &mut bytes)?;
        let len = bytes.iter().position(|byte| *byte == 0);
        bytes.truncate(len.unwrap_or(bytes.len()));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::{Bpf, BpfKind};
    use crate::addr::Gva;
    use crate::kernel::testing::FORMS;
    use crate::kernel::testing::guest::TinyGuest;

    const CODE: u64 = 0xffff_ffff_c0a0_0000;
    const PIECES: [(u64, u64, &str, bool); 4] = [
        (CODE + 0x1000, CODE + 0x2000, "bpf_trampoline_6442", false),
        (CODE + 0x100, CODE + 0x180, "bpf_prog_0123_name", true),
        (CODE + 0x3000, CODE + 0x4000, "bpf_dispatcher_xdp", false),
        (CODE + 0x180, CODE + 0x1c0, "bpf_prog_4567_F", true),
    ];

    #[test]
    fn code_is_found_by_its_address_and_has_a_name() {
        for form in FORMS {
            let mut guest = TinyGuest::new(form, 4);
            guest.bpf(&PIECES);
            let kernel = guest.kernel();
            let bpf = Bpf::read(&kernel, &guest).unwrap();
            let starts: Vec<u64> = bpf
                .pieces()
                .iter()
                .map(|code| code.range.start.0 - CODE)
                .collect();
            assert_eq!(starts, [0x100, 0x180, 0x1000, 0x3000]);
            for (offset, want) in [
                (0xff, None),
                (0x100, Some(("bpf_prog_0123_name", BpfKind::Program))),
                (0x17f, Some(("bpf_prog_0123_name", BpfKind::Program))),
                (0x180, Some(("bpf_prog_4567_F", BpfKind::Program))),
                (0x1c0, None),
                (0x1fff, Some(("bpf_trampoline_6442", BpfKind::Trampoline))),
                (0x3000, Some(("bpf_dispatcher_xdp", BpfKind::Dispatcher))),
                (0x4000, None),
            ] {
                let got = bpf.at(Gva(CODE + offset));
                let name = got.map(|code| (code.name(&kernel, &guest).unwrap(), code.kind));
                let want = want.map(|(name, kind)| (name.to_owned(), kind));
                assert_eq!(name, want, "{form:?} {offset:#x}");
            }
        }
    }

    #[test]
    fn a_list_that_is_not_sound_is_no_list() {
        for form in FORMS {
            let read = |change: &dyn Fn(&mut TinyGuest)| {
                let mut guest = TinyGuest::new(form, 4);
                change(&mut guest);
                let kernel = guest.kernel();
                Bpf::read(&kernel, &guest).map_err(|error| error.to_string())
            };
            assert_eq!(read(&|_| {}).unwrap().pieces(), []);
            let circle = read(&|guest| {
                let described = guest.bpf(&PIECES);
                guest.bpf_circle(described[1]);
            });
            assert!(circle.unwrap_err().contains("list of BPF code"));
            for (start, end) in [(CODE + 1, CODE), (CODE, CODE + (64 << 20))] {
                let odd = read(&|guest| {
                    guest.bpf(&[(start, end, "odd", true)]);
                });
                assert!(odd.unwrap_err().contains("BPF code"));
            }
            // Neither of two that overlap is believed.
            let both = read(&|guest| {
                let second = (CODE + 0x140, CODE + 0x200, "other", true);
                guest.bpf(&[PIECES[1], second]);
            });
            let both = both.unwrap();
            assert_eq!(both.at(Gva(CODE + 0x120)), None);
            assert_eq!(both.at(Gva(CODE + 0x1f0)), None);
        }
    }
}
