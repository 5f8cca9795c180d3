//! Packages made by hand, with one thing wrong in each, and packages with random damage.

use object::write::{
    Object, Relocation, SectionId, StandardSection, Symbol, SymbolId, SymbolSection,
};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind,
    SymbolScope,
};
use proptest::prelude::*;

use crate::edition::hook::CELLS;
use crate::edition::predicate;

use super::{MAX_PACKAGE, Package, PackageError, Place, build_id_text, parse_build_id};

/// Build-id that the packages made here are for.
pub(crate) const BUILD_ID: [u8; 20] = [0x5a; 20];

/// A package being made.
pub(crate) struct Maker {
    object: Object<'static>,
    text: SectionId,
    editions: SectionId,
    predicates: Option<SectionId>,
}

impl Maker {
    /// One with a `.text` of `code`, the build-id and no editions yet.
    pub(crate) fn new(code: &[u8]) -> Self {
        Self::for_kernel(code, &BUILD_ID)
    }

    /// The same for another kernel.
    pub(crate) fn for_kernel(code: &[u8], build_id: &[u8]) -> Self {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let text = object.section_id(StandardSection::Text);
        object.append_section_data(text, code, 16);
        let kernel = object.add_section(
            Vec::new(),
            b".exopatch.kernel".to_vec(),
            SectionKind::ReadOnlyData,
        );
        let id = format!("{}\0", build_id_text(build_id));
        object.append_section_data(kernel, id.as_bytes(), 1);
        let editions = object.add_section(
            Vec::new(),
            b".exopatch.editions".to_vec(),
            SectionKind::ReadOnlyData,
        );
        Self {
            object,
            text,
            editions,
            predicates: None,
        }
    }

    /// Adds a section.
    pub(crate) fn section(&mut self, name: &str, kind: SectionKind, bytes: &[u8]) -> SectionId {
        let section = self.object.add_section(Vec::new(), name.into(), kind);
        self.object.append_section_data(section, bytes, 8);
        section
    }

    /// Adds a symbol at `offset` of `section`, or an undefined one.
    pub(crate) fn symbol(&mut self, name: &str, at: Option<(SectionId, u64)>) -> SymbolId {
        self.object.add_symbol(Symbol {
            name: name.into(),
            value: at.map_or(0, |(_, offset)| offset),
            size: 0,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section: at.map_or(SymbolSection::Undefined, |(section, _)| {
                SymbolSection::Section(section)
            }),
            flags: SymbolFlags::None,
        })
    }

    /// Adds a relocation of ELF type `kind`.
    pub(crate) fn relocate(
        &mut self,
        section: SectionId,
        offset: u64,
        kind: u32,
        symbol: SymbolId,
        addend: i64,
    ) {
        let flags = RelocationFlags::Elf {
            r_type: object::elf::RelocationType(kind),
        };
        self.object
            .add_relocation(
                section,
                Relocation {
                    offset,
                    symbol,
                    addend,
                    flags,
                },
            )
            .unwrap();
    }

    /// Adds a relocation to `.text`.
    pub(crate) fn relocate_text(&mut self, offset: u64, kind: u32, symbol: &str, addend: i64) {
        let symbol = self.symbol(symbol, None);
        self.relocate(self.text, offset, kind, symbol, addend);
    }

    /// Adds a relative relocation to `.text`, to what is `addend` bytes behind a symbol.
    pub(crate) fn relocate_text_to(&mut self, offset: u64, symbol: SymbolId, addend: i64) {
        self.relocate(self.text, offset, 2, symbol, addend);
    }

    /// Has the four bytes at `offset` of `section` hold the distance to `to` of `.text`.
    pub(crate) fn relocate_to_text(&mut self, section: SectionId, offset: u64, to: i64) {
        let text = self.object.section_symbol(self.text);
        self.relocate(section, offset, 2, text, to);
    }

    /// Declares that the code at `offset` of `.text` is an edition of `function`.
    pub(crate) fn edition(&mut self, function: &str, position: u32, offset: u64) {
        let symbol = self.symbol(
            &format!("edition_of_{function}_{position}"),
            Some((self.text, offset)),
        );
        self.record(self.editions, function, position, symbol, 0);
    }

    /// Declares that the function at `offset` of `.text` is the predicate `name`.
    pub(crate) fn predicate(&mut self, name: &str, offset: u64) {
        let symbol = self.symbol(name, Some((self.text, offset)));
        self.predicate_at(name, symbol, 0);
    }

    /// The same at `addend` bytes behind a symbol.
    pub(crate) fn predicate_at(&mut self, name: &str, symbol: SymbolId, addend: i64) {
        let section = match self.predicates {
            Some(section) => section,
            None => self.section(".exopatch.predicates", SectionKind::ReadOnlyData, &[]),
        };
        self.predicates = Some(section);
        self.record(section, name, 0, symbol, addend);
    }

