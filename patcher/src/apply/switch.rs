//! One operation: a draft of who holds what, the plan that makes it true, and the switch from one to the other.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::arena::{Arena, Holdings, Worn};
use super::handlers::{Made, Workshop};
use super::passing::{Model, Passing};
use super::tries::{ApplyOptions, CommitFailed, Report, commit_within};
use super::tune::Clocks;
use super::{ApplyError, returns};
use crate::addr::Gva;
use crate::commit::Scanned;
use crate::edition::handler::LINE;
use crate::edition::link::Placed;
use crate::edition::list::{ListError, Step, UpdateId};
use crate::edition::set::Set;
use crate::guest::Guest;
use crate::kernel::locate::{Kernel, KernelError};
use crate::plan::binding::{Bind, Binding};
use crate::plan::target::Target;
use crate::plan::{ArenaMap, Lead, Plan, PlanError, Purpose};
use crate::publish;
use crate::rule::Rule;

/// Sizes of sets of bound tasks, as powers of two.
const SET_BITS: std::ops::RangeInclusive<u8> = 6..=17;
/// Tasks that may come to the old side between a look and the switch.
const SPARE: usize = 16;

/// An operation in the making. Nothing of it is true before its commit.
#[derive(Debug)]
pub(super) struct Turn {
    /// The update that it is about.
    update: UpdateId,
    /// Whether that comes, or goes.
    coming: bool,
    /// Updates that go.
    going: BTreeSet<UpdateId>,
    /// Tasks that are on the side that everybody goes to already.
    apart: BTreeSet<u64>,
    /// Who will hold what.
    pub(super) draft: Holdings,
    /// What is to be written before anything leads there.
    pub(super) plan: Plan,
    /// Where the arena is.
    pub(super) map: ArenaMap,
}

/// A function that is to be led elsewhere, and the editions that calls may then get to.
type Change = (Target, Vec<Step>);

impl Turn {
    pub(super) fn new(arena: &Arena, update: UpdateId, coming: bool) -> Self {
        Self {
            update,
            coming,
            going: BTreeSet::new(),
            apart: BTreeSet::new(),
            draft: arena.holds.clone(),
            plan: Plan::default(),
            map: ArenaMap::default(),
        }
    }

    /// Finds where the arena is, and plans its mapping.
    pub(super) fn map<G: Guest>(
        &mut self,
        guest: &G,
        kernel: &Kernel,
        arena: &Arena,
    ) -> Result<(), ApplyError> {
        self.map = arena.map(guest, kernel)?;
        self.plan.map(&self.map);
        Ok(())
    }

    /// Takes updates off the lists.
    pub(super) fn leave(&mut self, going: &BTreeSet<UpdateId>) -> Result<(), ListError> {
        self.draft.functions.remove(going)?;
        self.draft.drain(going);
        self.going.clone_from(going);
        Ok(())
    }

    /// Leads every function to where the lists of the draft say, by `model`, and keeps the draft once that is done.
    pub(super) fn switch<G: Guest>(
        mut self,
        guest: &mut G,
        kernel: &Kernel,
        arena: &mut Arena,
        model: Model,
        options: &ApplyOptions<'_>,
    ) -> Result<Report, ApplyError> {
        self.heed_passing(arena)?;
        let changes = self.changes(guest, kernel)?;
        let old = self.old_side(kernel, &arena.holds, &changes);
        let at_once = self.at_once(guest, kernel, &changes)?;
        let (tries, apart) = match model {
            Model::Immediate => (u64::MAX, Vec::new()),
            Model::Quiescent => (u64::MAX, old.clone()),
            Model::PerTask => (1, old.clone()),
        };
        let (draft, mut plan) = at_once;
        plan.forbidden.extend(apart);
        let kept = keep(guest, kernel, arena, draft, plan, tries, options);
        match kept {
            Err(ApplyError::Commit(CommitFailed::Deadline { .. })) if model == Model::PerTask => {
                self.by_task(guest, kernel, arena, &changes, old, options)
            }
            other => other,
        }
    }

