//! The I/O APIC of a machine with more processors than an 8-bit identifier tells apart (Intel 82093AA, registers 3.0 to 3.2).
//!
//! KVM's own sends to 8-bit identifiers only. This one turns lines into messages with 15-bit destinations: bits 48 to 55 of a
//! redirection entry are reserved on the chip, and a hypervisor that offers `KVM_FEATURE_MSI_EXT_DEST_ID` takes 49 to 55 as the upper seven bits
//! (kernel `Documentation/virt/kvm/x86/cpuid.rst`). A level interrupt stays in service until its vector is acknowledged.

use std::fmt;

use super::bus::{BusDevice, Request};

/// Lines, and so redirection entries.
pub const LINES: usize = 24;
/// Bytes of its registers in memory.
pub const SIZE: u64 = 0x1000;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const VERSION: u8 = 1;
const FIRST_ENTRY: u8 = 0x10;
/// Version 0x11, without a register for ends of interrupt: those come from the local APICs. Above it the number of the last line.
const VERSION_VALUE: u32 = 0x11 | 23 << 16;
const _: () = assert!(LINES == 24);

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0x700;
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const IN_SERVICE: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// A message that raises an interrupt (Intel SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where it is written: the destination; its bits from 8 on are in the upper half, as KVM's 32-bit identifiers have them.
    pub address: u64,
    /// What is written: vector, delivery and trigger mode.
    pub data: u32,
}

/// Where interrupts go.
pub trait Outlet: Send {
    /// What each line sends from now on; `None` is nothing.
    fn routes(&self, routes: &[Option<Message>; LINES]);

    /// Sends one message.
    fn send(&self, message: Message);
}

/// The registers, and the state of the lines that are held up or down.
pub struct IoApic {
    select: u8,
    entries: [u64; LINES],
    up: [bool; LINES],
    outlet: Box<dyn Outlet>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic")
            .field("select", &self.select)
            .field("entries", &self.entries)
            .field("up", &self.up)
            .finish_non_exhaustive()
    }
}

impl IoApic {
    /// Registers after reset: every line is masked.
    #[must_use]
    pub fn new(outlet: Box<dyn Outlet>) -> Self {
        Self {
            select: 0,
            entries: [MASKED; LINES],
            up: [false; LINES],
            outlet,
        }
    }

    /// Holds a line up or down. Lines that send edges do so past this, by their route.
    pub fn set_line(&mut self, line: usize, up: bool) {
        if let Some(held) = self.up.get_mut(line) {
            *held = up;
            self.deliver(line);
        }
    }

    /// A processor has finished with the interrupt `vector`: a level that is still up comes again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for line in 0..LINES {
            let entry = &mut self.entries[line];
            if *entry & LEVEL != 0 && *entry & VECTOR == u64::from(vector) {
                *entry &= !IN_SERVICE;
                self.deliver(line);
            }
        }
    }

    /// Sends what a level line has to send now.
    fn deliver(&mut self, line: usize) {
        let entry = self.entries[line];
        let waits = self.up[line] && entry & (LEVEL | MASKED | IN_SERVICE) == LEVEL;
        if waits {
            self.entries[line] |= IN_SERVICE;
            self.outlet.send(message(entry));
        }
    }

    fn register(&self) -> u32 {
        match self.select {
            VERSION => VERSION_VALUE,
            select => self.half(select).map_or(0, |(line, high)| {
                let [low_half, high_half] = halves(self.entries[line]);
                if high { high_half } else { low_half }
            }),
        }
    }

    /// Which entry a register belongs to, and whether it is the upper half.
    fn half(&self, select: u8) -> Option<(usize, bool)> {
        let at = usize::from(select.checked_sub(FIRST_ENTRY)?);
        (at / 2 < LINES).then_some((at / 2, at % 2 == 1))
    }

    fn set_register(&mut self, value: u32) {
        let Some((line, high)) = self.half(self.select) else {
            // The identifier is of no use without the bus that it was for.
            return;
        };
        let old = self.entries[line];
        let [low_half, high_half] = halves(old);
        let mut new = if high {
            u64::from(value) << 32 | u64::from(low_half)
        } else {
            // What the chip itself sets is not written.
            let kept = old & (DELIVERY_STATUS | IN_SERVICE);
            let written = u64::from(value) & !(DELIVERY_STATUS | IN_SERVICE);
            u64::from(high_half) << 32 | written | kept
        };
        if new & LEVEL == 0 {
            // Drivers without a register for it end a level interrupt by making it an edge for a moment.
            new &= !IN_SERVICE;
        }
        self.entries[line] = new;
        if route(old) != route(new) {
            self.outlet.routes(&self.entries.map(route));
        }
        self.deliver(line);
    }
}

