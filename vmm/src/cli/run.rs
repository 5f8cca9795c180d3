//! `exopatch run`: boot a kernel and stay with it until it ends.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::Global;
use crate::api::live::Live;
use crate::api::server::{Listening, Server, ServerError};
use crate::api::wire::ErrorBody;
use crate::config::{Config, ConfigError, Console, Limits, Options, Wanted};
use crate::doctor;
use crate::end::{EXIT_CODES, EndReason};
use crate::failure::{FAILED, Failure, USAGE, finish};
use crate::kvm::{Hypervisor, KvmError};
use crate::output::{self, clean};
use crate::patching::KernelPatcher;
use crate::signals::EndingSignals;
use crate::terminal::RawMode;
use crate::updates::Session;
use crate::vm::{StartError, Vm};

/// Options of `run`.
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES)]
pub struct RunArgs {
    #[command(flatten)]
    options: Options,
    /// Read options from a TOML file with the same names; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("signals cannot be taken: {0}")]
    Signals(#[source] io::Error),
    #[error("the terminal cannot be set up: {0}")]
    Terminal(#[source] io::Error),
    #[error(transparent)]
    Api(#[from] ServerError),
    #[error(transparent)]
    Vm(#[from] StartError),
    #[error("cannot start the thread that carries out updates: {0}")]
    Session(#[source] io::Error),
}

impl Refused {
    /// A fixed name for programs to test, and what the user can do.
    fn told(&self) -> (&'static str, &'static str) {
        match self {
            Self::Config(_) => (
                "config_unusable",
                "correct what is named; exopatch run --help lists the options",
            ),
            Self::Kvm(KvmError::NoDevice) => ("no_kvm", "see exopatch doctor"),
            Self::Kvm(KvmError::Permission(_)) => ("kvm_not_permitted", "see exopatch doctor"),
            Self::Kvm(_) => ("kvm_unusable", "see exopatch doctor"),
            Self::Signals(_) | Self::Session(_) => (
                "host_failed",
                "see the limits of this process and the host's log",
            ),
            Self::Terminal(_) => ("no_terminal", "say --console file:PATH, pty or off"),
            Self::Api(_) => (
                "socket_unusable",
                "give --api-sock a path that is free, in a directory that you may write to",
            ),
            Self::Vm(_) => (
                "not_started",
                "see exopatch doctor, and what memory the host has free",
            ),
        }
    }
}

impl Failure for Refused {
    fn body(&self) -> ErrorBody {
        let (code, hint) = self.told();
        ErrorBody {
            code: code.to_owned(),
            message: "no guest was started".to_owned(),
            cause: self.to_string(),
            hint: hint.to_owned(),
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Api(_) => USAGE,
            _ => FAILED,
        }
    }
}

/// What is told while and after a guest runs; with `--json` each is a line of its own on standard error, as standard output is the guest's.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    /// The terminal that was made for the console.
    Pty(PathBuf),
    /// The guest is over.
    End {
        reason: &'static str,
        message: String,
        exit_code: u8,
    },
}

impl Told {
    fn say(&self, json: bool) {
        match (self, serde_json::to_string(self)) {
            (_, Ok(line)) if json => output::raw_error(line),
            (Self::Pty(path), _) => {
                output::note(format_args!("the guest's console is {}", path.display()));
            }
            (Self::End { exit_code: 0, .. }, _) => {}
            (Self::End { message, .. }, _) => output::note(clean(message)),
        }
    }
}

pub(super) fn main(args: RunArgs, global: &Global) -> ExitCode {
    let ended = prepare(args, global)
        .and_then(|(hypervisor, config)| run(&hypervisor, config, global.json));
    match ended {
        Ok(reason) => ExitCode::from(reason.exit_code()),
        Err(refused) => finish(Err(refused), global.json),
    }
}

/// Checks everything before anything starts.
fn prepare(args: RunArgs, global: &Global) -> Result<(Hypervisor, Config), Refused> {
    let mut flags = args.options;
    flags.api_sock.clone_from(&global.api_sock);
    let wanted = Wanted::new(flags, args.config.as_deref())?;
    let hypervisor = match Hypervisor::open() {
        Ok(hypervisor) => hypervisor,
        Err(error) => {
            // What is wrong with the options is told even where nothing can run.
            wanted.validate(Limits::NONE)?;
            return Err(error.into());
        }
    };
    let config = wanted.validate(hypervisor.limits()?)?;
    if doctor::has_hardware_virtualization().is_none() && !global.json {
        output::note(
            "this processor shows neither VMX nor SVM; if the guest does not get on, see `exopatch doctor`",
        );
    }
    Ok((hypervisor, config))
}

/// Runs the guest to its end. What the terminal was before is restored before anything is told.
fn run(hypervisor: &Hypervisor, config: Config, json: bool) -> Result<EndReason, Refused> {
    // Before any thread is made: threads inherit which signals are taken.
    let signals = EndingSignals::take().map_err(Refused::Signals)?;
    let raw_mode = if config.console == Console::Stdio {
        RawMode::enter().map_err(Refused::Terminal)?
    } else {
        None
    };
    let (vm, server) = start(hypervisor, config, signals)?;
    if let Some(pty) = vm.status().pty {
        Told::Pty(pty).say(json);
    }
    let reason = vm.wait();
    drop(server);
    drop(raw_mode);
    let end = Told::End {
        reason: reason.code(),
        message: reason.to_string(),
        exit_code: reason.exit_code(),
    };
    end.say(json);
    Ok(reason)
}

/// Starts the machine, and its API if one is wanted: a socket that cannot be had is told before anything runs.
fn start(
    hypervisor: &Hypervisor,
    config: Config,
    signals: EndingSignals,
) -> Result<(Vm, Option<Server>), Refused> {
    let listening = config.api_sock.as_deref().map(Listening::open);
    let listening = listening.transpose()?;
    let vm = Vm::start(hypervisor, config, Some(signals))?;
    let Some(listening) = listening else {
        return Ok((vm, None));
    };
    let patched = vm.clone();
    let session = Session::start(Arc::clone(vm.events()), move || KernelPatcher::new(patched))
        .map_err(Refused::Session)?;
    let server = listening.serve(Arc::new(Live::new(vm.clone(), session)))?;
    Ok((vm, Some(server)))
}
