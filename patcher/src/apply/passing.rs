//! A switch of a group of functions that some tasks have yet to make: they are bound to the old side until they were seen outside of it.
//!
//! At the switch, the tasks with code of the old side on their stacks, and those whose stack cannot be followed, go on by the old side;
//! everyone else, and every new task, goes by the new side. So no task ever runs old code of one function of the group beneath new code of
//! another. An interrupt goes the way of the task that it interrupted. What tasks share in memory is not ordered by this.

use std::ops::Range;

use crate::addr::{Gpa, Gva};
use crate::edition::list::UpdateId;
use crate::edition::set::Set;
use crate::kernel::quiescence::Inside;
use crate::plan::Plan;
use crate::plan::binding::{Bind, Binding};

/// Whose threads may be where when a group of functions is switched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Model {
    /// Anywhere but in the few bytes that change: what runs goes on as it began, and the next call gets to the new side.
    #[default]
    Immediate,
    /// Nobody in the old side: it is tried until that is so, or the deadline.
    Quiescent,
    /// Whoever is in the old side goes on by it until he was seen outside.
    PerTask,
}

/// A switch under way.
#[derive(Clone, Debug)]
pub struct Passing {
    /// The update that comes or goes.
    pub update: UpdateId,
    /// Whether it comes.
    pub coming: bool,
    /// The functions that are switched.
    pub functions: Vec<Gva>,
    /// Code of the old side.
    pub old: Vec<Range<Gva>>,
    /// The bound tasks.
    pub set: Set,
    /// Where the set is.
    pub at: Gpa,
    /// Where the bound tasks were when that was looked at last.
    pub inside: Vec<Inside>,
}

impl Passing {
    /// Has `plan` take those out of the set who are no longer inside. Whoever is on one of the `ways` may be coming there.
    pub(super) fn shrink(&self, plan: &mut Plan, ways: impl Iterator<Item = Range<Gva>>) {
        plan.group = self.old.iter().cloned().chain(ways).collect();
        plan.binding = Some(Binding {
            set: self.set.clone(),
            at: self.at,
            bind: Bind::Keep,
        });
    }

    /// Notes who was `inside` when it was looked at.
    pub(super) fn seen(&mut self, inside: Vec<Inside>, set: Set) {
        let bound = |inside: &Inside| inside.task.is_some_and(|task| set.contains(task.0));
        self.inside = inside.into_iter().filter(bound).collect();
        self.set = set;
    }
}
