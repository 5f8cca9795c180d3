//! A recorded guest: its physical memory and the registers of its vCPUs, in an ELF core file. It can only be read.
//!
//! Each `PT_LOAD` segment is memory at its physical address. Registers are in notes of our own, as [`super::core`] writes
//! them; notes named `QEMU` (its `dump-guest-memory`) are understood where those are absent. All numbers are little-endian.

use std::fmt;
use std::ops::Range;

pub use super::core::write;
use super::core::{
    EXOPATCH, NOTE_ARENA, NOTE_VCPU, PHDR, PT_LOAD, PT_NOTE, QEMU, QEMU_CONTROL, QEMU_SEGMENT,
    QEMU_SEGMENTS,
};
use super::{GuestError, ReadPhys, Registers, Vcpu, VcpuState};
use crate::addr::Gpa;
use crate::kernel::bytes::{le_u16, le_u32, le_u64};
use crate::kernel::image::Bytes;

/// Long mode active and enabled, no-execute and `syscall` enabled: QEMU's note lacks the register.
const EFER_KERNEL: u64 = 1 << 11 | 1 << 10 | 1 << 8 | 1;

/// Why a file is not a recorded guest.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Not an ELF core file of a 64-bit little-endian machine.
    #[error("this is not a recorded guest: no 64-bit ELF core file")]
    NotCore,
    /// A part of it lies beyond its end.
    #[error(
        "the recorded guest is truncated: its {what} should be at {at:#x?}, the file has {len:#x} bytes"
    )]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Where it should be.
        at: Range<u64>,
        /// Bytes in the file.
        len: usize,
    },
    /// No registers are in it.
    #[error("the recorded guest has no vCPU registers (notes EXOPATCH or QEMU)")]
    NoVcpus,
}

/// A recorded guest.
pub struct Dump {
    bytes: Bytes,
    segments: Vec<Segment>,
    vcpus: Vec<Vcpu>,
    arena: Option<Range<Gpa>>,
}

#[derive(Clone, Debug)]
struct Segment {
    memory: Range<Gpa>,
    file: usize,
}

impl Dump {
    /// Reads the headers and registers of a recorded guest.
    ///
    /// # Errors
    /// When it is none, or is truncated.
    pub fn parse(bytes: Bytes) -> Result<Self, DumpError> {
        let data: &[u8] = (*bytes).as_ref();
        let core = data.starts_with(b"\x7fELF\x02\x01") && le_u16(data, 16) == Some(4);
        if !core {
            return Err(DumpError::NotCore);
        }
        let offset = le_u64(data, 32).ok_or(DumpError::NotCore)?;
        let count = u64::from(le_u16(data, 56).ok_or(DumpError::NotCore)?);
        let (mut segments, mut notes) = (Vec::new(), Notes::default());
        for index in 0..count {
            let at = offset.saturating_add(index * PHDR as u64);
            let header = part(data, "program headers", at, PHDR as u64)?;
            let word = |at: usize| le_u64(header, at).unwrap_or(0);
            let kind = le_u32(header, 0).unwrap_or(0);
            let (file, len) = (word(8), word(32));
            match kind {
                PT_LOAD if len > 0 => {
                    part(data, "memory", file, len)?;
                    let Some(memory) = Gpa(word(24)).range(len) else {
                        return Err(DumpError::NotCore);
                    };
                    segments.push(Segment {
                        memory,
                        file: usize::try_from(file).unwrap_or(usize::MAX),
                    });
                }
                PT_NOTE => notes.read(part(data, "notes", file, len)?),
                _ => {}
            }
        }
        segments.sort_by_key(|segment| segment.memory.start);
        let vcpus = if notes.ours.is_empty() {
            notes.qemu
        } else {
            notes.ours
        };
        if vcpus.is_empty() {
            return Err(DumpError::NoVcpus);
        }
        Ok(Self {
            segments,
            vcpus,
            arena: notes.arena,
            bytes,
        })
    }

