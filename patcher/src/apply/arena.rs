//! Our part of a guest's memory, as one running kernel sees it: who has which of it, and which functions lead there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::handlers::{self, Counters, Made, Workshop};
use super::hooks::{self, Started};
use super::live::Inhabited;
use super::passing::{Model, Passing};
use super::tune::Clocks;
use crate::addr::Gva;
use crate::commit::Scanned;
use crate::edition::handler::Owner;
use crate::edition::link::{self, Linked};
use crate::edition::list::{Functions, Step, UpdateId, Use};
use crate::edition::resident::Resident;
use crate::edition::set::{Set, SetPlace};
use crate::edition::space::ArenaSpace;
use crate::guest::Guest;
use crate::kernel::arena::{ArenaError, ArenaLayout, ArenaPart, SLOT_SIZE};
use crate::kernel::locate::Kernel;
use crate::kernel::orc::OrcError;
use crate::kernel::shadow::Shadow;
use crate::kernel::stack::Watched;
use crate::kernel::unwind::OtherCode;
use crate::plan::binding::Binding;
use crate::plan::target::Target;
use crate::plan::{ArenaMap, Entry, Plan, Write};
use crate::publish::{Grace, Publication};
use crate::rule::{Rule, tune};

/// What an update has brought, and where it is.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its editions, heads and data.
    pub linked: Linked,
    /// By what the kernel knows its code: the tables, and how they are linked into the kernel's.
    pub known: Option<(link::Placed, Publication)>,
    /// The writes that placed them.
    pub writes: Vec<Write>,
    /// Who may be where when its functions are switched.
    pub model: Model,
    /// What is known of its code.
    pub resident: Resident,
    /// What may let an address of it be known to the guest, so that its room is never used again.
    pub escape: Option<String>,
}

/// Where an edition stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// It is in the arena, beneath another one: nothing leads to it.
    Placed,
    /// Calls of its function get to it.
    Active,
    /// Calls of its function that come to where the function leads get to it, but somebody in the guest comes before that.
    Shadowed {
        /// Who.
        by: Shadow,
    },
    /// Nothing leads to it any more, but a thread may be in it or come back to it.
    Draining {
        /// Who was in it, or may come back to it, when that was looked at last.
        by: Option<String>,
    },
    /// Nothing leads to it, but it stays: an address of it may be known to the guest.
    Kept {
        /// Where that address is handed out.
        escape: String,
    },
}

/// One edition, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edition {
    /// The function.
    pub function: String,
    /// The edition's first byte.
    pub at: Gva,
    /// Where it stands.
    pub life: Life,
}

/// What changes with an operation. A copy is a draft: an operation works on one, and only a commit keeps it.
#[derive(Clone, Debug)]
pub struct Holdings {
    /// What of the arena is handed out.
    pub space: ArenaSpace,
    /// The functions that have editions.
    pub functions: Functions,
    /// What is in the arena: of updates that are in effect, and of those that a thread may still be in.
    pub placed: BTreeMap<UpdateId, Arc<Placed>>,
    /// Who was in the code of an update that is no longer in effect, when that was looked at last.
    pub drains: BTreeMap<UpdateId, Option<String>>,
    /// Hooks that were begun and have not been seen to end, by update.
    pub(super) hooks: BTreeMap<UpdateId, Started>,
    /// The last run of a hook.
    pub(super) run: u64,
    /// Updates in whose code nobody was found, and that the kernel is to forget.
    pub(super) free: BTreeSet<UpdateId>,
    /// Updates that the kernel has forgotten, while one of its CPUs may still be reading what it knew of them.
    pub(super) forgotten: BTreeMap<UpdateId, Grace>,
    /// How many vCPUs the guest was seen to have.
    pub(super) vcpus: usize,
    /// How the editions of updates in effect are used.
    pub uses: BTreeMap<UpdateId, Use>,
    /// What handlers are made with, once one was needed.
    pub workshop: Option<Arc<Workshop>>,
    /// The handlers that functions lead to.
    pub made: Vec<Arc<Made>>,
    /// Handlers that nothing leads to any more, though a thread may be in them.
    pub(super) worn: Vec<Worn>,
    /// Where calls are counted.
    pub counters: Counters,
    /// Switches that some tasks have yet to make.
    pub passing: Vec<Passing>,
    /// Sets that rules ask for, by name.
    pub sets: BTreeMap<String, Set>,
    /// What the clocks of handlers have shown.
    pub(super) clocks: Clocks,
    /// The functions whose calls somebody in the guest may lead elsewhere before, when that was looked at last.
    pub(super) shadows: BTreeMap<Gva, Shadow>,
}

