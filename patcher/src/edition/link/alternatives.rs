//! Chooses the alternatives of a package for the processor that the guest runs on, as the kernel did for its own code at boot.
//!
//! What was chosen takes the place of the code with its relocations, so that it reaches what it did; NOPs fill the rest. Of several
//! for one place the last that is wanted holds. Follows the kernel's `apply_alternatives()` (`arch/x86/kernel/alternative.c`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::edition::object::{AlternativeTable, Package, Pointer, Relocation, Section};
use crate::kernel::alternatives::{Alternative, Alternatives};
use crate::x86::insn;

/// Bytes of the widest relocation.
const WIDEST: usize = 8;

/// Why alternatives cannot be chosen.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlternativeError {
    /// The table is not as this kernel's would be.
    #[error(
        "entry {entry} of the package's table of alternatives {why}; build it again with this kernel's headers"
    )]
    Damaged {
        /// Which entry, from 0.
        entry: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An entry asks for a feature that this kernel does not keep.
    #[error(
        "entry {entry} of the package's table of alternatives asks for feature {feature} of the processor, which this kernel does not know"
    )]
    Feature {
        /// Which entry, from 0.
        entry: usize,
        /// The feature's number.
        feature: u16,
    },
    /// An instruction would lead elsewhere in the place that it is taken to.
    #[error(
        "`{text}` at {section}+{offset:#x} of the package cannot take the place of other code: it leads out of its alternative without a relocation"
    )]
    Stuck {
        /// Name of the section of replacements.
        section: String,
        /// Offset in it.
        offset: usize,
        /// The instruction, disassembled.
        text: String,
    },
    /// Bytes are no instruction.
    #[error("the bytes at {section}+{offset:#x} of the package are not an instruction")]
    Undecodable {
        /// Name of the section of replacements.
        section: String,
        /// Offset in it.
        offset: usize,
    },
}

/// An entry, with where its pointers lead.
#[derive(Clone, Copy, Debug)]
struct Entry {
    number: usize,
    place: Pointer,
    from: Pointer,
    says: Alternative,
}

impl Entry {
    fn damaged(&self, why: &'static str) -> AlternativeError {
        AlternativeError::Damaged {
            entry: self.number,
            why,
        }
    }
}

/// The sections of `package` with the code that `kernel` calls for.
///
/// # Errors
/// [`AlternativeError`].
pub(super) fn choose<'p>(
    package: &'p Package,
    kernel: &Alternatives,
) -> Result<Cow<'p, [Section]>, AlternativeError> {
    let entries = entries(package.alternatives(), kernel)?;
    if entries.is_empty() {
        return Ok(Cow::Borrowed(package.sections()));
    }
    let before: Vec<Draft<'_>> = package.sections().iter().map(Draft::of).collect();
    let mut after = before.clone();
    // Entries for one place follow each other. The outer of nested ones is longer, and a shorter one must fill it.
    for group in entries.chunk_by(|a, b| a.place == b.place) {
        let len = group.iter().map(|entry| entry.says.len).max().unwrap_or(0);
        for entry in group {
            let wanted = entry.says.is_wanted(&kernel.features);
            let wanted = wanted.ok_or(AlternativeError::Feature {
                entry: entry.number,
                feature: entry.says.feature,
            })?;
            // An indirect call through the kernel's table of operations is right as it is, and stays right if the table changes.
            if !wanted || entry.says.direct_call {
                continue;
            }
            let from = before.get(entry.from.section);
            let code =
                from.and_then(|from| from.cut(entry.from.offset, entry.says.replacement_len));
            let code = code.ok_or_else(|| entry.damaged("has a replacement that is no code"))?;
            code.may_move()?;
            let draft = after.get_mut(entry.place.section);
            let put = draft.and_then(|draft| draft.put(entry.place.offset, len, &code));
            put.ok_or_else(|| entry.damaged("is for what is no code that has room for it"))?;
        }
    }
    Ok(after.into_iter().map(Draft::done).collect())
}

/// The entries of `table`, in its order.
fn entries(
    table: &AlternativeTable,
    kernel: &Alternatives,
) -> Result<Vec<Entry>, AlternativeError> {
    let layout = &kernel.layout;
    let chunks = table.bytes.chunks(layout.size).enumerate();
    let decoded = chunks.map(|(number, bytes)| {
        let damaged = |why| AlternativeError::Damaged { entry: number, why };
        let says = layout
            .decode(bytes)
            .filter(|_| bytes.len() == layout.size)
            .ok_or_else(|| damaged("is cut off, or has a flag that is not known here"))?;
        let pointer = |field: usize| {
            let at = number.checked_mul(layout.size)?.checked_add(field)?;
            table.pointers.get(&at).copied()
        };
        let place =
            pointer(layout.place).ok_or_else(|| damaged("does not say where its code is"))?;
        let from = pointer(layout.replacement)
            .ok_or_else(|| damaged("does not say where its replacement is"))?;
        Ok(Entry {
            number,
            place,
            from,
            says,
        })
    });
    decoded.collect()
}

