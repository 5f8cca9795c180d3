//! What the made-up kernel finds our code by, before, while and after it is known.

use std::sync::Arc;
use std::time::{Duration, Instant};

use object::SectionKind;

use super::arena::Placed;
use super::switch::keep;
use super::whole_tests::{apply_it, booted, package, undo};
use super::{ApplyError, ApplyOptions, Arena, CommitFailed, Request, apply, settle};
use crate::addr::Gva;
use crate::commit::Blocked;
use crate::edition::object::Package;
use crate::edition::object::tests::Maker;
use crate::guest::fake::FakeGuest;
use crate::kernel::locate::Kernel;
use crate::kernel::testing::{BUILD_ID, FORMS, Form};
use crate::plan::Plan;
use crate::publish::{Grace, Publication, Published, published};

fn options() -> ApplyOptions<'static> {
    ApplyOptions {
        deadline: Instant::now() + Duration::from_secs(60),
        check_only: false,
        doing: &|_| {},
        written: &|| {},
        hook: &|_| {},
    }
}

fn known(guest: &FakeGuest, kernel: &Kernel) -> Published {
    published(kernel, guest).unwrap().unwrap()
}

fn poke(guest: &mut FakeGuest, kernel: &Kernel, at: u64, bytes: &[u8]) {
    let at = kernel.translate(&*guest, Gva(at)).unwrap();
    guest.poke(at, bytes).unwrap();
}

fn word(guest: &FakeGuest, kernel: &Kernel, at: u64) -> u64 {
    kernel.read_u64(guest, Gva(at)).unwrap()
}

fn half(guest: &FakeGuest, kernel: &Kernel, at: u64) -> u32 {
    kernel.read_u32(guest, Gva(at)).unwrap()
}

/// A package with an edition of `patient`: `ud2; nop; ret`, with these tables. In each entry the first distances are to places of the code.
fn with_tables(fixups: &[[i64; 2]], bugs: &[i64], spare: usize) -> Vec<u8> {
    let mut maker = Maker::for_kernel(&[0xe8, 0, 0, 0, 0, 0x0f, 0x0b, 0x90, 0xc3], &BUILD_ID);
    maker.relocate_text(1, 4, "__fentry__", -4);
    maker.edition("patient", 0, 0);
    maker.orc();
    let mut table = |name: &str, entries: Vec<Vec<i64>>| {
        let bytes = vec![0; entries.len() * 12 + if entries.is_empty() { 0 } else { spare }];
        let section = maker.section(name, SectionKind::Data, &bytes);
        for (entry, to) in entries.iter().enumerate() {
            for (field, to) in to.iter().enumerate() {
                maker.relocate_to_text(section, (entry * 12 + field * 4) as u64, *to);
            }
        }
    };
    table("__ex_table", fixups.iter().map(|to| to.to_vec()).collect());
    table("__bug_table", bugs.iter().map(|to| vec![*to]).collect());
    maker.finish()
}

/// Applies a package as update 1: what the kernel knows it by.
fn applied(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    bytes: &[u8],
) -> (Arc<Placed>, Publication) {
    let package = Package::parse(bytes).unwrap();
    apply_it(guest, kernel, arena, &package, false).unwrap();
    let placed = Arc::clone(&arena.holds.placed[&1]);
    let unit = placed.known.as_ref().unwrap().1.clone();
    (placed, unit)
}

#[test]
fn code_is_known_until_it_is_taken_back() {
    for form in FORMS {
        let (mut guest, kernel, mut arena) = booted(form);
        assert_eq!(known(&guest, &kernel), Published::default());
        let tree = kernel.symbol("mod_tree").unwrap().0;
        let bytes = with_tables(&[[7, 8], [5, 8]], &[5], 0);
        let (first, unit) = applied(&mut guest, &kernel, &mut arena, &bytes);
        let now = known(&guest, &kernel);
        assert_eq!(now.code, [(unit.code.clone(), unit.module)], "{form:?}");
        assert_eq!(now.bugs, [unit.module]);
        assert_eq!(half(&guest, &kernel, tree), 2, "readers look again");
        assert_eq!(word(&guest, &kernel, tree + 24), unit.code.start.0);
        assert_eq!(word(&guest, &kernel, tree + 32), unit.code.end.0);
        // The exception table is sorted: the first entry is about the `ud2`, and its fixup is the `ret`.
        let module = unit.module.0;
        let table = word(&guest, &kernel, module + 368);
        let distance = |at: u64| {
            let low = kernel.read_u32(&guest, Gva(at)).unwrap().cast_signed();
            at.wrapping_add_signed(low.into()) - unit.code.start.0
        };
        let entries = [0, 4, 12, 16].map(|at| distance(table + at));
        assert_eq!(
            (half(&guest, &kernel, module + 376), entries),
            (2, [5, 8, 7, 8])
        );
        let bugs = word(&guest, &kernel, module + 400);
        assert_eq!(Some(bugs), first.linked.bugs.as_ref().map(|bugs| bugs.at.0));
        assert_eq!(distance(bugs), 5);
        // So are the symbols: the edition by its own name.
        let symbols = word(&guest, &kernel, module + 336);
        assert_eq!(word(&guest, &kernel, module + 144), module + 336);
        let strings = word(&guest, &kernel, module + 336 + 16);
        let name = u64::from(kernel.read_u32(&guest, Gva(symbols + 24)).unwrap());
        let mut text = [0; 12];
        kernel.read(&guest, Gva(strings + name), &mut text).unwrap();
        assert_eq!(&text, b"edition_of_p");
        assert_eq!(word(&guest, &kernel, symbols + 24 + 8), unit.code.start.0);

        undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
        let now = known(&guest, &kernel).code.len();
        assert_eq!(now, 1, "a thread may be there");
        settle(&mut guest, &kernel, &mut arena, &options()).unwrap();
        assert_eq!(known(&guest, &kernel), Published::default());
        assert_eq!(half(&guest, &kernel, tree), 4);
        // A vCPU that has not been at rest since may still be reading the tables.
        assert!(
            arena.holds.space.used() == 64,
            "both are in the user's code"
        );
    }
}

