//! Modules of the made-up kernel, in either layout, sound and damaged.

use proptest::prelude::*;

use super::{Module, ModuleError, ModuleState, PartKind, read};
use crate::addr::Gva;
use crate::kernel::testing::guest::TinyGuest;
use crate::kernel::testing::views::module as at;
use crate::kernel::testing::{FORMS, Form};

/// Bytes of a module's memory, and where its parts begin.
const MEMORY: u64 = 0x1000;
const RO: u64 = 0x200;
const SEALED: u64 = 0x400;
const DATA: u64 = 0x600;

pub(crate) struct Fixture {
    pub(crate) guest: TinyGuest,
    pub(crate) alpha: u64,
    beta: u64,
    /// The memory of `alpha`.
    pub(crate) memory: u64,
}

/// Two modules: `alpha`, with symbols, which is used by `beta`.
pub(crate) fn fixture(form: Form) -> Fixture {
    let mut guest = TinyGuest::new(form, 4);
    let head = guest.at("modules");
    let (alpha, beta) = (guest.object(at::SIZE), guest.object(at::SIZE));
    let memory = guest.object(2 * MEMORY).next_multiple_of(MEMORY);
    for (module, name) in [(alpha, "alpha"), (beta, "beta")] {
        guest.put_bytes(module + at::NAME, name.as_bytes());
        guest.put(module + at::USERS, module + at::USERS);
        guest.put(module + at::REFERENCES, 1);
    }
    guest.list(head, &[beta + at::LIST, alpha + at::LIST]);
    let place = guest.object(48);
    guest.put(place + 32, beta);
    guest.list(alpha + at::USERS, &[place]);
    guest.put(alpha + at::REFERENCES, 2);
    guest.put(alpha + at::TAINTS, 0b111);
    guest.put(alpha + at::INIT, memory);
    let parts = [
        (0, RO),
        (DATA, MEMORY - DATA),
        (RO, SEALED - RO),
        (SEALED, DATA - SEALED),
    ];
    if form == Form::New {
        for (slot, (start, len)) in (0..).zip(parts) {
            guest.put(alpha + at::MEMORY + slot * 16, memory + start);
            guest.put(alpha + at::MEMORY + slot * 16 + 8, len);
        }
    } else {
        guest.put(alpha + at::MEMORY, memory);
        guest.put(alpha + at::MEMORY + 8, RO << 32 | MEMORY);
        guest.put(alpha + at::MEMORY + 16, DATA << 32 | SEALED);
    }
    symbols(&mut guest, form, alpha, memory);
    Fixture {
        guest,
        alpha,
        beta,
        memory,
    }
}

/// The tables of `alpha`: a nameless symbol, an exported function, one that is not, and one of another module.
fn symbols(guest: &mut TinyGuest, form: Form, alpha: u64, memory: u64) {
    let (entries, names, kinds, tables) = (
        memory + DATA,
        memory + 0x800,
        memory + 0x900,
        memory + 0xa00,
    );
    guest.put_bytes(names, b"\0alpha_open\0alpha_close\0printk\0");
    guest.put_bytes(kinds, b"?ttU");
    let list = [
        (0, 0, 0, 0),
        (1, 1, memory, 16),
        (12, 1, memory + 16, 32),
        (24, 0, memory + 0x123, 0),
    ];
    for (index, (name, section, value, size)) in (0..).zip(list) {
        guest.put(entries + index * 24, section << 48 | name);
        guest.put(entries + index * 24 + 8, value);
        guest.put(entries + index * 24 + 16, size);
    }
    for (offset, value) in [(0, entries), (8, 4), (16, names), (24, kinds)] {
        guest.put(tables + offset, value);
    }
    guest.put(alpha + at::KALLSYMS, tables);
    let (exports, name) = (memory + RO, memory + RO + 0x80);
    guest.put_bytes(name, b"alpha_open\0");
    if form == Form::New {
        let distance = |from: u64, to: u64| to.wrapping_sub(from) & 0xffff_ffff;
        guest.put(
            exports,
            distance(exports, memory) | distance(exports + 4, name) << 32,
        );
    } else {
        guest.put(exports, memory);
        guest.put(exports + 8, name);
    }
    guest.put(alpha + at::EXPORTS, exports);
    guest.put(alpha + at::EXPORT_COUNT, 1);
}

fn of(fixture: &mut Fixture) -> Result<Vec<Module>, ModuleError> {
    let kernel = fixture.guest.kernel();
    read(&kernel, &fixture.guest)
}

#[test]
fn modules_are_read_in_either_layout() {
    for form in FORMS {
        let mut fixture = fixture(form);
        let memory = fixture.memory;
        let modules = of(&mut fixture).unwrap();
        let [beta, alpha] = modules.as_slice() else {
            panic!("{modules:?}")
        };
        assert_eq!(
            (beta.name.as_str(), beta.at, beta.references),
            ("beta", Gva(fixture.beta), 0)
        );
        assert_eq!(
            (alpha.name.as_str(), alpha.at, alpha.references),
            ("alpha", Gva(fixture.alpha), 1)
        );
        assert_eq!(
            (alpha.state, alpha.size, alpha.permanent),
            (ModuleState::Live, MEMORY, true)
        );
        assert_eq!(
            (alpha.taints.as_str(), alpha.users.as_slice()),
            ("PO", ["beta".to_owned()].as_slice())
        );
        for (offset, kind) in [
            (0, PartKind::Text),
            (RO, PartKind::RoData),
            (SEALED, PartKind::RoAfterInit),
            (MEMORY - 1, PartKind::Data),
        ] {
            assert_eq!(
                alpha.part_at(Gva(memory + offset)),
                Some(kind),
                "{form:?} {offset:#x}"
            );
        }
        assert_eq!(alpha.part_at(Gva(memory + MEMORY)), None);
        assert!(beta.parts.is_empty() && !beta.permanent);
    }
}

