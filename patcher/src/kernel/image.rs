//! A kernel image: the ELF file that a bzImage unpacks to, or what a guest's memory holds of it, and what is indexed of it.
//!
//! Holding an [`Image`] proves that this is an x86-64 Linux kernel whose symbols and build-id could be read. Addresses are link
//! addresses. What only the file can tell, [`Shipped`], is apart: text as it was before the kernel changed it, and the tables of where it does,
//! are gone from memory when the kernel has booted. So nothing that needs them can be asked of an image recovered from memory.
//! Follows the ELF-64 specification.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use object::elf;
use object::read::elf::{ElfFile64, FileHeader as _};
use object::{LittleEndian, Object as _, ObjectSection as _, SectionFlags};

use super::bytes::le_u32;
use super::entered::entered;
use super::orc::{OrcError, OrcTable};
use super::recover::Recovered;
use super::relocs::Relocs;
use super::sites::{Sites, SitesError};
use super::symbols::{KallsymsError, Symbols};
use super::types::{TypeError, Types};
use crate::addr::LinkAddr;

/// Bytes of a file, shared and never changed while in use (a mapping of a file, or a vector).
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Why a file is not a usable kernel image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not an ELF file that can be read.
    #[error("the kernel image is not a readable ELF file: {cause}")]
    Elf {
        /// What the reader said.
        cause: String,
    },
    /// An ELF file for another machine.
    #[error("the kernel image is not for x86-64: its ELF machine is {machine}")]
    Machine {
        /// `e_machine` of the file.
        machine: u16,
    },
    /// A section that is needed is absent.
    #[error("the kernel image has no section {name}: {need}")]
    Section {
        /// Name of the section.
        name: &'static str,
        /// What it is needed for, and the kernel option that makes it.
        need: &'static str,
    },
    /// The kernel carries no build-id.
    #[error(
        "the kernel image has no build-id in .notes, so a running guest could not be proved to run it"
    )]
    BuildId,
    /// The symbol tables cannot be read.
    #[error("the kernel image's symbols cannot be read: {0}")]
    Symbols(#[from] KallsymsError),
    /// The type information is there, but cannot be read.
    #[error("the kernel image's types cannot be read: {0}")]
    Types(#[from] TypeError),
}

/// Why what only the kernel's file can tell is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotShipped {
    /// The image was recovered from a guest's memory.
    #[error(
        "the kernel was recovered from the guest's memory, which no longer holds its text as it was shipped, nor where it was \
         changed: this needs the kernel's image file"
    )]
    FromMemory,
    /// The file is there, but the tables of where the kernel changes its text are not understood.
    #[error("the kernel image's patch sites cannot be read: {0}")]
    Sites(#[from] SitesError),
}

/// What needs types needs this.
const NEED_BTF: &str = "its image has no section .BTF (CONFIG_DEBUG_INFO_BTF)";

/// One section of the image that the kernel occupies memory with.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// The link addresses that it occupies. Per-CPU data starts at zero.
    pub range: Range<LinkAddr>,
    /// Where its bytes are in the file; empty when it has none (`.bss`).
    pub file: Range<usize>,
    /// Whether it holds instructions.
    pub executable: bool,
}

/// Where an image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The kernel's file.
    File,
    /// A guest's memory.
    Memory,
}

/// A kernel image, with its symbols, types and unwind table ready to be asked for.
pub struct Image {
    /// The file; `None` when the image comes from memory.
    bytes: Option<Bytes>,
    sections: Arc<[Section]>,
    build_id: Vec<u8>,
    build_id_at: LinkAddr,
    symbols: Symbols,
    types: Arc<Types>,
    orc: Result<OrcTable, OrcError>,
    shipped: Result<Shipped, NotShipped>,
}

/// What only the kernel's file can tell: its text as it was shipped, where the kernel changes it, and what it becomes elsewhere.
pub struct Shipped {
    bytes: Bytes,
    sections: Arc<[Section]>,
    sites: Sites,
    relocs: Relocs,
}

