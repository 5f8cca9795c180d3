//! Feeds damaged copies of real things to everything that reads what comes from outside: none may panic, hang, or take memory without bound.
//!
//! Each case is a number; with the thing that is damaged it says all that is done, so that a case can be had again. Cases that once failed
//! are kept in `tests/corpus/cases` and tried first. The damage is done in processes of their own: what one of them dies of is a finding,
//! and the case that it was at is named. `scripts/mutate` brings kernels and recorded guests.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "findings go to stdout, progress to stderr"
)]

mod cases;
mod damage;
mod target;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use cap::Cap;
use cases::Run;

/// Memory of a worker is limited case by case.
#[global_allocator]
static ALLOCATOR: Cap<std::alloc::System> = Cap::new(std::alloc::System, usize::MAX);

const USAGE: &str = "usage: exopatch-mutate [--kernel VMLINUZ] [--dump CORE] [--package XPU] [--cases N] [--first N] [--limit SECONDS] [--kept FILE] [TARGET...]";

/// Far above what a case takes; only a hang reaches it.
const LIMIT_S: u64 = 60;

/// What a run works on.
#[derive(Clone, Debug, Default)]
struct Options {
    kernel: PathBuf,
    dump: PathBuf,
    package: PathBuf,
    kept: Option<PathBuf>,
    first: u64,
    cases: u64,
    /// Seconds that a case may take.
    limit_s: u64,
    /// This process is a worker.
    worker: bool,
    targets: Vec<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        cases: 100,
        limit_s: LIMIT_S,
        ..Options::default()
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        let number = |text: String| {
            text.parse()
                .map_err(|_| format!("{arg}: '{text}' is not a number"))
        };
        match arg.as_str() {
            "--kernel" => options.kernel = value()?.into(),
            "--dump" => options.dump = value()?.into(),
            "--package" => options.package = value()?.into(),
            "--kept" => options.kept = Some(value()?.into()),
            "--cases" => options.cases = number(value()?)?,
            "--limit" => options.limit_s = number(value()?)?,
            "--first" => options.first = number(value()?)?,
            "--worker" => options.worker = true,
            name if target::find(name).is_some() => options.targets.push(arg),
            _ => return Err(format!("'{arg}' is not known; {USAGE}")),
        }
    }
    if options.targets.is_empty() {
        options.targets = target::names().map(str::to_owned).collect();
    }
    Ok(options)
}

fn main() -> ExitCode {
    let outcome = options().and_then(|options| {
        if options.worker {
            return worker::work(&options, &ALLOCATOR).map(|()| 0);
        }
        let run = Run::new(&options)?;
        options.targets.iter().map(|name| run.target(name)).sum()
    });
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(findings) => {
            eprintln!("{findings} findings");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("exopatch-mutate: {why}");
            ExitCode::from(2)
        }
    }
}
