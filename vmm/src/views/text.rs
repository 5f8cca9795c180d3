//! Every difference of the running text from the image, by cause. One without a known cause is shown whole.

use std::collections::BTreeMap;

use std::ops::Range;

use patcher::addr::Gva;
use patcher::kernel::changed::{self, Cause, Change};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::table::{Side, Table, or_dash};
use super::{Shown, Subject, ViewError, hex};

/// What to show of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Every difference, not only those that nothing explains.
    pub each: bool,
}

/// The differences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Text {
    /// Bytes of text that were compared.
    pub compared: u64,
    /// How many differences there are, by cause.
    pub causes: BTreeMap<String, TextCount>,
    /// All differences if each was asked for, otherwise the first of those that nothing explains; in the order of addresses.
    pub differences: Vec<TextDifference>,
}

/// How many differences there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TextCount {
    /// Places.
    pub places: u64,
    /// Bytes that differ.
    pub bytes: u64,
}

/// A place where the text differs from the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TextDifference {
    /// Where.
    pub address: String,
    /// Why: `alternative`, `paravirt`, `retpoline`, `return_thunk`, `call_thunk`, `smp_lock`, `ibt_endbr`, `runtime_const`,
    /// `jump_label`, `static_call`, `fentry`, `bpf`, `tracer`, `kprobe`, `ours` or `unexplained`.
    pub cause: String,
    /// The function that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// Bytes from the function's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// What the image has there, relocated, in hexadecimal.
    pub image: String,
    /// What must be there.
    pub expected: String,
    /// What is there.
    pub live: String,
}

pub(super) const UNEXPLAINED: &str = "unexplained";

/// Compares all text.
pub(super) fn read(subject: &Subject<'_>, asked: Asked) -> Result<Text, ViewError> {
    let mut each = Vec::new();
    let jumps = jumps(subject);
    let summary = changed::compare(subject.kernel, subject.guest, &jumps, |change| {
        if asked.each {
            each.push(difference(change));
        }
    })?;
    if !asked.each {
        each = summary.unexplained.iter().map(difference).collect();
    }
    let causes = summary.causes.iter().map(|(cause, count)| {
        let changed::Count { places, bytes } = *count;
        (cause_name(*cause).to_owned(), TextCount { places, bytes })
    });
    Ok(Text {
        compared: summary.compared,
        causes: causes.collect(),
        differences: each,
    })
}

/// The jumps of the updates that are known to be in effect.
pub(super) fn jumps(subject: &Subject<'_>) -> Vec<Range<Gva>> {
    let updates = subject.updates.iter();
    updates.flat_map(|update| update.jumps.clone()).collect()
}

pub(super) fn difference(change: &Change) -> TextDifference {
    let function = change.function.as_ref();
    TextDifference {
        address: change.range.start.to_string(),
        cause: cause_name(change.cause).to_owned(),
        function: function.map(|(name, _)| name.clone()),
        offset: function.map(|(_, offset)| *offset),
        image: hex(&change.image),
        expected: hex(&change.expected),
        live: hex(&change.live),
    }
}

pub(super) fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Alternative => "alternative",
        Cause::Paravirt => "paravirt",
        Cause::Retpoline => "retpoline",
        Cause::ReturnThunk => "return_thunk",
        Cause::CallThunk => "call_thunk",
        Cause::SmpLock => "smp_lock",
        Cause::IbtEndbr => "ibt_endbr",
        Cause::RuntimeConst => "runtime_const",
        Cause::JumpLabel => "jump_label",
        Cause::StaticCall => "static_call",
        Cause::Fentry => "fentry",
        Cause::Bpf => "bpf",
        Cause::Tracer => "tracer",
        Cause::Kprobe => "kprobe",
        Cause::Ours => "ours",
        Cause::Unexplained => UNEXPLAINED,
    }
}

impl Text {
    /// How many places nothing explains.
    pub(crate) fn unexplained(&self) -> u64 {
        self.causes.get(UNEXPLAINED).map_or(0, |count| count.places)
    }
}

impl Shown for Text {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("CAUSE", Side::Left),
            ("PLACES", Side::Right),
            ("BYTES", Side::Right),
        ]);
        for (cause, TextCount { places, bytes }) in &self.causes {
            table.row([cause.clone(), places.to_string(), bytes.to_string()]);
        }
        let mut text = format!(
            "{} bytes of text compared\n\n{}",
            self.compared,
            table.text()
        );
        if self.differences.is_empty() {
            return text;
        }
        let mut table = Table::new([
            ("ADDRESS", Side::Right),
            ("CAUSE", Side::Left),
            ("FUNCTION", Side::Left),
            ("IMAGE", Side::Left),
            ("EXPECTED", Side::Left),
            ("LIVE", Side::Left),
        ]);
        for found in &self.differences {
            let function = found.function.as_ref().zip(found.offset);
            table.row([
                found.address.clone(),
                found.cause.clone(),
                or_dash(function.map(|(name, offset)| format!("{name}+{offset:#x}"))),
                found.image.clone(),
                found.expected.clone(),
                found.live.clone(),
            ]);
        }
        text.push('\n');
        text + &table.text()
    }
}
