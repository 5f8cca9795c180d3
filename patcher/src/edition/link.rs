//! Links a package against the running kernel: every byte gets its place in the arena and every relocation its value.
//!
//! Nothing is written to the guest here. Holding a [`Linked`] proves that the package is for this kernel, that all its symbols
//! were found there, that every relocation fits, that its alternatives are those that the guest's processor calls for, that each of
//! its predicates runs code of the package alone, and that each replaced function has a relocated head.

mod alternatives;

pub use self::alternatives::AlternativeError;

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::edition::handler::{HandlerError, Thunk};
use crate::edition::hook::Moment;
use crate::edition::object::{Edition, Package, Place, Relocation, Section, build_id_text};
use crate::edition::predicate::{self, PredicateError};
use crate::edition::reloc::{Kind, Overflow};
use crate::edition::space::{ArenaSpace, Full};
use crate::kernel::alternatives::Alternatives;
use crate::kernel::symbols::SymbolError;
use crate::plan::refusal::Refusal;
use crate::plan::target::Target;
use crate::publish::{BUGS, FIXUPS, Symbol, Table};
use crate::x86::insn::{self, FENTRY_LEN, Head, NOP5};

/// Alignment of heads and between code sections, in bytes: that of the kernel's own functions.
const CODE_ALIGN: u64 = 16;
/// What fills gaps in code: `int3`.
const GAP: u8 = 0xcc;
/// Prefix of the symbols by which an edition calls an original; see `exopatch.h`.
pub(crate) const ORIGINAL: &str = "exopatch_original_";

/// Why a package cannot be linked.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It is for another kernel.
    #[error(
        "the package is for the kernel with build-id {}, this one's is {}; build it again with this kernel's headers",
        build_id_text(.package), build_id_text(.kernel)
    )]
    OtherKernel {
        /// Build-id in the package.
        package: Vec<u8>,
        /// Build-id of the kernel.
        kernel: Vec<u8>,
    },
    /// A symbol is not there, or there more than once.
    #[error("the edition refers to `{name}`: {cause}")]
    Symbol {
        /// The symbol.
        name: String,
        /// Why it has no address.
        cause: SymbolError,
    },
    /// It calls the original of a function that it does not replace.
    #[error(
        "the edition calls the original of {function}, which the package does not replace; call {function} itself"
    )]
    NoOriginal {
        /// The function.
        function: String,
    },
    /// It refers to `__fentry__` other than by the call that the compiler makes.
    #[error(
        "{section}+{offset:#x} refers to __fentry__, but is not the call at the beginning of a function"
    )]
    Fentry {
        /// Name of the section.
        section: String,
        /// Offset in it.
        offset: usize,
    },
    /// A value does not fit.
    #[error("{section}+{offset:#x} refers to `{symbol}`, which is out of reach: {cause}")]
    Overflow {
        /// Name of the section.
        section: String,
        /// Offset in it.
        offset: usize,
        /// The symbol.
        symbol: String,
        /// The value.
        cause: Overflow,
    },
    /// Its alternatives cannot be chosen.
    #[error(transparent)]
    Alternative(#[from] AlternativeError),
    /// A predicate may run what is not the package's.
    #[error(transparent)]
    Predicate(#[from] PredicateError),
    /// Nothing can be made that asks a predicate.
    #[error(transparent)]
    Thunk(#[from] HandlerError),
    /// No room in the arena.
    #[error(transparent)]
    Full(#[from] Full),
    /// The displaced instructions cannot run elsewhere.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// How functions of the running kernel return, which the kernel decided at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// By `ret`, followed by `int3`.
    Plain,
    /// By a jump to this thunk.
    Thunk(Gva),
}

/// What linking needs to know of the running kernel.
pub trait Resolve {
    /// Build-id of the kernel.
    fn build_id(&self) -> &[u8];
    /// Value of the one symbol called `name`: its address in the running kernel, or a per-CPU offset.
    ///
    /// # Errors
    /// When there is none, or more than one.
    fn symbol(&self, name: &str) -> Result<u64, SymbolError>;
    /// How its functions return.
    fn returns(&self) -> Returns;
    /// What its alternatives are chosen by.
    fn alternatives(&self) -> &Alternatives;
}

/// Bytes with their place in the arena.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Address of the first, or zero if there are none.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// One function and what takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// The function, and the bytes that the jump displaces.
    pub target: Target,
    /// First byte of its edition.
    pub edition: Gva,
    /// The displaced instructions, made to run in the arena: calling it runs the original.
    pub head: Head,
}

/// The hooks of a package with an address for everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// When each runs, its name and its first byte.
    pub list: Vec<(Moment, String, Gva)>,
    /// From where they are begun.
    pub ticker: Redirection,
    /// The words by which they are run.
    pub cells: Gva,
}

/// A package with an address for everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Linked {
    /// Code of the editions, the relocated heads, and what asks predicates.
    pub code: Placed,
    /// Their data.
    pub data: Placed,
    /// What is redirected where.
    pub redirections: Vec<Redirection>,
    /// Its hooks, and what they are run by.
    pub hooks: Option<Hooks>,
    /// Unwind entries of the editions: from where each applies, in the kernel's own encoding.
    pub orc: Vec<(Gva, Vec<u8>)>,
    /// Functions of the editions.
    pub functions: Vec<Symbol>,
    /// What asks its predicates.
    pub thunks: Vec<Thunk>,
    /// The exception table, if there is one.
    pub fixups: Option<Table>,
    /// The warnings, if there are any.
    pub bugs: Option<Table>,
}

