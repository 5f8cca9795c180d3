//! The instructions of a handler.
//!
//! A test is compiled to a comparison and one conditional jump, given where to go on when it is true, where when it is false, and which of
//! the two comes next; the last of a choice whose calls are not counted jumps to the edition itself. `r11` holds the current task wherever
//! anything asks about it; `rax` and `r10` are free between tests.

use std::collections::BTreeSet;

use iced_x86::code_asm::{
    AsmMemoryOperand, CodeAssembler, CodeLabel, al, dword_ptr, eax, qword_ptr, r10, r10d, r11, rax,
};

use super::value::{Held, displacement};
use super::{Cell, Choice, HandlerError, LINE, Owner, Spec, reach};
use crate::addr::Gva;
use crate::edition::set::{FIRST, SECOND, SetPlace};
use crate::rule::Order;
use crate::rule::resolve::{Check, KERNEL_THREAD, Resolved, Source, Span, Value};
use crate::rule::tune;

/// Multiplier that spreads the numbers 0, 1, 2, ... evenly: 2^64 divided by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The code of a handler at `at`, and the sets that it looks into for 32 bits.
pub(super) fn handler(
    spec: &Spec<'_>,
    cells: &[Cell],
    at: Gva,
) -> Result<(Vec<u8>, BTreeSet<String>), HandlerError> {
    let mut emit = Emit {
        spec,
        code: CodeAssembler::new(64)?,
        cells: cells.iter(),
        needs_task: needs_task(spec),
        fault: CodeLabel::default(),
        halves: BTreeSet::new(),
    };
    emit.start()?;
    Ok((emit.code.assemble(at.0)?, emit.halves))
}

/// Where code goes on.
#[derive(Clone, Copy)]
enum To {
    Here(CodeLabel),
    Edition(Gva),
}

/// Which of two ways comes right behind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Yes,
    No,
}

/// Where a test goes on.
#[derive(Clone, Copy)]
struct Ways {
    yes: To,
    no: To,
    next: Next,
}

impl Ways {
    fn turned(self) -> Self {
        let next = match self.next {
            Next::Yes => Next::No,
            Next::No => Next::Yes,
        };
        Self {
            yes: self.no,
            no: self.yes,
            next,
        }
    }
}

/// What flags say that a test is true.
#[derive(Clone, Copy)]
enum When {
    Equal,
    NotEqual,
    Below { signed: bool },
    AtMost { signed: bool },
    Above { signed: bool },
    AtLeast { signed: bool },
}

impl When {
    fn opposite(self) -> Self {
        match self {
            Self::Equal => Self::NotEqual,
            Self::NotEqual => Self::Equal,
            Self::Below { signed } => Self::AtLeast { signed },
            Self::AtMost { signed } => Self::Above { signed },
            Self::Above { signed } => Self::AtMost { signed },
            Self::AtLeast { signed } => Self::Below { signed },
        }
    }
}

/// The conditional jump to a label or an address, for which the assembler has a trait each.
macro_rules! jump_when {
    ($code:expr, $when:expr, $to:expr) => {
        match $when {
            When::Equal => $code.je($to)?,
            When::NotEqual => $code.jne($to)?,
            When::Below { signed: false } => $code.jb($to)?,
            When::Below { signed: true } => $code.jl($to)?,
            When::AtMost { signed: false } => $code.jbe($to)?,
            When::AtMost { signed: true } => $code.jle($to)?,
            When::Above { signed: false } => $code.ja($to)?,
            When::Above { signed: true } => $code.jg($to)?,
            When::AtLeast { signed: false } => $code.jae($to)?,
            When::AtLeast { signed: true } => $code.jge($to)?,
        }
    };
}

pub(super) struct Emit<'a> {
    pub(super) spec: &'a Spec<'a>,
    pub(super) code: CodeAssembler,
    /// Those that no test has taken yet; tests take them in the order in which they were laid out.
    cells: std::slice::Iter<'a, Cell>,
    needs_task: bool,
    /// Where a rule goes on that cannot be answered: it does not match.
    pub(super) fault: CodeLabel,
    /// Sets that were looked into for 32 bits.
    halves: BTreeSet<String>,
}

