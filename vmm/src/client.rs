//! The client side of the command: `exopatch vm`, `update`, `kernel`, `top` speak to a running exopatch over its API socket.
//!
//! A result is printed as a table, or as the API's own JSON with `--json`; failures go to standard error in the same
//! two forms. The exit code tells kinds of failure apart.

mod events;
mod http;
mod kernel;
mod progress;
mod screen;
pub mod set;
mod show;
pub mod time;
pub mod top;
pub mod update;
pub mod vm;
mod words;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::api::wire::ErrorBody;
use crate::output::{self, clean};

/// The table of exit codes, as the help of every client command shows it.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed: the guest is as it was
  2  wrong usage
  3  no answer: no exopatch at the API socket, or the connection broke off
  4  not done before the deadline: the guest is as it was
  5  failed half-way and kept paused: the guest's memory is not known to be sound";

/// Where to call, and how to print.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    json: bool,
}

/// Why a client command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Nobody said where the API is.
    #[error("no API socket was given")]
    NoSocket,
    /// Nobody answers there.
    #[error("cannot connect to the API socket {path}: {cause}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The connection ended before the answer.
    #[error("the connection to {path} broke off: {cause}")]
    BrokenOff {
        /// The socket.
        path: PathBuf,
        /// What happened to it.
        cause: String,
    },
    /// The server said no.
    #[error("{}: {}", clean(&.body.message), clean(&.body.cause))]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the server said.
        body: ErrorBody,
    },
    /// The server does not speak this API.
    #[error("{path} does not answer as exopatch does: {cause}")]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What was strange.
        cause: String,
    },
    /// A file of the user could not be used.
    #[error("cannot read {path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// What was found is not what should be.
    #[error("{0}")]
    Differs(String),
    /// The result could not be printed.
    #[error("cannot print the result: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// A fixed name for programs to test.
    fn code(&self) -> &str {
        match self {
            Self::Refused { body, .. } => &body.code,
            Self::NoSocket => "no_api_socket",
            Self::Connect { .. } => "cannot_connect",
            Self::BrokenOff { .. } => "connection_broke_off",
            Self::Strange { .. } => "strange_server",
            Self::File { .. } => "cannot_read_file",
            Self::Differs(_) => "differs",
            Self::Output(_) => "cannot_print",
        }
    }

    /// What the user can do.
    fn hint(&self) -> &str {
        match self {
            Self::Refused { body, .. } => &body.hint,
            Self::NoSocket => {
                "say --api-sock PATH, or set EXOPATCH_API_SOCK, as exopatch run was given it"
            }
            Self::Connect { cause, .. } => match cause.kind() {
                io::ErrorKind::NotFound => "start a guest with exopatch run and this --api-sock",
                io::ErrorKind::ConnectionRefused => {
                    "the exopatch that made it is gone: start another, which replaces the file"
                }
                io::ErrorKind::PermissionDenied => {
                    "only the user who started exopatch run may connect"
                }
                _ => "give the socket of a running exopatch run",
            },
            Self::BrokenOff { .. } => {
                "what was asked for may have been done: see exopatch vm status and exopatch update list"
            }
            Self::Strange { .. } => {
                "is the server of another version? Use the exopatch that it was started with"
            }
            Self::File { .. } => "give the path of a file that you can read",
            Self::Differs(_) => {
                "the guest has changed its own text or the arena: see its log, then revert the update"
            }
            Self::Output(_) => "see where standard output leads",
        }
    }
}

impl crate::failure::Failure for Failure {
    /// As in [`EXIT_CODES`].
    fn exit_code(&self) -> u8 {
        match self {
            Self::NoSocket | Self::File { .. } => 2,
            Self::Connect { .. } | Self::BrokenOff { .. } | Self::Strange { .. } => 3,
            Self::Refused { status: 504, .. } => 4,
            Self::Refused { body, .. } if body.code == crate::updates::BROKEN => 5,
            Self::Refused { .. } | Self::Differs(_) | Self::Output(_) => 1,
        }
    }

    fn body(&self) -> ErrorBody {
        if let Self::Refused { body, .. } = self {
            return body.clone();
        }
        let cause = match self {
            Self::Connect { cause, .. } | Self::File { cause, .. } => cause.to_string(),
            Self::BrokenOff { cause, .. } | Self::Strange { cause, .. } => cause.clone(),
            _ => self.to_string(),
        };
        ErrorBody {
            code: self.code().to_owned(),
            message: self.to_string(),
            cause,
            hint: self.hint().to_owned(),
        }
    }
}

impl Client {
    /// A client of the API at `socket`.
    ///
    /// # Errors
    /// [`Failure::NoSocket`] when there is none.
    pub fn new(socket: Option<&Path>, json: bool) -> Result<Self, Failure> {
        let socket = socket.ok_or(Failure::NoSocket)?.to_owned();
        Ok(Self { socket, json })
    }

    /// Prints a result in the form that was asked for.
    fn print<T: Serialize>(
        &self,
        result: &T,
        table: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        self.is_read(result, table).map(drop)
    }

    /// Prints one result of many; whether anybody still reads them.
    fn is_read<T: Serialize>(
        &self,
        result: &T,
        table: impl FnOnce(&T) -> String,
    ) -> Result<bool, Failure> {
        let text = if self.json {
            to_json(result)? + "\n"
        } else {
            table(result)
        };
        Ok(output::is_read(text)?)
    }
}

fn to_json<T: Serialize>(result: &T) -> Result<String, Failure> {
    serde_json::to_string(result).map_err(|cause| Failure::Output(cause.into()))
}

/// Reads a length of time such as `500ms`, `5s` or `2m`.
///
/// # Errors
/// A sentence for the user.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let in_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return Err(format!("{text:?} is not a time; write 500ms, 5s or 2m")),
    };
    let ms = digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(in_ms));
    match ms {
        Some(ms @ 1..=600_000) => Ok(Duration::from_millis(ms)),
        _ => Err(format!(
            "{text:?} is out of range; give between 1ms and 10m"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_time;
    use std::time::Duration;

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_time("10m"), Ok(Duration::from_secs(600)));
        for wrong in [
            "",
            "5",
            "s",
            "5h",
            "-1s",
            "0s",
            "11m",
            "99999999999999999999s",
            "1.5s",
            "5µs",
        ] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