    /// Declares hooks, each by its moment's number, name and offset in `.text`, that the code at an offset of `.text` begins from `function`; the
    /// section of the cells is so many bytes long, and holds the address of `.text`.
    pub(crate) fn hooks(
        &mut self,
        hooks: &[(u32, &str, u64)],
        (function, ticker): (&str, u64),
        cells: usize,
    ) {
        let section = self.section(".exopatch.hooks", SectionKind::ReadOnlyData, &[]);
        for &(moment, name, offset) in hooks {
            let symbol = self.symbol(name, Some((self.text, offset)));
            self.record(section, name, moment, symbol, 0);
        }
        let section = self.section(".exopatch.ticker", SectionKind::ReadOnlyData, &[]);
        let symbol = self.symbol("ticker", Some((self.text, ticker)));
        self.record(section, function, 0, symbol, 0);
        let cells = self.section(CELLS, SectionKind::Data, &vec![0; cells]);
        let text = self.object.section_symbol(self.text);
        self.relocate(cells, 0, 1, text, 0);
    }

    fn record(
        &mut self,
        section: SectionId,
        name: &str,
        number: u32,
        symbol: SymbolId,
        addend: i64,
    ) {
        let mut record = vec![0; 528];
        record[8..12].copy_from_slice(&528_u32.to_le_bytes());
        record[12..16].copy_from_slice(&number.to_le_bytes());
        record[16..16 + name.len()].copy_from_slice(name.as_bytes());
        let at = self.object.append_section_data(section, &record, 8);
        self.relocate(section, at, 1, symbol, addend);
    }

    /// The symbol of `.text`.
    pub(crate) fn text(&mut self) -> SymbolId {
        self.object.section_symbol(self.text)
    }

    /// Gives `.text` an unwind table of one entry.
    pub(crate) fn orc(&mut self) {
        self.orc_entry([8, 0, 0, 0, 5, 0]);
    }

    /// The same with an entry of a particular kernel's form.
    pub(crate) fn orc_entry(&mut self, entry: [u8; 6]) {
        self.section(".orc_unwind", SectionKind::ReadOnlyData, &entry);
        let places = self.section(".orc_unwind_ip", SectionKind::ReadOnlyData, &[0; 4]);
        let text = self.object.section_symbol(self.text);
        self.relocate(places, 0, 2, text, 0);
    }

