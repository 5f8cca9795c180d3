//! The guest's map of physical memory, in the terms of the BIOS call it is named after (ACPI 6.5, 15).

use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_END, HIGH_RAM, KVM_IDENTITY_MAP, LOW_RAM_END, Layout,
};

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The guest's to use.
    Ram = 1,
    /// Not the guest's.
    Reserved = 2,
    /// Memory that must not be used. Linux marks it busy, so `/dev/mem` refuses it even to root, unlike reserved memory.
    Unusable = 5,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
}

/// End of the address space that a BIOS shadows, and of what its data area is carved from.
const CONVENTIONAL_END: u64 = 0xa_0000;
/// The identity map page and three pages of task state (Linux Documentation/virt/kvm/api.rst, 4.36 and 4.42).
const KVM_PAGES: u64 = 4 * 4096;

/// The map of `layout`, ascending.
#[must_use]
pub fn map(layout: &Layout) -> Vec<Range> {
    let from_to = |start: u64, end: u64, kind| Range {
        start,
        len: end - start,
        kind,
    };
    let mut map = vec![
        from_to(0, LOW_RAM_END, Kind::Ram),
        from_to(LOW_RAM_END, CONVENTIONAL_END, Kind::Reserved),
        from_to(ACPI_TABLES, ACPI_TABLES_END, Kind::Reserved),
        from_to(HIGH_RAM, layout.low_end(), Kind::Ram),
        from_to(
            KVM_IDENTITY_MAP,
            KVM_IDENTITY_MAP + KVM_PAGES,
            Kind::Reserved,
        ),
    ];
    let high = layout.ram.iter().skip(1);
    map.extend(high.map(|range| from_to(range.start.0, range.end.0, Kind::Ram)));
    map.push(from_to(
        layout.arena.start.0,
        layout.arena.end.0,
        Kind::Unusable,
    ));
    map
}

#[cfg(test)]
mod tests {
    use super::{Kind, map};
    use crate::layout::{GIB, Layout, MIB};

    #[test]
    fn ranges_ascend_without_overlap_and_hold_all_memory() {
        for memory in [128 * MIB, 3 * GIB, 5 * GIB] {
            let layout = Layout::new(memory, 40).expect("a layout");
            let map = map(&layout);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start, "{map:x?}");
            }
            let of = |kind| {
                map.iter()
                    .filter(|range| range.kind == kind)
                    .map(|range| range.len)
                    .sum::<u64>()
            };
            // What is not RAM below 1 MiB, and nothing else, is missing.
            assert_eq!(of(Kind::Ram), memory - MIB + 0x9_fc00);
            assert_eq!(of(Kind::Unusable), 6 * MIB);
        }
    }
}
