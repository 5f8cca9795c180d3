//! Rules, clocks and sets that change while their handler is in force, on a fake guest: by stores, and without a pause.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::times::{drop_time, set_time};
use super::tune::{MAX_SET_ROOM, SetChange, SetsError, change_set, drop_set, tick};
use super::whole_tests::{booted, how, options, package, undo};
use super::{ApplyError, Arena, Request, apply, reuse};
use crate::addr::Gva;
use crate::edition::list::Use;
use crate::guest::fake::{Call, FakeGuest, Fault};
use crate::kernel::locate::Kernel;
use crate::kernel::testing::{BUILD_ID, Form};
use crate::plan::Lead;
use crate::rule::tune;

/// A guest with an update whose editions are for these calls.
fn ruled(rule: &str) -> (FakeGuest, Kernel, Arena) {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let package = package("patient", 0, &BUILD_ID);
    let request = Request {
        how: how(rule),
        ..Request::new(1, &package)
    };
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    guest.calls.clear();
    (guest, kernel, arena)
}

/// The cells of the only handler: what each is, and what it holds.
fn cells(guest: &FakeGuest, kernel: &Kernel, arena: &Arena) -> Vec<(tune::Use, u64)> {
    let cells = arena
        .holds
        .made
        .iter()
        .flat_map(|made| &made.assembled.cells);
    let read = |at: Gva| kernel.read_u64(guest, at).unwrap();
    cells
        .map(|cell| (cell.what.clone(), read(cell.at)))
        .collect()
}

#[test]
fn a_number_of_a_rule_changes_by_one_store() {
    let (mut guest, kernel, mut arena) = ruled("pid = 7 and cpu < 2");
    let lead = |arena: &Arena| arena.holds.functions.iter().next().unwrap().lead;
    let first = lead(&arena);
    let values = |guest: &FakeGuest, arena: &Arena| -> Vec<u64> {
        let cells = cells(guest, &kernel, arena).into_iter();
        cells.map(|(_, value)| value).collect()
    };
    let before = values(&guest, &arena);
    let report = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("pid = 8 and cpu < 2"),
        &options(false),
    );
    assert_eq!(report.unwrap().pauses, 0);
    assert!(!guest.calls.contains(&Call::Pause) && lead(&arena) == first);
    let after = values(&guest, &arena);
    assert_eq!(before.len(), after.len());
    let changed = before
        .iter()
        .zip(&after)
        .filter(|(before, after)| before != after);
    assert_eq!(changed.count(), 1);
    assert_eq!(arena.holds.uses[&1], how("pid = 8 and cpu < 2"));
    let way = &arena.holds.functions.iter().next().unwrap().way;
    assert_eq!(way[0].rule, how("pid = 8 and cpu < 2").rule);
    // Two numbers, or another test, need another handler.
    let report = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("pid = 9 and cpu < 3"),
        &options(false),
    );
    assert_eq!(report.unwrap().pauses, 1);
    assert!(matches!(lead(&arena), Lead::Handler(at) if Some(at) != first.address()));
}

#[test]
fn what_a_rule_has_counted_goes_on_in_the_next_handler() {
    let (mut guest, kernel, mut arena) = ruled("first 5");
    let calls = |arena: &Arena| {
        let mut cells = arena.holds.made[0].assembled.cells.iter();
        cells.find(|cell| cell.what == tune::Use::Calls).unwrap().at
    };
    let at = kernel.translate(&guest, calls(&arena)).unwrap();
    guest.poke(at, &3_u64.to_le_bytes()).unwrap();
    let counted = Use {
        counted: true,
        ..how("first 5")
    };
    reuse(&mut guest, &kernel, &mut arena, 1, counted, &options(false)).unwrap();
    assert_eq!(kernel.read_u64(&guest, calls(&arena)).unwrap(), 3);
}

#[test]
fn clocks_go_on_by_stores() {
    let (mut guest, kernel, mut arena) = ruled("for 2s or rate 5/s");
    let start = Instant::now();
    let mut at = |ms: u64, spend: u64| {
        tick(&mut guest, &mut arena, start + Duration::from_millis(ms)).unwrap();
        let cells = cells(&guest, &kernel, &arena);
        let value = |during: bool| {
            let mut of = cells
                .iter()
                .filter(|(what, _)| matches!(what, tune::Use::During(_)) == during);
            of.next().unwrap().1
        };
        let shown = (value(true), value(false));
        // Calls that took tokens.
        let tokens = arena.holds.made[0].assembled.cells.iter();
        let mut tokens = tokens.filter(|cell| matches!(cell.what, tune::Use::Tokens(_)));
        let token = kernel.translate(&guest, tokens.next().unwrap().at).unwrap();
        guest
            .poke(token, &shown.1.wrapping_sub(spend).to_le_bytes())
            .unwrap();
        shown
    };
    assert_eq!(at(0, 4), (1, 5));
    assert_eq!(at(500, 0), (1, 1), "the second is not over");
    assert_eq!(at(1100, 9), (1, 5));
    assert_eq!(at(1900, 0), (1, 5_u64.wrapping_sub(9)));
    assert_eq!(at(2100, 0), (0, 5));
    // A handler that is made anew may have the same cell.
    let mut cell = arena.holds.made[0].assembled.cells.iter();
    let cell = cell.find(|cell| matches!(cell.what, tune::Use::During(_)));
    let cell = cell.unwrap().at;
    let during = kernel.translate(&guest, cell).unwrap();
    guest.poke(during, &1_u64.to_le_bytes()).unwrap();
    let later = start + Duration::from_millis(2200);
    tick(&mut guest, &mut arena, later).unwrap();
    assert_eq!(kernel.read_u64(&guest, cell).unwrap(), 0);
    assert!(arena.holds.has_clocks());
    assert!(!guest.calls.contains(&Call::Pause));
    let named = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("during lunch"),
        &options(false),
    );
    assert!(matches!(named, Err(ApplyError::NoTime { name }) if name == "lunch"));
}

