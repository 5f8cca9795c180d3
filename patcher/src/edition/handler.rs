//! Redirection handlers: the code between a function's jump and its editions, which decides for each call which of them runs.
//!
//! A handler is entered as the function was, and enters an edition as if it had been called: argument and callee-saved registers, the
//! stack and all memory of the guest are as they were. Only `rax`, `r10`, `r11` and the flags change, on which no caller of a
//! function that is redirected relies (see [`crate::plan::reliance`]). It takes no lock, loops nowhere, allocates nothing and jumps nowhere by a
//! pointer, so that it runs in any context on any processor. It pushes nothing: wherever it is interrupted, its caller's address is where the
//! stack pointer points. So it is in the loads that may fault, which it calls in [`Region`]; predicates it asks by a [`Thunk`] in the code of
//! their update, which is unwound by that update's table.
//!
//! Numbers that a rule names are in cells in the arena's data half, which the host may store to at any time: see [`crate::rule::tune`].

mod emit;
mod region;
mod thunk;
mod value;

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

pub use self::region::Region;
pub use self::thunk::Thunk;
use super::link::Returns;
use super::set::SetPlace;
use crate::addr::Gva;
use crate::rule::resolve::{PerCpu, Resolved};
use crate::rule::tune::{self, Use};

/// Bytes that one processor writes at a time: counters and cells that the guest writes lie in different ones.
pub const LINE: u64 = 64;
/// Most processors that counters are for.
const MAX_CPUS: u32 = 8192;

/// Why a handler cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// An address is none that an instruction can name.
    #[error(
        "{what} at {at} is out of a handler's reach: it must lie in the upper 2 GiB, aligned to {align} bytes"
    )]
    OutOfReach {
        /// What lies there.
        what: &'static str,
        /// Where.
        at: Gva,
        /// Its alignment in bytes.
        align: u64,
    },
    /// A rule asks for a set that there is not.
    #[error("no set is called {name}; make it before the rule")]
    NoSet {
        /// Its name.
        name: String,
    },
    /// The last choice must be without a rule, and only it.
    #[error("choice {index} of {count} {}", if index + 1 == *count { "has a rule, so for some calls there is no edition" } else { "has no rule, so those behind it are never made" })]
    Default {
        /// Its place, from 0.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// There is nothing to choose from.
    #[error("there is no edition to choose")]
    NoChoice,
    /// More processors than counters are for.
    #[error("{cpus} processors are more than the {MAX_CPUS} that counters are for")]
    Cpus {
        /// How many.
        cpus: u32,
    },
    /// The assembler refused an instruction.
    #[error("the handler cannot be assembled: {cause}")]
    Assembler {
        /// What it said.
        cause: String,
    },
}

impl From<IcedError> for HandlerError {
    fn from(error: IcedError) -> Self {
        let cause = error.to_string();
        Self::Assembler { cause }
    }
}

/// An edition, and the calls that are for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// For which; the last of a list has none, and gets what is left.
    pub rule: Option<Resolved>,
    /// Where the edition begins.
    pub to: Gva,
    /// Calls that went to the edition, which are those that its rule took, counted in one cell for each processor, [`LINE`] bytes apart.
    pub counter: Option<Gva>,
}

/// Tasks for which another list of choices holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The set of their addresses.
    pub tasks: SetPlace,
    /// What holds for them.
    pub choices: Vec<Choice>,
}

/// All that a handler is made of.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// What it calls.
    pub region: &'a Region,
    /// Where each processor has its own.
    pub per_cpu: PerCpu,
    /// Processors that there may be: numbers from here on are counted nowhere.
    pub cpus: u32,
    /// Tasks that go by other choices.
    pub bound: Option<&'a Bound>,
    /// The choices of all others, in the order in which they are asked.
    pub choices: &'a [Choice],
    /// Sets by name.
    pub sets: &'a BTreeMap<String, SetPlace>,
    /// Where its cells begin: [`Spec::cells_len`] bytes, aligned to [`LINE`].
    pub cells: Gva,
}

/// Eight bytes of the data half that belong to a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Where, aligned to 8 bytes.
    pub at: Gva,
    /// What it holds before the handler runs.
    pub initial: u64,
    /// What it is.
    pub what: Use,
    /// The rule that it belongs to.
    pub of: Owner,
}

