//! The symbols of one module, as the kernel keeps them for `/proc/kallsyms`.
//!
//! Tables are read whole, once their bounds are known to lie within the module's memory.
//! Sources: kernel `kernel/module/kallsyms.c`, `include/linux/export-internal.h`; the ELF-64 specification for entries.

use std::collections::HashSet;
use std::ops::Range;

use super::{Module, ModuleError};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::bytes::{le_i32, le_u16, le_u32, le_u64};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::types::Types;

/// Bytes of `Elf64_Sym`.
const ENTRY: usize = 24;
/// More symbols than any module has.
const MAX_SYMBOLS: u32 = 1 << 20;
/// More exports than any module has.
const MAX_EXPORTS: u32 = 1 << 16;
/// Longest name (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;

/// Where the symbols of a module are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    /// Its `struct mod_kallsyms`.
    pub(super) kallsyms: Gva,
    /// What it exports to any module.
    pub(super) exports: Gva,
    pub(super) export_count: u32,
}

/// One symbol of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSymbol {
    /// Its name.
    pub name: String,
    /// Where it is, or its value if it is absolute or per-CPU.
    pub address: Gva,
    /// The letter that `/proc/kallsyms` gives it: a capital when it is exported to modules of any licence.
    pub kind: u8,
    /// Bytes, as the module's own symbol table says; zero where it does not say.
    pub size: u64,
    /// It is defined elsewhere, and only used here: seen while a module starts.
    pub undefined: bool,
}

impl Module {
    /// The module's symbols, in the order of its table; those without a name are left out.
    ///
    /// # Errors
    /// When a table cannot be read, or lies outside the module's memory.
    pub fn symbols<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<Vec<ModuleSymbol>, ModuleError> {
        let Some(tables) = &self.tables else {
            return Ok(Vec::new());
        };
        // A module that never had any has none to point to.
        if tables.kallsyms.0 == 0 {
            return Ok(Vec::new());
        }
        let memory = Memory::new(kernel, guest)?;
        let names = self.names(kernel, &memory, tables.kallsyms)?;
        let exports = self.exports(kernel.image().types(), &memory, tables)?;
        let mut symbols = Vec::new();
        for (index, entry) in names.entries.chunks_exact(ENTRY).enumerate() {
            let name =
                names
                    .name(le_u32(entry, 0).unwrap_or(0))
                    .ok_or_else(|| KernelError::Unsound {
                        what: "name of a module's symbol",
                        at: Gva(names.at.0.wrapping_add((index * ENTRY) as u64)),
                        value: le_u32(entry, 0).unwrap_or(0).into(),
                    })?;
            if name.is_empty() {
                continue;
            }
            let address = Gva(le_u64(entry, 8).unwrap_or(0));
            let kind = names.kinds.get(index).copied().unwrap_or(b'?');
            let exported = exports.contains(&(address, name.to_vec()));
            symbols.push(ModuleSymbol {
                name: String::from_utf8_lossy(name).into_owned(),
                address,
                kind: if exported {
                    kind.to_ascii_uppercase()
                } else {
                    kind.to_ascii_lowercase()
                },
                size: le_u64(entry, 16).unwrap_or(0),
                undefined: le_u16(entry, 6) == Some(0),
            });
        }
        Ok(symbols)
    }

