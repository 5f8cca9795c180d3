//! Types in two parts: those of a module stand on the kernel's.
//!
//! A module's types are numbered on from the kernel's, and so are the places of their strings: a number or a place says whose it is. What
//! belongs to the kernel is looked up there (kernel `Documentation/bpf/btf.rst`, `kernel/bpf/btf.c`).

use std::sync::Arc;

use super::{TypeError, Types};
use crate::kernel::btf::{RawMember, RawType};
use crate::kernel::image::Bytes;

impl Types {
    /// Indexes the types that a module adds to `base`: `bytes` are all of its section `.BTF`.
    ///
    /// # Errors
    /// [`TypeError::Damaged`].
    pub fn parse_module(bytes: Bytes, base: Arc<Self>) -> Result<Self, TypeError> {
        let section = 0..(*bytes).as_ref().len();
        Self::parse_part(bytes, section, Some(base))
    }

    /// The number of the first type behind these, and the place of the first string: where a module's begin.
    pub(crate) fn behind(&self) -> (u32, u32) {
        let (first, first_string) = self.first_own();
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let strings = count(self.layout.strings.len());
        (
            first.saturating_add(count(self.layout.starts.len())),
            first_string.saturating_add(strings),
        )
    }

    /// The number of the first type that is not the base's, and the place of the first string.
    pub(super) fn first_own(&self) -> (u32, u32) {
        self.base.as_ref().map_or((1, 0), |base| base.behind())
    }

    /// Type `id`; 0 is `void`, which is nothing.
    pub(super) fn raw(&self, id: u32) -> Option<RawType> {
        match (&self.base, id.checked_sub(self.first_own().0)) {
            (Some(base), None) => base.raw(id),
            (_, own) => {
                let raw = self.layout.get(self.data(), own?.checked_add(1)?)?;
                Some(RawType { id, ..raw })
            }
        }
    }

    /// Those that type `raw` is one of, itself or the base.
    pub(super) fn home(&self, raw: &RawType) -> &Self {
        match &self.base {
            Some(base) if raw.id < self.first_own().0 => base.home(raw),
            _ => self,
        }
    }

    /// The string that names refer to by `offset`.
    pub(super) fn string(&self, offset: u32) -> &[u8] {
        match (&self.base, offset.checked_sub(self.first_own().1)) {
            (Some(base), None) => base.string(offset),
            (_, own) => self.layout.string(self.data(), own.unwrap_or(0)),
        }
    }

    /// Member `index` of structure or union `of`.
    pub(super) fn raw_member(&self, of: &RawType, index: usize) -> Option<RawMember> {
        let home = self.home(of);
        home.layout.member(home.data(), of, index)
    }

    /// Name and value of enumerator `index` of `of`.
    pub(super) fn raw_enumerator(&self, of: &RawType, index: usize) -> Option<(u32, i64)> {
        let home = self.home(of);
        home.layout.enumerator(home.data(), of, index)
    }

    /// Name and type of parameter `index` of the prototype `of`.
    pub(super) fn raw_parameter(&self, of: &RawType, index: usize) -> Option<(u32, u32)> {
        let home = self.home(of);
        home.layout.parameter(home.data(), of, index)
    }

    /// Element type and count of the array `of`.
    pub(super) fn raw_array(&self, of: &RawType) -> Option<(u32, u32)> {
        let home = self.home(of);
        home.layout.array(home.data(), of)
    }

    /// Whether the integer `of` has a sign.
    pub(super) fn is_signed(&self, of: &RawType) -> bool {
        let home = self.home(of);
        home.layout.is_signed(home.data(), of)
    }
}