impl Linked {
    /// Where its predicates are asked, by name.
    #[must_use]
    pub fn predicates(&self) -> BTreeMap<String, Gva> {
        let thunks = self.thunks.iter();
        thunks.map(|it| (it.name.clone(), it.at)).collect()
    }

    /// All functions that it may redirect, that from which its hooks are begun too.
    pub fn all_redirections(&self) -> impl Iterator<Item = &Redirection> {
        let ticker = self.hooks.iter().map(|hooks| &hooks.ticker);
        self.redirections.iter().chain(ticker)
    }
}

/// Links `package` for the functions in `targets`, one for each that it [may redirect](Package::redirected), in order.
///
/// Room is taken from `space`; on an error it is as it was.
///
/// # Errors
/// [`LinkError`].
pub fn link(
    package: &Package,
    kernel: &impl Resolve,
    targets: Vec<Target>,
    space: &mut ArenaSpace,
) -> Result<Linked, LinkError> {
    same_kernel(package, kernel)?;
    let sections = alternatives::choose(package, kernel.alternatives())?;
    predicate::check(package, &sections)?;
    let mut draft = space.clone();
    let mut layout = Layout::new(package);
    let heads = layout.heads(&targets, &draft)?;
    let thunks = layout.thunks(package, kernel.returns(), &draft)?;
    layout.place(&mut draft)?;
    let thunks = thunks_at(package, &layout, &thunks, kernel.returns())?;
    let mut linker = Linker {
        package,
        kernel,
        layout: &layout,
        heads: Vec::new(),
        editions: package.redirected().collect(),
    };
    for (target, offset) in targets.iter().zip(&heads) {
        linker
            .heads
            .push(relocated(target, layout.code.address(*offset))?);
    }
    let mut code = Placed {
        at: layout.code.base,
        bytes: vec![GAP; layout.code.len_bytes()],
    };
    let mut data = Placed {
        at: layout.data.base,
        bytes: vec![0; layout.data.len_bytes()],
    };
    for (index, section) in sections.iter().enumerate() {
        let (half, into) = if section.code {
            (&layout.code, &mut code)
        } else {
            (&layout.data, &mut data)
        };
        copy(&mut into.bytes, layout.offset(index), &section.bytes);
        for relocation in &section.relocations {
            linker.apply(
                section,
                half.address(layout.offset(index)),
                layout.offset(index),
                relocation,
                &mut into.bytes,
            )?;
        }
    }
    for (head, offset) in linker.heads.iter().zip(&heads) {
        copy(&mut code.bytes, *offset, &head.bytes);
    }
    for thunk in &thunks {
        copy(
            &mut code.bytes,
            thunk.at.0.wrapping_sub(code.at),
            &thunk.bytes,
        );
    }
    let at = |section, offset| Gva(layout.address(section).wrapping_add(offset));
    let mut redirections: Vec<Redirection> = targets
        .into_iter()
        .zip(linker.heads)
        .zip(package.redirected())
        .map(|((target, head), edition)| Redirection {
            target,
            edition: at(edition.section, edition.offset),
            head,
        })
        .collect();
    let hooks = hooks_at(package, &layout, &mut redirections);
    let orc = package
        .orc()
        .iter()
        .map(|entry| (at(entry.section, entry.offset), entry.entry.clone()))
        .collect();
    let functions = package.functions().iter().map(|function| Symbol {
        at: at(function.section, function.offset),
        size: function.size,
        name: function.name.clone(),
    });
    let functions = functions.collect();
    let table = |name| layout.table(package, name, &data);
    let (fixups, bugs) = (table(FIXUPS), table(BUGS));
    *space = draft;
    Ok(Linked {
        code,
        data,
        redirections,
        hooks,
        orc,
        functions,
        thunks,
        fixups,
        bugs,
    })
}

