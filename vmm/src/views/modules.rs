//! The modules that are loaded: what `/proc/modules` of the guest says, read from outside.

use patcher::kernel::modules::{self, PartKind};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::table::{Side, Table, or_dash};
use super::{Shown, Subject, ViewError};

/// The modules, in the kernel's order: the last loaded first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Modules {
    /// The modules.
    pub modules: Vec<Module>,
}

/// One module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Bytes of all its memory.
    pub size: u64,
    /// How often it is in use.
    pub references: i64,
    /// The modules that use it.
    pub users: Vec<String>,
    /// It cannot be unloaded.
    pub permanent: bool,
    /// What is being done with it.
    pub state: ModuleState,
    /// Letters that say what is special about it, as the kernel writes them.
    pub taints: String,
    /// Its `struct module`.
    pub address: String,
    /// Its memory.
    pub parts: Vec<ModulePart>,
}

/// What is being done with a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleState {
    /// It is in use.
    Live,
    /// It is complete and is being started.
    Loading,
    /// It is being unloaded.
    Unloading,
    /// It is still being put together: nothing but its name means anything.
    Unformed,
}

/// A part of a module's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModulePart {
    /// What it is for: `text`, `data`, `rodata`, `ro_after_init`, `init_text`, `init_data` or `init_rodata`.
    pub kind: String,
    /// Its first byte.
    pub start: String,
    /// The byte behind it.
    pub end: String,
}

/// Reads the modules that are loaded.
pub(super) fn read(subject: &Subject<'_>) -> Result<Modules, ViewError> {
    let found = modules::read(subject.kernel, subject.guest)?;
    Ok(Modules {
        modules: found.into_iter().map(row).collect(),
    })
}

fn row(module: modules::Module) -> Module {
    let parts = module.parts.iter().map(|(kind, range)| ModulePart {
        kind: part_name(*kind).to_owned(),
        start: range.start.to_string(),
        end: range.end.to_string(),
    });
    Module {
        parts: parts.collect(),
        size: module.size,
        references: module.references,
        permanent: module.permanent,
        state: match module.state {
            modules::ModuleState::Live => ModuleState::Live,
            modules::ModuleState::Coming => ModuleState::Loading,
            modules::ModuleState::Going => ModuleState::Unloading,
            modules::ModuleState::Unformed => ModuleState::Unformed,
        },
        address: module.at.to_string(),
        name: module.name,
        users: module.users,
        taints: module.taints,
    }
}

fn part_name(kind: PartKind) -> &'static str {
    match kind {
        PartKind::Text => "text",
        PartKind::Data => "data",
        PartKind::RoData => "rodata",
        PartKind::RoAfterInit => "ro_after_init",
        PartKind::InitText => "init_text",
        PartKind::InitData => "init_data",
        PartKind::InitRoData => "init_rodata",
    }
}

fn state_name(state: ModuleState) -> &'static str {
    match state {
        ModuleState::Live => "live",
        ModuleState::Loading => "loading",
        ModuleState::Unloading => "unloading",
        ModuleState::Unformed => "unformed",
    }
}

impl Shown for Modules {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("NAME", Side::Left),
            ("SIZE", Side::Right),
            ("REFS", Side::Right),
            ("STATE", Side::Left),
            ("TAINTS", Side::Left),
            ("TEXT", Side::Right),
            ("USED BY", Side::Left),
        ]);
        for module in &self.modules {
            let mut users = module.users.clone();
            if module.permanent {
                users.push("[permanent]".to_owned());
            }
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let text = module.parts.iter().find(|part| part.kind == "text");
            table.row([
                module.name.clone(),
                module.size.to_string(),
                module.references.to_string(),
                state_name(module.state).to_owned(),
                or_dash(some(&module.taints)),
                or_dash(text.map(|part| &part.start)),
                or_dash(some(&users.join(","))),
            ]);
        }
        table.text()
    }
}
