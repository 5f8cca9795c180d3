//! Symbols in every layout of kallsyms, what tells namesakes apart, and damaged tables.

use std::sync::Arc;

use proptest::prelude::*;

use super::{KallsymsError, LinkAddr, Section, Space, SymbolError, Symbols};
use crate::kernel::testing::kallsyms::{BEFORE_KALLSYMS, ORDERS, Order, kallsyms_in};
use crate::kernel::testing::{FORMS, Form, RODATA, Sym, TEXT, symbols};

fn parse(bytes: Vec<u8>) -> Result<Symbols, KallsymsError> {
    let file = 0..bytes.len();
    let range = LinkAddr(RODATA)..LinkAddr(RODATA + bytes.len() as u64);
    let section = Section {
        name: ".rodata".to_owned(),
        range,
        file,
        executable: false,
    };
    Symbols::parse(Arc::new(bytes), &section)
}

fn kallsyms(form: Form, symbols: &[Sym]) -> Vec<u8> {
    crate::kernel::testing::kallsyms::kallsyms(form, symbols)
}

fn of(form: Form) -> Symbols {
    parse(kallsyms(form, &symbols(form))).unwrap()
}

/// The symbols as `order` has them: per-CPU ones in the image where addresses are told from their own places.
fn symbols_in(order: Order) -> Vec<Sym> {
    let mut all = symbols(Form::New);
    if matches!(order, Order::FromItself | Order::Tight) {
        let percpu = |(at, kind, name): &Sym| (PERCPU + at, *kind, name.clone());
        let (low, high) = all.split_at(all.partition_point(|(at, ..)| *at < TEXT));
        let start = (PERCPU, 'A', "__per_cpu_start".to_owned());
        let moved = low.iter().map(percpu);
        all = high.iter().cloned().chain([start]).chain(moved).collect();
    }
    all
}

/// Where per-CPU symbols are linked by such kernels.
const PERCPU: u64 = RODATA + 0x10_0000;

#[test]
fn every_symbol_is_found_in_every_layout() {
    for order in ORDERS {
        let want = symbols_in(order);
        let found = parse(kallsyms_in(order, &want)).unwrap();
        assert_eq!(found.len(), want.len());
        for (symbol, (address, kind, name)) in found.iter().zip(&want) {
            assert_eq!(
                (symbol.address.0, char::from(symbol.kind), &symbol.name),
                (*address, *kind, name)
            );
            // The end of the per-CPU symbols is one of the image where those are.
            let percpu = *kind == 'A' && *address != PERCPU + 0x180;
            assert_eq!(symbol.percpu, percpu, "{name}");
            if name == "runqueues" {
                assert_eq!(found.percpu_offset(&symbol), 0x40, "{order:?}");
            }
            let space = if percpu { Space::PerCpu } else { Space::Image };
            assert_eq!(found.space(&symbol), space, "{name}");
            if name != "twin" {
                assert_eq!(found.lookup(name).as_ref(), Ok(&symbol), "{order:?}");
            }
        }
    }
}

#[test]
fn a_search_that_anybody_may_drag_out_ends() {
    // Tokens that are whole, and before them nothing but what could be markers.
    let order = Order::New;
    let bytes = kallsyms_in(order, &symbols_in(order));
    let found = parse(bytes.clone()).unwrap();
    let tokens = found.tables.tokens[0].start;
    let mut all: Vec<u8> = (0..8_u32 << 20)
        .flat_map(|word| (word % 4 * 0x8000).to_le_bytes())
        .collect();
    all.extend(&bytes[tokens..]);
    assert!(matches!(parse(all), Err(KallsymsError::Endless)));
}

#[test]
fn long_names_have_two_bytes_of_length() {
    let mut all = symbols(Form::New);
    let long = "x".repeat(300);
    all[20].2.clone_from(&long);
    let found = parse(kallsyms(Form::New, &all)).unwrap();
    assert_eq!(found.lookup(&long).unwrap().address.0, all[20].0);
    assert_eq!(found.lookup(&all[21].2).unwrap().address.0, all[21].0);
}

#[test]
fn a_name_that_would_be_endless_is_damaged() {
    let mut all = symbols(Form::New);
    all[20].2 = "x".repeat(513);
    let found = parse(kallsyms(Form::New, &all));
    assert!(matches!(found, Err(KallsymsError::Name { index: 20 })));
    all[20].2 = "x".repeat(512);
    assert!(parse(kallsyms(Form::New, &all)).is_ok());
}

#[test]
fn an_ambiguous_name_is_never_the_first_match() {
    let found = of(Form::OldSorted);
    let Err(SymbolError::Ambiguous { candidates, .. }) = found.lookup("twin") else {
        panic!("not ambiguous")
    };
    assert_eq!(
        candidates,
        [(1, LinkAddr(TEXT + 0x340)), (2, LinkAddr(TEXT + 0x380))]
    );
    assert_eq!(
        found.lookup_nth("twin", 2).unwrap().address,
        LinkAddr(TEXT + 0x380)
    );
    for position in [0, 3] {
        let none = Err(SymbolError::Position {
            name: "twin".to_owned(),
            position,
            count: 2,
        });
        assert_eq!(found.lookup_nth("twin", position), none);
    }
    assert!(found.optional("twin").is_err());
    assert_eq!(found.optional("triplet"), Ok(None));
}

