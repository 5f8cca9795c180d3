//! The numbers that tests leave for `scripts/soak`: how often something was done, and what came of it.

use std::env;
use std::fs::OpenOptions;
use std::io::Write as _;

use serde_json::Value;

/// The environment variable that names the file for them.
pub const FILE: &str = "EXOPATCH_FIGURES";
/// The names of those that are the most of several, and not their sum, end so.
pub const MOST: &str = "_most";

/// Adds an object of numbers as a line to the file that is wanted, if one is.
///
/// # Panics
/// When the file cannot be written.
pub fn note(numbers: &Value) {
    let Some(path) = env::var_os(FILE) else {
        return;
    };
    let file = OpenOptions::new().append(true).create(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{numbers}"));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
