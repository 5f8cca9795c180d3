//! The modules that the running kernel has loaded, with their memory and symbols.
//!
//! All of the kernel's list is read, in its order, whatever state a module is in. Where a module's memory is described
//! (one part for each kind, or one for the core and one for the start, each cut by sizes) the kernel's types say.
//! Nothing that a module says of itself is taken without a bound: tables must lie within its own memory.
//! Sources: kernel `include/linux/module.h`, `kernel/module/{main,procfs,kallsyms}.c`, `kernel/panic.c` (`taint_flags`).

mod layout;
pub mod symbols;
pub mod types;

use std::collections::HashMap;
use std::ops::Range;

use self::layout::{MemoryLayout, ModuleLayout, ranges_within};
use super::gather::{Bound, Fields};
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::symbols::SymbolError;
use super::types::TypeError;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::x86::paging::PagingError;

/// More modules than any guest has.
const MAX_MODULES: usize = 4096;
/// More uses of one module by others than any guest has.
const MAX_USERS: usize = MAX_MODULES;
/// Bytes that one part of a module may have: the largest modules have some ten MiB.
const MAX_PART: u64 = 64 << 20;
/// More bytes than any kernel's table of taints has.
const MAX_TAINTS: u64 = 4096;

/// Why the modules cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Something of the kernel could not be found, read, or is unsound.
    #[error("the kernel's modules cannot be read: {0}")]
    Kernel(#[from] KernelError),
    /// The kernel describes a kind of memory, or a state, that is not known here.
    #[error("the kernel's {of} {name} is not known here")]
    Unknown {
        /// The enumeration.
        of: &'static str,
        /// Its enumerator, or the value that has none.
        name: String,
    },
    /// What a module points to lies outside its own memory.
    #[error("{what} of module {module} at {at}, {len:#x} bytes, is not in the module's memory")]
    Outside {
        /// The module.
        module: String,
        /// What is pointed to.
        what: &'static str,
        /// Where it points.
        at: Gva,
        /// How many bytes there should be.
        len: u64,
    },
}

impl From<SymbolError> for ModuleError {
    fn from(error: SymbolError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<TypeError> for ModuleError {
    fn from(error: TypeError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<PagingError> for ModuleError {
    fn from(error: PagingError) -> Self {
        Self::Kernel(error.into())
    }
}

/// How far a module has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleState {
    /// It is in use.
    Live,
    /// It is complete and is being started.
    Coming,
    /// It is being unloaded.
    Going,
    /// It is still being put together: nothing but its name means anything.
    Unformed,
}

/// What a part of a module's memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PartKind {
    /// Code.
    Text,
    /// Data that may be written.
    Data,
    /// Data that is never written.
    RoData,
    /// Data that was written while the module started.
    RoAfterInit,
    /// Code for the start alone.
    InitText,
    /// Data for the start alone.
    InitData,
    /// Data for the start alone, never written.
    InitRoData,
}

/// One module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its `struct module`.
    pub at: Gva,
    /// Its name.
    pub name: String,
    /// How far it has got.
    pub state: ModuleState,
    /// The parts of its memory that have bytes.
    pub parts: Vec<(PartKind, Range<Gva>)>,
    /// Bytes of all its memory, as `/proc/modules` counts them: parts may be padded.
    pub size: u64,
    /// How many references others hold to it (`/proc/modules`); below zero while it goes.
    pub references: i64,
    /// Names of the modules that use it.
    pub users: Vec<String>,
    /// It can never be unloaded, because it has a start but no end.
    pub permanent: bool,
    /// The letters of why it taints the kernel, as `/proc/modules` shows them.
    pub taints: String,
    /// Where its symbols are.
    tables: Option<symbols::Tables>,
}

impl Module {
    /// The kind of memory that `at` is in, if it is the module's.
    #[must_use]
    pub fn part_at(&self, at: Gva) -> Option<PartKind> {
        let holds = |(_, range): &&(PartKind, Range<Gva>)| range.contains(&at);
        self.parts.iter().find(holds).map(|(kind, _)| *kind)
    }

