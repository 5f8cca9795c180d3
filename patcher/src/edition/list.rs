//! The functions that have editions, each with its list, and which of them decides when an update comes or goes.
//!
//! An edition that comes later lies on top of those before it. An update goes as a whole, and what it leaves behind must be something that
//! was meant to be: either all of its functions go back to what is beneath, or none of its editions was in effect any more.

use std::collections::{BTreeMap, BTreeSet};

use crate::addr::Gva;
use crate::plan::Lead;
use crate::plan::target::Target;

/// Number of an update, given by whoever applies it.
pub type UpdateId = u64;

/// One edition of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The update that brought it.
    pub update: UpdateId,
    /// Its first byte.
    pub at: Gva,
    /// The head by which it calls the original.
    pub head: Gva,
}

/// A function with its editions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where the jump goes, and the bytes that it displaces.
    pub target: Target,
    /// Its editions but the original, the newest last.
    pub editions: Vec<Listed>,
    /// Where it leads now.
    pub lead: Lead,
}

/// Why an update cannot come or go. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// It is not in effect.
    #[error("update {update} is not in effect in this kernel")]
    NotInEffect {
        /// The update.
        update: UpdateId,
    },
    /// Another one was made to run on top of it.
    #[error(
        "update {update} cannot be taken away beneath update {by}: both replace {}, but {by} does not replace {}, which would go back \
         while the others stay; revert update {by} first, or both at once", .shared.join(", "), .alone.join(", ")
    )]
    Beneath {
        /// The update.
        update: UpdateId,
        /// The one on top of it.
        by: UpdateId,
        /// Functions that both replace.
        shared: Vec<String>,
        /// Functions that only `update` replaces.
        alone: Vec<String>,
    },
}

/// All functions that have, or had, editions; by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Functions {
    by_address: BTreeMap<Gva, Function>,
}

impl Functions {
    /// The function at `at`, if it leads anywhere.
    #[must_use]
    pub fn redirected(&self, at: Gva) -> Option<&Function> {
        let function = self.by_address.get(&at);
        function.filter(|function| function.lead != Lead::Original)
    }

    /// The function at `at`, if it has editions.
    #[must_use]
    pub fn get(&self, at: Gva) -> Option<&Function> {
        self.by_address.get(&at)
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Function> {
        self.by_address.values()
    }

    /// Lists an edition on top of those that `target` has.
    pub fn add(&mut self, target: &Target, edition: Listed) {
        let entry = self.by_address.entry(target.function);
        let function = entry.or_insert_with(|| Function {
            target: target.clone(),
            editions: Vec::new(),
            lead: Lead::Original,
        });
        if function.lead == Lead::Original {
            function.target = target.clone();
        }
        function.editions.push(edition);
    }

    /// Takes the editions of `updates` off the lists.
    ///
    /// # Errors
    /// [`ListError`]; nothing was taken off then.
    pub fn remove(&mut self, updates: &BTreeSet<UpdateId>) -> Result<(), ListError> {
        for update in updates {
            self.may_go(*update, updates)?;
        }
        for function in self.by_address.values_mut() {
            let stays = |edition: &Listed| !updates.contains(&edition.update);
            function.editions.retain(stays);
        }
        Ok(())
    }

    /// Whether `update` can be taken away together with the others of `going`.
    fn may_go(&self, update: UpdateId, going: &BTreeSet<UpdateId>) -> Result<(), ListError> {
        let mine: BTreeSet<Gva> = self.of(update).collect();
        if mine.is_empty() {
            return Err(ListError::NotInEffect { update });
        }
        for by in self.on_top_of(update) {
            let theirs: BTreeSet<Gva> = self.of(by).collect();
            if going.contains(&by) || mine.is_subset(&theirs) {
                continue;
            }
            return Err(ListError::Beneath {
                update,
                by,
                shared: self.names(mine.intersection(&theirs)),
                alone: self.names(mine.difference(&theirs)),
            });
        }
        Ok(())
    }

    /// The addresses of the functions that `update` replaces.
    pub fn of(&self, update: UpdateId) -> impl Iterator<Item = Gva> {
        let replaces =
            move |function: &&Function| function.editions.iter().any(|it| it.update == update);
        let functions = self.by_address.iter();
        functions
            .filter(move |(_, function)| replaces(function))
            .map(|(at, _)| *at)
    }

    /// The updates with editions on top of those of `update`.
    fn on_top_of(&self, update: UpdateId) -> BTreeSet<UpdateId> {
        let above = |function: &Function| -> Vec<UpdateId> {
            let editions = function.editions.iter();
            let from = editions.skip_while(|edition| edition.update != update);
            from.skip(1).map(|edition| edition.update).collect()
        };
        self.by_address.values().flat_map(above).collect()
    }

    fn names<'a>(&self, functions: impl Iterator<Item = &'a Gva>) -> Vec<String> {
        let named = functions.filter_map(|at| self.by_address.get(at));
        named.map(|function| function.target.name.clone()).collect()
    }

