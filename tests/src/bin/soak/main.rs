//! Repeats what the tests repeat, with its full counts, which takes hours: see `scripts/soak`. Each unit's result is a file of its own outside
//! the tree, by commit; the report adds them up.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "figures go to stdout, progress to stderr"
)]

mod parts;
mod report;
mod result;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use serde_json::Value;
use tests::{figures, lab, stock};

use parts::{PARTS, Part};
use result::{Outcome, Sums, add, numbers};

const USAGE: &str = "usage: exopatch-soak COMMIT KERNEL-TESTS [--report FILE | PART...]";
/// Seconds that a unit may take before its lab counts as wedged.
const LIMIT_S: u32 = 7200;

/// Where the results of a commit are.
struct Results(PathBuf);

impl Results {
    fn path(&self, part: &Part, unit: u32, extension: &str) -> PathBuf {
        self.0.join(format!("{}-{unit}.{extension}", part.name))
    }

    fn outcome(&self, part: &Part, unit: u32) -> Result<Option<Outcome>, String> {
        Outcome::read(&self.path(part, unit, "json"))
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        [commit, _, "--report", file] => {
            Results::of(commit).and_then(|results| report::write(commit, &results, Path::new(file)))
        }
        [commit, tests, ref names @ ..] => {
            Results::of(commit).and_then(|results| soak(&results, Path::new(tests), names))
        }
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("exopatch-soak: {why}");
            ExitCode::FAILURE
        }
    }
}

impl Results {
    fn of(commit: &str) -> Result<Self, String> {
        let dir = stock::cache().join("soak").join(commit);
        fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        Ok(Self(dir))
    }
}

/// Runs the units of the parts that are named, or of all, that have no result yet.
fn soak(results: &Results, tests: &Path, names: &[&str]) -> Result<(), String> {
    let known = |name: &&&str| PARTS.iter().any(|part| part.name == **name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        let all: Vec<_> = PARTS.iter().map(|part| part.name).collect();
        return Err(format!("no part {unknown}; there are {}", all.join(" ")));
    }
    let mut failed = Vec::new();
    let wanted = |part: &&Part| names.is_empty() || names.contains(&part.name);
    for part in PARTS.iter().filter(wanted) {
        for unit in 0..part.units {
            if results.outcome(part, unit)?.is_some() {
                continue;
            }
            eprintln!("{}, unit {} of {}", part.name, unit + 1, part.units);
            match run(results, part, unit, tests) {
                Ok(outcome) => outcome.write(&results.path(part, unit, "json"))?,
                Err(why) => {
                    eprintln!("{why}");
                    failed.push(format!("{}-{unit}", part.name));
                }
            }
        }
        println!("{}", report::line(part, results)?);
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("failed: {}", failed.join(" ")))
}

/// Runs one unit until it leaves figures, as often as it may be tried. Those of a try that failed count as they are.
fn run(results: &Results, part: &Part, unit: u32, tests: &Path) -> Result<Outcome, String> {
    let file = results.path(part, unit, "figures");
    let path = file.to_str().ok_or("a path is not UTF-8")?;
    let (count, number) = part.count;
    let environment = [
        (count, number.to_string()),
        // Any but zero, and another for each unit.
        ("EXOPATCH_SEED", (0x5eed_0001 + unit).to_string()),
        (figures::FILE, path.to_owned()),
    ];
    let args = ["--exact", part.test, "--nocapture"];
    let mut last = String::new();
    for tries in 1..=lab::tries() {
        if file.exists() {
            fs::remove_file(&file).map_err(|error| format!("{path}: {error}"))?;
        }
        let start = Instant::now();
        let failed = lab::once(tests, &args, &environment, LIMIT_S).err();
        if let Some(why) = &failed {
            eprintln!("{}, unit {}, try {tries}: {why}", part.name, unit + 1);
        }
        if let Some(why) = failed.filter(|_| !file.exists()) {
            last = why;
            continue;
        }
        let figures = noted(&file, part.done)?;
        return Ok(Outcome {
            date: today()?,
            seconds: start.elapsed().as_secs(),
            tries,
            figures,
        });
    }
    Err(last)
}

/// The numbers that the test left. One that was not there at all left none.
fn noted(file: &Path, done: &str) -> Result<Sums, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let text = fs::read_to_string(file).map_err(|error| failed(&error))?;
    let mut sums = Sums::new();
    for line in text.lines() {
        let json: Value = serde_json::from_str(line).map_err(|error| failed(&error))?;
        add(&mut sums, &numbers(&json).ok_or_else(|| failed(&line))?);
    }
    if sums.get(done).is_none_or(|count| *count == 0) {
        return Err(failed(&format_args!("no {done} in {sums:?}")));
    }
    fs::remove_file(file).map_err(|error| failed(&error))?;
    Ok(sums)
}

fn today() -> Result<String, String> {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()
        .map_err(|error| format!("date: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
