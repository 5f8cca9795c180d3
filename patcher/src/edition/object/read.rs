//! Reads a package out of its ELF file, checking everything that [`Package`] promises.

mod records;

use std::collections::HashMap;

use object::read::elf::ElfFile64;
use object::{
    LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags,
    RelocationTarget, SectionFlags, SymbolKind,
};

use super::{
    AlternativeTable, Function, OrcEntry, Package, PackageError, Place, Pointer, Relocation,
    Section, Symbol, parse_build_id,
};
use crate::edition::reloc::{self, Kind};
use crate::edition::section::{Role, role};
use crate::publish::{BUGS, FIXUPS};

/// Longest name of a kernel symbol, its NUL included (`KSYM_NAME_LEN`, `include/linux/kallsyms.h`).
const NAME_LEN: usize = 512;
/// The most memory that one package may take in a guest, in bytes.
const MAX_MEMORY: u64 = 2 << 20;
/// The largest alignment that a section may ask for: a page.
const MAX_ALIGN: u64 = 4096;
type Elf<'a> = ElfFile64<'a, LittleEndian>;
type ElfSection<'a, 'f> = object::read::elf::ElfSection64<'a, 'f, LittleEndian>;

pub(super) fn elf(cause: object::Error) -> PackageError {
    PackageError::Elf {
        cause: cause.to_string(),
    }
}

/// A package in the making.
struct Reader<'a, 'f> {
    file: &'f Elf<'a>,
    /// For each ELF section index the index in `sections`.
    placed: Vec<Option<usize>>,
    sections: Vec<Section>,
    left_out: Vec<(String, &'static str)>,
    symbols: Vec<Symbol>,
    /// For each ELF symbol index the index in `symbols`.
    known: HashMap<usize, usize>,
}

/// Reads the package that `file` holds.
pub(super) fn read(file: &Elf<'_>) -> Result<Package, PackageError> {
    let mut reader = Reader {
        file,
        placed: Vec::new(),
        sections: Vec::new(),
        left_out: Vec::new(),
        symbols: Vec::new(),
        known: HashMap::new(),
    };
    let build_id = build_id(&reader.ours(".exopatch.kernel")?)?;
    reader.place()?;
    reader.relocate()?;
    let editions = reader.editions()?;
    let orc = reader.orc()?;
    if orc.is_empty() {
        return Err(PackageError::NoOrc);
    }
    let functions = reader.functions()?;
    let predicates = reader.predicates(&functions)?;
    let hooks = reader.hooks(&editions, &functions)?;
    let alternatives = reader.alternatives()?;
    Ok(Package {
        build_id,
        editions,
        predicates,
        hooks,
        sections: reader.sections,
        symbols: reader.symbols,
        orc,
        functions,
        alternatives,
        left_out: reader.left_out,
    })
}

impl Reader<'_, '_> {
    /// The bytes of one of our own sections.
    fn ours(&self, name: &'static str) -> Result<Vec<u8>, PackageError> {
        let section = self.file.section_by_name(name).ok_or(PackageError::Ours {
            section: name,
            why: "is missing",
        })?;
        Ok(section.data().map_err(elf)?.to_vec())
    }

    /// Finds out what each section is to us, and copies what gets memory.
    fn place(&mut self) -> Result<(), PackageError> {
        let mut memory = 0_u64;
        for section in self.file.sections() {
            let name = String::from_utf8_lossy(section.name_bytes().map_err(elf)?).into_owned();
            let index = section.index().0;
            if self.placed.len() <= index {
                self.placed.resize(index + 1, None);
            }
            if section.size() == 0 {
                continue;
            }
            let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
                continue;
            };
            let alloc = sh_flags.0 & object::elf::SHF_ALLOC.0 != 0;
            let zeroed = section.kind() == object::SectionKind::UninitializedData;
            let role = role(&name, alloc, zeroed);
            match role {
                Role::Ours => continue,
                Role::LeftOut { why } => {
                    if alloc {
                        self.left_out.push((name, why));
                    }
                    continue;
                }
                Role::Refused { why } => return Err(PackageError::Section { section: name, why }),
                Role::Code | Role::Data | Role::Zeroed => {}
            }
            let again = self.sections.iter().any(|other| other.name == name);
            if again && [FIXUPS, BUGS].contains(&name.as_str()) {
                return Err(PackageError::TwoTables { section: name });
            }
            memory = memory.saturating_add(section.size());
            check_size(&section, &name, memory)?;
            let bytes = if role == Role::Zeroed {
                vec![0; usize::try_from(section.size()).unwrap_or_default()]
            } else {
                section.data().map_err(elf)?.to_vec()
            };
            if let Some(slot) = self.placed.get_mut(index) {
                *slot = Some(self.sections.len());
            }
            let (code, align) = (role == Role::Code, section.align().max(1));
            self.sections.push(Section {
                name,
                code,
                bytes,
                align,
                relocations: Vec::new(),
            });
        }
        Ok(())
    }

