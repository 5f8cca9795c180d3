//! A made-up processor's memory with a handler in it, in which calls are made, and what each should get to: asked of the rules directly.

use std::collections::BTreeMap;

use super::{Assembled, Bound, Choice, Owner, Region, Spec, Thunk, assemble};
use crate::addr::Gva;
use crate::edition::link::Returns;
use crate::edition::set::{Set, is_low};
use crate::rule::Order;
use crate::rule::resolve::{Check, KERNEL_THREAD, PerCpu, Resolved, Source, Span, Value};
use crate::rule::tune;
use crate::x86::registers::ARGUMENTS;
use crate::x86::run::Run;
use iced_x86::Register;

pub(super) const CODE: u64 = 0xffff_ffff_ff80_0040;
pub(super) const HANDLER: u64 = 0xffff_ffff_ff80_0800;
pub(super) const CELLS: u64 = 0xffff_ffff_ffa0_1000;
const SETS: u64 = 0xffff_ffff_ffa1_0000;
/// Sets: one whose keys have at most 32 bits, and one of keys of any kind.
pub(super) const LOW: &str = "low";
pub(super) const ANY: &str = "any";
pub(super) const COUNTERS: u64 = 0xffff_ffff_ffa2_0000;
pub(super) const EDITION: u64 = 0xffff_ffff_ff90_0000;
pub(super) const PREDICATE: u64 = 0xffff_ffff_ff91_0000;
/// What asks it.
pub(super) const ASKS: u64 = 0xffff_ffff_ff91_0800;
pub(super) const THUNK: u64 = 0xffff_ffff_81c0_0000;
const CALLER: u64 = 0xffff_ffff_8123_4567;
const STACK: u64 = 0xffff_c900_0000_4000;
const PER_CPU: u64 = 0xffff_8881_0000_0000;
pub(super) const TASK: u64 = 0xffff_8880_1234_5640;
const CRED: u64 = 0xffff_8880_5555_0000;
pub(super) const OBJECTS: [u64; 2] = [0xffff_8880_6000_0000, 0xffff_8880_6000_1000];
pub(super) const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
pub(super) const CPUS: u32 = 4;
/// Where a task has what rules ask for.
pub(super) const PID: u32 = 0x10;
pub(super) const TGID: u32 = 0x14;
pub(super) const COMM: u32 = 0x20;
pub(super) const FLAGS: u32 = 0x30;
pub(super) const CREDS: u32 = 0x38;
pub(super) const UID: u32 = 8;
const KEPT: [Register; 6] = [
    Register::RBX,
    Register::RBP,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// One call of the function.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) pid: i32,
    pub(super) tgid: i32,
    pub(super) uid: u32,
    pub(super) cpu: u32,
    pub(super) comm: [u8; 16],
    pub(super) kthread: bool,
    pub(super) arguments: [u64; 6],
    /// What the objects hold.
    pub(super) words: [u64; 8],
    /// What the predicate answers.
    pub(super) answer: u64,
}

impl Default for Call {
    fn default() -> Self {
        Self {
            pid: 100,
            tgid: 100,
            uid: 0,
            cpu: 1,
            comm: *b"nginx\0left over\0",
            kthread: false,
            arguments: [OBJECTS[0], 2, 3, 4, 5, 6],
            words: [0; 8],
            answer: 0,
        }
    }
}

/// A handler in a guest's memory.
pub(super) struct World {
    region: Region,
    thunk: Thunk,
    pub(super) handler: Assembled,
    pub(super) run: Run,
    choices: Vec<Choice>,
    bound: Option<Bound>,
    pub(super) sets: BTreeMap<String, Set>,
    /// What the guest wrote to cells, as the model has it: by rule and index.
    pub(super) model: BTreeMap<(bool, usize, usize), u64>,
}

/// Choices with these rules, and a last one; editions lie 16 bytes apart from `first` on.
pub(super) fn choices(rules: &[Resolved], first: u64, counted: bool) -> Vec<Choice> {
    let rules = rules.iter().cloned().map(Some).chain([None]);
    let choice = |(index, rule): (usize, Option<Resolved>)| Choice {
        rule,
        to: Gva(first + index as u64 * 16),
        counter: counted.then(|| Gva(COUNTERS + index as u64 * 0x1000)),
    };
    rules.enumerate().map(choice).collect()
}

pub(super) fn per_cpu() -> PerCpu {
    PerCpu {
        current: 0x100,
        cpu: 0x108,
    }
}

