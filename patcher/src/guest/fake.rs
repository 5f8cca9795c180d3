//! An in-memory guest for tests: it logs every call that could matter and fails the one that a test names.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::time::Instant;

use super::dump::Dump;
use super::{Guest, GuestError, PausedGuest, ReadPhys, Registers, Vcpu};
use crate::addr::Gpa;

/// One call on the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// It was stopped.
    Pause,
    /// It was written, while stopped.
    Write {
        /// Where.
        at: Gpa,
        /// How many bytes.
        len: usize,
    },
    /// It was let go.
    Resume,
    /// It was left stopped for good.
    LeftPaused,
}

/// Which calls a fake guest fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// None.
    #[default]
    Never,
    /// The nth write, counted from zero.
    Write(usize),
    /// The nth write and every one after it: an undo fails too.
    WritesFrom(usize),
    /// Every store into a running guest.
    Stores,
    /// Every pause misses its deadline.
    Pause,
    /// The nth call of any kind, counted from zero: reads as well.
    Call(usize),
    /// The nth call of any kind panics, counted from zero: reads as well.
    Panic(usize),
    /// The same, and every write behind it fails: an undo does too.
    PanicAndWrites(usize),
}

/// Contiguous memory of a guest.
#[derive(Clone, PartialEq, Eq)]
pub struct Region {
    /// Its first address.
    pub at: Gpa,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({}..+{:#x})", self.at, self.bytes.len())
    }
}

/// The guest.
#[derive(Clone, Debug)]
pub struct FakeGuest {
    memory: Vec<Region>,
    vcpus: Vec<Vcpu>,
    arena: Range<Gpa>,
    /// What was called, oldest first.
    pub calls: Vec<Call>,
    /// What fails.
    pub fault: Fault,
    writes: usize,
    paused: bool,
    bytes_read: Cell<u64>,
    steps: Cell<usize>,
}

impl FakeGuest {
    /// A running guest. The arena must be one of the regions for it to be written.
    #[must_use]
    pub fn new(memory: Vec<Region>, vcpus: Vec<Vcpu>, arena: Range<Gpa>) -> Self {
        Self {
            memory,
            vcpus,
            arena,
            calls: Vec::new(),
            fault: Fault::Never,
            writes: 0,
            paused: false,
            bytes_read: Cell::new(0),
            steps: Cell::new(0),
        }
    }

    /// Has calls count from here on, for what fails at one of them.
    pub fn count_anew(&mut self) {
        self.calls.clear();
        self.writes = 0;
        self.steps.set(0);
    }

    /// Whether the calls came as far as what fails.
    #[must_use]
    pub fn came_to_fault(&self) -> bool {
        match self.fault {
            Fault::Never => false,
            Fault::Write(n) | Fault::WritesFrom(n) => self.writes > n,
            Fault::Call(n) | Fault::Panic(n) | Fault::PanicAndWrites(n) => self.steps.get() > n,
            Fault::Stores | Fault::Pause => true,
        }
    }

    /// Counts a call, and fails or panics if it is the one to do so.
    fn step(&self) -> Result<(), GuestError> {
        let nth = self.steps.replace(self.steps.get() + 1);
        if let Fault::Panic(n) | Fault::PanicAndWrites(n) = self.fault {
            assert!(nth != n, "call {nth} was made to panic");
        }
        if self.fault == Fault::Call(nth) {
            return Err(GuestError::Machine {
                cause: format!("call {nth} was made to fail"),
            });
        }
        Ok(())
    }

    /// The recorded guest `dump`, made to run: its memory is copied, and an empty `arena` added if it has none.
    ///
    /// # Errors
    /// When its memory cannot be read.
    pub fn from_dump(dump: &Dump, arena: Range<Gpa>) -> Result<Self, GuestError> {
        let mut memory = Vec::new();
        for range in dump.memory() {
            let len =
                usize::try_from(range.end.0.saturating_sub(range.start.0)).unwrap_or(usize::MAX);
            let mut bytes = vec![0; len];
            dump.read_phys(range.start, &mut bytes)?;
            memory.push(Region {
                at: range.start,
                bytes,
            });
        }
        let recorded = dump.arena();
        if recorded.is_none() {
            let len =
                usize::try_from(arena.end.0.saturating_sub(arena.start.0)).unwrap_or_default();
            memory.push(Region {
                at: arena.start,
                bytes: vec![0; len],
            });
        }
        Ok(Self::new(
            memory,
            dump.vcpus().to_vec(),
            recorded.unwrap_or(arena),
        ))
    }