/// A section that is being changed.
#[derive(Clone, Debug)]
struct Draft<'p> {
    of: &'p Section,
    bytes: Vec<u8>,
    /// By offset.
    relocations: BTreeMap<usize, Relocation>,
}

impl<'p> Draft<'p> {
    fn of(of: &'p Section) -> Self {
        let relocations = of.relocations.iter();
        Self {
            of,
            bytes: of.bytes.clone(),
            relocations: relocations.map(|one| (one.offset, one.clone())).collect(),
        }
    }

    fn done(self) -> Section {
        Section {
            bytes: self.bytes,
            relocations: self.relocations.into_values().collect(),
            ..self.of.clone()
        }
    }

    /// Offsets of the relocations that touch `place`; `None` when one lies across its border.
    fn touching(&self, place: &Range<usize>) -> Option<Vec<usize>> {
        let first = place.start.saturating_sub(WIDEST - 1);
        let near = self.relocations.range(first..place.end).map(|(_, one)| one);
        let mut found = Vec::new();
        for one in near {
            let end = one.offset.checked_add(one.kind.width())?;
            if end <= place.start {
                continue;
            }
            if one.offset < place.start || end > place.end {
                return None;
            }
            found.push(one.offset);
        }
        Some(found)
    }

    /// The `len` bytes of code from `start`, with their relocations.
    fn cut(&self, start: usize, len: usize) -> Option<Cut<'_>> {
        let range = start..start.checked_add(len)?;
        let bytes = self.bytes.get(range.clone()).filter(|_| self.of.code)?;
        let offsets = self.touching(&range)?;
        let relocations = offsets.iter().map(|at| self.relocations.get(at).cloned());
        Some(Cut {
            section: &self.of.name,
            start,
            bytes,
            relocations: relocations.collect::<Option<_>>()?,
        })
    }

    /// Puts `code` in place of the `len` bytes of code from `start`, and NOPs behind it.
    fn put(&mut self, start: usize, len: usize, code: &Cut<'_>) -> Option<()> {
        let range = start..start.checked_add(len)?;
        let gone = self.touching(&range)?;
        let place = self.bytes.get_mut(range).filter(|_| self.of.code)?;
        let (head, rest) = place.split_at_mut_checked(code.bytes.len())?;
        head.copy_from_slice(code.bytes);
        rest.copy_from_slice(&insn::nops(rest.len()));
        for offset in gone {
            self.relocations.remove(&offset);
        }
        for one in &code.relocations {
            let offset = start + (one.offset - code.start);
            self.relocations.insert(
                offset,
                Relocation {
                    offset,
                    ..one.clone()
                },
            );
        }
        Some(())
    }
}

/// Code that takes the place of other code.
struct Cut<'a> {
    section: &'a str,
    /// Where it was in its section.
    start: usize,
    bytes: &'a [u8],
    relocations: Vec<Relocation>,
}

impl Cut<'_> {
    /// Whatever it reaches relative to itself it reaches by a relocation, or lies in it.
    fn may_move(&self) -> Result<(), AlternativeError> {
        let mut decoder = Decoder::with_ip(64, self.bytes, self.start as u64, DecoderOptions::NONE);
        let own = self.start..=self.start + self.bytes.len();
        while decoder.can_decode() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                return Err(AlternativeError::Undecodable {
                    section: self.section.to_owned(),
                    offset: self.start + at,
                });
            }
            let Some((field, target)) = reach(&decoder, &instruction) else {
                continue;
            };
            let field = self.start + at + field;
            let related = self.relocations.iter().any(|one| one.offset == field);
            let inside = usize::try_from(target).is_ok_and(|target| own.contains(&target));
            if !related && !inside {
                return Err(AlternativeError::Stuck {
                    section: self.section.to_owned(),
                    offset: self.start + at,
                    text: insn::disassemble(&instruction),
                });
            }
        }
        Ok(())
    }
}

/// What `instruction` reaches relative to itself: the offset of the distance in it, and where that leads.
fn reach(decoder: &Decoder<'_>, instruction: &Instruction) -> Option<(usize, u64)> {
    let constants = decoder.get_constant_offsets(instruction);
    if insn::has_near_target(instruction) {
        return Some((
            constants.immediate_offset(),
            instruction.near_branch_target(),
        ));
    }
    let relative = instruction.is_ip_rel_memory_operand();
    relative.then(|| {
        (
            constants.displacement_offset(),
            instruction.ip_rel_memory_address(),
        )
    })
}
