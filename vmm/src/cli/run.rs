//! `exopatch run`: boot a kernel and stay with it until it ends.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use super::{FAILED, Global, USAGE, fail};
use crate::api::live::Live;
use crate::api::server::{Listening, Server, ServerError};
use crate::config::{Config, ConfigError, Console, Limits, Options, Wanted};
use crate::doctor;
use crate::end::{EXIT_CODES, EndReason};
use crate::kvm::{Hypervisor, KvmError};
use crate::output;
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
}

pub(super) fn main(args: RunArgs, global: &Global) -> ExitCode {
    match prepare(args, global) {
        Ok((hypervisor, config)) => run(&hypervisor, config),
        Err(Refused::Config(error)) => fail(&error, USAGE),
        Err(Refused::Kvm(error)) => fail(&error, FAILED),
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
    if doctor::has_hardware_virtualization().is_none() {
        output::note(
            "this processor shows neither VMX nor SVM; if the guest does not get on, see `exopatch doctor`",
        );
    }
    Ok((hypervisor, config))
}

fn run(hypervisor: &Hypervisor, config: Config) -> ExitCode {
    // Before any thread is made: threads inherit which signals are taken.
    let signals = match EndingSignals::take() {
        Ok(signals) => signals,
        Err(error) => return fail(&error, FAILED),
    };
    let raw_mode = if config.console == Console::Stdio {
        match RawMode::enter() {
            Ok(raw_mode) => raw_mode,
            Err(error) => return fail(&error, FAILED),
        }
    } else {
        None
    };
    let started = start(hypervisor, config, signals);
    let (vm, server) = match started {
        Ok(started) => started,
        Err(error) => {
            drop(raw_mode);
            let code = match error {
                StartFailure::Api(_) => USAGE,
                StartFailure::Vm(_) | StartFailure::Session(_) => FAILED,
            };
            return fail(&error, code);
        }
    };
    if let Some(pty) = vm.status().pty {
        output::note(format_args!("the guest's console is {}", pty.display()));
    }
    let reason = vm.wait();
    drop(server);
    drop(raw_mode);
    if reason != EndReason::PowerOff {
        output::note(&reason);
    }
    ExitCode::from(reason.exit_code())
}

/// Why the machine did not start.
#[derive(Debug, thiserror::Error)]
enum StartFailure {
    #[error(transparent)]
    Api(#[from] ServerError),
    #[error(transparent)]
    Vm(#[from] StartError),
    #[error("cannot start the thread that carries out updates: {0}")]
    Session(#[source] std::io::Error),
}

/// Starts the machine, and its API if one is wanted: a socket that cannot be had is told before anything runs.
fn start(
    hypervisor: &Hypervisor,
    config: Config,
    signals: EndingSignals,
) -> Result<(Vm, Option<Server>), StartFailure> {
    let listening = config.api_sock.as_deref().map(Listening::open);
    let listening = listening.transpose()?;
    let vm = Vm::start(hypervisor, config, Some(signals))?;
    let Some(listening) = listening else {
        return Ok((vm, None));
    };
    let patched = vm.clone();
    let session = Session::start(Arc::clone(vm.events()), move || KernelPatcher::new(patched))
        .map_err(StartFailure::Session)?;
    let server = listening.serve(Arc::new(Live::new(vm.clone(), session)))?;
    Ok((vm, Some(server)))
}
