//! `exopatch update ...`: apply, check, list, show, revert and verify updates of the guest's kernel.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};

use super::http::Call;
use super::{Client, EXIT_CODES, Failure, parse_time, show};
use crate::api::wire::{Update, UpdateList, Verification};

/// What to do with updates.
#[derive(Clone, Debug, Subcommand)]
pub enum UpdateCommand {
    /// Apply an update package to the running kernel
    #[command(after_help = EXIT_CODES)]
    Apply {
        /// The package, and the time it has
        #[command(flatten)]
        package: Package,
        /// Do everything but write to the guest
        #[arg(long)]
        check: bool,
        /// Return as soon as the package is handed in; see `exopatch update show`
        #[arg(long)]
        no_wait: bool,
        /// Take the place of these updates (numbers with commas between them), or of `all`: they go in the same moment
        #[arg(long, value_name = "IDS")]
        instead_of: Option<String>,
    },
    /// Do everything that apply does, but write nothing to the guest
    #[command(after_help = EXIT_CODES)]
    Check {
        /// The package, and the time it has
        #[command(flatten)]
        package: Package,
    },
    /// List all updates of this virtual machine
    #[command(after_help = EXIT_CODES)]
    List,
    /// Show one update
    #[command(after_help = EXIT_CODES)]
    Show {
        /// Number of the update
        id: u64,
    },
    /// Undo an applied update
    #[command(after_help = EXIT_CODES)]
    Revert {
        /// Number of the update
        id: u64,
        /// Give up after this time; the update then stays applied
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
        /// Return at once; see `exopatch update show`
        #[arg(long)]
        no_wait: bool,
    },
    /// Compare the guest's memory with what an update wrote
    #[command(after_help = EXIT_CODES)]
    Verify {
        /// Number of the update
        id: u64,
        /// Give up stopping the guest after this time
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
}

/// A package to hand in.
#[derive(Args, Clone, Debug)]
pub struct Package {
    /// The package, made by `exopatch build`
    #[arg(value_name = "FILE.xpu")]
    file: PathBuf,
    /// Give up after this time; the guest is then as it was
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    deadline: Duration,
}

impl Client {
    /// Carries out an `update` command.
    ///
    /// # Errors
    /// As [`Failure`] lists them; a refused update is [`Failure::Refused`].
    pub fn update(&self, command: UpdateCommand) -> Result<(), Failure> {
        self.block_on(async {
            match command {
                UpdateCommand::Apply {
                    package,
                    check,
                    no_wait,
                    instead_of,
                } => self.apply(package, check, no_wait, instead_of).await,
                UpdateCommand::Check { package } => self.apply(package, true, false, None).await,
                UpdateCommand::List => {
                    let list: UpdateList = self.call(Call::get("/v1/updates")).await?;
                    self.print(&list, show::updates)
                }
                UpdateCommand::Show { id } => {
                    let update: Update = self.call(Call::get(format!("/v1/updates/{id}"))).await?;
                    self.print(&update, show::update)
                }
                UpdateCommand::Revert {
                    id,
                    deadline,
                    no_wait,
                } => {
                    let call = Call::post(format!("/v1/updates/{id}/revert"))
                        .deadline(deadline)
                        .query(&[("wait", no_wait.then(|| "false".to_owned()))]);
                    let update: Update = self.with_progress("reverting", self.call(call)).await?;
                    self.print(&update, show::update)
                }
                UpdateCommand::Verify { id, deadline } => {
                    let call = Call::post(format!("/v1/updates/{id}/verify")).deadline(deadline);
                    let found: Verification =
                        self.with_progress("verifying", self.call(call)).await?;
                    self.print(&found, show::verification)?;
                    if found.intact {
                        return Ok(());
                    }
                    let places = found.differences.len();
                    Err(Failure::Differs(format!(
                        "update {id} is not in the guest as it was written: {places} places differ"
                    )))
                }
            }
        })
    }

    async fn apply(
        &self,
        package: Package,
        check: bool,
        no_wait: bool,
        instead_of: Option<String>,
    ) -> Result<(), Failure> {
        let Package { file, deadline } = package;
        let body = std::fs::read(&file).map_err(|cause| Failure::File {
            path: file.clone(),
            cause,
        })?;
        let call = Call::post("/v1/updates")
            .query(&[
                ("name", Some(name_of(&file))),
                ("check", check.then(|| "true".to_owned())),
                ("instead_of", instead_of),
                ("wait", no_wait.then(|| "false".to_owned())),
            ])
            .deadline(deadline)
            .body("application/octet-stream", body);
        let what = if check { "checking" } else { "applying" };
        let update: Update = self.with_progress(what, self.call(call)).await?;
        self.print(&update, show::update)
    }
}

/// The file's name, as the server takes it: without control characters, 128 bytes at most.
fn name_of(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let mut kept = String::new();
    for c in name.chars().filter(|c| !c.is_control()) {
        if kept.len() + c.len_utf8() > 128 {
            break;
        }
        kept.push(c);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::name_of;
    use std::path::Path;

    #[test]
    fn any_file_name_makes_a_name() {
        assert_eq!(name_of(Path::new("/a/fix.xpu")), "fix.xpu");
        assert_eq!(name_of(Path::new("a\nb\u{1b}.xpu")), "ab.xpu");
        assert_eq!(name_of(Path::new("..")), "");
        assert_eq!(name_of(Path::new(&"é".repeat(100))).len(), 128);
    }
}
