//! ACPI power management registers: the fixed power button, sleep (only S5, soft off) and reset (ACPI 6.5, 4.8.3).
//!
//! The machine is always in ACPI mode (FADT: no SMI command port), so `SCI_EN` reads as one.

use super::bus::{BusDevice, Request};

/// First port: the PM1a event block (status, enable), the control block, the reset register.
pub const PORT: u16 = 0x600;
/// Length of the PM1a event block.
pub const EVENT_LEN: u8 = 4;
/// The PM1a control block.
pub const CONTROL_PORT: u16 = PORT + 4;
/// Length of the PM1a control block.
pub const CONTROL_LEN: u8 = 2;
/// The reset register.
pub const RESET_PORT: u16 = PORT + 6;
/// What is written to it.
pub const RESET_VALUE: u8 = 1;
/// Ports in all.
pub const PORTS: u64 = 8;
/// The system control interrupt.
pub const SCI: u32 = 9;
/// `SLP_TYP` of S5, as the DSDT's `\_S5_` says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Power button, in status and in enable.
const POWER_BUTTON: u16 = 1 << 8;
/// In control: the machine is in ACPI mode.
const SCI_ENABLED: u16 = 1 << 0;
/// In control: go to sleep now.
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0b111;

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const RESET: u64 = 6;

/// Holds an interrupt line up or down.
pub type Line = Box<dyn Fn(bool) + Send>;

/// The registers.
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    sci: Line,
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AcpiPm")
            .field("status", &self.status)
            .field("enable", &self.enable)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl AcpiPm {
    /// Registers after power-on, with the line that they raise.
    #[must_use]
    pub fn new(sci: Line) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: SCI_ENABLED,
            sci,
        }
    }

    /// Presses the power button. Returns whether the guest listens to it.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= POWER_BUTTON;
        self.update_line();
        self.enable & POWER_BUTTON != 0
    }

    fn update_line(&self) {
        (self.sci)(self.status & self.enable != 0);
    }

    fn register(&self, byte: u64) -> u8 {
        let word = match byte & !1 {
            STATUS => self.status,
            ENABLE => self.enable,
            CONTROL => self.control,
            _ => 0,
        };
        let [low, high] = word.to_le_bytes();
        if byte & 1 == 0 { low } else { high }
    }

    /// Takes one byte, in the low or high half of its register. Drivers write words; bytes are allowed.
    fn write_byte(&mut self, byte: u64, value: u8) -> Option<Request> {
        let shift = if byte & 1 == 0 { 0 } else { 8 };
        let value = u16::from(value) << shift;
        let other_half = !(0xff << shift);
        match byte & !1 {
            // Written ones clear.
            STATUS => self.status &= !value,
            ENABLE => self.enable = self.enable & other_half | value,
            CONTROL => {
                self.control = (self.control & other_half | value) & !SLEEP_ENABLE | SCI_ENABLED;
                let asleep = shift == 8 && value & SLEEP_ENABLE != 0;
                let kind = self.control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if asleep && kind == u16::from(SLEEP_TYPE_S5) {
                    return Some(Request::PowerOff);
                }
            }
            RESET if shift == 0 && value == u16::from(RESET_VALUE) => return Some(Request::Reset),
            _ => {}
        }
        self.update_line();
        None
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, value) in (offset..).zip(data) {
            *value = self.register(byte);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        (offset..)
            .zip(data)
            .filter_map(|(byte, value)| self.write_byte(byte, *value))
            .next()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::{AcpiPm, BusDevice, CONTROL, ENABLE, RESET, Request, STATUS};

    fn pm() -> (AcpiPm, Arc<AtomicBool>) {
        let line = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&line);
        let pm = AcpiPm::new(Box::new(move |up| line.store(up, Ordering::Relaxed)));
        (pm, seen)
    }

    fn word(pm: &mut AcpiPm, at: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(at, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_raises_the_line_until_it_is_acknowledged() {
        let (mut pm, line) = pm();
        assert!(!pm.press_power_button());
        assert!(!line.load(Ordering::Relaxed));
        pm.write(ENABLE, &0x100_u16.to_le_bytes());
        assert!(line.load(Ordering::Relaxed));
        assert_eq!(word(&mut pm, STATUS), 0x100);
        pm.write(STATUS, &0x100_u16.to_le_bytes());
        assert!(!line.load(Ordering::Relaxed));
        assert_eq!(word(&mut pm, STATUS), 0);
        assert!(pm.press_power_button());
        assert!(line.load(Ordering::Relaxed));
    }

    #[test]
    fn soft_off_and_reset_are_requests_and_nothing_else_is() {
        let (mut pm, _) = pm();
        let sleep = |kind: u16| ((kind << 10) | (1 << 13)).to_le_bytes();
        assert_eq!(pm.write(CONTROL, &sleep(3)), None);
        assert_eq!(pm.write(CONTROL, &(5_u16 << 10).to_le_bytes()), None);
        assert_eq!(pm.write(CONTROL, &sleep(5)), Some(Request::PowerOff));
        assert_eq!(word(&mut pm, CONTROL) & 1, 1);
        assert_eq!(pm.write(RESET, &[0]), None);
        assert_eq!(pm.write(RESET, &[1]), Some(Request::Reset));
    }
}
