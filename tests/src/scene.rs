//! What a guest and its machine are doing, for a test that has failed: without it, a guest that stands still says nothing.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::client::Client;

/// The threads of the machine's process `pid`, whether its vCPUs run, and where each of the guest's `cpus` is, looked at twice.
#[must_use]
pub fn of(pid: u32, client: &Client, cpus: u32) -> String {
    let mut text = threads(pid);
    let vm = client.call(&["vm", "status"]);
    let _ = writeln!(text, "vm: {} {}", vm.status, vm.json);
    for look in 1..=2 {
        for cpu in 0..cpus {
            let _ = writeln!(text, "look {look}, cpu {cpu}: {}", stack(client, cpu));
        }
    }
    text.push_str(&threads(pid));
    text
}

fn stack(client: &Client, cpu: u32) -> String {
    let reply = client.call(&["kernel", "stack", &format!("cpu{cpu}")]);
    if reply.status == 0 {
        reply.json.to_string()
    } else {
        format!("status {}: {}", reply.status, reply.stderr.trim())
    }
}

/// A line for each thread: its name, what `/proc` says of its state and times, and the system call that it is in.
fn threads(pid: u32) -> String {
    let tasks = format!("/proc/{pid}/task");
    let Ok(entries) = fs::read_dir(&tasks) else {
        return format!("{tasks} is gone: the process has ended\n");
    };
    let mut lines: Vec<String> = entries
        .flatten()
        .map(|entry| thread(&entry.path()))
        .collect();
    lines.sort();
    lines.concat()
}

fn thread(task: &Path) -> String {
    let read = |name: &str| {
        let text = fs::read_to_string(task.join(name)).unwrap_or_default();
        text.trim().to_owned()
    };
    let stat = read("stat");
    // The name may hold blanks; what follows it does not.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let field = |index: usize| fields.get(index).copied().unwrap_or("?");
    format!(
        "thread {} {}: state {} (ended with {}), user {} system {} ticks, in {}, system call {}\n",
        task.file_name().unwrap_or_default().display(),
        read("comm"),
        field(0),
        field(49),
        field(11),
        field(12),
        read("wchan"),
        read("syscall"),
    )
}
