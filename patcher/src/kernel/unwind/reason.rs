//! Why a stack is not reliable, and where that showed.

use std::fmt;

use crate::addr::Gva;
use crate::kernel::locate::KernelError;

/// Where and why unwinding ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}, seen from {ip} with the stack pointer {sp}")]
pub struct Unreliable {
    /// Where the code was whose caller could not be found.
    pub ip: Gva,
    /// Its stack pointer.
    pub sp: Gva,
    /// What is wrong.
    pub reason: Reason,
}

/// What makes a stack unreliable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The stack of no known task: where its live part begins is not known.
    #[error("no known task is on this stack")]
    Unowned,
    /// Whether the vCPU is on this task's stack cannot be told.
    #[error("its stack pointer is not within its stack")]
    OffStack,
    /// A stack would have to be followed that an earlier one has been followed into.
    #[error("another stack already leads into this one")]
    Shared,
    /// Code without an unwind table.
    #[error("nothing says how to unwind {at}, which is in {region}")]
    NoTable {
        /// The code.
        at: Gva,
        /// What lies there.
        region: Region,
    },
    /// The table says nothing of this code.
    #[error("the unwind table says nothing of {at}")]
    Undefined {
        /// The code.
        at: Gva,
    },
    /// Code that the kernel made, which does what is not understood, or where no way through it leads.
    #[error(
        "what the code from {start} on has on the stack at {at} cannot be told: it is not clear at {place}"
    )]
    Unclear {
        /// The code.
        at: Gva,
        /// Its first byte.
        start: Gva,
        /// Where it is not understood.
        place: Gva,
    },
    /// The caller is found by a register whose value is lost.
    #[error("the caller is found by register {register}, whose value is not known")]
    Register {
        /// The register.
        register: &'static str,
    },
    /// A word that is needed lies on no stack.
    #[error("{at} is in no stack of the kernel")]
    NoStack {
        /// Where it should be.
        at: Gva,
    },
    /// A word that is needed lies on a stack that cannot be beneath this one.
    #[error("{at} is in a stack that does not lie beneath this one, or was left before")]
    Order {
        /// Where it is.
        at: Gva,
    },
    /// A word that is needed lies below the stack pointer, over the end of the stack, or at an odd place.
    #[error("{at} is outside the live part of its stack")]
    Outside {
        /// Where it is.
        at: Gva,
    },
    /// The next frame does not lie further up.
    #[error("the stack does not get further: the caller's stack pointer is {to}")]
    NoProgress {
        /// The caller's stack pointer.
        to: Gva,
    },
    /// What should be a return address is none.
    #[error("{value} at {slot} is no return address: no call lies before it")]
    NotCall {
        /// The word.
        value: Gva,
        /// Where it is.
        slot: Gva,
    },
    /// A tracer replaced the return address and does not know it.
    #[error("{tracer} replaced the return address at {slot}, and keeps none for that place")]
    Taken {
        /// The tracer.
        tracer: &'static str,
        /// Where it was.
        slot: Gva,
    },
    /// Registers of no privilege level that the kernel or its users run at.
    #[error("the saved code segment at {at} is {value:#x}, neither the kernel's nor a user's")]
    Privilege {
        /// Where it is.
        at: Gva,
        /// Its value.
        value: u64,
    },
    /// A user's registers where none are saved.
    #[error("a user's registers end at {end}, which is not the top of a stack")]
    Misplaced {
        /// Their end.
        end: Gva,
    },
    /// The stack ends too far from where stacks end.
    #[error("the unwind table ends the stack at {at}, but it goes on to {end}")]
    EndsEarly {
        /// The code.
        at: Gva,
        /// The end of the stack.
        end: Gva,
    },
    /// More frames than fit any stack.
    #[error("the stack has more frames than any")]
    TooDeep,
    /// The guest's memory cannot be read there, or makes no sense.
    #[error("{cause}")]
    Unreadable {
        /// What cannot be read.
        cause: String,
    },
}

impl Reason {
    pub(crate) fn unreadable(error: impl Into<KernelError>) -> Self {
        Self::Unreadable {
            cause: error.into().to_string(),
        }
    }
}

/// What lies at an address that is no code with an unwind table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Region {
    /// The user's half of the address space.
    User,
    /// A section of the kernel's image that holds no code.
    Image(String),
    /// Code that was given to the unwinder without a table for it.
    Given(String),
    /// Where modules, BPF programs and the tracers' trampolines are.
    Modules,
    /// Anything else.
    Kernel,
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User => f.write_str("the user's half of the address space"),
            Self::Image(section) => write!(f, "section {section} of the kernel's image"),
            Self::Given(name) => f.write_str(name),
            Self::Modules => f.write_str("the area of modules, BPF programs and trampolines"),
            Self::Kernel => f.write_str("no code of the kernel"),
        }
    }
}
