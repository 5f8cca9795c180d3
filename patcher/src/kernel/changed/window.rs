//! A stretch of text: what the image has there, what must be there, and why that differs.

use std::ops::Range;

use super::same::same;
use super::{Cause, Change, ChangedError};
use crate::addr::LinkAddr;
use crate::guest::ReadPhys;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;

/// A stretch of text.
pub(super) struct Window<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) range: Range<LinkAddr>,
    /// The image's bytes, relocated.
    image: Vec<u8>,
    /// What must be there.
    expected: Vec<u8>,
    causes: Vec<Cause>,
    /// Where NOPs may be of any encoding.
    loose: Vec<Range<LinkAddr>>,
    /// Where anything may be.
    given: Vec<Range<LinkAddr>>,
}

impl<'a> Window<'a> {
    pub(super) fn of(kernel: &'a Kernel, range: Range<LinkAddr>) -> Result<Self, ChangedError> {
        let outside = KernelError::Unsound {
            what: "image's text",
            at: kernel.runtime(range.start),
            value: range.end.0,
        };
        let shipped = kernel.image().shipped()?;
        let bytes = shipped.text(range.clone()).ok_or(outside)?;
        let mut image = bytes.to_vec();
        shipped
            .relocs()
            .apply(range.start, &mut image, kernel.slide())?;
        Ok(Self {
            kernel,
            range,
            expected: image.clone(),
            causes: vec![Cause::Unexplained; image.len()],
            image,
            loose: Vec::new(),
            given: Vec::new(),
        })
    }

    fn inside(&self, range: &Range<LinkAddr>) -> Option<Range<usize>> {
        let start = usize::try_from(range.start.offset_from(self.range.start)?).ok()?;
        let len = usize::try_from(range.end.offset_from(range.start)?).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.expected.len()).then_some(start..end)
    }

    /// What must be at `range` as far as it is worked out; `None` when it is not all in the window.
    pub(super) fn get(&self, range: &Range<LinkAddr>) -> Option<&[u8]> {
        self.expected.get(self.inside(range)?)
    }

    /// Says that `bytes` must be at `at`, because of `cause`. What is not all in the window is left out.
    pub(super) fn put(&mut self, at: LinkAddr, bytes: &[u8], cause: Cause) {
        let range = at.range(bytes.len() as u64);
        let Some(inside) = range.and_then(|range| self.inside(&range)) else {
            return;
        };
        self.expected[inside.clone()].copy_from_slice(bytes);
        self.causes[inside].fill(cause);
    }

    /// Says that NOPs at `range` may be of any encoding, because of `cause`.
    pub(super) fn loosen(&mut self, range: &Range<LinkAddr>, cause: Cause) {
        let Some(inside) = self.inside(range) else {
            return;
        };
        for byte in &mut self.causes[inside] {
            if *byte == Cause::Unexplained {
                *byte = cause;
            }
        }
        self.loose.push(range.clone());
    }

    /// Says that whatever is at `range` is there because of `cause`.
    pub(super) fn give(&mut self, range: &Range<LinkAddr>, cause: Cause) {
        let start = range.start.max(self.range.start);
        let end = range.end.min(self.range.end);
        if start < end
            && let Some(inside) = self.inside(&(start..end))
        {
            self.causes[inside].fill(cause);
            self.given.push(start..end);
        }
    }

    /// Compares the part `core` of the window with the guest's memory.
    pub(super) fn compare<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        core: &Range<LinkAddr>,
        each: &mut impl FnMut(Change),
    ) -> Result<(), ChangedError> {
        let mut live = vec![0; self.expected.len()];
        memory.read(self.kernel.runtime(self.range.start), &mut live)?;
        let mut excused = vec![false; live.len()];
        for range in &self.given {
            if let Some(inside) = self.inside(range) {
                excused[inside].fill(true);
            }
        }
        for range in &self.loose {
            let Some(inside) = self.inside(range) else {
                continue;
            };
            let (want, got) = (&self.expected[inside.clone()], &live[inside.clone()]);
            if want != got && same(want, got, self.kernel.runtime(range.start)) {
                excused[inside].fill(true);
            }
        }
        let cause = |at: usize| {
            if live[at] != self.expected[at] && !excused[at] {
                Some(Cause::Unexplained)
            } else if live[at] != self.image[at] {
                Some(self.causes[at])
            } else {
                None
            }
        };
        let core = self.inside(core).unwrap_or(0..0);
        let mut at = core.start;
        while at < core.end {
            let Some(found) = cause(at) else {
                at += 1;
                continue;
            };
            let end = (at..core.end).find(|next| cause(*next) != Some(found));
            let end = end.unwrap_or(core.end);
            each(self.change(found, at..end, &live));
            at = end;
        }
        Ok(())
    }

    fn change(&self, cause: Cause, at: Range<usize>, live: &[u8]) -> Change {
        let place = |index: usize| {
            let link = LinkAddr(self.range.start.0.wrapping_add(index as u64));
            self.kernel.runtime(link)
        };
        let function = self.kernel.symbol_at(place(at.start));
        Change {
            range: place(at.start)..place(at.end),
            cause,
            function: function.map(|(symbol, offset)| (symbol.name, offset)),
            image: self.image[at.clone()].to_vec(),
            expected: self.expected[at.clone()].to_vec(),
            live: live[at].to_vec(),
        }
    }
}
