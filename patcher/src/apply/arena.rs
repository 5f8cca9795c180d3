//! Our part of a guest's memory, as one running kernel sees it: who has which of it, and which functions lead there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::live::Inhabited;
use crate::addr::Gva;
use crate::edition::link::Linked;
use crate::edition::list::{Functions, UpdateId};
use crate::edition::resident::Resident;
use crate::edition::space::ArenaSpace;
use crate::guest::Guest;
use crate::kernel::arena::{ArenaError, ArenaLayout, ArenaPart, SLOT_SIZE};
use crate::kernel::locate::Kernel;
use crate::kernel::stack::Watched;
use crate::kernel::unwind::OtherCode;
use crate::plan::{ArenaMap, Entry, Lead, Plan, Write};

/// What an update has brought, and where it is.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its editions, heads and data.
    pub linked: Linked,
    /// The writes that placed them.
    pub writes: Vec<Write>,
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
        };
        Ok(Self { layout, holds })
    }

    /// The kernel with what is in the arena.
    pub(super) fn inhabited<'k>(&self, kernel: &'k Kernel) -> Inhabited<'k> {
        let placed = self.holds.placed.values();
        let known = placed.map(|placed| placed.resident.code.clone());
        let others = known.chain([OtherCode::arena()]).collect();
        Inhabited { kernel, others }
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

    fn life(&self, update: UpdateId, placed: &Placed, function: Gva, edition: Gva) -> Life {
        let listed = self.functions.get(function);
        if let Some(function) = listed
            && function.editions.iter().any(|it| it.update == update)
        {
            return match function.lead {
                Lead::Edition(at) if at == edition => Life::Active,
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
            let placed = self.placed.get(update);
            if placed.is_some_and(|placed| placed.escape.is_none()) {
                self.drains.insert(*update, None);
            }
        }
    }

    /// Has `plan` tell who is in the code that is no longer led to, of which there is some.
    pub(super) fn watch(&self, plan: &mut Plan) {
        let placed = self
            .drains
            .keys()
            .filter_map(|update| self.placed.get(update));
        plan.watched = placed
            .map(|placed| placed.resident.code.range.clone())
            .collect();
    }

    /// Gives the room back of code that nobody was found in, `watched` as it was planned; returns whose it was.
    pub(super) fn settle(&mut self, watched: &[Watched]) -> Vec<UpdateId> {
        let mut gone = Vec::new();
        for (update, drain) in &mut self.drains {
            let Some(placed) = self.placed.get(update) else {
                continue;
            };
            let code = &placed.resident.code.range;
            let Some(watched) = watched.iter().find(|watched| watched.code == *code) else {
                continue;
            };
            match &watched.by {
                Some(who) => *drain = Some(who.to_string()),
                None => gone.push(*update),
            }
        }
        for update in &gone {
            self.drains.remove(update);
            if let Some(placed) = self.placed.remove(update) {
                let (code, data) = (&placed.linked.code, &placed.linked.data);
                self.space.code.give(Gva(code.at), code.bytes.len() as u64);
                self.space.data.give(Gva(data.at), data.bytes.len() as u64);
            }
        }
        gone
    }
}

/// Where the kernel sees a part of the arena. It is one of the top entries of the page tables, below the last page.
pub(super) fn range(part: &ArenaPart) -> Range<Gva> {
    part.at..Gva(part.at.0.saturating_add(SLOT_SIZE))
}
