//! A function of the running kernel that can be redirected: all rules of [`super::checks`] hold for it.

use std::ops::Range;

use crate::addr::Gva;

/// A function that can be redirected, as far as can be known while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Its first byte.
    pub function: Gva,
    /// Bytes to the next symbol.
    pub size: u64,
    /// Where the jump goes: after the fentry site.
    pub jump: Gva,
    /// The bytes of the whole instructions that the jump displaces.
    pub displaced: Vec<u8>,
}

impl Target {
    /// Where no thread may be or return to while the jump is written: the displaced bytes but the first.
    #[must_use]
    pub fn forbidden(&self) -> Range<Gva> {
        let end = Gva(self.jump.0.wrapping_add(self.displaced.len() as u64));
        Gva(self.jump.0.wrapping_add(1))..end
    }
}
