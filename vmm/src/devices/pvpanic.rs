//! The panic device of virtual machines, for guests whose console is elsewhere (QEMU docs/specs/pvpanic).
//!
//! One port; the guest's driver reads which events it may report, and writes the one that happened. Stock kernels have
//! the driver as a module that udev loads by the ACPI name `QEMU0001`; [`super::panic_watch`] serves those without it.

use super::bus::{BusDevice, Request};

/// The port.
pub const PORT: u16 = 0x505;

/// The kernel panicked and stays that way.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and its crash kernel is about to run.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
#[derive(Debug, Default)]
pub struct PvPanic;

impl BusDevice for PvPanic {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Option<Request> {
        let event = *data.first()?;
        (event & (PANICKED | CRASH_LOADED) != 0)
            .then(|| Request::Panicked("reported by the guest's pvpanic driver".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::{PvPanic, Request};
    use crate::devices::bus::BusDevice;

    #[test]
    fn only_events_that_were_offered_count() {
        let mut device = PvPanic;
        let mut offered = [0];
        device.read(0, &mut offered);
        assert_eq!(offered, [3]);
        assert!(matches!(device.write(0, &[1]), Some(Request::Panicked(_))));
        assert!(matches!(device.write(0, &[2]), Some(Request::Panicked(_))));
        assert_eq!(device.write(0, &[4]), None);
    }
}
