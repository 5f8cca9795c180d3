//! What the session needs from whoever changes the guest's kernel: a trait of its consumer.

use std::time::Instant;

use ::patcher::apply::hooks::HookEvent;
use ::patcher::apply::tune::SetChange;
use ::patcher::apply::{Calls, Edition, Model, Report};
use ::patcher::edition::list::Use;

use super::Brings;
use super::record::{Passing, Problem};
use crate::views::{Asked, Seen, View};

/// What a kernel patcher does for the session. It runs on the session's thread only.
pub trait Patcher: 'static {
    /// Applies what an update brings, or only checks it. Before the deadline, or not at all.
    ///
    /// # Errors
    /// The guest is then as it was, but for [`Failing::Broken`](super::Failing::Broken).
    fn apply(&mut self, task: &Task<'_>) -> Result<Report, Problem>;
    /// Undoes updates, all in the same moment.
    ///
    /// # Errors
    /// The guest is then as it was, and the updates applied, but for [`Failing::Broken`](super::Failing::Broken).
    fn revert(&mut self, updates: &[u64], task: &Undo<'_>) -> Result<Report, Problem>;
    /// Uses the editions of an update in effect in another way.
    ///
    /// # Errors
    /// They are then used as before, but for [`Failing::Broken`](super::Failing::Broken).
    fn reuse(&mut self, update: u64, how: &Use, task: &Undo<'_>) -> Result<Report, Problem>;
    /// Ends an update's switch for those too who have yet to leave its old side.
    ///
    /// # Errors
    /// It is then under way as before, but for [`Failing::Broken`](super::Failing::Broken).
    fn force(&mut self, update: u64, task: &Undo<'_>) -> Result<(), Problem>;
    /// The switch of an update that is under way.
    fn passing(&self, update: u64) -> Option<Passing>;
    /// How often the editions whose calls are counted were called. The guest runs on.
    ///
    /// # Errors
    /// When the guest cannot be read.
    fn calls(&mut self) -> Result<Vec<Calls>, Problem>;
    /// Puts keys into a set that rules ask for, which is made if there is none of that name, and takes others out; how many it then has.
    ///
    /// # Errors
    /// When a key finds no room, or the name is none.
    fn change_set(&mut self, name: &str, change: &SetChange) -> Result<usize, Problem>;
    /// Does away with a set.
    ///
    /// # Errors
    /// When there is none, or a rule asks for it.
    fn drop_set(&mut self, name: &str) -> Result<(), Problem>;
    /// The sets that rules may ask for, with their keys.
    fn sets(&self) -> Vec<(String, Vec<u64>)>;
    /// Begins or ends a time that rules go by, which is made if there is none of that name.
    ///
    /// # Errors
    /// When the name is none, or the guest cannot be written.
    fn set_time(&mut self, name: &str, on: bool) -> Result<(), Problem>;
    /// Does away with a time.
    ///
    /// # Errors
    /// When there is none, or a rule goes by it.
    fn drop_time(&mut self, name: &str) -> Result<(), Problem>;
    /// The times that rules may go by, and whether each is now.
    fn times(&self) -> Vec<(String, bool)>;
    /// Whether there is a function whose calls the guest itself may lead elsewhere.
    fn is_watching(&self) -> bool;
    /// Looks whether it does, while it runs; whether that is not as it was.
    ///
    /// # Errors
    /// When the guest cannot be read.
    fn watch(&mut self) -> Result<bool, Problem>;
    /// Whether a rule goes by a clock.
    fn has_clocks(&self) -> bool;
    /// Has the clocks of rules go on.
    ///
    /// # Errors
    /// When the guest cannot be written.
    fn tick(&mut self) -> Result<(), Problem>;
    /// The memory for editions.
    fn room(&self) -> Room;
    /// Whether the guest's memory is known to be sound. If not, the guest stays paused.
    fn is_sound(&self) -> bool;
    /// The editions of an update, and where each stands; none once they are gone.
    fn editions(&self, update: u64) -> Vec<Edition>;
    /// Whether something is left to be done that only waits for the guest's threads to go on.
    fn is_settling(&self) -> bool;
    /// Looks how far the guest's threads have gone on, and does what waits for that, before the deadline. `hook` is told of hooks that have ended.
    ///
    /// # Errors
    /// The guest is then as it was, but for [`Failing::Broken`](super::Failing::Broken).
    fn settle(&mut self, deadline: Instant, hook: &dyn Fn(&HookEvent)) -> Result<(), Problem>;
    /// Compares the guest's memory with what an update wrote.
    ///
    /// # Errors
    /// When the guest cannot be read.
    fn verify(&mut self, update: u64, deadline: Instant) -> Result<Verified, Problem>;
    /// Counts the kernels that were found in the guest. What was applied at an earlier count is gone with its kernel.
    fn generation(&self) -> u64;
    /// What is known of the kernel.
    ///
    /// # Errors
    /// When its image cannot be read.
    fn kernel(&mut self, deadline: Instant) -> Result<KernelInfo, Problem>;
    /// Looks at the kernel.
    ///
    /// # Errors
    /// When there is nothing to be seen, or the guest cannot be read.
    fn view(&mut self, asked: &Asked, deadline: Instant) -> Result<Seen<View>, Problem>;
}

/// One apply, as the patcher gets it.
#[expect(missing_debug_implementations, reason = "holds closures")]
pub struct Task<'a> {
    /// The update's number.
    pub update: u64,
    /// The updates whose place it takes.
    pub instead_of: &'a [u64],
    /// Who may be where at the switch, if that was asked for.
    pub model: Option<Model>,
    /// How its editions are used.
    pub how: &'a Use,
    /// What it brings.
    pub brings: &'a Brings,
    /// Write nothing.
    pub check: bool,
    /// When to give up.
    pub deadline: Instant,
    /// Tells which functions it replaces.
    pub functions: &'a dyn Fn(Vec<String>),
    /// Tells what is being done or waited for.
    pub doing: &'a dyn Fn(String),
    /// Tells that everything has been written.
    pub written: &'a dyn Fn(),
    /// Tells of hooks that begin and end.
    pub hook: &'a dyn Fn(&HookEvent),
}

/// One revert, as the patcher gets it.
#[expect(missing_debug_implementations, reason = "holds closures")]
pub struct Undo<'a> {
    /// When to give up.
    pub deadline: Instant,
    /// Who may be where at the switch; as when the update came, if this says nothing.
    pub model: Option<Model>,
    /// Tells what is being done or waited for.
    pub doing: &'a dyn Fn(String),
    /// Tells that everything has been written.
    pub written: &'a dyn Fn(),
    /// Tells of hooks that begin and end.
    pub hook: &'a dyn Fn(&HookEvent),
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Bytes compared.
    pub bytes: u64,
    /// The places that differ: guest-virtual address, and what is there.
    pub differences: Vec<(u64, String)>,
}

/// What is known of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// Build id of the image.
    pub build_id: Vec<u8>,
    /// Symbols in the image.
    pub symbols: usize,
    /// The running kernel, or why there is none.
    pub running: Result<Running, String>,
    /// The memory for editions.
    pub arena: Room,
}

/// The memory for editions: the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Guest-physical address.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    /// Bytes of it that are handed out.
    pub used: u64,
}

/// The kernel found in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Distance between linked and running addresses.
    pub slide: u64,
    /// What its boot still waits for; `None` once it is over.
    pub boot: Option<String>,
}
