//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  low memory: boot data, later the guest's           RAM
//! 0x0009_fc00  where a BIOS would keep its data                   reserved
//! 0x000e_0000  ACPI tables, found by pointer and by scan          reserved
//! 0x0010_0000  kernel, initrd                                     RAM up to 3 GiB at most
//! 0xc000_0000  the 32-bit hole: I/O APIC, local APIC, KVM's own   nothing
//! 0x1_0000_0000  the rest of memory                               RAM
//! then, 2 MiB aligned, the arena                                  unusable (e820 type 5)
//! ```

use std::ops::Range;

use patcher::addr::Gpa;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// The global descriptor table of the entry state.
pub const GDT: u64 = 0x500;
/// PVH start information, its memory map and its module list.
pub const PVH_INFO: u64 = 0x6000;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the entry state: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line that has room there, its final zero included.
pub const CMDLINE_ROOM: u64 = 0x1_0000;
/// End of the RAM below the BIOS's data.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where ACPI tables start; the RSDP is first, in the range that systems scan for it (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the range for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Start of the RAM that kernels load into.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Start of the hole below 4 GiB, and so the end of RAM below it.
pub const HOLE: u64 = 0xc000_0000;
/// Four gibibytes, where RAM continues.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The most processors that 8-bit APIC identifiers tell apart: the last identifier means all of them.
pub const SHORT_IDS: u32 = 255;

/// I/O APIC registers (Intel 82093AA; fixed in KVM).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM needs on Intel processors for real mode under VMX without unrestricted guest.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel processors for the same.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Size of a large page: the grain of the arena and of guest memory.
pub const LARGE_PAGE: u64 = 2 * MIB;
/// How much memory is added for editions: three large pages (code, data, spare).
pub const ARENA_SIZE: u64 = 3 * LARGE_PAGE;

/// Guest memory of a given size, laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM ranges, ascending: one below the hole, and one above it if there is more.
    pub ram: Vec<Range<Gpa>>,
    /// The arena.
    pub arena: Range<Gpa>,
}

impl Layout {
    /// Lays out `memory` bytes of RAM, or `None` when addresses would pass `phys_bits` bits.
    ///
    /// `memory` is a multiple of [`LARGE_PAGE`].
    #[must_use]
    pub fn new(memory: u64, phys_bits: u8) -> Option<Self> {
        let low = memory.min(HOLE);
        let mut ram = vec![Gpa(0)..Gpa(low)];
        let mut top = Gpa(HOLE_END);
        if memory > low {
            let high = Gpa(HOLE_END).range(memory - low)?;
            top = high.end;
            ram.push(high);
        }
        let arena = top.range(ARENA_SIZE)?;
        let end_of_bus = 1_u64.checked_shl(u32::from(phys_bits)).unwrap_or(u64::MAX);
        (arena.end.0 <= end_of_bus).then_some(Self { ram, arena })
    }

    /// The end of the RAM below the hole.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.ram.first().map_or(0, |range| range.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{ARENA_SIZE, GIB, HOLE, HOLE_END, LARGE_PAGE, Layout, MIB};

    fn check(memory: u64, phys_bits: u8, ram: &[(u64, u64)], arena: Option<u64>) {
        let layout = Layout::new(memory, phys_bits);
        assert_eq!(layout.as_ref().map(|it| it.arena.start.0), arena);
        if let Some(layout) = layout {
            let found: Vec<_> = layout.ram.iter().map(|it| (it.start.0, it.end.0)).collect();
            assert_eq!(found, ram);
            assert_eq!(layout.arena.end.0 - layout.arena.start.0, ARENA_SIZE);
            assert_eq!(layout.arena.start.0 % LARGE_PAGE, 0);
        }
    }

    #[test]
    fn memory_goes_round_the_hole_and_the_arena_above_it() {
        check(256 * MIB, 40, &[(0, 256 * MIB)], Some(HOLE_END));
        check(HOLE, 40, &[(0, HOLE)], Some(HOLE_END));
        check(
            5 * GIB,
            40,
            &[(0, HOLE), (HOLE_END, 6 * GIB)],
            Some(6 * GIB),
        );
    }

    #[test]
    fn memory_beyond_the_processor_is_refused() {
        check(256 * MIB, 32, &[], None);
        check(64 * GIB, 36, &[], None);
        check(!(LARGE_PAGE - 1), 64, &[], None);
    }
}