/// Handlers that go together, and the memory that they look into.
#[derive(Clone, Debug, Default)]
pub(super) struct Worn {
    pub(super) made: Vec<Arc<Made>>,
    /// The first byte of each piece of memory, and its length.
    pub(super) data: Vec<(Gva, u64)>,
}

/// Our part of a guest's memory. Another kernel needs another one.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Where it is mapped.
    pub layout: ArenaLayout,
    /// Who has which of it.
    pub holds: Holdings,
}

impl Arena {
    /// An empty arena for a kernel that was just located.
    ///
    /// # Errors
    /// When the kernel's address space has no place for it.
    pub fn new<G: Guest>(guest: &G, kernel: &Kernel) -> Result<Self, ArenaError> {
        let layout = ArenaLayout::plan(kernel, guest, &guest.arena())?;
        let space = ArenaSpace::new(range(&layout.code), range(&layout.data));
        let holds = Holdings {
            space,
            functions: Functions::default(),
            placed: BTreeMap::new(),
            drains: BTreeMap::new(),
            hooks: BTreeMap::new(),
            run: 0,
            free: BTreeSet::new(),
            forgotten: BTreeMap::new(),
            vcpus: 0,
            uses: BTreeMap::new(),
            workshop: None,
            made: Vec::new(),
            worn: Vec::new(),
            counters: Counters::new(),
            passing: Vec::new(),
            sets: BTreeMap::new(),
            clocks: Clocks::default(),
            shadows: BTreeMap::new(),
        };
        Ok(Self { layout, holds })
    }

    /// The kernel with what is in the arena.
    ///
    /// # Errors
    /// When the kernel's unwind table has no words for handlers.
    pub(super) fn inhabited<'k>(&self, kernel: &'k Kernel) -> Result<Inhabited<'k>, OrcError> {
        let placed = self.holds.placed.values();
        let known = placed.map(|placed| placed.resident.code.clone());
        let handlers = self.holds.handlers(kernel)?;
        let others = known.chain(handlers).chain([OtherCode::arena()]).collect();
        Ok(Inhabited { kernel, others })
    }

    /// The arena in both address spaces, with the page-table entries that are still to be written.
    pub(super) fn map<G: Guest>(&self, guest: &G, kernel: &Kernel) -> Result<ArenaMap, ArenaError> {
        let mut map = ArenaMap {
            parts: Vec::new(),
            entries: Vec::new(),
        };
        for part in self.layout.parts() {
            map.parts.push((range(part), part.memory.start));
            if !part.mapped(kernel, guest)? {
                map.entries.push(Entry {
                    at: part.entry_at,
                    expect: 0,
                    value: part.entry,
                    maps: part.at,
                });
            }
        }
        Ok(map)
    }
}

impl Holdings {
    /// The editions of an update, and where each stands. None of an update whose room was given back, or that never was.
    #[must_use]
    pub fn editions(&self, update: UpdateId) -> Vec<Edition> {
        let Some(placed) = self.placed.get(&update) else {
            return Vec::new();
        };
        let redirections = placed.linked.redirections.iter();
        let edition = redirections.map(|redirection| Edition {
            function: redirection.target.name.clone(),
            at: redirection.edition,
            life: self.life(
                update,
                placed,
                redirection.target.function,
                redirection.edition,
            ),
        });
        edition.collect()
    }

