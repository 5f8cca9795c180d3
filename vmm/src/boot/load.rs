//! Kernel, initrd, command line and boot parameters into guest memory, straight from their files.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use patcher::addr::Gpa;
use patcher::guest::GuestError;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::e820;
use super::entry::Entry;
use super::image::KernelKind;
use crate::config::Config;
use crate::layout::{ACPI_TABLES, CMDLINE, HIGH_RAM, PVH_INFO, ZERO_PAGE};
use crate::memory::Memory;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file could not be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The kernel file is damaged, or does not fit.
    #[error("{} cannot be loaded: {cause}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: linux_loader::loader::Error,
    },
    /// An ELF kernel that was built without a PVH entry.
    #[error(
        "{} has no PVH entry (CONFIG_PVH); give the bzImage (vmlinuz) of the same kernel instead",
        .0.display()
    )]
    NoPvhEntry(PathBuf),
    /// There is no room for the initrd beside the kernel.
    #[error(
        "the initrd of {len} bytes does not fit between kernel and end of low memory; give more --memory"
    )]
    InitrdRoom {
        /// Its size.
        len: u64,
    },
    /// The memory map has more ranges than boot parameters hold.
    #[error("the memory map does not fit the boot parameters")]
    MapRoom,
    /// Guest memory is not where the layout says.
    #[error(transparent)]
    Memory(#[from] GuestError),
}

/// Loads everything that `config` names, and says how to enter.
///
/// # Errors
/// When a file is not what it was when it was checked, or does not fit.
pub fn load(config: &Config, memory: &Memory) -> Result<Entry, LoadError> {
    let path = &config.kernel;
    let mut file = open(path)?;
    let kernel = |cause| LoadError::Kernel {
        path: path.clone(),
        cause,
    };
    let regions = memory.regions();
    let high = Some(GuestAddress(HIGH_RAM));
    match config.kernel_facts.kind {
        KernelKind::BzImage => {
            let header = header(path, &file)?;
            let at = GuestAddress(header.pref_address);
            let loaded = BzImage::load(regions, Some(at), &mut file, high).map_err(kernel)?;
            let initrd = load_initrd(config, memory, u64::from(header.initrd_addr_max) + 1)?;
            write_cmdline(config, memory)?;
            write_zero_page(memory, header, initrd)?;
            Ok(Entry::Long {
                // The 64-bit entry point is 0x200 bytes into the protected-mode code.
                rip: loaded.kernel_load.0 + 0x200,
            })
        }
        KernelKind::Elf => {
            let loaded = Elf::load(regions, None, &mut file, high).map_err(kernel)?;
            let KernelLoaderResult {
                pvh_boot_cap: PvhBootCapability::PvhEntryPresent(entry),
                ..
            } = loaded
            else {
                return Err(LoadError::NoPvhEntry(path.clone()));
            };
            let initrd = load_initrd(config, memory, u64::MAX)?;
            write_cmdline(config, memory)?;
            write_pvh_info(memory, initrd).map_err(|error| LoadError::Kernel {
                path: path.clone(),
                cause: error,
            })?;
            Ok(Entry::Pvh { rip: entry.0 })
        }
    }
}

fn open(path: &Path) -> Result<File, LoadError> {
    File::open(path).map_err(|cause| LoadError::Read {
        path: path.to_owned(),
        cause,
    })
}

/// The setup header as it is in the file.
fn header(path: &Path, file: &File) -> Result<setup_header, LoadError> {
    use std::os::unix::fs::FileExt;
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), 0x1f1)
        .map_err(|cause| LoadError::Read {
            path: path.to_owned(),
            cause,
        })?;
    Ok(header)
}

/// Where the initrd is and how long.
type Initrd = Option<(u64, u64)>;

/// Reads the initrd as high as it may be, below `limit`.
fn load_initrd(config: &Config, memory: &Memory, limit: u64) -> Result<Initrd, LoadError> {
    let Some(path) = &config.initrd else {
        return Ok(None);
    };
    let mut file = open(path)?;
    let read = |cause| LoadError::Read {
        path: path.clone(),
        cause,
    };
    let len = file.metadata().map_err(read)?.len();
    let room = || LoadError::InitrdRoom { len };
    let top = memory.layout().low_end().min(limit);
    let at = top.checked_sub(len).ok_or_else(room)? & !0xfff;
    if at < config.kernel_facts.end {
        return Err(room());
    }
    let count = usize::try_from(len).map_err(|_| room())?;
    memory
        .regions()
        .read_exact_volatile_from(GuestAddress(at), &mut file, count)
        .map_err(|error| read(io::Error::other(error)))?;
    Ok(Some((at, len)))
}

fn write_cmdline(config: &Config, memory: &Memory) -> Result<(), GuestError> {
    let mut text = config.cmdline.clone().into_bytes();
    text.push(0);
    memory.write(Gpa(CMDLINE), &text)
}

/// Boot parameters for the 64-bit boot protocol.
fn write_zero_page(memory: &Memory, header: setup_header, initrd: Initrd) -> Result<(), LoadError> {
    /// "Undefined" loader.
    const LOADER: u8 = 0xff;
    /// "Normal" video mode.
    const VIDEO_NORMAL: u16 = 0xffff;
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI_TABLES,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER;
    params.hdr.vid_mode = VIDEO_NORMAL;
    params.hdr.cmd_line_ptr = low(CMDLINE);
    if let Some((at, len)) = initrd {
        params.hdr.ramdisk_image = low(at);
        params.hdr.ramdisk_size = low(len);
        params.ext_ramdisk_image = low(at >> 32);
        params.ext_ramdisk_size = low(len >> 32);
    }
    let map = e820::map(memory.layout());
    let mut table = params.e820_table;
    if map.len() > table.len() {
        return Err(LoadError::MapRoom);
    }
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.len,
            r#type: range.kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).map_err(|_| LoadError::MapRoom)?;
    memory.write(Gpa(ZERO_PAGE), params.as_slice())?;
    Ok(())
}

/// The low 32 bits, as the boot protocol splits its pointers.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Start information for the PVH protocol, with memory map and module list behind it.
fn write_pvh_info(memory: &Memory, initrd: Initrd) -> Result<(), linux_loader::loader::Error> {
    /// "xEn3", the top bit of the E set.
    const MAGIC: u32 = 0x336e_c578;
    /// The first version with a memory map.
    const VERSION: u32 = 1;
    const MODULES: u64 = PVH_INFO + 0x40;
    const MAP: u64 = PVH_INFO + 0x80;
    let map: Vec<_> = e820::map(memory.layout())
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: MODULES,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(PVH_INFO));
    params.set_sections(&map, GuestAddress(MAP));
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory.regions())
        .map_err(|_| linux_loader::loader::Error::MemoryOverflow)
}
