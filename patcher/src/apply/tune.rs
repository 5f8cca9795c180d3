//! What of a handler changes while it is in force, without a pause: by single aligned stores into the arena.
//!
//! A number that a rule names is one store; so is a clock's tick, and each key that comes into a set or leaves it. Handlers look at such a word
//! once, so that every call goes by what was before or by what is after.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::ApplyError;
use super::arena::{Arena, Holdings};
use super::handlers::{Made, asked_of};
use crate::addr::{Gpa, Gva};
use crate::edition::handler::Owner;
use crate::edition::list::{ListError, Step, UpdateId, Use as How};
use crate::edition::set::{self, Set, SetError, Store};
use crate::edition::space::Full;
use crate::guest::{Guest, GuestError};
use crate::kernel::locate::Kernel;
use crate::plan::PlanError;
use crate::rule::tune::{self, Use};
use crate::rule::{During, Rule};

/// Keys that a set has room for if nobody says how many.
pub const SET_ROOM: u64 = 400;
/// Keys that any set can have room for.
pub const MAX_SET_ROOM: u64 = 400_000;
/// The longest name of a set or a time, in bytes.
pub const MAX_NAME: usize = 64;

/// What the clocks of handlers have shown so far.
#[derive(Clone, Debug, Default)]
pub struct Clocks {
    /// The rules that handlers go by.
    since: Vec<Since>,
    /// When tokens were last given out.
    second: Option<Instant>,
    /// The times that the host begins and ends, and whether each is now.
    pub(super) times: BTreeMap<String, bool>,
}

/// Since when a rule is in effect.
#[derive(Clone, Debug)]
struct Since {
    update: UpdateId,
    rule: Arc<Rule>,
    start: Instant,
}