impl World {
    pub(super) fn new(choices: Vec<Choice>, bound: Option<Vec<Choice>>, returns: Returns) -> Self {
        let region = Region::new(Gva(CODE), returns).unwrap();
        assert!(CODE + region.bytes.len() as u64 <= HANDLER);
        let mut sets = BTreeMap::new();
        for (index, name) in [LOW, ANY].into_iter().enumerate() {
            let at = Gva(SETS + index as u64 * 0x400);
            let mut set = Set::new(at, 5).unwrap();
            let keys = [1, 2, 100, 0xffff_fffe, !0, OBJECTS[0], TASK];
            for key in keys.into_iter().filter(|key| name == ANY || is_low(*key)) {
                set.insert(key).unwrap();
            }
            sets.insert(name.to_owned(), set);
        }
        let bound = bound.map(|choices| Bound {
            tasks: sets[ANY].place(),
            choices,
        });
        let places = sets
            .iter()
            .map(|(name, set)| (name.clone(), set.place()))
            .collect();
        let spec = Spec {
            region: &region,
            per_cpu: per_cpu(),
            cpus: CPUS,
            bound: bound.as_ref(),
            choices: &choices,
            sets: &places,
            cells: Gva(CELLS),
        };
        let handler = assemble(&spec, Gva(HANDLER)).unwrap();
        let len = spec.cells_len();
        assert!(
            handler
                .cells
                .iter()
                .all(|cell| cell.at.0 + 8 <= CELLS + len)
        );
        let mut world = Self {
            run: Run::default(),
            thunk: Thunk::new("asks", Gva(PREDICATE), Gva(ASKS), returns).unwrap(),
            region,
            handler,
            choices,
            bound,
            sets,
            model: BTreeMap::new(),
        };
        world.fill(returns);
        world
    }

    fn fill(&mut self, returns: Returns) {
        let run = &mut self.run;
        run.code = vec![
            (CODE, self.region.bytes.clone()),
            (HANDLER, self.handler.bytes.clone()),
        ];
        if returns != Returns::Plain {
            run.code.push((THUNK, vec![0xc3]));
        }
        run.code.push((ASKS, self.thunk.bytes.clone()));
        run.fixups = self
            .region
            .fixups
            .iter()
            .map(|(insn, fixup)| (insn.0, fixup.0))
            .collect();
        run.gs = PER_CPU;
        for (index, cell) in self.handler.cells.iter().enumerate() {
            run.store(cell.at.0, 8, cell.initial);
            let Owner { bound, choice } = cell.of;
            self.model.insert((bound, choice, index), cell.initial);
        }
        for set in self.sets.values() {
            for (at, byte) in set.bytes().into_iter().enumerate() {
                run.memory.insert(set.place().at.0 + at as u64, byte);
            }
        }
        (0..0x5000).for_each(|at| run.store(COUNTERS + at, 1, 0));
        // What must not be tried is there, so that trying it is seen.
        for at in [VSYSCALL - 8, VSYSCALL, 0x1000, u64::MAX - 15, u64::MAX - 7] {
            run.store(at, 8, 1);
        }
    }

    fn place(&mut self, call: &Call) {
        let run = &mut self.run;
        run.store(PER_CPU + 0x100, 8, TASK);
        run.store(PER_CPU + 0x108, 4, call.cpu.into());
        let at = |offset: u32| TASK + u64::from(offset);
        run.store(at(PID), 4, u64::from(call.pid.cast_unsigned()));
        run.store(at(TGID), 4, u64::from(call.tgid.cast_unsigned()));
        for (index, byte) in call.comm.into_iter().enumerate() {
            run.store(at(COMM) + index as u64, 1, byte.into());
        }
        let thread = if call.kthread { KERNEL_THREAD } else { 0 };
        run.store(at(FLAGS), 4, u64::from(thread | 0x40));
        run.store(at(CREDS), 8, CRED);
        run.store(CRED + u64::from(UID), 4, call.uid.into());
        for (index, word) in call.words.into_iter().enumerate() {
            let at = OBJECTS[index / 4] + (index % 4) as u64 * 8;
            run.store(at, 8, word);
        }
    }

