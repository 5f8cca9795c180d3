//! Why `exopatch kernel` has no answer: in words with a way out for people, in the API's form of errors for programs.

use std::io;
use std::path::{Path, PathBuf};

use patcher::guest::dump::DumpError;
use patcher::kernel::agree::Disagreement;
use patcher::kernel::locate::LocateError;
use patcher::kernel::recover::RecoverError;

use crate::api::wire::ErrorBody;
use crate::failure::{FAILED, USAGE};
use crate::kernel_index::IndexError;
use crate::views::error::Kind;
use crate::views::{ViewError, hex};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No recorded guest was named, or no image where one is needed.
    #[error("this is of a recorded guest, and {missing} was not given")]
    NotGiven { missing: &'static str },
    #[error("cannot read the dump {path}: {cause}")]
    File { path: PathBuf, cause: io::Error },
    #[error("cannot use the dump {path}: {cause}")]
    Dump { path: PathBuf, cause: DumpError },
    #[error(transparent)]
    Image(#[from] IndexError),
    #[error("cannot find the kernel {} in the dump {dump}: {cause}", of_memory(.kernel.as_ref()))]
    Locate {
        dump: PathBuf,
        /// Its file, unless it was recovered from memory.
        kernel: Option<PathBuf>,
        cause: LocateError,
    },
    #[error("cannot recover a kernel from the dump {dump}: {cause}")]
    Recover { dump: PathBuf, cause: RecoverError },
    #[error("the kernel {kernel} and the memory of the dump {dump} do not say the same: {cause}")]
    Disagree {
        dump: PathBuf,
        kernel: PathBuf,
        cause: Disagreement,
    },
    #[error(transparent)]
    View(#[from] ViewError),
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

fn of_memory(kernel: Option<&PathBuf>) -> String {
    kernel.map_or_else(
        || "recovered from memory".to_owned(),
        |kernel| kernel.display().to_string(),
    )
}

/// What a system's error with the dump `path` becomes.
pub(super) fn unreadable(path: &Path) -> impl Fn(io::Error) -> Failure + '_ {
    |cause| Failure::File {
        path: path.to_owned(),
        cause,
    }
}

impl Failure {
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
            Self::Recover { .. } => "kernel_not_recovered",
            Self::Disagree { .. } => "kernels_disagree",
            Self::View(error) => error.code(),
            Self::Unexplained { .. } => "differs",
            Self::Output(_) => "cannot_print",
        }
    }

    /// What the user can do.
    fn hint(&self) -> String {
        let hint = match self {
            Self::NotGiven { .. } => {
                "make a dump with exopatch vm dump FILE, then say --dump FILE, and --kernel VMLINUZ with the kernel that the guest ran"
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
            Self::Recover { .. } => "give the vmlinuz that the guest ran: --kernel VMLINUZ",
            Self::Disagree { .. } => {
                "the guest's memory is damaged, or not what its kernel made of it: believe neither"
            }
            Self::View(error) => return error.hint(),
            Self::Unexplained { .. } => {
                "a function that an update replaced shows so too, as a dump does not say what was updated"
            }
            Self::Output(_) => "see where standard output leads",
        };
        hint.to_owned()
    }
}

impl crate::failure::Failure for Failure {
    /// As the client's: wrong usage is told from what was tried in vain.
    fn exit_code(&self) -> u8 {
        match self {
            Self::NotGiven { .. } | Self::File { .. } | Self::Image(IndexError::File { .. }) => {
                USAGE
            }
            Self::View(error) if error.kind() == Kind::Malformed => USAGE,
            _ => FAILED,
        }
    }

    fn body(&self) -> ErrorBody {
        let cause = match self {
            Self::File { cause, .. } => cause.to_string(),
            Self::Dump { cause, .. } => cause.to_string(),
            Self::Locate { cause, .. } => cause.to_string(),
            Self::Recover { cause, .. } => cause.to_string(),
            Self::Disagree { cause, .. } => cause.to_string(),
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