    /// A switch of this very update that is under way ends with this one, if everybody goes now to where those are who are bound by it. Where else
    /// they went, they could come to new code beneath old. Those of others are kept out of.
    fn heed_passing(&mut self, arena: &Arena) -> Result<(), ListError> {
        let of_it = |update| self.update == update || self.going.contains(&update);
        let passing = arena.holds.passing.iter();
        let own: Vec<&Passing> = passing.filter(|passing| of_it(passing.update)).collect();
        for passing in &own {
            let functions = end_passing(&mut self.draft, passing.update);
            // In a handler it may be decided already where to go. Who is in a head goes on with the original whatever comes, and so would he
            // behind the head, where nobody looks for him.
            self.plan
                .forbidden
                .extend(arena.holds.choosers_of(&functions));
            self.apart.extend(passing.set.keys());
        }
        let changes = self.draft.changes();
        let mut others = own.iter().filter(|passing| !passing.set.is_empty());
        match others.find(|passing| !goes_back(&arena.holds, passing, &changes)) {
            Some(passing) => Err(passed(&arena.holds, passing)),
            None => self.keep_out_of_others(&arena.holds, &changes),
        }
    }

    /// Whoever is bound by another switch goes on by updates that stay as they are, with all of their functions: so those that go, are used
    /// otherwise, or come to light beneath another must be none of them.
    fn keep_out_of_others(&self, holds: &Holdings, changes: &[Change]) -> Result<(), ListError> {
        let led_to =
            |way: &[Step]| -> Vec<UpdateId> { way.iter().filter_map(|step| step.update).collect() };
        let mut touched = self.going.clone();
        touched.insert(self.update);
        for (target, way) in changes {
            let before = holds.functions.get(target.function);
            let before = before.map_or_else(Vec::new, |function| led_to(&function.way));
            touched.extend(
                led_to(way)
                    .into_iter()
                    .filter(|update| !before.contains(update)),
            );
        }
        let others = self.draft.passing.iter();
        for passing in others.filter(|passing| !passing.set.is_empty()) {
            let made = holds.made.iter();
            let mut made = made.filter(|made| passing.functions.contains(&made.function));
            let of = |made: &Arc<Made>| [led_to(&made.way), led_to(&made.bound)].concat();
            if made.any(|made| of(made).iter().any(|update| touched.contains(update))) {
                return Err(passed(holds, passing));
            }
        }
        Ok(())
    }

    /// The functions that are to be led elsewhere.
    fn changes<G: Guest>(&mut self, guest: &G, kernel: &Kernel) -> Result<Vec<Change>, ApplyError> {
        self.make_counters(guest, kernel)?;
        let changes = self.draft.changes();
        for (target, _) in &changes {
            let mut passing = self.draft.passing.iter();
            let by = passing.find(|passing| passing.functions.contains(&target.function));
            if let Some(passing) = by {
                return Err(ListError::Passing {
                    function: target.name.clone(),
                    by: passing.update,
                }
                .into());
            }
        }
        Ok(changes)
    }

    /// Finds room to count in for all updates whose calls are counted.
    fn make_counters<G: Guest>(&mut self, guest: &G, kernel: &Kernel) -> Result<(), ApplyError> {
        let counted = self.draft.uses.iter().filter(|(_, how)| how.counted);
        let counted: Vec<UpdateId> = counted.map(|(update, _)| *update).collect();
        for update in counted {
            let functions: Vec<Gva> = self.draft.functions.of(update).collect();
            for function in functions {
                for of in [Some(update), None] {
                    if self.draft.counters.contains_key(&(function, of)) {
                        continue;
                    }
                    let workshop = self.workshop(guest, kernel)?;
                    let len = workshop.counter_len();
                    let at = self.draft.space.data.take(len, LINE)?;
                    self.draft.counters.insert((function, of), at);
                    let bytes = vec![0; usize::try_from(len).unwrap_or_default()];
                    self.plan
                        .place(Purpose::Arena, &Placed { at: at.0, bytes }, &self.map)?;
                }
            }
        }
        Ok(())
    }

