//! A pause guard that counts what goes through it, for the report of an operation.

use std::cell::Cell;
use std::rc::Rc;

use super::{GuestError, PausedGuest, ReadPhys, Registers, Vcpu};
use crate::addr::Gpa;

/// Bytes that went through, readable after the guard is gone.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    read: Rc<Cell<u64>>,
    written: Rc<Cell<u64>>,
}

impl Counts {
    /// Bytes read.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read.get()
    }

    /// Bytes written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.get()
    }
}

/// A pause guard that counts.
#[derive(Debug)]
pub struct Counted<P> {
    inner: P,
    counts: Counts,
}

impl<P> Counted<P> {
    /// Counts what goes through `inner`.
    pub fn new(inner: P) -> Self {
        Self {
            inner,
            counts: Counts::default(),
        }
    }

    /// The counts, which go on counting.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts.clone()
    }
}

impl<P: ReadPhys> ReadPhys for Counted<P> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.counts
            .read
            .set(self.counts.read.get().saturating_add(buf.len() as u64));
        self.inner.read_phys(at, buf)
    }
}

impl<P: Registers> Registers for Counted<P> {
    fn vcpus(&self) -> &[Vcpu] {
        self.inner.vcpus()
    }
}

impl<P: PausedGuest> PausedGuest for Counted<P> {
    fn write_phys(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        self.counts
            .written
            .set(self.counts.written.get().saturating_add(bytes.len() as u64));
        self.inner.write_phys(at, bytes)
    }

    fn resume(self) -> Result<(), GuestError> {
        self.inner.resume()
    }

    fn leave_paused(self) {
        self.inner.leave_paused();
    }
}
