//! Guest memory: RAM and the arena, mapped so that host and guest large pages coincide.
//!
//! Nobody gets a slice of it: the guest changes it at any time, so every access copies (vm-memory's volatile access).
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::io;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;

use patcher::addr::Gpa;
use patcher::guest::{GuestError, ReadPhys};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{LARGE_PAGE, Layout};

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host did not give that much address space.
    #[error("the host gave no {len} bytes of address space for guest memory")]
    Map {
        /// Bytes asked for.
        len: u64,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The ranges do not make an address space; the layout is wrong.
    #[error("guest memory ranges are not an address space: {0}")]
    Layout(String),
}

/// One host mapping that stands for one guest range.
#[derive(Debug)]
struct Mapping {
    base: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: a mapping is an address range owned by this value; nothing in it is tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared references give out only the address and length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private anonymous memory of `len` bytes, aligned to a large page and advised to use them.
    fn new(len: usize) -> io::Result<Self> {
        let large_page = usize::try_from(LARGE_PAGE).map_err(io::Error::other)?;
        let reserved = len
            .checked_add(large_page)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = start.align_offset(large_page);
        let base = start.wrapping_byte_add(head);
        // SAFETY: head and tail are parts of the reservation above that nobody uses: `head` is below one large page,
        // and the reservation is one large page longer than `len`.
        unsafe {
            if head > 0 {
                libc::munmap(start, head);
            }
            libc::munmap(base.wrapping_byte_add(len), reserved - head - len);
            // Advice may be refused (no large pages on this host): then small ones serve.
            libc::madvise(base, len, libc::MADV_HUGEPAGE);
            libc::madvise(base, len, libc::MADV_DONTDUMP);
        }
        let base = NonNull::new(base).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the range, and `Memory` drops its regions, the only users, before its mappings.
        unsafe {
            libc::munmap(self.base.as_ptr(), self.len);
        }
    }
}

/// All memory of one guest.
#[derive(Debug)]
pub struct Memory {
    // Declared before `mappings`, so dropped before them.
    regions: GuestMemoryMmap,
    layout: Layout,
    mappings: Vec<Mapping>,
}

/// A guest range and the host address that stands for it: what KVM needs for a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First guest-physical byte.
    pub gpa: u64,
    /// First host-virtual byte.
    pub hva: u64,
    /// Bytes.
    pub len: u64,
}

impl Memory {
    /// Maps the memory of `layout`. Pages are taken from the host as the guest touches them.
    ///
    /// # Errors
    /// When the host does not give the address space.
    pub fn new(layout: Layout) -> Result<Self, MemoryError> {
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for range in layout.ram.iter().chain([&layout.arena]) {
            let len = range.end.0 - range.start.0;
            let size = usize::try_from(len).map_err(|_| MemoryError::Map {
                len,
                cause: io::ErrorKind::OutOfMemory.into(),
            })?;
            let mapping = Mapping::new(size).map_err(|cause| MemoryError::Map { len, cause })?;
            // SAFETY: the mapping is `size` bytes long, and outlives the region: both are in `Memory`, which never
            // gives a region away.
            let region = unsafe {
                MmapRegionBuilder::new(size)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_raw_mmap_pointer(mapping.base.as_ptr().cast())
            }
            .build()
            .map_err(|error| MemoryError::Layout(error.to_string()))?;
            regions.push(
                GuestRegionMmap::new(region, GuestAddress(range.start.0))
                    .ok_or_else(|| MemoryError::Layout(format!("{range:?} wraps")))?,
            );
            mappings.push(mapping);
        }
        let regions = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| MemoryError::Layout(error.to_string()))?;
        Ok(Self {
            regions,
            layout,
            mappings,
        })
    }

    /// The slots to give to KVM: RAM ascending, then the arena.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        let ranges = self.layout.ram.iter().chain([&self.layout.arena]);
        ranges.zip(&self.mappings).map(|(range, mapping)| Slot {
            gpa: range.start.0,
            hva: mapping.base.as_ptr().expose_provenance() as u64,
            len: mapping.len as u64,
        })
    }

    /// The layout it was mapped by.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The regions, for loaders.
    #[must_use]
    pub fn regions(&self) -> &GuestMemoryMmap {
        &self.regions
    }

    /// The arena.
    #[must_use]
    pub fn arena(&self) -> Range<Gpa> {
        self.layout.arena.clone()
    }

    /// Stores an aligned word into the arena, at once for every vCPU.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`] when `at` is not in the arena or not aligned.
    pub fn store(&self, at: Gpa, value: u64) -> Result<(), GuestError> {
        let missing = || GuestError::NoMemory { at, len: 8 };
        let end = at.checked_add(8).ok_or_else(missing)?;
        let arena = self.arena();
        if at < arena.start || end > arena.end || !at.0.is_multiple_of(8) {
            return Err(missing());
        }
        let stored = self
            .regions
            .store(value, GuestAddress(at.0), Ordering::SeqCst);
        stored.map_err(|_| missing())
    }

    /// Copies `bytes` to guest-physical `at`: all of them, or none.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`] when any byte of the range is not guest memory.
    pub fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        let missing = || GuestError::NoMemory {
            at,
            len: bytes.len(),
        };
        let address = GuestAddress(at.0);
        if !GuestMemoryBackend::check_range(&self.regions, address, bytes.len()) {
            return Err(missing());
        }
        self.regions
            .write_slice(bytes, address)
            .map_err(|_| missing())
    }
}

impl ReadPhys for Memory {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        let len = buf.len();
        self.regions
            .read_slice(buf, GuestAddress(at.0))
            .map_err(|_| GuestError::NoMemory { at, len })
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gpa;
    use patcher::guest::ReadPhys;

    use super::Memory;
    use crate::layout::{HOLE, HOLE_END, LARGE_PAGE, Layout, MIB};

    fn memory(len: u64) -> Memory {
        let layout = Layout::new(len, 40).expect("a layout");
        Memory::new(layout).expect("guest memory")
    }

    #[test]
    fn what_is_written_is_read_across_neighbouring_slots() {
        // 4 GiB of RAM: its upper part and the arena are neighbours.
        let memory = memory(4 << 30);
        let arena = memory.arena().start;
        let at = Gpa(arena.0 - 2);
        memory.write(at, b"exop").expect("written");
        let mut found = [0; 4];
        memory.read_phys(at, &mut found).expect("read");
        assert_eq!(&found, b"exop");
    }

    #[test]
    fn a_write_that_does_not_fit_writes_nothing() {
        let memory = memory(2 * MIB);
        let at = Gpa(2 * MIB - 2);
        memory.write(at, b"abc").expect_err("past the end of RAM");
        let mut found = [0; 2];
        memory.read_phys(at, &mut found).expect("read");
        assert_eq!(found, [0; 2]);
        memory
            .read_phys(Gpa(HOLE), &mut found)
            .expect_err("the hole");
        memory
            .read_phys(Gpa(u64::MAX), &mut found)
            .expect_err("nothing");
    }

    #[test]
    fn slots_are_aligned_to_large_pages_and_the_arena_is_one_of_its_own() {
        let memory = memory(256 * MIB);
        let slots: Vec<_> = memory.slots().collect();
        let places: Vec<_> = slots.iter().map(|slot| slot.gpa).collect();
        assert_eq!(places, [0, HOLE_END]);
        assert!(slots.iter().all(|slot| slot.hva % LARGE_PAGE == 0));
    }
}
