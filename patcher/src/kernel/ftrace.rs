//! The function tracer's records: which sites it has, and who uses each.
//!
//! They lie in pages, which are a list; each page is in the order of addresses.
//! Source: kernel `kernel/trace/ftrace.c`, `include/linux/ftrace.h`.

use super::bytes::le_u64;
use super::gather::Bound;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::types::{TypeError, Types};
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// More of each than any kernel with its modules has.
const MAX_PAGES: usize = 1 << 16;
const MAX_RECORDS: u32 = 1 << 20;

/// What a record says of its site (`FTRACE_FL_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flags(u64);

impl Flags {
    const IN_USE: u64 = 1 << 31;
    const MODIFIED: u64 = 1 << 26;
    const DIRECT: u64 = 1 << 23;

    /// It is in use.
    pub(super) fn in_use(self) -> bool {
        self.0 & Self::IN_USE != 0
    }

    /// By one that may change where the call goes on.
    pub(super) fn modified(self) -> bool {
        self.0 & Self::MODIFIED != 0
    }

    /// By a call that goes to no trampoline of the tracer's.
    pub(super) fn direct(self) -> bool {
        self.0 & Self::DIRECT != 0
    }
}

/// Where structures have what is asked of them.
#[derive(Clone, Copy)]
struct Layout {
    next: u64,
    records: u64,
    index: u64,
    ip: u64,
    flags: u64,
    /// From one record to the next.
    stride: u64,
}

impl Layout {
    fn of(types: &Types) -> Result<Self, TypeError> {
        let of_page = |path| types.offset_of("ftrace_page", path);
        let of_record = |path| types.offset_of("dyn_ftrace", path);
        Ok(Self {
            next: of_page("next")?,
            records: of_page("records")?,
            index: of_page("index")?,
            stride: types.size_of("dyn_ftrace")?.max(16),
            ip: of_record("ip")?,
            flags: of_record("flags")?,
        })
    }
}

/// The records of one page.
struct Page {
    first: Gva,
    count: u32,
}

/// The way through all pages.
struct Pages<'a, R: ?Sized> {
    memory: &'a Memory<'a, R>,
    layout: Layout,
    /// Where it says which page is next.
    link: Gva,
    bound: Bound,
    /// Records that there may yet be.
    left: u32,
}

impl<'a, R: ReadPhys + ?Sized> Pages<'a, R> {
    /// None where the kernel has no function tracer.
    fn of(kernel: &Kernel, memory: &'a Memory<'a, R>) -> Result<Option<Self>, KernelError> {
        let Some(start) = kernel.image().symbols().optional("ftrace_pages_start")? else {
            return Ok(None);
        };
        Ok(Some(Self {
            memory,
            layout: Layout::of(kernel.image().types())?,
            link: kernel.runtime(start.address),
            bound: Bound::new("list of traced functions", MAX_PAGES),
            left: MAX_RECORDS,
        }))
    }

    fn next(&mut self) -> Result<Option<Page>, KernelError> {
        let page = self.memory.u64(self.link)?;
        if page == 0 {
            return Ok(None);
        }
        self.bound.step(page)?;
        let at = |offset: u64| Gva(page.wrapping_add(offset));
        self.link = at(self.layout.next);
        let count = self.memory.u32(at(self.layout.index))?;
        let unsound = KernelError::Unsound {
            what: "count of traced functions",
            at: at(self.layout.index),
            value: count.into(),
        };
        self.left = self.left.checked_sub(count).ok_or(unsound)?;
        let first = Gva(self.memory.u64(at(self.layout.records))?);
        Ok(Some(Page { first, count }))
    }

    /// The record of `site` among those of one page.
    fn find(&self, page: &Page, site: Gva) -> Result<Option<Flags>, KernelError> {
        let (mut low, mut high) = (0, page.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let offset = u64::from(middle).wrapping_mul(self.layout.stride);
            let record = page.first.0.wrapping_add(offset);
            let word = |offset: u64| self.memory.u64(Gva(record.wrapping_add(offset)));
            let found = word(self.layout.ip)?;
            if found == site.0 {
                return Ok(Some(Flags(word(self.layout.flags)?)));
            }
            if found < site.0 {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(None)
    }

    /// Those of one page whose sites are in use.
    fn in_use(&self, page: &Page) -> Result<Vec<(Gva, Flags)>, KernelError> {
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let stride = index(self.layout.stride);
        let mut bytes = vec![0; page.count as usize * stride];
        self.memory.read(page.first, &mut bytes)?;
        let word = |record: &[u8], offset| le_u64(record, index(offset)).unwrap_or(0);
        let read = |record: &[u8]| {
            let flags = Flags(word(record, self.layout.flags));
            (Gva(word(record, self.layout.ip)), flags)
        };
        let records = bytes.chunks_exact(stride).map(read);
        Ok(records.filter(|(_, flags)| flags.in_use()).collect())
    }
}

/// What the record of `site` says, if there is one. The guest may run.
pub(super) fn flags_of<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
    site: Gva,
) -> Result<Option<Flags>, KernelError> {
    let Some(mut pages) = Pages::of(kernel, memory)? else {
        return Ok(None);
    };
    while let Some(page) = pages.next()? {
        let found = pages.find(&page, site)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// All sites that are in use.
pub(super) fn in_use<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<Vec<(Gva, Flags)>, KernelError> {
    let mut found = Vec::new();
    let Some(mut pages) = Pages::of(kernel, memory)? else {
        return Ok(found);
    };
    while let Some(page) = pages.next()? {
        found.append(&mut pages.in_use(&page)?);
    }
    Ok(found)
}
