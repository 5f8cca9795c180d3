//! A rule with everything looked up: registers, offsets, widths and signs instead of names.
//!
//! What a rule asks of an argument is told by the function's prototype and the kernel's types (BTF), what it asks of the task by the members
//! of `task_struct`. Every constant is proved to be one that the value compared with it can have. Nothing of a guest is read.

use std::collections::BTreeMap;

use super::{
    Argument, Comparison, During, Literal, Operand, Order, Path, Rule, Span as Written, Step, Test,
};
use crate::addr::Gva;
use crate::kernel::image::Image;
use crate::kernel::layout::{LayoutError, hot};
use crate::kernel::symbols::SymbolError;
use crate::kernel::types::access::{AccessError, Hop, Which};
use crate::kernel::types::{TypeError, Types};

/// Bit of `task_struct.flags` that kernel threads have (`PF_KTHREAD`, kernel `include/linux/sched.h`): a macro, so no type tells it.
pub(crate) const KERNEL_THREAD: u32 = 0x0020_0000;

/// Why a rule cannot be asked of a function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// An argument does not lead to such a value.
    #[error("`{what}`: {cause}")]
    Access {
        /// The test, as written.
        what: String,
        /// Why not.
        cause: AccessError,
    },
    /// The kernel has no such thing.
    #[error("`{what}`: {cause}")]
    Type {
        /// The test, as written.
        what: String,
        /// What it lacks.
        cause: TypeError,
    },
    /// The kernel's symbols do not tell where a processor keeps what is its own.
    #[error("where a processor keeps its task and its number cannot be told: {0}")]
    Symbol(#[from] SymbolError),
    /// Nor do its types.
    #[error("where a processor keeps its task and its number cannot be told: {0}")]
    PerCpu(TypeError),
    /// They are out of reach of an instruction.
    #[error(
        "where a processor keeps its {name} cannot be told: {at:#x} is out of an instruction's reach"
    )]
    FarPerCpu {
        /// Which of them.
        name: &'static str,
        /// From the base of what is the processor's own, in bytes.
        at: u64,
    },
    /// The value compared with is none that can be.
    #[error("`{what}` is never {value}: it is from {low} to {high}")]
    Never {
        /// What is compared.
        what: String,
        /// With what.
        value: i128,
        /// The lowest value that it can have.
        low: i128,
        /// The highest.
        high: i128,
    },
    /// The update has no such predicate.
    #[error(
        "no predicate of the update is called {name}{}; its package has to define it with EXOPATCH_PREDICATE({name}, parameters)",
        if known.is_empty() { String::new() } else { format!(", only {}", known.join(", ")) }
    )]
    NoPredicate {
        /// The name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A range that begins behind its end.
    #[error("`{what}` is in no range from {low} to {high}")]
    Empty {
        /// What is compared.
        what: String,
        /// Its beginning.
        low: i128,
        /// Its end.
        high: i128,
    },
}

impl From<LayoutError> for ResolveError {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Symbol(error) => Self::Symbol(error),
            LayoutError::Type(error) => Self::PerCpu(error),
        }
    }
}

/// A rule with nothing left to look up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// One test.
    Check(Check),
    /// The opposite.
    Not(Box<Resolved>),
    /// All of these, asked in order until one is false.
    All(Vec<Resolved>),
    /// Any of these, asked in order until one is true.
    Any(Vec<Resolved>),
}

/// One test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// A value has this order to a constant.
    Order {
        /// The value.
        value: Value,
        /// The order.
        order: Order,
        /// The constant, extended to 64 bits as the value's sign says.
        with: u64,
    },
    /// A value is one of these.
    In {
        /// The value.
        value: Value,
        /// The constants.
        spans: Vec<Span>,
    },
    /// The first bytes of the task's name are these, its final zero among them if the whole name is to be.
    Comm {
        /// Offset of the name in the task, in bytes.
        offset: u32,
        /// The bytes: 1 to 16.
        bytes: Vec<u8>,
    },
    /// The task is a kernel thread.
    Kthread {
        /// Offset of the flags in the task, in bytes.
        flags: u32,
    },
    /// A value, of which the bytes that are not there count as zero, is in a set.
    InSet {
        /// The value.
        value: Value,
        /// Name of the set.
        set: String,
    },
    /// So many of the calls.
    Share {
        /// A call is one of them if its place, of 2^64 that all calls are spread over evenly, is at most this.
        last: u64,
    },
    /// The first calls.
    First {
        /// How many.
        limit: u64,
    },
    /// So many calls in a second.
    Rate {
        /// How many.
        calls: u64,
    },
    /// The host says so.
    During(During),
    /// A predicate answers yes: a `bool`.
    Predicate {
        /// Its name.
        name: String,
        /// What is called to ask it, which leaves the arguments as they are.
        at: Gva,
    },
}

/// One constant or a range of them, both ends included; extended as the value's sign says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// This one.
    One(u64),
    /// From the first to the second.
    Range(u64, u64),
}

