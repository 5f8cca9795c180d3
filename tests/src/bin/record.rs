//! `exopatch-record KERNEL LOAD MEMORY_MIB CORE...`: boots a guest with a load and records it, into each file in turn. See `tests::recorded`.
#![expect(clippy::print_stderr, reason = "it says there why it failed")]

use std::process::ExitCode;

use tests::guest::{Guest, Options};
use tests::recorded::Load;
use tests::stock;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match record(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("exopatch-record: {why}");
            ExitCode::FAILURE
        }
    }
}

fn record(args: &[String]) -> Result<(), String> {
    let [kernel, load, memory, cores @ ..] = args else {
        return Err("usage: exopatch-record KERNEL LOAD MEMORY_MIB CORE...".to_owned());
    };
    let stock = stock::named(kernel)?;
    let load: Load = load.parse()?;
    let memory_mib = memory
        .parse()
        .map_err(|_| format!("'{memory}' is not a number of MiB"))?;
    let options = Options::new(stock)
        .memory_mib(memory_mib)
        .cmdline(&load.words());
    let guest = Guest::boot(&options);
    let begun = load.begun();
    let _ = guest.wait_line(0, "load", |line| line == begun);
    for core in cores {
        // One try's file is left when the next begins.
        if std::fs::exists(core).map_err(|error| format!("{core}: {error}"))? {
            std::fs::remove_file(core).map_err(|error| format!("{core}: {error}"))?;
        }
        let reply = guest.client.call(&["vm", "dump", core]);
        if reply.status != 0 {
            return Err(format!("the recording failed: {reply:?}"));
        }
    }
    Ok(())
}
