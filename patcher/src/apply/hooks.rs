//! Runs the hooks of updates: code of a package in a worker thread of the guest's kernel, before and behind a switch.
//!
//! Nothing in the guest waits for us, so the guest is led to begin a hook itself: the package's ticker becomes an edition of a function that
//! the kernel calls at every timer interrupt, it queues the work item once, and is taken back. What the two sides tell each other are words of the
//! package's data (see [`crate::edition::hook`]), read while the guest runs. A hook that was begun and not seen to end keeps the code of its update
//! in the guest; what the guest says of it can at worst do the same, or free code that the guest itself said was not needed, and that no thread is in.

use std::time::{Duration, Instant};

use super::ApplyError;
use super::arena::Arena;
use super::passing::Model;
use super::switch::Turn;
use super::tries::{ApplyOptions, Report};
use crate::addr::{Gpa, Gva};
use crate::edition::hook::{Cell, Moment};
use crate::edition::link::Hooks;
use crate::edition::list::{Listed, UpdateId};
use crate::guest::{Guest, GuestError, ReadPhys};
use crate::kernel::locate::Kernel;

/// Whose edition the ticker is while it is one: no update has that number.
pub(super) const TICKER: UpdateId = UpdateId::MAX;
/// How long it may take to take the ticker back behind a hook, whatever the deadline.
const TAKE_BACK: Duration = Duration::from_secs(10);
/// First wait between two looks at whether a hook has ended; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_micros(500);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_millis(20);

/// Why a hook keeps a switch from being made, or could not be run. What it did in the guest before that is not undone.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It said no.
    #[error("the hook {name}, which runs {moment}, returned {result}")]
    Refused {
        /// Its name.
        name: String,
        /// When it runs.
        moment: Moment,
        /// What it returned.
        result: i32,
    },
    /// It did not end in time.
    #[error("the hook {name}, which runs {moment}, {} {} ms; {}", if *.begun { "has not ended within" } else { "was not begun by any timer interrupt within" },
        .waited.as_millis(),
        if *.begun { "it goes on, and the code of its update stays in the guest until it has ended" } else { "it will not be begun any more" })]
    Late {
        /// Its name.
        name: String,
        /// When it runs.
        moment: Moment,
        /// Whether it was begun.
        begun: bool,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The one before it has not ended.
    #[error("the hook {name} of update {update}, which was begun before, has not ended yet")]
    Unended {
        /// The update.
        update: UpdateId,
        /// The hook that was begun.
        name: String,
    },
    /// The function from which hooks are begun is somebody else's.
    #[error(
        "hooks are begun from {function}, which update {by} replaces; revert update {by} first"
    )]
    Taken {
        /// The function.
        function: String,
        /// The update.
        by: UpdateId,
    },
    /// What it tells cannot be read, or what it is told not be written.
    #[error("the words by which the hook {name} is run cannot be reached: {cause}")]
    Cells {
        /// Its name.
        name: String,
        /// Why not.
        cause: GuestError,
    },
}

/// What became of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The guest is led to begin it.
    Began,
    /// It has returned that.
    Ended {
        /// What it returned: zero, or a negative error number.
        result: i32,
        /// Since it was to begin.
        after: Duration,
    },
    /// It was not run, or not seen to end.
    Failed {
        /// Why.
        why: String,
        /// Since it was to begin.
        after: Duration,
    },
}

/// A hook of an update, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookEvent {
    /// The update.
    pub update: UpdateId,
    /// Name of the hook.
    pub name: String,
    /// When it runs.
    pub moment: Moment,
    /// What became of it.
    pub stage: Stage,
}

/// A hook that was begun, until it was seen to end.
#[derive(Clone, Debug)]
pub(super) struct Started {
    name: String,
    moment: Moment,
    began: Instant,
    run: u64,
    cells: Gva,
    /// Nobody was in its update's code once the ticker had been taken back: who has not queued it by then never will.
    closed: bool,
}

impl Started {
    /// Notes that nobody is in the update's code, and nothing leads to the ticker; why the code stays.
    pub(super) fn close(&mut self) -> String {
        self.closed = true;
        format!("its hook {}, which has not ended", self.name)
    }
}