/// A value that a handler can get at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Where the way to it begins.
    pub from: Source,
    /// Offsets, in bytes, at which a pointer is read, and at the last the value. None when it is where the way begins.
    pub loads: Vec<u32>,
    /// Bytes of it, or of what is read to get at its bits: 1, 2, 4 or 8.
    pub size: u8,
    /// Whether it has a sign.
    pub signed: bool,
    /// For a bit field: its first bit in what is read, and how many it has.
    pub bits: Option<(u8, u8)>,
}

impl Value {
    /// Whether it is told apart by 32 bits.
    #[must_use]
    pub fn is_half(&self) -> bool {
        self.size <= 4 && self.bits.is_none()
    }
}

/// Where the way to a value begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The address of the current task.
    Task,
    /// The number of this processor.
    Cpu,
    /// The argument with this number, from 0.
    Argument(u8),
}

/// What each processor has of its own, as displacements from its `gs` base, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerCpu {
    /// The address of its current task.
    pub current: i32,
    /// Its number.
    pub cpu: i32,
}

impl PerCpu {
    /// Those of the kernel of `image`, which runs `slide` bytes above where it was linked.
    ///
    /// # Errors
    /// [`ResolveError::Symbol`], [`ResolveError::PerCpu`] or [`ResolveError::FarPerCpu`].
    pub fn of(image: &Image, slide: u64) -> Result<Self, ResolveError> {
        // Where per-CPU variables are linked into the image, the base is such that their running addresses are what is added to it.
        let base = match image.symbols().percpu_start().0 {
            0 => 0,
            start => start.wrapping_add(slide),
        };
        let at = |name, shown| {
            let at = base.wrapping_add(hot(image, name)?);
            i32::try_from(at.cast_signed()).map_err(|_| ResolveError::FarPerCpu { name: shown, at })
        };
        Ok(Self {
            current: at("current_task", "task")?,
            cpu: at("cpu_number", "number")?,
        })
    }
}

/// A function that a rule is to be asked of.
#[derive(Clone, Copy, Debug)]
pub struct Function<'a> {
    /// The kernel.
    pub image: &'a Image,
    /// The types that the function is described by: the kernel's, or those of its module.
    pub types: &'a Types,
    /// Its name.
    pub name: &'a str,
    /// Where the predicates are asked that the rule's update has brought, by name.
    pub predicates: &'a BTreeMap<String, Gva>,
}

