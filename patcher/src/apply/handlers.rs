//! The redirection handlers that are in the arena: where each is made, and what belongs to it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::ApplyError;
use super::arena::{Holdings, Placed as Brought};
use crate::addr::Gva;
use crate::edition::handler::{
    self, Assembled, Bound, Choice, HandlerError, LINE, Owner, Region, Spec,
};
use crate::edition::link::{Placed, Returns};
use crate::edition::list::{Step, UpdateId};
use crate::edition::resident::laid_out;
use crate::edition::set::SetPlace;
use crate::edition::space::ArenaSpace;
use crate::kernel::locate::Kernel;
use crate::kernel::orc::OrcError;
use crate::kernel::unwind::OtherCode;
use crate::plan::target::Target;
use crate::publish::{Fixup, NAME, Symbol, Unit};
use crate::rule::resolve::{Function, PerCpu};

/// Alignment of handlers in bytes: that of the kernel's own functions.
const ALIGN: u64 = 16;
/// The kernel's word for an instruction that, when it faults, goes on elsewhere, whatever the fault (`EX_TYPE_DEFAULT` of kernel
/// `arch/x86/include/asm/extable_fixup_types.h`): a macro, so no type tells it.
const FIXUP_DEFAULT: u32 = 1;

/// What handlers of one kernel are made with.
#[derive(Clone, Debug)]
pub struct Workshop {
    region: Region,
    per_cpu: PerCpu,
    cpus: u32,
}

/// One handler, and its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its function.
    pub function: Gva,
    /// The editions that it leads to, in the order in which they are asked.
    pub way: Vec<Step>,
    /// The same for tasks that are bound to the old side of a switch; none if there is no switch.
    pub bound: Vec<Step>,
    /// Its code.
    pub code: Range<Gva>,
    /// Its cells: the first byte, and how many.
    pub cells: (Gva, u64),
    /// The handler.
    pub assembled: Assembled,
}

/// Calls of a function that are counted: of one that go to this update's edition, or to the original.
pub type Counted = (Gva, Option<UpdateId>);

/// The counters: for each the first of its cells, one for each CPU.
pub type Counters = BTreeMap<Counted, Gva>;

impl Workshop {
    /// A workshop with what all handlers call, and the bytes of that. Room is taken from `space`.
    ///
    /// # Errors
    /// When the kernel does not tell where a CPU keeps its own, or there is no room.
    pub fn new(
        kernel: &Kernel,
        returns: Returns,
        cpus: u32,
        space: &mut ArenaSpace,
    ) -> Result<(Self, Placed), ApplyError> {
        let per_cpu = PerCpu::of(kernel.image(), kernel.slide())?;
        let anywhere = Region::new(space.handlers.range().start, returns)?;
        let at = space.handlers.take(anywhere.bytes.len() as u64, ALIGN)?;
        let region = Region::new(at, returns)?;
        let placed = Placed {
            at: at.0,
            bytes: region.bytes.clone(),
        };
        let workshop = Self {
            region,
            per_cpu,
            cpus,
        };
        Ok((workshop, placed))
    }

    /// All of the handlers' part of the arena, `range`, as the kernel is to know it: whatever handlers there will be, they are unwound alike.
    ///
    /// # Errors
    /// When the kernel's unwind table has no words for it.
    pub fn unit(&self, kernel: &Kernel, range: Range<Gva>) -> Result<Unit, OrcError> {
        let region = &self.region;
        let symbol = |(at, size, name): &(Gva, u64, String)| Symbol {
            at: *at,
            size: *size,
            name: name.clone(),
        };
        let behind = Gva(region.at.0.saturating_add(region.bytes.len() as u64));
        let handlers = Symbol {
            at: behind,
            size: range.end.0.saturating_sub(behind.0),
            name: "exopatch_handler".to_owned(),
        };
        let fixup = |(insn, fixup): &(Gva, Gva)| Fixup {
            insn: *insn,
            fixup: *fixup,
            data: FIXUP_DEFAULT,
        };
        let code = region.at..range.end;
        Ok(Unit {
            name: NAME.to_owned(),
            orc: self::code(kernel, code.clone())?.table,
            code,
            symbols: region
                .symbols
                .iter()
                .map(symbol)
                .chain([handlers])
                .collect(),
            fixups: region.fixups.iter().map(fixup).collect(),
            bugs: None,
        })
    }

    /// Bytes of one counter.
    #[must_use]
    pub fn counter_len(&self) -> u64 {
        u64::from(self.cpus) * LINE
    }

