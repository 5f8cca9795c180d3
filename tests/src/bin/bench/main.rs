//! The benchmarks that `scripts/bench` runs. What needs a guest runs this program again inside the lab (`inside PART`); what can be timed natively
//! is timed here. Every peer is measured in the same run.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "figures go to stdout, progress to stderr"
)]

mod figures;
mod inside;
mod machine;
mod outside;

use std::process::ExitCode;

use figures::Figures;

const USAGE: &str = "usage: exopatch-bench first [--json] [--samples N]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["inside", part, ref rest @ ..] => {
            inside::measure(part, rest).map(|values| println!("{values}"))
        }
        ["first", ref options @ ..] => first(options),
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

fn first(options: &[&str]) -> Result<(), String> {
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
    outside::lab_start(&mut figures, samples)?;
    outside::boot(&mut figures, samples)?;
    outside::index(&mut figures, samples.max(5))?;
    outside::pause(&mut figures, samples)?;
    outside::work(&mut figures)?;
    outside::memory(&mut figures)?;
    if json {
        println!("{}", figures.json());
    } else {
        println!("{}", figures.table());
    }
    Ok(())
}
