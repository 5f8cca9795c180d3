//! `exopatch kernel info` of a recorded guest: which kernel it is, where it lies, and what each vCPU was doing.
//!
//! What cannot be read is said and left out: a guest that still boots, or is damaged, has much else to show.

use patcher::addr::Gva;
use patcher::guest::{Registers, Vcpu, VcpuState};
use patcher::kernel::agree::Agreed;
use patcher::kernel::boot::BootState;
use patcher::kernel::image::Source;
use patcher::kernel::modules;
use patcher::kernel::names::Names;
use patcher::kernel::tasks::Tasks;
use serde::Serialize;

use super::recording::{Files, Recording};
use crate::cli::build::{release, release_in_memory};
use crate::views::table::{Side, Table, line, or_dash};
use crate::views::{hex, text_of};

/// The kernel of a recorded guest.
#[derive(Debug, Serialize)]
pub(super) struct Info {
    dump: String,
    /// Its file; `None` when it was recovered from memory.
    kernel: Option<String>,
    /// What is known of the kernel comes from its `file` or from the guest's `memory`.
    source: &'static str,
    /// What file and memory agree on, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<Verified>,
    /// As uname -r says it.
    release: Option<String>,
    build_id: String,
    symbols: usize,
    types: usize,
    slide: String,
    page_table_levels: u8,
    page_tables: String,
    /// `running`, or the kernel's own name for another state.
    boot: Option<String>,
    /// What is held while the kernel changes its text.
    text_in_flux: Option<String>,
    /// Bytes of the guest's memory.
    memory_bytes: u64,
    /// Where updates were, if exopatch ran the guest.
    arena: Option<String>,
    modules: Option<usize>,
    tasks: Option<usize>,
    vcpus: Vec<Cpu>,
    /// What could not be read, and why.
    problems: Vec<String>,
}

/// What was compared, and is equal.
#[derive(Debug, Serialize)]
struct Verified {
    symbols: usize,
    type_bytes: usize,
    unwind_entries: usize,
}

#[derive(Debug, Serialize)]
struct Cpu {
    vcpu: usize,
    state: &'static str,
    /// `user` or `kernel`; `None` when it was never started, as for the rest.
    mode: Option<&'static str>,
    rip: Option<String>,
    /// Where in the kernel that is.
    at: Option<String>,
}

/// Reads what there is.
pub(super) fn read(files: &Files, recording: &Recording, verified: Option<Agreed>) -> Info {
    let Recording { dump, kernel } = recording;
    let image = kernel.image();
    let mut problems = Vec::new();
    let boot = note(kernel.boot_state(dump), &mut problems).map(|state| match state {
        BootState::Running => "running".to_owned(),
        BootState::NotFinished { state } | BootState::Ending { state } => state,
    });
    let in_flux = note(kernel.text_in_flux(dump), &mut problems).flatten();
    let modules = note(modules::read(kernel, dump), &mut problems);
    let tasks = note(Tasks::read(kernel, dump), &mut problems);
    // It fails only as they do.
    let names = Names::read(kernel, dump).ok();
    let path = |path: &Option<std::path::PathBuf>| {
        let path = path.as_ref();
        path.map(|path| path.display().to_string())
    };
    let verified = verified.map(|agreed| Verified {
        symbols: agreed.symbols,
        type_bytes: agreed.type_bytes,
        unwind_entries: agreed.unwind,
    });
    let bytes = dump
        .memory()
        .filter_map(|range| range.end.offset_from(range.start));
    let vcpus = dump.vcpus().iter().enumerate();
    Info {
        dump: path(&files.dump).unwrap_or_default(),
        kernel: path(&files.kernel),
        source: match image.source() {
            Source::File => "file",
            Source::Memory => "memory",
        },
        verified,
        release: release(image).or_else(|| release_in_memory(kernel, dump)),
        build_id: hex(image.build_id()),
        symbols: image.symbols().len(),
        types: image.types().len(),
        slide: format!("{:#x}", kernel.slide()),
        page_table_levels: kernel.tables().levels,
        page_tables: kernel.tables().root.to_string(),
        boot,
        text_in_flux: in_flux.map(str::to_owned),
        memory_bytes: bytes.fold(0, u64::saturating_add),
        arena: dump
            .arena()
            .map(|arena| format!("{}-{}", arena.start, arena.end)),
        modules: modules.map(|modules| modules.len()),
        tasks: tasks.map(|tasks| tasks.tasks.len()),
        vcpus: vcpus
            .map(|(index, vcpu)| cpu(index, vcpu, names.as_ref()))
            .collect(),
        problems,
    }
}

