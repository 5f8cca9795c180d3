//! What a kernel file is, looked at before anything starts.
//!
//! A `bzImage` is recognised by its setup header (Linux Documentation/arch/x86/boot.rst), an ELF `vmlinux` by its
//! program headers and its PVH note. Everything here came from a file that may be anything: nothing is trusted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

/// Which of the two kinds of kernel file it is, and what it asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFacts {
    /// How it is entered.
    pub kind: KernelKind,
    /// The guest-physical address past the last byte that it needs to start.
    pub end: u64,
    /// The longest command line it takes, without the final zero.
    pub cmdline_max: u64,
}

/// How a kernel file is loaded and entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// As shipped, entered by the 64-bit boot protocol.
    BzImage,
    /// An uncompressed kernel, entered by the PVH protocol.
    Elf,
}

/// Why a file is not a kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be read.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// It is neither of the two kinds.
    #[error("is neither a bzImage nor an ELF vmlinux; give it the vmlinuz of a kernel package")]
    Neither,
    /// It ends before what its header promises.
    #[error("is cut short: {len} bytes, its header promises {promised}")]
    Short {
        /// Bytes there are.
        len: u64,
        /// Bytes there should be.
        promised: u64,
    },
    /// A bzImage without a 64-bit entry point.
    #[error("has no 64-bit entry point; it is a 32-bit kernel or one older than 3.8")]
    No64BitEntry,
    /// A 64-bit ELF for another machine, or not an executable.
    #[error("is an ELF file, but not an x86-64 executable")]
    WrongElf,
    /// An ELF file none of whose segments can be loaded.
    #[error("is an ELF file with nothing to load, or with segments outside of any memory")]
    BadSegments,
}

/// `HdrS`, the magic of the setup header.
const SETUP_MAGIC: u32 = 0x5372_6448;
/// Where the setup header is in the file.
const SETUP_OFFSET: u64 = 0x1f1;
/// `XLF_KERNEL_64`: there is an entry point 0x200 bytes into the 64-bit code.
const XLF_KERNEL_64: u16 = 1;
/// What kernels before a field for it took.
const CMDLINE_DEFAULT: u64 = 255;
/// What x86 kernels take (`COMMAND_LINE_SIZE` in the kernel's asm/setup.h), less the final zero.
const CMDLINE_ELF: u64 = 2047;

/// Finds out what `file` is.
///
/// # Errors
/// When it is not a kernel that this machine could enter; the message continues "the file ...".
pub fn probe(file: &File) -> Result<KernelFacts, ImageError> {
    let len = file.metadata().map_err(ImageError::Read)?.len();
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(ImageError::Neither);
        }
        Err(error) => return Err(ImageError::Read(error)),
    }
    if magic == *b"\x7fELF" {
        return probe_elf(file, len);
    }
    probe_bzimage(file, len)
}

fn probe_bzimage(file: &File, len: u64) -> Result<KernelFacts, ImageError> {
    let mut header = setup_header::default();
    match file.read_exact_at(header.as_mut_slice(), SETUP_OFFSET) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(ImageError::Neither);
        }
        Err(error) => return Err(ImageError::Read(error)),
    }
    if header.header != SETUP_MAGIC {
        return Err(ImageError::Neither);
    }
    // 2.12 brought xloadflags.
    if header.version < 0x020c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(ImageError::No64BitEntry);
    }
    let setup = (u64::from(header.setup_sects.max(1)) + 1) * 512;
    let promised = setup + u64::from(header.syssize) * 16;
    // syssize counts 16-byte units rounded up, so the file may be up to 15 bytes shorter.
    if len + 15 < promised {
        return Err(ImageError::Short { len, promised });
    }
    Ok(KernelFacts {
        kind: KernelKind::BzImage,
        end: header
            .pref_address
            .saturating_add(u64::from(header.init_size)),
        cmdline_max: match u64::from(header.cmdline_size) {
            0 => CMDLINE_DEFAULT,
            size => size,
        },
    })
}

