//! Reads of the kernel's memory under one pause: translations are remembered, and what was read is counted.
//!
//! Two short cuts, both good only while the guest stands still: the direct map of all memory is arithmetic, and pages
//! of one 2 MiB region share the table that maps them. Nothing is remembered beyond the pause.

use std::cell::Cell;
use std::ops::Range;

use super::locate::Kernel;
use crate::addr::{Gpa, Gva};
use crate::guest::ReadPhys;
use crate::x86::paging::{PageTables, PagingError};

const PAGE: u64 = 4096;
/// Bytes that one table of the last level maps.
const TABLE_SPAN: u64 = 2 << 20;

/// The kernel's memory while the guest stands still.
pub(crate) struct Memory<'a, R: ?Sized> {
    guest: &'a R,
    tables: PageTables,
    direct: Range<u64>,
    table: Cell<Option<(u64, Gpa)>>,
    bytes: Cell<u64>,
}

impl<'a, R: ReadPhys + ?Sized> Memory<'a, R> {
    pub(crate) fn new(kernel: &Kernel, guest: &'a R) -> Result<Self, PagingError> {
        let mut direct = 0..0;
        if let Some(bounds) = &kernel.layout().direct_map {
            let start = kernel.read_u64(guest, kernel.runtime(bounds.start))?;
            direct = start..kernel.read_u64(guest, kernel.runtime(bounds.end))?;
        }
        Ok(Self {
            guest,
            tables: kernel.tables(),
            direct,
            table: Cell::new(None),
            bytes: Cell::new(0),
        })
    }

    /// The guest that is read.
    pub(crate) fn guest(&self) -> &'a R {
        self.guest
    }

    /// Bytes read so far, page tables not counted.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes.get()
    }

    pub(crate) fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), PagingError> {
        self.bytes.set(self.bytes.get() + buf.len() as u64);
        if self.direct.contains(&at.0) {
            let source = |source| PagingError::Memory {
                at,
                level: 0,
                source,
            };
            return self
                .guest
                .read_phys(Gpa(at.0 - self.direct.start), buf)
                .map_err(source);
        }
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let left = PAGE - at.0 % PAGE;
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (part, tail) = rest.split_at_mut(len);
            let source = |source| PagingError::Memory {
                at,
                level: 0,
                source,
            };
            self.guest
                .read_phys(self.translate(at)?, part)
                .map_err(source)?;
            rest = tail;
            if !rest.is_empty() {
                at = at
                    .checked_add(left)
                    .ok_or(PagingError::NotCanonical { at })?;
            }
        }
        Ok(())
    }

    pub(crate) fn u64(&self, at: Gva) -> Result<u64, PagingError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(crate) fn u32(&self, at: Gva) -> Result<u32, PagingError> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Whether anything is mapped at `at`.
    pub(crate) fn is_mapped(&self, at: Gva) -> Result<bool, PagingError> {
        match self.translate(at) {
            Ok(_) => Ok(true),
            Err(PagingError::NotPresent { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    fn translate(&self, at: Gva) -> Result<Gpa, PagingError> {
        let region = at.0 / TABLE_SPAN;
        if let Some((_, table)) = self.table.get().filter(|(known, _)| *known == region) {
            let entry = self.tables.last_entry(self.guest, table, at)?;
            return Ok(Gpa(entry.target().0 | (at.0 % PAGE)));
        }
        let mapping = self.tables.translate(self.guest, at)?;
        if mapping.page_size == PAGE {
            self.table.set(Some((region, mapping.table)));
        }
        Ok(mapping.at)
    }
}
