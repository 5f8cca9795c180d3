//! From a rule's text to the rule.
//!
//! One pass, by recursive descent. Length, depth and the number of tests are limited, so that what a rule costs a call is too. Each error
//! names the column, in bytes from 1, and what may stand there.

use super::text::Parser;
use super::time::{self, Instant};
use super::{Argument, Comparison, During, Literal, Operand, Order, Path, Rule, Span, Step, Test};

/// Longest text, in bytes.
pub(super) const MAX_TEXT: usize = 4096;
/// Deepest nesting of parentheses and `not`.
pub(super) const MAX_DEPTH: usize = 16;
/// Most tests of one rule, each value of a list counted.
pub(super) const MAX_TESTS: usize = 64;
/// Most steps from an argument to a field.
const MAX_STEPS: usize = 8;
/// Longest name of a task: one byte less than the kernel has room for (`TASK_COMM_LEN`).
const MAX_COMM: usize = 15;
/// Longest time that a rule holds for: ten years, in milliseconds.
const MAX_FOR: u64 = 10 * 366 * 86_400_000;

const A_TEST: &str = "a test: `pid`, `tgid`, `uid`, `cpu`, `comm`, `kthread`, `cgroup`, `task`, `share`, `first`, `rate`, `during`, \
     `for`, `until`, `after`, `predicate`, or an argument (`arg1`, or its name)";

/// Why a text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Something else stands there than may.
    #[error("column {column}: {found} where {expected} is expected")]
    Unexpected {
        /// Where, in bytes from 1.
        column: usize,
        /// What is there.
        found: String,
        /// What may be there.
        expected: &'static str,
    },
    /// A value is not one that is possible there.
    #[error("column {column}: {found} is not possible: {possible}")]
    Value {
        /// Where, in bytes from 1.
        column: usize,
        /// The value.
        found: String,
        /// What is.
        possible: &'static str,
    },
    /// The text is too long.
    #[error(
        "the rule is {len} bytes long, and {MAX_TEXT} are the most; put values into a set, or the question into a predicate"
    )]
    TooLong {
        /// Its bytes.
        len: usize,
    },
    /// It is nested too deep.
    #[error("column {column}: more than {MAX_DEPTH} parentheses and `not`s around one test")]
    TooDeep {
        /// Where, in bytes from 1.
        column: usize,
    },
    /// It has too many tests.
    #[error(
        "column {column}: more than {MAX_TESTS} tests and values in one rule; put values into a set, or the question into a predicate"
    )]
    TooMany {
        /// Where, in bytes from 1.
        column: usize,
    },
}

/// Reads the rule `text`.
pub(super) fn parse(text: &str) -> Result<Rule, RuleError> {
    if text.len() > MAX_TEXT {
        return Err(RuleError::TooLong { len: text.len() });
    }
    let mut parser = Parser {
        text,
        at: 0,
        tests: 0,
    };
    let rule = parser.any(0)?;
    parser.space();
    if parser.at < text.len() {
        return Err(parser.unexpected("`and`, `or` or the end"));
    }
    Ok(rule)
}

