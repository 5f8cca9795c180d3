//! From linked editions to ordered writes, each with the bytes that must be there before.
//!
//! New code becomes reachable last: the arena's mapping first, then its code and data, then the jumps. A plan writes nothing.

pub mod binding;
pub mod checks;
mod program;
pub mod refusal;
pub mod reliance;
pub mod target;

use std::fmt;
use std::ops::Range;

use self::binding::Binding;
use self::target::Target;
use crate::addr::{Gpa, Gva};
use crate::edition::link::{Linked, Placed};
use crate::publish::{Grace, Publication};
use crate::x86::insn::InsnError;

/// Bytes of a page: no write crosses the end of one.
const PAGE: u64 = 4096;

/// What a write is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A page-table entry that maps a part of the arena.
    Mapping,
    /// Code or data of ours in the arena.
    Arena,
    /// What the kernel is told of code of ours: its tables in the arena, and the kernel's own words that lead to them.
    Publication,
    /// A jump in kernel text, or the bytes that it displaced.
    Trampoline,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mapping => "the mapping of the arena",
            Self::Arena => "the arena",
            Self::Publication => "what the kernel knows of our code",
            Self::Trampoline => "a jump in kernel text",
        })
    }
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// What for.
    pub purpose: Purpose,
    /// Whose bytes these are, for messages.
    pub subject: String,
    /// Where the kernel sees it, or where the mapping that it makes begins.
    pub gva: Gva,
    /// Where it goes.
    pub gpa: Gpa,
    /// What must be there before; `None` where only we write.
    pub expect: Option<Vec<u8>>,
    /// What is written.
    pub bytes: Vec<u8>,
}

/// The arena, in both address spaces, and the entries that map it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaMap {
    /// Parts of it: where the kernel sees each, and where it is.
    pub parts: Vec<(Range<Gva>, Gpa)>,
    /// Page-table entries that are still to be written: where each is, what it must be before and what it becomes, and the
    /// address that it maps.
    pub entries: Vec<Entry>,
}

/// One page-table entry to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the entry is.
    pub at: Gpa,
    /// What it is now.
    pub expect: u64,
    /// What it becomes.
    pub value: u64,
    /// First address that it maps.
    pub maps: Gva,
}

impl ArenaMap {
    /// Where the arena byte that the kernel sees at `at` is.
    #[must_use]
    pub fn physical(&self, at: Gva) -> Option<Gpa> {
        let (range, base) = self.parts.iter().find(|(range, _)| range.contains(&at))?;
        base.checked_add(at.offset_from(range.start)?)
    }
}

/// Why no plan can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Linked code does not lie in the arena.
    #[error("{at}..+{len:#x} is not in the arena")]
    NotInArena {
        /// First byte.
        at: Gva,
        /// Bytes.
        len: usize,
    },
    /// A jump does not reach its edition.
    #[error(transparent)]
    Jump(#[from] InsnError),
    /// The displaced bytes cannot be found in memory.
    #[error("the bytes of {function} at {at} cannot be found in memory: {cause}")]
    Unmapped {
        /// The function.
        function: String,
        /// Where its bytes should be.
        at: Gva,
        /// Why not.
        cause: String,
    },
}

/// Where a function leads its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// Nowhere else: it is as the kernel has it.
    Original,
    /// To an edition, by a jump.
    Edition(Gva),
    /// To a redirection handler, by a jump.
    Handler(Gva),
}

impl Lead {
    /// Where the jump leads, if there is one.
    #[must_use]
    pub fn address(self) -> Option<Gva> {
        match self {
            Self::Original => None,
            Self::Edition(at) | Self::Handler(at) => Some(at),
        }
    }
}

/// The writes of one operation, in order, and what is asked of the threads before they are done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order in which they are done.
    pub writes: Vec<Write>,
    /// No instruction pointer and no saved one may be in these.
    pub forbidden: Vec<Range<Gva>>,
    /// Of these it is told whether any is in them.
    pub watched: Vec<Range<Gva>>,
    /// Code of a group of functions: it is told which tasks are in it.
    pub group: Vec<Range<Gva>>,
    /// What follows for the set of tasks that are bound to it.
    pub binding: Option<Binding>,
    /// Code that becomes known to the kernel before the jumps: which words that changes is found out under the pause.
    pub publish: Vec<Publication>,
    /// Code that the kernel forgets, likewise.
    pub unpublish: Vec<Publication>,
    /// Periods of grace, of which it is told what is left.
    pub graces: Vec<Grace>,
}

impl Plan {
    /// Plans the entries of the page tables that map the arena.
    pub fn map(&mut self, arena: &ArenaMap) {
        for entry in &arena.entries {
            self.writes.push(Write {
                purpose: Purpose::Mapping,
                subject: "the kernel's page table".into(),
                gva: entry.maps,
                gpa: entry.at,
                expect: Some(entry.expect.to_le_bytes().to_vec()),
                bytes: entry.value.to_le_bytes().to_vec(),
            });
        }
    }

