//! `exopatch kernel log`: what `dmesg` in the guest would say, read from outside.

use patcher::kernel::log::{self, Caller, Unwritten};
use serde::Serialize;

use super::Shown;
use super::failure::Failure;
use super::recording::Recording;
use crate::client::clean;

/// The whole log.
#[derive(Debug, Serialize)]
pub(super) struct Log {
    /// The oldest first.
    records: Vec<Record>,
    /// Records that were just being written.
    unwritten: Vec<Gap>,
    /// Severities below this go to the guest's console.
    console_level: Option<u8>,
}

#[derive(Debug, Serialize)]
struct Record {
    /// Its number since boot.
    seq: u64,
    /// Since boot, by the guest's clock.
    nanoseconds: u64,
    /// From 0 (emergency) to 7 (debugging).
    level: u8,
    /// 0 is the kernel, others as in syslog(3).
    facility: u8,
    /// The task that wrote it, or the CPU that did outside any.
    task: Option<u32>,
    cpu: Option<u32>,
    text: String,
    subsystem: Option<String>,
    device: Option<String>,
    /// The kernel had no room for its text.
    lost_text: bool,
    /// Its writer may go on with the line.
    open: bool,
}

#[derive(Debug, Serialize)]
struct Gap {
    /// Number of the descriptor that has no record.
    descriptor: u64,
    why: &'static str,
}

/// Reads the log.
pub(super) fn read(recording: &Recording) -> Result<Log, Failure> {
    let log = log::read(&recording.kernel, &recording.dump)?;
    let unwritten = log.unwritten.iter().map(|(descriptor, why)| Gap {
        descriptor: *descriptor,
        why: match why {
            Unwritten::BeingWritten => "being_written",
            Unwritten::BeingReserved => "being_reserved",
        },
    });
    Ok(Log {
        unwritten: unwritten.collect(),
        records: log.records.into_iter().map(record).collect(),
        console_level: log.console_level,
    })
}

fn record(of: log::Record) -> Record {
    let (task, cpu) = match of.caller {
        Caller::Task(task) => (Some(task), None),
        Caller::Cpu(cpu) => (None, Some(cpu)),
    };
    let some = |text: String| (!text.is_empty()).then_some(text);
    let (subsystem, device) = of.device;
    Record {
        seq: of.seq,
        nanoseconds: of.nanoseconds,
        level: of.level,
        facility: of.facility,
        task,
        cpu,
        text: of.text,
        subsystem: some(subsystem),
        device: some(device),
        lost_text: of.lost_text,
        open: of.open,
    }
}

impl Shown for Log {
    fn table(&self) -> String {
        let mut text = String::new();
        for record in &self.records {
            let microseconds = record.nanoseconds / 1000;
            let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
            let lost = if record.lost_text {
                "(its text is lost)"
            } else {
                ""
            };
            for line in record.text.split('\n') {
                text.push_str(&format!("[{seconds:5}.{rest:06}] {}{lost}\n", clean(line)));
            }
        }
        if !self.unwritten.is_empty() {
            let count = self.unwritten.len();
            text.push_str(&format!("({count} records were just being written)\n"));
        }
        text
    }
}