impl Parser<'_> {
    fn any(&mut self, depth: usize) -> Result<Rule, RuleError> {
        self.joined("or", depth, Self::all, Rule::Any)
    }

    fn all(&mut self, depth: usize) -> Result<Rule, RuleError> {
        self.joined("and", depth, Self::one, Rule::All)
    }

    /// At least one of `part`, with `word` between them.
    fn joined(
        &mut self,
        word: &str,
        depth: usize,
        part: impl Fn(&mut Self, usize) -> Result<Rule, RuleError>,
        of: impl Fn(Vec<Rule>) -> Rule,
    ) -> Result<Rule, RuleError> {
        let first = part(self, depth)?;
        let mut rules = Vec::new();
        while self.keyword(word) {
            rules.push(part(self, depth)?);
        }
        if rules.is_empty() {
            return Ok(first);
        }
        rules.insert(0, first);
        Ok(of(rules))
    }

    fn one(&mut self, depth: usize) -> Result<Rule, RuleError> {
        if depth > MAX_DEPTH {
            return Err(RuleError::TooDeep {
                column: self.column(),
            });
        }
        if self.mark("(") {
            let rule = self.any(depth + 1)?;
            self.need(")", "`and`, `or` or `)`")?;
            return Ok(rule);
        }
        if self.keyword("not") {
            return Ok(Rule::Not(Box::new(self.one(depth + 1)?)));
        }
        self.test()
    }

    fn test(&mut self) -> Result<Rule, RuleError> {
        self.count()?;
        let start = self.at;
        let word = self.name(A_TEST)?;
        let test = if self.ahead(&["->", ".", "["]) {
            self.at = start;
            self.about_argument()?
        } else {
            match word {
                "pid" => self.about(Operand::Pid)?,
                "tgid" => self.about(Operand::Tgid)?,
                "uid" => self.about(Operand::Uid)?,
                "cpu" => self.about(Operand::Cpu)?,
                "task" => self.in_set_alone(Operand::Task)?,
                "cgroup" | "css_set" => self.in_set_alone(Operand::Cgroup)?,
                "comm" => return self.comm(),
                "kthread" => Test::Kthread,
                "share" => self.share()?,
                "first" => Test::First(self.positive("a number of calls, from 1 to 2^63-1")?),
                "rate" => self.rate()?,
                "during" => Test::During(During::Named(self.named("the name of a time")?)),
                "for" => self.during_for()?,
                "until" => Test::During(During::Until(self.instant()?)),
                "after" => Test::During(During::After(self.instant()?)),
                "predicate" => Test::Predicate(self.named("the name of a function")?),
                "and" | "or" | "in" => {
                    self.at = start;
                    return Err(self.unexpected(A_TEST));
                }
                _ => {
                    self.at = start;
                    self.about_argument()?
                }
            }
        };
        Ok(Rule::Test(test))
    }

    fn about_argument(&mut self) -> Result<Test, RuleError> {
        let path = self.path()?;
        self.about(Operand::Argument(path))
    }

    /// `what` is in a set, or compares.
    fn about(&mut self, what: Operand) -> Result<Test, RuleError> {
        let order = match self.order() {
            Some(order) => order,
            None if self.keyword("in") => {
                let start = self.at;
                if self.keyword("set") && !self.ahead(&[".."]) {
                    let set = self.named("the name of a set")?;
                    return Ok(Test::InSet { what, set });
                }
                self.at = start;
                let with = Comparison::In(self.spans()?);
                return Ok(Test::Compare { what, with });
            }
            None => return Err(self.unexpected("`=`, `!=`, `<`, `<=`, `>`, `>=` or `in`")),
        };
        let with = Comparison::Order(order, self.literal()?);
        Ok(Test::Compare { what, with })
    }

    /// Addresses of the kernel's own mean nothing to who writes a rule.
    fn in_set_alone(&mut self, what: Operand) -> Result<Test, RuleError> {
        if self.keyword("in") && self.keyword("set") {
            let set = self.named("the name of a set")?;
            return Ok(Test::InSet { what, set });
        }
        Err(self.unexpected("`in set` and the name of a set"))
    }

    fn order(&mut self) -> Option<Order> {
        let marks = [
            ("!=", Order::NotEqual),
            ("<=", Order::AtMost),
            (">=", Order::AtLeast),
            ("==", Order::Equal),
            ("=", Order::Equal),
            ("<", Order::Below),
            (">", Order::Above),
        ];
        let found = marks.into_iter().find(|(mark, _)| self.mark(mark));
        found.map(|(_, order)| order)
    }

    fn spans(&mut self) -> Result<Vec<Span>, RuleError> {
        if !self.mark("{") {
            let low = self.literal()?;
            self.need("..", "`..` and the last value")?;
            return Ok(vec![self.range(low)?]);
        }
        let mut spans = Vec::new();
        loop {
            if !spans.is_empty() {
                self.count()?;
            }
            let low = self.literal()?;
            let span = if self.mark("..") {
                self.range(low)?
            } else {
                Span::One(low)
            };
            spans.push(span);
            if self.mark("}") {
                return Ok(spans);
            }
            self.need(",", "`,` or `}`")?;
        }
    }

    fn range(&mut self, low: Literal) -> Result<Span, RuleError> {
        self.space();
        let start = self.at;
        let high = self.literal()?;
        match (&low, &high) {
            (Literal::Number(first), Literal::Number(last)) if first > last => {
                Err(self.impossible(start, "a range ends no lower than it begins"))
            }
            _ => Ok(Span::Range(low, high)),
        }
    }

    fn path(&mut self) -> Result<Path, RuleError> {
        let start = self.at;
        let name = self.name(A_TEST)?;
        let argument = match name.strip_prefix("arg").map(str::parse) {
            Some(Ok(number @ 1..)) => Argument::Number(number),
            Some(Ok(0)) => return Err(self.impossible(start, "the first argument is `arg1`")),
            _ => Argument::Name(name.to_owned()),
        };
        let mut steps = Vec::new();
        loop {
            let step = if self.mark("->") {
                self.member(true)?
            } else if !self.ahead(&[".."]) && self.mark(".") {
                self.member(false)?
            } else if self.mark("[") {
                let index = self.number_below(1 << 31, "an index is from 0 to 2^31-1")?;
                self.need("]", "`]`")?;
                Step::Index(u32::try_from(index).unwrap_or(u32::MAX))
            } else {
                return Ok(Path { argument, steps });
            };
            if steps.len() == MAX_STEPS {
                return Err(self.impossible(start, "a field is at most 8 steps away"));
            }
            steps.push(step);
        }
    }

    fn member(&mut self, arrow: bool) -> Result<Step, RuleError> {
        let name = self.named("the name of a member")?;
        Ok(Step::Member { name, arrow })
    }

    fn comm(&mut self) -> Result<Rule, RuleError> {
        let start = self.at;
        let same = match self.order() {
            Some(Order::Equal) => true,
            Some(Order::NotEqual) => false,
            _ => {
                self.at = start;
                return Err(self.unexpected("`=` or `!=` and a name in quotes"));
            }
        };
        self.need("\"", "a name in quotes")?;
        let start = self.at;
        let rest = self.rest();
        let Some(end) = rest.find('"') else {
            self.at = self.text.len();
            return Err(self.unexpected("`\"` behind the name"));
        };
        self.at = start + end + 1;
        let (name, prefix) = match rest[..end].strip_suffix('*') {
            Some(name) => (name, true),
            None => (&rest[..end], false),
        };
        if name.is_empty() || name.len() > MAX_COMM || name.contains(['\0', '*']) {
            let possible =
                "a task's name has 1 to 15 bytes, and `*` stands only at the end of how it begins";
            return Err(self.impossible(start, possible));
        }
        let test = Rule::Test(Test::Comm {
            name: name.to_owned(),
            prefix,
        });
        Ok(if same {
            test
        } else {
            Rule::Not(Box::new(test))
        })
    }

    fn share(&mut self) -> Result<Test, RuleError> {
        const POSSIBLE: &str = "a share is more than nothing and at most all, as `10%`, `2.5%` or `1/50`, with at most 9 digits a number";
        self.space();
        let start = self.at;
        let limit = 1_000_000_000;
        let part = self.number_below(limit, POSSIBLE)?;
        let (part, of) = if self.mark("/") {
            (part, self.number_below(limit, POSSIBLE)?)
        } else {
            let mut scaled = (part, 100);
            if self.rest().starts_with('.') {
                self.at += 1;
                let digits = self.digits();
                let fraction = digits.parse().ok().filter(|_| digits.len() <= 6);
                let scale = u32::try_from(digits.len()).map_or(0, |len| 10_u64.pow(len.min(6)));
                let fraction: u64 = fraction.ok_or_else(|| self.impossible(start, POSSIBLE))?;
                scaled = (part * scale + fraction, 100 * scale);
            }
            self.need("%", "`%`, or `/` and a number")?;
            scaled
        };
        if part == 0 || part > of {
            return Err(self.impossible(start, POSSIBLE));
        }
        let common = divisor(part, of);
        Ok(Test::Share {
            part: part / common,
            of: of / common,
        })
    }

    fn rate(&mut self) -> Result<Test, RuleError> {
        let calls = self.positive("a number of calls, from 1 to 2^63-1")?;
        self.need("/", "`/s`")?;
        if !self.keyword("s") {
            return Err(self.unexpected("`s`: a rate is by the second"));
        }
        Ok(Test::Rate(calls))
    }

    fn during_for(&mut self) -> Result<Test, RuleError> {
        const POSSIBLE: &str = "a time is from 1ms to ten years, as `500ms`, `10s`, `5m` or `2h`";
        self.space();
        let start = self.at;
        let number = self.number_below(MAX_FOR, POSSIBLE)?;
        let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
        let Some((_, unit)) = units.into_iter().find(|(unit, _)| self.keyword(unit)) else {
            return Err(self.unexpected("`ms`, `s`, `m` or `h`"));
        };
        let ms = number.checked_mul(unit);
        match ms.filter(|ms| (1..=MAX_FOR).contains(ms)) {
            Some(ms) => Ok(Test::During(During::For(ms))),
            None => Err(self.impossible(start, POSSIBLE)),
        }
    }

    fn instant(&mut self) -> Result<Instant, RuleError> {
        self.space();
        let start = self.at;
        let found = self.rest().get(..time::LEN).and_then(Instant::parse);
        let Some(found) = found else {
            return Err(self.unexpected("a time as `2026-01-31T12:00:00Z`, from 1970 on"));
        };
        self.at = start + time::LEN;
        Ok(found)
    }

    fn literal(&mut self) -> Result<Literal, RuleError> {
        const EXPECTED: &str = "a number or the name of an enumerator";
        self.space();
        let start = self.at;
        let minus = self.mark("-");
        if self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            const POSSIBLE: &str = "a number has 64 bits, with a sign or without";
            let number = self.unsigned(start, POSSIBLE)?;
            let number = if minus {
                -i128::from(number)
            } else {
                i128::from(number)
            };
            return match number >= i64::MIN.into() {
                true => Ok(Literal::Number(number)),
                false => Err(self.impossible(start, POSSIBLE)),
            };
        }
        if minus {
            return Err(self.unexpected("a number"));
        }
        Ok(Literal::Name(self.named(EXPECTED)?))
    }

    /// A number that counts: at least one, and with a sign still itself.
    fn positive(&mut self, possible: &'static str) -> Result<u64, RuleError> {
        self.space();
        let start = self.at;
        let number = self.number_below(1 << 63, possible)?;
        match number {
            0 => Err(self.impossible(start, possible)),
            _ => Ok(number),
        }
    }

    fn number_below(&mut self, limit: u64, possible: &'static str) -> Result<u64, RuleError> {
        self.space();
        let start = self.at;
        if !self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            return Err(self.unexpected("a number"));
        }
        let number = self.unsigned(start, possible)?;
        match number < limit {
            true => Ok(number),
            false => Err(self.impossible(start, possible)),
        }
    }

    /// Decimal or hexadecimal digits, of something that began at `start`.
    fn unsigned(&mut self, start: usize, possible: &'static str) -> Result<u64, RuleError> {
        let number = if self.rest().starts_with("0x") || self.rest().starts_with("0X") {
            self.at += 2;
            let digits = self.taken(|c| c.is_ascii_hexdigit());
            u64::from_str_radix(digits, 16)
        } else {
            self.digits().parse()
        };
        number.map_err(|_| self.impossible(start, possible))
    }

    /// One test more, or one value more of a list.
    fn count(&mut self) -> Result<(), RuleError> {
        self.tests += 1;
        if self.tests > MAX_TESTS {
            return Err(RuleError::TooMany {
                column: self.column(),
            });
        }
        Ok(())
    }
}

/// The greatest common divisor of two numbers, the second not zero.
fn divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