    /// Whether more of it than its name means anything.
    fn formed(&self) -> bool {
        self.state != ModuleState::Unformed
    }

    /// The `len` bytes at `at`, when one stretch of the module's memory holds them.
    fn own(&self, what: &'static str, at: Gva, len: u64) -> Result<Range<Gva>, ModuleError> {
        let outside = || ModuleError::Outside {
            module: self.name.clone(),
            what,
            at,
            len,
        };
        let wanted = at.range(len).ok_or_else(outside)?;
        let inside = ranges_within(&self.parts)
            .into_iter()
            .any(|range| range.start <= wanted.start && wanted.end <= range.end);
        inside.then_some(wanted).ok_or_else(outside)
    }
}

/// The modules of `kernel` in `guest`, which must stand still, in the order of the kernel's list: the newest first.
///
/// # Errors
/// When the list does not end, or a module's description cannot be read or is unsound.
pub fn read<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Vec<Module>, ModuleError> {
    let image = kernel.image();
    if !image.symbols().has("modules") {
        return Ok(Vec::new());
    }
    let head = kernel.symbol("modules")?;
    let layout = ModuleLayout::resolve(image)?;
    let memory = Memory::new(kernel, guest)?;
    let reader = Reader {
        taints: taint_letters(kernel, &memory)?,
        memory: &memory,
        layout: &layout,
    };
    let gather = layout.gather();
    let mut fields = gather.fields();
    let mut bound = Bound::new("list of modules", MAX_MODULES);
    let mut modules = Vec::new();
    let mut node = memory.u64(head)?;
    while node != head.0 {
        bound.step(node)?;
        let at = Gva(node.wrapping_sub(layout.list));
        fields.read(&memory, at)?;
        modules.push(reader.module(at, &fields)?);
        node = fields.u64(layout.list);
    }
    let names: HashMap<Gva, String> = modules
        .iter()
        .map(|module| (module.at, module.name.clone()))
        .collect();
    for module in &mut modules {
        if let Some(users) = layout.users.as_ref().filter(|_| module.formed()) {
            module.users = reader.users(module.at, users, &names)?;
        }
    }
    Ok(modules)
}

struct Reader<'a, R: ?Sized> {
    /// The letter of each bit of a module's taints.
    taints: Vec<u8>,
    memory: &'a Memory<'a, R>,
    layout: &'a ModuleLayout,
}