    /// Makes `call`: the edition that it gets to, and the instructions before its last jump.
    pub(super) fn call(&mut self, call: &Call) -> (Gva, usize) {
        self.place(call);
        let run = &mut self.run;
        run.set(Register::RSP, STACK);
        run.push(CALLER);
        for (register, value) in ARGUMENTS.iter().zip(call.arguments) {
            run.set(*register, value);
        }
        for (index, register) in KEPT.iter().enumerate() {
            run.set(*register, 0x1111 * index as u64);
        }
        for register in [Register::RAX, Register::R10, Register::R11] {
            run.set(register, 0xdead_beef_dead_beef);
        }
        (run.rip, run.steps) = (HANDLER, 0);
        let pushed: Vec<(Gva, i16)> = self.thunk.pushed().collect();
        loop {
            run.run(4000, |run| interrupted(run, &pushed));
            if run.rip != PREDICATE {
                break;
            }
            interrupted(run, &pushed);
            assert_eq!(run.get(Register::RSP) % 16, 8, "the stack is aligned");
            for (register, value) in ARGUMENTS.iter().zip(call.arguments) {
                assert_eq!(run.get(*register), value);
                run.set(*register, 0xbad);
            }
            run.set(Register::R10, 0xbad);
            run.set(Register::R11, 0xbad);
            run.set(Register::RAX, call.answer);
            run.rip = run.pop();
        }
        for (register, value) in ARGUMENTS.iter().zip(call.arguments) {
            assert_eq!(run.get(*register), value, "{register:?}");
        }
        for (index, register) in KEPT.iter().enumerate() {
            assert_eq!(run.get(*register), 0x1111 * index as u64, "{register:?}");
        }
        assert_eq!(run.get(Register::RSP), STACK - 8);
        assert_eq!(run.load(STACK - 8, 8), Some(CALLER));
        (Gva(run.rip), run.steps - 1)
    }

    /// What `call` should get to, asked directly.
    pub(super) fn want(&mut self, call: &Call) -> Gva {
        self.place(call);
        let bound = self.bound.as_ref().map(|bound| bound.choices.clone());
        let bound = bound.filter(|_| self.sets[ANY].contains(TASK));
        let (is_bound, choices) = match bound {
            Some(choices) => (true, choices),
            None => (false, self.choices.clone()),
        };
        for (index, choice) in choices.iter().enumerate() {
            let Some(rule) = &choice.rule else {
                return choice.to;
            };
            let owner = Owner {
                bound: is_bound,
                choice: index,
            };
            let first = self.handler.cells.iter().position(|cell| cell.of == owner);
            let mut cell = first.unwrap_or(0);
            if self.ask(rule, call, owner, &mut cell) == Some(true) {
                return choice.to;
            }
        }
        unreachable!("the last choice has no rule")
    }

    /// Whether `rule` is true of `call`; `None` when that cannot be told. `cell` is the next one of the rule.
    fn ask(&mut self, rule: &Resolved, call: &Call, of: Owner, cell: &mut usize) -> Option<bool> {
        let mut answer = |any: bool, rules: &[Resolved]| {
            let mut cells = *cell;
            let mut result = Some(!any);
            for rule in rules {
                let mut own = cells;
                cells += tune::cells(rule).len();
                if result == Some(!any) {
                    result = self.ask(rule, call, of, &mut own);
                }
            }
            *cell = cells;
            result
        };
        match rule {
            Resolved::Not(rule) => self.ask(rule, call, of, cell).map(|answer| !answer),
            Resolved::All(rules) => answer(false, rules),
            Resolved::Any(rules) => answer(true, rules),
            Resolved::Check(check) => self.ask_one(check, call, of, *cell),
        }
    }