#[test]
fn tables_stay_until_every_vcpu_was_at_rest() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let package = package("patient", 0, &BUILD_ID);
    apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap();
    // One that is never seen.
    arena.holds.vcpus += 1;
    undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
    let mut found = 0;
    while known(&guest, &kernel) != Published::default() {
        arena.holds.vcpus = guest.vcpus_mut().len() + 1;
        let (mut draft, mut plan) = (arena.holds.clone(), Plan::default());
        if !draft.free.is_empty() {
            draft.forget(&mut plan);
            arena.holds.free.clear();
        }
        let tries = 1;
        keep(
            &mut guest,
            &kernel,
            &mut arena,
            draft,
            plan,
            tries,
            &options(),
        )
        .unwrap();
        found += 1;
    }
    assert_eq!(found, 2, "the first look finds nobody in it");
    settle(&mut guest, &kernel, &mut arena, &options()).unwrap();
    assert!(arena.holds.space.used() > 64 && arena.holds.is_settling());
    for grace in arena.holds.forgotten.values_mut() {
        *grace = Grace::begin(1);
    }
    settle(&mut guest, &kernel, &mut arena, &options()).unwrap();
    assert!(arena.holds.space.used() == 64 && !arena.holds.is_settling());
}

#[test]
fn many_come_and_go() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let package = package("patient", 0, &BUILD_ID);
    let mut there: Vec<u64> = Vec::new();
    for round in 1..=60_u64 {
        let request = Request::new(round, &package);
        apply(&mut guest, &kernel, &mut arena, &request, &options()).unwrap();
        there.push(round);
        if round % 3 != 0 {
            let nth = usize::try_from(round * 7).unwrap() % there.len();
            let gone = there.remove(nth);
            undo(&mut guest, &kernel, &mut arena, &[gone]).unwrap();
            settle(&mut guest, &kernel, &mut arena, &options()).unwrap();
        }
        let units = there.iter().map(|id| &arena.holds.placed[id].known);
        let units = units.map(|known| &known.as_ref().unwrap().1);
        let mut want: Vec<_> = units.map(|unit| (unit.code.clone(), unit.module)).collect();
        want.sort_by_key(|(code, _)| code.start);
        assert_eq!(known(&guest, &kernel).code, want, "{round}");
    }
}

#[test]
fn what_is_in_flux_or_unsound_leaves_the_guest_as_it_was() {
    let check = |what: &str, at: &str, offset: u64, value: u64| {
        let (mut guest, kernel, mut arena) = booted(Form::New);
        let at = kernel.symbol(at).unwrap().0 + offset;
        poke(&mut guest, &kernel, at, &value.to_le_bytes());
        let before = guest.memory().to_vec();
        let package = package("patient", 0, &BUILD_ID);
        let error = apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap_err();
        let ApplyError::Commit(CommitFailed::Deadline { last, .. }) = &error else {
            panic!("{error}")
        };
        assert!(
            matches!(last, Blocked::InFlux { .. } | Blocked::Unreadable { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(guest.memory() == before && !guest.is_paused());
    };
    check("its own code at this moment (mod_tree)", "mod_tree", 0, 7);
    check("module_mutex", "module_mutex", 0, 0xffff_8880_0020_0000);
    // A tree that leads to what is no node.
    check(
        "tree of modules is unsound",
        "mod_tree",
        8,
        0xffff_8880_0020_0000 + 0x1_0000,
    );
}

#[test]
fn tables_that_are_not_the_codes_are_refused() {
    let check = |what: &str, bytes: &[u8]| {
        let (mut guest, kernel, mut arena) = booted(Form::New);
        let before = guest.memory().to_vec();
        let package = Package::parse(bytes).unwrap();
        let error = apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(guest.memory() == before && arena.holds.space.used() == 64);
    };
    check(
        "section __ex_table of the package has 16 bytes",
        &with_tables(&[[5, 8]], &[], 4),
    );
    check(
        "section __bug_table of the package has 18 bytes",
        &with_tables(&[], &[5], 6),
    );
    check(
        "entry 1 of section __ex_table",
        &with_tables(&[[5, 8], [0x400, 8]], &[], 0),
    );
    check(
        "entry 0 of section __ex_table",
        &with_tables(&[[5, -1]], &[], 0),
    );
    check(
        "entry 1 of section __bug_table",
        &with_tables(&[], &[5, 0x400], 0),
    );
    check(
        "two entries for the instruction",
        &with_tables(&[[5, 8], [5, 7]], &[], 0),
    );
}
