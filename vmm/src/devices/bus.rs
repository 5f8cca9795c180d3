//! A bus: disjoint ranges of addresses and the device behind each. What nobody answers reads as all ones, as on a PC.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Something the guest asks of the machine itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// Nothing to do, but it is known now that the guest's kernel has panicked: the first line of what it said.
    Panicked(String),
    /// The guest's kernel has panicked and said its last words: nothing more will come.
    Dead,
}

/// A device behind a range of ports or of memory.
pub trait BusDevice: Send {
    /// Fills `data` from `offset` bytes into the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` at `offset` bytes into the range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request>;
}

struct Entry {
    range: Range<u64>,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// The devices of one address space. It is put together once and then only read.
#[derive(Default)]
pub struct Bus {
    /// Ascending and disjoint.
    entries: Vec<Entry>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.entries.iter().map(|entry| &entry.range))
            .finish()
    }
}

/// Two devices want the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("device addresses {new:x?} overlap {old:x?}")]
pub struct Overlap {
    /// The range that was to be added.
    pub new: Range<u64>,
    /// The range that was there.
    pub old: Range<u64>,
}

impl Bus {
    /// Puts `device` behind `range`.
    ///
    /// # Errors
    /// When another device has part of it.
    pub fn add(
        &mut self,
        range: Range<u64>,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let clash = self
            .entries
            .iter()
            .find(|entry| entry.range.start < range.end && range.start < entry.range.end);
        if let Some(entry) = clash {
            return Err(Overlap {
                new: range,
                old: entry.range.clone(),
            });
        }
        let at = self
            .entries
            .partition_point(|entry| entry.range.start < range.start);
        self.entries.insert(at, Entry { range, device });
        Ok(())
    }

    /// The device that has all of `at..at + len`, and the offset into it.
    fn find(&self, at: u64, len: usize) -> Option<(&Arc<Mutex<dyn BusDevice>>, u64)> {
        let after = self
            .entries
            .partition_point(|entry| entry.range.start <= at);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let end = at.checked_add(len as u64)?;
        (end <= entry.range.end).then(|| (&entry.device, at - entry.range.start))
    }

    /// Reads `data` from `at`.
    pub fn read(&self, at: u64, data: &mut [u8]) {
        match self.find(at, data.len()) {
            Some((device, offset)) => device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` to `at`.
    pub fn write(&self, at: u64, data: &[u8]) -> Option<Request> {
        let (device, offset) = self.find(at, data.len())?;
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::{Bus, BusDevice, Overlap, Request};

    struct Register(u8);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).expect("a small offset"));
        }

        fn write(&mut self, _: u64, data: &[u8]) -> Option<Request> {
            self.0 = data[0];
            Some(Request::Reset)
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        for (range, value) in [(0x20..0x22, 2), (0x10..0x12, 1)] {
            bus.add(range, Arc::new(Mutex::new(Register(value))))
                .expect("a free range");
        }
        bus
    }

    fn check(bus: &Bus, at: u64, expected: u8) {
        let mut data = [0];
        bus.read(at, &mut data);
        assert_eq!(data, [expected], "at {at:#x}");
    }

    #[test]
    fn each_address_reaches_its_device_and_no_other() {
        let bus = bus();
        check(&bus, 0x0f, 0xff);
        check(&bus, 0x10, 1);
        check(&bus, 0x11, 2);
        check(&bus, 0x12, 0xff);
        check(&bus, 0x21, 3);
        check(&bus, u64::MAX, 0xff);
        assert_eq!(bus.write(0x20, &[7]), Some(Request::Reset));
        assert_eq!(bus.write(0x22, &[7]), None);
        check(&bus, 0x20, 7);
    }

    #[test]
    fn an_access_across_the_end_of_a_device_reaches_nobody() {
        let bus = bus();
        let mut data = [0; 2];
        bus.read(0x11, &mut data);
        assert_eq!(data, [0xff; 2]);
        assert_eq!(bus.write(0x11, &[0, 0]), None);
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let refused = bus().add(0x11..0x13, Arc::new(Mutex::new(Register(0))));
        assert_eq!(
            refused,
            Err(Overlap {
                new: 0x11..0x13,
                old: 0x10..0x12
            })
        );
    }
}