#[test]
fn a_time_begins_and_ends_by_stores() {
    let (mut guest, kernel, mut arena) = ruled("pid = 1");
    for name in ["2nd", "", "a-b", "é"] {
        let named = set_time(&mut guest, &mut arena, name, true);
        assert!(matches!(named, Err(SetsError::Name { .. })), "{name}");
    }
    let none = drop_time(&mut arena, "lunch");
    assert!(matches!(none, Err(SetsError::None { .. })));
    set_time(&mut guest, &mut arena, "lunch", true).unwrap();
    let rule = how("during lunch or not during lunch");
    reuse(&mut guest, &kernel, &mut arena, 1, rule, &options(false)).unwrap();
    let values = |guest: &FakeGuest, arena: &Arena| -> Vec<u64> {
        let cells = cells(guest, &kernel, arena).into_iter();
        cells.map(|(_, value)| value).collect()
    };
    assert_eq!(
        values(&guest, &arena),
        [1, 1],
        "a handler begins as it is now"
    );
    assert!(!arena.holds.has_clocks(), "nothing goes on by itself");
    guest.calls.clear();
    set_time(&mut guest, &mut arena, "lunch", false).unwrap();
    assert_eq!(values(&guest, &arena), [0, 0]);
    set_time(&mut guest, &mut arena, "other", true).unwrap();
    assert_eq!(values(&guest, &arena), [0, 0], "of another name");
    let used = drop_time(&mut arena, "lunch");
    assert!(matches!(used, Err(SetsError::Used { update: 1, .. })));
    drop_time(&mut arena, "other").unwrap();
    assert!(!guest.calls.contains(&Call::Pause));

    // A store that fails leaves the time as it was, for what is made from then on.
    guest.fault = Fault::Stores;
    assert!(set_time(&mut guest, &mut arena, "lunch", true).is_err());
    guest.fault = Fault::Never;
    assert!(!arena.holds.times()["lunch"]);
}

/// The first cell of the only handler.
fn shown(guest: &FakeGuest, kernel: &Kernel, arena: &Arena) -> u64 {
    cells(guest, kernel, arena)[0].1
}

#[test]
fn a_rate_that_changes_by_one_store_is_given_out_from_then_on() {
    let (mut guest, kernel, mut arena) = ruled("rate 5/s");
    let start = Instant::now();
    tick(&mut guest, &mut arena, start).unwrap();
    let report = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("rate 50/s"),
        &options(false),
    );
    assert_eq!(report.unwrap().pauses, 0);
    assert_eq!(shown(&guest, &kernel, &arena), 50);
    let later = start + Duration::from_millis(1100);
    tick(&mut guest, &mut arena, later).unwrap();
    assert_eq!(shown(&guest, &kernel, &arena), 50);
}

#[test]
fn a_handler_begins_as_its_clocks_are() {
    for (rule, want) in [
        ("until 2020-01-01T00:00:00Z", 0),
        ("after 2020-01-01T00:00:00Z", 1),
        ("until 9999-01-01T00:00:00Z", 1),
        ("after 9999-01-01T00:00:00Z", 0),
        ("for 1h", 1),
    ] {
        let (guest, kernel, arena) = ruled(rule);
        assert_eq!(shown(&guest, &kernel, &arena), want, "{rule}");
    }
}

#[test]
fn a_time_begins_when_its_rule_takes_effect() {
    let (mut guest, kernel, mut arena) = ruled("for 2s");
    let start = Instant::now();
    let used = |guest: &mut FakeGuest, arena: &mut Arena, rule: &str, counted: bool| {
        let how = Use {
            counted,
            ..how(rule)
        };
        reuse(guest, &kernel, arena, 1, how, &options(false)).unwrap();
    };
    // Its time is over.
    let over = start + Duration::from_secs(3);
    tick(&mut guest, &mut arena, over).unwrap();
    assert_eq!(shown(&guest, &kernel, &arena), 0);
    // Another rule came between: it takes effect again.
    used(&mut guest, &mut arena, "cpu = 1", false);
    used(&mut guest, &mut arena, "for 2s", true);
    assert_eq!(shown(&guest, &kernel, &arena), 1);
    tick(&mut guest, &mut arena, start + Duration::from_secs(1)).unwrap();
    assert_eq!(shown(&guest, &kernel, &arena), 1);
    tick(&mut guest, &mut arena, start + Duration::from_secs(60)).unwrap();
    assert_eq!(shown(&guest, &kernel, &arena), 0);
}