    /// Reads `len` bytes of the module's own memory.
    fn read_own<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        what: &'static str,
        at: Gva,
        len: u64,
    ) -> Result<Vec<u8>, ModuleError> {
        if len == 0 {
            return Ok(Vec::new());
        }
        self.own(what, at, len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        memory.read(at, &mut bytes)?;
        Ok(bytes)
    }

    fn names<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        kallsyms: Gva,
    ) -> Result<Names, ModuleError> {
        let types = kernel.image().types();
        let field = |path: &str| {
            let offset = types.offset_of("mod_kallsyms", path)?;
            Ok::<Gva, ModuleError>(Gva(kallsyms.0.wrapping_add(offset)))
        };
        let at = Gva(memory.u64(field("symtab")?)?);
        let count = memory.u32(field("num_symtab")?)?;
        if count > MAX_SYMBOLS {
            let (what, value) = ("count of a module's symbols", count.into());
            return Err(KernelError::Unsound { what, at, value }.into());
        }
        let len = u64::from(count) * ENTRY as u64;
        let entries = self.read_own(memory, "the symbol table", at, len)?;
        let kinds_at = Gva(memory.u64(field("typetab")?)?);
        let kinds = self.read_own(
            memory,
            "the table of symbols' kinds",
            kinds_at,
            count.into(),
        )?;
        let strings_at = Gva(memory.u64(field("strtab")?)?);
        let last = entries
            .chunks_exact(ENTRY)
            .filter_map(|entry| le_u32(entry, 0));
        // The table's length is nowhere: it ends with the last name, or else with the memory that it is in.
        let strings = match last.max() {
            None => Vec::new(),
            Some(last) => {
                self.own(
                    "the table of symbols' names",
                    strings_at,
                    u64::from(last) + 1,
                )?;
                let end = self.end_of(strings_at);
                let most = u64::from(last) + MAX_NAME as u64;
                let len = end.offset_from(strings_at).unwrap_or(0).min(most);
                self.read_own(memory, "the table of symbols' names", strings_at, len)?
            }
        };
        Ok(Names {
            at,
            entries,
            kinds,
            strings,
        })
    }

    /// Where the stretch of the module's memory that `at` is in ends.
    fn end_of(&self, at: Gva) -> Gva {
        let holds = |range: &Range<Gva>| range.contains(&at);
        super::ranges_within(&self.parts)
            .into_iter()
            .find(holds)
            .map_or(at, |range| range.end)
    }

    /// Address and name of what the module exports to modules of any licence.
    fn exports<R: ReadPhys + ?Sized>(
        &self,
        types: &Types,
        memory: &Memory<'_, R>,
        tables: &Tables,
    ) -> Result<HashSet<(Gva, Vec<u8>)>, ModuleError> {
        let entry = types.size_of("kernel_symbol")?;
        let relative = types.has_member("kernel_symbol", "value_offset");
        let (value, name) = if relative {
            ("value_offset", "name_offset")
        } else {
            ("value", "name")
        };
        let value = types.offset_of("kernel_symbol", value)?;
        let name = types.offset_of("kernel_symbol", name)?;
        if tables.export_count > MAX_EXPORTS {
            return Err(KernelError::Unsound {
                what: "count of a module's exports",
                at: tables.exports,
                value: tables.export_count.into(),
            }
            .into());
        }
        let len = entry.saturating_mul(tables.export_count.into());
        let bytes = self.read_own(memory, "the table of exports", tables.exports, len)?;
        let mut exports = HashSet::new();
        let entry_len = usize::try_from(entry.max(1)).unwrap_or(usize::MAX);
        for (index, bytes) in bytes.chunks_exact(entry_len).enumerate() {
            let base = tables
                .exports
                .0
                .wrapping_add(entry.wrapping_mul(index as u64));
            let target = |offset: u64| {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                if relative {
                    let distance = i64::from(le_i32(bytes, at).unwrap_or(0));
                    Gva(base.wrapping_add(offset).wrapping_add_signed(distance))
                } else {
                    Gva(le_u64(bytes, at).unwrap_or(0))
                }
            };
            let name_at = target(name);
            let left = self.end_of(name_at).offset_from(name_at).unwrap_or(0);
            let len = left.min(MAX_NAME as u64);
            let mut text = self.read_own(memory, "the name of an export", name_at, len)?;
            let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
            text.truncate(end);
            exports.insert((target(value), text));
        }
        Ok(exports)
    }
}

struct Names {
    at: Gva,
    entries: Vec<u8>,
    kinds: Vec<u8>,
    strings: Vec<u8>,
}

impl Names {
    /// The name at `offset`; `None` where it does not end.
    fn name(&self, offset: u32) -> Option<&[u8]> {
        let tail = self.strings.get(offset as usize..)?;
        let end = tail.iter().take(MAX_NAME).position(|byte| *byte == 0)?;
        tail.get(..end)
    }
}