impl Image {
    /// Reads the kernel image `vmlinux`, an unpacked bzImage payload or an ELF kernel with kallsyms.
    ///
    /// A kernel without types (before Linux 5.2, or without `CONFIG_DEBUG_INFO_BTF`) has an image too: each question about a type
    /// is then answered by [`TypeError::Absent`].
    ///
    /// # Errors
    /// When it is no x86-64 kernel, or lacks a build-id or symbols (`CONFIG_KALLSYMS_ALL`), or its types are damaged.
    pub fn parse(vmlinux: Bytes) -> Result<Self, ImageError> {
        let data: &[u8] = (*vmlinux).as_ref();
        let (sections, end) = sections(data)?;
        let (build_id, build_id_at) = build_id(data, &sections).ok_or(ImageError::BuildId)?;
        let types = match find(&sections, ".BTF") {
            Some(btf) => Types::parse(vmlinux.clone(), btf.file.clone())?,
            None => Types::absent(NEED_BTF),
        };
        let rodata = find(&sections, ".rodata").ok_or(ImageError::Section {
            name: ".rodata",
            need: "symbols are kept in it",
        })?;
        let symbols = Symbols::parse(vmlinux.clone(), rodata)?;
        let sections: Arc<[Section]> = sections.into();
        let shipped = Sites::parse(vmlinux.clone(), &sections, &symbols, &types)
            .map_err(NotShipped::Sites)
            .map(|sites| Shipped {
                sites,
                relocs: Relocs::parse(vmlinux.clone(), end),
                bytes: vmlinux.clone(),
                sections: sections.clone(),
            });
        let orc = OrcTable::of_image(&vmlinux, &sections, &types, |code, count| match &shipped {
            Ok(shipped) => shipped.sites.entered(code, count),
            Err(_) => entered(&symbols, code, count, |at, buf| {
                let text = at.range(buf.len() as u64);
                let text = text.and_then(|range| bytes_at(data, &sections, range, true));
                text.map(|text| buf.copy_from_slice(text)).is_some()
            }),
        });
        Ok(Self {
            build_id,
            build_id_at,
            symbols,
            types: Arc::new(types),
            orc,
            shipped,
            sections,
            bytes: Some(vmlinux),
        })
    }

    /// The image of what was recovered from a guest's memory.
    pub(crate) fn recovered(from: Recovered) -> Self {
        Self {
            bytes: None,
            sections: from.sections.into(),
            build_id: from.build_id.0,
            build_id_at: from.build_id.1,
            symbols: from.symbols,
            types: Arc::new(from.types),
            orc: from.orc,
            shipped: Err(NotShipped::FromMemory),
        }
    }

    /// Where the image comes from.
    #[must_use]
    pub fn source(&self) -> Source {
        match self.bytes {
            Some(_) => Source::File,
            None => Source::Memory,
        }
    }

    /// What only the kernel's file can tell.
    ///
    /// # Errors
    /// When the image comes from memory, or the file is not understood so far.
    pub fn shipped(&self) -> Result<&Shipped, NotShipped> {
        self.shipped.as_ref().map_err(Clone::clone)
    }

    /// The build-id, as in the ELF note `NT_GNU_BUILD_ID`.
    #[must_use]
    pub fn build_id(&self) -> &[u8] {
        &self.build_id
    }

    /// Where the bytes of the build-id are in the kernel.
    #[must_use]
    pub fn build_id_at(&self) -> LinkAddr {
        self.build_id_at
    }

    /// The symbols, from kallsyms.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// The types, from BTF.
    #[must_use]
    pub fn types(&self) -> &Types {
        &self.types
    }

    /// The same, for those that stand on them.
    pub(crate) fn shared_types(&self) -> Arc<Types> {
        Arc::clone(&self.types)
    }

    /// How to unwind the stacks of the image's code.
    ///
    /// # Errors
    /// When the image has no such table, or it is not sound.
    pub fn orc(&self) -> Result<&OrcTable, &OrcError> {
        self.orc.as_ref()
    }

    /// The sections that occupy memory, in the order of the file.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The file's bytes at `range`, before relocation, or `None` where it has none. Per-CPU data is not reachable here.
    #[must_use]
    pub fn bytes(&self, range: Range<LinkAddr>) -> Option<&[u8]> {
        bytes_at(
            (**self.bytes.as_ref()?).as_ref(),
            &self.sections,
            range,
            false,
        )
    }
}

impl Shipped {
    /// The places that the kernel itself patches, or has entries about.
    #[must_use]
    pub fn sites(&self) -> &Sites {
        &self.sites
    }

    /// The relocations for a kernel that runs elsewhere than it was linked.
    #[must_use]
    pub fn relocs(&self) -> &Relocs {
        &self.relocs
    }

    /// As [`Image::bytes`].
    #[must_use]
    pub fn bytes(&self, range: Range<LinkAddr>) -> Option<&[u8]> {
        bytes_at((*self.bytes).as_ref(), &self.sections, range, false)
    }

