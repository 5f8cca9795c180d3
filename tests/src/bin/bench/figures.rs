//! What a benchmark reports: one list of figures, as a table or as JSON.

use serde_json::{Value, json};

/// What a figure should reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The value, in its unit, is at most this.
    AtMost(f64),
    /// The value divided by the peer's is at most this.
    RatioAtMost(f64),
}

#[derive(Debug)]
struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    peer: Option<(String, f64)>,
    target: Option<Target>,
}

/// The figures of one run.
#[derive(Debug, Default)]
pub(crate) struct Figures(Vec<Figure>);

impl Figures {
    /// Adds a figure, with a peer's value from the same run and a target where there is one.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        peer: Option<(&str, f64)>,
        target: Option<Target>,
    ) {
        let peer = peer.map(|(name, value)| (name.to_owned(), value));
        self.0.push(Figure {
            name: name.into(),
            value,
            unit,
            peer,
            target,
        });
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "figures": self.0.iter().map(Figure::json).collect::<Vec<_>>() })
    }

    pub(crate) fn table(&self) -> String {
        let head = [
            "figure",
            "value",
            "unit",
            "peer",
            "its value",
            "ratio",
            "target",
            "met",
        ]
        .map(str::to_owned);
        let mut rows = vec![head];
        rows.extend(self.0.iter().map(Figure::row));
        let width = |column: usize| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..rows[0].len()).map(width).collect();
        let line = |row: &[String; 8]| {
            let cells = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

impl Figure {
    fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().map(|(_, value)| self.value / value)
    }

    fn met(&self) -> Option<bool> {
        match self.target? {
            Target::AtMost(bound) => Some(self.value <= bound),
            Target::RatioAtMost(bound) => self.ratio().map(|ratio| ratio <= bound),
        }
    }

    fn target(&self) -> Option<String> {
        Some(match self.target? {
            Target::AtMost(bound) => format!("<= {bound} {}", self.unit),
            Target::RatioAtMost(bound) => format!("ratio <= {bound}"),
        })
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "peer": self.peer.as_ref().map(|(name, _)| name),
            "peer_value": self.peer.as_ref().map(|(_, value)| value),
            "ratio": self.ratio(),
            "target": self.target(),
            "met": self.met(),
        })
    }

    fn row(&self) -> [String; 8] {
        let number = |value: f64| {
            format!("{value:.3}")
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            self.name.clone(),
            number(self.value),
            self.unit.to_owned(),
            or_dash(self.peer.as_ref().map(|(name, _)| name.clone())),
            or_dash(self.peer.as_ref().map(|(_, value)| number(*value))),
            or_dash(self.ratio().map(|ratio| format!("{ratio:.2}"))),
            or_dash(self.target()),
            or_dash(
                self.met()
                    .map(|met| if met { "yes" } else { "NO" }.to_owned()),
            ),
        ]
    }
}

/// The middle of several values.
pub(crate) fn median(mut values: Vec<f64>) -> Result<f64, String> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => Err("nothing was measured".to_owned()),
        length if length % 2 == 1 => Ok(values[middle]),
        _ => Ok(f64::midpoint(values[middle - 1], values[middle])),
    }
}
