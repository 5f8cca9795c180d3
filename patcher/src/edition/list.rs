//! The functions that have editions, each with its list, and which of them decides when an update comes or goes.
//!
//! An edition that comes later lies on top of those before it, and is asked first: if it has a rule, calls that the rule is not for get to
//! those beneath it, down to the original. An update goes as a whole, and what it leaves behind must be something that
//! was meant to be: either all of its functions go back to what is beneath, or none of its editions was in effect any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::addr::Gva;
use crate::plan::Lead;
use crate::plan::target::Target;
use crate::rule::Rule;

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

/// One of the editions that a call may get to, in the order in which they are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The update that brought it; `None` for the original.
    pub update: Option<UpdateId>,
    /// Where it begins; the original's head.
    pub to: Gva,
    /// The calls that it is for; all that come to it if there is none.
    pub rule: Option<Arc<Rule>>,
    /// Where its calls are counted.
    pub counter: Option<Gva>,
}

/// How an update's editions are used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// The calls that they are for; all if there is none.
    pub rule: Option<Arc<Rule>>,
    /// Calls are counted, those that go to the original too.
    pub counted: bool,
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
    /// The editions that calls may get to by that; none while it leads to the original.
    pub way: Vec<Step>,
    /// What it leads to is not what the way alone asks for.
    unsettled: bool,
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
    /// It is not being switched.
    #[error("no task is bound to the old side of update {update}, so there is nothing to force")]
    NotPassing {
        /// The update.
        update: UpdateId,
    },
    /// Another one is still switching a function that this one is about.
    #[error(
        "{function} is still being switched by update {by}: some tasks have yet to leave its old side; wait for that, force it, or take that switch back by itself"
    )]
    Passing {
        /// The function.
        function: String,
        /// The other update.
        by: UpdateId,
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
            way: Vec::new(),
            unsettled: false,
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

    /// Takes the editions of `update` off the lists, whatever lies on them.
    pub(crate) fn take_off(&mut self, update: UpdateId) {
        for function in self.by_address.values_mut() {
            function.editions.retain(|edition| edition.update != update);
        }
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

    /// The functions whose lists ask for another way than the one that is in effect, with that.
    ///
    /// `uses` tells how each update's editions are used, `counter` where calls of a function that go to an update's edition are counted.
    pub fn changes(
        &self,
        uses: impl Fn(UpdateId) -> Use,
        counter: impl Fn(Gva, Option<UpdateId>) -> Option<Gva>,
    ) -> Vec<(Target, Vec<Step>)> {
        let changed = |function: &Function| {
            let way = function.wanted(&uses, &counter);
            (function.unsettled || way != function.way).then(|| (function.target.clone(), way))
        };
        self.by_address.values().filter_map(changed).collect()
    }

    /// Notes that the editions of `update` are by `rule` now, wherever calls get to them.
    pub(crate) fn retuned(&mut self, update: UpdateId, rule: &Arc<Rule>) {
        let functions = self.by_address.values_mut();
        let steps = functions.flat_map(|function| &mut function.way);
        for step in steps.filter(|step| step.update == Some(update)) {
            step.rule = Some(Arc::clone(rule));
        }
    }

    /// Has what the function at `at` leads to be told anew, whatever way it is.
    pub fn unsettle(&mut self, at: Gva) {
        if let Some(function) = self.by_address.get_mut(&at) {
            function.unsettled = true;
        }
    }

    /// Notes where the function at `at` leads from now on, and by which way.
    pub fn led(&mut self, at: Gva, lead: Lead, way: Vec<Step>) {
        if let Some(function) = self.by_address.get_mut(&at) {
            (function.lead, function.way, function.unsettled) = (lead, way, false);
        }
        let stays =
            |function: &Function| !function.editions.is_empty() || function.lead != Lead::Original;
        self.by_address.retain(|_, function| stays(function));
    }
}

impl Function {
    /// The way that the list asks for.
    fn wanted(
        &self,
        uses: impl Fn(UpdateId) -> Use,
        counter: impl Fn(Gva, Option<UpdateId>) -> Option<Gva>,
    ) -> Vec<Step> {
        let (mut way, mut counted) = (Vec::new(), false);
        let at = self.target.function;
        for edition in self.editions.iter().rev() {
            let how = uses(edition.update);
            counted |= how.counted;
            let last = how.rule.is_none();
            way.push(Step {
                update: Some(edition.update),
                to: edition.at,
                rule: how.rule,
                counter: how
                    .counted
                    .then(|| counter(at, Some(edition.update)))
                    .flatten(),
            });
            if last {
                return way;
            }
        }
        let oldest = self.editions.first();
        way.extend(oldest.map(|oldest| Step {
            update: None,
            to: oldest.head,
            rule: None,
            counter: counted.then(|| counter(at, None)).flatten(),
        }));
        way
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use std::sync::Arc;

    use super::{Functions, ListError, Listed, Step, UpdateId, Use};
    use crate::addr::Gva;
    use crate::plan::Lead;
    use crate::plan::target::Target;
    use crate::rule::Rule;

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
            settle(&mut functions);
        }
        functions
    }

    fn plain(_: UpdateId) -> Use {
        Use::default()
    }

    fn uncounted(_: Gva, _: Option<UpdateId>) -> Option<Gva> {
        None
    }

    /// Has all lists be in effect.
    fn settle(functions: &mut Functions) {
        for (target, way) in functions.changes(plain, uncounted) {
            let lead = way
                .first()
                .map_or(Lead::Original, |step| Lead::Edition(step.to));
            functions.led(target.function, lead, way);
        }
    }

    /// Where each function is to lead, as the update whose edition that is.
    fn turns(functions: &Functions) -> Vec<(u64, UpdateId)> {
        let changes = functions.changes(plain, uncounted).into_iter();
        let first = |way: &[Step]| way.first().and_then(|step| step.update).unwrap_or(0);
        changes
            .map(|(target, way)| (target.function.0, first(&way)))
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
        assert!(
            functions.redirected(Gva(1)).is_some(),
            "until it is written"
        );
        settle(&mut functions);
        assert_eq!(functions, Functions::default());
    }

    #[test]
    fn calls_go_down_the_list_until_an_edition_is_for_all() {
        let functions = listed(&[(1, &[1]), (2, &[1]), (3, &[1])]);
        let rule = Arc::new(Rule::parse("pid = 1").unwrap());
        // Of each update whether it has a rule and whether it is counted; and the updates on the way with where they are counted.
        let check = |uses: [(bool, bool); 3], want: &[(UpdateId, Option<u64>)]| {
            let uses = |update: UpdateId| {
                let (ruled, counted) = uses[usize::try_from(update - 1).unwrap()];
                let rule = ruled.then(|| Arc::clone(&rule));
                Use { rule, counted }
            };
            let counter = |function: Gva, update: Option<UpdateId>| {
                Some(Gva(100 * function.0 + update.unwrap_or(0)))
            };
            let changes = functions.changes(uses, counter);
            let way = changes.first().map_or(&[][..], |(_, way)| way);
            let of = |step: &Step| (step.update.unwrap_or(0), step.counter.map(|at| at.0));
            assert_eq!(way.iter().map(of).collect::<Vec<_>>(), want);
            let last = way.len().saturating_sub(1);
            assert!(
                way.iter()
                    .enumerate()
                    .all(|(nth, step)| step.rule.is_none() == (nth == last))
            );
        };
        check([(false, false), (false, false), (false, false)], &[]);
        check(
            [(false, false), (true, false), (true, false)],
            &[(3, None), (2, None), (1, None)],
        );
        check(
            [(true, false), (false, true), (true, false)],
            &[(3, None), (2, Some(102))],
        );
        let original = [(3, Some(103)), (2, None), (1, None), (0, Some(100))];
        check([(true, false), (true, false), (true, true)], &original);
        check(
            [(false, false), (false, false), (false, true)],
            &[(3, Some(103))],
        );
    }
}
