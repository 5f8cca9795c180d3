//! One update and its state, as the session keeps and shows it.

use std::time::Duration;

use ::patcher::apply::hooks::HookEvent;
use ::patcher::apply::{Edition, Model, Report};
use ::patcher::edition::list::Use;

/// The code of a failure that left the guest paused.
pub const BROKEN: &str = "guest_left_paused";

/// Where an update stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for the operation before it.
    Queued,
    /// Is being linked, planned and checked, up to the commit.
    Checking,
    /// All checks passed; nothing was written, as was asked.
    Checked,
    /// Its editions are in effect for all but some tasks, which have yet to leave what they replace.
    Switching,
    /// Its editions are in effect.
    Applied,
    /// Is being undone.
    Reverting,
    /// Was in effect, and has been undone.
    Reverted,
    /// Was in effect until another update took its place.
    Replaced,
    /// Was not applied; the guest is as it was.
    Refused,
    /// Was in effect in a kernel that no longer runs.
    Lost,
    /// A write failed and so did its undo: the guest is kept paused.
    Broken,
}

/// The kinds of failure, by what they mean for whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// This update cannot be, in this kernel. The guest is as it was.
    Refused,
    /// What was asked for does not fit the present state. The guest is as it was.
    Conflict,
    /// The deadline passed first. The guest is as it was.
    Deadline,
    /// No more operations can be taken now.
    Busy,
    /// Nothing has that number or name.
    Unknown,
    /// The machine below failed. The guest is as it was.
    Failed,
    /// The guest is kept paused: its memory is not known to be sound.
    Broken,
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind of failure.
    pub failing: Failing,
    /// A fixed name for programs to test.
    pub code: String,
    /// What failed.
    pub message: String,
    /// Why.
    pub cause: String,
    /// What to do about it.
    pub hint: String,
}

impl Problem {
    /// A failure with all its parts.
    pub fn new(
        failing: Failing,
        code: impl Into<String>,
        message: impl Into<String>,
        cause: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            failing,
            code: code.into(),
            message: message.into(),
            cause: cause.into(),
            hint: hint.into(),
        }
    }
}

/// One update, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Its number in this session, from 1.
    pub id: u64,
    /// A name for people.
    pub name: String,
    /// Where it stands.
    pub state: State,
    /// What is being done or waited for.
    pub doing: Option<String>,
    /// Was asked to be checked only.
    pub check: bool,
    /// Length of its package; nothing for clones.
    pub package_bytes: usize,
    /// The kernel functions that it replaces, once the package was read.
    pub functions: Vec<String>,
    /// The updates whose place it takes.
    pub instead_of: Vec<u64>,
    /// Who may be where when it is switched; told by the package if nothing was asked for.
    pub model: Option<Model>,
    /// How its editions are used.
    pub how: Use,
    /// Its editions, while they are in the guest.
    pub editions: Vec<Edition>,
    /// Its hooks that have been begun, and what became of each when it was last.
    pub hooks: Vec<HookEvent>,
    /// The switch that is under way.
    pub passing: Option<Passing>,
    /// When it was handed in, since the VM's start.
    pub submitted: Duration,
    /// When its state changed last, since the VM's start.
    pub changed: Duration,
    /// What applying or checking it cost, with the whole time from hand-in.
    pub applied: Option<Cost>,
    /// What reverting it cost.
    pub reverted: Option<Cost>,
    /// Why the last operation on it failed.
    pub problem: Option<Problem>,
}

/// A switch that some tasks have yet to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passing {
    /// The tasks.
    pub tasks: Vec<Straggler>,
}

/// A task that has yet to leave the old side of a switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Straggler {
    /// Which task.
    pub who: String,
    /// Its stack when it was last looked at, from the innermost frame out.
    pub frames: Vec<String>,
    /// Why the stack cannot be followed further, if it cannot.
    pub unreliable: Option<String>,
}

/// What an operation cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// What it cost the guest.
    pub report: Report,
    /// From hand-in to the end, waiting included.
    pub total: Duration,
}
