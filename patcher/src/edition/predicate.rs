//! Whether the predicates of a package can be asked on any call: whether all that they may run is the package's own.
//!
//! A predicate runs before the function that it is asked about, wherever that is called. If it could come to a redirected function, that
//! function's handler would ask again, and so on. What a function of the kernel may come to nobody can tell for all of them, and which are
//! redirected changes, so the rule is a simple one: a predicate calls, and jumps to, nothing but code of its own package, and no edition
//! there; only its return, and the call for tracers at its beginning, which becomes a NOP, are the kernel's. Nothing is called by a pointer.
//! Instructions that trap, or change what the processor as a whole does, are refused too: the kernel's handler of a trap may come to anything, and
//! users' memory, which is read between two such instructions, may have to be fetched by one that sleeps. Where a load that may fault
//! has a fixup, that is walked as well.
//!
//! The code is that of the linked package: with the alternatives that were chosen. That a predicate ends is not proved.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use super::object::{Edition, Package, Place, Relocation, Section};
use super::reloc::Kind;
use crate::publish::FIXUPS;
use crate::x86::insn;

/// The longest instruction, in bytes.
const LONGEST: usize = 15;
/// The most bytes that a relocation fills in.
const WIDEST: usize = 8;

/// A predicate that cannot be asked on any call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "predicate {predicate} cannot be asked: at {at} it {does}; a predicate may run code of its own package only, and no edition, so let it read what it needs itself"
)]
pub struct PredicateError {
    /// Its name.
    pub predicate: String,
    /// Where, as the name of a function or section and an offset.
    pub at: String,
    /// What it may not.
    pub does: Forbidden,
}

/// What a predicate may not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// It leaves the package.
    #[error("calls or jumps to `{symbol}`, which is not in the package")]
    Leaves {
        /// To this symbol.
        symbol: String,
    },
    /// It calls by a pointer.
    #[error("calls or jumps by a pointer (`{text}`)")]
    Pointer {
        /// The instruction.
        text: String,
    },
    /// It comes to an edition.
    #[error("runs the edition of {function}")]
    Edition {
        /// The function that it is an edition of.
        function: String,
    },
    /// It traps, returns from a trap, or changes the processor.
    #[error(
        "runs `{text}`, as a warning, access to users' memory or a change of interrupts does, which the kernel's own code would have to answer"
    )]
    Traps {
        /// The instruction.
        text: String,
    },
    /// Its instructions cannot be told.
    #[error("is no code that can be followed")]
    Unknown,
}

/// A place in the package: a section's index, and an offset.
type At = (usize, u64);

/// Checks all predicates of `package`, whose sections are `sections` as they will be in the guest but for relocations.
///
/// # Errors
/// [`PredicateError`] of the first that cannot be asked.
pub fn check(package: &Package, sections: &[Section]) -> Result<(), PredicateError> {
    if package.predicates().is_empty() {
        return Ok(());
    }
    let editions = package.redirected();
    let mut walk = Walk {
        package,
        sections,
        editions: editions.map(|it| ((it.section, it.offset), it)).collect(),
        relocations: BTreeMap::new(),
        fixups: fixups(package, sections),
        seen: BTreeSet::new(),
        ahead: Vec::new(),
    };
    for (section, of) in sections.iter().enumerate().filter(|(_, of)| of.code) {
        let all = of.relocations.iter();
        walk.relocations
            .extend(all.map(|it| ((section, it.offset), it)));
    }
    for predicate in package.predicates() {
        walk.ahead.push((predicate.section, predicate.offset));
        while let Some(at) = walk.ahead.pop() {
            let done = walk.step(at);
            done.map_err(|does| PredicateError {
                predicate: predicate.name.clone(),
                at: name(package, at),
                does,
            })?;
        }
    }
    Ok(())
}

/// Where each instruction with an entry in the exception table goes on. Of the two places of an entry each leads to the other, so that it does not
/// matter which comes first.
fn fixups(package: &Package, sections: &[Section]) -> BTreeMap<At, Vec<At>> {
    let tables = sections.iter().filter(|section| section.name == FIXUPS);
    let mut fixups: BTreeMap<At, Vec<At>> = BTreeMap::new();
    for table in tables {
        let mut places: Vec<(usize, At)> = table
            .relocations
            .iter()
            .filter_map(|it| {
                let place = package.symbols().get(it.symbol)?.place;
                let Place::Here(section, base) = place else {
                    return None;
                };
                let is_code = sections.get(section).is_some_and(|section| section.code);
                let to = base.checked_add_signed(it.addend)?;
                is_code.then_some((it.offset, (section, to)))
            })
            .collect();
        places.sort_unstable();
        for pair in places.chunks(2) {
            if let [(_, one), (_, other)] = pair {
                fixups.entry(*one).or_default().push(*other);
                fixups.entry(*other).or_default().push(*one);
            }
        }
    }
    fixups
}

/// What is at `at`, for people to read.
fn name(package: &Package, (section, offset): At) -> String {
    let functions = package.functions().iter();
    let mut around = functions.filter(|it| {
        let end = it.offset.saturating_add(it.size);
        it.section == section && (it.offset..end).contains(&offset)
    });
    let (name, from) = match around.next() {
        Some(function) => (function.name.as_str(), function.offset),
        None => {
            let section = package.sections().get(section);
            (section.map_or("", |section| section.name.as_str()), 0)
        }
    };
    format!("{name}+{:#x}", offset.wrapping_sub(from))
}