    /// Plans the code and data of `linked`.
    ///
    /// # Errors
    /// [`PlanError::NotInArena`].
    pub fn place_all(&mut self, linked: &Linked, arena: &ArenaMap) -> Result<(), PlanError> {
        self.place(Purpose::Arena, &linked.code, arena)?;
        self.place(Purpose::Arena, &linked.data, arena)
    }

    /// Plans that `target`, which leads to `from`, leads to `to`. Jumps are planned behind all that they lead to.
    ///
    /// `translate` finds the bytes of the kernel's own text.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn redirect(
        &mut self,
        target: &Target,
        from: Lead,
        to: Lead,
        translate: impl Fn(Gva) -> Result<Gpa, String>,
    ) -> Result<(), PlanError> {
        let (old, new) = (target.bytes(from)?, target.bytes(to)?);
        if old == new {
            return Ok(());
        }
        let mut start = 0;
        while let (Some(old), Some(new)) = (old.get(start..), new.get(start..)) {
            let gva = Gva(target.jump.0.wrapping_add(start as u64));
            let room = usize::try_from(PAGE - gva.0 % PAGE).unwrap_or(usize::MAX);
            let len = new.len().min(room);
            if len == 0 {
                break;
            }
            let gpa = translate(gva).map_err(|cause| PlanError::Unmapped {
                function: target.name.clone(),
                at: gva,
                cause,
            })?;
            let cut = |bytes: &[u8]| bytes.iter().take(len).copied().collect::<Vec<u8>>();
            self.writes.push(Write {
                purpose: Purpose::Trampoline,
                subject: target.name.clone(),
                gva,
                gpa,
                expect: Some(cut(old)),
                bytes: cut(new),
            });
            start += len;
        }
        self.forbidden.push(target.forbidden());
        Ok(())
    }

    /// How many of the writes are done before any code of ours can be reached by them.
    #[must_use]
    pub fn unreachable(&self) -> usize {
        let jump = |write: &Write| write.purpose == Purpose::Trampoline;
        let first = self.writes.iter().position(jump);
        first.unwrap_or(self.writes.len())
    }

    /// Bytes that are written, as far as that is known before the pause.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.writes
            .iter()
            .map(|write| write.bytes.len() as u64)
            .sum()
    }

    /// Whether nothing is written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Plans bytes of the arena.
    ///
    /// # Errors
    /// [`PlanError::NotInArena`].
    pub fn place(
        &mut self,
        purpose: Purpose,
        placed: &Placed,
        arena: &ArenaMap,
    ) -> Result<(), PlanError> {
        if placed.bytes.is_empty() {
            return Ok(());
        }
        let (at, len) = (Gva(placed.at), placed.bytes.len());
        let outside = || PlanError::NotInArena { at, len };
        let gpa = arena.physical(at).ok_or_else(outside)?;
        // Both ends in one part: it is contiguous in both address spaces.
        let last = at.checked_add(len as u64 - 1).ok_or_else(outside)?;
        if arena.physical(last) != gpa.checked_add(len as u64 - 1) {
            return Err(outside());
        }
        self.writes.push(Write {
            purpose,
            subject: "the arena".into(),
            gva: at,
            gpa,
            expect: None,
            bytes: placed.bytes.clone(),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{ArenaMap, Entry, Lead, Plan, PlanError, Purpose};
    use crate::addr::{Gpa, Gva};
    use crate::edition::link::{Linked, Placed, Redirection};
    use crate::plan::target::Target;
    use crate::x86::insn::{self, Head, whole_instructions};

    const ARENA: Gva = Gva(0xffff_ffff_ff80_0000);
    const JUMP: Gva = Gva(0xffff_ffff_8100_0ffd);

    fn linked() -> Linked {
        let target = Target {
            name: "f".into(),
            function: Gva(JUMP.0 - 5),
            size: 0x40,
            jump: JUMP,
            displaced: vec![0x55, 0x48, 0x89, 0xe5, 0x41, 0x57, 0x90],
        };
        Linked {
            code: Placed {
                at: ARENA.0 + 64,
                bytes: vec![0xc3; 40],
            },
            data: Placed {
                at: ARENA.0 + 0x20_0000,
                bytes: vec![1, 2, 3],
            },
            redirections: vec![Redirection {
                target,
                edition: Gva(ARENA.0 + 64),
                head: Head {
                    at: Gva(ARENA.0 + 80),
                    bytes: Vec::new(),
                    moved: Vec::new(),
                },
            }],
            ..Linked::default()
        }
    }

    fn arena() -> ArenaMap {
        ArenaMap {
            parts: vec![
                (ARENA..Gva(ARENA.0 + 0x20_0000), Gpa(0x1000_0000)),
                (
                    Gva(ARENA.0 + 0x20_0000)..Gva(ARENA.0 + 0x40_0000),
                    Gpa(0x1020_0000),
                ),
            ],
            entries: vec![Entry {
                at: Gpa(0x3fe0),
                expect: 0,
                value: 0x1000_00a1,
                maps: ARENA,
            }],
        }
    }

    fn of(linked: &Linked, turns: &[(Lead, Lead)]) -> Result<Plan, PlanError> {
        let mut plan = Plan::default();
        plan.map(&arena());
        plan.place_all(linked, &arena())?;
        for (from, to) in turns {
            // The page behind the first one of the function is elsewhere in memory.
            let target = &linked.redirections[0].target;
            plan.redirect(target, *from, *to, |at| {
                Ok(if at.0 < 0xffff_ffff_8100_1000 {
                    Gpa(0x1ffd)
                } else {
                    Gpa(0x9000)
                })
            })?;
        }
        Ok(plan)
    }

    const EDITION: Lead = Lead::Edition(Gva(ARENA.0 + 64));

    fn plan() -> Plan {
        of(&linked(), &[(Lead::Original, EDITION)]).unwrap()
    }

    #[test]
    fn new_code_becomes_reachable_last() {
        let plan = plan();
        let purposes: Vec<Purpose> = plan.writes.iter().map(|write| write.purpose).collect();
        use Purpose::{Arena, Mapping, Trampoline};
        assert_eq!(purposes, [Mapping, Arena, Arena, Trampoline, Trampoline]);
        assert_eq!(plan.writes[2].gpa, Gpa(0x1020_0000));
        assert_eq!(plan.forbidden, [Gva(JUMP.0 + 1)..Gva(JUMP.0 + 7)]);
        assert_eq!(plan.len(), 8 + 40 + 3 + 7);
    }

    #[test]
    fn the_jump_is_cut_at_the_page_and_filled_with_nops() {
        let plan = plan();
        let [first, second] = &plan.writes[3..] else {
            panic!("two pieces")
        };
        assert_eq!(
            (first.gva, first.gpa, first.bytes.len()),
            (JUMP, Gpa(0x1ffd), 3)
        );
        assert_eq!(
            (second.gva, second.gpa, second.bytes.len()),
            (Gva(JUMP.0 + 3), Gpa(0x9000), 4)
        );
        let whole = [first.bytes.clone(), second.bytes.clone()].concat();
        let instructions = whole_instructions(&whole, JUMP, 7).unwrap();
        assert_eq!(instructions[0].near_branch_target(), ARENA.0 + 64);
        assert_eq!((instructions.len(), &whole[5..]), (2, &insn::nops(2)[..]));
    }

    #[test]
    fn each_turn_expects_what_the_one_before_has_left() {
        let other = Lead::Handler(Gva(ARENA.0 + 0x80));
        let turns = [
            (Lead::Original, EDITION),
            (EDITION, other),
            (other, Lead::Original),
        ];
        let plan = of(&linked(), &turns).unwrap();
        let jumps: Vec<_> = plan.writes.iter().skip(3).collect();
        assert_eq!(jumps.len(), 6, "two pieces each");
        for (before, after) in jumps.iter().zip(jumps.iter().skip(2)) {
            assert_eq!(after.expect.as_ref(), Some(&before.bytes));
        }
        assert_eq!(jumps[0].expect.as_ref(), Some(&jumps[4].bytes));
        let none = of(&linked(), &[(EDITION, EDITION)]).unwrap();
        assert!(none.writes.len() == 3 && none.forbidden.is_empty());
    }

    #[test]
    fn what_does_not_fit_the_arena_is_refused() {
        let mut outside = linked();
        outside.code.at = ARENA.0 + 0x1f_fff0;
        assert!(
            of(&outside, &[]).is_ok(),
            "both halves happen to be contiguous"
        );
        outside.data.at = ARENA.0 + 0x3f_ffff;
        assert_eq!(
            of(&outside, &[]),
            Err(PlanError::NotInArena {
                at: Gva(ARENA.0 + 0x3f_ffff),
                len: 3
            })
        );
        let mut plan = Plan::default();
        let target = &linked().redirections[0].target;
        let error = plan.redirect(target, Lead::Original, EDITION, |_| {
            Err("not present".into())
        });
        assert!(matches!(error, Err(PlanError::Unmapped { at: JUMP, .. })));
        let far = Lead::Edition(Gva(0x7fff_0000_0000));
        let error = plan.redirect(target, Lead::Original, far, |_| Ok(Gpa(0)));
        assert!(matches!(error, Err(PlanError::Jump(_))));
        assert!(plan.is_empty());
    }
}