impl Function<'_> {
    /// `rule` with everything looked up.
    ///
    /// # Errors
    /// [`ResolveError`].
    pub fn resolve(&self, rule: &Rule) -> Result<Resolved, ResolveError> {
        let all = |rules: &[Rule]| {
            let all = rules.iter().map(|rule| self.resolve(rule));
            all.collect::<Result<Vec<_>, _>>()
        };
        Ok(match rule {
            Rule::Test(test) => Resolved::Check(self.check(test)?),
            Rule::Not(rule) => Resolved::Not(Box::new(self.resolve(rule)?)),
            Rule::All(rules) => Resolved::All(all(rules)?),
            Rule::Any(rules) => Resolved::Any(all(rules)?),
        })
    }

    fn check(&self, test: &Test) -> Result<Check, ResolveError> {
        Ok(match test {
            Test::Compare { what, with } => self.compare(what, with)?,
            Test::InSet { what, set } => Check::InSet {
                value: self.value(what)?.0,
                set: set.clone(),
            },
            Test::Comm { name, prefix } => {
                let end = if *prefix { None } else { Some(0) };
                Check::Comm {
                    offset: self.task("comm", test)?,
                    bytes: name.bytes().chain(end).collect(),
                }
            }
            Test::Kthread => Check::Kthread {
                flags: self.task("flags", test)?,
            },
            Test::Share { part, of } => Check::Share {
                last: last_of_share(*part, *of),
            },
            Test::First(calls) => Check::First { limit: *calls },
            Test::Rate(calls) => Check::Rate { calls: *calls },
            Test::During(during) => Check::During(during.clone()),
            Test::Predicate(name) => {
                let at = self.predicates.get(name).copied();
                let at = at.ok_or_else(|| ResolveError::NoPredicate {
                    name: name.clone(),
                    known: self.predicates.keys().cloned().collect(),
                })?;
                Check::Predicate {
                    name: name.clone(),
                    at,
                }
            }
        })
    }

    fn compare(&self, what: &Operand, with: &Comparison) -> Result<Check, ResolveError> {
        let (value, enumeration) = self.value(what)?;
        let constant = |literal: &Literal| {
            let number = match literal {
                Literal::Number(number) => *number,
                Literal::Name(name) => {
                    let own = enumeration.as_deref();
                    let own = own.and_then(|own| self.types.enumerator(own, name).ok());
                    let found = own.map_or_else(|| self.types.any_enumerator(name), Ok);
                    let found = found.map_err(|cause| type_error(what, cause))?;
                    found.into()
                }
            };
            let (low, high) = value.bounds();
            if number < low || number > high {
                let what = what.to_string();
                return Err(ResolveError::Never {
                    what,
                    value: number,
                    low,
                    high,
                });
            }
            Ok((extended(number), number))
        };
        let spans = match with {
            Comparison::Order(order, literal) => {
                let with = constant(literal)?.0;
                return Ok(Check::Order {
                    value,
                    order: *order,
                    with,
                });
            }
            Comparison::In(spans) => spans,
        };
        let span = |span: &Written| match span {
            Written::One(literal) => Ok(Span::One(constant(literal)?.0)),
            Written::Range(low, high) => {
                let ((low, first), (high, last)) = (constant(low)?, constant(high)?);
                if first > last {
                    let what = what.to_string();
                    return Err(ResolveError::Empty {
                        what,
                        low: first,
                        high: last,
                    });
                }
                Ok(Span::Range(low, high))
            }
        };
        let spans = spans.iter().map(span).collect::<Result<_, _>>()?;
        Ok(Check::In { value, spans })
    }

    /// What `what` is, and the enumeration that its values are of.
    fn value(&self, what: &Operand) -> Result<(Value, Option<String>), ResolveError> {
        let task = |loads: Vec<u32>, size, signed| Value {
            from: Source::Task,
            loads,
            size,
            signed,
            bits: None,
        };
        let value = match what {
            Operand::Pid => task(vec![self.task("pid", what)?], 4, true),
            Operand::Tgid => task(vec![self.task("tgid", what)?], 4, true),
            Operand::Uid => {
                let uid = self.offset("cred", "uid.val", what)?;
                task(vec![self.task("cred", what)?, uid], 4, false)
            }
            Operand::Task => task(Vec::new(), 8, false),
            Operand::Cgroup => task(vec![self.task("cgroups", what)?], 8, false),
            Operand::Cpu => Value {
                from: Source::Cpu,
                ..task(Vec::new(), 4, false)
            },
            Operand::Argument(path) => return self.argument(path, what),
        };
        Ok((value, None))
    }

    fn argument(
        &self,
        path: &Path,
        what: &Operand,
    ) -> Result<(Value, Option<String>), ResolveError> {
        let which = match &path.argument {
            Argument::Number(number) => Which::Number((*number).into()),
            Argument::Name(name) => Which::Name(name),
        };
        let hop = |step| match step {
            &Step::Index(index) => Hop::Index(index),
            Step::Member { name, .. } => Hop::Member(name),
        };
        let hops: Vec<Hop<'_>> = path.steps.iter().map(hop).collect();
        let found = self.types.access(self.name, which, &hops);
        let found = found.map_err(|cause| access_error(what, cause))?;
        let value = Value {
            from: Source::Argument(u8::try_from(found.argument).unwrap_or(u8::MAX)),
            loads: found.loads,
            size: found.size,
            signed: found.signed,
            bits: found.bits,
        };
        Ok((value, found.enumeration))
    }

    /// Offset of `member` of a task, which `what` asks about.
    fn task(&self, member: &str, what: &impl ToString) -> Result<u32, ResolveError> {
        self.offset("task_struct", member, what)
    }

    fn offset(&self, of: &str, member: &str, what: &impl ToString) -> Result<u32, ResolveError> {
        let found = self.image.types().offset_of(of, member);
        let offset = found.map_err(|cause| type_error(what, cause))?;
        u32::try_from(offset).map_err(|_| {
            let name = of.to_owned();
            type_error(what, TypeError::TooLarge { name })
        })
    }
}

impl Value {
    /// The lowest and the highest that it can be.
    #[must_use]
    pub fn bounds(&self) -> (i128, i128) {
        let bits = self
            .bits
            .map_or(u32::from(self.size) * 8, |(_, count)| count.into());
        let above = 1_i128 << bits.min(64);
        if self.signed {
            (-(above / 2), above / 2 - 1)
        } else {
            (0, above - 1)
        }
    }

    /// Whether reading it follows a pointer that the guest's own code gave, which may lead anywhere.
    #[must_use]
    pub fn may_fault(&self) -> bool {
        matches!(self.from, Source::Argument(_)) && !self.loads.is_empty()
    }
}

/// `number` as 64 bits: those of a negative one are its two's complement.
fn extended(number: i128) -> u64 {
    match u64::try_from(number) {
        Ok(number) => number,
        Err(_) => i64::try_from(number).map_or(0, i64::cast_unsigned),
    }
}

/// The last of 2^64 places that belongs to a share of `part` in `of`.
fn last_of_share(part: u64, of: u64) -> u64 {
    let places = (u128::from(part) << 64).div_ceil(u128::from(of.max(1)));
    u64::try_from(places.saturating_sub(1)).unwrap_or(u64::MAX)
}

fn access_error(what: &impl ToString, cause: AccessError) -> ResolveError {
    let what = what.to_string();
    ResolveError::Access { what, cause }
}

fn type_error(what: &impl ToString, cause: TypeError) -> ResolveError {
    let what = what.to_string();
    ResolveError::Type { what, cause }
}