impl Emit<'_> {
    fn start(&mut self) -> Result<(), HandlerError> {
        if self.needs_task {
            self.task()?;
        }
        if let Some(bound) = self.spec.bound {
            let (yes, no) = (self.label(), self.label());
            let ways = Ways {
                yes: To::Here(yes),
                no: To::Here(no),
                next: Next::Yes,
            };
            self.member(Held::Whole(r11), bound.tasks, ways)?;
            self.set(yes)?;
            self.choices(true, &bound.choices)?;
            self.set(no)?;
        }
        self.choices(false, self.spec.choices)
    }

    fn choices(&mut self, bound: bool, choices: &[Choice]) -> Result<(), HandlerError> {
        for (choice, of) in choices.iter().enumerate() {
            let (yes, no) = (self.label(), self.label());
            let (yes_way, next) = match of.counter {
                Some(_) => (To::Here(yes), Next::Yes),
                None => (To::Edition(of.to), Next::No),
            };
            if let Some(rule) = &of.rule {
                let ways = Ways {
                    yes: yes_way,
                    no: To::Here(no),
                    next,
                };
                self.fault = no;
                self.rule(rule, Owner { bound, choice }, ways)?;
            }
            if of.rule.is_none() || of.counter.is_some() {
                self.set(yes)?;
                self.count(of)?;
                self.go(To::Edition(of.to))?;
            }
            self.set(no)?;
        }
        Ok(())
    }

    /// Counts a call that goes to `choice`. It may be moved to another processor between its number is read and the cell is changed, so that is
    /// locked; and the number is believed only if the cells reach so far.
    fn count(&mut self, choice: &Choice) -> Result<(), HandlerError> {
        let Some(counter) = choice.counter else {
            return Ok(());
        };
        let skip = self.label();
        self.cpu()?;
        self.code.cmp(eax, self.spec.cpus.cast_signed())?;
        self.code.jae(skip)?;
        self.code.shl(eax, LINE.trailing_zeros())?;
        let at = reach("a counter", counter, LINE)?;
        self.code.lock().inc(qword_ptr(rax + at))?;
        self.set(skip)
    }

    fn rule(&mut self, rule: &Resolved, of: Owner, ways: Ways) -> Result<(), HandlerError> {
        match rule {
            Resolved::Check(check) => self.check(check, of, ways),
            Resolved::Not(rule) => self.rule(rule, of, ways.turned()),
            Resolved::All(rules) => self.all(rules, of, ways, false),
            Resolved::Any(rules) => self.all(rules, of, ways, true),
        }
    }

    /// All of `rules`, or any of them; that is the same the other way round.
    fn all(
        &mut self,
        rules: &[Resolved],
        of: Owner,
        ways: Ways,
        any: bool,
    ) -> Result<(), HandlerError> {
        let Some((last, before)) = rules.split_last() else {
            return self.go(if any { ways.no } else { ways.yes });
        };
        for rule in before {
            let behind = self.label();
            let then = To::Here(behind);
            let step = if any {
                Ways {
                    yes: ways.yes,
                    no: then,
                    next: Next::No,
                }
            } else {
                Ways {
                    yes: then,
                    no: ways.no,
                    next: Next::Yes,
                }
            };
            self.rule(rule, of, step)?;
            self.set(behind)?;
        }
        self.rule(last, of, ways)
    }

    fn check(&mut self, check: &Check, of: Owner, ways: Ways) -> Result<(), HandlerError> {
        match check {
            Check::Order { value, order, .. } => {
                let held = self.value(value)?;
                self.compare(held, of)?;
                let signed = value.signed;
                let when = match order {
                    Order::Equal => When::Equal,
                    Order::NotEqual => When::NotEqual,
                    Order::Below => When::Below { signed },
                    Order::AtMost => When::AtMost { signed },
                    Order::Above => When::Above { signed },
                    Order::AtLeast => When::AtLeast { signed },
                };
                self.branch(when, ways)
            }
            Check::In { value, spans } => self.spans(value, spans, of, ways),
            Check::Comm { offset, bytes } => self.comm(*offset, bytes, of, ways),
            Check::Kthread { flags } => {
                let flags = dword_ptr(r11 + displacement(*flags));
                self.code.test(flags, KERNEL_THREAD)?;
                self.branch(When::NotEqual, ways)
            }
            Check::InSet { value, set } => {
                let place = self.spec.sets.get(set);
                let place = *place.ok_or_else(|| HandlerError::NoSet { name: set.clone() })?;
                let key = self.key(value, place.low)?;
                if matches!(key, Held::Half(_)) {
                    self.halves.insert(set.clone());
                }
                self.member(key, place, ways)
            }
            Check::Share { .. } => {
                let (last, calls) = (self.cell(of)?, self.cell(of)?);
                self.code.mov(r10d, 1)?;
                self.code.lock().xadd(calls, r10)?;
                self.code.mov(rax, SPREAD)?;
                self.code.imul_2(r10, rax)?;
                self.code.cmp(r10, last)?;
                self.branch(When::AtMost { signed: false }, ways)
            }
            Check::First { .. } => {
                let (limit, calls) = (self.cell(of)?, self.cell(of)?);
                // Once there were enough, the cell is only read, and stays in every processor's cache.
                self.code.mov(r10, calls)?;
                self.code.cmp(r10, limit)?;
                self.jump(When::AtLeast { signed: false }, ways.no)?;
                self.code.mov(r10d, 1)?;
                self.code.lock().xadd(calls, r10)?;
                self.code.cmp(r10, limit)?;
                self.branch(When::Below { signed: false }, ways)
            }
            Check::Rate { .. } => {
                let tokens = self.cell(of)?;
                self.code.cmp(tokens, 0)?;
                self.jump(When::AtMost { signed: true }, ways.no)?;
                self.code.mov(r10, -1_i64)?;
                self.code.lock().xadd(tokens, r10)?;
                self.code.test(r10, r10)?;
                self.branch(When::Above { signed: true }, ways)
            }
            Check::During(_) => {
                let on = self.cell(of)?;
                self.code.cmp(on, 0)?;
                self.branch(When::NotEqual, ways)
            }
            Check::Predicate { at, .. } => self.predicate(*at, ways),
        }
    }

    fn spans(
        &mut self,
        value: &Value,
        spans: &[Span],
        of: Owner,
        ways: Ways,
    ) -> Result<(), HandlerError> {
        let held = self.value(value)?;
        for (index, span) in spans.iter().enumerate() {
            let last = index + 1 == spans.len();
            let behind = self.label();
            let (no, next) = if last {
                (ways.no, ways.next)
            } else {
                (To::Here(behind), Next::No)
            };
            let ways = Ways { no, next, ..ways };
            match span {
                Span::One(_) => {
                    self.compare(held, of)?;
                    self.branch(When::Equal, ways)?;
                }
                Span::Range(low, _) => self.range(value, held, *low, of, ways)?,
            }
            self.set(behind)?;
        }
        Ok(())
    }

    /// Whether `value`, which is held, is in a range that begins with `low`: how far behind that it is, whatever its sign, is one comparison.
    fn range(
        &mut self,
        value: &Value,
        held: Held,
        low: u64,
        of: Owner,
        ways: Ways,
    ) -> Result<(), HandlerError> {
        let signed = value.signed;
        match tune::to_zero(value, low) {
            Some(by) => {
                let behind = self.moved(held, by)?;
                self.compare(behind, of)?;
                self.branch(When::AtMost { signed: false }, ways)
            }
            None => {
                self.compare(held, of)?;
                self.jump(When::Below { signed }, ways.no)?;
                self.compare(held, of)?;
                self.branch(When::AtMost { signed }, ways)
            }
        }
    }

    fn comm(
        &mut self,
        offset: u32,
        bytes: &[u8],
        of: Owner,
        ways: Ways,
    ) -> Result<(), HandlerError> {
        let chunks = bytes.chunks(8).count();
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let at = displacement(offset) + if index == 0 { 0 } else { 8 };
            self.code.mov(rax, qword_ptr(r11 + at))?;
            let surplus = u32::try_from(8_usize.saturating_sub(chunk.len())).unwrap_or(0);
            if surplus > 0 {
                self.code.shl(rax, surplus * 8)?;
            }
            self.compare(Held::Whole(rax), of)?;
            if index + 1 < chunks {
                self.jump(When::NotEqual, ways.no)?;
            }
        }
        self.branch(When::Equal, ways)
    }

    /// Asks a predicate by its thunk, which leaves nothing but the arguments and callee-saved registers as they are.
    fn predicate(&mut self, thunk: Gva, ways: Ways) -> Result<(), HandlerError> {
        reach("what asks a predicate", thunk, 1)?;
        self.code.call(thunk.0)?;
        if self.needs_task {
            self.task()?;
        }
        self.code.test(al, al)?;
        self.branch(When::NotEqual, ways)
    }

    /// Whether `key`, which is not in `r10`, is in the set at `place`. Neither `r10` nor, unless it is the key, `rax` is as before.
    fn member(&mut self, key: Held, place: SetPlace, ways: Ways) -> Result<(), HandlerError> {
        let at = reach("a set", place.at, 8)?;
        let bits = u32::from(place.bits);
        self.code.imul_3(r10d, key.half(), FIRST.cast_signed())?;
        self.code.shr(r10d, 32 - bits)?;
        match key {
            Held::Half(half) => self.code.cmp(dword_ptr(r10 * 8 + at), half)?,
            Held::Whole(whole) => self.code.cmp(qword_ptr(r10 * 8 + at), whole)?,
        }
        self.jump(When::Equal, ways.yes)?;
        let key = self.widened(key)?;
        self.code.mov(r10, SECOND)?;
        self.code.imul_2(r10, key)?;
        self.code.shr(r10, 64 - bits)?;
        self.code.cmp(qword_ptr(r10 * 8 + at), key)?;
        self.branch(When::Equal, ways)
    }

    /// Compares with the next cell.
    fn compare(&mut self, held: Held, of: Owner) -> Result<(), HandlerError> {
        let cell = self.cell(of)?;
        match held {
            Held::Half(register) => self.code.cmp(register, dword_ptr(cell))?,
            Held::Whole(register) => self.code.cmp(register, cell)?,
        }
        Ok(())
    }

    /// The next cell, which is one of the rule `of`.
    fn cell(&mut self, of: Owner) -> Result<AsmMemoryOperand, HandlerError> {
        let cell = self.cells.next().filter(|cell| cell.of == of);
        let cell = cell.ok_or_else(|| HandlerError::Assembler {
            cause: "its cells are not those of its rules".to_owned(),
        })?;
        reach("a cell", cell.at, 8)?;
        Ok(qword_ptr(cell.at.0))
    }

    /// Goes on as the flags say.
    fn branch(&mut self, when: When, ways: Ways) -> Result<(), HandlerError> {
        match ways.next {
            Next::No => self.jump(when, ways.yes),
            Next::Yes => self.jump(when.opposite(), ways.no),
        }
    }

    fn jump(&mut self, when: When, to: To) -> Result<(), HandlerError> {
        match to {
            To::Here(label) => jump_when!(self.code, when, label),
            To::Edition(at) => jump_when!(self.code, when, at.0),
        }
        Ok(())
    }

    fn go(&mut self, to: To) -> Result<(), HandlerError> {
        match to {
            To::Here(label) => self.code.jmp(label)?,
            To::Edition(at) => self.code.jmp(at.0)?,
        }
        Ok(())
    }

    fn label(&mut self) -> CodeLabel {
        self.code.create_label()
    }

    /// `label` is here. Several may be, so each stands before nothing.
    fn set(&mut self, mut label: CodeLabel) -> Result<(), HandlerError> {
        self.code.set_label(&mut label)?;
        Ok(self.code.zero_bytes()?)
    }
}

/// Whether any rule asks about the current task.
fn needs_task(spec: &Spec<'_>) -> bool {
    spec.bound.is_some() || spec.rules().any(|(_, rule)| asks_task(rule))
}

fn asks_task(rule: &Resolved) -> bool {
    match rule {
        Resolved::Not(rule) => asks_task(rule),
        Resolved::All(rules) | Resolved::Any(rules) => rules.iter().any(asks_task),
        Resolved::Check(check) => match check {
            Check::Order { value, .. } | Check::In { value, .. } | Check::InSet { value, .. } => {
                value.from == Source::Task
            }
            Check::Comm { .. } | Check::Kthread { .. } => true,
            _ => false,
        },
    }
}
