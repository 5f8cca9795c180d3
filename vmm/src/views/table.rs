//! Tables for people: columns as wide as what they hold. Whatever came from a guest or a file is cleaned first.

use crate::output::clean;

/// Which end of a column its text stands at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// Lines of `N` columns under a heading.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    heading: [(&'static str, Side); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(heading: [(&'static str, Side); N]) -> Self {
        Self {
            heading,
            rows: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| clean(&cell)));
    }

    /// The whole table; nothing follows the last text of a line.
    pub(crate) fn text(&self) -> String {
        let heading = self.heading.map(|(name, _)| name.to_owned());
        let lines = || std::iter::once(&heading).chain(&self.rows);
        let widths: [usize; N] = std::array::from_fn(|column| {
            let cells = lines().map(|cells| cells[column].chars().count());
            cells.max().unwrap_or(0)
        });
        let mut text = String::new();
        for cells in lines() {
            for (column, cell) in cells.iter().enumerate() {
                let room = widths[column].saturating_sub(cell.chars().count());
                let gap = if column == 0 { 0 } else { 2 };
                let (before, after) = match self.heading[column].1 {
                    Side::Left => (gap, room),
                    Side::Right => (gap + room, 0),
                };
                text.extend(std::iter::repeat_n(' ', before));
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', after));
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}

/// Appends a line of a name and its value, as the client's tables have them.
pub(crate) fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    text.push_str(&format!("{name:<14}{}\n", clean(&value.to_string())));
}

/// What stands where there is nothing.
pub(crate) fn or_dash(value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::{Side, Table};

    #[test]
    fn columns_are_as_wide_as_what_they_hold() {
        let mut table = Table::new([
            ("PID", Side::Right),
            ("NAME", Side::Left),
            ("X", Side::Left),
        ]);
        table.row(["1".to_owned(), "ä\u{1b}[2J".to_owned(), "y".to_owned()]);
        table.row(["12345".to_owned(), "b".to_owned(), String::new()]);
        assert_eq!(
            table.text(),
            "  PID  NAME        X\n    1  ä\\u{1b}[2J  y\n12345  b\n"
        );
    }
}
