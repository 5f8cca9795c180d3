//! Does `scripts/mutate` find what it looks for? Cases that go wrong on purpose must be told, those around them done; and a short run of the target that
//! needs no kernel finds nothing.

use std::process::Command;

/// What the program prints, and whether it found nothing.
fn mutate(args: &[&str]) -> (String, bool) {
    let output = Command::new(env!("CARGO_BIN_EXE_exopatch-mutate"))
        .args(args)
        .output()
        .expect("the program runs");
    let said = String::from_utf8(output.stdout).expect("text");
    (said, output.status.success())
}

fn found(target: &str, limit: &str, want: &str) {
    let (said, nothing) = mutate(&["--cases", "6", "--limit", limit, target]);
    let lines: Vec<&str> = said.lines().collect();
    let finding = format!("{target} 3 {want}");
    let sum = format!("{target}: 6 cases, 1 findings");
    assert!(
        !nothing && lines.len() == 2 && lines[0].starts_with(&finding) && lines[1] == sum,
        "{said}"
    );
}

#[test]
fn a_case_that_panics_is_found() {
    found("wrong-panic", "60", "ends with exit status: 101");
}

#[test]
fn a_case_that_hangs_is_found() {
    found("wrong-hang", "2", "does not end in 2s");
}

#[test]
fn a_case_that_takes_too_much_memory_is_found() {
    found("wrong-memory", "60", "ends with signal: 6");
}

#[test]
fn a_case_that_was_kept_is_tried_first() {
    let kept = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(kept.path(), "# why\nwrong-panic 3 what it was\n").expect("written");
    let path = kept.path().to_str().expect("UTF-8");
    let (said, nothing) = mutate(&["--kept", path, "--cases", "1", "wrong-panic"]);
    assert!(!nothing && said.starts_with("wrong-panic 3 "), "{said}");
}

#[test]
fn made_up_types_are_read_or_refused() {
    let (said, nothing) = mutate(&["--cases", "60", "made-up"]);
    assert!(nothing, "{said}");
}
