//! How a command tells that it failed: in words with a way out for people, in the API's form of errors for programs.

use std::error::Error;
use std::process::ExitCode;

use crate::api::wire::ErrorBody;
use crate::output::{self, clean, clean_lines};

/// Exit code of a command that failed.
pub const FAILED: u8 = 1;
/// Exit code of wrong usage, clap's own.
pub const USAGE: u8 = 2;

/// Why a command has no result.
pub trait Failure: Error {
    /// The failure in the API's own form; its code is a fixed name for programs to test.
    fn body(&self) -> ErrorBody;

    /// The exit code that tells it.
    fn exit_code(&self) -> u8;
}

/// Reports a command's end in the form that was asked for, and gives its exit code.
pub fn finish<F: Failure>(result: Result<(), F>, json: bool) -> ExitCode {
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    let body = failure.body();
    match serde_json::to_string(&body) {
        Ok(line) if json => output::raw_error(line),
        _ => output::raw_error(format_args!(
            "error: {} [{}]\n  hint: {}",
            clean_lines(&failure.to_string()),
            clean(&body.code),
            clean(&body.hint)
        )),
    }
    ExitCode::from(failure.exit_code())
}
