//! Hooks of a package: functions that run in the guest before and after its editions come into effect, or go.
//!
//! The guest begins them itself: an edition of a function that the kernel calls often (the ticker) queues a work item when a word of the
//! package says so. What the two sides tell each other is in the first words of one section; see `exopatch_hooks.h`.

use super::object::Edition;

/// The section that holds the words by which hooks are run, and the work item.
pub const CELLS: &str = ".data..exopatch_hooks";
/// Bytes of these words at its beginning.
pub const CELLS_LEN: usize = 40;

/// Where the words are, in bytes from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cell {
    /// What is to be called; written by us.
    Hook = 0,
    /// The number of the run that is to be made; written by us.
    Asked = 8,
    /// The number of the last run that was queued; written by the guest.
    Taken = 16,
    /// The number of the last run that has ended; written by the guest.
    Ended = 24,
    /// What that returned; written by the guest.
    Result = 32,
}

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the switch to the editions of its package; its result decides whether that is made.
    BeforeApply,
    /// Behind that switch.
    AfterApply,
    /// Before the switch away from them; its result decides whether that is made.
    BeforeRevert,
    /// Behind that switch.
    AfterRevert,
}

impl Moment {
    /// The moment of that number in a record.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        let all = [
            Self::BeforeApply,
            Self::AfterApply,
            Self::BeforeRevert,
            Self::AfterRevert,
        ];
        all.get(usize::try_from(number).ok()?).copied()
    }
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BeforeApply => "before the update is applied",
            Self::AfterApply => "after it was applied",
            Self::BeforeRevert => "before it is reverted",
            Self::AfterRevert => "after it was reverted",
        })
    }
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Name of the function.
    pub name: String,
    /// When it runs.
    pub moment: Moment,
    /// Index into the package's sections, of a code section.
    pub section: usize,
    /// Offset of its first byte in it.
    pub offset: u64,
}

/// The hooks of a package, each of another moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// The hooks.
    pub list: Vec<Hook>,
    /// What queues them: an edition that is in effect only meanwhile.
    pub ticker: Edition,
    /// The section with [`CELLS`], an index into the package's sections.
    pub cells: usize,
}

impl Hooks {
    /// Whether one runs at `moment`.
    #[must_use]
    pub fn has(&self, moment: Moment) -> bool {
        self.list.iter().any(|hook| hook.moment == moment)
    }
}
