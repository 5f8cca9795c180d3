//! The relocations that the kernel's build appends to its ELF file, for KASLR.
//!
//! Format (kernel `arch/x86/tools/relocs.c` and `handle_relocations()` in `arch/x86/boot/compressed/misc.c`), read from
//! the end of the file backwards: 32-bit sites, a zero, inverse 32-bit sites, a zero, 64-bit sites, a zero. Kernels
//! without per-CPU data at zero have no inverse list. Each entry is the site's link address, its upper half cut off.

use std::ops::Range;

use super::bytes::{le_u32, le_u64};
use super::image::Bytes;
use crate::addr::LinkAddr;

/// The relocation lists of one image. An image without any (an ELF kernel that is never moved) has empty ones.
pub struct Relocs {
    bytes: Bytes,
    lists: [(Kind, Range<usize>); 3],
}

/// What a kernel that runs `slide` bytes above its link address does at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Adds the slide to eight bytes.
    Add64,
    /// Takes the slide from four bytes: references from moved text to per-CPU symbols, which stay at zero.
    Sub32,
    /// Adds the slide to four bytes.
    Add32,
}

/// Why relocated bytes cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum RelocError {
    /// The kernel runs elsewhere than it was linked, and the image does not say what that changes.
    #[error(
        "the kernel runs {slide:#x} from where it was linked, but its image carries no relocations"
    )]
    None {
        /// Runtime address minus link address.
        slide: u64,
    },
}

impl Relocs {
    /// The relocations that follow the ELF file, which ends at `elf_end`.
    pub(crate) fn parse(bytes: Bytes, elf_end: usize) -> Self {
        let data: &[u8] = (*bytes).as_ref();
        let mut end = data.len();
        let mut lists = Vec::new();
        while end >= elf_end.saturating_add(4) && lists.len() < 3 {
            let mut start = end;
            while start >= elf_end.saturating_add(4) && le_u32(data, start - 4) != Some(0) {
                start -= 4;
            }
            lists.push(start..end);
            end = start.saturating_sub(4);
        }
        let none = 0..0;
        let lists = match lists.as_slice() {
            [add32, sub32, add64] => [
                (Kind::Add64, add64.clone()),
                (Kind::Sub32, sub32.clone()),
                (Kind::Add32, add32.clone()),
            ],
            [add32, add64] => [
                (Kind::Add64, add64.clone()),
                (Kind::Sub32, none),
                (Kind::Add32, add32.clone()),
            ],
            _ => [
                (Kind::Add64, none.clone()),
                (Kind::Sub32, none.clone()),
                (Kind::Add32, none),
            ],
        };
        Self { bytes, lists }
    }

    /// How many 64-bit, inverse 32-bit and 32-bit sites there are.
    #[must_use]
    pub fn counts(&self) -> [usize; 3] {
        [0, 1, 2].map(|list| self.lists[list].1.len() / 4)
    }

    /// The sites at which the image holds addresses that move with it, each with its bytes: eight, or four that stand for sign-extended ones.
    pub(crate) fn absolute(&self) -> impl Iterator<Item = (LinkAddr, usize)> + '_ {
        let lists = self.lists.iter().filter(|(kind, _)| *kind != Kind::Sub32);
        lists.flat_map(|(kind, list)| self.entries(list).map(|at| (at, kind.width())))
    }

    fn entries(&self, list: &Range<usize>) -> impl Iterator<Item = LinkAddr> + '_ {
        let data: &[u8] = (*self.bytes).as_ref();
        let entries = data.get(list.clone()).unwrap_or_default().as_chunks().0;
        entries.iter().map(|entry: &[u8; 4]| site(entry))
    }

    /// Whether the image holds a four-byte address at `at` that moves with it.
    pub(crate) fn has_absolute(&self, at: LinkAddr) -> bool {
        let [.., (_, list)] = &self.lists;
        let data: &[u8] = (*self.bytes).as_ref();
        let entries: &[[u8; 4]] = data.get(list.clone()).unwrap_or_default().as_chunks().0;
        entries.binary_search_by_key(&at, site).is_ok()
    }

    /// Applies to `bytes`, the image's at `at`, what a kernel does that runs `slide` (modulo 2^64) above its link address.
    /// A field that is only partly in `bytes` is left as it is: such bytes are not to be relied on.
    ///
    /// # Errors
    /// When the image has no relocations though `slide` is not zero.
    pub fn apply(&self, at: LinkAddr, bytes: &mut [u8], slide: u64) -> Result<(), RelocError> {
        if slide == 0 {
            return Ok(());
        }
        if self.counts() == [0, 0, 0] {
            return Err(RelocError::None { slide });
        }
        let end = LinkAddr(at.0.saturating_add(bytes.len() as u64));
        for (kind, list) in &self.lists {
            let entries: &[[u8; 4]] = (*self.bytes)
                .as_ref()
                .get(list.clone())
                .unwrap_or_default()
                .as_chunks()
                .0;
            let first = entries.partition_point(|entry| site(entry) < at);
            for site in entries[first..]
                .iter()
                .map(site)
                .take_while(|site| *site < end)
            {
                let start = site
                    .offset_from(at)
                    .and_then(|start| usize::try_from(start).ok());
                let field =
                    start.and_then(|start| bytes.get_mut(start..start.checked_add(kind.width())?));
                if let Some(field) = field {
                    relocate(*kind, field, slide);
                }
            }
        }
        Ok(())
    }
}