/// Why a set, or a time, cannot be changed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SetsError {
    /// There is none of that name.
    #[error("there is none called {name}")]
    None {
        /// The name.
        name: String,
    },
    /// The name is none that a rule can use.
    #[error(
        "`{name}` cannot be a name: letters, digits and _ can, at most {MAX_NAME}, the first of them no digit"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// It cannot have so much room.
    #[error("a set can have room for 1 to {MAX_SET_ROOM} numbers, not for {room}")]
    Room {
        /// The room.
        room: u64,
    },
    /// A rule in effect asks for it.
    #[error("the rule of update {update} asks for {name}; revert it or use it otherwise first")]
    Used {
        /// What it asks for.
        name: String,
        /// The update.
        update: UpdateId,
    },
    /// A handler looks into the set for 32 bits, among which the key would be taken for another.
    #[error(
        "{key:#x} has more than 32 bits, and the rule of {function} asks {name} for a value that has no more"
    )]
    Wide {
        /// The set.
        name: String,
        /// The key.
        key: u64,
        /// The function that leads to the handler.
        function: String,
    },
    /// A key finds no room, or is none.
    #[error(transparent)]
    Set(#[from] SetError),
    /// No room in the arena.
    #[error(transparent)]
    Full(#[from] Full),
    /// The arena cannot be written.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The set is not in the arena.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

fn physical(arena: &Arena, at: Gva) -> Result<Gpa, PlanError> {
    let outside = PlanError::NotInArena { at, len: 8 };
    arena.layout.data.physical(at, 8).ok_or(outside)
}

pub(super) fn store<G: Guest>(
    guest: &mut G,
    arena: &Arena,
    stores: &[Store],
) -> Result<(), SetsError> {
    for store in stores {
        guest.store(physical(arena, store.at)?, store.value)?;
    }
    Ok(())
}

/// Changes the rule of an update by one store, if that is all it takes. Whether it was.
///
/// # Errors
/// When the new rule cannot be asked of the functions, or the arena cannot be written.
pub(super) fn retune<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    update: UpdateId,
    how: &How,
) -> Result<bool, ApplyError> {
    let holds = &arena.holds;
    let old = holds.uses.get(&update);
    let old = old.ok_or(ListError::NotInEffect { update })?;
    let (Some(_), Some(rule)) = (&old.rule, &how.rule) else {
        return Ok(false);
    };
    if old.counted != how.counted || holds.passing.iter().any(|it| it.update == update) {
        return Ok(false);
    }
    // Several functions are switched together, though only one of them may lead to it now.
    if holds.functions.of(update).count() > 1 {
        return Ok(false);
    }
    let (mut stores, mut cells) = (Vec::new(), Vec::new());
    for made in &holds.made {
        let nth = made.way.iter().position(|step| step.update == Some(update));
        let Some(choice) = nth else { continue };
        let Some(retuned) = made.retuned(kernel, holds, choice, rule)? else {
            return Ok(false);
        };
        stores.extend(retuned.store);
        cells.push(retuned.cells);
    }
    let [(at, value)] = stores[..] else {
        return Ok(false);
    };
    guest
        .store(physical(arena, at)?, value)
        .map_err(ApplyError::Store)?;
    arena.holds.uses.insert(update, how.clone());
    arena.holds.retuned(update, rule, cells);
    Ok(true)
}

/// Has the clocks go on that rules go by, as far as it is time.
///
/// # Errors
/// When the arena cannot be written.
pub fn tick<G: Guest>(guest: &mut G, arena: &mut Arena, now: Instant) -> Result<(), SetsError> {
    arena.holds.note_rules(now);
    let clocks = &mut arena.holds.clocks;
    let second = clocks
        .second
        .is_none_or(|last| now.duration_since(last) >= Duration::from_secs(1));
    if second {
        clocks.second = Some(now);
    }
    let clocks = &arena.holds.clocks;
    let mut due = Vec::new();
    for made in &arena.holds.made {
        for cell in &made.assembled.cells {
            let value = match &cell.what {
                Use::Tokens(calls) if second => *calls,
                Use::During(during) => clocks.shown(during, made.step(cell.of), now),
                _ => continue,
            };
            // Told each time: a handler that has just been made may have the cell of one before it.
            due.push(Store { at: cell.at, value });
        }
    }
    store(guest, arena, &due)
}

impl Clocks {
    fn of(&self, update: UpdateId, rule: &Rule) -> Option<&Since> {
        let mut since = self.since.iter();
        since.find(|it| it.update == update && *it.rule == *rule)
    }

    /// What a cell of the rule of `step` is to hold: whether it is time. A rule that nothing is known of takes effect now.
    fn shown(&self, during: &During, step: Option<&Step>, now: Instant) -> u64 {
        let since = step.and_then(|step| self.of(step.update?, step.rule.as_ref()?));
        let start = since.map_or(now, |since| since.start);
        u64::from(self.is_on(during, start, now))
    }

    /// Whether it is time.
    fn is_on(&self, during: &During, since: Instant, now: Instant) -> bool {
        let clock = || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(0, |now| now.as_secs())
        };
        match during {
            During::For(ms) => now.duration_since(since) < Duration::from_millis(*ms),
            During::Until(end) => clock() < end.seconds(),
            During::After(start) => clock() >= start.seconds(),
            During::Named(time) => self.times.get(time).is_some_and(|on| *on),
        }
    }
}

/// What makes another rule that of a handler's choice.
struct Retuned {
    /// The store; none if the rule is the same.
    store: Option<(Gva, u64)>,
    /// What the cells of the choice are then.
    cells: Vec<Use>,
}

