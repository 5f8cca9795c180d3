//! The command's client side, as a user calls it: every call is one process with `--json`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::stock;

/// What a call of the command gave.
#[derive(Debug)]
pub struct Reply {
    /// The exit status; 128 and more for a signal.
    pub status: i32,
    /// Standard output as JSON; null when there was none.
    pub json: Value,
    /// Standard error.
    pub stderr: String,
}

impl Reply {
    /// The JSON of a call that succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    pub fn expect(self, what: &str) -> Value {
        assert_eq!(self.status, 0, "{what} failed: {self:?}");
        self.json
    }

    /// The machine-readable code of a call that was refused.
    ///
    /// # Panics
    /// When it succeeded, or failed without a code.
    #[must_use]
    pub fn refusal(&self, what: &str) -> &str {
        assert_ne!(self.status, 0, "{what} succeeded: {self:?}");
        self.json["code"]
            .as_str()
            .unwrap_or_else(|| panic!("{what} gave no code: {self:?}"))
    }
}

/// A client of one API socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the machine that serves `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// The socket that this client talks to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Calls `exopatch --api-sock SOCKET --json ARGS...`.
    ///
    /// # Panics
    /// When the command cannot be started or prints what is not JSON.
    #[must_use]
    pub fn call(&self, args: &[&str]) -> Reply {
        let mut command = Command::new(stock::exopatch());
        command
            .arg("--api-sock")
            .arg(&self.socket)
            .arg("--json")
            .args(args);
        let output = command.output().expect("exopatch starts");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let text = if stdout.trim().is_empty() {
            stderr.trim()
        } else {
            stdout.trim()
        };
        let json = serde_json::from_str(text).unwrap_or(Value::Null);
        Reply {
            status: output.status.code().unwrap_or(128),
            json,
            stderr,
        }
    }
}
