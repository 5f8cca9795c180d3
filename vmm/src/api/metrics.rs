//! What is worth watching, in Prometheus' text format, version 0.0.4 (its documentation, "Exposition formats").
//!
//! Every family says what it is and of which type, before its samples; no two samples of a page have the same name and labels. What cannot be known
//! now is left out, and a comment says why.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use super::machine::Counted;
use super::wire::{EditionState, Update, UpdateState, Vm};

/// The type of a page.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A figure that may have several values, told apart by labels.
struct Family {
    name: &'static str,
    kind: Kind,
    /// What it is: one line, without a backslash.
    help: &'static str,
    samples: Vec<Sample>,
}

/// How values change.
enum Kind {
    /// They only rise.
    Counter,
    /// They rise and fall.
    Gauge,
    /// A sum and a count of observations.
    Summary,
}

/// One value.
struct Sample {
    /// What its name has behind the family's.
    suffix: &'static str,
    labels: Vec<(&'static str, String)>,
    value: Value,
}

/// A value, exact where the format allows it.
enum Value {
    Count(u64),
    /// Microseconds, printed as seconds.
    Us(u64),
}

impl Family {
    fn new(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self {
            name,
            kind,
            help,
            samples: Vec::new(),
        }
    }

    /// The same with a value that needs no labels.
    fn plain(self, suffix: &'static str, value: Value) -> Self {
        self.labelled([(Vec::new(), value)], suffix)
    }

    /// The same with a value for each value of a label.
    fn by<N: Display>(
        self,
        label: &'static str,
        values: impl IntoIterator<Item = (N, u64)>,
    ) -> Self {
        let values = values.into_iter();
        let labelled =
            values.map(|(name, count)| (vec![(label, name.to_string())], Value::Count(count)));
        self.labelled(labelled, "")
    }

    fn labelled(
        mut self,
        values: impl IntoIterator<Item = (Vec<(&'static str, String)>, Value)>,
        suffix: &'static str,
    ) -> Self {
        let values = values.into_iter();
        self.samples.extend(values.map(|(labels, value)| Sample {
            suffix,
            labels,
            value,
        }));
        self
    }
}

impl Display for Family {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Summary => "summary",
        };
        writeln!(f, "# HELP {} {}", self.name, self.help)?;
        writeln!(f, "# TYPE {} {kind}", self.name)?;
        for sample in &self.samples {
            write!(f, "{}{}", self.name, sample.suffix)?;
            for (nth, (label, value)) in sample.labels.iter().enumerate() {
                let before = if nth == 0 { '{' } else { ',' };
                write!(f, "{before}{label}=\"{}\"", escape(value))?;
            }
            let end = if sample.labels.is_empty() { " " } else { "} " };
            writeln!(f, "{end}{}", sample.value)?;
        }
        Ok(())
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Us(us) => write!(f, "{}.{:06}", us / 1_000_000, us % 1_000_000),
        }
    }
}

/// A label's value as it stands between quotation marks.
fn escape(text: &str) -> String {
    text.replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The page: the machine, its updates, and what was counted in the guest, or why that is not known.
pub(super) fn page(vm: &Vm, updates: &[Update], counted: Result<&Counted, &str>) -> String {
    let mut families = of_updates(updates);
    families.extend(of_machine(vm));
    let mut unknown = String::new();
    match counted {
        Ok(counted) => families.extend(of_guest(counted)),
        Err(why) => {
            let why = why.replace(['\n', '\r'], " ");
            unknown = format!("# calls and the arena are not known now: {why}\n");
        }
    }
    let mut page: String = families.iter().map(ToString::to_string).collect();
    page.push_str(&unknown);
    page
}

fn of_updates(updates: &[Update]) -> Vec<Family> {
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    let in_state = |state: UpdateState| {
        let those = updates.iter().filter(|update| update.state == state);
        (state.name(), count(those.count()))
    };
    let editions = |state: EditionState| {
        let editions = updates.iter().flat_map(|update| &update.editions);
        let those = editions.filter(|edition| edition.state == state);
        (state.name(), count(those.count()))
    };
    let bound = updates.iter().filter_map(|update| {
        let tasks = update.bound.as_ref()?;
        Some((update.id, count(tasks.len())))
    });
    vec![
        Family::new(
            "exopatch_updates",
            Kind::Gauge,
            "Updates that were handed in, by the state they are in.",
        )
        .by("state", UpdateState::ALL.map(in_state)),
        Family::new(
            "exopatch_editions",
            Kind::Gauge,
            "Editions in the guest's memory, by the state they are in.",
        )
        .by("state", EditionState::ALL.map(editions)),
        Family::new(
            "exopatch_bound_tasks",
            Kind::Gauge,
            "Tasks that have yet to leave the old side of an update's switch that is under way.",
        )
        .by("update", bound),
    ]
}

fn of_machine(vm: &Vm) -> Vec<Family> {
    let pauses = &vm.pauses;
    let mut families = vec![
        Family::new(
            "exopatch_pauses_total",
            Kind::Counter,
            "Pauses of the guest, by who asked for them.",
        )
        .by(
            "by",
            [("user", pauses.by_user), ("exopatch", pauses.by_exopatch)],
        ),
        Family::new(
            "exopatch_pause_seconds",
            Kind::Summary,
            "How long the guest stood still in the pauses that exopatch made.",
        )
        .plain("_sum", Value::Us(pauses.total_us))
        .plain("_count", Value::Count(pauses.by_exopatch)),
        Family::new("exopatch_vcpus", Kind::Gauge, "Virtual processors.")
            .plain("", Value::Count(u64::from(vm.vcpus))),
        Family::new(
            "exopatch_uptime_seconds",
            Kind::Gauge,
            "Host time since the guest was started.",
        )
        .plain("", Value::Us(vm.uptime_ms.saturating_mul(1000))),
    ];
    if let Some(last) = pauses.last.last() {
        let help = "How long the guest stood still in the last pause that exopatch made.";
        let family = Family::new("exopatch_last_pause_seconds", Kind::Gauge, help);
        families.push(family.plain("", Value::Us(last.pause_us)));
    }
    families
}

fn of_guest(counted: &Counted) -> Vec<Family> {
    // Functions may share a name; samples may not share their labels.
    let mut calls: BTreeMap<(&str, Option<u64>), u64> = BTreeMap::new();
    for counted in &counted.calls.calls {
        let sum = calls
            .entry((&counted.function, counted.update))
            .or_default();
        *sum = sum.saturating_add(counted.calls);
    }
    let calls = calls.into_iter().map(|((function, update), calls)| {
        let edition = update.map_or_else(|| "original".to_owned(), |id| id.to_string());
        let labels = vec![("function", function.to_owned()), ("edition", edition)];
        (labels, Value::Count(calls))
    });
    let arena = &counted.arena;
    vec![
        Family::new(
            "exopatch_calls_total",
            Kind::Counter,
            "Counted calls of a function, by the edition that they got to: the number of an update, or the original.",
        )
        .labelled(calls, ""),
        Family::new(
            "exopatch_arena_used_bytes",
            Kind::Gauge,
            "Memory for editions that is handed out.",
        )
        .plain("", Value::Count(arena.used_bytes)),
        Family::new(
            "exopatch_arena_bytes",
            Kind::Gauge,
            "Memory for editions in all.",
        )
        .plain("", Value::Count(arena.bytes)),
    ]
}

#[cfg(test)]
mod tests;