#[test]
fn symbols_are_those_of_the_modules_tables() {
    for form in FORMS {
        let mut fixture = fixture(form);
        let kernel = fixture.guest.kernel();
        let modules = of(&mut fixture).unwrap();
        let symbols = modules[1].symbols(&kernel, &fixture.guest).unwrap();
        let seen: Vec<(&str, u64, char, u64, bool)> = symbols
            .iter()
            .map(|symbol| {
                (
                    symbol.name.as_str(),
                    symbol.address.0 - fixture.memory,
                    symbol.kind.into(),
                    symbol.size,
                    symbol.undefined,
                )
            })
            .collect();
        let want = [
            ("alpha_open", 0, 'T', 16, false),
            ("alpha_close", 16, 't', 32, false),
            ("printk", 0x123, 'u', 0, true),
        ];
        assert_eq!(seen, want, "{form:?}");
        assert_eq!(modules[0].symbols(&kernel, &fixture.guest).unwrap(), []);
    }
}

/// Damages `alpha` by a word at an offset (into the module, or else into its memory); what comes of it must say `want`.
fn refused(form: Form, in_module: bool, offset: u64, word: u64, want: &str) {
    let mut fixture = fixture(form);
    let base = if in_module {
        fixture.alpha
    } else {
        fixture.memory
    };
    fixture.guest.put(base + offset, word);
    let kernel = fixture.guest.kernel();
    let got = read(&kernel, &fixture.guest).and_then(|modules| {
        let mut symbols = modules
            .iter()
            .map(|module| module.symbols(&kernel, &fixture.guest));
        symbols.try_for_each(|symbols| symbols.map(drop))
    });
    let got = got.map_err(|error| error.to_string());
    assert!(
        got.as_ref().is_err_and(|got| got.contains(want)),
        "{form:?} {offset:#x}: {got:?}"
    );
}

#[test]
fn what_is_unsound_is_refused_by_name() {
    for form in FORMS {
        refused(form, true, at::STATE, 9, "module state 9 is not known here");
        refused(form, true, at::LIST, 0, "list of modules is unsound");
        refused(form, true, at::LIST, u64::MAX - 63, "cannot be read");
        refused(
            form,
            true,
            at::USERS,
            0,
            "list of a module's users is unsound",
        );
        refused(
            form,
            true,
            at::EXPORTS,
            0xffff_8880_0000_0000,
            "table of exports of module alpha",
        );
        refused(
            form,
            true,
            at::EXPORT_COUNT,
            0xffff_ffff,
            "count of a module's exports",
        );
        refused(
            form,
            false,
            0xa00,
            0xffff_8880_0000_0000,
            "the symbol table of module alpha",
        );
        refused(form, false, 0xa08, 0x40_0000, "count of a module's symbols");
        refused(form, false, 0xa10, 1, "the table of symbols' names");
        refused(form, false, 0xa18, u64::MAX, "the table of symbols' kinds");
        refused(
            form,
            false,
            DATA + 24,
            0xffff,
            "the table of symbols' names",
        );
    }
    refused(
        Form::New,
        true,
        at::MEMORY + 8,
        0xffff_ffff,
        "module's memory is unsound",
    );
    refused(
        Form::Old,
        true,
        at::MEMORY + 8,
        0xffff_ffff_ffff_ffff,
        "module's memory is unsound",
    );
    let mut endless = fixture(Form::New);
    endless
        .guest
        .put_bytes(endless.alpha + at::NAME, &[b'x'; 56]);
    assert!(
        of(&mut endless)
            .unwrap_err()
            .to_string()
            .contains("does not end")
    );
}

proptest! {
    #[test]
    fn damage_never_panics(form in 0..3_usize, changes in proptest::collection::vec((0..3_u8, any::<u16>(), any::<u64>(), 0..4_u8), 1..8)) {
        let mut fixture = fixture(FORMS[form]);
        for (place, offset, value, how) in changes {
            let (base, len) = match place {
                0 => (fixture.alpha, at::SIZE),
                1 => (fixture.beta, at::SIZE),
                _ => (fixture.memory, MEMORY),
            };
            let target = base + u64::from(offset) % (len / 8) * 8;
            let old = fixture.guest.get(target);
            let new = match how {
                0 => value,
                1 => value & 0xffff,
                2 => old ^ 1 << (value & 63),
                _ => fixture.guest.get(base + value % (len / 8) * 8),
            };
            fixture.guest.put(target, new);
        }
        let kernel = fixture.guest.kernel();
        if let Ok(modules) = read(&kernel, &fixture.guest) {
            for module in modules.iter().take(16) {
                let _ = module.symbols(&kernel, &fixture.guest);
            }
        }
    }
}