    /// Reads the relocations of everything that gets memory.
    fn relocate(&mut self) -> Result<(), PackageError> {
        for section in self.file.sections() {
            let Some(index) = self.placed.get(section.index().0).copied().flatten() else {
                continue;
            };
            let Some(Section { name, bytes, .. }) = self.sections.get(index) else {
                continue;
            };
            let (name, len) = (name.clone(), bytes.len());
            let mut relocations = Vec::new();
            for (offset, relocation) in section.relocations() {
                let number = number(&relocation);
                let target = self.target(&relocation, &name, offset)?;
                let symbol = self
                    .symbols
                    .get(target)
                    .map(|symbol| symbol.name.clone())
                    .unwrap_or_default();
                if self
                    .symbols
                    .get(target)
                    .is_some_and(|symbol| symbol.place == Place::LeftOut)
                {
                    return Err(PackageError::LeftOut {
                        section: name,
                        offset,
                        symbol,
                    });
                }
                let Some(kind) = Kind::from_elf(number) else {
                    let kind = reloc::type_name(number);
                    return Err(PackageError::Relocation {
                        section: name,
                        offset,
                        name: kind,
                        symbol,
                    });
                };
                let outside = || PackageError::Outside {
                    what: "a relocation",
                    section: name.clone(),
                    offset,
                };
                let offset = usize::try_from(offset).map_err(|_| outside())?;
                if offset.checked_add(kind.width()).is_none_or(|end| end > len) {
                    return Err(outside());
                }
                relocations.push(Relocation {
                    offset,
                    kind,
                    symbol: target,
                    addend: relocation.addend(),
                });
            }
            if let Some(section) = self.sections.get_mut(index) {
                section.relocations = relocations;
            }
        }
        Ok(())
    }

    /// The index in `symbols` of what a relocation refers to.
    fn target(
        &mut self,
        relocation: &object::Relocation,
        section: &str,
        offset: u64,
    ) -> Result<usize, PackageError> {
        let damaged = |what| PackageError::Outside {
            what,
            section: section.to_owned(),
            offset,
        };
        let RelocationTarget::Symbol(index) = relocation.target() else {
            return Err(damaged("the symbol of a relocation"));
        };
        if let Some(&known) = self.known.get(&index.0) {
            return Ok(known);
        }
        let symbol = self.file.symbol_by_index(index).map_err(elf)?;
        let mut name = String::from_utf8_lossy(symbol.name_bytes().map_err(elf)?).into_owned();
        let place = if symbol.is_undefined() {
            Place::Kernel
        } else if let Some(at) = symbol.section_index() {
            match self.placed.get(at.0).copied().flatten() {
                Some(place) => {
                    let target = self
                        .sections
                        .get(place)
                        .ok_or_else(|| damaged("a symbol"))?;
                    if name.is_empty() {
                        name.clone_from(&target.name);
                    }
                    if symbol.address() > target.bytes.len() as u64 {
                        return Err(damaged("a symbol"));
                    }
                    Place::Here(place, symbol.address())
                }
                None => Place::LeftOut,
            }
        } else {
            // Absolute and common symbols: the kernel's own build makes neither.
            return Err(damaged("an absolute or common symbol"));
        };
        if name.is_empty() && place == Place::Kernel {
            return Err(damaged("a symbol without a name"));
        }
        self.symbols.push(Symbol { name, place });
        self.known.insert(index.0, self.symbols.len() - 1);
        Ok(self.symbols.len() - 1)
    }

    /// The relocations of one of our own sections: offset, and where each leads in the package.
    fn pointers(&mut self, name: &'static str) -> Result<Vec<(u64, usize, u64)>, PackageError> {
        let Some(section) = self.file.section_by_name(name) else {
            return Ok(Vec::new());
        };
        let mut pointers = Vec::new();
        for (offset, relocation) in section.relocations() {
            let target = self.target(&relocation, name, offset)?;
            let Some(&Symbol {
                place: Place::Here(index, base),
                ..
            }) = self.symbols.get(target)
            else {
                continue;
            };
            let to = base.wrapping_add_signed(relocation.addend());
            let len = self
                .sections
                .get(index)
                .map_or(0, |section| section.bytes.len());
            if to > len as u64 {
                return Err(PackageError::Outside {
                    what: "a pointer",
                    section: name.to_owned(),
                    offset,
                });
            }
            pointers.push((offset, index, to));
        }
        Ok(pointers)
    }

