//! What a guest's kernel is made of and does, seen from outside: each file is one view, read by the same functions of the patcher
//! that decide about updates.
//!
//! A view is taken of a [`Subject`]: a kernel that was located, the guest's memory, and its vCPUs' registers, all of one moment. Whether that
//! is a recorded guest or a running one that stands still makes no difference here. What comes out is plain data: the API sends it,
//! the command prints it as JSON, or as a table. Addresses are texts (`"0x..."`), as JSON's numbers do not hold 64 bits.

pub mod at;
pub mod disasm;
pub mod error;
pub mod log;
pub mod modules;
mod place;
pub mod stack;
pub mod symbols;
pub(crate) mod table;
pub mod tasks;
#[cfg(test)]
mod tests;
pub mod text;
pub mod types;

use std::ops::Range;

use patcher::addr::Gva;
use patcher::edition::resident::Resident;
use patcher::guest::{ReadPhys, Vcpu};
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::error::ViewError;
pub(crate) use self::place::text_of;

/// A guest that stands still, or was recorded, and what is known of it.
#[expect(
    missing_debug_implementations,
    reason = "holds the guest as a trait object"
)]
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The kernel that it runs.
    pub kernel: &'a Kernel,
    /// Its memory.
    pub guest: &'a dyn ReadPhys,
    /// The registers of its vCPUs.
    pub vcpus: &'a [Vcpu],
    /// What updates have put into it, as far as that is known.
    pub updates: &'a [Update],
}

/// An update that is in effect, or was.
#[derive(Clone, Debug)]
pub struct Update {
    /// Its number, while it is in effect.
    pub id: Option<u64>,
    /// Its jumps in the kernel's text.
    pub jumps: Vec<Range<Gva>>,
    /// Its code, which stays.
    pub code: Resident,
}

/// What can be asked of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Symbols: all, those of a name, or the one at an address.
    Symbols(Option<symbols::Asked>),
    /// A type.
    Types(types::Asked),
    /// The modules that are loaded.
    Modules,
    /// All tasks.
    Tasks,
    /// The log.
    Log,
    /// Every difference of the text from the image.
    Text(text::Asked),
    /// Stacks.
    Stack(stack::Asked),
    /// Stacks of vCPUs as they come to a place of the code.
    At(at::Asked),
    /// The instructions of a function.
    Disasm(disasm::Asked),
}

impl Asked {
    /// Whether it is the kernel's text that is asked for, which a running guest hardly ever changes.
    #[must_use]
    pub fn is_of_text(&self) -> bool {
        matches!(self, Self::Text(_) | Self::Disasm(_))
    }
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[expect(
    missing_docs,
    reason = "each is an answer to what is asked under the same name"
)]
pub enum View {
    Symbols(symbols::Symbols),
    Types(types::Types),
    Modules(modules::Modules),
    Tasks(tasks::Tasks),
    Log(log::Log),
    Text(text::Text),
    Stack(stack::Stacks),
    Disasm(disasm::Disassembly),
}

/// A view, and what it cost the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Seen<T> {
    /// How long the guest stood still for it; zero when it did not have to, or was paused already. Left out of a recorded guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_us: Option<u64>,
    /// What was seen.
    #[serde(flatten)]
    pub view: T,
}

impl<T> Seen<T> {
    /// The same, with another form of what was seen.
    pub fn map<U>(self, form: impl FnOnce(T) -> U) -> Seen<U> {
        Seen {
            paused_us: self.paused_us,
            view: form(self.view),
        }
    }
}

/// A view as people read it.
pub(crate) trait Shown {
    /// Lines of text, cleaned of whatever could drive a terminal.
    fn table(&self) -> String;
}

impl View {
    /// Whether nothing was seen of the kernel's text that has no known cause, and nothing was left out.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        match self {
            Self::Text(view) => view.unexplained() == 0,
            Self::Disasm(view) => view.is_explained(),
            _ => true,
        }
    }

    /// The form for people.
    pub(crate) fn table(&self) -> String {
        match self {
            Self::Symbols(view) => view.table(),
            Self::Types(view) => view.table(),
            Self::Modules(view) => view.table(),
            Self::Tasks(view) => view.table(),
            Self::Log(view) => view.table(),
            Self::Text(view) => view.table(),
            Self::Stack(view) => view.table(),
            Self::Disasm(view) => view.table(),
        }
    }
}

/// The answer to what needs no guest, only the kernel's image; `None` when it needs one.
#[must_use]
pub fn of_image(asked: &Asked, image: &Image) -> Option<Result<View, ViewError>> {
    match asked {
        Asked::Types(asked) if asked.module.is_none() => {
            Some(types::of_image(image, asked).map(View::Types))
        }
        _ => None,
    }
}

/// Looks at a guest that does not run; what happens in one that does ([`Asked::At`]) is not to be seen so.
///
/// # Errors
/// When there is nothing to be seen, or it cannot be read; [`ViewError::passes`] says whether that may be otherwise a moment later.
pub fn take(asked: &Asked, subject: &Subject<'_>) -> Result<View, ViewError> {
    match asked {
        Asked::Symbols(of) => symbols::read(subject, of.as_ref()).map(View::Symbols),
        Asked::Types(asked) => types::read(subject, asked).map(View::Types),
        Asked::Modules => modules::read(subject).map(View::Modules),
        Asked::Tasks => tasks::read(subject).map(View::Tasks),
        Asked::Log => log::read(subject).map(View::Log),
        Asked::Text(asked) => text::read(subject, *asked).map(View::Text),
        Asked::Stack(asked) => stack::read(subject, *asked).map(View::Stack),
        Asked::At(asked) => Err(asked.of_recording()),
        Asked::Disasm(asked) => disasm::read(subject, asked).map(View::Disasm),
    }
}

/// Bytes as they are written in build-ids and code.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
