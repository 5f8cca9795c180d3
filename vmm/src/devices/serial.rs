//! COM1: a 16550 UART (vm-superio) between the guest's driver and the console of the host.
//!
//! Input is offered only while the guest's driver listens (receive interrupt on, request-to-send up, no loopback) and its
//! FIFO is empty, so that nothing typed or piped ahead is lost. Output that the host does not take shows as a busy
//! transmitter.

use std::io;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{BusDevice, Request};
use super::output::ConsoleOutput;
use super::panic_watch::PanicWatch;

/// First port.
pub const PORT: u16 = 0x3f8;
/// Ports.
pub const PORTS: u8 = 8;
/// Interrupt line.
pub const LINE: u32 = 4;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const RECEIVE_INTERRUPT: u8 = 1 << 0;
const NO_INTERRUPT: u8 = 1 << 0;
const RECEIVED_DATA: u8 = 1 << 2;
const DATA_READY: u8 = 1 << 0;
const DIVISOR_LATCH: u8 = 1 << 7;
const REQUEST_TO_SEND: u8 = 1 << 1;
const LOOPBACK: u8 = 1 << 4;
const TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;

/// Raises the UART's interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<Line, NoEvents, ConsoleOutput>,
    panic_watch: PanicWatch,
    /// Written when the guest can take input and some waits for that.
    hungry: EventFd,
    input_waits: bool,
    was_busy: bool,
}

impl SerialPort {
    /// A port after power-on. `line` raises its interrupt; `hungry` is written when waiting input can be fed.
    #[must_use]
    pub fn new(line: EventFd, output: ConsoleOutput, hungry: EventFd) -> Self {
        Self {
            uart: Serial::new(Line(line), output),
            panic_watch: PanicWatch::default(),
            hungry,
            input_waits: false,
            was_busy: false,
        }
    }

    fn listens(&mut self) -> bool {
        let divisor = self.uart.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        let modem = self.uart.read(MODEM_CONTROL);
        !divisor && self.wants_received() && modem & (REQUEST_TO_SEND | LOOPBACK) == REQUEST_TO_SEND
    }

