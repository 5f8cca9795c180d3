//! Every task of the guest with whose it is, its state and its stack, the CPUs, and stacks that belong to no task.

use std::ops::Range;

use patcher::addr::Gva;
use patcher::kernel::tasks::{Tasks as All, process};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::table::{Side, Table, or_dash};
use super::{Shown, Subject, ViewError};

/// All of them, in the kernel's order: each process with its threads, then idle tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tasks {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// The CPUs that are possible.
    pub cpus: Vec<Cpu>,
    /// Stacks of tasks on their way out, or of none yet.
    pub unowned_stacks: Vec<Area>,
}

/// One task: a thread of a process or of the kernel, or an idle task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// The thread's id; 0 for idle tasks.
    pub pid: u32,
    /// Its process's id: that of the process's first thread. This and the next four are left out where the kernel does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tgid: Option<u32>,
    /// The id of the parent process; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppid: Option<u32>,
    /// Its state by the letter that `ps` shows: `R`, `S`, `D`, `T`, `t`, `X`, `Z`, `P` or `I`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<char>,
    /// The real user's id, as the guest's first user namespace has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// It is a thread of the kernel's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kthread: Option<bool>,
    /// Its name.
    pub name: String,
    /// The CPU that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<usize>,
    /// Its `task_struct`.
    pub address: String,
    /// Its kernel stack; left out when it has none any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<Area>,
    /// Its stack pointer when it last stopped running; left out while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_sp: Option<String>,
}

/// One CPU, as the kernel counts them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cpu {
    /// Its number.
    pub cpu: usize,
    /// The kernel uses it.
    pub online: bool,
    /// The `task_struct` of what it runs.
    pub current: String,
    /// The `task_struct` of what it runs when there is nothing to do.
    pub idle: String,
}

/// A piece of the address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Area {
    /// Its first byte.
    pub start: String,
    /// The byte behind it.
    pub end: String,
}

fn area(range: &Range<Gva>) -> Area {
    Area {
        start: range.start.to_string(),
        end: range.end.to_string(),
    }
}

/// Reads all tasks.
pub(super) fn read(subject: &Subject<'_>) -> Result<Tasks, ViewError> {
    let all = All::read(subject.kernel, subject.guest)?;
    let processes = process::read(subject.kernel, subject.guest, &all)?;
    let tasks = all.tasks.iter().zip(processes).map(|(task, process)| Task {
        pid: task.pid,
        tgid: process.tgid,
        ppid: process.ppid,
        state: process.state.map(process::State::letter),
        uid: process.uid,
        kthread: process.kthread,
        name: task.name(),
        cpu: task.cpu,
        address: task.at.to_string(),
        stack: (!task.stack.is_empty()).then(|| area(&task.stack)),
        saved_sp: task.cpu.is_none().then(|| task.saved_sp.to_string()),
    });
    let cpus = all.cpus.iter().map(|cpu| Cpu {
        cpu: cpu.index,
        online: cpu.online,
        current: cpu.current.to_string(),
        idle: cpu.idle.to_string(),
    });
    Ok(Tasks {
        tasks: tasks.collect(),
        cpus: cpus.collect(),
        unowned_stacks: all.unowned.iter().map(area).collect(),
    })
}

impl Shown for Tasks {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("PID", Side::Right),
            ("TGID", Side::Right),
            ("PPID", Side::Right),
            ("UID", Side::Right),
            ("STATE", Side::Left),
            ("CPU", Side::Right),
            ("TASK", Side::Right),
            ("STACK", Side::Right),
            ("SAVED SP", Side::Right),
            ("NAME", Side::Left),
        ]);
        for task in &self.tasks {
            // Threads of the kernel stand in brackets, as `ps` has them.
            let name = match task.kthread {
                Some(true) => format!("[{}]", task.name),
                _ => task.name.clone(),
            };
            table.row([
                task.pid.to_string(),
                or_dash(task.tgid),
                or_dash(task.ppid),
                or_dash(task.uid),
                or_dash(task.state),
                or_dash(task.cpu),
                task.address.clone(),
                or_dash(task.stack.as_ref().map(|stack| &stack.start)),
                or_dash(task.saved_sp.as_ref()),
                name,
            ]);
        }
        let mut text = table.text();
        if !self.unowned_stacks.is_empty() {
            text.push_str("\nstacks that belong to no task:\n");
            for stack in &self.unowned_stacks {
                text.push_str(&format!("{}-{}\n", stack.start, stack.end));
            }
        }
        text
    }
}
