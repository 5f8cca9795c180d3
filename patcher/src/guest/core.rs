//! Writes a guest as an ELF core file, as QEMU's `dump-guest-memory` does, so that drgn, crash and gdb open it.
//!
//! Each range of memory is a `PT_LOAD` segment at its physical address. Of each vCPU there are three notes: `NT_PRSTATUS` for all
//! tools, `QEMU` with its control registers, and one of our own (`EXOPATCH`, type 1) with all that [`Vcpu`] has; another of ours
//! (type 2) bounds the arena. What the kernel itself says of its layout is in a note `VMCOREINFO`, where it is
//! found. Sources: QEMU `target/i386/arch_dump.c`; kernel `include/linux/elfcore.h`, `kernel/vmcore_info.c`; the ELF-64
//! specification.

use std::io::{self, Write};
use std::ops::Range;

use super::{ReadPhys, Registers, Vcpu, VcpuState};
use crate::addr::Gpa;

/// Whose a note is, with the zero that ends the name.
pub(super) const EXOPATCH: &[u8] = b"EXOPATCH\0";
pub(super) const QEMU: &[u8] = b"QEMU\0";
const CORE: &[u8] = b"CORE\0";
const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
/// Our note with the registers of one vCPU.
pub(super) const NOTE_VCPU: u32 = 1;
/// Our note with the first and past-the-end address of the arena.
pub(super) const NOTE_ARENA: u32 = 2;
const NT_PRSTATUS: u32 = 1;
pub(super) const PT_LOAD: u32 = 1;
pub(super) const PT_NOTE: u32 = 4;
const EHDR: usize = 64;
pub(super) const PHDR: usize = 56;
const PAGE: u64 = 4096;
const VCPU_WORDS: usize = 27;
/// `struct elf_prstatus` of x86-64.
const PRSTATUS: usize = 336;
/// Where QEMU's note has its segments and its control registers, and its bytes.
pub(super) const QEMU_SEGMENTS: usize = 152;
pub(super) const QEMU_SEGMENT: usize = 24;
pub(super) const QEMU_CONTROL: usize = QEMU_SEGMENTS + 10 * QEMU_SEGMENT;
const QEMU_LEN: u32 = 440;
/// Selectors of the kernel's and the user's code (`__KERNEL_CS`, `__USER_CS`).
const KERNEL_CODE: u32 = 0x10;
const USER_CODE: u32 = 0x33;
/// What the kernel says of its layout begins with this, and fits one page.
const LAYOUT_BEGIN: &[u8] = b"OSRELEASE=";
const LAYOUT_LINES: [&[u8]; 3] = [b"\nPAGESIZE=4096\n", b"\nSYMBOL(", b"\nKERNELOFFSET="];

/// What a core file holds beside registers.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The ranges of guest-physical memory, in order.
    pub memory: &'a [Range<Gpa>],
    /// Where the arena is.
    pub arena: &'a Range<Gpa>,
    /// What the kernel says of its layout: the text of its `VMCOREINFO` note.
    pub vmcoreinfo: Option<&'a [u8]>,
}

/// Writes `guest` as a core file: its registers, its `arena`, and the ranges `memory` of its physical memory. The kernel's
/// `VMCOREINFO` is looked for there ([`find_vmcoreinfo`]).
///
/// # Errors
/// As [`write_contents`].
pub fn write<G: ReadPhys + Registers>(
    out: &mut impl Write,
    guest: &G,
    memory: &[Range<Gpa>],
    arena: &Range<Gpa>,
) -> io::Result<()> {
    let vmcoreinfo = find_vmcoreinfo(guest, memory);
    let contents = Contents {
        memory,
        arena,
        vmcoreinfo: vmcoreinfo.as_deref(),
    };
    write_contents(out, guest, &contents)
}

/// Writes `guest` as a core file with the given contents.
///
/// # Errors
/// When `out` fails, or the guest's memory cannot be read where it is said to be.
pub fn write_contents<G: ReadPhys + Registers>(
    out: &mut impl Write,
    guest: &G,
    contents: &Contents<'_>,
) -> io::Result<()> {
    let memory = contents.memory;
    let notes = notes(guest.vcpus(), contents);
    let headers = EHDR + PHDR * (memory.len() + 1);
    out.write_all(&elf_header(memory.len() + 1)?)?;
    out.write_all(&program_header(PT_NOTE, headers, 0, notes.len() as u64))?;
    let mut at = (headers + notes.len()).next_multiple_of(4096);
    let padding = at - headers - notes.len();
    let lengths = memory
        .iter()
        .map(|range| range.end.offset_from(range.start).unwrap_or(0));
    for (range, len) in memory.iter().zip(lengths) {
        out.write_all(&program_header(PT_LOAD, at, range.start.0, len))?;
        at = at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
    }
    out.write_all(&notes)?;
    out.write_all(&vec![0; padding])?;
    let mut buf = vec![0; 1 << 20];
    for range in memory {
        let mut next = range.start;
        while let Some(left) = range.end.offset_from(next).filter(|left| *left > 0) {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            guest
                .read_phys(next, &mut buf[..len])
                .map_err(io::Error::other)?;
            out.write_all(&buf[..len])?;
            next = Gpa(next.0 + len as u64);
        }
    }
    out.flush()
}