fn halves(entry: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = entry.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

/// What a line sends. That of a masked level line stays known: its last interrupt may not have been acknowledged yet.
fn route(entry: u64) -> Option<Message> {
    (entry & MASKED == 0 || entry & LEVEL != 0).then(|| message(entry))
}

fn message(entry: u64) -> Message {
    const WINDOW: u64 = 0xfee0_0000;
    const LEVEL_ASSERTED: u32 = 1 << 14;
    let [low_half, _] = halves(entry & (VECTOR | DELIVERY_MODE | LEVEL));
    let asserted = if entry & LEVEL == 0 {
        0
    } else {
        LEVEL_ASSERTED
    };
    let (low, high) = (entry >> 56, entry >> 49 & 0x7f);
    let logical = u64::from(entry & LOGICAL != 0);
    Message {
        address: (high << 8) << 32 | WINDOW | low << 12 | logical << 2,
        data: low_half | asserted,
    }
}

impl BusDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.register(),
            _ => 0,
        };
        let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        match (offset, data) {
            (SELECT, [select, ..]) => self.select = *select,
            (WINDOW, [a, b, c, d]) => self.set_register(u32::from_le_bytes([*a, *b, *c, *d])),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::{BusDevice, FIRST_ENTRY, IoApic, LINES, Message, Outlet, SELECT, VERSION, WINDOW};

    #[derive(Default)]
    struct Seen {
        routes: Vec<Option<Message>>,
        sent: Vec<u32>,
    }

    struct Log(Arc<Mutex<Seen>>);

    impl Outlet for Log {
        fn routes(&self, routes: &[Option<Message>; LINES]) {
            self.0.lock().expect("the log").routes = routes.to_vec();
        }

        fn send(&self, message: Message) {
            self.0.lock().expect("the log").sent.push(message.data);
        }
    }

    fn chip() -> (IoApic, Arc<Mutex<Seen>>) {
        let seen = Arc::<Mutex<Seen>>::default();
        (IoApic::new(Box::new(Log(Arc::clone(&seen)))), seen)
    }

    fn set(chip: &mut IoApic, register: u8, value: u32) {
        assert_eq!(chip.write(SELECT, &[register, 0, 0, 0]), None);
        assert_eq!(chip.write(WINDOW, &value.to_le_bytes()), None);
    }

    fn get(chip: &mut IoApic, register: u8) -> u32 {
        chip.write(SELECT, &[register, 0, 0, 0]);
        let mut data = [0xff; 4];
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_says_how_many_lines_it_has_and_all_are_masked() {
        let (mut chip, _) = chip();
        assert_eq!(get(&mut chip, VERSION), 0x17_0011);
        for line in 0..u8::try_from(LINES).expect("few") {
            assert_eq!(get(&mut chip, FIRST_ENTRY + 2 * line), 1 << 16);
        }
        assert_eq!(get(&mut chip, 0xff), 0);
    }

    /// Entry `low`, `high` of line 4 sends this, or nothing.
    fn check_route(low: u32, high: u32, expected: Option<(u64, u32)>) {
        let (mut chip, seen) = chip();
        set(&mut chip, FIRST_ENTRY + 9, high);
        set(&mut chip, FIRST_ENTRY + 8, low);
        let route = seen.lock().expect("the log").routes.get(4).copied();
        let expected = expected.map(|(address, data)| Message { address, data });
        assert_eq!(route.flatten(), expected, "{low:#x} {high:#x}");
    }

    #[test]
    fn a_line_sends_to_the_processor_that_its_entry_names() {
        check_route(0x31, 0x0700_0000, Some((0xfee0_7000, 0x31)));
        // Processor 0x12c: its upper bits are in bits 49 to 55.
        check_route(0x31, 0x2c02_0000, Some((0x100_fee2_c000, 0x31)));
        check_route(0x931, 0x0100_0000, Some((0xfee0_1004, 0x131)));
        check_route(0x1_0031, 0x0700_0000, None);
        check_route(0x1_8031, 0x0700_0000, Some((0xfee0_7000, 0xc031)));
    }

    #[test]
    fn a_level_comes_again_until_it_is_down_and_only_after_its_end() {
        let (mut chip, seen) = chip();
        let sent = || seen.lock().expect("the log").sent.len();
        chip.set_line(9, true);
        assert_eq!(sent(), 0, "masked");
        set(&mut chip, FIRST_ENTRY + 18, 0x8052);
        assert_eq!(sent(), 1, "unmasked while up");
        chip.set_line(9, true);
        assert_eq!(sent(), 1, "in service");
        chip.end_of_interrupt(0x51);
        assert_eq!(sent(), 1, "another vector");
        chip.end_of_interrupt(0x52);
        assert_eq!(sent(), 2, "still up");
        chip.set_line(9, false);
        chip.end_of_interrupt(0x52);
        assert_eq!(sent(), 2, "down");
        chip.set_line(9, true);
        assert_eq!(sent(), 3);
        // Ended by way of an edge.
        set(&mut chip, FIRST_ENTRY + 18, 0x1_0052);
        set(&mut chip, FIRST_ENTRY + 18, 0x8052);
        assert_eq!(sent(), 4);
        chip.set_line(LINES, true);
    }
}