impl<R: ReadPhys + ?Sized> Reader<'_, R> {
    fn module(&self, at: Gva, fields: &Fields) -> Result<Module, ModuleError> {
        let layout = self.layout;
        let state = layout.state_of(fields.u32(layout.state))?;
        let name: [u8; layout::NAME] = fields.array(layout.name);
        let name = name
            .split(|byte| *byte == 0)
            .next()
            .filter(|name| name.len() < layout::NAME);
        let unsound = |what, value| KernelError::Unsound { what, at, value };
        let name = name.ok_or_else(|| unsound("module's name, which does not end,", 0))?;
        let mut module = Module {
            at,
            name: String::from_utf8_lossy(name).into_owned(),
            state,
            parts: Vec::new(),
            size: 0,
            references: 0,
            users: Vec::new(),
            permanent: false,
            taints: String::new(),
            tables: None,
        };
        if !module.formed() {
            return Ok(module);
        }
        (module.parts, module.size) = self.parts(at, fields)?;
        if let Some(references) = layout.references {
            // The kernel counts one more while the module lives (`MODULE_REF_BASE`).
            module.references = i64::from(fields.u32(references).cast_signed()) - 1;
        }
        if let (Some(init), Some(exit)) = (layout.init, layout.exit) {
            module.permanent = fields.u64(init) != 0 && fields.u64(exit) == 0;
        }
        let bits = fields.u64(layout.taints);
        let letters = self.taints.iter().enumerate();
        let set = letters.filter(|(bit, letter)| **letter != 0 && bits >> bit & 1 != 0);
        module.taints = set.map(|(_, letter)| char::from(*letter)).collect();
        if let Some(kallsyms) = &layout.kallsyms {
            module.tables = Some(symbols::Tables {
                kallsyms: Gva(fields.u64(kallsyms.pointer)),
                exports: Gva(fields.u64(kallsyms.exports)),
                export_count: fields.u32(kallsyms.export_count),
            });
        }
        Ok(module)
    }

    fn parts(&self, at: Gva, fields: &Fields) -> Result<layout::Parts, ModuleError> {
        let unsound = |value| KernelError::Unsound {
            what: "module's memory",
            at,
            value,
        };
        let mut parts = Vec::new();
        let mut size = 0_u64;
        let mut add = |kind, base: u64, from: u32, to: u32| {
            if u64::from(to) > MAX_PART || from > to {
                return Err(unsound(to.into()));
            }
            let start = Gva(base).checked_add(from.into());
            let range = start.and_then(|start| start.range(u64::from(to - from)));
            let range = range.ok_or_else(|| unsound(base))?;
            if !range.is_empty() {
                parts.push((kind, range));
            }
            Ok(())
        };
        match &self.layout.memory {
            MemoryLayout::Kinds(kinds) => {
                for part in kinds {
                    let len = fields.u32(part.size);
                    size += u64::from(len);
                    add(part.kind, fields.u64(part.base), 0, len)?;
                }
            }
            MemoryLayout::Halves(halves) => {
                for half in halves {
                    let base = fields.u64(half.base);
                    size += u64::from(fields.u32(half.end));
                    let mut from = 0;
                    for (kind, end) in half.cuts() {
                        let to = fields.u32(end);
                        // The half for the start has no data of the kind that is sealed behind it.
                        add(kind, base, from, to.max(from))?;
                        from = to.max(from);
                    }
                }
            }
        }
        Ok((parts, size))
    }

    fn users(
        &self,
        at: Gva,
        layout: &layout::UserLayout,
        names: &HashMap<Gva, String>,
    ) -> Result<Vec<String>, ModuleError> {
        let head = Gva(at.0.wrapping_add(layout.head));
        let mut bound = Bound::new("list of a module's users", MAX_USERS);
        let mut users = Vec::new();
        let mut node = self.memory.u64(head)?;
        while node != head.0 {
            bound.step(node)?;
            let entry = node.wrapping_sub(layout.link);
            let user = self.memory.u64(Gva(entry.wrapping_add(layout.source)))?;
            let unsound = KernelError::Unsound {
                what: "module's user, which is no module,",
                at: Gva(entry),
                value: user,
            };
            users.push(names.get(&Gva(user)).ok_or(unsound)?.clone());
            node = self.memory.u64(Gva(node))?;
        }
        Ok(users)
    }
}

/// The letter of each taint that a module may have, by bit; zero where modules have none. It is constant.
fn taint_letters<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    memory: &Memory<'_, R>,
) -> Result<Vec<u8>, ModuleError> {
    let image = kernel.image();
    let Some(table) = image.symbols().optional("taint_flags")? else {
        return Ok(Vec::new());
    };
    let entry = usize::try_from(image.types().size_of("taint_flag")?).unwrap_or(usize::MAX);
    let field = |path| {
        let offset = image.types().offset_of("taint_flag", path)?;
        Ok::<usize, TypeError>(usize::try_from(offset).unwrap_or(usize::MAX))
    };
    let (letter, module) = (field("c_true")?, field("module")?);
    let range = table.address.range(table.size.min(MAX_TAINTS));
    let bytes = match range.and_then(|range| image.bytes(range)) {
        Some(bytes) => bytes.to_vec(),
        None => {
            let mut bytes = vec![0; usize::try_from(table.size.min(MAX_TAINTS)).unwrap_or(0)];
            memory.read(kernel.runtime(table.address), &mut bytes)?;
            bytes
        }
    };
    let entries = bytes.chunks_exact(entry.max(1)).take(64);
    let of = |entry: &[u8]| match (entry.get(letter), entry.get(module)) {
        (Some(letter), Some(1)) => *letter,
        _ => 0,
    };
    Ok(entries.map(of).collect())
}

#[cfg(test)]
pub(crate) mod tests;
