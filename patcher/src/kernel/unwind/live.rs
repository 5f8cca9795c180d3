//! The live part of the stack that is being followed: read once, when it is come to, from the stack pointer to its end.
//!
//! A word that is not in it is not believed. From one stack the way leads only to one that may lie beneath it, and to none twice.

use super::known::{Known, KnownStacks, Owner};
use super::reason::Reason;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::bytes::le_u64;
use crate::kernel::memory::Memory;
use crate::kernel::tasks::Tasks;

/// Where a walk is.
pub(crate) struct Live<'a, R: ?Sized> {
    memory: &'a Memory<'a, R>,
    stacks: KnownStacks<'a>,
    current: Option<Known>,
    from: Gva,
    bytes: Vec<u8>,
    /// Starts of the stacks that were come to.
    visited: Vec<Gva>,
}

impl<'a, R: ReadPhys + ?Sized> Live<'a, R> {
    pub(crate) fn new(memory: &'a Memory<'a, R>, tasks: &'a Tasks) -> Self {
        Self {
            memory,
            stacks: KnownStacks::of(tasks),
            current: None,
            from: Gva(0),
            bytes: Vec::new(),
            visited: Vec::new(),
        }
    }

    /// Begins anew, on no stack.
    pub(crate) fn leave(&mut self) {
        self.current = None;
        self.visited.clear();
    }

    /// The stack that the walk is on.
    pub(crate) fn current(&self) -> Option<&Known> {
        self.current.as_ref()
    }

    /// Whose it is.
    pub(crate) fn owner(&self) -> Option<Owner> {
        self.current.as_ref().map(|known| known.owner)
    }

    /// The stacks that were come to since it began, by their lowest addresses.
    pub(crate) fn visited(&self) -> &[Gva] {
        &self.visited
    }

    /// Whether `at` is on the stack that the walk is on.
    pub(crate) fn is_on(&self, at: Gva) -> bool {
        self.current
            .as_ref()
            .is_some_and(|known| known.range.contains(&at))
    }

    /// The word at `at`, which must be in the live part of the stack.
    pub(crate) fn word(&self, at: Gva) -> Result<u64, Reason> {
        let offset = at
            .offset_from(self.from)
            .filter(|_| self.current.is_some())
            .and_then(|offset| usize::try_from(offset).ok());
        let word = offset.filter(|offset| offset.is_multiple_of(8));
        word.and_then(|offset| le_u64(&self.bytes, offset))
            .ok_or(Reason::Outside { at })
    }

    /// Goes over to the stack that a stack pointer of `sp` means, if that is another one.
    pub(crate) fn go_beneath(&mut self, sp: Gva) -> Result<(), Reason> {
        let within = |known: &Known| known.range.start <= sp && sp <= known.range.end;
        if self.current.as_ref().is_some_and(within) {
            return Ok(());
        }
        let known = self.stacks.of_pointer(sp);
        let known = known.ok_or(Reason::NoStack { at: sp })?;
        let beneath = match &self.current {
            None => self.visited.is_empty(),
            Some(over) => {
                over.owner.may_lie_over(known.owner) && !self.visited.contains(&known.range.start)
            }
        };
        if !beneath {
            return Err(Reason::Order { at: sp });
        }
        self.enter(known, sp)
    }

    /// Goes over to the stack that `at` is in, whatever lies over it: entry code that has left the stack on which it came from the
    /// user finds the user's registers there by a register.
    pub(crate) fn look_aside(&mut self, at: Gva) -> Result<(), Reason> {
        let known = self.stacks.at(at);
        self.enter(known.ok_or(Reason::NoStack { at })?, at)
    }

    fn enter(&mut self, known: Known, from: Gva) -> Result<(), Reason> {
        if !from.0.is_multiple_of(8) {
            return Err(Reason::Outside { at: from });
        }
        let len = known
            .range
            .end
            .offset_from(from)
            .and_then(|len| usize::try_from(len).ok());
        self.bytes.resize(len.unwrap_or(0), 0);
        self.from = from;
        self.visited.push(known.range.start);
        self.current = Some(known);
        self.memory
            .read(from, &mut self.bytes)
            .map_err(Reason::unreadable)
    }
}
