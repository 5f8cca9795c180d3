//! Programs of others that look at the same guests and kernels: drgn and vmlinux-to-elf, which `scripts/oracles` has made ready.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::stock::{self, Stock};

/// What drgn says of a recorded guest: the JSON of a program in `tests/oracles`, which says there what it holds. `args` are more arguments for it.
///
/// # Errors
/// When it fails.
pub fn drgn(program: &str, stock: Stock, core: &Path, args: &[&Path]) -> Result<Value, String> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("oracles")
        .join(program);
    let mut command = python()?;
    command
        .arg(&program)
        .arg(core)
        .arg(stock.file("vmlinux.debug"))
        .args(args);
    let output = output(&mut command)?;
    serde_json::from_slice(&output).map_err(|error| format!("{}: {error}", program.display()))
}

/// The lines that vmlinux-to-elf gives for the symbols of a kernel's unpacked image: address, kind and name. It unpacks some
/// images itself, but not the bzImages that are packed with LZ4.
///
/// # Errors
/// When it fails.
pub fn symbols(stock: Stock) -> Result<Vec<u8>, String> {
    let mut command = python()?;
    command
        .args(["-m", "vmlinux_to_elf.scripts.kallsyms_finder"])
        .arg(stock.file("vmlinux"));
    output(&mut command)
}

fn python() -> Result<Command, String> {
    let python = stock::cache().join("venv/bin/python");
    if !python.exists() {
        return Err(format!(
            "{} is missing: run scripts/oracles",
            python.display()
        ));
    }
    Ok(Command::new(python))
}

fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {said}", output.status))
}
