//! An edition package (`.xpu`): the ELF relocatable that the kernel's own build makes, with up to five sections of ours.
//!
//! `.exopatch.kernel` holds the build-id of the kernel that it is for, in hexadecimal; `.exopatch.editions` one record for
//! each function that it replaces; `.exopatch.predicates` one for each function that rules may ask; `.exopatch.hooks` one for each of its hooks,
//! and `.exopatch.ticker` the one by which these get to run (all are made by `exopatch.h` and `exopatch_hooks.h`). Holding a [`Package`]
//! proves that every relocation is of a kind that can be applied, lies inside its section and names a symbol that exists; that
//! every edition, predicate and hook is a function of the package, and no two predicates have one name; and that nothing in it needs
//! more of the kernel than memory and symbols. Follows the ELF-64 specification.

mod read;

use std::collections::BTreeMap;

use object::LittleEndian;
use object::Object as _;
use object::read::elf::ElfFile64;

use super::hook::{Hooks, Moment};
use super::reloc::Kind;
use crate::addr::Gva;

/// The largest package that is looked at, in bytes.
pub const MAX_PACKAGE: usize = 16 << 20;
/// The most predicates of one package.
pub const MAX_PREDICATES: usize = 64;
/// Bytes of a build-id: 16 (MD5, UUID), 20 (SHA-1) or 32.
const BUILD_ID_LEN: std::ops::RangeInclusive<usize> = 8..=64;

/// Why bytes are not a package that can be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackageError {
    /// Larger than any edition.
    #[error("the package is {len} bytes long; at most {MAX_PACKAGE} are read")]
    TooLarge {
        /// Its size in bytes.
        len: usize,
    },
    /// Not an object file that can be read.
    #[error("the package is not a readable ELF object ({cause}); make it with `exopatch build`")]
    Elf {
        /// What the reader said.
        cause: String,
    },
    /// An ELF file, but not a relocatable object for x86-64.
    #[error(
        "the package is not a relocatable ELF object for x86-64 (type {kind}, architecture {machine}); make it with `exopatch build`"
    )]
    NotRelocatable {
        /// The kind of ELF file.
        kind: String,
        /// Its architecture.
        machine: String,
    },
    /// One of our own sections is not as `exopatch.h` makes it.
    #[error(
        "section {section} of the package {why}; compile it with the exopatch.h of this version"
    )]
    Ours {
        /// Name of the section.
        section: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It replaces nothing.
    #[error(
        "the package replaces no function; declare one with EXOPATCH_REPLACES(function, edition)"
    )]
    NoEdition,
    /// Its code has no unwind table.
    #[error(
        "the package has no ORC unwind table, so the kernel could not see through its stack frames; build it with `exopatch build`, which runs objtool"
    )]
    NoOrc,
    /// A section cannot be handled.
    #[error("the package has a section {section}, which is not supported: {why}")]
    Section {
        /// Name of the section.
        section: String,
        /// What would be lost without it.
        why: &'static str,
    },
    /// A section asks for too much memory or alignment.
    #[error(
        "section {section} of the package asks for {what} of {value:#x} bytes; at most {max:#x} are given"
    )]
    TooMuch {
        /// Name of the section.
        section: String,
        /// `memory` or `alignment`.
        what: &'static str,
        /// What it asks for.
        value: u64,
        /// The limit.
        max: u64,
    },
    /// A relocation that is not applied.
    #[error(
        "{name} at {section}+{offset:#x} of the package (to {symbol}) is not supported; compile it with `exopatch build`, which uses the kernel's own compiler options"
    )]
    Relocation {
        /// Name of the section.
        section: String,
        /// Offset in it.
        offset: u64,
        /// The relocation's ELF name.
        name: String,
        /// The symbol that it refers to.
        symbol: String,
    },
    /// A relocation or symbol that leads nowhere.
    #[error("the package is damaged: {what} in section {section} at {offset:#x} lies outside it")]
    Outside {
        /// What lies outside.
        what: &'static str,
        /// Name of the section.
        section: String,
        /// Offset in it.
        offset: u64,
    },
    /// A symbol is used whose section is left out.
    #[error(
        "{section}+{offset:#x} of the package refers to {symbol}, which is in a section that is not placed in the guest"
    )]
    LeftOut {
        /// Name of the section.
        section: String,
        /// Offset in it.
        offset: u64,
        /// The symbol.
        symbol: String,
    },
    /// An edition is not a function of the package.
    #[error("the edition of {function} is not a function that the package defines")]
    NotAFunction {
        /// The function that it replaces.
        function: String,
    },
    /// A table is there more than once.
    #[error("the package has more than one section {section}; compile it with `exopatch build`")]
    TwoTables {
        /// Name of the section.
        section: String,
    },
    /// Two editions of one function.
    #[error("the package has two editions of {function}")]
    Twice {
        /// The function.
        function: String,
    },
    /// A predicate is not a function of the package.
    #[error(
        "the predicate {name} is not a function that the package defines; define it with EXOPATCH_PREDICATE({name}, parameters)"
    )]
    NotAPredicate {
        /// Its name.
        name: String,
    },
    /// Two predicates of one name.
    #[error("the package has two predicates called {name}")]
    TwoPredicates {
        /// The name.
        name: String,
    },
    /// More predicates than there can be.
    #[error("the package has {count} predicates; at most {MAX_PREDICATES} are taken")]
    TooManyPredicates {
        /// How many.
        count: usize,
    },
    /// A hook is not a function of the package.
    #[error("the hook {name} is not a function that the package defines")]
    NotAHook {
        /// Its name.
        name: String,
    },
    /// Two hooks of one moment.
    #[error("the package has two hooks that run {moment}; have one call the other")]
    TwoHooks {
        /// When they run.
        moment: Moment,
    },
    /// It replaces the function from which hooks are begun.
    #[error(
        "the package has hooks and replaces {function}, from which hooks are begun; put the two into packages of their own"
    )]
    ReplacesTicker {
        /// The function.
        function: String,
    },
}

