//! The numbers of a rule that may change while it is in force: each is in a cell, eight bytes of the arena's data half that its handler reads.
//!
//! [`cells`] gives those of a rule in the order in which handlers have them; [`retune`] the store that turns one rule into another. That is one
//! store or none: between two, what the guest asks would be neither of the rules.

use super::During;
use super::resolve::{Check, Resolved, Span, Value};

/// What a cell is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A number that the rule names; only the host writes it.
    Constant,
    /// Whether it is time: zero or one; only the host writes it.
    During(During),
    /// Calls that came to the test; only the handler writes it, one more each.
    Calls,
    /// Calls that are left in this second: the host stores this number each second, the handler takes one off each.
    Tokens(u64),
}

impl Use {
    /// Whether the guest writes it: it then has a cache line of its own.
    #[must_use]
    pub fn is_written(&self) -> bool {
        matches!(self, Self::Calls | Self::Tokens(_))
    }
}

/// The cells of `rule`, each with what it holds at first.
#[must_use]
pub fn cells(rule: &Resolved) -> Vec<(Use, u64)> {
    let mut all = Vec::new();
    add(rule, &mut all);
    all
}

fn add(rule: &Resolved, all: &mut Vec<(Use, u64)>) {
    match rule {
        Resolved::Check(check) => of_check(check, all),
        Resolved::Not(rule) => add(rule, all),
        Resolved::All(rules) | Resolved::Any(rules) => {
            rules.iter().for_each(|rule| add(rule, all));
        }
    }
}

fn of_check(check: &Check, all: &mut Vec<(Use, u64)>) {
    let mut constant = |value| all.push((Use::Constant, value));
    match check {
        Check::Order { with, .. } => constant(*with),
        Check::In { value, spans } => spans.iter().for_each(|span| match span {
            Span::One(one) => constant(*one),
            Span::Range(low, high) if to_zero(value, *low).is_some() => {
                constant(high.wrapping_sub(*low));
            }
            Span::Range(low, high) => {
                constant(*low);
                constant(*high);
            }
        }),
        Check::Comm { bytes, .. } => bytes.chunks(8).for_each(|chunk| constant(word(chunk))),
        Check::Share { last } => {
            constant(*last);
            all.push((Use::Calls, 0));
        }
        Check::First { limit } => {
            constant(*limit);
            all.push((Use::Calls, 0));
        }
        Check::Rate { calls } => all.push((Use::Tokens(*calls), *calls)),
        Check::During(during) => {
            let first = matches!(during, During::For(_) | During::Until(_));
            all.push((Use::During(during.clone()), first.into()));
        }
        Check::Kthread { .. } | Check::InSet { .. } | Check::Predicate { .. } => {}
    }
}

/// What is to be added to `value` so that `low`, where a range begins, becomes zero, if an instruction can name it: then a cell holds how long
/// the range is. Else one holds each end.
#[must_use]
pub fn to_zero(value: &Value, low: u64) -> Option<i32> {
    let by = low.wrapping_neg();
    if value.is_half() {
        let half = u32::try_from(by & 0xffff_ffff).ok()?;
        return Some(half.cast_signed());
    }
    i32::try_from(by.cast_signed()).ok()
}

/// At most eight bytes as the upper ones of a little-endian word: as what is left of one when those behind them are shifted out.
fn word(chunk: &[u8]) -> u64 {
    chunk
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
        << (64 - 8 * chunk.len().clamp(1, 8))
}

/// The stores that turn `old` into `new`: at most one, the index of its cell among [`cells`] and what it then holds. `None` when one store does
/// not: then `new` needs a handler of its own.
#[must_use]
pub fn retune(old: &Resolved, new: &Resolved) -> Option<Vec<(usize, u64)>> {
    if shape(old) != shape(new) {
        return None;
    }
    let (old, new) = (cells(old), cells(new));
    let both = old.into_iter().zip(new).enumerate();
    // What is counted goes on; and what is told by a clock is the same in both, as the shapes are.
    let changed = both.filter(|(_, ((_, before), (_, after)))| before != after);
    let stores: Vec<_> = changed
        .map(|(index, (_, (_, after)))| (index, after))
        .collect();
    (stores.len() <= 1).then_some(stores)
}

/// `rule` with nothing in it that a cell holds.
fn shape(rule: &Resolved) -> Resolved {
    let all = |rules: &[Resolved]| rules.iter().map(shape).collect();
    match rule {
        Resolved::Check(check) => Resolved::Check(shape_of(check)),
        Resolved::Not(rule) => Resolved::Not(Box::new(shape(rule))),
        Resolved::All(rules) => Resolved::All(all(rules)),
        Resolved::Any(rules) => Resolved::Any(all(rules)),
    }
}

