//! `exopatch time ...`: times that rules go by (`during NAME`), begun and ended while the guest runs.

use clap::Subcommand;

use super::http::{Call, percent_encode};
use super::{Client, EXIT_CODES, Failure, show};
use crate::api::wire::{Time, TimeChange, TimeList};

/// What to do with times.
#[derive(Clone, Debug, Subcommand)]
pub enum TimeCommand {
    /// Begin a time, which is made if there is none of that name: `during NAME` is true from now on
    #[command(after_help = EXIT_CODES)]
    Begin {
        /// Name of the time
        name: String,
    },
    /// End a time, or make one that has not begun: `during NAME` is false from now on
    #[command(after_help = EXIT_CODES)]
    End {
        /// Name of the time
        name: String,
    },
    /// Do away with a time that no rule goes by
    #[command(after_help = EXIT_CODES)]
    Drop {
        /// Name of the time
        name: String,
    },
    /// List all times, and whether each is now
    #[command(after_help = EXIT_CODES)]
    List,
}

/// Where the time of this name is.
fn path(name: &str) -> String {
    format!("/v1/times/{}", percent_encode(name))
}

impl Client {
    /// Carries out a `time` command.
    ///
    /// # Errors
    /// As [`Failure`] lists them.
    pub fn time(&self, command: TimeCommand) -> Result<(), Failure> {
        self.block_on(async {
            match command {
                TimeCommand::Begin { name } => self.set_time(&name, true).await,
                TimeCommand::End { name } => self.set_time(&name, false).await,
                TimeCommand::Drop { name } => {
                    let list: TimeList = self.call(Call::delete(path(&name))).await?;
                    self.print(&list, |_| format!("time {name} is gone\n"))
                }
                TimeCommand::List => {
                    let list: TimeList = self.call(Call::get("/v1/times")).await?;
                    self.print(&list, show::times)
                }
            }
        })
    }

    async fn set_time(&self, name: &str, on: bool) -> Result<(), Failure> {
        let call = Call::post(path(name)).json(&TimeChange { on })?;
        let time: Time = self.call(call).await?;
        self.print(&time, |time| {
            let how = if time.on { "has begun" } else { "has ended" };
            format!("time {} {how}\n", time.name)
        })
    }
}
