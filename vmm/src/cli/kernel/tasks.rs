//! `exopatch kernel tasks`: every task of the guest with its stack, the CPUs, and stacks that belong to no task.

use std::ops::Range;

use patcher::addr::Gva;
use patcher::kernel::tasks::Tasks as All;
use serde::Serialize;

use super::Shown;
use super::failure::Failure;
use super::recording::Recording;
use super::table::{Side, Table, or_dash};

/// All of them, in the kernel's order: each process with its threads, then idle tasks.
#[derive(Debug, Serialize)]
pub(super) struct Tasks {
    tasks: Vec<Task>,
    cpus: Vec<Cpu>,
    /// Stacks of tasks on their way out, or of none yet.
    unowned_stacks: Vec<Area>,
}

#[derive(Debug, Serialize)]
struct Task {
    /// The thread's id; 0 for idle tasks.
    pid: u32,
    name: String,
    /// The CPU that runs it.
    cpu: Option<usize>,
    /// Its `task_struct`.
    address: String,
    /// `None` when it has none any more.
    stack: Option<Area>,
    /// Its stack pointer when it last stopped running; `None` while it runs.
    saved_sp: Option<String>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    cpu: usize,
    online: bool,
    /// The `task_struct` of what it runs.
    current: String,
    idle: String,
}

#[derive(Debug, Serialize)]
struct Area {
    start: String,
    end: String,
}

fn area(range: &Range<Gva>) -> Area {
    Area {
        start: range.start.to_string(),
        end: range.end.to_string(),
    }
}

/// Reads all tasks.
pub(super) fn read(recording: &Recording) -> Result<Tasks, Failure> {
    let all = All::read(&recording.kernel, &recording.dump)?;
    let tasks = all.tasks.iter().map(|task| Task {
        pid: task.pid,
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
            ("CPU", Side::Right),
            ("TASK", Side::Right),
            ("STACK", Side::Right),
            ("SAVED SP", Side::Right),
            ("NAME", Side::Left),
        ]);
        for task in &self.tasks {
            table.row([
                task.pid.to_string(),
                or_dash(task.cpu),
                task.address.clone(),
                or_dash(task.stack.as_ref().map(|stack| &stack.start)),
                or_dash(task.saved_sp.as_ref()),
                task.name.clone(),
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