fn shape_of(check: &Check) -> Check {
    let mut shape = check.clone();
    match &mut shape {
        Check::Order { with, .. } => *with = 0,
        Check::In { value, spans } => spans.iter_mut().for_each(|span| match span {
            Span::One(one) => *one = 0,
            Span::Range(low, high) if to_zero(value, *low).is_some() => *high = *low,
            // No range of the other kind is left with this.
            Span::Range(low, high) => (*low, *high) = (0, 1),
        }),
        Check::Comm { bytes, .. } => bytes.fill(0),
        Check::Share { last } => *last = 0,
        Check::First { limit } => *limit = 0,
        Check::Rate { calls } => *calls = 0,
        Check::Kthread { .. }
        | Check::InSet { .. }
        | Check::During(_)
        | Check::Predicate { .. } => {}
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::{Use, cells, retune};
    use crate::rule::resolve::{Check, Resolved, Source, Span, Value};
    use crate::rule::{During, Order};

    fn value(size: u8) -> Value {
        Value {
            from: Source::Argument(0),
            loads: Vec::new(),
            size,
            signed: false,
            bits: None,
        }
    }

    fn is(order: Order, with: u64) -> Check {
        let value = value(4);
        Check::Order { value, order, with }
    }

    /// No instruction names so much.
    const FAR: u64 = 0x8000_0001;

    fn within(size: u8, low: u64, high: u64) -> Check {
        Check::In {
            value: value(size),
            spans: vec![Span::Range(low, high), Span::One(1)],
        }
    }

    fn comm(bytes: &[u8]) -> Check {
        let bytes = bytes.to_vec();
        Check::Comm { offset: 8, bytes }
    }

    fn all(checks: &[Check]) -> Resolved {
        Resolved::All(checks.iter().cloned().map(Resolved::Check).collect())
    }

    #[test]
    fn one_store_turns_one_rule_into_another_or_a_handler_is_needed() {
        let other = Order::NotEqual;
        let share = |last| Check::Share { last };
        for (old, new, want) in [
            (vec![is(other, 1)], vec![is(other, 1)], Some(vec![])),
            (vec![is(other, 1)], vec![is(other, 2)], Some(vec![(0, 2)])),
            (vec![is(other, 1)], vec![is(Order::Below, 1)], None),
            (vec![is(other, 1); 2], vec![is(other, 2); 2], None),
            (
                vec![is(other, 1), share(5)],
                vec![is(other, 1), share(6)],
                Some(vec![(1, 6)]),
            ),
            (vec![within(4, 5, 9)], vec![within(4, 4, 9)], None),
            (
                vec![within(4, 5, 9)],
                vec![within(4, 5, 8)],
                Some(vec![(0, 3)]),
            ),
            (vec![within(4, 5, 9)], vec![within(4, 6, 10)], None),
            (
                vec![within(8, FAR, FAR + 4)],
                vec![within(8, FAR + 1, FAR + 4)],
                Some(vec![(0, FAR + 1)]),
            ),
            (
                vec![within(8, FAR, FAR + 4)],
                vec![within(8, FAR, FAR + 3)],
                Some(vec![(1, FAR + 3)]),
            ),
            (
                vec![within(8, FAR, FAR + 4)],
                vec![within(8, FAR + 1, FAR + 5)],
                None,
            ),
            (vec![within(8, FAR, FAR)], vec![within(8, 0, FAR)], None),
            (vec![within(8, 0, 1)], vec![within(8, FAR, FAR)], None),
            (
                vec![comm(b"nginx\0")],
                vec![comm(b"httpd\0")],
                Some(vec![(0, u64::from_le_bytes(*b"\0\0httpd\0"))]),
            ),
            (vec![comm(b"nginx\0")], vec![comm(b"sshd\0")], None),
            (
                vec![comm(b"a long name\0")],
                vec![comm(b"a long mane\0")],
                None,
            ),
            (
                vec![Check::First { limit: 3 }],
                vec![Check::First { limit: 4 }],
                Some(vec![(0, 4)]),
            ),
            (
                vec![Check::Rate { calls: 3 }],
                vec![Check::Rate { calls: 4 }],
                Some(vec![(0, 4)]),
            ),
            (
                vec![Check::During(During::For(1))],
                vec![Check::During(During::For(2))],
                None,
            ),
            (
                vec![Check::Kthread { flags: 4 }],
                vec![Check::Kthread { flags: 4 }],
                Some(vec![]),
            ),
        ] {
            assert_eq!(retune(&all(&old), &all(&new)), want, "{old:?} to {new:?}");
        }
    }

    #[test]
    fn what_the_guest_writes_is_told() {
        let rule = all(&[share_of_all(), Check::Rate { calls: 7 }]);
        let written = cells(&rule)
            .into_iter()
            .filter(|(what, _)| what.is_written());
        assert_eq!(
            written.collect::<Vec<_>>(),
            [(Use::Calls, 0), (Use::Tokens(7), 7)]
        );
    }

    fn share_of_all() -> Check {
        Check::Share { last: u64::MAX }
    }
}