#[test]
fn a_missing_name_tells_of_near_ones() {
    let found = of(Form::New);
    let check = |name: &str, want: &str| match found.lookup(name) {
        Err(SymbolError::Missing { near, .. }) => {
            assert_eq!(near.first().map(String::as_str), Some(want))
        }
        other => panic!("{other:?}"),
    };
    check("victm", "victim");
    check("vcitim", "victim");
    check("victim.constprop.0", "victim");
    check("per_cpu_offset", "__per_cpu_offset");
}

#[test]
fn namesakes_are_told_apart_by_their_neighbours() {
    for form in FORMS {
        let found = of(form);
        let seen: Vec<_> = found
            .namesakes("twin")
            .into_iter()
            .map(|twin| {
                (
                    twin.position,
                    twin.symbol.address.0 - TEXT,
                    twin.before,
                    twin.after,
                )
            })
            .collect();
        let (before, after) = ("victim".to_owned(), "thread_stack_free_rcu".to_owned());
        let want = [
            (1, 0x340, Some(before.clone()), Some(after.clone())),
            (2, 0x380, Some(before), Some(after)),
        ];
        assert_eq!(seen, want, "{form:?}");
        assert_eq!(found.namesakes("triplet"), []);
    }
}

#[test]
fn what_lies_below_the_image_is_per_cpu_or_absolute() {
    let mut all = symbols(Form::New);
    let last = all
        .iter()
        .position(|(.., name)| name == "__per_cpu_end")
        .unwrap();
    all.insert(last + 1, (0x5000, 'A', "a_value".to_owned()));
    let found = parse(kallsyms(Form::New, &all)).unwrap();
    let space = |name: &str| found.space(&found.lookup(name).unwrap());
    assert_eq!(space("pcpu_hot"), Space::PerCpu);
    assert_eq!(space("a_value"), Space::Absolute);
    assert_eq!(space("victim"), Space::Image);
    // The last of them does not reach up to the image.
    assert_eq!(found.lookup("a_value").unwrap().size, 0);
    assert_eq!(found.containing(LinkAddr(0x5001)), None);
    assert_eq!(
        found
            .containing(LinkAddr(0x21))
            .map(|(symbol, at)| (symbol.name, at)),
        Some(("cea_exception_stacks".to_owned(), 1))
    );
}

#[test]
fn addresses_belong_to_symbols() {
    let found = of(Form::Old);
    let at = |address: u64| {
        found
            .containing(LinkAddr(address))
            .map(|(symbol, offset)| (symbol.name, offset))
    };
    assert_eq!(at(TEXT + 0x33f), Some(("victim".to_owned(), 0x3f)));
    assert_eq!(at(TEXT + 0x340), Some(("twin".to_owned(), 0)));
    assert_eq!(at(u64::MAX), None);
    assert_eq!(found.lookup("victim").unwrap().size, 0x40);
}

#[test]
fn what_is_not_there_is_named() {
    let mut bytes = kallsyms(Form::New, &symbols(Form::New));
    assert!(matches!(
        parse(bytes[..0x4000].to_vec()),
        Err(KallsymsError::NoTokens)
    ));
    // The last name's length says that it goes on: markers and names no longer agree.
    let found = parse(bytes.clone()).unwrap();
    let markers = found.tables.markers.at;
    bytes[markers + 4] ^= 1;
    assert!(matches!(
        parse(bytes.clone()),
        Err(KallsymsError::NoNames { .. })
    ));
    bytes[markers + 4] ^= 1;
    // Addresses that do not ascend are no addresses.
    bytes[found.tables.offsets.start + 3] = 0x7f;
    assert!(matches!(
        parse(bytes),
        Err(KallsymsError::NoAddresses { .. })
    ));
}

proptest! {
    #[test]
    fn damage_never_panics(
        order in 0..ORDERS.len(),
        changes in proptest::collection::vec((0..usize::MAX, any::<u8>()), 1..6),
        cut: Option<usize>,
    ) {
        let mut bytes = kallsyms_in(ORDERS[order], &symbols_in(ORDERS[order]));
        let len = bytes.len();
        for (at, value) in changes {
            bytes[BEFORE_KALLSYMS + at % (len - BEFORE_KALLSYMS)] = value;
        }
        bytes.truncate(cut.map_or(len, |cut| cut % len));
        if let Ok(symbols) = parse(bytes) {
            let _ = symbols.lookup("victim");
            let _ = symbols.lookup("nothing of the kind");
            let _ = symbols.containing(LinkAddr(TEXT + 0x301));
            let _ = symbols.iter().count();
        }
    }
}
