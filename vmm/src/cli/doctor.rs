//! `exopatch doctor`: can this machine run guests, and if not, what to do.

use std::process::ExitCode;

use clap::Args;

use super::{Global, fail};
use crate::doctor::{self, Outcome, Report};
use crate::failure::FAILED;
use crate::output;

/// Options of `doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {}

pub(super) fn main(_: &DoctorArgs, global: &Global) -> ExitCode {
    let report = doctor::examine();
    let told = if global.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => output::line(text),
            Err(error) => return fail(&error, FAILED),
        }
    } else {
        output::text(table(&report))
    };
    if let Err(error) = told {
        return fail(&error, FAILED);
    }
    if report.can_run {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    }
}

fn table(report: &Report) -> String {
    let width = report
        .checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.outcome {
            Outcome::Good => "good",
            Outcome::Bad => "BAD ",
            Outcome::Unknown => "  ? ",
        };
        text.push_str(&format!("{mark}  {:width$}  {}\n", check.name, check.found));
    }
    text.push('\n');
    text.push_str(report.verdict);
    text.push('\n');
    for check in &report.checks {
        if let Some(advice) = &check.advice {
            text.push_str(&format!("  - {advice}\n"));
        }
    }
    text
}
