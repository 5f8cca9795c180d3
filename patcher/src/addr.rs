//! Address spaces as types: guest-physical, guest-virtual and link-time addresses never mix.
//!
//! Arithmetic is checked: an address that would wrap is `None`, never another address.

use std::fmt;
use std::ops::Range;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further up, or `None` past the end of the address space.
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The address `bytes` further down, or `None` below zero.
            #[must_use]
            pub fn checked_sub(self, bytes: u64) -> Option<Self> {
                self.0.checked_sub(bytes).map(Self)
            }

            /// The address `bytes` away in either direction, or `None` outside the address space.
            #[must_use]
            pub fn checked_offset(self, bytes: i64) -> Option<Self> {
                self.0.checked_add_signed(bytes).map(Self)
            }

            /// How many bytes `self` is above `base`, or `None` when it is below.
            #[must_use]
            pub fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// The range of `len` bytes that starts here, or `None` when it would wrap.
            #[must_use]
            pub fn range(self, len: u64) -> Option<Range<Self>> {
                Some(self..self.checked_add(len)?)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// A guest-physical address: an offset into what the guest believes to be its memory bus.
    Gpa
}

address! {
    /// A guest-virtual address of the running kernel, after its KASLR slide.
    Gva
}

address! {
    /// An address as the kernel's image was linked, before its KASLR slide.
    LinkAddr
}

#[cfg(test)]
mod tests {
    use super::Gpa;

    #[test]
    fn arithmetic_never_wraps() {
        let top = Gpa(u64::MAX);
        assert_eq!(top.checked_add(1), None);
        assert_eq!(Gpa(0).checked_sub(1), None);
        assert_eq!(Gpa(8).checked_offset(-9), None);
        assert_eq!(Gpa(8).checked_offset(-8), Some(Gpa(0)));
        assert_eq!(Gpa(8).offset_from(Gpa(9)), None);
        assert_eq!(top.range(2), None);
        assert_eq!(Gpa(4).range(4), Some(Gpa(4)..Gpa(8)));
    }
}