/// A section that gets memory in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Code goes to the read-execute half, everything else to the read-write one.
    pub code: bool,
    /// Its bytes before relocation; zeros for `.bss`.
    pub bytes: Vec<u8>,
    /// Alignment in bytes, a power of two.
    pub align: u64,
    /// What has to be filled in.
    pub relocations: Vec<Relocation>,
}

/// One place to fill in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Offset in its section, in bytes; the whole width lies inside.
    pub offset: usize,
    /// How.
    pub kind: Kind,
    /// To what: an index into [`Package::symbols`].
    pub symbol: usize,
    /// Constant added to the symbol's address.
    pub addend: i64,
}

/// A symbol that relocations refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name; that of its section for a section symbol.
    pub name: String,
    /// Where it is.
    pub place: Place,
}

/// Where a symbol is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the package: an index into [`Package::sections`] and an offset.
    Here(usize, u64),
    /// In a section that is left out.
    LeftOut,
    /// In the kernel, to be found by its name.
    Kernel,
    /// At this place of the running kernel.
    At(Gva),
}

/// A function that the package replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edition {
    /// Name of the kernel's function.
    pub function: String,
    /// 0 when the name must be unique; n for the nth kernel function of that name, by address.
    pub position: u32,
    /// Index into [`Package::sections`], of a code section.
    pub section: usize,
    /// Offset of the edition's first byte in it.
    pub offset: u64,
}

/// A function of the package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Index into [`Package::sections`], of a code section.
    pub section: usize,
    /// Offset of its first byte in it.
    pub offset: u64,
    /// Its bytes.
    pub size: u64,
}

/// A function of the package that rules may ask which calls are for its editions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Predicate {
    /// The name by which rules ask it, a C identifier.
    pub name: String,
    /// Index into [`Package::sections`], of a code section.
    pub section: usize,
    /// Offset of its first byte in it.
    pub offset: u64,
}

/// One entry of the unwind table: from where it applies, and the kernel's own encoding of what applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrcEntry {
    /// Index into [`Package::sections`].
    pub section: usize,
    /// Offset in it.
    pub offset: u64,
    /// `struct orc_entry` as this kernel defines it.
    pub entry: Vec<u8>,
}