    /// The ranges of guest-physical memory that were recorded, in order.
    pub fn memory(&self) -> impl Iterator<Item = Range<Gpa>> + '_ {
        self.segments.iter().map(|segment| segment.memory.clone())
    }

    /// Where the arena of the recorded guest was, if it had one.
    #[must_use]
    pub fn arena(&self) -> Option<Range<Gpa>> {
        self.arena.clone()
    }
}

impl ReadPhys for Dump {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        let none = || GuestError::NoMemory { at, len: buf.len() };
        let after = self
            .segments
            .partition_point(|segment| segment.memory.start <= at);
        let segment = after
            .checked_sub(1)
            .and_then(|index| self.segments.get(index))
            .ok_or_else(none)?;
        let start = at
            .offset_from(segment.memory.start)
            .and_then(|offset| usize::try_from(offset).ok());
        let range = start.and_then(|start| {
            let end = start.checked_add(buf.len())?;
            let len = segment.memory.end.offset_from(segment.memory.start)?;
            (end as u64 <= len).then_some(segment.file + start..segment.file + end)
        });
        let bytes = range
            .and_then(|range| (*self.bytes).as_ref().get(range))
            .ok_or_else(none)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

impl Registers for Dump {
    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }
}

impl fmt::Debug for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump")
            .field("segments", &self.segments)
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// The `len` bytes of the file at `at`.
fn part<'a>(data: &'a [u8], what: &'static str, at: u64, len: u64) -> Result<&'a [u8], DumpError> {
    let end = at.saturating_add(len);
    let range = usize::try_from(at).ok().zip(usize::try_from(end).ok());
    let found = range.and_then(|(start, end)| data.get(start..end));
    found.ok_or(DumpError::Truncated {
        what,
        at: at..end,
        len: data.len(),
    })
}

/// What the notes say.
#[derive(Default)]
struct Notes {
    ours: Vec<Vcpu>,
    qemu: Vec<Vcpu>,
    arena: Option<Range<Gpa>>,
}

impl Notes {
    fn read(&mut self, notes: &[u8]) {
        let mut at = 0;
        while let (Some(name_len), Some(len), Some(kind)) = (
            le_u32(notes, at),
            le_u32(notes, at + 4),
            le_u32(notes, at + 8),
        ) {
            let name_at = at + 12;
            let desc_at = name_at + (name_len as usize).next_multiple_of(4);
            let end = desc_at + len as usize;
            let (Some(name), Some(desc)) = (
                notes.get(name_at..name_at + name_len as usize),
                notes.get(desc_at..end),
            ) else {
                return;
            };
            match (name, kind) {
                (EXOPATCH, NOTE_VCPU) => self.ours.extend(vcpu_of(desc)),
                (EXOPATCH, NOTE_ARENA) => {
                    self.arena = le_u64(desc, 0)
                        .zip(le_u64(desc, 8))
                        .map(|(start, end)| Gpa(start)..Gpa(end));
                }
                (QEMU, 0) => self.qemu.extend(vcpu_of_qemu(desc)),
                _ => {}
            }
            at = end.next_multiple_of(4);
        }
    }
}

fn vcpu_of(desc: &[u8]) -> Option<Vcpu> {
    let word = |index: usize| le_u64(desc, index * 8);
    let mut gpr = [0; 16];
    for (index, register) in gpr.iter_mut().enumerate() {
        *register = word(index + 1)?;
    }
    Some(Vcpu {
        state: match word(0)? {
            0 => VcpuState::Running,
            1 => VcpuState::Halted,
            _ => VcpuState::Offline,
        },
        gpr,
        rip: word(17)?,
        rflags: word(18)?,
        cpl: u8::try_from(word(19)? & 3).ok()?,
        cr0: word(20)?,
        cr3: word(21)?,
        cr4: word(22)?,
        efer: word(23)?,
        idt_base: word(24)?,
        gs_base: word(25)?,
        event_pending: word(26)? != 0,
    })
}