    /// The handlers' part of the arena as code that threads may be in, if there are handlers.
    ///
    /// # Errors
    /// When the kernel's unwind table has no words for it.
    pub fn handlers(&self, kernel: &Kernel) -> Result<Option<OtherCode>, OrcError> {
        let range = self.space.handlers.range();
        let workshop = self.workshop.as_ref();
        let code = workshop.map(|_| handlers::code(kernel, range));
        code.transpose()
    }

    /// What is at `at`, if it is code of ours.
    #[must_use]
    pub fn name(&self, at: Gva) -> Option<String> {
        let placed = self.placed.values();
        let pieces = placed.flat_map(|placed| &placed.resident.pieces);
        let mut ours = pieces.filter(|(range, _)| range.contains(&at));
        let found = ours.next().map(|(range, name)| (range.start, name.clone()));
        let handler = || {
            let made = self.all_made().find(|made| made.code.contains(&at))?;
            let function = self.functions.get(made.function)?;
            Some((
                made.code.start,
                format!("handler of {}", function.target.name),
            ))
        };
        let (start, name) = found.or_else(handler)?;
        Some(format!(
            "{name}+{:#x} [exopatch]",
            at.0.wrapping_sub(start.0)
        ))
    }

    /// All handlers that a thread may be in.
    pub fn all_made(&self) -> impl Iterator<Item = &Made> {
        let worn = self.worn.iter().flat_map(|worn| &worn.made);
        self.made.iter().chain(worn).map(|made| &**made)
    }

    /// The functions whose lists ask for another way than the one that is in effect, with that.
    pub(super) fn changes(&self) -> Vec<(Target, Vec<Step>)> {
        let uses = |update| self.uses.get(&update).cloned().unwrap_or_default();
        let counter = |function, update| self.counters.get(&(function, update)).copied();
        self.functions.changes(uses, counter)
    }

    /// The code that calls of these functions go through on their way: the handlers, and the heads of the originals. Whoever is in it goes on to
    /// where it led when he came, however short it is.
    pub(super) fn ways_of(&self, functions: &[Gva]) -> impl Iterator<Item = Range<Gva>> {
        let placed = self.placed.values();
        let heads = placed.flat_map(|placed| placed.linked.all_redirections());
        let heads = heads.filter(|it| functions.contains(&it.target.function));
        let heads = heads.filter_map(|it| it.head.at.range(it.head.bytes.len() as u64));
        self.choosers_of(functions).chain(heads)
    }

    /// The code in which it is chosen where a call of these functions goes: the handlers, worn ones too.
    pub(super) fn choosers_of(&self, functions: &[Gva]) -> impl Iterator<Item = Range<Gva>> {
        let made = self.all_made();
        let made = made.filter(|made| functions.contains(&made.function));
        made.map(|made| made.code.clone())
    }

    /// Keeps handlers that nothing leads to any more until no thread is in them.
    pub(super) fn put_by(&mut self, worn: Worn) {
        if !worn.made.is_empty() {
            self.worn.push(worn);
        }
    }

    /// Where the sets are, by name.
    pub(super) fn set_places(&self) -> BTreeMap<String, SetPlace> {
        let sets = self.sets.iter();
        sets.map(|(name, set)| (name.clone(), set.place()))
            .collect()
    }

    /// Has memory be given back once no handler that is worn now can be looking into it. What is worn becomes one, for each handler has its room
    /// given back once.
    pub(super) fn wear_out_memory(&mut self, at: Gva, len: u64) {
        let mut all = Worn::default();
        for worn in self.worn.drain(..) {
            all.made.extend(worn.made);
            all.data.extend(worn.data);
        }
        all.data.push((at, len));
        self.worn.push(all);
    }

