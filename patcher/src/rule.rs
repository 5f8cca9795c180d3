//! Adaptation rules: which calls of a function are for which edition.
//!
//! A rule is a text of tests joined by `and`, `or`, `not` and parentheses, which bind as in C:
//!
//! | test | true for |
//! |---|---|
//! | `pid = 7`, `tgid`, `uid`, `cpu` | the task's thread, its process, its user; the processor |
//! | `cmd = 0x8905`, `arg2 < 10`, `sock->type in {1, 2, 5..9}` | an argument, by its name or number, or a field reached through it |
//! | `comm = "nginx"`, `comm = "ngin*"` | the task's name, or how it begins |
//! | `kthread` | a kernel thread |
//! | `pid in set NAME`; also `task`, `cgroup`, an argument, a field | what the host has put into a set |
//! | `share 10%`, `share 1/50` | so many of the calls that come to this test, evenly |
//! | `first 100`, `rate 5/s` | the first calls that come to it; so many in a second |
//! | `during NAME`, `for 10s`, `until 2026-01-01T00:00:00Z`, `after ...` | calls while the host has begun NAME and not ended it, or by its clock |
//! | `predicate NAME` | what a function of the update's package answers, given the call's arguments (see [`crate::edition::predicate`]) |
//!
//! A value is compared by `=`, `!=`, `<`, `<=`, `>`, `>=`, `in A..B` (both included) and `in {...}`, and is a number or an enumerator's name.
//! A word that is a test of its own means an argument of that name only before `->`, `.` or `[`; else the argument has its number.
//!
//! [`Rule::parse`] reads the text, and what it gives prints as text that reads as the same rule. [`resolve`] looks up in a kernel's types what it
//! refers to; [`tune`] says which stores turn one into another. The names are those of the kernel's source; nothing else of a kernel is known here.

mod parse;
pub mod resolve;
mod text;
mod time;
pub mod tune;

use std::fmt;

pub use self::parse::RuleError;
pub use self::time::Instant;

/// A rule, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// One test.
    Test(Test),
    /// The opposite.
    Not(Box<Rule>),
    /// All of at least two, asked in order until one is false.
    All(Vec<Rule>),
    /// Any of at least two, asked in order until one is true.
    Any(Vec<Rule>),
}

/// One question about a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// Whether a value is one of these.
    Compare {
        /// The value.
        what: Operand,
        /// With what.
        with: Comparison,
    },
    /// Whether the task is called so.
    Comm {
        /// The name, at most 15 bytes, or its beginning.
        name: String,
        /// Whether it need only begin so.
        prefix: bool,
    },
    /// Whether the task is a kernel thread.
    Kthread,
    /// Whether a value is in a set that the host fills.
    InSet {
        /// The value.
        what: Operand,
        /// Name of the set.
        set: String,
    },
    /// Whether this call is one of so many, evenly spread over the calls that come to the test.
    Share {
        /// How many, at least one and at most all.
        part: u64,
        /// Of how many; the two have no common divisor.
        of: u64,
    },
    /// Whether fewer calls than that came to the test before.
    First(u64),
    /// Whether fewer calls than that came to the test in this second.
    Rate(u64),
    /// Whether the host says that it is time.
    During(During),
    /// Whether this function of the package answers yes.
    Predicate(String),
}

/// When a test by time is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum During {
    /// While the host has begun this and not ended it.
    Named(String),
    /// For so many milliseconds from when the rule takes effect.
    For(u64),
    /// Before then.
    Until(Instant),
    /// From then on.
    After(Instant),
}

/// What a test looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    /// The number of the task: what users call a thread's.
    Pid,
    /// The number of the task's process.
    Tgid,
    /// The user that the task acts as: the real one.
    Uid,
    /// The number of the processor.
    Cpu,
    /// The address of the task.
    Task,
    /// The address of the set of control groups that the task is in.
    Cgroup,
    /// An argument, or what is reached through it.
    Argument(Path),
}

/// The way to a value from an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The argument.
    pub argument: Argument,
    /// From it to the value.
    pub steps: Vec<Step>,
}

/// An argument of the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// Its number, from 1.
    Number(u8),
    /// Its name in the function's prototype.
    Name(String),
}

/// One step of a way; `->` and `.` both follow a pointer where one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the member of this name.
    Member {
        /// Its name.
        name: String,
        /// Whether it is written with an arrow.
        arrow: bool,
    },
    /// To an element of an array, or of what a pointer points to.
    Index(u32),
}

/// How a value is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// With one other.
    Order(Order, Literal),
    /// With several, of which one is to be it.
    In(Vec<Span>),
}

/// An order of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `=`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Below,
    /// `<=`
    AtMost,
    /// `>`
    Above,
    /// `>=`
    AtLeast,
}