/// The table of code that a processor may call for other code in its place of: how an entry is laid out, the kernel's types tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AlternativeTable {
    /// Its bytes before relocation.
    pub bytes: Vec<u8>,
    /// Where its entries' pointers lead, by the offset of the pointer.
    pub pointers: BTreeMap<usize, Pointer>,
}

/// A place in the package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// Index into [`Package::sections`].
    pub section: usize,
    /// Offset in it; its length at most.
    pub offset: usize,
}

/// A package that was read and found usable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    build_id: Vec<u8>,
    editions: Vec<Edition>,
    predicates: Vec<Predicate>,
    hooks: Option<Hooks>,
    sections: Vec<Section>,
    symbols: Vec<Symbol>,
    orc: Vec<OrcEntry>,
    functions: Vec<Function>,
    alternatives: AlternativeTable,
    left_out: Vec<(String, &'static str)>,
}

/// What a package is made of that was never a file.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) build_id: Vec<u8>,
    pub(crate) editions: Vec<Edition>,
    pub(crate) sections: Vec<Section>,
    pub(crate) symbols: Vec<Symbol>,
    pub(crate) orc: Vec<OrcEntry>,
    pub(crate) functions: Vec<Function>,
}

impl From<Made> for Package {
    fn from(made: Made) -> Self {
        Self {
            build_id: made.build_id,
            editions: made.editions,
            predicates: Vec::new(),
            hooks: None,
            sections: made.sections,
            symbols: made.symbols,
            orc: made.orc,
            functions: made.functions,
            alternatives: AlternativeTable::default(),
            left_out: Vec::new(),
        }
    }
}

impl Package {
    /// Reads a package.
    ///
    /// # Errors
    /// [`PackageError`], which names the section, symbol or relocation that stands in the way.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackageError> {
        if bytes.len() > MAX_PACKAGE {
            return Err(PackageError::TooLarge { len: bytes.len() });
        }
        let file = ElfFile64::<LittleEndian>::parse(bytes).map_err(read::elf)?;
        if file.kind() != object::ObjectKind::Relocatable
            || file.architecture() != object::Architecture::X86_64
        {
            return Err(PackageError::NotRelocatable {
                kind: format!("{:?}", file.kind()),
                machine: format!("{:?}", file.architecture()),
            });
        }
        read::read(&file)
    }

    /// Build-id of the kernel that it is for.
    #[must_use]
    pub fn build_id(&self) -> &[u8] {
        &self.build_id
    }

    /// What it replaces; never empty.
    #[must_use]
    pub fn editions(&self) -> &[Edition] {
        &self.editions
    }

    /// What rules may ask; of different names.
    #[must_use]
    pub fn predicates(&self) -> &[Predicate] {
        &self.predicates
    }

    /// What runs before and after its editions come or go, if anything does.
    #[must_use]
    pub fn hooks(&self) -> Option<&Hooks> {
        self.hooks.as_ref()
    }

    /// What it replaces, and behind that what hooks are begun by: all of it needs a function that can be redirected.
    pub fn redirected(&self) -> impl Iterator<Item = &Edition> {
        let ticker = self.hooks.iter().map(|hooks| &hooks.ticker);
        self.editions.iter().chain(ticker)
    }

    /// What gets memory.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// What relocations refer to.
    #[must_use]
    pub fn symbols(&self) -> &[Symbol] {
        &self.symbols
    }

    /// The unwind table, in the order of the object.
    #[must_use]
    pub fn orc(&self) -> &[OrcEntry] {
        &self.orc
    }

    /// Its functions, in the order of the object.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// Code that a processor may call for other code in its place of; empty when there is none.
    #[must_use]
    pub fn alternatives(&self) -> &AlternativeTable {
        &self.alternatives
    }

    /// Sections that take memory in an ordinary kernel object but were left out, and why nothing is lost.
    #[must_use]
    pub fn left_out(&self) -> &[(String, &'static str)] {
        &self.left_out
    }
}

/// A build-id from hexadecimal digits.
#[must_use]
pub fn parse_build_id(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2)
        || !BUILD_ID_LEN.contains(&(text.len() / 2))
        || !text.is_ascii()
    {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

/// A build-id as hexadecimal digits.
#[must_use]
pub fn build_id_text(id: &[u8]) -> String {
    use std::fmt::Write as _;
    id.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
pub(crate) mod tests;
