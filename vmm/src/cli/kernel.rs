//! `exopatch kernel`: what a guest's kernel is made of and does, seen from outside.
//!
//! A running exopatch is asked through its API. With `--dump` the same views ([`crate::views`]) are taken here of a recorded guest; of
//! its kernel's file (`--kernel`) where there is one, or else of memory alone. Either way they are shown as tables, or as one JSON object.

mod failure;
mod info;
mod recording;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use self::failure::Failure;
use self::recording::Files;
use super::{Global, call};
use crate::client::{EXIT_CODES, parse_time};
use crate::failure::finish;
use crate::kernel_index;
use crate::output;
use crate::views::{self, Asked, Seen, View, ViewError, at, disasm, stack, symbols, text, types};

/// What to show of a kernel, and of which guest.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  exopatch kernel tasks                     # of the guest behind --api-sock, which stands still for a moment
  exopatch vm dump guest.core
  exopatch kernel --dump guest.core --kernel vmlinuz tasks
  exopatch kernel --dump guest.core tasks   # the kernel recovered from memory: all but what needs its text as it was shipped")]
pub struct KernelArgs {
    #[command(flatten)]
    files: Files,
    /// Give up on a running guest after this time
    #[arg(long, global = true, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    deadline: Duration,
    #[command(subcommand)]
    show: Show,
}

