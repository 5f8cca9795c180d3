//! Why a function cannot be cloned.

use crate::addr::Gva;
use crate::kernel::changed::{Cause, ChangedError};
use crate::kernel::image::NotShipped;
use crate::kernel::symbols::SymbolError;
use crate::kernel::text::TextError;
use crate::kernel::types::TypeError;
use crate::x86::insn::InsnError;
use crate::x86::paging::PagingError;

/// Why there are no clones.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// What the kernel's file says of its text is not known.
    #[error("no function of this kernel can be cloned: {0}")]
    NotShipped(#[from] NotShipped),
    /// The kernel has no such function, or several.
    #[error("a function to be cloned cannot be found: {0}")]
    Symbol(#[from] SymbolError),
    /// A function is asked for twice.
    #[error("{function} is to be cloned twice; name it once")]
    Twice {
        /// The function.
        function: String,
    },
    /// A function cannot be moved.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// A function that cannot be moved.
#[derive(Debug, thiserror::Error)]
#[error("{function} cannot be cloned, because of {at}: {reason}")]
pub struct Refused {
    /// The function.
    pub function: String,
    /// The instruction that stands in the way; the function's first byte where it is no single one.
    pub at: Gva,
    /// What stands in the way.
    pub reason: Reason,
}

/// What stands in the way of moving a function.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// Its bytes are in no text of the kernel's file that stays after boot.
    #[error("it is in no code of the kernel's file that stays after boot")]
    NotText,
    /// Nothing says where addresses are in its code.
    #[error(
        "the kernel's file has no relocations, which say where code holds addresses of its own"
    )]
    NoRelocations,
    /// It is longer than any function.
    #[error("its {bytes:#x} bytes are more than are moved")]
    TooLong {
        /// How long.
        bytes: u64,
    },
    /// What the image says of it cannot be told.
    #[error(transparent)]
    Text(#[from] TextError),
    /// What the kernel has made of it cannot be told.
    #[error(transparent)]
    Compared(#[from] ChangedError),
    /// A table about it cannot be read.
    #[error(transparent)]
    Unreadable(#[from] PagingError),
    /// A table about it is not understood.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// Its text is not what the kernel makes of it.
    #[error("the text at {at} is not the kernel's own ({})", why(*.cause))]
    Changed {
        /// Where.
        at: Gva,
        /// What changed it.
        cause: Cause,
    },
    /// Bytes are no instruction.
    #[error(transparent)]
    Undecodable(#[from] InsnError),
    /// Something leads into an instruction.
    #[error("it leads to {to}, which is in the middle of an instruction")]
    Middle {
        /// Where to.
        to: Gva,
    },
    /// Nothing says where a jump leads.
    #[error("where `{text}` leads is not known, and it may be into the function itself")]
    Indirect {
        /// The jump, disassembled.
        text: String,
    },
    /// A jump may lead through a table.
    #[error("`{text}` may go by the table at {table}, which leads into the function itself")]
    Table {
        /// The jump, disassembled.
        text: String,
        /// A word that holds an address in the function.
        table: Gva,
    },
    /// An instruction does not do the same elsewhere.
    #[error("`{text}` cannot be moved: {why}")]
    Immovable {
        /// The instruction, disassembled.
        text: String,
        /// What stands in the way.
        why: &'static str,
    },
    /// A test of a key would change flags that are needed.
    #[error("its static branch cannot become a test: `{text}` at {at} needs the flags from before")]
    Flags {
        /// The instruction that needs them.
        at: Gva,
        /// The same, disassembled.
        text: String,
    },
}

impl Reason {
    /// A few words for all refusals of one kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotText | Self::Text(_) => "not in the kernel's file",
            Self::NoRelocations => "no relocations",
            Self::TooLong { .. } => "too long",
            Self::Compared(_) | Self::Changed { .. } | Self::Unreadable(_) => "changed text",
            Self::Type(_) => "a table that is not understood",
            Self::Undecodable(_) => "undecodable bytes",
            Self::Middle { .. } => "a branch into an instruction",
            Self::Indirect { .. } => "an indirect jump",
            Self::Table { .. } => "a jump through a table",
            Self::Immovable { .. } => "an immovable instruction",
            Self::Flags { .. } => "a static branch among live flags",
        }
    }
}

fn why(cause: Cause) -> &'static str {
    match cause {
        Cause::Kprobe => "a probe of the guest's own is there",
        Cause::Tracer => "it is code of the function tracer's",
        _ => "nothing that is known explains it; it may just be changing",
    }
}