/// The hooks of `package`; what has them begin is the last of its `redirections`, and is taken off these.
fn hooks_at(
    package: &Package,
    layout: &Layout,
    redirections: &mut Vec<Redirection>,
) -> Option<Hooks> {
    let hooks = package.hooks()?;
    let at = |section, offset| Gva(layout.address(section).wrapping_add(offset));
    let list = hooks.list.iter();
    Some(Hooks {
        ticker: redirections.pop()?,
        cells: at(hooks.cells, 0),
        list: list
            .map(|it| (it.moment, it.name.clone(), at(it.section, it.offset)))
            .collect(),
    })
}

/// What asks the predicates of `package`, each at one of `offsets`.
fn thunks_at(
    package: &Package,
    layout: &Layout,
    offsets: &[u64],
    returns: Returns,
) -> Result<Vec<Thunk>, HandlerError> {
    let thunks = package.predicates().iter().zip(offsets);
    let thunk = thunks.map(|(predicate, offset)| {
        let asked = layout.address(predicate.section);
        let asked = Gva(asked.wrapping_add(predicate.offset));
        Thunk::new(
            &predicate.name,
            asked,
            layout.code.address(*offset),
            returns,
        )
    });
    thunk.collect()
}

/// The package is for this kernel.
///
/// # Errors
/// [`LinkError::OtherKernel`].
pub fn same_kernel(package: &Package, kernel: &impl Resolve) -> Result<(), LinkError> {
    let (package, kernel) = (package.build_id(), kernel.build_id());
    if package == kernel {
        return Ok(());
    }
    Err(LinkError::OtherKernel {
        package: package.into(),
        kernel: kernel.into(),
    })
}

fn relocated(target: &Target, at: Gva) -> Result<Head, Refusal> {
    let refused = |cause| Refusal::Immovable {
        function: target.name.clone(),
        cause,
    };
    let displaced =
        insn::whole_instructions(&target.displaced, target.jump, target.displaced.len())
            .map_err(refused)?;
    insn::relocate(&displaced, at).map_err(refused)
}

/// One half of the arena being filled: offsets first, the base when all is known.
#[derive(Debug, Default)]
struct Half {
    base: u64,
    len: u64,
    align: u64,
}

impl Half {
    /// Room for `len` bytes, as an offset.
    fn reserve(&mut self, len: usize, align: u64) -> u64 {
        let align = align.max(1);
        self.align = self.align.max(align);
        let offset = self.len.next_multiple_of(align);
        // Both are bounded by the package's limits, far below what could overflow.
        self.len = offset.saturating_add(len as u64);
        offset
    }

    fn address(&self, offset: u64) -> Gva {
        Gva(self.base.wrapping_add(offset))
    }

    fn len_bytes(&self) -> usize {
        usize::try_from(self.len).unwrap_or_default()
    }
}

/// Where everything goes.
struct Layout {
    code: Half,
    data: Half,
    /// For each section of the package whether it is code, and its offset in its half.
    sections: Vec<(bool, u64)>,
}

impl Layout {
    fn new(package: &Package) -> Self {
        let mut layout = Self {
            code: Half::default(),
            data: Half::default(),
            sections: Vec::new(),
        };
        for section in package.sections() {
            let (half, align) = if section.code {
                (&mut layout.code, section.align.max(CODE_ALIGN))
            } else {
                (&mut layout.data, section.align)
            };
            let offset = half.reserve(section.bytes.len(), align);
            layout.sections.push((section.code, offset));
        }
        layout
    }

    /// Reserves room for the head of each target, and returns the offsets. A head's length does not depend on its place.
    fn heads(&mut self, targets: &[Target], space: &ArenaSpace) -> Result<Vec<u64>, Refusal> {
        let anywhere = space.code.range().start;
        targets
            .iter()
            .map(|target| {
                Ok(self
                    .code
                    .reserve(relocated(target, anywhere)?.bytes.len(), CODE_ALIGN))
            })
            .collect()
    }

    /// Reserves room for what asks each predicate, and returns the offsets. That too is as long wherever it is.
    fn thunks(
        &mut self,
        package: &Package,
        returns: Returns,
        space: &ArenaSpace,
    ) -> Result<Vec<u64>, HandlerError> {
        let anywhere = space.code.range().start;
        let predicates = package.predicates().iter();
        let thunk = predicates.map(|it| Thunk::new(&it.name, anywhere, anywhere, returns));
        let room = thunk.map(|thunk| Ok(self.code.reserve(thunk?.bytes.len(), CODE_ALIGN)));
        room.collect()
    }

    fn place(&mut self, space: &mut ArenaSpace) -> Result<(), Full> {
        for (half, space) in [
            (&mut self.code, &mut space.code),
            (&mut self.data, &mut space.data),
        ] {
            if half.len > 0 {
                half.base = space.take(half.len, half.align)?.0;
            }
        }
        Ok(())
    }