/// Where a word of the cells is.
fn physical(arena: &Arena, cells: Gva, cell: Cell) -> Result<Gpa, GuestError> {
    let at = Gva(cells.0.wrapping_add(u64::from(cell as u8)));
    let gpa = arena.layout.data.physical(at, 8);
    gpa.ok_or(GuestError::NoMemory {
        at: Gpa(at.0),
        len: 8,
    })
}

fn read<R: ReadPhys>(guest: &R, arena: &Arena, cells: Gva, cell: Cell) -> Result<u64, GuestError> {
    let mut bytes = [0; 8];
    guest.read_phys(physical(arena, cells, cell)?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn store<G: Guest>(
    guest: &mut G,
    arena: &Arena,
    cells: Gva,
    cell: Cell,
    value: u64,
) -> Result<(), GuestError> {
    guest.store(physical(arena, cells, cell)?, value)
}

/// Whether an update has a hook of that moment.
pub(super) fn has(arena: &Arena, update: UpdateId, moment: Moment) -> bool {
    let placed = arena.holds.placed.get(&update);
    let hooks = placed.and_then(|placed| placed.linked.hooks.as_ref());
    hooks.is_some_and(|hooks| hooks.list.iter().any(|(at, ..)| *at == moment))
}

/// Tells of hooks that have ended since, forgets them and those that never will be begun, and takes a ticker back that was left in place.
///
/// # Errors
/// When the guest cannot be read, or the ticker not be taken back.
pub(super) fn ready<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    let mut over = Vec::new();
    for (update, started) in &arena.holds.hooks {
        let read = |cell| {
            read(guest, arena, started.cells, cell).map_err(|cause| HookError::Cells {
                name: started.name.clone(),
                cause,
            })
        };
        let tell = |stage| {
            (options.hook)(&HookEvent {
                update: *update,
                name: started.name.clone(),
                moment: started.moment,
                stage,
            });
        };
        let after = started.began.elapsed();
        if read(Cell::Ended)? == started.run {
            let result = result(read(Cell::Result)?);
            tell(Stage::Ended { result, after });
            over.push(*update);
        } else if started.closed && read(Cell::Taken)? != started.run {
            over.push(*update);
        }
    }
    arena.holds.hooks.retain(|update, _| !over.contains(update));
    if arena.holds.functions.of(TICKER).next().is_none() {
        return Ok(());
    }
    take_back(guest, kernel, arena, options)
}

/// Runs the hook that `update` has for `moment`, if it has one, and tells about it.
///
/// # Errors
/// When it says no, is late, or cannot be run.
pub(super) fn run<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    (update, moment): (UpdateId, Moment),
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    let placed = arena.holds.placed.get(&update);
    let Some(hooks) = placed.and_then(|placed| placed.linked.hooks.clone()) else {
        return Ok(());
    };
    let Some((_, name, at)) = hooks.list.iter().find(|(at, ..)| *at == moment) else {
        return Ok(());
    };
    let began = Instant::now();
    let tell = |stage| {
        (options.hook)(&HookEvent {
            update,
            name: name.clone(),
            moment,
            stage,
        });
    };
    (options.doing)(format!("running the hook {name}, {moment}"));
    tell(Stage::Began);
    let ran = run_one(
        guest,
        kernel,
        arena,
        (update, name, *at, moment),
        &hooks,
        options,
    );
    let after = began.elapsed();
    let error: ApplyError = match ran {
        Ok(Ran::Returned(result)) => {
            tell(Stage::Ended { result, after });
            let name = name.clone();
            return match result {
                0 => Ok(()),
                result => Err(HookError::Refused {
                    name,
                    moment,
                    result,
                }
                .into()),
            };
        }
        Ok(Ran::Late { begun }) => HookError::Late {
            name: name.clone(),
            moment,
            begun,
            waited: after,
        }
        .into(),
        Err(error) => error,
    };
    let why = error.to_string();
    tell(Stage::Failed { why, after });
    Err(error)
}