fn site(entry: &[u8; 4]) -> LinkAddr {
    LinkAddr(i64::from(i32::from_le_bytes(*entry)).cast_unsigned())
}

impl Kind {
    fn width(self) -> usize {
        match self {
            Self::Add64 => 8,
            Self::Sub32 | Self::Add32 => 4,
        }
    }
}

impl std::fmt::Debug for Relocs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Relocs").field(&self.counts()).finish()
    }
}

fn relocate(kind: Kind, field: &mut [u8], slide: u64) {
    let low = slide.to_le_bytes();
    let slide32 = u32::from_le_bytes([low[0], low[1], low[2], low[3]]);
    match kind {
        Kind::Add64 => {
            let value = le_u64(field, 0).unwrap_or(0).wrapping_add(slide);
            field.copy_from_slice(&value.to_le_bytes());
        }
        Kind::Sub32 => {
            let value = le_u32(field, 0).unwrap_or(0).wrapping_sub(slide32);
            field.copy_from_slice(&value.to_le_bytes());
        }
        Kind::Add32 => {
            let value = le_u32(field, 0).unwrap_or(0).wrapping_add(slide32);
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{LinkAddr, Relocs};

    const BASE: u64 = 0xffff_ffff_8100_0000;

    /// A file whose ELF part is sixteen bytes long, and the lists behind it.
    fn relocs(lists: &[&[u64]]) -> Relocs {
        let mut bytes = vec![0xaa; 16];
        for list in lists {
            bytes.extend([0; 4]);
            list.iter()
                .for_each(|site| bytes.extend(&site.to_le_bytes()[..4]));
        }
        Relocs::parse(Arc::new(bytes), 16)
    }

    fn check(lists: &[&[u64]], slide: u64, want: &[u8]) {
        let mut bytes: Vec<u8> = (1..=24).collect();
        relocs(lists)
            .apply(LinkAddr(BASE), &mut bytes, slide)
            .unwrap();
        assert_eq!(bytes, want, "{lists:x?}");
    }

    #[test]
    fn each_kind_is_applied() {
        let plain: Vec<u8> = (1..=24).collect();
        let changed = |at: usize, bytes: &[u8]| {
            let mut want = plain.clone();
            want[at..at + bytes.len()].copy_from_slice(bytes);
            want
        };
        check(
            &[&[BASE + 8], &[], &[]],
            0x20_0000,
            &changed(8, &[9, 10, 0x2b, 12, 13]),
        );
        check(
            &[&[], &[BASE + 8], &[]],
            0x20_0000,
            &changed(8, &[9, 10, 0xeb, 11, 13]),
        );
        check(
            &[&[], &[], &[BASE, BASE + 8]],
            0x20_0000,
            &[
                changed(0, &[1, 2, 0x23])[..8].to_vec(),
                changed(8, &[9, 10, 0x2b])[8..].to_vec(),
            ]
            .concat(),
        );
        check(&[&[], &[BASE + 8]], 0x20_0000, &changed(8, &[9, 10, 0x2b]));
        // Fields that are partly outside, and those of elsewhere, are left alone.
        check(
            &[
                &[BASE - 4, BASE + 20],
                &[],
                &[BASE - 1, BASE + 21, BASE + 24],
            ],
            0x20_0000,
            &plain,
        );
    }

    #[test]
    fn an_image_without_relocations_cannot_have_moved() {
        let none = Relocs::parse(Arc::new(vec![0; 16]), 16);
        assert_eq!(none.counts(), [0, 0, 0]);
        assert!(none.apply(LinkAddr(BASE), &mut [0; 8], 0).is_ok());
        assert!(none.apply(LinkAddr(BASE), &mut [0; 8], 0x20_0000).is_err());
    }
}