/// What a kernel in `memory` says of its layout, for tools that read core files. `None` where no page holds that, or several
/// hold different ones, as after a kexec: a located kernel knows its own ([`crate::kernel::locate::Kernel::vmcoreinfo`]).
#[must_use]
pub fn find_vmcoreinfo<R: ReadPhys + ?Sized>(guest: &R, memory: &[Range<Gpa>]) -> Option<Vec<u8>> {
    let mut found: Option<Vec<u8>> = None;
    for range in memory {
        let mut at = Gpa(range.start.0.checked_next_multiple_of(PAGE)?);
        while at.checked_add(PAGE).is_some_and(|end| end <= range.end) {
            let mut begin = [0; LAYOUT_BEGIN.len()];
            if guest.read_phys(at, &mut begin).is_ok() && begin == LAYOUT_BEGIN {
                let mut page = vec![0; 4096];
                guest.read_phys(at, &mut page).ok()?;
                match (vmcoreinfo_in(&page), &found) {
                    (Some(text), None) => found = Some(text.to_vec()),
                    (Some(text), Some(other)) if text != other => return None,
                    _ => {}
                }
            }
            at = at.checked_add(PAGE)?;
        }
    }
    found
}

/// The text that a page begins with, if it is what a kernel says of its layout.
pub(crate) fn vmcoreinfo_in(page: &[u8]) -> Option<&[u8]> {
    let end = page
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(page.len());
    let text = page.get(..end)?;
    let plain = text
        .iter()
        .all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\n'));
    let has = |line: &[u8]| text.windows(line.len()).any(|window| window == line);
    let whole = text.starts_with(LAYOUT_BEGIN) && text.ends_with(b"\n");
    (plain && whole && LAYOUT_LINES.into_iter().all(has)).then_some(text)
}

fn elf_header(segments: usize) -> io::Result<[u8; EHDR]> {
    let segments = u16::try_from(segments).map_err(io::Error::other)?;
    let mut header = [0; EHDR];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // Core file, x86-64, version 1; program headers follow.
    header[16..20].copy_from_slice(&[4, 0, 62, 0]);
    header[20] = 1;
    header[32] = 64;
    header[52..54].copy_from_slice(&[64, 0]);
    header[54..56].copy_from_slice(&[56, 0]);
    header[56..58].copy_from_slice(&segments.to_le_bytes());
    Ok(header)
}

fn program_header(kind: u32, file: usize, memory: u64, len: u64) -> [u8; PHDR] {
    let mut header = [0; PHDR];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..16].copy_from_slice(&(file as u64).to_le_bytes());
    header[24..32].copy_from_slice(&memory.to_le_bytes());
    header[32..40].copy_from_slice(&len.to_le_bytes());
    header[40..48].copy_from_slice(&len.to_le_bytes());
    header
}

