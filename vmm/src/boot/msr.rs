//! Model-specific registers and local APIC pins as firmware leaves them.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};

use crate::layout::{LOCAL_APIC, SHORT_IDS};

/// `IA32_MISC_ENABLE`, and its bit for fast string operations (Intel SDM vol. 4).
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: ranges on, everything write-back (Intel SDM vol. 3, 13.11.2.1).
const MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;
/// `IA32_APIC_BASE` (Intel SDM vol. 3, 11.4.4 and 11.12.1): the first processor, x2APIC mode, on.
const APIC_BASE: u32 = 0x1b;
const APIC_FIRST: u64 = 1 << 8;
const APIC_X2APIC: u64 = 1 << 10;
const APIC_ENABLE: u64 = 1 << 11;

/// The registers could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("more model-specific registers than KVM takes")]
pub struct TooManyMsrs;

/// The registers of vCPU `index` of `count` that differ from reset. Where 8-bit identifiers do not tell the vCPUs apart, x2APIC mode is on
/// already, as firmware leaves it then (ACPI 6.5, 5.2.12.12).
///
/// # Errors
/// When they are too many for KVM.
pub fn initial(index: u32, count: u32) -> Result<Msrs, TooManyMsrs> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let mut entries = vec![
        entry(MISC_ENABLE, FAST_STRINGS),
        entry(MTRR_DEFAULT, MTRR_ENABLE | WRITE_BACK),
    ];
    if count > SHORT_IDS {
        let first = if index == 0 { APIC_FIRST } else { 0 };
        let base = u64::from(LOCAL_APIC) | APIC_ENABLE | APIC_X2APIC | first;
        entries.push(entry(APIC_BASE, base));
    }
    Msrs::from_entries(&entries).map_err(|_| TooManyMsrs)
}

/// Local vector table entries of the two pins, their offsets in the register page, and their modes (Intel SDM vol. 3, 11.5.1).
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const EXTERNAL_INTERRUPT: u32 = 0x700;
const NMI: u32 = 0x400;

/// Connects the pins: the PIC, if one of `cpus` vCPUs can have it, to the first, NMI to the second.
pub fn connect_pins(lapic: &mut kvm_lapic_state, cpus: u32) {
    const MASKED: u32 = 1 << 16;
    let first = if cpus > SHORT_IDS {
        MASKED
    } else {
        EXTERNAL_INTERRUPT
    };
    for (at, mode) in [(LINT0, first), (LINT1, NMI)] {
        for (register, byte) in lapic.regs[at..at + 4].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
}