/// A rule among a handler's choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Whether of the choices for bound tasks.
    pub bound: bool,
    /// The choice, from 0.
    pub choice: usize,
}

/// A handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembled {
    /// Its first byte.
    pub at: Gva,
    /// Its code.
    pub bytes: Vec<u8>,
    /// Its cells; those of one rule are in the order of [`tune::cells`], one after the other.
    pub cells: Vec<Cell>,
    /// Sets that it looks into for 32 bits: they must get no key of more.
    pub halves: BTreeSet<String>,
}

impl Assembled {
    /// The cells of one rule, in the order of [`tune::cells`], which the indices of [`tune::retune`] are into.
    pub fn cells_of(&self, owner: Owner) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| cell.of == owner)
    }
}

impl Spec<'_> {
    /// Bytes of all cells.
    #[must_use]
    pub fn cells_len(&self) -> u64 {
        let layout = self.cells();
        let end = layout.iter().map(|cell| cell.at.0 + 8).max();
        end.map_or(0, |end| (end - self.cells.0).next_multiple_of(LINE))
    }

    /// All rules, with where they belong.
    fn rules(&self) -> impl Iterator<Item = (Owner, &Resolved)> {
        let bound = self.bound.map_or(&[][..], |bound| &bound.choices);
        let both = [(true, bound), (false, self.choices)].into_iter();
        both.flat_map(|(bound, choices)| {
            let numbered = choices.iter().enumerate();
            numbered.filter_map(move |(choice, of)| {
                let rule = of.rule.as_ref()?;
                Some((Owner { bound, choice }, rule))
            })
        })
    }

    /// The cells: those that only the host writes side by side, then each of the others on a line of its own.
    fn cells(&self) -> Vec<Cell> {
        let mut all = Vec::new();
        for (of, rule) in self.rules() {
            let cells = tune::cells(rule).into_iter();
            all.extend(cells.map(|(what, initial)| Cell {
                at: self.cells,
                initial,
                what,
                of,
            }));
        }
        let read = all.iter().filter(|cell| !cell.what.is_written()).count() as u64;
        let (mut next_read, mut next_written) = (0, (read * 8).next_multiple_of(LINE));
        for cell in &mut all {
            let (next, step) = if cell.what.is_written() {
                (&mut next_written, LINE)
            } else {
                (&mut next_read, 8)
            };
            cell.at = Gva(self.cells.0.saturating_add(*next));
            *next += step;
        }
        all
    }

    /// What is wrong with it whatever its rules.
    fn check(&self) -> Result<(), HandlerError> {
        if self.cpus > MAX_CPUS {
            return Err(HandlerError::Cpus { cpus: self.cpus });
        }
        reach("the beginning of cells", self.cells, LINE)?;
        let bound = self.bound.map(|bound| bound.choices.as_slice());
        for choices in bound.into_iter().chain([self.choices]) {
            let count = choices.len();
            let last = count.checked_sub(1).ok_or(HandlerError::NoChoice)?;
            for (index, choice) in choices.iter().enumerate() {
                if choice.rule.is_some() == (index == last) {
                    return Err(HandlerError::Default { index, count });
                }
                reach("an edition", choice.to, 1)?;
            }
        }
        Ok(())
    }
}

/// Assembles the handler of `spec` to run at `at`.
///
/// # Errors
/// [`HandlerError`].
pub fn assemble(spec: &Spec<'_>, at: Gva) -> Result<Assembled, HandlerError> {
    spec.check()?;
    reach("a handler", at, 1)?;
    let cells = spec.cells();
    let (bytes, halves) = emit::handler(spec, &cells, at)?;
    Ok(Assembled {
        at,
        bytes,
        cells,
        halves,
    })
}

/// `at` as a displacement without a base, if an instruction can name it so.
fn reach(what: &'static str, at: Gva, align: u64) -> Result<i32, HandlerError> {
    let near = i32::try_from(at.0.cast_signed()).ok();
    let near = near.filter(|near| *near < 0 && at.0.is_multiple_of(align));
    near.ok_or(HandlerError::OutOfReach { what, at, align })
}

/// Returns as the kernel's functions do.
fn returned(code: &mut CodeAssembler, returns: Returns) -> Result<(), IcedError> {
    match returns {
        Returns::Plain => {
            code.ret()?;
            code.int3()
        }
        Returns::Thunk(at) => code.jmp(at.0),
    }
}

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
