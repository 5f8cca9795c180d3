//! The benchmarks that `scripts/bench` runs. What needs a guest runs this program again inside the lab (`inside PART`); what can be timed natively
//! is timed here. Every peer is measured in the same run.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "figures go to stdout, progress to stderr"
)]

mod figures;
mod index;
mod inside;
mod machine;
mod many;
mod outside;
mod pause;
mod redirect;
mod unwind;

use std::process::ExitCode;

use figures::Figures;
use tests::stock::{LTS_6_1, NEWEST_6_12, named};

const USAGE: &str = "usage: exopatch-bench first|kernel|redirect|pause [--json] [--samples N]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["inside", part, ref rest @ ..] => {
            inside::measure(part, rest).map(|values| println!("{values}"))
        }
        ["index-memory", kernel] => named(kernel)
            .and_then(index::own_memory)
            .map(|values| println!("{values}")),
        ["first", ref options @ ..] => run(options, first),
        ["kernel", ref options @ ..] => run(options, kernel),
        ["pause", ref options @ ..] => run(options, pause::pause),
        ["redirect", ref options @ ..] => run(options, redirect::redirect),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("exopatch-bench: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a benchmark with that many samples of each figure, and prints its figures.
fn run(
    options: &[&str],
    benchmark: fn(&mut Figures, usize) -> Result<(), String>,
) -> Result<(), String> {
    let mut samples = 3;
    let mut json = false;
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match *option {
            "--json" => json = true,
            "--samples" => {
                let number = options.next().ok_or(USAGE)?;
                samples = number
                    .parse()
                    .map_err(|_| format!("--samples: '{number}' is not a number"))?;
            }
            _ => return Err(USAGE.to_owned()),
        }
    }
    let mut figures = Figures::default();
    // What was measured before something failed is told all the same.
    let end = benchmark(&mut figures, samples);
    if json {
        println!("{}", figures.json());
    } else {
        println!("{}", figures.table());
    }
    end
}

fn first(figures: &mut Figures, samples: usize) -> Result<(), String> {
    outside::lab_start(figures, samples)?;
    outside::boot(figures, samples)?;
    index::index(figures, samples.max(5))?;
    outside::pause(figures, samples)?;
    outside::work(figures)?;
    outside::memory(figures)
}

fn kernel(figures: &mut Figures, samples: usize) -> Result<(), String> {
    for stock in [LTS_6_1, NEWEST_6_12] {
        index::beside_peer(figures, stock, samples)?;
        index::from_memory(figures, stock, samples)?;
        index::memory(figures, stock)?;
        index::lookups(figures, stock)?;
        unwind::unwind(figures, stock, samples)?;
    }
    Ok(())
}
