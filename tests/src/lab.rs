//! Programs of ours run in a lab of their own, and what they print.
//!
//! An emulated processor fails now and then through no fault of ours, as CONTRIBUTING.md explains: so there each is tried several times.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How often a program is tried where the processor is emulated.
const TRIES: u32 = 2;

/// The script that runs a command in the lab, or here where the hardware can run guests.
#[must_use]
pub fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("scripts")
        .join("lab")
}

/// The processor is emulated: this machine's cannot run guests.
#[must_use]
pub fn emulated() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    !cpus
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// How often a program may be tried.
#[must_use]
pub fn tries() -> u32 {
    if emulated() { TRIES } else { 1 }
}

/// Runs `program` once, in a fresh lab that is given up after `limit_s` seconds, and gives its standard output.
///
/// # Errors
/// When it failed, with what it said.
pub fn once(
    program: &Path,
    args: &[&str],
    environment: &[(&str, String)],
    limit_s: u32,
) -> Result<Vec<u8>, String> {
    let output = Command::new(script())
        .args(["--fresh", "--with-qemu", "--timeout", &limit_s.to_string()])
        .arg(program)
        .args(args)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", script().display()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Err(format!(
        "{args:?}: {}: {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    ))
}

/// Runs `program` as [`once`] does, again if it fails, and gives its standard output.
///
/// # Errors
/// When it failed each time, with what it said the last time.
pub fn run(program: &Path, args: &[&str], limit_s: u32) -> Result<Vec<u8>, String> {
    let mut last = String::new();
    for _ in 0..tries() {
        match once(program, args, &[], limit_s) {
            Ok(output) => return Ok(output),
            Err(why) => last = why,
        }
        tried(&last);
    }
    Err(last)
}

#[expect(
    clippy::print_stderr,
    reason = "what needed more than one try must be seen"
)]
fn tried(why: &str) {
    eprintln!("{why}");
}