/// The value, or `None` after its error was noted.
fn note<T, E: std::fmt::Display>(result: Result<T, E>, problems: &mut Vec<String>) -> Option<T> {
    result
        .map_err(|error| {
            let error = error.to_string();
            if !problems.contains(&error) {
                problems.push(error);
            }
        })
        .ok()
}

fn cpu(index: usize, vcpu: &Vcpu, names: Option<&Names<'_>>) -> Cpu {
    let state = match vcpu.state {
        VcpuState::Running => "running",
        VcpuState::Halted => "halted",
        VcpuState::Offline => "offline",
    };
    let started = vcpu.state != VcpuState::Offline;
    let in_kernel = started && vcpu.cpl != 3;
    let found = names
        .filter(|_| in_kernel)
        .and_then(|names| names.at(Gva(vcpu.rip)));
    Cpu {
        vcpu: index,
        state,
        mode: started.then_some(if in_kernel { "kernel" } else { "user" }),
        rip: started.then(|| Gva(vcpu.rip).to_string()),
        at: found.map(|found| text_of(&found)),
    }
}

impl Info {
    /// The form for people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        line(&mut text, "dump", &self.dump);
        line(&mut text, "file", or_dash(self.kernel.as_ref()));
        line(&mut text, "known from", self.source);
        if let Some(verified) = &self.verified {
            let Verified {
                symbols,
                type_bytes,
                unwind_entries,
            } = verified;
            line(
                &mut text,
                "verified",
                format_args!(
                    "file and memory agree on {symbols} symbols, {type_bytes} bytes of types and {unwind_entries} entries of \
                     the unwind table"
                ),
            );
        }
        line(&mut text, "release", or_dash(self.release.as_ref()));
        line(&mut text, "build id", &self.build_id);
        line(&mut text, "symbols", self.symbols);
        line(&mut text, "types", self.types);
        line(&mut text, "slide", &self.slide);
        let (levels, tables) = (self.page_table_levels, &self.page_tables);
        line(
            &mut text,
            "page tables",
            format_args!("{levels} levels, at {tables}"),
        );
        line(&mut text, "boot", or_dash(self.boot.as_ref()));
        let flux = match &self.text_in_flux {
            Some(lock) => format!("being changed by the guest: {lock} is held"),
            None => "not being changed".to_owned(),
        };
        line(&mut text, "text", flux);
        line(
            &mut text,
            "memory",
            format_args!("{} MiB", self.memory_bytes >> 20),
        );
        line(&mut text, "arena", or_dash(self.arena.as_ref()));
        line(&mut text, "modules", or_dash(self.modules));
        line(&mut text, "tasks", or_dash(self.tasks));
        for problem in &self.problems {
            line(&mut text, "problem", problem);
        }
        let mut table = Table::new([
            ("VCPU", Side::Right),
            ("STATE", Side::Left),
            ("MODE", Side::Left),
            ("RIP", Side::Right),
            ("AT", Side::Left),
        ]);
        for cpu in &self.vcpus {
            table.row([
                cpu.vcpu.to_string(),
                cpu.state.to_owned(),
                or_dash(cpu.mode),
                or_dash(cpu.rip.as_ref()),
                or_dash(cpu.at.as_ref()),
            ]);
        }
        text.push('\n');
        text + &table.text()
    }
}