    fn workshop<G: Guest>(
        &mut self,
        guest: &G,
        kernel: &Kernel,
    ) -> Result<Arc<Workshop>, ApplyError> {
        workshop(guest, kernel, &mut self.draft, &mut self.plan, &self.map)
    }

    /// The code of the old side of `changes`: of a thread in it the next call must still get there. To that belong all functions of the updates
    /// that come, go, or are used otherwise: also where nothing changes, since another one lies on top.
    fn old_side(&self, kernel: &Kernel, before: &Holdings, changes: &[Change]) -> Vec<Range<Gva>> {
        let changed = changes.iter().map(|(target, _)| target.clone());
        let mut sides: BTreeMap<Gva, Target> =
            changed.map(|target| (target.function, target)).collect();
        for update in self.going.iter().chain([&self.update]) {
            for at in before.functions.of(*update) {
                if let Some(function) = before.functions.get(at) {
                    sides.entry(at).or_insert_with(|| function.target.clone());
                }
            }
        }
        let functions: Vec<Gva> = sides.keys().copied().collect();
        let mut old: Vec<Range<Gva>> = before.ways_of(&functions).collect();
        let shares = |update: &UpdateId| {
            before
                .functions
                .of(*update)
                .any(|at| functions.contains(&at))
        };
        for (update, placed) in &before.placed {
            let leaves = if self.coming {
                shares(update) || self.draft.drains.contains_key(update)
            } else {
                self.going.contains(update)
            };
            if leaves {
                old.push(placed.resident.code.range.clone());
            }
        }
        // An edition may jump to its original and leave no frame behind: who is in that then goes on for the edition.
        old.extend(sides.values().flat_map(|target| target.code(kernel)));
        old
    }

    /// The draft and the plan that lead all functions elsewhere for everybody.
    fn at_once<G: Guest>(
        &self,
        guest: &G,
        kernel: &Kernel,
        changes: &[Change],
    ) -> Result<(Holdings, Plan), ApplyError> {
        let (mut draft, mut plan) = (self.draft.clone(), self.plan.clone());
        lead(guest, kernel, &mut draft, &mut plan, &self.map, changes)?;
        Ok((draft, plan))
    }

    /// Switches everybody but the tasks that are in the old side, who go on by it until they were seen outside.
    fn by_task<G: Guest>(
        self,
        guest: &mut G,
        kernel: &Kernel,
        arena: &mut Arena,
        changes: &[Change],
        old: Vec<Range<Gva>>,
        options: &ApplyOptions<'_>,
    ) -> Result<Report, ApplyError> {
        let mut look = Plan {
            group: old.clone(),
            ..Plan::default()
        };
        arena.holds.watch(&mut look);
        let inhabited = arena.inhabited(kernel)?;
        let (_, scanned) = commit_within(guest, &inhabited, &look, u64::MAX, options, &|_| {})?;
        let Self {
            update,
            coming,
            apart,
            mut draft,
            mut plan,
            map,
            ..
        } = self;
        let bits = bits(scanned.inside.len());
        let at = draft.space.data.take(8 << bits, LINE)?;
        let set = Set::new(at, bits)?;
        let tasks = set.place();
        let physical = map
            .physical(at)
            .ok_or(PlanError::NotInArena { at, len: 8 << bits })?;
        let mut worn = Worn::default();
        let workshop = workshop(guest, kernel, &mut draft, &mut plan, &map)?;
        for (target, way) in changes {
            let Some(function) = draft.functions.get(target.function).cloned() else {
                continue;
            };
            let head = head_of(&draft, target);
            let (old, new) = (or_original(&function.way, head), or_original(way, head));
            let bound = Some((tasks, old.as_slice()));
            draft.wear_out(target.function, &mut worn);
            let mut made = workshop.make(kernel, target, &new, bound, &mut draft)?;
            go_on(guest, kernel, &mut made, &worn, &draft.clocks);
            for placed in made.placed() {
                plan.place(Purpose::Arena, &placed, &map)?;
            }
            let to = Lead::Handler(made.assembled.at);
            redirect(guest, kernel, &mut plan, target, function.lead, to)?;
            draft.functions.led(target.function, to, way.clone());
            draft.made.push(Arc::new(made));
        }
        draft.note_rules(Instant::now());
        draft.put_by(worn);
        let binding = Binding {
            set,
            at: physical,
            bind: Bind::Fill { but: apart },
        };
        plan.group.clone_from(&old);
        draft.passing.push(Passing {
            update,
            coming,
            functions: changes.iter().map(|(target, _)| target.function).collect(),
            old,
            set: binding.set.clone(),
            at: physical,
            inside: Vec::new(),
        });
        plan.binding = Some(binding);
        keep(guest, kernel, arena, draft, plan, u64::MAX, options)
    }
}

