//! The stacks of vCPUs that come to a place of the kernel's code, at the moment when they do.

use patcher::addr::Gva;

use super::disasm::{self, Where};
use super::stack::{self, Stack};
use super::{Subject, ViewError};

/// How many can be asked for at once.
pub const MOST: usize = 1000;

/// Which place, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The instruction.
    pub place: disasm::Asked,
    /// So many stacks.
    pub count: usize,
}

impl Asked {
    /// Reads a place, and how often it is to be come to: once if that is left out.
    ///
    /// # Errors
    /// [`ViewError::Address`] and [`ViewError::Count`].
    pub fn parse(
        place: &str,
        position: Option<usize>,
        count: Option<usize>,
    ) -> Result<Self, ViewError> {
        let count = count.unwrap_or(1);
        if !(1..=MOST).contains(&count) {
            return Err(ViewError::Count { count });
        }
        let place = disasm::Asked::parse(place, position)?;
        Ok(Self { place, count })
    }

    /// Why nothing of it is to be seen in a recorded guest.
    #[must_use]
    pub fn of_recording(&self) -> ViewError {
        ViewError::Recorded {
            of: self.of().to_string(),
        }
    }

    /// The place as it was asked for.
    #[must_use]
    pub fn of(&self) -> &Where {
        &self.place.of
    }
}

/// Where the instruction is. There must be one that begins there: nobody ever comes to the middle of one.
///
/// # Errors
/// When there is no such function or instruction, or the guest cannot be read.
pub fn address(subject: &Subject<'_>, asked: &Asked) -> Result<Gva, ViewError> {
    disasm::instruction(subject, &asked.place)
}

/// The stacks of `vcpus`.
///
/// # Errors
/// When the guest cannot be read.
pub fn stacks(subject: &Subject<'_>, vcpus: &[usize]) -> Result<Vec<Stack>, ViewError> {
    let all = stack::read(subject, stack::Asked::All)?.stacks.into_iter();
    let of_them = |stack: &Stack| stack.cpu.is_some_and(|cpu| vcpus.contains(&cpu));
    Ok(all.filter(of_them).collect())
}
