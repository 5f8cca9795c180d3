//! The command line: one file for each command, and what they share.
//!
//! Every command answers people by default and programs with `--json`; every error names the thing, the place and the
//! way out.

mod doctor;
mod run;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::output;

/// The environment variable that chooses logs, in `tracing`'s filter syntax.
const LOG_VARIABLE: &str = "EXOPATCH_LOG";

/// Boot stock Linux kernels in KVM and update them while they run, from outside.
#[derive(Debug, Parser)]
#[command(name = "exopatch", version, arg_required_else_help = true)]
pub struct Cli {
    /// What all commands share.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes, before or after its name.
#[derive(Clone, Debug, clap::Args)]
pub struct Global {
    /// The API's unix socket: `run` serves it, the other commands talk to it
    #[arg(long, global = true, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more to standard error; twice for still more. EXOPATCH_LOG chooses by module
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a kernel and stay with it until it ends
    Run(run::RunArgs),
    /// Say whether this machine can run guests, and what to do if not
    Doctor(doctor::DoctorArgs),
}

/// Parses the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.global.verbose);
    match cli.command {
        Command::Run(args) => run::main(args, &cli.global),
        Command::Doctor(args) => doctor::main(&args, &cli.global),
    }
}

/// Exit code of a command that failed.
pub(crate) const FAILED: u8 = 1;
/// Exit code of wrong usage, clap's own.
pub(crate) const USAGE: u8 = 2;

/// Reports `error` and gives the exit code.
pub(crate) fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    output::error(error);
    ExitCode::from(code)
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
}