#[test]
fn a_set_has_the_room_that_was_asked_for() {
    let (mut guest, _, mut arena) = ruled("pid = 1");
    for room in [0, MAX_SET_ROOM + 1] {
        let change = SetChange {
            room: Some(room),
            ..SetChange::default()
        };
        let wrong = change_set(&mut guest, &mut arena, "large", &change);
        assert!(matches!(wrong, Err(SetsError::Room { .. })), "{room}");
    }
    for room in [1, 3, 400, 5000, 40_000] {
        let change = SetChange {
            add: (1..=room).map(|key| key * 64).collect(),
            room: Some(room),
            ..SetChange::default()
        };
        let len = change_set(&mut guest, &mut arena, &format!("of_{room}"), &change);
        assert_eq!(
            len.map_err(|error| error.to_string()),
            Ok(usize::try_from(room).unwrap())
        );
    }
}

#[test]
fn what_would_be_taken_for_another_stays_out_of_a_set() {
    let (mut guest, kernel, mut arena) = ruled("pid = 1");
    let add = |guest: &mut FakeGuest, arena: &mut Arena, keys: &[u64]| {
        let change = SetChange {
            add: keys.to_vec(),
            ..SetChange::default()
        };
        change_set(guest, arena, "chosen", &change).map_err(|error| error.to_string())
    };
    assert_eq!(add(&mut guest, &mut arena, &[5]), Ok(1));
    // As when a rule asks for an `int`.
    let made = Arc::make_mut(&mut arena.holds.made[0]);
    made.assembled.halves.insert("chosen".to_owned());
    let wide = 5 | 1 << 32;
    let refused = add(&mut guest, &mut arena, &[6, wide, 7]).unwrap_err();
    assert!(
        refused.contains("0x100000005 has more than 32 bits") && refused.contains("patient"),
        "{refused}"
    );
    let keys = |arena: &Arena| {
        let mut keys: Vec<u64> = arena.holds.sets["chosen"].keys().collect();
        keys.sort_unstable();
        keys
    };
    assert_eq!(keys(&arena), [5, 6], "those before it are in");
    // Worn, it may still be looking.
    reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        how("cpu = 1"),
        &options(false),
    )
    .unwrap();
    assert!(add(&mut guest, &mut arena, &[wide]).is_err());
    while arena.holds.is_settling() {
        super::settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
    }
    assert_eq!(add(&mut guest, &mut arena, &[wide]), Ok(3));
    assert!(!arena.holds.sets["chosen"].place().low);
}

#[test]
fn sets_are_made_filled_and_done_away_with() {
    let (mut guest, kernel, mut arena) = ruled("pid = 1");
    let asks = how("pid in set chosen");
    let none = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        1,
        asks.clone(),
        &options(false),
    );
    assert!(
        none.unwrap_err()
            .to_string()
            .contains("no set is called chosen")
    );
    let used = arena.holds.space.used();
    let mut change = |arena: &mut Arena, name: &str, add: &[u64], remove: &[u64]| {
        let change = SetChange {
            add: add.to_vec(),
            remove: remove.to_vec(),
            room: None,
        };
        change_set(&mut guest, arena, name, &change).map_err(|error| error.to_string())
    };
    assert_eq!(change(&mut arena, "chosen", &[5, 6, 7], &[]), Ok(3));
    assert_eq!(change(&mut arena, "chosen", &[8], &[6, 99]), Ok(3));
    let wrong = change(&mut arena, "chosen", &[9, 0], &[]).unwrap_err();
    assert!(wrong.contains("zero cannot be in a set"), "{wrong}");
    let wrong = change(&mut arena, "2nd", &[], &[]).unwrap_err();
    assert!(wrong.contains("`2nd` cannot be a name"), "{wrong}");
    let set = arena.holds.sets["chosen"].clone();
    let mut keys: Vec<u64> = set.keys().collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [5, 7, 8, 9],
        "those before the one that was wrong are in"
    );
    let mut memory = vec![0; set.bytes().len()];
    kernel.read(&guest, set.place().at, &mut memory).unwrap();
    assert_eq!(memory, set.bytes());
    reuse(&mut guest, &kernel, &mut arena, 1, asks, &options(false)).unwrap();
    assert!(matches!(
        drop_set(&mut arena, "chosen"),
        Err(SetsError::Used { update: 1, .. })
    ));
    assert!(matches!(
        drop_set(&mut arena, "other"),
        Err(SetsError::None { .. })
    ));
    undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
    drop_set(&mut arena, "chosen").unwrap();
    assert!(arena.holds.sets.is_empty() && arena.holds.space.used() >= used);
    while arena.holds.is_settling() {
        super::settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
    }
    assert!(arena.holds.space.used() < used, "its memory is free");
}