    /// The section `name` as it was linked into `data`, if the package has it.
    fn table(&self, package: &Package, name: &str, data: &Placed) -> Option<Table> {
        let sections = package.sections();
        let index = sections.iter().position(|section| section.name == name)?;
        let start = usize::try_from(self.offset(index)).ok()?;
        let end = start.checked_add(sections.get(index)?.bytes.len())?;
        Some(Table {
            at: Gva(self.address(index)),
            bytes: data.bytes.get(start..end)?.to_vec(),
        })
    }

    fn offset(&self, section: usize) -> u64 {
        self.sections.get(section).map_or(0, |&(_, offset)| offset)
    }

    fn address(&self, section: usize) -> u64 {
        self.sections.get(section).map_or(0, |&(code, offset)| {
            if code {
                self.code.address(offset).0
            } else {
                self.data.address(offset).0
            }
        })
    }
}

/// Copies `bytes` to `offset` of `into`, which has room for them.
fn copy(into: &mut [u8], offset: u64, bytes: &[u8]) {
    let room = usize::try_from(offset)
        .ok()
        .and_then(|start| into.get_mut(start..start.checked_add(bytes.len())?));
    if let Some(room) = room {
        room.copy_from_slice(bytes);
    }
}

struct Linker<'a, K> {
    package: &'a Package,
    kernel: &'a K,
    layout: &'a Layout,
    heads: Vec<Head>,
    editions: Vec<&'a Edition>,
}

impl<K: Resolve> Linker<'_, K> {
    /// Fills in one relocation of `section`, which lies at `base` and `offset` bytes into `half`.
    fn apply(
        &self,
        section: &Section,
        base: Gva,
        offset: u64,
        relocation: &Relocation,
        half: &mut [u8],
    ) -> Result<(), LinkError> {
        let Some(symbol) = self.package.symbols().get(relocation.symbol) else {
            return Ok(());
        };
        let at = offset.wrapping_add(relocation.offset as u64);
        if symbol.place == Place::Kernel {
            if symbol.name == "__fentry__" {
                return fentry(section, relocation, at, half);
            }
            if symbol.name == "__x86_return_thunk"
                && self.kernel.returns() == Returns::Plain
                && let Some(opcode) = opcode(section, relocation, 0xe9)
            {
                copy(
                    half,
                    offset.wrapping_add(opcode),
                    &[0xc3, GAP, GAP, GAP, GAP],
                );
                return Ok(());
            }
        }
        let value = match symbol.place {
            Place::Here(section, offset) => self.layout.address(section).wrapping_add(offset),
            Place::At(at) => at.0,
            Place::Kernel | Place::LeftOut => self.resolve(&symbol.name)?,
        };
        let place = base.0.wrapping_add(relocation.offset as u64);
        let bytes = relocation
            .kind
            .bytes(value, relocation.addend, place)
            .map_err(|cause| LinkError::Overflow {
                section: section.name.clone(),
                offset: relocation.offset,
                symbol: symbol.name.clone(),
                cause,
            })?;
        copy(half, at, &bytes);
        Ok(())
    }

    /// Value of a symbol that the package does not define.
    fn resolve(&self, name: &str) -> Result<u64, LinkError> {
        if let Some(function) = name.strip_prefix(ORIGINAL) {
            let nth = self
                .editions
                .iter()
                .position(|edition| edition.function == function);
            let head = nth.and_then(|nth| self.heads.get(nth));
            return head
                .map(|head| head.at.0)
                .ok_or_else(|| LinkError::NoOriginal {
                    function: function.into(),
                });
        }
        if name == "__x86_return_thunk"
            && let Returns::Thunk(at) = self.kernel.returns()
        {
            return Ok(at.0);
        }
        self.kernel.symbol(name).map_err(|cause| LinkError::Symbol {
            name: name.into(),
            cause,
        })
    }
}

/// The offset in its section of the one-byte opcode `wanted` that a 32-bit PC-relative relocation belongs to.
fn opcode(section: &Section, relocation: &Relocation, wanted: u8) -> Option<u64> {
    let at = relocation.offset.checked_sub(1)?;
    let plain = relocation.kind == Kind::Pc32
        && relocation.addend == -4
        && section.bytes.get(at) == Some(&wanted);
    plain.then_some(at as u64)
}

/// Replaces the call of `__fentry__` by a NOP, `at` bytes into `half`.
fn fentry(
    section: &Section,
    relocation: &Relocation,
    at: u64,
    half: &mut [u8],
) -> Result<(), LinkError> {
    const _: () = assert!(NOP5.len() == FENTRY_LEN);
    if opcode(section, relocation, 0xe8).is_none() {
        return Err(LinkError::Fentry {
            section: section.name.clone(),
            offset: relocation.offset,
        });
    }
    copy(half, at.wrapping_sub(1), &NOP5);
    Ok(())
}

#[cfg(test)]
mod tests;
