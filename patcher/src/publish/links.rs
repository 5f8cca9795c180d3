//! Which words of the guest change when a unit becomes known to its kernel, or is taken back: in its two trees of modules, the bounds
//! of where modules are, and the list of bug tables.
//!
//! What is linked is read through what the plan places: its bytes are not in the guest yet.

use std::ops::Range;

use super::Publication;
use super::layout::{Layout, TREES};
use super::tree::{Draft, Side, Tree};
use crate::addr::{Gpa, Gva};
use crate::commit::Blocked;
use crate::guest::ReadPhys;
use crate::kernel::bytes::le_u64;
use crate::kernel::gather::Bound;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::plan::{Plan, Purpose, Write};

/// More nodes than any guest has: two for each module.
const MAX_NODES: usize = 8192;
/// Whose words these are, for messages.
const SUBJECT: &str = "the kernel's list of its modules";

/// What the guest's kernel finds code by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// What begins in the tree, in order, and the `struct module` that it leads to.
    pub code: Vec<(Range<Gva>, Gva)>,
    /// The modules with bug tables, newest first.
    pub bugs: Vec<Gva>,
}

fn unsound(what: &'static str, at: Gva, value: u64) -> KernelError {
    KernelError::Unsound { what, at, value }
}

fn unreadable(cause: impl std::fmt::Display) -> Blocked {
    Blocked::Unreadable {
        cause: cause.to_string(),
    }
}

/// The writes that make the units of `plan` known to the paused `guest`, and take back those that it takes back. They come after the plan's writes
/// to the arena.
///
/// # Errors
/// [`Blocked::InFlux`] while the guest changes what would be changed, [`Blocked::Unreadable`] when that is unsound, or knows the code already.
pub fn writes<R: ReadPhys>(kernel: &Kernel, guest: &R, plan: &Plan) -> Result<Vec<Write>, Blocked> {
    let all = || plan.publish.iter().chain(&plan.unpublish);
    let Some(layout) = all().next().map(|publication| &publication.layout) else {
        return Ok(Vec::new());
    };
    let memory = Memory::new(kernel, guest).map_err(unreadable)?;
    let read = |at: Gva| match planned(plan, at) {
        Some((_, word)) => Ok(word),
        None => Ok(memory.u64(at)?),
    };
    let changes = memory.u32(layout.changes).map_err(unreadable)?;
    if changes % 2 != 0 {
        return Err(Blocked::InFlux {
            cause: "mod_tree".to_owned(),
        });
    }
    let mut draft = Draft::new(&read);
    let mut change = || {
        for publication in &plan.unpublish {
            publication.unlink(&mut draft)?;
        }
        for publication in &plan.publish {
            publication.link(&mut draft)?;
        }
        Ok::<(), KernelError>(())
    };
    change().map_err(unreadable)?;
    let write = |gva: Gva, expect: Option<Vec<u8>>, bytes: Vec<u8>| {
        let gpa = match planned(plan, gva) {
            Some((gpa, _)) => gpa,
            None => kernel.translate(guest, gva).map_err(unreadable)?,
        };
        Ok(Write {
            purpose: Purpose::Publication,
            subject: SUBJECT.to_owned(),
            gva,
            gpa,
            expect,
            bytes,
        })
    };
    let words = draft.changes().map(|(at, old, new)| {
        // What the plan itself places is not there before.
        let expect = planned(plan, at).is_none();
        let expect = expect.then(|| old.to_le_bytes().to_vec());
        write(at, expect, new.to_le_bytes().to_vec())
    });
    let mut writes = words.collect::<Result<Vec<_>, Blocked>>()?;
    let count = |count: u32| count.to_le_bytes().to_vec();
    let next = changes.wrapping_add(2);
    writes.push(write(layout.changes, Some(count(changes)), count(next))?);
    Ok(writes)
}

/// The word at `at`, and its memory, if `plan` places it.
fn planned(plan: &Plan, at: Gva) -> Option<(Gpa, u64)> {
    plan.writes.iter().find_map(|write| {
        let offset = at.offset_from(write.gva)?;
        let word = le_u64(&write.bytes, usize::try_from(offset).ok()?)?;
        let ours = matches!(write.purpose, Purpose::Arena | Purpose::Publication);
        Some((write.gpa.checked_add(offset)?, word)).filter(|_| ours)
    })
}

