//! The state in which the first vCPU enters the kernel.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use patcher::addr::Gpa;
use patcher::guest::GuestError;

use crate::layout::{GDT, LARGE_PAGE, PAGE_TABLES, PVH_INFO, ZERO_PAGE};
use crate::memory::Memory;

/// How to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, identity-mapped, boot parameters in RSI (Linux Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Long {
        /// First instruction.
        rip: u64,
    },
    /// Protected mode without paging, start information in EBX (Xen docs/misc/pvh.pandoc).
    Pvh {
        /// First instruction.
        rip: u64,
    },
}

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// Always set (Intel SDM vol. 1, 3.4.3).
const RFLAGS_ALWAYS: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const TABLE: u64 = 4096;
const ENTRIES: u64 = 512;
/// One page directory maps 1 GiB; four map all that 32-bit pointers of the boot protocol can name.
const DIRECTORIES: u64 = 4;

/// Selectors that the boot protocol prescribes: `__BOOT_CS`, `__BOOT_DS`; then a task state segment.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// A stack for the few pushes before the kernel has its own: below the zero page.
const STACK: u64 = ZERO_PAGE - 16;

/// Descriptor table, page tables and registers for `entry`.
///
/// # Errors
/// When low memory is missing.
pub fn prepare(
    entry: Entry,
    memory: &Memory,
    sregs: &mut kvm_sregs,
) -> Result<kvm_regs, GuestError> {
    let long = matches!(entry, Entry::Long { .. });
    let code = segment(CODE, 0xb, long);
    let data = segment(DATA, 0x3, false);
    let task = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(TASK, 0xb, false)
    };
    write_gdt(memory, [&code, &data, &task], sregs)?;
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = task;
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION;
    sregs.cr4 = 0;
    let mut regs = kvm_regs {
        rflags: RFLAGS_ALWAYS,
        rsp: STACK,
        ..Default::default()
    };
    match entry {
        Entry::Long { rip } => {
            write_page_tables(memory)?;
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
            regs.rip = rip;
            regs.rsi = ZERO_PAGE;
        }
        Entry::Pvh { rip } => {
            regs.rip = rip;
            regs.rbx = PVH_INFO;
        }
    }
    Ok(regs)
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The descriptor of a segment (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let field = |value: u8, at: u32| u64::from(value) << at;
    // The limit is in bytes; with the granularity bit the descriptor counts pages.
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | field(segment.type_, 40)
        | field(segment.s, 44)
        | field(segment.dpl, 45)
        | field(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | field(segment.l, 53)
        | field(segment.db, 54)
        | field(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

fn write_gdt(
    memory: &Memory,
    segments: [&kvm_segment; 3],
    sregs: &mut kvm_sregs,
) -> Result<(), GuestError> {
    let mut limit = 0;
    for segment in segments {
        let at = u64::from(segment.selector);
        memory.write(Gpa(GDT + at), &descriptor(segment).to_le_bytes())?;
        limit = segment.selector + 7;
    }
    // A 64-bit task descriptor has a second, zero half.
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: limit + 8,
        ..Default::default()
    };
    Ok(())
}

/// Maps the first 4 GiB to themselves with large pages.
fn write_page_tables(memory: &Memory) -> Result<(), GuestError> {
    let put = |at: u64, value: u64| memory.write(Gpa(at), &value.to_le_bytes());
    let level3 = PAGE_TABLES + TABLE;
    let level2 = level3 + TABLE;
    put(PAGE_TABLES, level3 | PRESENT_WRITABLE)?;
    for directory in 0..DIRECTORIES {
        put(
            level3 + directory * 8,
            (level2 + directory * TABLE) | PRESENT_WRITABLE,
        )?;
    }
    let entries = (0..DIRECTORIES * ENTRIES)
        .flat_map(|page| ((page * LARGE_PAGE) | PRESENT_WRITABLE | PAGE_SIZE_BIT).to_le_bytes())
        .collect::<Vec<u8>>();
    memory.write(Gpa(level2), &entries)
}

#[cfg(test)]
mod tests {
    use super::{CODE, DATA, descriptor, segment};

    #[test]
    fn descriptors_are_those_of_the_manuals() {
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(
            descriptor(&segment(CODE, 0xb, false)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(DATA, 0x3, false)),
            0x00cf_9300_0000_ffff
        );
    }
}
