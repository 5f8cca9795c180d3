//! What the API needs from the machine below it: the narrow trait that its routes call.
//!
//! It is implemented by [`super::live::Live`] for the real machine, and by a double in the tests of the routes.

use std::path::Path;
use std::time::{Duration, Instant};

use patcher::apply::tune::SetChange;

use super::error::ApiError;
use super::wire;
use crate::events::Events;
use crate::updates::{Model, Order, Use};
use crate::views::{Asked, Seen, View};

/// Called once, from any thread, when an operation has come to its end.
pub type Done<T> = Box<dyn FnOnce(Result<T, ApiError>) + Send>;

/// What is counted in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The calls of editions.
    pub calls: wire::CallList,
    /// The memory for editions.
    pub arena: wire::Arena,
}

/// The machine. `vm`, `pause`, `resume`, `power_button`, `kill` and `dump` may block, for as long as a pause may take; the
/// others answer at once and come back later. None needs an async runtime.
pub trait Machine: Send + Sync + 'static {
    /// The events of the VM and of its updates.
    fn events(&self) -> &Events;

    /// The VM as it is.
    fn vm(&self) -> wire::Vm;

    /// Stops all vCPUs. What that was made of, or `None` if the VM was paused already.
    ///
    /// # Errors
    /// When the guest has ended or did not stop in time; it then runs as before.
    fn pause(&self, deadline: Duration) -> Result<Option<wire::Stop>, ApiError>;

    /// Lets the vCPUs go. Whether that changed anything.
    ///
    /// # Errors
    /// When the guest has ended, or its memory is not known to be sound.
    fn resume(&self) -> Result<bool, ApiError>;

    /// Presses the ACPI power button. Whether the guest listens to it.
    ///
    /// # Errors
    /// When the guest has ended.
    fn power_button(&self) -> Result<bool, ApiError>;

    /// Ends the guest at once.
    ///
    /// # Errors
    /// When the guest has ended already.
    fn kill(&self) -> Result<(), ApiError>;

    /// Writes memory and registers to a new file.
    ///
    /// # Errors
    /// When the guest did not stop in time or the file could not be written; a part of a file is removed.
    fn dump(&self, path: &Path, deadline: Duration) -> Result<wire::Dump, ApiError>;

    /// Asks for the guest's kernel, whose image is read first if that was not done yet; calls `done` with the answer.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn kernel(&self, deadline: Instant, done: Done<wire::Kernel>) -> Result<(), ApiError>;

    /// Asks for a view of the guest's kernel; calls `done` with it.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn view(&self, asked: Asked, deadline: Instant, done: Done<Seen<View>>)
    -> Result<(), ApiError>;

    /// All updates, oldest first.
    fn updates(&self) -> Vec<wire::Update>;

    /// Hands in a package: gives the update as it was queued, and calls `done` at the end.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn apply(&self, order: Order, done: Done<wire::Update>) -> Result<wire::Update, ApiError>;

    /// Asks for an update's end: gives the update as it was queued, and calls `done` at the end.
    ///
    /// # Errors
    /// When there is no such update, it is not applied, or too many operations wait already.
    fn revert(
        &self,
        id: u64,
        model: Option<Model>,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError>;

    /// Asks for an update's editions to be used in another way: gives the update as it is, and calls `done` at the end.
    ///
    /// # Errors
    /// When there is no such update, it is not applied, or too many operations wait already.
    fn reuse(
        &self,
        id: u64,
        how: Use,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError>;

    /// Asks for an update's switch to be ended for all: gives the update as it is, and calls `done` at the end.
    ///
    /// # Errors
    /// When there is no such update, or too many operations wait already.
    fn force(
        &self,
        id: u64,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError>;

    /// Puts keys into a set and takes others out; calls `done` with what it then is.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn change_set(
        &self,
        name: String,
        change: SetChange,
        done: Done<wire::Set>,
    ) -> Result<(), ApiError>;

    /// Does away with a set; calls `done` with an empty list once it is gone.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn drop_set(&self, name: String, done: Done<wire::SetList>) -> Result<(), ApiError>;

    /// Asks for all sets; calls `done` with them.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn sets(&self, done: Done<wire::SetList>) -> Result<(), ApiError>;

    /// Begins or ends a time that rules go by; calls `done` with what it then is.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn set_time(&self, name: String, on: bool, done: Done<wire::Time>) -> Result<(), ApiError>;

    /// Does away with a time; calls `done` with an empty list once it is gone.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn drop_time(&self, name: String, done: Done<wire::TimeList>) -> Result<(), ApiError>;

    /// Asks for all times; calls `done` with them.
    ///
    /// # Errors
    /// When too many operations wait already.
    fn times(&self, done: Done<wire::TimeList>) -> Result<(), ApiError>;

    /// Asks what is counted; calls `done` with the answer.
    ///
    /// # Errors
    /// When too many operations, or too many who ask, wait already.
    fn counted(&self, done: Done<Counted>) -> Result<(), ApiError>;

    /// Asks whether the guest's memory still holds what an update wrote; calls `done` with the answer.
    ///
    /// # Errors
    /// When there is no such update, it is not applied, or too many operations wait already.
    fn verify(
        &self,
        id: u64,
        deadline: Instant,
        done: Done<wire::Verification>,
    ) -> Result<(), ApiError>;
}
