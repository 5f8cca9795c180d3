//! The command line: one file for each command, and what they share.
//!
//! Every command answers people by default and programs with `--json`; every error names the thing, the place and the
//! way out.

mod build;
mod doctor;
mod kernel;
mod run;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::client::set::SetCommand;
use crate::client::time::TimeCommand;
use crate::client::top::TopArgs;
use crate::client::update::UpdateCommand;
use crate::client::vm::VmCommand;
use crate::client::{self, Client};
use crate::failure::{FAILED, finish};
use crate::{api, output};

/// The command's name.
const NAME: &str = "exopatch";
/// The environment variable that chooses logs, in `tracing`'s filter syntax.
const LOG_VARIABLE: &str = "EXOPATCH_LOG";

/// Boot stock Linux kernels in KVM and update them while they run, from outside.
#[derive(Debug, Parser)]
#[command(name = NAME, version, arg_required_else_help = true)]
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
    #[arg(long, global = true, value_name = "PATH", env = "EXOPATCH_API_SOCK")]
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
    /// Show and control a running virtual machine
    #[command(subcommand)]
    Vm(VmCommand),
    /// Apply updates to a running kernel, use them for some calls or all, count calls, revert and verify
    #[command(subcommand)]
    Update(UpdateCommand),
    /// Fill and empty the sets that rules ask for
    #[command(subcommand)]
    Set(SetCommand),
    /// Begin and end the times that rules go by
    #[command(subcommand)]
    Time(TimeCommand),
    /// Watch functions and their editions: calls a second, what drains, who is waited for, pauses
    Top(TopArgs),
    /// Show the kernel of a running virtual machine, or all of a recorded guest's kernel
    Kernel(kernel::KernelArgs),
    /// Compile an edition into an update package
    Build(build::BuildArgs),
    /// Print the description of the API (OpenAPI 3.1)
    Openapi,
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
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
        Command::Vm(command) => call(&cli.global, |client| client.vm(command)),
        Command::Update(command) => call(&cli.global, |client| client.update(command)),
        Command::Set(command) => call(&cli.global, |client| client.set(command)),
        Command::Time(command) => call(&cli.global, |client| client.time(command)),
        Command::Top(args) => call(&cli.global, |client| client.top(args)),
        Command::Kernel(args) => kernel::main(&args, &cli.global),
        Command::Build(args) => build::main(&args, &cli.global),
        Command::Openapi => match api::openapi::json().map(output::text) {
            Ok(Ok(())) => ExitCode::SUCCESS,
            Ok(Err(error)) => fail(&error, FAILED),
            Err(error) => fail(&error, FAILED),
        },
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), NAME, &mut io::stdout().lock());
            ExitCode::SUCCESS
        }
        Command::Doctor(args) => doctor::main(&args, &cli.global),
    }
}

/// Calls a running exopatch.
fn call(global: &Global, work: impl FnOnce(&Client) -> Result<(), client::Failure>) -> ExitCode {
    let client = Client::new(global.api_sock.as_deref(), global.json);
    finish(client.and_then(|client| work(&client)), global.json)
}

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

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum};

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_shell_completes_what_is_about_editions() {
        for shell in clap_complete::Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), super::NAME, &mut script);
            let script = String::from_utf8(script).unwrap();
            for word in [
                "top",
                "once",
                "interval",
                "use",
                "force",
                "calls",
                "when",
                "count",
                "instead-of",
                "per-task",
            ] {
                // PowerShell's and elvish's scripts hold no values of options.
                let values = ["PowerShell", "Elvish"].contains(&format!("{shell:?}").as_str());
                let told = script.contains(word) || (word == "per-task" && values);
                assert!(told, "{shell} does not complete {word}");
            }
        }
    }
}
