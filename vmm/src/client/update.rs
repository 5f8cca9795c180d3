//! `exopatch update ...`: apply updates of the guest's kernel, use them for some calls or all, count calls, revert and verify.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};

use super::http::Call;
use super::{Client, EXIT_CODES, Failure, parse_time, show};
use crate::api::wire::{CallList, Model, Update, UpdateList, UpdateState, Verification};

/// How long an update that is being switched is left alone before it is asked about again.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

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
        /// Who may be where at the switch; by default `immediate` for an update of one function, `per-task` for one of several
        #[arg(long, value_enum)]
        model: Option<Model>,
        /// What to do when some tasks have not made the switch by the deadline: `keep` leaves them time, `revert` takes the update
        /// back, `force` ends the switch for them too, who may then run old code of one function beneath new code of another
        #[arg(long, value_enum, default_value = "keep")]
        on_deadline: OnDeadline,
        /// Which calls its editions are for, and whether they are counted
        #[command(flatten)]
        how: How,
    },
    /// Apply clones of the kernel's own functions: each becomes an edition of itself, to be counted, or used for the calls of a rule
    #[command(after_help = EXIT_CODES)]
    Clone {
        /// The functions
        #[arg(required = true, value_name = "FUNCTION")]
        functions: Vec<String>,
        /// Do everything but write to the guest
        #[arg(long)]
        check: bool,
        /// Take the place of these updates (numbers with commas between them), or of `all`: they go in the same moment
        #[arg(long, value_name = "IDS")]
        instead_of: Option<String>,
        /// Who may be where at the switch; by default `immediate` for one function, `per-task` for several
        #[arg(long, value_enum)]
        model: Option<Model>,
        /// Which calls the clones are for, and whether they are counted
        #[command(flatten)]
        how: How,
        /// Give up after this time; the guest is then as it was
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
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
    /// Use the editions of an applied update for other calls, or count them
    #[command(after_help = EXIT_CODES)]
    Use {
        /// Number of the update
        id: u64,
        /// Which calls they are for, and whether they are counted
        #[command(flatten)]
        how: How,
        /// Give up after this time; they are then used as before
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
    /// End an update's switch for those tasks too that have yet to leave its old side: they may then run old code of one
    /// function beneath new code of another
    #[command(after_help = EXIT_CODES)]
    Force {
        /// Number of the update
        id: u64,
        /// Give up after this time
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        deadline: Duration,
    },
    /// Show how often editions were called, where that is counted
    #[command(after_help = EXIT_CODES)]
    Calls,
    /// Undo an applied update
    #[command(after_help = EXIT_CODES)]
    Revert {
        /// Number of the update
        id: u64,
        /// Who may be where at the switch; as when the update came, if this is left out
        #[arg(long, value_enum)]
        model: Option<Model>,
        /// Give up after this time, that of hooks included; the update then stays applied
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

/// What to do about tasks that have not made a switch by the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnDeadline {
    /// The switch goes on.
    Keep,
    /// The update is taken back.
    Revert,
    /// The switch ends for them too.
    Force,
}

/// How editions are to be used.
#[derive(Args, Clone, Debug)]
pub struct How {
    /// Only for these calls, for instance 'uid = 1000', 'share 10%', 'cmd = 0x8905 and not kthread', or 'predicate NAME', a function of the package
    /// that EXOPATCH_PREDICATE declares; all others get to what is beneath
    #[arg(long, value_name = "RULE")]
    when: Option<String>,
    /// Count calls, those of the original too; see `exopatch update calls`
    #[arg(long)]
    count: bool,
}

impl How {
    fn query(self) -> [(&'static str, Option<String>); 2] {
        [
            ("rule", self.when),
            ("count", self.count.then(|| "true".to_owned())),
        ]
    }
}

/// A package to hand in.
#[derive(Args, Clone, Debug)]
pub struct Package {
    /// The package, made by `exopatch build`
    #[arg(value_name = "FILE.xpu")]
    file: PathBuf,
    /// Give up after this time, that of hooks included; the guest is then as it was, but for what hooks of the package did
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    deadline: Duration,
}

/// What is handed in.
struct Brings {
    name: String,
    body: Vec<u8>,
    deadline: Duration,
}

impl Package {
    fn read(self) -> Result<Brings, Failure> {
        let Self { file, deadline } = self;
        let body = std::fs::read(&file).map_err(|cause| Failure::File {
            path: file.clone(),
            cause,
        })?;
        Ok(Brings {
            name: name_of(&file),
            body,
            deadline,
        })
    }
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
                    model,
                    on_deadline,
                    how,
                } => {
                    let model = model.map(|model| model.name().to_owned());
                    let [rule, count] = how.query();
                    let options = [("instead_of", instead_of), ("model", model), rule, count];
                    let brings = package.read()?;
                    self.apply(brings, check, no_wait, options.into(), on_deadline)
                        .await
                }
                UpdateCommand::Clone {
                    functions,
                    check,
                    instead_of,
                    model,
                    how,
                    deadline,
                } => {
                    let model = model.map(|model| model.name().to_owned());
                    let [rule, count] = how.query();
                    let clone = ("clone", Some(functions.join(",")));
                    let options = [
                        ("instead_of", instead_of),
                        ("model", model),
                        rule,
                        count,
                        clone,
                    ];
                    let brings = Brings {
                        name: name_of(Path::new(&format!("clone of {}", functions.join(" ")))),
                        body: Vec::new(),
                        deadline,
                    };
                    let keep = OnDeadline::Keep;
                    self.apply(brings, check, false, options.into(), keep).await
                }
                UpdateCommand::Check { package } => {
                    let keep = OnDeadline::Keep;
                    self.apply(package.read()?, true, false, Vec::new(), keep)
                        .await
                }
                UpdateCommand::Use { id, how, deadline } => {
                    let call = Call::post(format!("/v1/updates/{id}/use"))
                        .deadline(deadline)
                        .query(&how.query());
                    self.switch("switching", call, deadline, false).await
                }
                UpdateCommand::Force { id, deadline } => {
                    let call = Call::post(format!("/v1/updates/{id}/force")).deadline(deadline);
                    let update: Update = self.with_progress("forcing", self.call(call)).await?;
                    self.print(&update, show::update)
                }
                UpdateCommand::Calls => {
                    let calls: CallList = self.call(Call::get("/v1/calls")).await?;
                    self.print(&calls, show::calls)
                }
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
                    model,
                    deadline,
                    no_wait,
                } => {
                    let call = Call::post(format!("/v1/updates/{id}/revert"))
                        .deadline(deadline)
                        .query(&[
                            ("model", model.map(|model| model.name().to_owned())),
                            ("wait", no_wait.then(|| "false".to_owned())),
                        ]);
                    self.switch("reverting", call, deadline, no_wait).await
                }
                UpdateCommand::Verify { id, deadline } => {
                    let call = Call::post(format!("/v1/updates/{id}/verify")).deadline(deadline);
                    let found: Verification =
                        self.with_progress("verifying", self.call(call)).await?;
                    self.verified(id, &found)
                }
            }
        })
    }

    /// Makes a call that switches functions, and shows the update once all tasks have switched, or at the deadline.
    async fn switch(
        &self,
        doing: &'static str,
        call: Call,
        deadline: Duration,
        no_wait: bool,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        let update: Update = self.with_progress(doing, self.call(call)).await?;
        let update = self.switched(update, began + deadline, no_wait).await?;
        self.print(&update, show::update)
    }

    /// Shows what a verification of update `id` found.
    fn verified(&self, id: u64, found: &Verification) -> Result<(), Failure> {
        self.print(found, show::verification)?;
        if found.intact {
            return Ok(());
        }
        let places = found.differences.len();
        Err(Failure::Differs(format!(
            "update {id} is not in the guest as it was written: {places} places differ"
        )))
    }

    async fn apply(
        &self,
        brings: Brings,
        check: bool,
        no_wait: bool,
        options: Vec<(&'static str, Option<String>)>,
        on_deadline: OnDeadline,
    ) -> Result<(), Failure> {
        let Brings {
            name,
            body,
            deadline,
        } = brings;
        let began = Instant::now();
        let call = Call::post("/v1/updates")
            .query(&options)
            .query(&[
                ("name", Some(name)),
                ("check", check.then(|| "true".to_owned())),
                ("wait", no_wait.then(|| "false".to_owned())),
            ])
            .deadline(deadline)
            .body("application/octet-stream", body);
        let what = if check { "checking" } else { "applying" };
        let update: Update = self.with_progress(what, self.call(call)).await?;
        let mut update = self.switched(update, began + deadline, no_wait).await?;
        if update.state == UpdateState::Switching && !no_wait {
            let call = match on_deadline {
                OnDeadline::Keep => None,
                OnDeadline::Revert => Some("revert"),
                OnDeadline::Force => Some("force"),
            };
            if let Some(call) = call {
                let call = Call::post(format!("/v1/updates/{}/{call}", update.id));
                update = self.call(call.deadline(deadline)).await?;
                update = self
                    .switched(update, Instant::now() + deadline, false)
                    .await?;
            }
        }
        self.print(&update, show::update)
    }

    /// The update once all tasks have made its switch, or as it is at the deadline: the switch then goes on.
    async fn switched(
        &self,
        update: Update,
        deadline: Instant,
        no_wait: bool,
    ) -> Result<Update, Failure> {
        let under_way = |update: &Update| {
            matches!(
                update.state,
                UpdateState::Switching | UpdateState::Reverting
            )
        };
        let (mut update, id) = (update.clone(), update.id);
        while under_way(&update) && !no_wait && Instant::now() < deadline {
            tokio::time::sleep(BETWEEN_LOOKS).await;
            let look = self.call(Call::get(format!("/v1/updates/{id}")));
            update = self.with_progress("waiting for tasks", look).await?;
        }
        Ok(update)
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