/// `QEMUCPUState` (QEMU `target/i386/arch_dump.c`): it does not say whether the vCPU is halted or was ever started; one
/// that does not translate addresses was not.
fn vcpu_of_qemu(desc: &[u8]) -> Option<Vcpu> {
    // rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15; by encoding order.
    const ORDER: [usize; 16] = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    let word = |index: usize| le_u64(desc, 8 + index * 8);
    let base = |segment: usize| le_u64(desc, QEMU_SEGMENTS + segment * QEMU_SEGMENT + 16);
    let control = |index: usize| le_u64(desc, QEMU_CONTROL + index * 8);
    let mut gpr = [0; 16];
    for (register, index) in gpr.iter_mut().zip(ORDER) {
        *register = word(index)?;
    }
    let cr0 = control(0)?;
    let paging = cr0 & 1 << 31 != 0;
    Some(Vcpu {
        state: if paging {
            VcpuState::Running
        } else {
            VcpuState::Offline
        },
        gpr,
        rip: word(16)?,
        rflags: word(17)?,
        cpl: u8::try_from(le_u32(desc, QEMU_SEGMENTS)? & 3).ok()?,
        cr0,
        cr3: control(3)?,
        cr4: control(4)?,
        efer: if paging { EFER_KERNEL } else { 0 },
        idt_base: base(9)?,
        gs_base: base(4)?,
        event_pending: false,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{Dump, Gpa, write};
    use crate::guest::{ReadPhys, Registers, Vcpu, VcpuState};

    fn vcpu(seed: u64) -> Vcpu {
        Vcpu {
            state: VcpuState::Halted,
            gpr: std::array::from_fn(|index| seed + index as u64),
            rip: seed + 16,
            rflags: seed + 17,
            cpl: 3,
            cr0: seed + 18,
            cr3: seed + 19,
            cr4: seed + 20,
            efer: seed + 21,
            idt_base: seed + 22,
            gs_base: seed + 23,
            event_pending: true,
        }
    }

    struct Live(Vec<Vcpu>);

    impl ReadPhys for Live {
        fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), crate::guest::GuestError> {
            (at.0..)
                .zip(buf)
                .for_each(|(at, byte)| *byte = at.to_le_bytes()[0] ^ at.to_le_bytes()[1]);
            Ok(())
        }
    }

    impl Registers for Live {
        fn vcpus(&self) -> &[Vcpu] {
            &self.0
        }
    }

    fn recorded() -> Vec<u8> {
        let memory = [Gpa(0)..Gpa(0x3000), Gpa(0x10_0000)..Gpa(0x10_1234)];
        let mut out = Vec::new();
        write(
            &mut out,
            &Live(vec![vcpu(100), vcpu(200)]),
            &memory,
            &(Gpa(0x20_0000)..Gpa(0x80_0000)),
        )
        .unwrap();
        out
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dump = Dump::parse(Arc::new(recorded())).unwrap();
        assert_eq!(dump.vcpus(), [vcpu(100), vcpu(200)]);
        assert_eq!(dump.arena(), Some(Gpa(0x20_0000)..Gpa(0x80_0000)));
        assert_eq!(dump.memory().count(), 2);
        let (mut got, mut want) = ([0; 0x234], [0; 0x234]);
        dump.read_phys(Gpa(0x10_1000), &mut got).unwrap();
        Live(Vec::new())
            .read_phys(Gpa(0x10_1000), &mut want)
            .unwrap();
        assert_eq!(got, want);
        for (at, len) in [(0x10_1000, 0x235), (0x2fff, 2), (0x3000, 1), (u64::MAX, 1)] {
            assert!(
                dump.read_phys(Gpa(at), &mut vec![0; len]).is_err(),
                "{at:#x}..+{len:#x}"
            );
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = recorded();
        for len in (0..whole.len()).step_by(7) {
            assert!(
                Dump::parse(Arc::new(whole[..len].to_vec())).is_err(),
                "{len}"
            );
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(changes in proptest::collection::vec((0..0x600_usize, any::<u8>()), 1..20)) {
            let mut bytes = recorded();
            for (at, value) in changes {
                bytes[at] = value;
            }
            if let Ok(dump) = Dump::parse(Arc::new(bytes)) {
                let _ = dump.read_phys(Gpa(0x10_0000), &mut [0; 64]);
            }
        }
    }
}