/// How many slots a set for `tasks` gets, as a power of two: so many that it has room for nearly any of them.
fn bits(tasks: usize) -> u8 {
    let slots = (tasks + SPARE).saturating_mul(4).next_power_of_two();
    let bits = u8::try_from(slots.trailing_zeros()).unwrap_or(u8::MAX);
    bits.clamp(*SET_BITS.start(), *SET_BITS.end())
}

/// Whether `changes` lead everybody, and by nothing but the functions of `passing`, to where those are who are bound by it. Were there other
/// functions, it could not be told what of these a bound task is in.
fn goes_back(holds: &Holdings, passing: &Passing, changes: &[Change]) -> bool {
    // The original is what is left.
    let editions = |way: &[Step]| -> Vec<(UpdateId, Option<Arc<Rule>>)> {
        let steps = way.iter();
        let steps = steps.filter_map(|step| Some((step.update?, step.rule.clone())));
        steps.collect()
    };
    changes.iter().all(|(target, way)| {
        let mut made = holds.made.iter();
        let made = made.find(|made| made.function == target.function);
        let bound = made.map(|made| editions(&made.bound));
        passing.functions.contains(&target.function) && bound == Some(editions(way))
    })
}

/// `passing` is in the way.
fn passed(holds: &Holdings, passing: &Passing) -> ListError {
    let mut functions = passing.functions.iter();
    let function = functions.find_map(|at| holds.functions.get(*at));
    ListError::Passing {
        function: function.map_or_else(String::new, |function| function.target.name.clone()),
        by: passing.update,
    }
}

/// A head by which the original of `target` can be called.
fn head_of(draft: &Holdings, target: &Target) -> Option<Gva> {
    let redirections = draft
        .placed
        .values()
        .flat_map(|placed| placed.linked.all_redirections());
    let of_it = redirections.filter(|it| it.target.function == target.function);
    of_it.last().map(|redirection| redirection.head.at)
}

/// `way`, or the original by its head where that leads nowhere else.
fn or_original(way: &[Step], head: Option<Gva>) -> Vec<Step> {
    if !way.is_empty() {
        return way.to_vec();
    }
    let original = head.map(|to| Step {
        update: None,
        to,
        rule: None,
        counter: None,
    });
    original.into_iter().collect()
}

/// Ends the switch of `update` in `draft`: what its functions lead to has to be told anew. Returns them.
pub(super) fn end_passing(draft: &mut Holdings, update: UpdateId) -> Vec<Gva> {
    let mut functions = Vec::new();
    let mut worn = Worn::default();
    draft.passing.retain(|passing| {
        if passing.update != update {
            return true;
        }
        functions.extend(passing.functions.iter().copied());
        worn.data.push(passing.set.memory());
        false
    });
    for function in &functions {
        draft.wear_out(*function, &mut worn);
        draft.functions.unsettle(*function);
    }
    draft.put_by(worn);
    functions
}

