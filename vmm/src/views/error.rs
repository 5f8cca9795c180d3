//! Why there is nothing to be seen: each failure has a fixed code for programs, and a way out.

use patcher::addr::Gva;
use patcher::kernel::changed::ChangedError;
use patcher::kernel::image::NotShipped;
use patcher::kernel::locate::KernelError;
use patcher::kernel::log::LogError;
use patcher::kernel::modules::ModuleError;
use patcher::kernel::symbols::SymbolError;
use patcher::kernel::types::TypeError;
use patcher::kernel::unwind::UnwindError;

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// What was asked for cannot be read as a name or an address.
    #[error("{text:?} is neither a name nor an address")]
    Address {
        /// What was asked for.
        text: String,
    },
    /// What was asked for cannot be read as somebody with a stack.
    #[error("{text:?} is neither a thread's id, nor cpuN, nor all")]
    Whose {
        /// What was asked for.
        text: String,
    },
    /// The kernel has no such symbol.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// Several symbols have the name.
    #[error("{} symbols are called {name}; say which by its position:{}", .candidates.len(), positions(.candidates))]
    Ambiguous {
        /// The name.
        name: String,
        /// What tells each from the others.
        candidates: Vec<String>,
    },
    /// Not so many symbols have the name.
    #[error("symbol {name} number {position} was asked for, but there are {count} of that name")]
    Position {
        /// The name.
        name: String,
        /// Which one was asked for, from 1.
        position: usize,
        /// How many there are.
        count: usize,
    },
    /// Nothing has this address.
    #[error(
        "nothing is at {at}: no symbol of the kernel's image, its modules or a CPU's variables"
    )]
    NothingAt {
        /// The address.
        at: Gva,
    },
    /// The symbol is none of a function.
    #[error("{name} is no function")]
    NotCode {
        /// The symbol.
        name: String,
    },
    /// The place is not in the function.
    #[error("{name} has {size} bytes, so that {name}+{offset:#x} is not in it")]
    BeyondFunction {
        /// The function.
        name: String,
        /// Bytes from its first.
        offset: u64,
        /// Its bytes.
        size: u64,
    },
    /// No instruction begins at the place.
    #[error("no instruction of {name} begins at {name}+{offset:#x}")]
    NoInstruction {
        /// The function.
        name: String,
        /// Bytes from its first.
        offset: u64,
    },
    /// Nobody can wait for so many.
    #[error(
        "{count} stacks were asked for; there must be 1 to {}",
        super::at::MOST
    )]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// A recorded guest comes to no place any more.
    #[error("a recorded guest does not run, so that nobody comes to {of}")]
    Recorded {
        /// The place that was asked for.
        of: String,
    },
    /// The function is too long to be decoded.
    #[error("{name} has {size} bytes, more than any function")]
    TooLong {
        /// The function.
        name: String,
        /// Its bytes.
        size: u64,
    },
    /// No task has this id, or it has no stack.
    #[error("{}", no_task(*.pid, *.exits))]
    NoTask {
        /// The thread's id.
        pid: u32,
        /// There is one on its way out, without a stack.
        exits: bool,
    },
    /// There is no such vCPU.
    #[error("there is no vCPU {cpu}: the guest has {count}, and they count from 0")]
    NoCpu {
        /// Its number.
        cpu: usize,
        /// How many there are.
        count: usize,
    },
    /// The vCPU was never started.
    #[error("vCPU {cpu} was never started")]
    CpuOffline {
        /// Its number.
        cpu: usize,
    },
    /// No module of this name is loaded.
    #[error("no module called {name} is loaded")]
    NoModule {
        /// The name.
        name: String,
    },
    /// The module brought no types.
    #[error("module {name} brought no types")]
    NoModuleTypes {
        /// The module.
        name: String,
    },
    /// The kernel has no such type or member.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// Something of the kernel cannot be read.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The text cannot be compared.
    #[error(transparent)]
    Changed(#[from] ChangedError),
    /// No stack can be followed.
    #[error(transparent)]
    Unwind(#[from] UnwindError),
}

fn positions(candidates: &[String]) -> String {
    let numbered = candidates.iter().enumerate();
    numbered
        .map(|(index, text)| format!(" {} at {text}", index + 1))
        .collect::<Vec<_>>()
        .join(",")
}

fn no_task(pid: u32, exits: bool) -> String {
    if exits {
        format!("task {pid} is on its way out, and has no stack any more")
    } else {
        format!("no task has the id {pid}")
    }
}

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The question makes no sense.
    Malformed,
    /// What was asked for is not there.
    NotFound,
    /// The kernel is not in a state to be looked at so.
    State,
    /// What the guest holds makes no sense.
    Unsound,
}