    /// Offers input; returns how much of it was taken. When not all of it was, `hungry` is written once more can be.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let taken = if self.listens() && self.uart.fifo_capacity() > 0 {
            self.uart.enqueue_raw_bytes(bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, "serial input could not be announced");
                0
            })
        } else {
            0
        };
        self.input_waits = taken < bytes.len();
        taken
    }

    /// Sends waiting output, and tells a guest that waited for that.
    pub fn flush(&mut self) {
        self.uart.writer_mut().flush_waiting();
        if self.was_busy && !self.uart.writer().is_busy() {
            self.was_busy = false;
            self.announce_empty_transmitter();
        }
    }

    /// The output, when the guest is gone.
    pub fn output(&mut self) -> &mut ConsoleOutput {
        self.uart.writer_mut()
    }

    /// Writing the interrupt mask back makes the UART raise what is pending by it.
    fn announce_empty_transmitter(&mut self) {
        if self.uart.read(LINE_CONTROL) & DIVISOR_LATCH == 0 {
            let mask = self.uart.read(INTERRUPT_ENABLE);
            self.put(INTERRUPT_ENABLE, mask);
        }
    }

    fn put(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.uart.write(offset, value) {
            tracing::warn!(%error, "a serial register could not be written");
        }
    }

    fn write_byte(&mut self, offset: u8, value: u8) -> Option<Request> {
        let transmits = offset == DATA
            && self.uart.read(LINE_CONTROL) & DIVISOR_LATCH == 0
            && self.uart.read(MODEM_CONTROL) & LOOPBACK == 0;
        let request = if transmits {
            let masked = self.uart.read(INTERRUPT_ENABLE) == 0;
            self.panic_watch.byte(value, masked)
        } else {
            None
        };
        self.put(offset, value);
        self.tell_when_hungry();
        request
    }

    fn read_byte(&mut self, offset: u8) -> u8 {
        let mut value = self.uart.read(offset);
        match offset {
            LINE_STATUS if self.uart.writer().is_busy() => {
                self.was_busy = true;
                value &= !TRANSMITTER_EMPTY;
            }
            DATA => self.tell_when_hungry(),
            // A 16550 shows received data as an interrupt for as long as there is some. vm-superio forgets it at the first byte that is read: a
            // driver that reads no more than so many at once (Linux 256) would leave the rest until more is typed.
            INTERRUPT_IDENTIFICATION if self.has_data() && self.wants_received() => {
                value = value & !NO_INTERRUPT | RECEIVED_DATA;
            }
            _ => {}
        }
        value
    }

    fn has_data(&mut self) -> bool {
        self.uart.read(LINE_STATUS) & DATA_READY != 0
    }

    /// The driver has the receive interrupt on.
    fn wants_received(&mut self) -> bool {
        self.uart.read(INTERRUPT_ENABLE) & RECEIVE_INTERRUPT != 0
    }

    fn tell_when_hungry(&mut self) {
        if self.input_waits && !self.has_data() && self.listens() {
            self.input_waits = false;
            if let Err(error) = self.hungry.write(1) {
                tracing::warn!(%error, "serial input could not be asked for");
            }
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, value) in (offset.to_le_bytes()[0]..PORTS).zip(data) {
            *value = self.read_byte(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        (offset.to_le_bytes()[0]..PORTS)
            .zip(data)
            .filter_map(|(offset, value)| self.write_byte(offset, *value))
            .last()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::{
        BusDevice, DATA, INTERRUPT_ENABLE, INTERRUPT_IDENTIFICATION, LINE_STATUS, MODEM_CONTROL,
        NO_INTERRUPT, RECEIVED_DATA, SerialPort,
    };
    use crate::devices::alarm::Alarm;
    use crate::devices::output::{ConsoleOutput, WhenFull};

    struct Bench {
        port: SerialPort,
        hungry: EventFd,
        line: EventFd,
        reader: std::io::PipeReader,
    }

    fn bench() -> Bench {
        let event = || EventFd::new(EFD_NONBLOCK).expect("an event");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let timer = Alarm::new().expect("a timer");
        let output = ConsoleOutput::new(Some(writer.into()), WhenFull::Wait, timer);
        let (line, hungry) = (event(), event());
        let clone = |event: &EventFd| event.try_clone().expect("a clone");
        Bench {
            port: SerialPort::new(clone(&line), output, clone(&hungry)),
            hungry,
            line,
            reader,
        }
    }

    impl Bench {
        fn get(&mut self, offset: u8) -> u8 {
            let mut data = [0];
            self.port.read(offset.into(), &mut data);
            data[0]
        }

        fn put(&mut self, offset: u8, value: u8) {
            self.port.write(offset.into(), &[value]);
        }

        /// What a driver does when its port is opened.
        fn open(&mut self) {
            self.put(MODEM_CONTROL, 0b1011);
            self.put(INTERRUPT_ENABLE, 0b0101);
        }
    }

    #[test]
    fn input_waits_for_a_driver_that_listens_and_none_is_lost() {
        let mut bench = bench();
        let script: Vec<u8> = (0..=255).collect();
        assert_eq!(bench.port.feed(&script), 0);
        assert!(bench.hungry.read().is_err());
        bench.open();
        bench
            .hungry
            .read()
            .expect("asked for input when the port was opened");
        let mut fed = 0;
        let mut received = Vec::new();
        while received.len() < script.len() {
            fed += bench.port.feed(&script[fed..]);
            bench.line.read().expect("an interrupt for new input");
            while bench.get(LINE_STATUS) & 1 != 0 {
                received.push(bench.get(DATA));
            }
            assert_eq!(bench.hungry.read().is_ok(), fed < script.len());
        }
        assert_eq!(received, script);
    }

    #[test]
    fn input_that_a_driver_leaves_for_later_stays_due() {
        let mut bench = bench();
        bench.open();
        assert_eq!(bench.port.feed(&[b'x'; 64]), 64);
        for left in (0..64).rev() {
            let due = bench.get(INTERRUPT_IDENTIFICATION);
            assert_eq!(due & (NO_INTERRUPT | RECEIVED_DATA), RECEIVED_DATA);
            assert_eq!(bench.get(DATA), b'x', "{left} are left");
        }
        let due = bench.get(INTERRUPT_IDENTIFICATION);
        assert_eq!(due & RECEIVED_DATA, 0);
    }

    #[test]
    fn output_reaches_the_host_and_a_panic_is_seen() {
        let mut bench = bench();
        bench.open();
        for byte in b"hello\n" {
            bench.put(DATA, *byte);
        }
        let mut found = [0; 6];
        bench.reader.read_exact(&mut found).expect("output");
        assert_eq!(&found, b"hello\n");
        bench.put(INTERRUPT_ENABLE, 0);
        let said = b"Kernel panic - not syncing: x\n"
            .iter()
            .filter_map(|byte| bench.port.write(DATA.into(), &[*byte]))
            .count();
        assert_eq!(said, 1);
    }

    #[test]
    fn a_host_that_does_not_read_shows_as_a_busy_transmitter() {
        let mut bench = bench();
        bench.open();
        bench.put(INTERRUPT_ENABLE, 0b0111);
        let mut sent = 0;
        while bench.get(LINE_STATUS) & 0x60 == 0x60 {
            bench.put(DATA, if sent % 64 == 63 { b'\n' } else { b'x' });
            sent += 1;
        }
        while bench.line.read().is_ok() {}
        bench.get(2); // acknowledge whatever was pending
        let mut found = vec![0; sent];
        let mut got = 0;
        while got < sent {
            got += bench.reader.read(&mut found[got..]).expect("output");
            bench.port.flush();
        }
        assert_eq!(bench.get(LINE_STATUS) & 0x60, 0x60);
        bench
            .line
            .read()
            .expect("an interrupt for the empty transmitter");
    }
}