    fn ask_one(&mut self, check: &Check, call: &Call, of: Owner, cell: usize) -> Option<bool> {
        let mut counter = |index: usize, by: i64| {
            let key = (of.bound, of.choice, index);
            let count = self.model.get_mut(&key).unwrap();
            let before = *count;
            *count = count.wrapping_add_signed(by);
            before
        };
        Some(match check {
            Check::Order { value, order, with } => {
                let (is, with) = (self.value(value, call)?, number(value, *with));
                match order {
                    Order::Equal => is == with,
                    Order::NotEqual => is != with,
                    Order::Below => is < with,
                    Order::AtMost => is <= with,
                    Order::Above => is > with,
                    Order::AtLeast => is >= with,
                }
            }
            Check::In { value, spans } => {
                let is = self.value(value, call)?;
                spans.iter().any(|span| match span {
                    Span::One(one) => is == number(value, *one),
                    Span::Range(low, high) => {
                        (number(value, *low)..=number(value, *high)).contains(&is)
                    }
                })
            }
            Check::Comm { bytes, .. } => call.comm.starts_with(bytes),
            Check::Kthread { .. } => call.kthread,
            Check::InSet { value, set } => {
                let bits = value
                    .bits
                    .map_or(u32::from(value.size) * 8, |(_, count)| count.into());
                let key = self.value(value, call)? & ((1_i128 << bits) - 1);
                self.sets[set].contains(u64::try_from(key).unwrap())
            }
            Check::Share { last } => {
                counter(cell + 1, 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) <= *last
            }
            Check::First { limit } => {
                counter(cell + 1, 0) < *limit && counter(cell + 1, 1) < *limit
            }
            Check::Rate { .. } => {
                counter(cell, 0).cast_signed() > 0 && counter(cell, -1).cast_signed() > 0
            }
            Check::During(_) => counter(cell, 0) != 0,
            Check::Predicate { .. } => call.answer & 0xff != 0,
        })
    }

    /// The value of `of` as a number.
    fn value(&self, of: &Value, call: &Call) -> Option<i128> {
        let mut at = match of.from {
            Source::Task => TASK,
            Source::Cpu => call.cpu.into(),
            Source::Argument(number) => call.arguments[usize::from(number)],
        };
        if let Some((last, before)) = of.loads.split_last() {
            let read = |at: u64, size: u8| {
                let kernel = (0xff00_0000_0000_0000..=VSYSCALL - 8).contains(&at);
                self.run.load(at, size.into()).filter(|_| kernel)
            };
            for offset in before {
                at = read(at.wrapping_add(u64::from(*offset)), 8)?;
            }
            at = read(at.wrapping_add(u64::from(*last)), of.size)?;
        }
        let (first, count) = of.bits.unwrap_or((0, of.size * 8));
        let bits = (u128::from(at) >> first) & ((1 << count) - 1);
        let bits = i128::try_from(bits).unwrap();
        let negative = of.signed && bits >> (count - 1) != 0;
        Some(if negative { bits - (1 << count) } else { bits })
    }
}

/// A constant as the number that it is for `value`.
pub(super) fn number(value: &Value, constant: u64) -> i128 {
    if value.signed {
        constant.cast_signed().into()
    } else {
        constant.into()
    }
}

/// What an interrupt does to what is below the stack pointer; and the caller is found frame by frame: what is neither in a thunk, which has `pushed`
/// so much, nor the caller's own has just been entered.
fn interrupted(run: &mut Run, pushed: &[(Gva, i16)]) {
    let sp = run.get(Register::RSP);
    (1..9).for_each(|word| run.store(sp - 8 * word, 8, 0x6666_6666_6666_6666));
    if run.rip == THUNK {
        return;
    }
    let own = [
        CODE..CODE + 0x800,
        HANDLER..HANDLER + 0x10_0000,
        ASKS..ASKS + 0x100,
    ];
    let (mut ip, mut sp) = (run.rip, sp);
    for _ in 0..4 {
        let of_thunk = (ASKS..ASKS + 0x100).contains(&ip);
        let rule = pushed.iter().rfind(|(at, _)| of_thunk && at.0 <= ip);
        sp += 8 + rule.map_or(0, |(_, pushed)| u64::try_from(*pushed).unwrap());
        ip = run.load(sp - 8, 8).unwrap();
        if ip == CALLER {
            assert_eq!(sp, STACK);
            return;
        }
        assert!(own.iter().any(|range| range.contains(&ip)), "{ip:#x}");
    }
    panic!("the caller is not found");
}

/// Whether a predicate says yes, which is asked at `at`.
pub(super) fn asks(at: u64) -> Resolved {
    let name = "asks".to_owned();
    Resolved::Check(Check::Predicate { name, at: Gva(at) })
}

pub(super) fn task(loads: &[u32], size: u8, signed: bool) -> Value {
    Value {
        from: Source::Task,
        loads: loads.to_vec(),
        size,
        signed,
        bits: None,
    }
}

pub(super) fn argument(number: u8, loads: &[u32], size: u8, signed: bool) -> Value {
    Value {
        from: Source::Argument(number),
        ..task(loads, size, signed)
    }
}

pub(super) fn cpu() -> Value {
    Value {
        from: Source::Cpu,
        ..task(&[], 4, false)
    }
}
