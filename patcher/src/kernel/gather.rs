//! Reads several fields of one structure of the guest with few reads, and walks the guest's lists within bounds.

use std::sync::Arc;

use super::bytes::{le_u32, le_u64};
use super::locate::KernelError;
use super::memory::Memory;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// Fields closer than this are read together.
const GAP: u64 = 128;

/// Which fields, as stretches of the structure.
#[derive(Clone, Debug)]
pub(crate) struct Gather {
    /// Offset in the structure, and in the buffer, and bytes.
    spans: Arc<[(u64, usize, usize)]>,
    len: usize,
}

/// The fields of one structure, as they were read.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    spans: Arc<[(u64, usize, usize)]>,
    bytes: Vec<u8>,
}

impl Gather {
    /// `fields` are offsets and lengths.
    pub(crate) fn new(fields: &[(u64, u64)]) -> Self {
        let mut fields = fields.to_vec();
        fields.sort_unstable();
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for (start, len) in fields {
            let end = start.saturating_add(len);
            match stretches.last_mut() {
                Some((_, last)) if start <= last.saturating_add(GAP) => *last = end.max(*last),
                _ => stretches.push((start, end)),
            }
        }
        let (mut spans, mut len) = (Vec::new(), 0);
        for (start, end) in stretches {
            let bytes = usize::try_from(end - start).unwrap_or(0);
            spans.push((start, len, bytes));
            len += bytes;
        }
        Self {
            spans: spans.into(),
            len,
        }
    }

    pub(crate) fn fields(&self) -> Fields {
        Fields {
            spans: Arc::clone(&self.spans),
            bytes: vec![0; self.len],
        }
    }
}

impl Fields {
    /// Reads the fields of the structure at `base`.
    pub(crate) fn read<R: ReadPhys + ?Sized>(
        &mut self,
        memory: &Memory<'_, R>,
        base: Gva,
    ) -> Result<(), KernelError> {
        for (offset, at, len) in self.spans.iter() {
            let part = self.bytes.get_mut(*at..at + len).unwrap_or_default();
            memory.read(Gva(base.0.wrapping_add(*offset)), part)?;
        }
        Ok(())
    }

    fn at(&self, offset: u64) -> usize {
        let after = self.spans.partition_point(|(start, ..)| *start <= offset);
        let span = after.checked_sub(1).and_then(|index| self.spans.get(index));
        let place =
            span.and_then(|(start, at, _)| usize::try_from(offset - start).ok()?.checked_add(*at));
        place.unwrap_or(usize::MAX)
    }

    /// The number in the eight bytes at `offset` of the structure, one of the fields asked for.
    pub(crate) fn u64(&self, offset: u64) -> u64 {
        le_u64(&self.bytes, self.at(offset)).unwrap_or(0)
    }

    /// As [`Fields::u64`], of four bytes.
    pub(crate) fn u32(&self, offset: u64) -> u32 {
        le_u32(&self.bytes, self.at(offset)).unwrap_or(0)
    }

    /// The bytes at `offset` of the structure.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> [u8; N] {
        super::bytes::array(&self.bytes, self.at(offset)).unwrap_or([0; N])
    }
}

/// Ends a walk through the guest's memory that would not end by itself: after too many steps, or when it comes back to
/// where it was (after R. P. Brent, 1980: the place at every power of two is remembered).
#[derive(Debug)]
pub(crate) struct Bound {
    what: &'static str,
    steps: usize,
    most: usize,
    seen: u64,
    next_mark: usize,
}

impl Bound {
    pub(crate) fn new(what: &'static str, most: usize) -> Self {
        Self {
            what,
            steps: 0,
            most,
            seen: 0,
            next_mark: 1,
        }
    }

    /// One more step, to `at`.
    pub(crate) fn step(&mut self, at: u64) -> Result<(), KernelError> {
        self.steps += 1;
        if at == 0 || at == self.seen || self.steps > self.most {
            return Err(KernelError::Unsound {
                what: self.what,
                at: Gva(self.seen),
                value: at,
            });
        }
        if self.steps == self.next_mark {
            self.seen = at;
            self.next_mark *= 2;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Bound, Gather};

    #[test]
    fn near_fields_are_read_together() {
        let gather = Gather::new(&[(1000, 8), (0, 8), (100, 16), (96, 4)]);
        assert_eq!(*gather.spans, [(0, 0, 116), (1000, 116, 8)]);
        let mut fields = gather.fields();
        fields.bytes[116..].copy_from_slice(&7_u64.to_le_bytes());
        fields.bytes[96] = 9;
        assert_eq!((fields.u64(1000), fields.u32(96), fields.u64(0)), (7, 9, 0));
    }

    #[test]
    fn walks_in_circles_end() {
        for (lead, circle) in [(0, 1), (0, 7), (100, 13), (5, 1000)] {
            let mut bound = Bound::new("list", usize::MAX);
            let at = |step: usize| {
                if step < lead {
                    step + 1
                } else {
                    lead + 1 + (step - lead) % circle
                }
            };
            let ended = (0..10_000).find(|step| bound.step(at(*step) as u64).is_err());
            assert!(
                ended.is_some_and(|steps| steps <= 4 * (lead + circle) + 2),
                "{lead} {circle}: {ended:?}"
            );
        }
        let mut bound = Bound::new("list", 10);
        assert_eq!((1..100).find(|step| bound.step(*step).is_err()), Some(11));
    }
}