    /// Notes that handlers go by `rule` for the editions of `update` now, and what its `cells` are in each of them that leads to one.
    pub(super) fn retuned(&mut self, update: UpdateId, rule: &Rule, cells: Vec<Vec<tune::Use>>) {
        let rule = Arc::new(rule.clone());
        let mut cells = cells.into_iter();
        for made in &mut self.made {
            let made = Arc::make_mut(made);
            let mut steps = made.way.iter_mut();
            let Some(choice) = steps.position(|step| step.update == Some(update)) else {
                continue;
            };
            if let Some(step) = made.way.get_mut(choice) {
                step.rule = Some(Arc::clone(&rule));
            }
            let of = Owner {
                bound: false,
                choice,
            };
            let own = made.assembled.cells.iter_mut();
            let own = own.filter(|cell| cell.of == of);
            for (cell, what) in own.zip(cells.next().into_iter().flatten()) {
                cell.what = what;
            }
        }
        self.functions.retuned(update, &rule);
    }

    /// Takes the handler that `function` leads to away from it; a thread may be in it.
    pub(super) fn wear_out(&mut self, function: Gva, into: &mut Worn) {
        let all = std::mem::take(&mut self.made).into_iter();
        let (worn, made): (Vec<_>, Vec<_>) = all.partition(|made| made.function == function);
        self.made = made;
        into.data.extend(worn.iter().map(|made| made.cells));
        into.made.extend(worn);
    }

    fn life(&self, update: UpdateId, placed: &Placed, function: Gva, edition: Gva) -> Life {
        let listed = self.functions.get(function);
        if let Some(function) = listed
            && function.editions.iter().any(|it| it.update == update)
        {
            let active = function.way.iter().any(|step| step.to == edition);
            return match self.shadows.get(&function.target.function) {
                Some(by) if active => Life::Shadowed { by: *by },
                None if active => Life::Active,
                _ => Life::Placed,
            };
        }
        match &placed.escape {
            Some(escape) => Life::Kept {
                escape: escape.clone(),
            },
            None => Life::Draining {
                by: self.drains.get(&update).cloned().flatten(),
            },
        }
    }

    /// Notes that the code of `updates` is no longer led to.
    pub(super) fn drain(&mut self, updates: &BTreeSet<UpdateId>) {
        for update in updates {
            self.uses.remove(update);
            let placed = self.placed.get(update);
            if placed.is_some_and(|placed| placed.escape.is_none()) {
                self.drains.insert(*update, None);
            }
        }
    }

    /// Has `plan` tell who is in the code that is no longer led to, of which there is some.
    pub(super) fn watch(&self, plan: &mut Plan) {
        let drains = self.drains.keys();
        let updates = drains.filter_map(|update| self.placed.get(update));
        let updates = updates.map(|placed| placed.resident.code.range.clone());
        let worn = self.worn.iter().flat_map(|worn| &worn.made);
        let worn = worn.map(|made| made.code.clone());
        plan.watched = updates.chain(worn).collect();
    }

    /// Whether there is code that nothing leads to any more and that may become free, or a switch that has yet to end.
    #[must_use]
    pub fn is_settling(&self) -> bool {
        let leaves = !self.drains.is_empty() || !self.forgotten.is_empty();
        let hooks = !self.hooks.is_empty() || self.functions.of(hooks::TICKER).next().is_some();
        leaves || hooks || !self.worn.is_empty() || !self.passing.is_empty()
    }

    /// The periods of grace that have yet to end.
    pub(super) fn graces(&self) -> Vec<Grace> {
        self.forgotten.values().cloned().collect()
    }

    /// Notes what was seen under the pause that made this true, in which `binding` was done.
    pub(super) fn seen(&mut self, scanned: Scanned, binding: Option<&Binding>) {
        self.vcpus = scanned.vcpus;
        if let Some(binding) = binding
            && let Ok((set, _)) = binding.with(&scanned.inside)
        {
            let mut passing = self.passing.iter_mut();
            if let Some(passing) = passing.find(|passing| passing.at == binding.at) {
                passing.seen(scanned.inside, set);
            }
        }
        self.settle(&scanned.watched);
        self.grace(&scanned.graces);
    }

    /// Notes what is left of the periods of grace, as they were given, and gives the room back of updates whose period is over.
    fn grace(&mut self, left: &[Grace]) {
        for (grace, left) in self.forgotten.values_mut().zip(left) {
            grace.clone_from(left);
        }
        let over = self.forgotten.iter().filter(|(_, grace)| grace.is_over());
        let over: Vec<UpdateId> = over.map(|(update, _)| *update).collect();
        for update in over {
            self.forgotten.remove(&update);
            self.give_back(update);
        }
    }

