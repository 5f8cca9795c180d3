//! The named times that rules go by: `during NAME` is true while the host has begun it and not ended it.
//!
//! Beginning or ending one is an aligned store into each cell that shows it, without a pause: every call goes by what was before or by what is after.

use super::arena::Arena;
use super::tune::{SetsError, named, store};
use crate::edition::set::Store;
use crate::guest::Guest;
use crate::rule::During;
use crate::rule::tune::Use;

/// Begins or ends a time, which is made if there is none of that name.
///
/// # Errors
/// [`SetsError`]; rules go by what was before, or some of them by what is to be: doing it again mends that.
pub fn set_time<G: Guest>(
    guest: &mut G,
    arena: &mut Arena,
    name: &str,
    on: bool,
) -> Result<(), SetsError> {
    if !arena.holds.clocks.times.contains_key(name) {
        named(name)?;
    }
    let shows = |what: &Use| matches!(what, Use::During(During::Named(time)) if time == name);
    let made = arena.holds.made.iter();
    let cells = made.flat_map(|made| &made.assembled.cells);
    let due = cells
        .filter(|cell| shows(&cell.what))
        .map(|cell| Store {
            at: cell.at,
            value: on.into(),
        })
        .collect::<Vec<_>>();
    store(guest, arena, &due)?;
    arena.holds.clocks.times.insert(name.to_owned(), on);
    Ok(())
}

/// Does away with a time that no rule goes by.
///
/// # Errors
/// [`SetsError`].
pub fn drop_time(arena: &mut Arena, name: &str) -> Result<(), SetsError> {
    let holds = &mut arena.holds;
    if !holds.clocks.times.contains_key(name) {
        return Err(SetsError::None {
            name: name.to_owned(),
        });
    }
    if let Some(update) = holds.goes_by(|rule| rule.times().any(|time| time == name)) {
        let name = name.to_owned();
        return Err(SetsError::Used { name, update });
    }
    holds.clocks.times.remove(name);
    Ok(())
}