/// All code that predicates may come to, followed instruction by instruction.
struct Walk<'a> {
    package: &'a Package,
    sections: &'a [Section],
    editions: BTreeMap<At, &'a Edition>,
    relocations: BTreeMap<(usize, usize), &'a Relocation>,
    fixups: BTreeMap<At, Vec<At>>,
    seen: BTreeSet<At>,
    ahead: Vec<At>,
}

impl Walk<'_> {
    /// Looks at one instruction, and notes those that may come next.
    fn step(&mut self, at: At) -> Result<(), Forbidden> {
        if !self.seen.insert(at) {
            return Ok(());
        }
        if let Some(edition) = self.editions.get(&at) {
            let function = edition.function.clone();
            return Err(Forbidden::Edition { function });
        }
        let (section, offset) = at;
        let start = usize::try_from(offset).map_err(|_| Forbidden::Unknown)?;
        let code = self.sections.get(section).filter(|section| section.code);
        let code = code.and_then(|code| code.bytes.get(start..));
        let code = code.ok_or(Forbidden::Unknown)?;
        let code = code.get(..LONGEST.min(code.len())).unwrap_or_default();
        let mut decoder = Decoder::with_ip(64, code, offset, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(Forbidden::Unknown);
        }
        let immediate = self.fields(at, start, &decoder, &instruction)?;
        if let Some(fixups) = self.fixups.get(&at) {
            self.ahead.extend(fixups);
        }
        let next = (section, instruction.next_ip());
        let text = || insn::disassemble(&instruction);
        if instruction.is_privileged() {
            return Err(Forbidden::Traps { text: text() });
        }
        match instruction.flow_control() {
            FlowControl::Next => self.ahead.push(next),
            FlowControl::UnconditionalBranch => self.branch(next, &instruction, immediate)?,
            FlowControl::ConditionalBranch => {
                self.ahead.push(next);
                self.branch(next, &instruction, immediate)?;
            }
            FlowControl::Call if instruction.is_call_near() => {
                self.ahead.push(next);
                self.branch(next, &instruction, immediate)?;
            }
            FlowControl::Return if instruction.mnemonic() == Mnemonic::Ret => {}
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                return Err(Forbidden::Pointer { text: text() });
            }
            _ => return Err(Forbidden::Traps { text: text() }),
        }
        Ok(())
    }

    /// The relocation of the instruction's immediate, if it has one. Any other is of its displacement: none changes what instruction it is.
    fn fields(
        &self,
        (section, _): At,
        start: usize,
        decoder: &Decoder<'_>,
        instruction: &Instruction,
    ) -> Result<Option<Relocation>, Forbidden> {
        let constants = decoder.get_constant_offsets(instruction);
        let first = start.saturating_sub(WIDEST - 1);
        let behind = start.saturating_add(instruction.len());
        let near = self.relocations.range((section, first)..(section, behind));
        let mut found = None;
        for (_, one) in near {
            if one.offset.saturating_add(one.kind.width()) <= start {
                continue;
            }
            let field = one.offset.checked_sub(start).ok_or(Forbidden::Unknown)?;
            let is = |has, at, size| has && (field, one.kind.width()) == (at, size);
            let immediate = is(
                constants.has_immediate(),
                constants.immediate_offset(),
                constants.immediate_size(),
            );
            let displacement = is(
                constants.has_displacement(),
                constants.displacement_offset(),
                constants.displacement_size(),
            );
            match (immediate, displacement) {
                (true, _) => found = Some((*one).clone()),
                (false, true) => {}
                (false, false) => return Err(Forbidden::Unknown),
            }
        }
        Ok(found)
    }

    /// Notes where a direct branch leads, with `next` behind it.
    fn branch(
        &mut self,
        (section, next): At,
        instruction: &Instruction,
        relocation: Option<Relocation>,
    ) -> Result<(), Forbidden> {
        let Some(relocation) = relocation else {
            self.ahead.push((section, instruction.near_branch_target()));
            return Ok(());
        };
        let symbol = self.package.symbols().get(relocation.symbol);
        let symbol = symbol.ok_or(Forbidden::Unknown)?;
        let is_call = instruction.is_call_near();
        let (to, base) = match symbol.place {
            Place::Here(to, base) => (to, base),
            Place::Kernel | Place::At(_) | Place::LeftOut => {
                return match symbol.name.as_str() {
                    "__fentry__" if is_call => Ok(()),
                    "__x86_return_thunk" if !is_call => Ok(()),
                    name => Err(Forbidden::Leaves {
                        symbol: name.to_owned(),
                    }),
                };
            }
        };
        if relocation.kind != Kind::Pc32 {
            return Err(Forbidden::Unknown);
        }
        // The field holds the distance from itself, the processor adds it to what is behind the instruction.
        let behind = next.wrapping_sub(relocation.offset as u64);
        let target = base
            .wrapping_add_signed(relocation.addend)
            .wrapping_add(behind);
        self.ahead.push((to, target));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