impl Made {
    /// What makes `rule` that of the choice `nth`; `None` if one store does not.
    fn retuned(
        &self,
        kernel: &Kernel,
        holds: &Holdings,
        nth: usize,
        rule: &Rule,
    ) -> Result<Option<Retuned>, ApplyError> {
        let target = holds.functions.get(self.function).map(|it| &it.target);
        let step = self.way.get(nth);
        let old = step.and_then(|step| step.rule.as_ref());
        let (Some(target), Some(old)) = (target, old) else {
            return Ok(None);
        };
        let brought = step.and_then(|step| holds.placed.get(&step.update?));
        let predicates = brought.map(|brought| brought.linked.predicates());
        let predicates = predicates.unwrap_or_default();
        let function = asked_of(kernel, target, &predicates);
        let (old, new) = (function.resolve(old)?, function.resolve(rule)?);
        let Some(stores) = tune::retune(&old, &new) else {
            return Ok(None);
        };
        let of = Owner {
            bound: false,
            choice: nth,
        };
        let cells = tune::cells(&new).into_iter().map(|(what, _)| what);
        let cells = cells.collect();
        let Some((index, value)) = stores.first() else {
            return Ok(Some(Retuned { store: None, cells }));
        };
        let cell = self.assembled.cells_of(of).nth(*index);
        Ok(cell.map(|cell| Retuned {
            store: Some((cell.at, *value)),
            cells,
        }))
    }

    /// Has the clocks of its rules begin as `clocks` show them.
    pub(super) fn tell(&mut self, clocks: &Clocks, now: Instant) {
        let Self {
            way,
            bound,
            assembled,
            ..
        } = self;
        for cell in &mut assembled.cells {
            if let Use::During(during) = &cell.what {
                let way = if cell.of.bound { &*bound } else { &*way };
                cell.initial = clocks.shown(during, way.get(cell.of.choice), now);
            }
        }
    }
}

impl Holdings {
    /// Notes which rules are in effect, or still hold for a task that is bound. One that is no longer starts anew when it comes again.
    pub(super) fn note_rules(&mut self, now: Instant) {
        let uses = self.uses.iter();
        let used = uses.map(|(update, how)| (Some(*update), how.rule.as_ref()));
        let steps = self
            .made
            .iter()
            .flat_map(|made| made.way.iter().chain(&made.bound));
        let asked = steps.map(|step| (step.update, step.rule.as_ref()));
        let mut since: Vec<Since> = Vec::new();
        for (update, rule) in used.chain(asked) {
            let (Some(update), Some(rule)) = (update, rule) else {
                continue;
            };
            if since
                .iter()
                .any(|it| it.update == update && it.rule == *rule)
            {
                continue;
            }
            let start = self.clocks.of(update, rule).map_or(now, |it| it.start);
            let rule = Arc::clone(rule);
            since.push(Since {
                update,
                rule,
                start,
            });
        }
        self.clocks.since = since;
    }

    /// Whether a handler goes by a clock.
    #[must_use]
    pub fn has_clocks(&self) -> bool {
        let cells = self.made.iter().flat_map(|made| &made.assembled.cells);
        cells.map(|cell| &cell.what).any(|what| match what {
            Use::Tokens(_) => true,
            Use::During(during) => !matches!(during, During::Named(_)),
            Use::Constant | Use::Calls => false,
        })
    }

    /// The times that the host begins and ends, and whether each is now.
    #[must_use]
    pub fn times(&self) -> &BTreeMap<String, bool> {
        &self.clocks.times
    }

    /// Whether no handler would take `key` for another if it were in the set of this name.
    fn can_hold(&self, name: &str, key: u64) -> Result<(), SetsError> {
        if set::is_low(key) {
            return Ok(());
        }
        let mut made = self.all_made();
        let Some(by) = made.find(|made| made.assembled.halves.contains(name)) else {
            return Ok(());
        };
        let function = self.functions.get(by.function);
        Err(SetsError::Wide {
            name: name.to_owned(),
            key,
            function: function.map_or_else(
                || by.function.to_string(),
                |function| function.target.name.clone(),
            ),
        })
    }