/// What the kernel in the paused `guest` finds code by, if all of it is sound: both trees are balanced and hold the same, nothing overlaps, and the list
/// leads back. `None` where the kernel has no such trees.
///
/// # Errors
/// When it cannot be read, or is unsound.
pub fn published<R: ReadPhys>(
    kernel: &Kernel,
    guest: &R,
) -> Result<Option<Published>, super::PublishError> {
    let Some(layout) = Layout::resolve(kernel)? else {
        return Ok(None);
    };
    let memory = Memory::new(kernel, guest).map_err(KernelError::from)?;
    let read = |at: Gva| Ok(memory.u64(at)?);
    let mut draft = Draft::new(&read);
    let mut trees = Vec::new();
    for (index, tree) in layout.trees().into_iter().enumerate() {
        let mut code: Vec<(Range<Gva>, Gva)> = Vec::new();
        for node in tree.nodes(&mut draft, MAX_NODES)? {
            let range = layout.range(&mut draft, index, node)?;
            if code.last().is_some_and(|(last, _)| range.start < last.end) {
                return Err(unsound("tree of modules", Gva(node), range.start.0).into());
            }
            let owner = layout.part(index, node);
            let owner = Gva(owner
                .0
                .wrapping_add(layout.module.owner.offset - layout.module.base.offset));
            code.push((range, Gva(draft.get(owner)?)));
        }
        trees.push(code);
    }
    let code = trees.pop().unwrap_or_default();
    if let Some(other) = trees.iter().find(|other| **other != code) {
        let differs = other.len() as u64;
        return Err(unsound("second tree of modules", layout.roots[1], differs).into());
    }
    let mut bugs = Vec::new();
    if let Some(head) = layout.bugs {
        let mut bound = Bound::new("list of bug tables", MAX_NODES);
        let mut at = head;
        loop {
            let next = Gva(draft.get(Gva(at.0.wrapping_add(layout.links.next)))?);
            let back = draft.get(Gva(next.0.wrapping_add(layout.links.prev)))?;
            if back != at.0 {
                return Err(unsound("list of bug tables", next, back).into());
            }
            if next == head {
                break;
            }
            bound.step(next.0)?;
            bugs.push(Gva(next.0.wrapping_sub(layout.module.bug_link)));
            at = next;
        }
    }
    Ok(Some(Published { code, bugs }))
}

impl Layout {
    fn trees(&self) -> [Tree; TREES] {
        self.roots.map(|root| Tree {
            root,
            layout: self.node,
        })
    }

    /// The `base` of the module that has `node` in tree `index`.
    fn part(&self, index: usize, node: u64) -> Gva {
        let offset = self.module.nodes.get(index).copied().unwrap_or(0);
        let start = node.wrapping_sub(offset);
        Gva(start.wrapping_add(self.module.base.offset))
    }

    /// The addresses that `node` of tree `index` is for.
    fn range(
        &self,
        draft: &mut Draft<'_>,
        index: usize,
        node: u64,
    ) -> Result<Range<Gva>, KernelError> {
        let base = self.part(index, node);
        let size = self.module.sizes.first().map_or(0, |size| size.offset);
        let size = Gva(base
            .0
            .wrapping_add(size)
            .wrapping_sub(self.module.base.offset));
        let start = Gva(draft.get(base)?);
        // A size has four bytes, and its word may begin before it.
        let word = draft.get(Gva(size.0 & !7))? >> (8 * (size.0 % 8));
        let range = start.range(word & u64::from(u32::MAX));
        range.ok_or_else(|| unsound("module in the tree", base, start.0))
    }
}

impl Publication {
    /// The node in tree `index`.
    fn node(&self, index: usize) -> u64 {
        let offset = self.layout.module.nodes.get(index).copied().unwrap_or(0);
        self.module.0.wrapping_add(offset)
    }

    fn link(&self, draft: &mut Draft<'_>) -> Result<(), KernelError> {
        let layout = &*self.layout;
        for (index, tree) in layout.trees().into_iter().enumerate() {
            tree.insert(draft, self.node(index), |draft, at| {
                let other = layout.range(draft, index, at)?;
                if self.code.end <= other.start {
                    Ok(Side::Left)
                } else if other.end <= self.code.start {
                    Ok(Side::Right)
                } else {
                    Err(unsound("module where our code is,", Gva(at), other.start.0))
                }
            })?;
        }
        let [lowest, highest] = layout.bounds;
        let (low, high) = (draft.get(lowest)?, draft.get(highest)?);
        draft.set(lowest, low.min(self.code.start.0))?;
        draft.set(highest, high.max(self.code.end.0))?;
        match layout.bugs.filter(|_| self.bugs) {
            Some(head) => self.link_bugs(draft, head),
            None => Ok(()),
        }
    }

    /// First in the list: who goes through it comes to a whole entry or to none.
    fn link_bugs(&self, draft: &mut Draft<'_>, head: Gva) -> Result<(), KernelError> {
        let links = self.layout.links;
        let of = |node: Gva, offset: u64| Gva(node.0.wrapping_add(offset));
        let first = Gva(draft.get(of(head, links.next))?);
        let back = draft.get(of(first, links.prev))?;
        if back != head.0 {
            return Err(unsound("list of bug tables", first, back));
        }
        let node = of(self.module, self.layout.module.bug_link);
        draft.set(of(node, links.next), first.0)?;
        draft.set(of(node, links.prev), head.0)?;
        draft.set(of(first, links.prev), node.0)?;
        draft.set(of(head, links.next), node.0)
    }

    fn unlink(&self, draft: &mut Draft<'_>) -> Result<(), KernelError> {
        for (index, tree) in self.layout.trees().into_iter().enumerate() {
            tree.erase(draft, self.node(index))?;
        }
        if self.layout.bugs.is_none() || !self.bugs {
            return Ok(());
        }
        let links = self.layout.links;
        let of = |node: Gva, offset: u64| Gva(node.0.wrapping_add(offset));
        let node = of(self.module, self.layout.module.bug_link);
        let next = Gva(draft.get(of(node, links.next))?);
        let prev = Gva(draft.get(of(node, links.prev))?);
        let back = draft.get(of(next, links.prev))?;
        let forth = draft.get(of(prev, links.next))?;
        if back != node.0 || forth != node.0 {
            return Err(unsound("list of bug tables", node, forth));
        }
        draft.set(of(next, links.prev), prev.0)?;
        draft.set(of(prev, links.next), next.0)
    }
}