    /// All memory, to be compared.
    #[must_use]
    pub fn memory(&self) -> &[Region] {
        &self.memory
    }

    /// Whether it is stopped.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The vCPUs, to be moved about by a test.
    pub fn vcpus_mut(&mut self) -> &mut Vec<Vcpu> {
        &mut self.vcpus
    }

    /// Bytes that were read from its memory so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.get()
    }

    /// Writes memory behind the patcher's back, as the guest itself would.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`].
    pub fn poke(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        slice_mut(&mut self.memory, at, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Where `len` bytes from `at` lie within `region`.
fn within(region: &Region, at: Gpa, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(at.offset_from(region.at)?).ok()?;
    let end = start.checked_add(len)?;
    (end <= region.bytes.len()).then_some(start..end)
}

fn slice_mut(memory: &mut [Region], at: Gpa, len: usize) -> Result<&mut [u8], GuestError> {
    memory
        .iter_mut()
        .find_map(|region| within(region, at, len).and_then(|range| region.bytes.get_mut(range)))
        .ok_or(GuestError::NoMemory { at, len })
}

impl ReadPhys for FakeGuest {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.step()?;
        let found = self.memory.iter().find_map(|region| {
            within(region, at, buf.len()).and_then(|range| region.bytes.get(range))
        });
        buf.copy_from_slice(found.ok_or(GuestError::NoMemory { at, len: buf.len() })?);
        self.bytes_read
            .set(self.bytes_read.get() + buf.len() as u64);
        Ok(())
    }
}

impl Guest for FakeGuest {
    type Paused<'g> = FakePaused<'g>;

    fn arena(&self) -> Range<Gpa> {
        self.arena.clone()
    }

    fn store(&mut self, at: Gpa, value: u64) -> Result<(), GuestError> {
        let missing = || GuestError::NoMemory { at, len: 8 };
        let end = at.checked_add(8).ok_or_else(missing)?;
        if at < self.arena.start || end > self.arena.end || !at.0.is_multiple_of(8) {
            return Err(missing());
        }
        self.step()?;
        if self.fault == Fault::Stores {
            return Err(GuestError::Machine {
                cause: "a store was made to fail".to_owned(),
            });
        }
        self.poke(at, &value.to_le_bytes())
    }

    fn pause(&mut self, _deadline: Instant) -> Result<FakePaused<'_>, GuestError> {
        self.step()?;
        self.calls.push(Call::Pause);
        if self.fault == Fault::Pause {
            return Err(GuestError::Deadline { vcpu: 0 });
        }
        self.paused = true;
        Ok(FakePaused { guest: self })
    }
}

/// The pause guard of a [`FakeGuest`].
#[derive(Debug)]
pub struct FakePaused<'g> {
    guest: &'g mut FakeGuest,
}

impl ReadPhys for FakePaused<'_> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.guest.read_phys(at, buf)
    }
}

impl Registers for FakePaused<'_> {
    fn vcpus(&self) -> &[Vcpu] {
        &self.guest.vcpus
    }
}

impl PausedGuest for FakePaused<'_> {
    fn write_phys(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        self.guest.step()?;
        let nth = self.guest.writes;
        self.guest.writes += 1;
        self.guest.calls.push(Call::Write {
            at,
            len: bytes.len(),
        });
        let fails = match self.guest.fault {
            Fault::Never | Fault::Stores | Fault::Pause | Fault::Panic(_) | Fault::Call(_) => false,
            Fault::PanicAndWrites(n) => self.guest.steps.get() > n,
            Fault::Write(n) => nth == n,
            Fault::WritesFrom(n) => nth >= n,
        };
        if fails {
            return Err(GuestError::Machine {
                cause: format!("write {nth} was made to fail"),
            });
        }
        slice_mut(&mut self.guest.memory, at, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn resume(self) -> Result<(), GuestError> {
        let resumed = self.guest.step();
        // A machine that could not let its guest go has it standing still.
        match resumed {
            Ok(()) => drop(self),
            Err(_) => self.leave_paused(),
        }
        resumed
    }

    fn leave_paused(self) {
        self.guest.calls.push(Call::LeftPaused);
        // The guard must not run its drop, which would resume the guest.
        std::mem::forget(self);
    }
}

impl Drop for FakePaused<'_> {
    fn drop(&mut self) {
        self.guest.paused = false;
        self.guest.calls.push(Call::Resume);
    }
}