impl ViewError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Address { .. } | Self::Whose { .. } | Self::Count { .. } => Kind::Malformed,
            Self::Symbol(_)
            | Self::Ambiguous { .. }
            | Self::Position { .. }
            | Self::NothingAt { .. }
            | Self::NotCode { .. }
            | Self::BeyondFunction { .. }
            | Self::NoInstruction { .. }
            | Self::TooLong { .. }
            | Self::NoTask { .. }
            | Self::NoCpu { .. }
            | Self::CpuOffline { .. }
            | Self::NoModule { .. }
            | Self::NoModuleTypes { .. }
            | Self::Type(_) => Kind::NotFound,
            Self::Changed(
                ChangedError::NotShipped(_)
                | ChangedError::Boot { .. }
                | ChangedError::InFlux { .. }
                | ChangedError::Unknown { .. },
            )
            | Self::Recorded { .. }
            | Self::Unwind(UnwindError::Orc(_) | UnwindError::Layout { .. }) => Kind::State,
            Self::Kernel(_)
            | Self::Modules(_)
            | Self::Log(_)
            | Self::Changed(_)
            | Self::Unwind(_) => Kind::Unsound,
        }
    }

    /// Whether it may be otherwise a moment later in a guest that runs on.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.kind() == Kind::Unsound || matches!(self, Self::Changed(ChangedError::InFlux { .. }))
    }

    /// A fixed name for programs to test.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Address { .. } => "no_address",
            Self::Whose { .. } => "no_stack_owner",
            Self::Symbol(_) => "no_such_symbol",
            Self::Ambiguous { .. } => "ambiguous_symbol",
            Self::Position { .. } => "no_such_position",
            Self::NothingAt { .. } => "nothing_there",
            Self::NotCode { .. } => "not_a_function",
            Self::BeyondFunction { .. } => "beyond_function",
            Self::NoInstruction { .. } => "no_instruction",
            Self::Count { .. } => "count_out_of_range",
            Self::Recorded { .. } => "recorded_guest",
            Self::TooLong { .. } => "function_too_long",
            Self::NoTask { .. } => "no_such_task",
            Self::NoCpu { .. } => "no_such_vcpu",
            Self::CpuOffline { .. } => "vcpu_offline",
            Self::NoModule { .. } => "no_such_module",
            Self::NoModuleTypes { .. } => "no_module_types",
            Self::Type(TypeError::Ambiguous { .. }) => "ambiguous_type",
            Self::Type(TypeError::NoMember { .. }) => "no_such_member",
            Self::Type(_) => "no_such_type",
            Self::Unwind(UnwindError::Orc(_) | UnwindError::Layout { .. }) => "not_unwindable",
            Self::Changed(ChangedError::NotShipped(NotShipped::FromMemory)) => "image_needed",
            Self::Changed(_) if self.kind() == Kind::State => "not_comparable",
            Self::Kernel(_)
            | Self::Modules(_)
            | Self::Log(_)
            | Self::Changed(_)
            | Self::Unwind(_) => "unsound_kernel",
        }
    }

    /// What the user can do.
    #[must_use]
    pub fn hint(&self) -> String {
        let hint = match self {
            Self::Address { .. } => "write a symbol's name, or an address as 0xffffffff81000000",
            Self::Whose { .. } => "write 1234 for a thread, cpu0 for a vCPU, or all",
            Self::Symbol(_) => "exopatch kernel symbols, without a name, lists all there are",
            Self::Ambiguous { .. } | Self::Position { .. } => {
                "add --position N (position=N); exopatch kernel symbols NAME tells them apart"
            }
            Self::NothingAt { .. } => {
                "addresses are those of the running kernel: add the slide that exopatch kernel info shows"
            }
            Self::NotCode { .. } | Self::TooLong { .. } => {
                "name a function of the kernel or a module"
            }
            Self::BeyondFunction { .. } => "give a smaller offset, or an address",
            Self::NoInstruction { .. } => "exopatch kernel disasm shows where they begin",
            Self::Count { .. } => "ask for fewer, several times",
            Self::Recorded { .. } => "ask a running guest: leave out --dump and --kernel",
            Self::NoTask { .. } => "exopatch kernel tasks lists all there are",
            Self::NoCpu { .. } | Self::CpuOffline { .. } => {
                "exopatch kernel tasks shows what runs where"
            }
            Self::NoModule { .. } => "exopatch kernel modules lists all that are loaded",
            Self::NoModuleTypes { .. } => {
                "it was built without CONFIG_DEBUG_INFO_BTF_MODULES: ask without --module"
            }
            Self::Type(TypeError::NoMember { name, .. }) => {
                return format!(
                    "exopatch kernel types '{name}', without a path, shows its members"
                );
            }
            Self::Type(TypeError::Ambiguous { name, .. }) => {
                return format!(
                    "exopatch kernel types '{name}', without a path, shows each of them"
                );
            }
            Self::Type(_) => "name a structure, union, enumeration, typedef or function as in C",
            Self::Changed(ChangedError::Boot { .. }) => {
                "look when the guest has booted, and before it goes down"
            }
            Self::Changed(ChangedError::InFlux { .. }) => {
                "look again: the guest changes its text for moments only"
            }
            Self::Changed(ChangedError::NotShipped(NotShipped::FromMemory)) => {
                "give the vmlinuz that the guest ran: --kernel VMLINUZ"
            }
            Self::Changed(
                ChangedError::Unknown { .. } | ChangedError::NotShipped(NotShipped::Sites(_)),
            ) => "this cannot be compared: please report it with the kernel's version",
            Self::Unwind(UnwindError::Orc(_) | UnwindError::Layout { .. }) => {
                "give a kernel that was built with its unwind table (CONFIG_UNWINDER_ORC)"
            }
            Self::Kernel(_)
            | Self::Modules(_)
            | Self::Log(_)
            | Self::Changed(_)
            | Self::Unwind(_) => {
                "the guest was in the middle of changing it, or its memory is damaged: look again, or at another dump"
            }
        };
        hint.to_owned()
    }
}
