//! Why `exopatch kernel` has no answer: in words with a way out for people, in the API's form of errors for programs.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use patcher::addr::Gva;
use patcher::guest::dump::DumpError;
use patcher::kernel::changed::ChangedError;
use patcher::kernel::locate::{KernelError, LocateError};
use patcher::kernel::log::LogError;
use patcher::kernel::modules::ModuleError;
use patcher::kernel::symbols::SymbolError;
use patcher::kernel::types::TypeError;

use crate::api::wire::ErrorBody;
use crate::cli::{FAILED, USAGE};
use crate::client::clean;
use crate::kernel_index::IndexError;
use crate::output;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No recorded guest was named, or no image.
    #[error("{what} shows a recorded guest, and {missing} was not given")]
    NotGiven {
        what: &'static str,
        missing: &'static str,
    },
    #[error("cannot read the dump {path}: {cause}")]
    File { path: PathBuf, cause: io::Error },
    #[error("cannot use the dump {path}: {cause}")]
    Dump { path: PathBuf, cause: DumpError },
    #[error(transparent)]
    Image(#[from] IndexError),
    #[error("cannot find the kernel {kernel} in the dump {dump}: {cause}")]
    Locate {
        dump: PathBuf,
        kernel: PathBuf,
        cause: LocateError,
    },
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    #[error("{text:?} is neither a name nor an address")]
    Address { text: String },
    #[error(
        "the kernel has nothing at {at}: no symbol of its image, its modules or a CPU's variables"
    )]
    NothingAt { at: Gva },
    #[error(transparent)]
    Type(#[from] TypeError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Modules(#[from] ModuleError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Changed(#[from] ChangedError),
    /// It was printed, but is not as it should be.
    #[error(
        "{places} places of the kernel's text hold what neither its image nor anything known explains"
    )]
    Unexplained { places: u64 },
    #[error("cannot print the result: {0}")]
    Output(#[from] io::Error),
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Output(error.into())
    }
}

/// What a system's error with the dump `path` becomes.
pub(super) fn unreadable(path: &Path) -> impl Fn(io::Error) -> Failure + '_ {
    |cause| Failure::File {
        path: path.to_owned(),
        cause,
    }
}

impl Failure {
    /// As the client's: wrong usage is told from what was tried in vain.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::NotGiven { .. }
            | Self::File { .. }
            | Self::Image(IndexError::File { .. })
            | Self::Address { .. } => USAGE,
            _ => FAILED,
        }
    }

    /// A fixed name for programs to test.
    fn code(&self) -> &'static str {
        match self {
            Self::NotGiven { .. } => "no_recorded_guest",
            Self::File { .. } | Self::Image(IndexError::File { .. }) => "cannot_read_file",
            Self::Dump {
                cause: DumpError::NotCore,
                ..
            } => "not_a_dump",
            Self::Dump {
                cause: DumpError::Truncated { .. },
                ..
            } => "dump_truncated",
            Self::Dump {
                cause: DumpError::NoVcpus,
                ..
            } => "dump_without_vcpus",
            Self::Image(_) => "kernel_unusable",
            Self::Locate {
                cause: LocateError::BuildId { .. },
                ..
            } => "other_kernel",
            Self::Locate { .. } => "kernel_not_found",
            Self::Symbol(_) => "no_such_symbol",
            Self::Address { .. } => "no_address",
            Self::NothingAt { .. } => "nothing_there",
            Self::Type(TypeError::Ambiguous { .. }) => "ambiguous_type",
            Self::Type(TypeError::NoMember { .. }) => "no_such_member",
            Self::Type(_) => "no_such_type",
            Self::Kernel(_) | Self::Modules(_) | Self::Log(_) => "unsound_kernel",
            Self::Changed(
                ChangedError::Boot { .. }
                | ChangedError::InFlux { .. }
                | ChangedError::Unknown { .. },
            ) => "not_comparable",
            Self::Changed(_) => "unsound_kernel",
            Self::Unexplained { .. } => "differs",
            Self::Output(_) => "cannot_print",
        }
    }

    /// What the user can do.
    fn hint(&self) -> String {
        let hint = match self {
            Self::NotGiven { .. } => {
                "make a dump with exopatch vm dump FILE, then say --dump FILE --kernel VMLINUZ"
            }
            Self::File { .. } | Self::Image(IndexError::File { .. }) => {
                "give the path of a file that you can read"
            }
            Self::Dump { cause, .. } => match cause {
                DumpError::Truncated { .. } => {
                    "the file was not written or copied to its end: is there room for it? Make it again"
                }
                DumpError::NotCore | DumpError::NoVcpus => {
                    "make one with exopatch vm dump FILE, or with QEMU's dump-guest-memory without compression"
                }
            },
            Self::Image(_) => "give the vmlinuz of the kernel's package",
            Self::Locate { cause, .. } => match cause {
                LocateError::BuildId { found, .. } => {
                    return format!(
                        "give the vmlinuz with build-id {}, which the guest ran when it was recorded",
                        hex(found)
                    );
                }
                _ => "give the vmlinuz that the guest ran, and a dump made when it had booted",
            },
            Self::Symbol(_) => "exopatch kernel ... symbols, without a name, lists all there are",
            Self::Address { .. } => "write a symbol's name, or an address as 0xffffffff81000000",
            Self::NothingAt { .. } => {
                "addresses are those of the running kernel: add the slide that exopatch kernel ... info shows"
            }
            Self::Type(TypeError::NoMember { name, .. }) => {
                return format!(
                    "exopatch kernel ... types '{name}', without a path, shows its members"
                );
            }
            Self::Type(TypeError::Ambiguous { name, .. }) => {
                return format!(
                    "exopatch kernel ... types '{name}', without a path, shows each of them"
                );
            }
            Self::Type(_) => "name a structure, union, enumeration, typedef or function as in C",
            Self::Kernel(_) | Self::Modules(_) | Self::Log(_) => {
                "the guest was in the middle of changing it, or its memory is damaged: look at another dump"
            }
            Self::Changed(ChangedError::Boot { .. }) => {
                "make the dump when the guest has booted, and before it goes down"
            }
            Self::Changed(ChangedError::InFlux { .. }) => {
                "make another dump: the guest changes its text for moments only"
            }
            Self::Changed(_) => {
                "this cannot be compared: please report it with the kernel's version"
            }
            Self::Unexplained { .. } => {
                "a function that an update replaced shows so too, as a dump does not say what was updated"
            }
            Self::Output(_) => "see where standard output leads",
        };
        hint.to_owned()
    }

    /// The failure in the API's own form.
    pub(super) fn body(&self) -> ErrorBody {
        let cause = match self {
            Self::File { cause, .. } => cause.to_string(),
            Self::Dump { cause, .. } => cause.to_string(),
            Self::Locate { cause, .. } => cause.to_string(),
            _ => self.to_string(),
        };
        ErrorBody {
            code: self.code().to_owned(),
            message: self.to_string(),
            cause,
            hint: self.hint(),
        }
    }
}

/// Reports the command's end in the form that was asked for, and gives its exit code.
pub(super) fn finish(result: Result<(), Failure>, json: bool) -> ExitCode {
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    match serde_json::to_string(&failure.body()) {
        Ok(body) if json => output::raw_error(body),
        _ => output::raw_error(format_args!(
            "error: {} [{}]\n  hint: {}",
            clean(&failure.to_string()),
            failure.code(),
            clean(&failure.hint())
        )),
    }
    ExitCode::from(failure.exit_code())
}

/// Bytes as they are written in build-ids and code.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
