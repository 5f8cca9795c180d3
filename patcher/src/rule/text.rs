//! The words, names, numbers and marks of a rule's text, one after the other.

use super::parse::RuleError;

/// A text, and how far it has been read.
pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    /// Bytes that were read.
    pub(super) at: usize,
    /// Tests and listed values so far.
    pub(super) tests: usize,
}

impl<'a> Parser<'a> {
    pub(super) fn digits(&mut self) -> &'a str {
        self.taken(|c| c.is_ascii_digit())
    }

    pub(super) fn named(&mut self, expected: &'static str) -> Result<String, RuleError> {
        self.name(expected).map(ToOwned::to_owned)
    }

    pub(super) fn name(&mut self, expected: &'static str) -> Result<&'a str, RuleError> {
        self.space();
        if self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            return Err(self.unexpected(expected));
        }
        match self.taken(|c| c.is_ascii_alphanumeric() || c == '_') {
            "" => Err(self.unexpected(expected)),
            name => Ok(name),
        }
    }

    /// Takes `word` if it comes next, and is a word of its own and no argument's name.
    pub(super) fn keyword(&mut self, word: &str) -> bool {
        let start = self.at;
        self.space();
        let found = self.taken(|c| c.is_ascii_alphanumeric() || c == '_') == word;
        let argument = self.ahead(&["->", "["]) || self.ahead(&["."]) && !self.ahead(&[".."]);
        if !found || argument {
            self.at = start;
        }
        found && !argument
    }

    pub(super) fn need(&mut self, mark: &str, expected: &'static str) -> Result<(), RuleError> {
        match self.mark(mark) {
            true => Ok(()),
            false => Err(self.unexpected(expected)),
        }
    }

    /// Takes `mark` if it comes next.
    pub(super) fn mark(&mut self, mark: &str) -> bool {
        let found = self.ahead(&[mark]);
        if found {
            self.space();
            self.at += mark.len();
        }
        found
    }

    /// Whether one of `marks` comes next.
    pub(super) fn ahead(&self, marks: &[&str]) -> bool {
        let rest = self.rest().trim_ascii_start();
        marks.iter().any(|mark| rest.starts_with(mark))
    }

    pub(super) fn space(&mut self) {
        self.taken(|c| c.is_ascii_whitespace());
    }

    pub(super) fn taken(&mut self, of: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.find(|c| !of(c)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    pub(super) fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    pub(super) fn column(&self) -> usize {
        self.at + 1
    }

    pub(super) fn unexpected(&mut self, expected: &'static str) -> RuleError {
        self.space();
        let rest = self.rest();
        let word = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let len = match word {
            Some(0) => rest.chars().next().map_or(0, char::len_utf8),
            Some(len) => len,
            None => rest.len(),
        };
        let found = match rest.get(..len).unwrap_or_default() {
            "" => "the end".to_owned(),
            found => format!("`{found}`"),
        };
        RuleError::Unexpected {
            column: self.column(),
            found,
            expected,
        }
    }

    /// What was read from `start` on has a value that cannot be.
    pub(super) fn impossible(&self, start: usize, possible: &'static str) -> RuleError {
        let found = self.text.get(start..self.at).unwrap_or_default().trim();
        RuleError::Value {
            column: start + 1,
            found: format!("`{found}`"),
            possible,
        }
    }
}
