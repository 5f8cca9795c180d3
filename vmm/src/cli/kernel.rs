//! `exopatch kernel`: what a guest's kernel is made of and does, seen from outside.
//!
//! `info` alone asks a running exopatch. With `--dump` and `--kernel` everything is read from a recorded guest,
//! by the same functions of the patcher that decide about updates. Each file is one view: read, then shown as a table, or
//! as one JSON object whose addresses are texts (`"0x..."`), as JSON numbers are not exact.

mod failure;
mod info;
mod log;
mod modules;
mod recording;
mod symbols;
mod table;
mod tasks;
#[cfg(test)]
mod tests;
mod text;
mod types;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use self::failure::Failure;
use self::recording::Files;
use super::{Global, call};
use crate::client::{EXIT_CODES, parse_time};
use crate::output;

/// What to show of a kernel, and of which guest.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  exopatch vm dump guest.core
  exopatch kernel --dump guest.core --kernel vmlinuz tasks")]
pub struct KernelArgs {
    #[command(flatten)]
    files: Files,
    #[command(subcommand)]
    view: View,
}

/// What can be shown.
#[derive(Clone, Debug, Subcommand)]
enum View {
    /// Show the kernel's image, and the kernel found in the guest: a running one, or a recorded one with --dump
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", example("info")))]
    Info {
        /// Give up stopping a running guest after this time
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
    /// Show the symbols of the kernel and its modules: all, those of a name, or what is at an address
    #[command(after_help = help("symbols unix_ioctl"))]
    Symbols {
        /// A symbol's name, or an address of the running kernel: 0x..., or 16 hexadecimal digits
        #[arg(value_name = "NAME|ADDRESS")]
        of: Option<String>,
    },
    /// Show a type as C with the place of every member, or the place of one; needs no --dump
    #[command(after_help = help("types task_struct thread.sp"))]
    Types {
        /// The type: a name, or one with its kind: "struct task_struct"
        name: String,
        /// Where this member lies: through members (thread.sp) and array elements (slots[3])
        #[arg(value_name = "MEMBER.PATH")]
        member: Option<String>,
    },
    /// List the modules that are loaded, as /proc/modules does
    #[command(after_help = help("modules"))]
    Modules,
    /// List all tasks: processes, threads, kernel threads and idle tasks, with their stacks
    #[command(after_help = help("tasks"))]
    Tasks,
    /// Print the kernel's log, as dmesg does
    #[command(after_help = help("log"))]
    Log,
    /// Compare the kernel's text with its image, and name the cause of every difference
    #[command(after_help = help("text --changed"))]
    Text(text::TextArgs),
}

/// The end of a command's help.
fn help(command: &str) -> String {
    format!(
        "{}\n\nExit codes:\n  0  done\n  1  refused or failed: not found, not a dump, another kernel, not as it must be\n  2  \
         wrong usage, or a file that cannot be read",
        example(command)
    )
}

fn example(command: &str) -> String {
    format!("Example:\n  exopatch kernel --dump guest.core --kernel vmlinuz {command}")
}

/// A view of a kernel, ready to be printed.
trait Shown: Serialize {
    /// The form for people.
    fn table(&self) -> String;

    /// What makes the command fail, though its result was printed.
    fn verdict(&self) -> Result<(), Failure> {
        Ok(())
    }
}

/// Shows what was asked for, and gives the exit code.
pub(super) fn main(args: &KernelArgs, global: &Global) -> ExitCode {
    let Files { dump, kernel } = &args.files;
    match args.view {
        View::Info { deadline } if dump.is_none() && kernel.is_none() => {
            call(global, |client| client.kernel(deadline))
        }
        _ => failure::finish(show(args, global.json), global.json),
    }
}

fn show(args: &KernelArgs, json: bool) -> Result<(), Failure> {
    let files = &args.files;
    match &args.view {
        View::Info { .. } => print(
            &info::read(files, &files.open("kernel info with --dump")?),
            json,
        ),
        View::Symbols { of: None } => print(&symbols::all(&files.open("kernel symbols")?)?, json),
        View::Symbols { of: Some(of) } => {
            let asked = symbols::Asked::parse(of)?;
            let recording = files.open("kernel symbols")?;
            match asked {
                symbols::Asked::Name(name) => print(&symbols::named(&recording, name)?, json),
                symbols::Asked::Address(at) => print(&symbols::at(&recording, at)?, json),
            }
        }
        View::Types { name, member } => {
            let image = files.image("kernel types")?;
            match types::asked(name, member.as_deref()) {
                (name, None) => print(&types::layouts(&image, &name)?, json),
                (name, Some(path)) => print(&types::member(&image, &name, path)?, json),
            }
        }
        View::Modules => print(&modules::read(&files.open("kernel modules")?)?, json),
        View::Tasks => print(&tasks::read(&files.open("kernel tasks")?)?, json),
        View::Log => print(&log::read(&files.open("kernel log")?)?, json),
        View::Text(args) => print(&text::read(&files.open("kernel text")?, args)?, json),
    }
}

fn print(shown: &impl Shown, json: bool) -> Result<(), Failure> {
    if json {
        output::line(serde_json::to_string(shown)?)?;
    } else {
        output::text(shown.table())?;
    }
    shown.verdict()
}