/// One value or a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Span {
    /// This one.
    One(Literal),
    /// From the first to the second, both included.
    Range(Literal, Literal),
}

/// A value as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Literal {
    /// A number that fits 64 bits, with a sign or without.
    Number(i128),
    /// The name of an enumerator.
    Name(String),
}

impl Rule {
    /// The named times that it goes by.
    pub fn times(&self) -> impl Iterator<Item = &str> {
        let mut times = Vec::new();
        self.add_times(&mut times);
        times.into_iter()
    }

    fn add_times<'a>(&'a self, times: &mut Vec<&'a str>) {
        match self {
            Self::Test(Test::During(During::Named(name))) => times.push(name),
            Self::Test(_) => {}
            Self::Not(rule) => rule.add_times(times),
            Self::All(rules) | Self::Any(rules) => {
                rules.iter().for_each(|rule| rule.add_times(times));
            }
        }
    }

    /// Whether it asks for the set of this name.
    #[must_use]
    pub fn asks_for(&self, set: &str) -> bool {
        match self {
            Self::Test(Test::InSet { set: asked, .. }) => asked == set,
            Self::Test(_) => false,
            Self::Not(rule) => rule.asks_for(set),
            Self::All(rules) | Self::Any(rules) => rules.iter().any(|rule| rule.asks_for(set)),
        }
    }

    /// Reads a rule.
    ///
    /// # Errors
    /// [`RuleError`], which names the column.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        parse::parse(text)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Test(test) => test.fmt(f),
            Self::Not(rule) => match **rule {
                Self::All(_) | Self::Any(_) => write!(f, "not ({rule})"),
                _ => write!(f, "not {rule}"),
            },
            Self::All(rules) => joined(f, rules, " and ", |rule| {
                matches!(rule, Self::All(_) | Self::Any(_))
            }),
            Self::Any(rules) => joined(f, rules, " or ", |rule| matches!(rule, Self::Any(_))),
        }
    }
}

/// `rules` with `word` between them, in parentheses where they would be read as others.
fn joined(
    f: &mut fmt::Formatter<'_>,
    rules: &[Rule],
    word: &str,
    apart: impl Fn(&Rule) -> bool,
) -> fmt::Result {
    for (index, rule) in rules.iter().enumerate() {
        if index > 0 {
            f.write_str(word)?;
        }
        if apart(rule) {
            write!(f, "({rule})")?;
        } else {
            write!(f, "{rule}")?;
        }
    }
    Ok(())
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compare { what, with } => write!(f, "{what} {with}"),
            Self::Comm { name, prefix } => {
                let star = if *prefix { "*" } else { "" };
                write!(f, "comm = \"{name}{star}\"")
            }
            Self::Kthread => f.write_str("kthread"),
            Self::InSet { what, set } => write!(f, "{what} in set {set}"),
            Self::Share { part, of } => write!(f, "share {part}/{of}"),
            Self::First(calls) => write!(f, "first {calls}"),
            Self::Rate(calls) => write!(f, "rate {calls}/s"),
            Self::During(During::Named(name)) => write!(f, "during {name}"),
            Self::During(During::For(ms)) if ms % 1000 == 0 => write!(f, "for {}s", ms / 1000),
            Self::During(During::For(ms)) => write!(f, "for {ms}ms"),
            Self::During(During::Until(then)) => write!(f, "until {then}"),
            Self::During(During::After(then)) => write!(f, "after {then}"),
            Self::Predicate(name) => write!(f, "predicate {name}"),
        }
    }
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid => f.write_str("pid"),
            Self::Tgid => f.write_str("tgid"),
            Self::Uid => f.write_str("uid"),
            Self::Cpu => f.write_str("cpu"),
            Self::Task => f.write_str("task"),
            Self::Cgroup => f.write_str("cgroup"),
            Self::Argument(path) => path.fmt(f),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.argument {
            Argument::Number(number) => write!(f, "arg{number}")?,
            Argument::Name(name) => f.write_str(name)?,
        }
        self.steps.iter().try_for_each(|step| step.fmt(f))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member { name, arrow: true } => write!(f, "->{name}"),
            Self::Member { name, arrow: false } => write!(f, ".{name}"),
            Self::Index(index) => write!(f, "[{index}]"),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Order(order, with) => write!(f, "{order} {with}"),
            Self::In(spans) => {
                let parts: Vec<String> = spans.iter().map(ToString::to_string).collect();
                match spans.as_slice() {
                    [Span::Range(..)] => write!(f, "in {}", parts.join(", ")),
                    _ => write!(f, "in {{{}}}", parts.join(", ")),
                }
            }
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Below => "<",
            Self::AtMost => "<=",
            Self::Above => ">",
            Self::AtLeast => ">=",
        })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(value) => value.fmt(f),
            Self::Range(low, high) => write!(f, "{low}..{high}"),
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}