    /// The first update whose rule is one of these: it is in effect, or tasks that are bound still go by it.
    pub(super) fn goes_by(&self, asks: impl Fn(&Rule) -> bool) -> Option<UpdateId> {
        let uses = self.uses.iter();
        let uses = uses.filter_map(|(update, how)| Some((*update, how.rule.as_ref()?)));
        let steps = self.made.iter().flat_map(|made| &made.bound);
        let bound = steps.filter_map(|step| Some((step.update?, step.rule.as_ref()?)));
        let mut all = uses.chain(bound);
        all.find(|(_, rule)| asks(rule)).map(|(update, _)| update)
    }
}

/// Whether rules can call something by this name.
pub(super) fn named(name: &str) -> Result<(), SetsError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let first = name.chars().next().is_some_and(|c| !c.is_ascii_digit());
    if !first || !name.chars().all(letter) || name.len() > MAX_NAME {
        let name = name.to_owned();
        return Err(SetsError::Name { name });
    }
    Ok(())
}

/// What is to change in a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetChange {
    /// Keys to put in.
    pub add: Vec<u64>,
    /// Keys to take out, first.
    pub remove: Vec<u64>,
    /// Keys that it is to have room for if this makes it; [`SET_ROOM`] if that is not said.
    pub room: Option<u64>,
}

impl SetChange {
    /// Slots of a set with that room, as a power of two. Of two places for each key one is almost always free while two in five slots are in use.
    fn bits(&self) -> Result<u8, SetsError> {
        let room = self.room.unwrap_or(SET_ROOM);
        if !(1..=MAX_SET_ROOM).contains(&room) {
            return Err(SetsError::Room { room });
        }
        let slots = (room.saturating_mul(5) / 2).max(2).next_power_of_two();
        Ok(u8::try_from(slots.ilog2()).unwrap_or(u8::MAX))
    }
}

/// Puts keys into a set, which is made if there is none of that name, and takes others out. The guest runs on.
///
/// # Errors
/// [`SetsError`]; keys before the one that it is about are in, or out.
pub fn change_set<G: Guest>(
    guest: &mut G,
    arena: &mut Arena,
    name: &str,
    change: &SetChange,
) -> Result<usize, SetsError> {
    let mut set = match arena.holds.sets.get(name) {
        Some(set) => set.clone(),
        None => {
            named(name)?;
            let bits = change.bits()?;
            let at = arena.holds.space.data.take(8 << bits, 64)?;
            let set = Set::new(at, bits)?;
            let words = set.bytes();
            let words = words.as_chunks::<8>().0.iter().enumerate();
            let empty = words.map(|(slot, word)| Store {
                at: Gva(at.0.saturating_add(slot as u64 * 8)),
                value: u64::from_le_bytes(*word),
            });
            store(guest, arena, &empty.collect::<Vec<_>>())?;
            arena.holds.sets.insert(name.to_owned(), set.clone());
            set
        }
    };
    let mut changed = Ok(());
    for key in &change.remove {
        let gone = set.remove(*key);
        changed = changed.and(store(guest, arena, gone.as_slice()));
    }
    for key in &change.add {
        changed = changed.and_then(|()| {
            arena.holds.can_hold(name, *key)?;
            store(guest, arena, &set.insert(*key)?)
        });
    }
    let len = set.len();
    arena.holds.sets.insert(name.to_owned(), set);
    changed.map(|()| len)
}

/// Does away with a set that no rule asks for.
///
/// # Errors
/// [`SetsError`].
pub fn drop_set(arena: &mut Arena, name: &str) -> Result<(), SetsError> {
    let memory = arena.holds.sets.get(name).map(Set::memory);
    let Some((at, len)) = memory else {
        let name = name.to_owned();
        return Err(SetsError::None { name });
    };
    if let Some(update) = arena.holds.goes_by(|rule| rule.asks_for(name)) {
        let name = name.to_owned();
        return Err(SetsError::Used { name, update });
    }
    arena.holds.sets.remove(name);
    // A worn handler may still be looking into it.
    arena.holds.wear_out_memory(at, len);
    Ok(())
}
