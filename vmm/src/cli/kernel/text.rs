//! `exopatch kernel text --changed`: every difference of the running text from the image, by cause.
//!
//! A difference without a known cause is shown whole, and makes the command fail.

use std::collections::BTreeMap;

use clap::Args;
use patcher::kernel::changed::{self, Cause, Change};
use serde::Serialize;

use super::Shown;
use super::failure::{Failure, hex};
use super::recording::Recording;
use super::table::{Side, Table, or_dash};

/// What to show of the text.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct TextArgs {
    /// Compare all of it with what must be there
    #[arg(long, required = true)]
    pub(super) changed: bool,
    /// Show every difference, not only those that nothing explains
    #[arg(long, requires = "changed")]
    each: bool,
}

/// The differences.
#[derive(Debug, Serialize)]
pub(super) struct Changed {
    /// Bytes of text that were compared.
    compared: u64,
    causes: BTreeMap<&'static str, Count>,
    /// All differences with `--each`, otherwise the first of those that nothing explains; in the order of addresses.
    differences: Vec<Difference>,
}

#[derive(Debug, Serialize)]
struct Count {
    places: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Difference {
    address: String,
    cause: &'static str,
    /// The function that it is in, and how far in.
    function: Option<String>,
    offset: Option<u64>,
    /// Bytes in hexadecimal: the image's, relocated; what must be there; what is there.
    image: String,
    expected: String,
    live: String,
}

const UNEXPLAINED: &str = "unexplained";

/// Compares all text.
pub(super) fn read(recording: &Recording, args: &TextArgs) -> Result<Changed, Failure> {
    let mut each = Vec::new();
    let summary = changed::compare(&recording.kernel, &recording.dump, &[], |change| {
        if args.each {
            each.push(difference(change));
        }
    })?;
    if !args.each {
        each = summary.unexplained.iter().map(difference).collect();
    }
    let causes = summary.causes.iter().map(|(cause, count)| {
        let changed::Count { places, bytes } = *count;
        (cause_name(*cause), Count { places, bytes })
    });
    Ok(Changed {
        compared: summary.compared,
        causes: causes.collect(),
        differences: each,
    })
}

fn difference(change: &Change) -> Difference {
    let function = change.function.as_ref();
    Difference {
        address: change.range.start.to_string(),
        cause: cause_name(change.cause),
        function: function.map(|(name, _)| name.clone()),
        offset: function.map(|(_, offset)| *offset),
        image: hex(&change.image),
        expected: hex(&change.expected),
        live: hex(&change.live),
    }
}

fn cause_name(cause: Cause) -> &'static str {
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
        Cause::Tracer => "tracer",
        Cause::Kprobe => "kprobe",
        Cause::Ours => "ours",
        Cause::Unexplained => UNEXPLAINED,
    }
}

impl Shown for Changed {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("CAUSE", Side::Left),
            ("PLACES", Side::Right),
            ("BYTES", Side::Right),
        ]);
        for (cause, Count { places, bytes }) in &self.causes {
            table.row([(*cause).to_owned(), places.to_string(), bytes.to_string()]);
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
                found.cause.to_owned(),
                or_dash(function.map(|(name, offset)| format!("{name}+{offset:#x}"))),
                found.image.clone(),
                found.expected.clone(),
                found.live.clone(),
            ]);
        }
        text.push('\n');
        text + &table.text()
    }

    fn verdict(&self) -> Result<(), Failure> {
        match self.causes.get(UNEXPLAINED) {
            Some(Count { places, .. }) if *places > 0 => {
                Err(Failure::Unexplained { places: *places })
            }
            _ => Ok(()),
        }
    }
}
