//! What came of a unit, as a file of its own: a soak that is started again goes on behind those that are there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::figures::MOST;

/// Numbers by name.
pub(crate) type Sums = BTreeMap<String, u64>;

/// What came of one unit.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The day, as `2026-01-31`.
    pub(crate) date: String,
    pub(crate) seconds: u64,
    pub(crate) tries: u32,
    pub(crate) figures: Sums,
}

impl Outcome {
    pub(crate) fn write(&self, path: &Path) -> Result<(), String> {
        let json = json!({
            "date": self.date,
            "seconds": self.seconds,
            "tries": self.tries,
            "figures": self.figures,
        });
        // Whole or not at all: it says that the unit is done.
        let new = path.with_extension("new");
        let written = fs::write(&new, json.to_string()).and_then(|()| fs::rename(&new, path));
        written.map_err(|error| format!("{}: {error}", path.display()))
    }

    /// The result in `path`, if there is one.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, String> {
        if !path.exists() {
            return Ok(None);
        }
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = fs::read_to_string(path).map_err(|error| failed(&error))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| failed(&error))?;
        let outcome = (|| {
            Some(Self {
                date: json["date"].as_str()?.to_owned(),
                seconds: json["seconds"].as_u64()?,
                tries: u32::try_from(json["tries"].as_u64()?).ok()?,
                figures: numbers(&json["figures"])?,
            })
        })();
        outcome.map(Some).ok_or_else(|| failed(&"not a result"))
    }
}

/// The numbers of an object.
pub(crate) fn numbers(of: &Value) -> Option<Sums> {
    let each = of.as_object()?.iter();
    each.map(|(name, value)| Some((name.clone(), value.as_u64()?)))
        .collect()
}

/// Adds numbers to others of the same names.
pub(crate) fn add(sums: &mut Sums, numbers: &Sums) {
    for (name, number) in numbers {
        let sum = sums.entry(name.clone()).or_default();
        *sum = if name.ends_with(MOST) {
            (*sum).max(*number)
        } else {
            *sum + number
        };
    }
}