    /// Has `plan` make the kernel forget the updates in whose code nobody was found, if nobody is by then.
    pub(super) fn forget(&mut self, plan: &mut Plan) {
        for update in std::mem::take(&mut self.free) {
            let Some(placed) = self.placed.get(&update) else {
                continue;
            };
            self.drains.remove(&update);
            self.forgotten.insert(update, Grace::begin(self.vcpus));
            let known = placed.known.iter();
            plan.unpublish.extend(known.map(|(_, unit)| unit.clone()));
            plan.forbidden.push(placed.resident.code.range.clone());
        }
    }

    /// Notes who was found in code that is no longer led to, `watched` as it was planned, and gives the room of handlers back that nobody was in.
    fn settle(&mut self, watched: &[Watched]) {
        let who = |code: &Range<Gva>| watched.iter().find(|watched| watched.code == *code);
        self.clear_worn(|code| who(code).is_some_and(|found| found.by.is_none()));
        let begins = self.functions.of(hooks::TICKER).next().is_some();
        let mut gone = Vec::new();
        for (update, drain) in &mut self.drains {
            let Some(placed) = self.placed.get(update) else {
                continue;
            };
            let code = &placed.resident.code.range;
            match who(code).map(|found| &found.by) {
                None => {}
                Some(Some(who)) => *drain = Some(who.to_string()),
                Some(None) => match self.hooks.get_mut(update) {
                    Some(started) if !begins => *drain = Some(started.close()),
                    Some(_) => {}
                    None => {
                        *drain = None;
                        gone.push(*update);
                    }
                },
            }
        }
        // Whoever is still in a handler may go on to where it led.
        if !self.worn.is_empty() || !self.passing.is_empty() {
            return;
        }
        self.free = gone.into_iter().collect();
    }

    /// Gives the room of an update back.
    fn give_back(&mut self, update: UpdateId) {
        let Some(placed) = self.placed.remove(&update) else {
            return;
        };
        let linked = &placed.linked;
        let tables = placed.known.iter().map(|(tables, _)| tables);
        for data in tables.chain([&linked.data]) {
            let len = data.bytes.len() as u64;
            self.space.data.give(Gva(data.at), len);
        }
        let len = linked.code.bytes.len() as u64;
        self.space.code.give(Gva(linked.code.at), len);
        self.forget_counters(update);
    }

    /// Gives the room back of worn handlers that are all free, and of what they looked into.
    fn clear_worn(&mut self, is_free: impl Fn(&Range<Gva>) -> bool) {
        let all_free = |worn: &Worn| worn.made.iter().all(|made| is_free(&made.code));
        let (free, worn): (Vec<_>, Vec<_>) = std::mem::take(&mut self.worn)
            .into_iter()
            .partition(all_free);
        self.worn = worn;
        for worn in free {
            for (at, len) in worn.data {
                self.space.data.give(at, len);
            }
            for made in worn.made {
                let len = made.code.end.0 - made.code.start.0;
                self.space.handlers.give(made.code.start, len);
            }
        }
    }

    /// Gives back where the calls of an update's editions were counted, and of originals that nobody counts any more.
    fn forget_counters(&mut self, update: UpdateId) {
        let workshop = self.workshop.as_ref();
        let len = workshop.map_or(0, |workshop| workshop.counter_len());
        let (functions, space) = (&self.functions, &mut self.space.data);
        self.counters.retain(|(function, of), at| {
            let stays = match of {
                Some(of) => *of != update,
                None => functions.get(*function).is_some(),
            };
            if !stays {
                space.give(*at, len);
            }
            stays
        });
    }
}

/// Where the kernel sees a part of the arena. It is one of the top entries of the page tables, below the last page.
pub(super) fn range(part: &ArenaPart) -> Range<Gva> {
    part.at..Gva(part.at.0.saturating_add(SLOT_SIZE))
}