/// Runs hooks behind a switch. What they return is told, and changes nothing.
///
/// # Errors
/// Only one that [is broken](ApplyError::is_broken).
pub(super) fn run_behind<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    hooks: impl Iterator<Item = (UpdateId, Moment)>,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    for hook in hooks {
        match run(guest, kernel, arena, hook, options) {
            Err(error) if error.is_broken() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

enum Ran {
    Returned(i32),
    Late { begun: bool },
}

fn run_one<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    (update, name, at, moment): (UpdateId, &str, Gva, Moment),
    hooks: &Hooks,
    options: &ApplyOptions<'_>,
) -> Result<Ran, ApplyError> {
    let run = begin(guest, kernel, arena, (update, name, moment), hooks, options)?;
    let ran = wait(guest, arena, (hooks.cells, run), at, options);
    let patient = ApplyOptions {
        deadline: options.deadline.max(Instant::now() + TAKE_BACK),
        ..*options
    };
    take_back(guest, kernel, arena, &patient)?;
    let cells = |cause| HookError::Cells {
        name: name.to_owned(),
        cause,
    };
    match ran.map_err(cells)? {
        Some(result) => {
            arena.holds.hooks.remove(&update);
            Ok(Ran::Returned(result))
        }
        None => {
            let taken = read(guest, arena, hooks.cells, Cell::Taken).map_err(cells)?;
            Ok(Ran::Late {
                begun: taken == run,
            })
        }
    }
}

/// Leads timer interrupts to the ticker; the number of the run.
fn begin<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    (update, name, moment): (UpdateId, &str, Moment),
    hooks: &Hooks,
    options: &ApplyOptions<'_>,
) -> Result<u64, ApplyError> {
    let ticker = &hooks.ticker;
    let mut turn = Turn::new(arena, TICKER, true);
    turn.map(guest, kernel, arena)?;
    let draft = &mut turn.draft;
    if let Some(started) = draft.hooks.get(&update) {
        let name = started.name.clone();
        return Err(HookError::Unended { update, name }.into());
    }
    let listed = draft.functions.get(ticker.target.function);
    if let Some(other) = listed.and_then(|function| function.editions.last()) {
        let (function, by) = (ticker.target.name.clone(), other.update);
        return Err(HookError::Taken { function, by }.into());
    }
    draft.run += 1;
    let run = draft.run;
    let started = Started {
        name: name.to_owned(),
        moment,
        began: Instant::now(),
        run,
        cells: hooks.cells,
        closed: false,
    };
    draft.hooks.insert(update, started);
    draft.free.remove(&update);
    let edition = Listed {
        update: TICKER,
        at: ticker.edition,
        head: ticker.head.at,
    };
    draft.functions.add(&ticker.target, edition);
    switch(turn, guest, kernel, arena, options)?;
    Ok(run)
}

/// Has the guest begin the run, and waits until it has ended; what it returned, or `None` at the deadline.
fn wait<G: Guest>(
    guest: &mut G,
    arena: &Arena,
    (cells, run): (Gva, u64),
    hook: Gva,
    options: &ApplyOptions<'_>,
) -> Result<Option<i32>, GuestError> {
    store(guest, arena, cells, Cell::Hook, hook.0)?;
    // The guest looks at the others only once it sees this.
    store(guest, arena, cells, Cell::Asked, run)?;
    let mut wait = FIRST_WAIT;
    while read(guest, arena, cells, Cell::Ended)? != run {
        if options.deadline <= Instant::now() {
            // No timer interrupt is to begin it from here on.
            store(guest, arena, cells, Cell::Asked, 0)?;
            return Ok(None);
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    Ok(Some(result(read(guest, arena, cells, Cell::Result)?)))
}

/// The `int` that a hook has returned, of the word that it is in.
fn result(word: u64) -> i32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

/// Leads timer interrupts to where they went before.
fn take_back<G: Guest>(
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<(), ApplyError> {
    let mut turn = Turn::new(arena, TICKER, false);
    turn.map(guest, kernel, arena)?;
    turn.draft.functions.take_off(TICKER);
    switch(turn, guest, kernel, arena, options).map(drop)
}

/// A switch that is not the operation's own: what it writes can still be undone.
pub(super) fn switch<G: Guest>(
    turn: Turn,
    guest: &mut G,
    kernel: &Kernel,
    arena: &mut Arena,
    options: &ApplyOptions<'_>,
) -> Result<Report, ApplyError> {
    let quiet = ApplyOptions {
        written: &|| {},
        check_only: false,
        ..*options
    };
    turn.switch(guest, kernel, arena, Model::Immediate, &quiet)
}
