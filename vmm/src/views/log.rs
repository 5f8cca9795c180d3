//! The kernel's log: what `dmesg` in the guest would say, read from outside.

use patcher::kernel::log::{self, Caller, Unwritten};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Shown, Subject, ViewError};
use crate::output::clean;

/// The whole log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Log {
    /// The oldest first.
    pub records: Vec<LogRecord>,
    /// Records that were just being written.
    pub unwritten: Vec<LogGap>,
    /// Severities below this go to the guest's console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_level: Option<u8>,
}

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogRecord {
    /// Its number since boot.
    pub seq: u64,
    /// Since boot, by the guest's clock.
    pub nanoseconds: u64,
    /// From 0 (emergency) to 7 (debugging).
    pub level: u8,
    /// 0 is the kernel, others as in syslog(3).
    pub facility: u8,
    /// The task that wrote it, unless it came from outside any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<u32>,
    /// The CPU that wrote it, if no task did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// What it says; may have several lines.
    pub text: String,
    /// What kind of device it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// The device that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The kernel had no room for its text.
    pub lost_text: bool,
    /// Its writer may go on with the line.
    pub open: bool,
}

/// A record that is not there yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogGap {
    /// Number of the descriptor that has no record.
    pub descriptor: u64,
    /// `being_written` or `being_reserved`.
    pub why: String,
}

/// Reads the log.
pub(super) fn read(subject: &Subject<'_>) -> Result<Log, ViewError> {
    let log = log::read(subject.kernel, subject.guest)?;
    let unwritten = log.unwritten.iter().map(|(descriptor, why)| LogGap {
        descriptor: *descriptor,
        why: match why {
            Unwritten::BeingWritten => "being_written",
            Unwritten::BeingReserved => "being_reserved",
        }
        .to_owned(),
    });
    Ok(Log {
        unwritten: unwritten.collect(),
        records: log.records.into_iter().map(record).collect(),
        console_level: log.console_level,
    })
}

fn record(of: log::Record) -> LogRecord {
    let (task, cpu) = match of.caller {
        Caller::Task(task) => (Some(task), None),
        Caller::Cpu(cpu) => (None, Some(cpu)),
    };
    let some = |text: String| (!text.is_empty()).then_some(text);
    let (subsystem, device) = of.device;
    LogRecord {
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
