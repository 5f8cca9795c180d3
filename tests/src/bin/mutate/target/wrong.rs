//! Targets that go wrong on purpose: they prove that a run finds what it looks for. None of them is tried unless it is named.

use std::hint::black_box;
use std::time::Duration;

use super::{Subject, Target};
use crate::Options;

/// The one case that goes wrong; those around it do nothing.
const WRONG: u64 = 3;

pub(super) const WRONGS: [Target; 3] = [
    Target {
        name: "wrong-panic",
        make: panics,
    },
    Target {
        name: "wrong-hang",
        make: hangs,
    },
    Target {
        name: "wrong-memory",
        make: hoards,
    },
];

/// Does `wrong` in the case for it.
fn only(wrong: fn()) -> Subject {
    Box::new(move |case| {
        if case == WRONG {
            wrong();
        }
    })
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "it has the form of every other target"
)]
fn panics(_: &Options) -> Result<Subject, String> {
    Ok(only(|| panic!("as it was asked to")))
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "it has the form of every other target"
)]
fn hangs(_: &Options) -> Result<Subject, String> {
    Ok(only(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }))
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "it has the form of every other target"
)]
fn hoards(_: &Options) -> Result<Subject, String> {
    Ok(only(|| {
        /// Far more than any case may take. It is never touched, so that the machine does not have to have it.
        const TOO_MUCH: usize = 1 << 33;
        drop(black_box(Vec::<u8>::with_capacity(black_box(TOO_MUCH))));
    }))
}
