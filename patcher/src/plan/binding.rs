//! The tasks that are bound to the old side of a group of functions: who they are is told by the stacks, under the pause that switches.
//!
//! A task that is in the group's old code, or may be, goes on by the old side until it has been seen outside; all others go by the new one at
//! once. The set that handlers look into is written before any of them can be reached, and a task only ever leaves it.

use std::collections::BTreeSet;

use super::{Purpose, Write};
use crate::addr::{Gpa, Gva};
use crate::commit::Blocked;
use crate::edition::set::{Set, SetError};
use crate::kernel::quiescence::Inside;

/// What is done about the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Whoever is inside is put into it: nobody is in it yet.
    Fill {
        /// Tasks that are on the side that everybody goes to, wherever they are.
        but: BTreeSet<u64>,
    },
    /// Whoever is no longer inside is taken out.
    Keep,
}

/// A set of bound tasks, and what is done about it under the pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The set as it is.
    pub set: Set,
    /// Where its first slot is.
    pub at: Gpa,
    /// What is done.
    pub bind: Bind,
}

impl Binding {
    /// The set with those of `inside` that belong there, and the writes that make it so.
    ///
    /// # Errors
    /// [`Blocked::Busy`] when somebody is inside who is no task, or there are more than find room.
    pub fn with(&self, inside: &[Inside]) -> Result<(Set, Vec<Write>), Blocked> {
        let mut set = self.set.clone();
        let mut tasks = BTreeSet::new();
        for inside in inside {
            let task = inside.task.ok_or_else(|| Blocked::Busy {
                cause: format!(
                    "{} is in the group, and it cannot be told which task that is",
                    inside.who
                ),
            })?;
            let _ = tasks.insert(task.0);
        }
        match &self.bind {
            Bind::Fill { but } => {
                for task in tasks.into_iter().filter(|task| !but.contains(task)) {
                    set.insert(task).map_err(|error: SetError| Blocked::Busy {
                        cause: format!("more tasks are in the group than can be bound: {error}"),
                    })?;
                }
                let write = self.write(0, None, set.bytes());
                Ok((set, vec![write]))
            }
            Bind::Keep => {
                let gone: Vec<u64> = set.keys().filter(|key| !tasks.contains(key)).collect();
                let mut writes = Vec::new();
                for key in gone {
                    let Some(store) = set.remove(key) else {
                        continue;
                    };
                    let offset = store.at.0.wrapping_sub(set.memory().0.0);
                    let (old, new) = (key.to_le_bytes(), store.value.to_le_bytes());
                    writes.push(self.write(offset, Some(old.to_vec()), new.to_vec()));
                }
                Ok((set, writes))
            }
        }
    }

    fn write(&self, offset: u64, expect: Option<Vec<u8>>, bytes: Vec<u8>) -> Write {
        Write {
            purpose: Purpose::Arena,
            subject: "the set of bound tasks".to_owned(),
            gva: Gva(self.set.memory().0.0.wrapping_add(offset)),
            gpa: Gpa(self.at.0.wrapping_add(offset)),
            expect,
            bytes,
        }
    }
}