/// What handlers are made with: made itself when the first handler is.
fn workshop<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    draft: &mut Holdings,
    plan: &mut Plan,
    map: &ArenaMap,
) -> Result<Arc<Workshop>, ApplyError> {
    if let Some(workshop) = &draft.workshop {
        return Ok(Arc::clone(workshop));
    }
    let cpus = kernel.symbol("nr_cpu_ids").map_err(KernelError::from)?;
    let cpus = kernel.read_u32(guest, cpus).map_err(KernelError::from)?;
    let returns = returns(guest, kernel)?;
    let (workshop, placed) = Workshop::new(kernel, returns, cpus, &mut draft.space)?;
    plan.place(Purpose::Arena, &placed, map)?;
    let unit = workshop.unit(kernel, draft.space.handlers.range())?;
    if let Some((tables, publication)) = publish::place(&unit, kernel, &mut draft.space)? {
        plan.place(Purpose::Publication, &tables, map)?;
        plan.publish.push(publication);
    }
    let workshop = Arc::new(workshop);
    draft.workshop = Some(Arc::clone(&workshop));
    Ok(workshop)
}

/// Leads `changes` where they are to lead, in `draft` and `plan`.
pub(super) fn lead<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    draft: &mut Holdings,
    plan: &mut Plan,
    map: &ArenaMap,
    changes: &[Change],
) -> Result<(), ApplyError> {
    let mut worn = Worn::default();
    for (target, way) in changes {
        let from = draft.functions.get(target.function).map(|it| it.lead);
        draft.wear_out(target.function, &mut worn);
        let to = match way.as_slice() {
            [] => Lead::Original,
            [only] if only.counter.is_none() => Lead::Edition(only.to),
            way => {
                let workshop = workshop(guest, kernel, draft, plan, map)?;
                let mut made = workshop.make(kernel, target, way, None, draft)?;
                go_on(guest, kernel, &mut made, &worn, &draft.clocks);
                for placed in made.placed() {
                    plan.place(Purpose::Arena, &placed, map)?;
                }
                let at = made.assembled.at;
                draft.made.push(Arc::new(made));
                Lead::Handler(at)
            }
        };
        redirect(
            guest,
            kernel,
            plan,
            target,
            from.unwrap_or(Lead::Original),
            to,
        )?;
        draft.functions.led(target.function, to, way.clone());
    }
    draft.note_rules(Instant::now());
    draft.put_by(worn);
    Ok(())
}

/// Has the rules of `made` go on where its function's handler, if it is among the `worn` ones, leaves off, and as `clocks` show.
fn go_on<G: Guest>(guest: &G, kernel: &Kernel, made: &mut Made, worn: &Worn, clocks: &Clocks) {
    let old = worn.made.iter().filter(|old| old.function == made.function);
    for old in old.cloned().collect::<Vec<_>>() {
        made.go_on(&old, |at| kernel.read_u64(guest, at).ok());
    }
    made.tell(clocks, Instant::now());
}

fn redirect<G: Guest>(
    guest: &G,
    kernel: &Kernel,
    plan: &mut Plan,
    target: &Target,
    from: Lead,
    to: Lead,
) -> Result<(), ApplyError> {
    let translate = |at| {
        let found = kernel.translate(guest, at);
        found.map_err(|error| error.to_string())
    };
    Ok(plan.redirect(target, from, to, translate)?)
}

/// Does `plan` within so many tries, and keeps `draft` once it is done; gives the room back of what nobody was found in.
pub(super) fn keep<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    draft: Holdings,
    mut plan: Plan,
    tries: u64,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    // What is still led to is not yet free, whoever is in it.
    arena.holds.watch(&mut plan);
    plan.graces = draft.graces();
    let before = std::mem::replace(&mut arena.holds, draft);
    let seen = RefCell::new(None);
    // A panic goes on its way once the draft is known to be true, or not.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let inhabited = arena.inhabited(kernel)?;
        let note = |scanned: &Scanned| drop(seen.replace(Some(scanned.clone())));
        let done = commit_within(guest, &inhabited, &plan, tries, options, &note)?;
        Ok(done.0)
    }));
    let broken = matches!(&outcome, Ok(Err(ApplyError::Commit(failed))) if failed.is_broken());
    match seen.take() {
        Some(scanned) => arena.holds.seen(scanned, plan.binding.as_ref()),
        None if broken => {}
        None => arena.holds = before,
    }
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}
