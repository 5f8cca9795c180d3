//! `exopatch set ...`: sets of numbers that rules ask for (`pid in set NAME`), filled and emptied while the guest runs.

use clap::Subcommand;
use patcher::apply::tune::SET_ROOM;

use super::http::{Call, percent_encode};
use super::{Client, EXIT_CODES, Failure, show};
use crate::api::wire::{Set, SetChange, SetList};

/// What to do with sets.
#[derive(Clone, Debug, Subcommand)]
pub enum SetCommand {
    /// Put numbers into a set, which is made if there is none of that name
    #[command(after_help = EXIT_CODES)]
    Add {
        /// Name of the set
        name: String,
        /// The numbers: decimal, or 0x and hexadecimal; addresses are as `exopatch kernel` shows them. Of more than 32 bits none goes into
        /// a set while a rule asks it for an argument that has no more
        #[arg(value_name = "NUMBER")]
        keys: Vec<String>,
        /// So many numbers the set is to have room for, if this makes it; it cannot grow
        #[arg(long, value_name = "COUNT", default_value_t = SET_ROOM)]
        room: u64,
    },
    /// Take numbers out of a set
    #[command(after_help = EXIT_CODES)]
    Remove {
        /// Name of the set
        name: String,
        /// The numbers
        #[arg(value_name = "NUMBER", required = true)]
        keys: Vec<String>,
    },
    /// Do away with a set that no rule asks for
    #[command(after_help = EXIT_CODES)]
    Drop {
        /// Name of the set
        name: String,
    },
    /// List all sets with what is in them
    #[command(after_help = EXIT_CODES)]
    List,
}

/// Where the set of this name is.
fn path(name: &str) -> String {
    format!("/v1/sets/{}", percent_encode(name))
}

impl Client {
    /// Carries out a `set` command.
    ///
    /// # Errors
    /// As [`Failure`] lists them.
    pub fn set(&self, command: SetCommand) -> Result<(), Failure> {
        self.block_on(async {
            match command {
                SetCommand::Add { name, keys, room } => {
                    let change = SetChange {
                        add: keys,
                        room: Some(room),
                        ..SetChange::default()
                    };
                    self.change_set(&name, &change).await
                }
                SetCommand::Remove { name, keys } => {
                    let change = SetChange {
                        remove: keys,
                        ..SetChange::default()
                    };
                    self.change_set(&name, &change).await
                }
                SetCommand::Drop { name } => {
                    let call = Call::delete(path(&name));
                    let list: SetList = self.call(call).await?;
                    self.print(&list, |_| format!("set {name} is gone\n"))
                }
                SetCommand::List => {
                    let list: SetList = self.call(Call::get("/v1/sets")).await?;
                    self.print(&list, show::sets)
                }
            }
        })
    }

    async fn change_set(&self, name: &str, change: &SetChange) -> Result<(), Failure> {
        let call = Call::post(path(name)).json(change)?;
        let set: Set = self.call(call).await?;
        self.print(&set, |set| {
            format!("set {} holds {} numbers\n", set.name, set.len)
        })
    }
}
