//! The keyboard controller, of which only the line to the processor's reset pin is left.
//!
//! No keyboard is declared to the guest (FADT boot flags), but kernels pulse that line without asking who is there.

use super::bus::{BusDevice, Request};

/// First port of the device.
pub const PORT: u64 = 0x60;
/// Ports it answers: data, the system control port between, and command.
pub const PORTS: u64 = 5;

const COMMAND: u64 = 4;
/// Pulse output line 0: processor reset (IBM PC AT Technical Reference, keyboard controller commands).
const PULSE_RESET: u8 = 0xfe;

/// The device.
#[derive(Debug, Default)]
pub struct I8042;

impl BusDevice for I8042 {
    /// Status zero: nothing to read, ready to be written.
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        (offset == COMMAND && data == [PULSE_RESET]).then_some(Request::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::{I8042, Request};
    use crate::devices::bus::BusDevice;

    #[test]
    fn only_the_pulse_command_resets() {
        let mut device = I8042;
        assert_eq!(device.write(4, &[0xfe]), Some(Request::Reset));
        assert_eq!(device.write(4, &[0xff]), None);
        assert_eq!(device.write(0, &[0xfe]), None);
    }
}