/// What can be shown.
#[derive(Clone, Debug, Subcommand)]
enum Show {
    /// Show the kernel's image, and the kernel found in the guest
    #[command(after_help = help("info"))]
    Info {
        /// Of a recorded guest: prove that the kernel's file and the guest's memory say the same of the kernel
        #[arg(long)]
        verify: bool,
    },
    /// Show the symbols of the kernel and its modules: all, those of a name, or what is at an address
    #[command(after_help = help("symbols unix_ioctl"))]
    Symbols {
        /// A symbol's name, or an address of the running kernel: 0x..., or 16 hexadecimal digits
        #[arg(value_name = "NAME|ADDRESS")]
        of: Option<String>,
    },
    /// Show a type as C with the place of every member, or the place of one; without --module it stops no guest, and needs no --dump
    #[command(after_help = help("types task_struct thread.sp"))]
    Types {
        /// The type: a name, or one with its kind: "struct task_struct"
        name: String,
        /// Where this member lies: through members (thread.sp) and array elements (slots[3])
        #[arg(value_name = "MEMBER.PATH")]
        member: Option<String>,
        /// Look among the types of this module first, which the guest must have loaded
        #[arg(long, value_name = "NAME")]
        module: Option<String>,
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
    Text(TextArgs),
    /// Show stacks frame by frame, each reliable, or unreliable with the reason and the place
    #[command(after_help = help("stack --all"))]
    Stack(StackArgs),
    /// Show a function's instructions, and where they differ from the image those of the image and the cause
    #[command(after_help = help("disasm unix_ioctl"))]
    Disasm {
        /// A function's name, with +OFFSET for a place in it, or an address: 0x..., or 16 hexadecimal digits
        #[arg(value_name = "NAME[+OFFSET]|ADDRESS")]
        of: String,
        /// Which of several functions of that name, from 1 in the order of addresses
        #[arg(long, value_name = "N")]
        position: Option<usize>,
    },
}

/// Whose stacks to show.
#[derive(Args, Clone, Debug)]
struct StackArgs {
    /// A thread's id (0 are the idle tasks), or cpuN for the vCPU N
    #[arg(value_name = "PID|cpuN", required_unless_present_any = ["all", "at"])]
    of: Option<String>,
    /// Show every stack
    #[arg(long, conflicts_with = "of")]
    all: bool,
    /// Run the guest until a vCPU comes to this place of its code, and show that vCPU's stack. A hardware breakpoint stops it: the guest's own
    /// would not work meanwhile, so that it is refused while there are any
    #[arg(long, value_name = "NAME[+OFFSET]|ADDRESS", conflicts_with_all = ["of", "all"])]
    at: Option<String>,
    /// Show so many stacks of vCPUs that come there
    #[arg(long, value_name = "N", requires = "at", conflicts_with_all = ["of", "all"])]
    count: Option<usize>,
    /// Which of several functions of that name, from 1 in the order of addresses
    #[arg(long, value_name = "N", requires = "at", conflicts_with_all = ["of", "all"])]
    position: Option<usize>,
}

impl StackArgs {
    fn asked(&self) -> Result<Asked, ViewError> {
        Ok(match (&self.at, &self.of) {
            (Some(place), _) => Asked::At(at::Asked::parse(place, self.position, self.count)?),
            (None, Some(of)) => Asked::Stack(stack::Asked::parse(of)?),
            (None, None) => Asked::Stack(stack::Asked::All),
        })
    }
}

/// What to show of the text.
#[derive(Args, Clone, Copy, Debug)]
struct TextArgs {
    /// Compare all of it with what must be there
    #[arg(long, required = true)]
    changed: bool,
    /// Show every difference, not only those that nothing explains
    #[arg(long, requires = "changed")]
    each: bool,
}

/// The end of a command's help.
fn help(command: &str) -> String {
    format!(
        "Examples:\n  exopatch kernel {command}\n  exopatch kernel --dump guest.core --kernel vmlinuz {command}\n\n{EXIT_CODES}"
    )
}

impl Show {
    /// The view that is asked for; `None` for `info`, which is more than one.
    fn asked(&self) -> Result<Option<Asked>, ViewError> {
        Ok(Some(match self {
            Self::Info { .. } => return Ok(None),
            Self::Symbols { of } => {
                let of = of.as_deref().map(symbols::Asked::parse).transpose();
                Asked::Symbols(of?)
            }
            Self::Types {
                name,
                member,
                module,
            } => Asked::Types(types::Asked::parse(
                name,
                member.as_deref(),
                module.as_deref(),
            )),
            Self::Modules => Asked::Modules,
            Self::Tasks => Asked::Tasks,
            Self::Log => Asked::Log,
            Self::Text(TextArgs { each, .. }) => Asked::Text(text::Asked { each: *each }),
            Self::Stack(args) => args.asked()?,
            Self::Disasm { of, position } => Asked::Disasm(disasm::Asked::parse(of, *position)?),
        }))
    }
}

/// Shows what was asked for, and gives the exit code.
pub(super) fn main(args: &KernelArgs, global: &Global) -> ExitCode {
    let verify = matches!(args.show, Show::Info { verify: true });
    let recorded = args.files.any() || verify;
    match args.show.asked() {
        Ok(None) if !recorded => call(global, |client| client.kernel(args.deadline)),
        Ok(Some(asked)) if !recorded => call(global, |client| client.see(&asked, args.deadline)),
        asked => {
            let shown = asked
                .map_err(Failure::from)
                .and_then(|asked| show(args, asked.as_ref(), global.json));
            finish(shown, global.json)
        }
    }
}

/// Shows what was asked for of a recorded guest.
fn show(args: &KernelArgs, asked: Option<&Asked>, json: bool) -> Result<(), Failure> {
    let Some(asked) = asked else {
        let recording = args.files.open()?;
        let verified = match args.show {
            Show::Info { verify: true } => Some(args.files.verify(&recording)?),
            _ => None,
        };
        let info = info::read(&args.files, &recording, verified);
        return print(&info, || info.table(), json);
    };
    let seen = Seen {
        paused_us: None,
        view: view(&args.files, asked)?,
    };
    print(&seen, || seen.view.table(), json)?;
    match &seen.view {
        View::Text(text) if text.unexplained() > 0 => Err(Failure::Unexplained {
            places: text.unexplained(),
        }),
        _ => Ok(()),
    }
}

fn view(files: &Files, asked: &Asked) -> Result<View, Failure> {
    if let Asked::At(asked) = asked {
        return Err(asked.of_recording().into());
    }
    if let (None, Some(image), Asked::Types(_)) = (&files.dump, &files.kernel, asked)
        && let Some(view) = views::of_image(asked, &kernel_index::load(image)?)
    {
        return Ok(view?);
    }
    Ok(views::take(asked, &files.open()?.subject())?)
}

fn print(
    shown: &impl Serialize,
    table: impl FnOnce() -> String,
    json: bool,
) -> Result<(), Failure> {
    if json {
        output::line(serde_json::to_string(shown)?)?;
    } else {
        output::text(table())?;
    }
    Ok(())
}