/// ELF-64 file header fields (System V ABI): class and data, type, machine, program headers.
fn probe_elf(file: &File, len: u64) -> Result<KernelFacts, ImageError> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)
        .map_err(|_| ImageError::Short { len, promised: 64 })?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    if header[4..6] != CLASS_64_LITTLE_ENDIAN || u16_at(16) != EXECUTABLE || u16_at(18) != X86_64 {
        return Err(ImageError::WrongElf);
    }
    let mut table = [0; 8];
    table.copy_from_slice(&header[32..40]);
    let table = u64::from_le_bytes(table);
    let mut end = 0;
    for index in 0..u64::from(u16_at(56)) {
        let at = table.saturating_add(index * 56);
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, at)
            .map_err(|_| ImageError::Short {
                len,
                promised: at.saturating_add(56),
            })?;
        let mut words = segment.chunks_exact(8).map(|word| {
            word.iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        });
        let (Some(kind), Some(offset), Some(_), Some(paddr), Some(filesz), Some(memsz)) = (
            words.next().map(|word| word & 0xffff_ffff),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
        ) else {
            return Err(ImageError::BadSegments);
        };
        const LOAD: u64 = 1;
        if kind != LOAD {
            continue;
        }
        let promised = offset.checked_add(filesz).ok_or(ImageError::BadSegments)?;
        if promised > len {
            return Err(ImageError::Short { len, promised });
        }
        let segment_end = paddr.checked_add(memsz).ok_or(ImageError::BadSegments)?;
        end = end.max(segment_end);
    }
    if end == 0 {
        return Err(ImageError::BadSegments);
    }
    Ok(KernelFacts {
        kind: KernelKind::Elf,
        end,
        cmdline_max: CMDLINE_ELF,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::{ImageError, KernelFacts, KernelKind, probe};

    fn check(bytes: &[u8]) -> Result<KernelFacts, ImageError> {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("written");
        probe(&file)
    }

    fn bzimage() -> Vec<u8> {
        let mut bytes = vec![0; 2 * 512 + 160];
        bytes[0x1f1] = 1; // setup_sects
        bytes[0x1f4] = 10; // syssize, in 16 bytes
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        bytes[0x236] = 1; // xloadflags
        bytes[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
        bytes[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&0x200_0000_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_bzimage_says_what_it_needs() {
        let facts = check(&bzimage()).expect("a bzImage");
        assert_eq!(
            facts,
            KernelFacts {
                kind: KernelKind::BzImage,
                end: 0x300_0000,
                cmdline_max: 2047
            }
        );
    }

    #[test]
    fn a_damaged_bzimage_is_refused_by_reason() {
        let mut short = bzimage();
        short.truncate(2 * 512 + 100);
        assert!(matches!(check(&short), Err(ImageError::Short { .. })));
        let mut old = bzimage();
        old[0x236] = 0;
        assert!(matches!(check(&old), Err(ImageError::No64BitEntry)));
        let mut other = bzimage();
        other[0x202] = b'X';
        assert!(matches!(check(&other), Err(ImageError::Neither)));
        assert!(matches!(check(b""), Err(ImageError::Neither)));
        assert!(matches!(check(b"#!/bin/sh\n"), Err(ImageError::Neither)));
    }

    fn elf(paddr: u64, memsz: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56 + 8];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes[64 + 8] = 120; // offset
        bytes[64 + 24..64 + 32].copy_from_slice(&paddr.to_le_bytes());
        bytes[64 + 32] = 8; // filesz
        bytes[64 + 40..64 + 48].copy_from_slice(&memsz.to_le_bytes());
        bytes
    }

    #[test]
    fn an_elf_kernel_says_what_it_needs() {
        let facts = check(&elf(0x100_0000, 0x1000)).expect("an ELF kernel");
        assert_eq!((facts.kind, facts.end), (KernelKind::Elf, 0x100_1000));
    }

    #[test]
    fn a_damaged_elf_is_refused_by_reason() {
        let good = elf(0x100_0000, 0x1000);
        assert!(matches!(check(&good[..40]), Err(ImageError::Short { .. })));
        assert!(matches!(check(&good[..100]), Err(ImageError::Short { .. })));
        assert!(matches!(check(&good[..124]), Err(ImageError::Short { .. })));
        let wraps = check(&elf(u64::MAX, 2));
        assert!(matches!(wraps, Err(ImageError::BadSegments)));
        let mut arm = good;
        arm[18] = 183;
        assert!(matches!(check(&arm), Err(ImageError::WrongElf)));
    }
}
