//! The results of a commit, added up: one line a part, and a page for the repository.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use tests::lab;
use tests::stock::{ALL, FLAVOURS};

use crate::Results;
use crate::parts::{PARTS, Part, wanted};
use crate::result::{Outcome, Sums, add};

/// What came of some units together.
#[derive(Default)]
struct Total {
    units: u32,
    seconds: u64,
    /// Tries beyond the first of each unit.
    again: u32,
    dates: BTreeSet<String>,
    figures: Sums,
}

impl Total {
    fn add(&mut self, outcome: &Outcome) {
        self.units += 1;
        self.seconds += outcome.seconds;
        self.again += outcome.tries - 1;
        self.dates.insert(outcome.date.clone());
        add(&mut self.figures, &outcome.figures);
    }

    fn figures(&self) -> String {
        let each = self.figures.iter();
        let each = each.map(|(name, number)| format!("{} {number}", name.replace('_', " ")));
        each.collect::<Vec<_>>().join(", ")
    }
}

fn total(parts: &[Part], results: &Results) -> Result<Total, String> {
    let mut total = Total::default();
    for part in parts {
        for unit in 0..part.units {
            if let Some(outcome) = results.outcome(part, unit)? {
                total.add(&outcome);
            }
        }
    }
    Ok(total)
}

/// What came of a part so far, on a line.
pub(crate) fn line(part: &Part, results: &Results) -> Result<String, String> {
    let total = total(std::slice::from_ref(part), results)?;
    Ok(format!(
        "{}: {} of {} units in {} min, {} tries more; {}",
        part.name,
        total.units,
        part.units,
        total.seconds / 60,
        total.again,
        total.figures()
    ))
}

/// Writes what came of all parts to `file`.
pub(crate) fn write(commit: &str, results: &Results, file: &Path) -> Result<(), String> {
    let all = total(&PARTS, results)?;
    let dates: Vec<&str> = all.dates.iter().map(String::as_str).collect();
    let (Some(first), Some(last)) = (dates.first(), dates.last()) else {
        return Err(format!("there are no results of commit {commit}"));
    };
    let processor = if lab::emulated() {
        "an emulated processor"
    } else {
        "a processor"
    };
    let mut page = format!(
        "# The last soak\n\n`scripts/soak --report` writes this page. Commit {commit}, {first} to {last}, {} min in all, on {processor}.\n\nKernels:\n",
        all.seconds / 60
    );
    for stock in ALL.into_iter().chain(FLAVOURS) {
        let package = fs::read_to_string(stock.file("package"))
            .map_err(|error| format!("{}: {error}", stock.0))?;
        page.push_str(&format!("- `{}`: {}\n", stock.0, package.trim()));
    }
    page.push_str("\n| wanted | met |\n|---|---|\n");
    for (what, met) in wanted(&all.figures) {
        page.push_str(&format!(
            "| {what} | {} |\n",
            if met { "yes" } else { "NO" }
        ));
    }
    page.push_str("\n| part | units | minutes | tries more | figures |\n|---|---|---|---|---|\n");
    for part in &PARTS {
        let total = total(std::slice::from_ref(part), results)?;
        page.push_str(&format!(
            "| {} | {} of {} | {} | {} | {} |\n",
            part.name,
            total.units,
            part.units,
            total.seconds / 60,
            total.again,
            total.figures()
        ));
    }
    fs::write(file, page).map_err(|error| format!("{}: {error}", file.display()))
}
