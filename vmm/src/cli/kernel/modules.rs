//! `exopatch kernel modules`: what `/proc/modules` of the guest says, read from outside.

use patcher::kernel::modules::{self, Module, ModuleState, PartKind};
use serde::Serialize;

use super::Shown;
use super::failure::Failure;
use super::recording::Recording;
use super::table::{Side, Table, or_dash};

/// The modules, in the kernel's order: the last loaded first.
#[derive(Debug, Serialize)]
pub(super) struct Modules {
    modules: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// Bytes of all its memory.
    size: u64,
    references: i64,
    users: Vec<String>,
    permanent: bool,
    /// `live`, `loading`, `unloading` or `unformed`.
    state: &'static str,
    taints: String,
    /// Its `struct module`.
    address: String,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct Part {
    kind: &'static str,
    start: String,
    end: String,
}

/// Reads the modules that are loaded.
pub(super) fn read(recording: &Recording) -> Result<Modules, Failure> {
    let found = modules::read(&recording.kernel, &recording.dump)?;
    Ok(Modules {
        modules: found.into_iter().map(row).collect(),
    })
}

fn row(module: Module) -> Row {
    let parts = module.parts.iter().map(|(kind, range)| Part {
        kind: part_name(*kind),
        start: range.start.to_string(),
        end: range.end.to_string(),
    });
    Row {
        parts: parts.collect(),
        size: module.size,
        references: module.references,
        permanent: module.permanent,
        state: match module.state {
            ModuleState::Live => "live",
            ModuleState::Coming => "loading",
            ModuleState::Going => "unloading",
            ModuleState::Unformed => "unformed",
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
                module.state.to_owned(),
                or_dash(some(&module.taints)),
                or_dash(text.map(|part| &part.start)),
                or_dash(some(&users.join(","))),
            ]);
        }
        table.text()
    }
}