    /// Makes the handler that leads the calls of `target` by `way`, or those of the tasks in a set by another one. It asks for the sets and
    /// predicates of `draft`, and takes its room from there.
    ///
    /// # Errors
    /// When a rule cannot be asked of this function, or there is no room.
    pub(super) fn make(
        &self,
        kernel: &Kernel,
        target: &Target,
        way: &[Step],
        bound: Option<(SetPlace, &[Step])>,
        draft: &mut Holdings,
    ) -> Result<Made, ApplyError> {
        let sets = draft.set_places();
        let (brought, times, space) = (&draft.placed, &draft.clocks.times, &mut draft.space);
        let choices_of = |way| choices(kernel, target, way, brought, times);
        let choices = choices_of(way)?;
        let old = bound.map_or(&[][..], |(_, way)| way);
        let bound = match bound {
            Some((tasks, way)) => Some(Bound {
                tasks,
                choices: choices_of(way)?,
            }),
            None => None,
        };
        let anywhere = space.data.range().start;
        let spec = Spec {
            region: &self.region,
            per_cpu: self.per_cpu,
            cpus: self.cpus,
            bound: bound.as_ref(),
            choices: &choices,
            sets: &sets,
            cells: anywhere,
        };
        let cells_len = spec.cells_len();
        let cells = match cells_len {
            0 => anywhere,
            len => space.data.take(len, LINE)?,
        };
        let spec = Spec { cells, ..spec };
        // Everything that it jumps to is far, so that its length is the same wherever it is.
        let len = |assembled: &Assembled| assembled.bytes.len() as u64;
        let room = len(&handler::assemble(&spec, space.handlers.range().start)?);
        let at = space.handlers.take(room, ALIGN)?;
        let assembled = handler::assemble(&spec, at)?;
        if len(&assembled) != room {
            let cause = format!(
                "it is {} bytes long here, {room} elsewhere",
                len(&assembled)
            );
            return Err(HandlerError::Assembler { cause }.into());
        }
        Ok(Made {
            function: target.function,
            way: way.to_vec(),
            bound: old.to_vec(),
            code: at..Gva(at.0.saturating_add(room)),
            cells: (cells, cells_len),
            assembled,
        })
    }
}

/// `target` as rules are asked of it, by an update with these predicates.
pub(super) fn asked_of<'a>(
    kernel: &'a Kernel,
    target: &'a Target,
    predicates: &'a BTreeMap<String, Gva>,
) -> Function<'a> {
    Function {
        image: kernel.image(),
        types: kernel.image().types(),
        name: &target.name,
        predicates,
    }
}

/// The editions of a way as a handler knows them.
fn choices(
    kernel: &Kernel,
    target: &Target,
    way: &[Step],
    brought: &BTreeMap<UpdateId, Arc<Brought>>,
    times: &BTreeMap<String, bool>,
) -> Result<Vec<Choice>, ApplyError> {
    let choice = |step: &Step| {
        let mut going_by = step.rule.iter().flat_map(|rule| rule.times());
        if let Some(name) = going_by.find(|name| !times.contains_key(*name)) {
            let name = name.to_owned();
            return Err(ApplyError::NoTime { name });
        }
        let brought = step.update.and_then(|update| brought.get(&update));
        let predicates = brought.map(|brought| brought.linked.predicates());
        let predicates = predicates.unwrap_or_default();
        let function = asked_of(kernel, target, &predicates);
        let rule = step.rule.as_ref().map(|rule| function.resolve(rule));
        Ok(Choice {
            rule: rule.transpose()?,
            to: step.to,
            counter: step.counter,
        })
    };
    way.iter().map(choice).collect()
}

impl Made {
    /// The edition, and its rule, that a cell belongs to.
    pub(super) fn step(&self, of: Owner) -> Option<&Step> {
        let way = if of.bound { &self.bound } else { &self.way };
        way.get(of.choice)
    }

    /// Has the counts of rules go on where those of `old` are, as `read` reads them: of editions that both lead to by the same rule.
    pub(super) fn go_on(&mut self, old: &Self, read: impl Fn(Gva) -> Option<u64>) {
        let bound = (0..self.bound.len()).map(|choice| (true, choice));
        let all = bound.chain((0..self.way.len()).map(|choice| (false, choice)));
        for (bound, choice) in all {
            let of = Owner { bound, choice };
            let Some(step) = self.step(of) else { continue };
            let same = |before: &Step| (before.update, &before.rule) == (step.update, &step.rule);
            let Some(before) = old.way.iter().position(same) else {
                continue;
            };
            let before = Owner {
                bound: false,
                choice: before,
            };
            let values = old.assembled.cells_of(before);
            let values: Vec<Option<u64>> = values.map(|cell| read(cell.at)).collect();
            let cells = self.assembled.cells.iter_mut();
            let cells = cells.filter(|cell| cell.of == of).zip(values);
            for (cell, value) in cells.filter(|(cell, _)| cell.what.is_written()) {
                cell.initial = value.unwrap_or(cell.initial);
            }
        }
    }

    /// What is to be written: its code and its cells, as they begin.
    #[must_use]
    pub fn placed(&self) -> [Placed; 2] {
        let (at, len) = self.cells;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        for cell in &self.assembled.cells {
            let offset = cell
                .at
                .offset_from(at)
                .and_then(|offset| usize::try_from(offset).ok());
            let room = offset.and_then(|offset| bytes.get_mut(offset..offset.checked_add(8)?));
            if let Some(room) = room {
                room.copy_from_slice(&cell.initial.to_le_bytes());
            }
        }
        let code = Placed {
            at: self.assembled.at.0,
            bytes: self.assembled.bytes.clone(),
        };
        [code, Placed { at: at.0, bytes }]
    }
}

/// All of the handlers' part of the arena as code that threads may be in. Whatever is made in it pushes nothing: the caller is everywhere where it is
/// at the beginning.
///
/// # Errors
/// When the kernel's unwind table has no words for it.
pub(super) fn code(kernel: &Kernel, range: Range<Gva>) -> Result<OtherCode, OrcError> {
    let table = match kernel.image().orc() {
        Ok(like) => {
            let entered = like.entered(0);
            let entered = entered.ok_or(OrcError::Field { field: "sp_offset" })?;
            Some(laid_out(&range, vec![(range.start, entered)], like)?)
        }
        Err(OrcError::Absent { .. }) => None,
        Err(other) => return Err(other.clone()),
    };
    Ok(OtherCode {
        name: "a redirection handler".to_owned(),
        range,
        table,
    })
}
