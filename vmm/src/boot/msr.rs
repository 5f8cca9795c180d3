//! Model-specific registers and local APIC pins as firmware leaves them.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};

/// `IA32_MISC_ENABLE`, and its bit for fast string operations (Intel SDM vol. 4).
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: ranges on, everything write-back (Intel SDM vol. 3, 13.11.2.1).
const MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// The registers could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("more model-specific registers than KVM takes")]
pub struct TooManyMsrs;

/// The registers of every vCPU that differ from reset.
///
/// # Errors
/// When they are too many for KVM.
pub fn initial() -> Result<Msrs, TooManyMsrs> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(MISC_ENABLE, FAST_STRINGS),
        entry(MTRR_DEFAULT, MTRR_ENABLE | WRITE_BACK),
    ])
    .map_err(|_| TooManyMsrs)
}

/// Local vector table entries of the two pins, their offsets in the register page, and their modes (Intel SDM vol. 3, 11.5.1).
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const EXTERNAL_INTERRUPT: u32 = 0x700;
const NMI: u32 = 0x400;

/// Connects the pins: the PIC to the first, NMI to the second.
pub fn connect_pins(lapic: &mut kvm_lapic_state) {
    for (at, mode) in [(LINT0, EXTERNAL_INTERRUPT), (LINT1, NMI)] {
        for (register, byte) in lapic.regs[at..at + 4].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
}
