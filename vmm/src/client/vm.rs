//! `exopatch vm ...`: a running machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::http::Call;
use super::{Client, EXIT_CODES, Failure, events, parse_time, show, words};
use crate::api::wire::{Dump, DumpRequest, PowerButton, Transition, Vm};

/// What to do with the virtual machine.
#[derive(Clone, Debug, Subcommand)]
pub enum VmCommand {
    /// Show the state of the virtual machine
    #[command(after_help = EXIT_CODES)]
    Status,
    /// Stop all vCPUs and devices
    #[command(after_help = EXIT_CODES)]
    Pause {
        /// Give up after this time; the guest then runs on
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
    /// Let the vCPUs and devices go
    #[command(after_help = EXIT_CODES)]
    Resume,
    /// Press the power button; the guest decides what it does then
    #[command(after_help = EXIT_CODES)]
    PowerButton,
    /// End the guest at once, as pulling the plug would
    #[command(after_help = EXIT_CODES)]
    Kill,
    /// Print what happens, until the guest ends
    #[command(after_help = EXIT_CODES)]
    Events {
        /// Begin after the event with this number; 0 begins with the oldest that is kept
        #[arg(long, value_name = "N")]
        after: Option<u64>,
    },
    /// Write the guest's memory and registers to a new file
    #[command(after_help = EXIT_CODES)]
    Dump {
        /// The file, on the machine where exopatch runs; it must not exist
        file: PathBuf,
        /// Give up stopping the guest after this time
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
}

impl Client {
    /// Carries out a `vm` command.
    ///
    /// # Errors
    /// As [`Failure`] lists them.
    pub fn vm(&self, command: VmCommand) -> Result<(), Failure> {
        self.block_on(async {
            match command {
                VmCommand::Status => {
                    let vm: Vm = self.call(Call::get("/v1/vm")).await?;
                    self.print(&vm, show::vm)
                }
                VmCommand::Pause { deadline } => {
                    let call = Call::post("/v1/vm/pause").deadline(deadline);
                    let done: Transition = self.with_progress("pausing", self.call(call)).await?;
                    self.print(&done, show::transition)
                }
                VmCommand::Resume => {
                    let call = self.call(Call::post("/v1/vm/resume"));
                    let done: Transition = self.with_progress("resuming", call).await?;
                    self.print(&done, show::transition)
                }
                VmCommand::PowerButton => {
                    let call = Call::post("/v1/vm/power-button");
                    let pressed: PowerButton = self.call(call).await?;
                    self.print(&pressed, show::power_button)
                }
                VmCommand::Kill => {
                    let vm: Vm = self.call(Call::post("/v1/vm/kill")).await?;
                    self.print(&vm, |_| "the guest was killed\n".to_owned())
                }
                VmCommand::Events { after } => self.events(after).await,
                VmCommand::Dump { file, deadline } => self.dump(file, deadline).await,
            }
        })
    }

    async fn dump(&self, file: PathBuf, deadline: Duration) -> Result<(), Failure> {
        let absolute = std::path::absolute(&file).map_err(|cause| Failure::File {
            path: file.clone(),
            cause,
        })?;
        let Some(path) = absolute.to_str().map(str::to_owned) else {
            let cause = std::io::Error::other("its name is not UTF-8, as JSON needs it");
            return Err(Failure::File { path: file, cause });
        };
        let request = DumpRequest {
            path,
            deadline_ms: u64::try_from(deadline.as_millis()).ok(),
        };
        let mut call = Call::post("/v1/vm/dump").json(&request)?;
        // Writing takes as long as the guest's memory is large.
        call.patience = None;
        let dump: Dump = self.with_progress("dumping", self.call(call)).await?;
        self.print(&dump, show::dump)
    }

    async fn events(&self, after: Option<u64>) -> Result<(), Failure> {
        let after = after.map(|id| id.to_string());
        let call = Call::get("/v1/events").query(&[("after", after)]);
        let mut reader = events::Reader::new(self.open(call).await?);
        let mut told = words::Told::default();
        while let Some(event) = reader.next(self).await? {
            if !self.is_read(&event, |event| told.event(event) + "\n")? {
                break;
            }
        }
        Ok(())
    }
}