fn notes(vcpus: &[Vcpu], contents: &Contents<'_>) -> Vec<u8> {
    let mut notes = Vec::new();
    let mut note = |name: &[u8], kind: u32, desc: &[u8]| {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        for word in [len(name), len(desc), kind] {
            notes.extend_from_slice(&word.to_le_bytes());
        }
        for bytes in [name, desc] {
            notes.extend_from_slice(bytes);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
    };
    for (index, vcpu) in vcpus.iter().enumerate() {
        note(CORE, NT_PRSTATUS, &prstatus(index, vcpu));
    }
    for vcpu in vcpus {
        note(QEMU, 0, &qemu_state(vcpu));
    }
    for vcpu in vcpus {
        note(
            EXOPATCH,
            NOTE_VCPU,
            words_of(vcpu).map(u64::to_le_bytes).as_flattened(),
        );
    }
    let bounds = [contents.arena.start.0, contents.arena.end.0].map(u64::to_le_bytes);
    note(EXOPATCH, NOTE_ARENA, bounds.as_flattened());
    if let Some(text) = contents.vmcoreinfo {
        note(VMCOREINFO, 0, text);
    }
    notes
}

/// The words of our note: state, general registers, instruction pointer, flags, privilege level, CR0, CR3, CR4,
/// EFER, interrupt table, GS base, pending event.
fn words_of(vcpu: &Vcpu) -> [u64; VCPU_WORDS] {
    let state = match vcpu.state {
        VcpuState::Running => 0,
        VcpuState::Halted => 1,
        VcpuState::Offline => 2,
    };
    let mut words = [0; VCPU_WORDS];
    words[0] = state;
    words[1..17].copy_from_slice(&vcpu.gpr);
    let rest = [
        vcpu.rip,
        vcpu.rflags,
        u64::from(vcpu.cpl),
        vcpu.cr0,
        vcpu.cr3,
        vcpu.cr4,
        vcpu.efer,
        vcpu.idt_base,
        vcpu.gs_base,
        u64::from(vcpu.event_pending),
    ];
    words[17..].copy_from_slice(&rest);
    words
}

/// `struct elf_prstatus`, with the vCPU's number as thread id.
fn prstatus(index: usize, vcpu: &Vcpu) -> [u8; PRSTATUS] {
    // r15 to r12, rbp, rbx, r11 to r8, rax, rcx, rdx, rsi, rdi; by encoding order.
    const ORDER: [usize; 15] = [15, 14, 13, 12, 5, 3, 11, 10, 9, 8, 0, 1, 2, 6, 7];
    let mut desc = [0; PRSTATUS];
    let mut put = |at: usize, value: u64| desc[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(32, index as u64 + 1);
    for (slot, register) in ORDER.iter().enumerate() {
        put(112 + slot * 8, vcpu.gpr[*register]);
    }
    put(112 + 16 * 8, vcpu.rip);
    put(112 + 17 * 8, code_segment(vcpu).into());
    put(112 + 18 * 8, vcpu.rflags);
    put(112 + 19 * 8, vcpu.rsp());
    put(112 + 22 * 8, vcpu.gs_base);
    desc
}

/// `QEMUCPUState`. What [`Vcpu`] does not have of a segment is zero.
fn qemu_state(vcpu: &Vcpu) -> [u8; QEMU_LEN as usize] {
    // rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15; by encoding order.
    const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut desc = [0; QEMU_LEN as usize];
    desc[..4].copy_from_slice(&1_u32.to_le_bytes());
    desc[4..8].copy_from_slice(&QEMU_LEN.to_le_bytes());
    desc[QEMU_SEGMENTS..QEMU_SEGMENTS + 4].copy_from_slice(&code_segment(vcpu).to_le_bytes());
    let mut put = |at: usize, value: u64| desc[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for (slot, register) in ORDER.iter().enumerate() {
        put(8 + slot * 8, vcpu.gpr[*register]);
    }
    put(8 + 16 * 8, vcpu.rip);
    put(8 + 17 * 8, vcpu.rflags);
    // Code, data, extra, fs, gs, stack, local table, task, global table, interrupt table.
    for (segment, base) in [(4, vcpu.gs_base), (9, vcpu.idt_base)] {
        put(QEMU_SEGMENTS + segment * QEMU_SEGMENT + 16, base);
    }
    for (register, value) in [(0, vcpu.cr0), (3, vcpu.cr3), (4, vcpu.cr4)] {
        put(QEMU_CONTROL + register * 8, value);
    }
    desc
}

fn code_segment(vcpu: &Vcpu) -> u32 {
    if vcpu.cpl == 3 {
        USER_CODE
    } else {
        KERNEL_CODE | u32::from(vcpu.cpl)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Contents, find_vmcoreinfo, notes, vmcoreinfo_in, write};
    use crate::addr::Gpa;
    use crate::guest::dump::Dump;
    use crate::guest::{GuestError, ReadPhys, Registers, Vcpu, VcpuState};
    use crate::kernel::testing::guest::vcpu;

    const TEXT: &[u8] = b"OSRELEASE=6.1.0\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a1f980\nKERNELOFFSET=21c00000\n";

    struct Machine {
        memory: Vec<u8>,
        vcpus: Vec<Vcpu>,
    }

    impl ReadPhys for Machine {
        fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
            let start = usize::try_from(at.0).unwrap();
            let none = GuestError::NoMemory { at, len: buf.len() };
            buf.copy_from_slice(self.memory.get(start..start + buf.len()).ok_or(none)?);
            Ok(())
        }
    }

    impl Registers for Machine {
        fn vcpus(&self) -> &[Vcpu] {
            &self.vcpus
        }
    }

    fn machine(pages: &[(usize, &[u8])]) -> Machine {
        let mut memory = vec![7; 0x8000];
        for (page, text) in pages {
            let at = page * 4096;
            memory[at..at + 4096].fill(0);
            memory[at..at + text.len()].copy_from_slice(text);
        }
        let mut busy = vcpu(0x1000, 4);
        busy.gpr = std::array::from_fn(|index| 0x100 + index as u64);
        (busy.cpl, busy.gs_base) = (0, 0xffff_8880_0000_0000);
        Machine {
            memory,
            vcpus: vec![busy, vcpu(0x2000, 5)],
        }
    }

    #[test]
    fn what_is_written_is_read_back_with_either_note() {
        let machine = machine(&[(3, TEXT)]);
        let mut file = Vec::new();
        let memory = [Gpa(0)..Gpa(0x8000)];
        write(
            &mut file,
            &machine,
            &memory,
            &(Gpa(0x10_0000)..Gpa(0x20_0000)),
        )
        .unwrap();
        let dump = Dump::parse(Arc::new(file.clone())).unwrap();
        assert_eq!(dump.vcpus(), machine.vcpus());
        assert_eq!(dump.arena(), Some(Gpa(0x10_0000)..Gpa(0x20_0000)));
        assert_eq!(find_vmcoreinfo(&dump, &memory).as_deref(), Some(TEXT));
        assert!(
            file.windows(TEXT.len())
                .filter(|window| *window == TEXT)
                .count()
                == 2
        );
        // Without our own notes, as if another tool had taken them out.
        let ours = file
            .windows(9)
            .enumerate()
            .filter(|(_, window)| *window == b"EXOPATCH\0");
        let places: Vec<usize> = ours.map(|(at, _)| at).collect();
        places.iter().for_each(|at| file[*at] = b'-');
        let theirs = Dump::parse(Arc::new(file)).unwrap();
        for (theirs, want) in theirs.vcpus().iter().zip(machine.vcpus()) {
            let want = Vcpu {
                state: VcpuState::Running,
                efer: theirs.efer,
                ..*want
            };
            assert_eq!(*theirs, want);
        }
    }

    #[test]
    fn notes_are_as_other_tools_expect() {
        let machine = machine(&[]);
        let contents = Contents {
            memory: &[],
            arena: &(Gpa(0)..Gpa(0)),
            vmcoreinfo: Some(b"odd"),
        };
        let notes = notes(machine.vcpus(), &contents);
        // Name length, length, type, name: in the order in which QEMU has them, all at multiples of four.
        let at = |at: usize| {
            (
                notes[at],
                notes[at + 4],
                notes[at + 5],
                &notes[at + 12..at + 16],
            )
        };
        assert_eq!(at(0), (5, 80, 1, &b"CORE"[..]));
        assert_eq!(at(2 * (20 + 336)), (5, 184, 1, &b"QEMU"[..]));
        let last = notes.len() - 12 - 12 - 4;
        assert_eq!(at(last), (11, 3, 0, &b"VMCO"[..]));
        assert!(notes.len().is_multiple_of(4));
    }

    #[test]
    fn what_the_kernel_says_of_its_layout_is_found_or_not_believed() {
        let memory = [Gpa(0x10)..Gpa(0x7fff)];
        let found = |pages: &[(usize, &[u8])]| find_vmcoreinfo(&machine(pages), &memory);
        assert_eq!(found(&[(3, TEXT)]).as_deref(), Some(TEXT));
        assert_eq!(found(&[(3, TEXT), (5, TEXT)]).as_deref(), Some(TEXT));
        let other = [TEXT, &b"NUMBER(x)=1\n"[..]].concat();
        assert_eq!(found(&[(3, TEXT), (5, &other)]), None);
        assert_eq!(found(&[]), None);
        // Not whole pages of the range.
        assert_eq!(found(&[(0, TEXT), (7, TEXT)]), None);
        for end in 0..TEXT.len() {
            assert_eq!(vmcoreinfo_in(&TEXT[..end]), None, "{end}");
        }
        assert_eq!(vmcoreinfo_in(&[TEXT, &[0x80, b'\n'][..]].concat()), None);
    }

    #[test]
    fn memory_that_cannot_be_read_is_an_error() {
        let machine = machine(&[]);
        let arena = Gpa(0)..Gpa(0);
        assert!(write(&mut Vec::new(), &machine, &[Gpa(0)..Gpa(0x8001)], &arena).is_err());
    }
}