    /// The functions in what gets memory, by the names that the kernel would have for them.
    fn functions(&self) -> Result<Vec<Function>, PackageError> {
        let mut functions = Vec::new();
        for symbol in self.file.symbols() {
            let section = symbol.section_index().map(|index| index.0);
            let placed = section.and_then(|index| self.placed.get(index).copied().flatten());
            let code = |index: &usize| {
                self.sections
                    .get(*index)
                    .is_some_and(|section| section.code)
            };
            let Some(section) = placed.filter(code) else {
                continue;
            };
            let name = symbol.name_bytes().map_err(elf)?;
            if symbol.kind() != SymbolKind::Text || name.is_empty() || name.len() >= NAME_LEN {
                continue;
            }
            let len = self
                .sections
                .get(section)
                .map_or(0, |section| section.bytes.len() as u64);
            let inside = symbol.address().checked_add(symbol.size());
            if inside.is_none_or(|end| end > len) {
                return Err(PackageError::Outside {
                    what: "a function",
                    section: String::from_utf8_lossy(name).into_owned(),
                    offset: symbol.address(),
                });
            }
            functions.push(Function {
                name: String::from_utf8_lossy(name).into_owned(),
                section,
                offset: symbol.address(),
                size: symbol.size(),
            });
        }
        Ok(functions)
    }

    /// The unwind table: `.orc_unwind_ip` holds a 4-byte place for each entry of `.orc_unwind`.
    fn orc(&mut self) -> Result<Vec<OrcEntry>, PackageError> {
        let Some(table) = self.file.section_by_name(".orc_unwind") else {
            return Ok(Vec::new());
        };
        let table = table.data().map_err(elf)?;
        let places = self.ours(".orc_unwind_ip")?.len();
        let wrong = |why| PackageError::Ours {
            section: ".orc_unwind",
            why,
        };
        if !places.is_multiple_of(4) || places == 0 || !table.len().is_multiple_of(places / 4) {
            return Err(wrong("does not match .orc_unwind_ip"));
        }
        let size = table.len() / (places / 4);
        let mut entries = Vec::new();
        for (offset, section, to) in self.pointers(".orc_unwind_ip")? {
            let nth = usize::try_from(offset / 4).map_err(|_| wrong("has an entry outside"))?;
            let start = nth
                .checked_mul(size)
                .ok_or_else(|| wrong("has an entry outside"))?;
            let entry = table
                .get(start..start + size)
                .ok_or_else(|| wrong("has an entry outside"))?
                .to_vec();
            entries.push(OrcEntry {
                section,
                offset: to,
                entry,
            });
        }
        Ok(entries)
    }

    /// The table of alternatives, which is understood only together with the kernel's types.
    fn alternatives(&mut self) -> Result<AlternativeTable, PackageError> {
        let name = ".altinstructions";
        if self.file.section_by_name(name).is_none() {
            return Ok(AlternativeTable::default());
        }
        let pointers = self.pointers(name)?.into_iter();
        let pointers = pointers.map(|(at, section, offset)| {
            let outside = |_| PackageError::Outside {
                what: "a pointer",
                section: name.to_owned(),
                offset: at,
            };
            let offset = usize::try_from(offset).map_err(outside)?;
            let at = usize::try_from(at).map_err(outside)?;
            Ok((at, Pointer { section, offset }))
        });
        Ok(AlternativeTable {
            pointers: pointers.collect::<Result<_, _>>()?,
            bytes: self.ours(name)?,
        })
    }
}

fn number(relocation: &object::Relocation) -> u32 {
    match relocation.flags() {
        RelocationFlags::Elf { r_type } => r_type.0,
        _ => 0,
    }
}

fn check_size(section: &ElfSection<'_, '_>, name: &str, memory: u64) -> Result<(), PackageError> {
    let too_much = |what, value, max| PackageError::TooMuch {
        section: name.to_owned(),
        what,
        value,
        max,
    };
    if memory > MAX_MEMORY {
        return Err(too_much("memory", memory, MAX_MEMORY));
    }
    let align = section.align();
    if align > MAX_ALIGN || (align != 0 && !align.is_power_of_two()) {
        return Err(too_much("an alignment", align, MAX_ALIGN));
    }
    Ok(())
}

/// Decodes the hexadecimal, NUL-terminated build-id of `.exopatch.kernel`.
fn build_id(text: &[u8]) -> Result<Vec<u8>, PackageError> {
    let wrong = PackageError::Ours {
        section: ".exopatch.kernel",
        why: "does not hold one build-id in hexadecimal",
    };
    let text = text
        .strip_suffix(&[0])
        .and_then(|text| std::str::from_utf8(text).ok());
    match text.and_then(parse_build_id) {
        Some(id) => Ok(id),
        None => Err(wrong),
    }
}