    /// The functions that have to be led elsewhere for their lists to be in effect: where each leads, and where to.
    #[must_use]
    pub fn turns(&self) -> Vec<(Target, Lead, Lead)> {
        let turn = |function: &Function| {
            let top = function.editions.last();
            let to = top.map_or(Lead::Original, |edition| Lead::Edition(edition.at));
            (function.lead != to).then(|| (function.target.clone(), function.lead, to))
        };
        self.by_address.values().filter_map(turn).collect()
    }

    /// Notes where functions lead from now on.
    pub fn led(&mut self, turns: &[(Target, Lead, Lead)]) {
        for (target, _, to) in turns {
            if let Some(function) = self.by_address.get_mut(&target.function) {
                function.lead = *to;
            }
        }
        let stays =
            |function: &Function| !function.editions.is_empty() || function.lead != Lead::Original;
        self.by_address.retain(|_, function| stays(function));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Functions, ListError, Listed, UpdateId};
    use crate::addr::Gva;
    use crate::plan::Lead;
    use crate::plan::target::Target;

    fn target(function: u64) -> Target {
        Target {
            name: format!("f{function}"),
            function: Gva(function),
            size: 0x40,
            jump: Gva(function + 5),
            displaced: vec![0x90; 5],
        }
    }

    /// Functions, given as small numbers, with the editions of updates in the order in which they came.
    fn listed(updates: &[(UpdateId, &[u64])]) -> Functions {
        let mut functions = Functions::default();
        for (update, of) in updates {
            for function in *of {
                let at = Gva(0x1000 * update + function);
                let (update, head) = (*update, Gva(at.0 + 0x800));
                functions.add(&target(*function), Listed { update, at, head });
            }
            functions.led(&functions.turns());
        }
        functions
    }

    /// Where each function is to lead, as the update whose edition that is.
    fn turns(functions: &Functions) -> Vec<(u64, UpdateId)> {
        let turns = functions.turns().into_iter();
        let update = |to: Lead| to.address().map_or(0, |at| at.0 / 0x1000);
        turns
            .map(|(target, _, to)| (target.function.0, update(to)))
            .collect()
    }

    #[test]
    fn an_update_goes_whole_or_not_at_all() {
        type Turns<'a> = &'a [(u64, UpdateId)];
        let check = |updates: &[(UpdateId, &[u64])],
                     going: &[UpdateId],
                     want: Result<Turns<'_>, UpdateId>| {
            let mut functions = listed(updates);
            let before = functions.clone();
            let going: BTreeSet<UpdateId> = going.iter().copied().collect();
            match (functions.remove(&going), want) {
                (Ok(()), Ok(want)) => assert_eq!(turns(&functions), want, "{updates:?}"),
                (Err(ListError::Beneath { by, .. }), Err(want)) => assert_eq!(by, want),
                (Err(ListError::NotInEffect { update }), Err(want)) => assert_eq!(update, want),
                (got, want) => panic!("{updates:?}: {got:?}, not {want:?}"),
            }
            if want.is_err() {
                assert_eq!(functions, before);
            }
        };
        check(&[(1, &[1, 2])], &[1], Ok(&[(1, 0), (2, 0)]));
        // The top one: what is beneath comes back.
        check(&[(1, &[1, 2]), (2, &[2, 3])], &[2], Ok(&[(2, 1), (3, 0)]));
        // One beneath another that replaces all of it: nothing changes.
        check(&[(1, &[1]), (2, &[1, 2])], &[1], Ok(&[]));
        check(&[(1, &[1, 2]), (2, &[2])], &[1], Err(2));
        check(&[(1, &[1, 2]), (2, &[2])], &[1, 2], Ok(&[(1, 0), (2, 0)]));
        check(&[(1, &[1, 2]), (2, &[1]), (3, &[1, 2])], &[1], Err(2));
        check(&[(1, &[1, 2]), (2, &[1]), (3, &[1, 2])], &[1, 2], Ok(&[]));
        check(&[(1, &[1]), (2, &[2])], &[1], Ok(&[(1, 0)]));
        check(&[(1, &[1])], &[7], Err(7));
    }

    #[test]
    fn a_refusal_names_what_is_shared_and_what_would_go_back() {
        let mut functions = listed(&[(1, &[1, 2, 3]), (2, &[2])]);
        let refused = functions.remove(&BTreeSet::from([1])).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains("both replace f2") && said.contains("does not replace f1, f3"),
            "{said}"
        );
    }

    #[test]
    fn a_function_without_editions_is_forgotten_once_it_leads_nowhere() {
        let mut functions = listed(&[(1, &[1])]);
        assert!(functions.redirected(Gva(1)).is_some());
        functions.remove(&BTreeSet::from([1])).unwrap();
        let turns = functions.turns();
        assert!(
            functions.redirected(Gva(1)).is_some(),
            "until it is written"
        );
        functions.led(&turns);
        assert_eq!(functions, Functions::default());
    }
}