    /// Adds a table of alternatives with flags: each of code at an offset of `.text`, what may take its place at one of
    /// `replacements`, the feature's number, the flags, and both lengths.
    pub(crate) fn alternatives(
        &mut self,
        replacements: SectionId,
        entries: &[(u64, u64, u16, u16, u8, u8)],
    ) {
        let table = self.section(".altinstructions", SectionKind::ReadOnlyData, &[]);
        let (text, from) = (self.text, replacements);
        let (text, from) = (
            self.object.section_symbol(text),
            self.object.section_symbol(from),
        );
        for &(place, replacement, feature, flags, len, replacement_len) in entries {
            let mut entry = vec![0; 8];
            entry.extend(feature.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend([len, replacement_len]);
            let at = self.object.append_section_data(table, &entry, 1);
            self.relocate(table, at, 2, text, place.cast_signed());
            self.relocate(table, at + 4, 2, from, replacement.cast_signed());
        }
    }

    /// The package's bytes.
    pub(crate) fn finish(&self) -> Vec<u8> {
        self.object.write().unwrap()
    }
}

/// `call __fentry__; call exopatch_original_f; lea rax, [rip+counter]; ret; int3 ...`, an edition of `f`.
pub(crate) fn sample() -> Maker {
    let mut code = vec![
        0xe8, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xc3,
    ];
    code.resize(32, 0xcc);
    let mut maker = Maker::new(&code);
    maker.relocate_text(1, 4, "__fentry__", -4);
    maker.relocate_text(6, 4, "exopatch_original_f", -4);
    let data = maker.section(".data", SectionKind::Data, &[7; 8]);
    let counter = maker.symbol("counter", Some((data, 4)));
    maker.relocate(maker.text, 13, 2, counter, -4);
    maker.edition("f", 0, 0);
    maker.orc();
    maker
}

#[test]
fn a_package_is_read() {
    let package = Package::parse(&sample().finish()).unwrap();
    assert_eq!(package.build_id(), BUILD_ID);
    let [edition] = package.editions() else {
        panic!("{:?}", package.editions())
    };
    assert_eq!(
        (edition.function.as_str(), edition.position, edition.offset),
        ("f", 0, 0)
    );
    let [text, data] = package.sections() else {
        panic!("{:?}", package.sections())
    };
    assert!(text.code && !data.code);
    assert_eq!(text.relocations.len(), 3);
    let counter = text.relocations[2].symbol;
    assert_eq!(package.symbols()[counter].place, Place::Here(1, 4));
    assert_eq!(
        package.symbols()[text.relocations[1].symbol].place,
        Place::Kernel
    );
    assert_eq!(package.orc().len(), 1);
}

#[test]
fn what_is_wrong_is_named() {
    let check = |what: &str, change: &dyn Fn(&mut Maker)| {
        let mut maker = sample();
        change(&mut maker);
        let error = Package::parse(&maker.finish()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    let refused = [
        ("__jump_table", SectionKind::Data),
        (".static_call.text", SectionKind::Text),
        (".data..percpu", SectionKind::Data),
        (".init.text", SectionKind::Text),
        (".something.new", SectionKind::Data),
    ];
    for (name, kind) in refused {
        check(&format!("section {name}"), &|m| {
            m.section(name, kind, &[0; 8]);
        });
    }
    check("R_X86_64_GOTPCREL at .text+0x14", &|m| {
        m.relocate_text(20, 9, "jiffies", -4)
    });
    check("relocation type 77 at .text", &|m| {
        m.relocate_text(20, 77, "jiffies", -4)
    });
    check("a relocation in section .text at 0x1d lies outside", &|m| {
        m.relocate_text(29, 2, "jiffies", -4)
    });
    check("two editions of f", &|m| m.edition("f", 0, 16));
    check("the edition of g is not a function", &|m| {
        m.edition("g", 0, 32)
    });
    check("without a function name", &|m| m.edition("", 0, 0));
    for table in ["__ex_table", "__bug_table"] {
        check(&format!("more than one section {table}"), &|m| {
            m.section(table, SectionKind::Data, &[0; 12]);
            m.section(table, SectionKind::Data, &[0; 12]);
        });
    }
    check("asks for memory of 0x20002f bytes", &|m| {
        m.section(".data.once", SectionKind::Data, &vec![1; 0x20_0007]);
    });
    check("which is in a section that is not placed", &|m| {
        let dropped = m.section(".discard.me", SectionKind::Data, &[0; 8]);
        let symbol = m.symbol("gone", Some((dropped, 0)));
        m.relocate(m.text, 20, 2, symbol, 0);
    });
}

#[test]
fn predicates_are_read() {
    let mut maker = sample();
    maker.predicate("first", 18);
    maker.predicate("_2nd", 20);
    let package = Package::parse(&maker.finish()).unwrap();
    let predicates = package.predicates().iter();
    let predicates: Vec<_> = predicates
        .map(|it| (it.name.as_str(), it.section, it.offset))
        .collect();
    assert_eq!(predicates, [("first", 0, 18), ("_2nd", 0, 20)]);
    let none = Package::parse(&sample().finish()).unwrap();
    assert!(none.predicates().is_empty());
}

#[test]
fn what_is_wrong_with_predicates_is_named() {
    let check = |what: &str, change: &dyn Fn(&mut Maker)| {
        let mut maker = sample();
        maker.predicate("fine", 18);
        change(&mut maker);
        let error = Package::parse(&maker.finish()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    check("two predicates called fine", &|m| m.predicate("fine", 20));
    check("the predicate inside is not a function", &|m| {
        let text = m.text();
        m.predicate_at("inside", text, 19);
    });
    check("the predicate data is not a function", &|m| {
        let data = m.section(".data.once", SectionKind::Data, &[0; 8]);
        let data = m.symbol("data", Some((data, 0)));
        m.predicate_at("data", data, 0);
    });
    check("the predicate elsewhere is not a function", &|m| {
        let elsewhere = m.symbol("printk", None);
        m.predicate_at("elsewhere", elsewhere, 0);
    });
    check("a pointer in section .exopatch.predicates", &|m| {
        let text = m.text();
        m.predicate_at("outside", text, 33);
    });
    for name in ["", "2nd", "no name", "a-b"] {
        check("without a function name", &|m| m.predicate(name, 18));
    }
    check("65 predicates; at most 64", &|m| {
        (0..64).for_each(|nth| m.predicate(&format!("p{nth}"), 18));
    });
    check("does not hold whole records", &|m| {
        let section = m.predicates.unwrap();
        m.object.append_section_data(section, &[0; 8], 1);
    });
    check("records of another layout", &|m| {
        let section = m.predicates.unwrap();
        m.object.append_section_data(section, &[0; 528], 8);
    });
    check("records of another layout", &|m| {
        let (section, text) = (m.predicates.unwrap(), m.text());
        m.record(section, "numbered", 1, text, 18);
    });
}

#[test]
fn what_is_missing_is_named() {
    let check = |maker: &Maker, what: &str| {
        let error = Package::parse(&maker.finish()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    check(&Maker::new(&[0x90]), "replaces no function");
    let mut maker = Maker::new(&[0x90]);
    maker.edition("f", 0, 0);
    check(&maker, "no ORC unwind table");
    let other = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let error = Package::parse(&other.write().unwrap()).unwrap_err();
    assert_eq!(
        error,
        PackageError::Ours {
            section: ".exopatch.kernel",
            why: "is missing"
        }
    );
    let other = Object::new(BinaryFormat::Elf, Architecture::Aarch64, Endianness::Little);
    let error = Package::parse(&other.write().unwrap()).unwrap_err();
    assert!(
        matches!(error, PackageError::NotRelocatable { .. }),
        "{error}"
    );
    assert!(matches!(
        Package::parse(b"#!/bin/sh"),
        Err(PackageError::Elf { .. })
    ));
    assert!(matches!(Package::parse(&[]), Err(PackageError::Elf { .. })));
    assert_eq!(
        Package::parse(&vec![0; MAX_PACKAGE + 1]),
        Err(PackageError::TooLarge {
            len: MAX_PACKAGE + 1
        })
    );
}

#[test]
fn a_table_of_alternatives_is_read() {
    let mut maker = sample();
    let code = maker.section(".altinstr_replacement", SectionKind::Text, &[0x90; 8]);
    maker.alternatives(code, &[(10, 8, 1, 0, 7, 0)]);
    let package = Package::parse(&maker.finish()).unwrap();
    let table = package.alternatives();
    assert_eq!(table.bytes, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0]);
    let pointers = table.pointers.iter();
    let pointers: Vec<_> = pointers
        .map(|(at, to)| (*at, to.section, to.offset))
        .collect();
    assert_eq!(pointers, [(0, 0, 10), (4, 2, 8)]);
}

#[test]
fn sections_left_out_are_listed() {
    let mut maker = sample();
    maker.section(".smp_locks", SectionKind::ReadOnlyData, &[0; 4]);
    let package = Package::parse(&maker.finish()).unwrap();
    assert!(
        package
            .left_out()
            .iter()
            .any(|(name, why)| name == ".smp_locks" && why.contains("LOCK"))
    );
}

#[test]
fn build_ids_are_hexadecimal() {
    assert_eq!(
        parse_build_id(&build_id_text(&BUILD_ID)),
        Some(BUILD_ID.to_vec())
    );
    for wrong in ["", "abc", "zz", "0123456789abcdeg", "é0123456789abcdef"] {
        assert_eq!(parse_build_id(wrong), None, "{wrong}");
    }
}

proptest! {
    #[test]
    fn damage_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut maker = sample();
        maker.predicate("asks", 18);
        let mut bytes = maker.finish();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(package) = Package::parse(&bytes) {
            for section in package.sections() {
                for relocation in &section.relocations {
                    prop_assert!(relocation.offset + relocation.kind.width() <= section.bytes.len());
                    prop_assert!(relocation.symbol < package.symbols().len());
                }
            }
            for predicate in package.predicates() {
                let section = &package.sections()[predicate.section];
                prop_assert!(section.code && predicate.offset < section.bytes.len() as u64);
            }
            let _ = predicate::check(&package, package.sections());
        }
    }

    #[test]
    fn truncation_never_panics(len in any::<prop::sample::Index>()) {
        let bytes = sample().finish();
        let _ = Package::parse(&bytes[..len.index(bytes.len())]);
    }
}

/// A package with these hooks, begun from `function`.
fn hooked(hooks: &[(u32, &str, u64)], function: &str, cells: usize) -> Result<Package, String> {
    let mut maker = Maker::new(&[0xc3; 16]);
    maker.edition("f", 0, 0);
    maker.hooks(hooks, (function, 4), cells);
    maker.orc();
    Package::parse(&maker.finish()).map_err(|error| error.to_string())
}

#[test]
fn hooks_are_read_and_wrong_ones_refused() {
    let all = [(0, "a", 1), (1, "b", 2), (2, "c", 3), (3, "d", 5)];
    let package = hooked(&all, "g", 40).unwrap();
    let hooks = package.hooks().unwrap();
    let names: Vec<&str> = hooks.list.iter().map(|hook| hook.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    assert_eq!(hooks.ticker.function, "g");
    assert_eq!(package.editions().len(), 1);
    assert_eq!(package.redirected().count(), 2);
    assert_eq!(crate::edition::escape::escape(&package), None);
    let two = [(0, "a", 1), (0, "b", 2)];
    for (hooks, function, cells, want) in [
        (
            &two[..],
            "g",
            40,
            "two hooks that run before the update is applied",
        ),
        (&[(4, "a", 1)], "g", 40, "a hook of no known moment"),
        (&[(0, "a", 1)], "g", 39, "is of another layout"),
        (&[(0, "a", 1)], "f", 40, "has hooks and replaces f"),
    ] {
        let got = hooked(hooks, function, cells).unwrap_err();
        assert!(got.contains(want), "{got}");
    }
}