    /// As [`Image::bytes`], of executable sections only.
    #[must_use]
    pub fn text(&self, range: Range<LinkAddr>) -> Option<&[u8]> {
        bytes_at((*self.bytes).as_ref(), &self.sections, range, true)
    }
}

impl fmt::Debug for Shipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shipped")
            .field("sites", &self.sites)
            .field("relocs", &self.relocs)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("build_id", &self.build_id)
            .field("symbols", &self.symbols)
            .finish_non_exhaustive()
    }
}

/// The bytes of `data` at link addresses `range`, when one section (of instructions, if `executable`) has them all.
pub(crate) fn bytes_at<'a>(
    data: &'a [u8],
    sections: &[Section],
    range: Range<LinkAddr>,
    executable: bool,
) -> Option<&'a [u8]> {
    let len = usize::try_from(range.end.offset_from(range.start)?).ok()?;
    let inside = |section: &&Section| {
        section.range.start.0 != 0
            && section.range.start <= range.start
            && range.end <= section.range.end
    };
    let section = sections
        .iter()
        .filter(|section| section.executable || !executable)
        .find(inside)?;
    let start = usize::try_from(range.start.offset_from(section.range.start)?).ok()?;
    data.get(section.file.clone())?
        .get(start..start.checked_add(len)?)
}

fn find<'a>(sections: &'a [Section], name: &str) -> Option<&'a Section> {
    sections.iter().find(|section| section.name == name)
}

/// The sections that occupy memory, and where the ELF file itself ends (the kernel's build appends relocations there).
fn sections(data: &[u8]) -> Result<(Vec<Section>, usize), ImageError> {
    let unreadable = |cause: object::Error| ImageError::Elf {
        cause: cause.to_string(),
    };
    let file = ElfFile64::<LittleEndian>::parse(data).map_err(unreadable)?;
    let header = file.elf_header();
    let machine = header.e_machine(LittleEndian);
    if machine != elf::EM_X86_64 {
        return Err(ImageError::Machine { machine: machine.0 });
    }
    let table =
        u64::from(header.e_shnum(LittleEndian)) * u64::from(header.e_shentsize(LittleEndian));
    let mut end =
        usize::try_from(header.e_shoff(LittleEndian).saturating_add(table)).unwrap_or(usize::MAX);
    let mut sections = Vec::new();
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
            continue;
        };
        let (offset, len) = section.file_range().unwrap_or((0, 0));
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let stop = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
        end = end.max(stop);
        if sh_flags.0 & elf::SHF_ALLOC.0 == 0 {
            continue;
        }
        let name = section.name().map_err(unreadable)?.to_owned();
        if stop > data.len() {
            return Err(ImageError::Elf {
                cause: format!("section {name} runs over the end of the file"),
            });
        }
        let Some(range) = LinkAddr(section.address()).range(section.size()) else {
            return Err(ImageError::Elf {
                cause: format!("section {name} wraps around the address space"),
            });
        };
        sections.push(Section {
            name,
            range,
            file: start..stop,
            executable: sh_flags.0 & elf::SHF_EXECINSTR.0 != 0,
        });
    }
    Ok((sections, end))
}

/// The build-id and its link address, from the ELF notes in `.notes`.
fn build_id(data: &[u8], sections: &[Section]) -> Option<(Vec<u8>, LinkAddr)> {
    let section = find(sections, ".notes")?;
    build_id_in(data.get(section.file.clone())?, section.range.start)
}

/// The build-id among ELF notes, which lie at `start`, and its own address.
pub(crate) fn build_id_in(notes: &[u8], start: LinkAddr) -> Option<(Vec<u8>, LinkAddr)> {
    let mut at = 0;
    while let (Some(name_len), Some(len), Some(kind)) = (
        le_u32(notes, at),
        le_u32(notes, at + 4),
        le_u32(notes, at + 8),
    ) {
        let name = at + 12;
        let desc = name.checked_add(name_len as usize)?.next_multiple_of(4);
        let end = desc.checked_add(len as usize)?;
        let value = notes.get(desc..end)?;
        if kind == elf::NT_GNU_BUILD_ID.0
            && notes.get(name..name + 4) == Some(b"GNU\0")
            && !value.is_empty()
        {
            return Some((value.to_vec(), start.checked_add(desc as u64)?));
        }
        at = end.next_multiple_of(4);
    }
    None
}
