//! The compressed kernel inside a bzImage: where it lies, and how it is unpacked.
//!
//! Follows the x86 boot protocol (kernel `Documentation/arch/x86/boot.rst`, `payload_offset` and `payload_length`).
//! Unpacking writes straight into the caller's buffer, so that the kernel never exists twice in memory. Every length
//! of the input is checked; a payload that yields more or fewer bytes than it announces is refused.

use std::io::Read;
use std::ops::Range;

use super::bytes::{le_u16, le_u32};

/// Offset of `setup_sects` in a bzImage.
const SETUP_SECTS: usize = 0x1f1;
/// Offset of the protocol version; `HdrS` lies four bytes before it.
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Boot protocol 2.08 introduced `payload_offset`.
const FIRST_VERSION: u16 = 0x208;
/// More than any kernel has; a larger announcement is a damaged file, not a kernel.
const MAX_SIZE: usize = 1 << 30;
/// `lz4 -l` cuts its input into blocks of this size.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;

/// Why no kernel could be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// No boot header is there.
    #[error(
        "this is not a bzImage: no boot header at {VERSION:#x}; give the vmlinuz of the kernel's package"
    )]
    NotBzImage,
    /// The boot protocol does not say where the payload is.
    #[error(
        "the bzImage speaks boot protocol {version:#x}, which does not say where its payload is ({FIRST_VERSION:#x} does)"
    )]
    TooOld {
        /// Protocol version of the file.
        version: u16,
    },
    /// The file ends before the payload does.
    #[error(
        "the bzImage is truncated: its payload is at {payload:#x?}, the file has {len:#x} bytes"
    )]
    Truncated {
        /// Where the payload should be, in bytes from the start of the file.
        payload: Range<usize>,
        /// Bytes in the file.
        len: usize,
    },
    /// The payload begins like nothing known here.
    #[error(
        "the payload's compression ({name}) is not supported; supported are lz4, zstd, gzip and xz"
    )]
    Unsupported {
        /// Name of the compression, or its first bytes.
        name: String,
    },
    /// The announced size cannot be right.
    #[error("the payload announces {size} unpacked bytes, which no kernel has")]
    Size {
        /// Bytes announced.
        size: usize,
    },
    /// The caller's buffer has not the announced size.
    #[error("the buffer has {buffer} bytes, the kernel {size}")]
    Buffer {
        /// Bytes of the buffer.
        buffer: usize,
        /// Bytes that the kernel needs.
        size: usize,
    },
    /// The compressed bytes are damaged.
    #[error(
        "the payload is damaged at unpacked byte {at:#x}: {cause}; get the kernel's package again"
    )]
    Damaged {
        /// How far unpacking got, in unpacked bytes.
        at: usize,
        /// What the decompressor said.
        cause: String,
    },
}

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// LZ4 legacy frames (`lz4 -l`).
    Lz4,
    /// Zstandard.
    Zstd,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
}

/// A kernel's compressed payload within its bzImage.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    compression: Compression,
    data: &'a [u8],
    size: usize,
}

impl<'a> Payload<'a> {
    /// Finds the payload of `bzimage`.
    ///
    /// # Errors
    /// When the file is no bzImage, is truncated, or is compressed with something else than lz4, zstd, gzip or xz.
    pub fn find(bzimage: &'a [u8]) -> Result<Self, PayloadError> {
        let magic = bzimage.get(VERSION - 4..VERSION);
        if magic != Some(b"HdrS") {
            return Err(PayloadError::NotBzImage);
        }
        let version = le_u16(bzimage, VERSION).ok_or(PayloadError::NotBzImage)?;
        if version < FIRST_VERSION {
            return Err(PayloadError::TooOld { version });
        }
        let setup = match bzimage.get(SETUP_SECTS).copied().unwrap_or(0) {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let offset = le_u32(bzimage, PAYLOAD_OFFSET).ok_or(PayloadError::NotBzImage)? as usize;
        let length = le_u32(bzimage, PAYLOAD_LENGTH).ok_or(PayloadError::NotBzImage)? as usize;
        let start = (setup + 1) * 512 + offset;
        let payload = start..start.saturating_add(length);
        let data = bzimage
            .get(payload.clone())
            .ok_or(PayloadError::Truncated {
                payload,
                len: bzimage.len(),
            })?;
        Self::of(data)
    }

    /// The payload whose bytes are `data`, its announced size in the last four.
    fn of(data: &'a [u8]) -> Result<Self, PayloadError> {
        let compression = compression(data)?;
        let tail = data.len().saturating_sub(4);
        let size = le_u32(data, tail).unwrap_or(0) as usize;
        if size == 0 || size > MAX_SIZE {
            return Err(PayloadError::Size { size });
        }
        // gzip carries the size itself; after all others the kernel's build appends it.
        let data = if compression == Compression::Gzip {
            data
        } else {
            &data[..tail]
        };
        Ok(Self {
            compression,
            data,
            size,
        })
    }

    /// How the payload is compressed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Bytes of the unpacked kernel, as announced.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The kernel in `bzimage`, unpacked into memory of its own.
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>, PayloadError> {
        let payload = Payload::find(bzimage)?;
        let mut kernel = vec![0; payload.size()];
        payload.decompress_into(&mut kernel)?;
        Ok(kernel)
    }

    /// Unpacks the kernel into `target`, which must have [`Payload::size`] bytes.
    ///
    /// # Errors
    /// [`PayloadError::Buffer`] for another size, [`PayloadError::Damaged`] when the compressed bytes are not sound;
    /// `target` is then unspecified.
    pub fn decompress_into(&self, target: &mut [u8]) -> Result<(), PayloadError> {
        if target.len() != self.size {
            return Err(PayloadError::Buffer {
                buffer: target.len(),
                size: self.size,
            });
        }
        match self.compression {
            Compression::Lz4 => lz4_legacy(self.data, target),
            Compression::Zstd => {
                let filled = zstd::bulk::decompress_to_buffer(self.data, target)
                    .map_err(|cause| damaged(0, &cause))?;
                complete(filled, self.size)
            }
            Compression::Gzip => stream(flate2::bufread::GzDecoder::new(self.data), target),
            Compression::Xz => stream(lzma_rust2::XzReader::new(self.data, false), target),
        }
    }
}

fn compression(data: &[u8]) -> Result<Compression, PayloadError> {
    const KNOWN: [(&[u8], Result<Compression, &str>); 8] = [
        (&[0x02, 0x21, 0x4c, 0x18], Ok(Compression::Lz4)),
        (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Compression::Zstd)),
        (&[0x1f, 0x8b], Ok(Compression::Gzip)),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Ok(Compression::Xz)),
        (b"BZh", Err("bzip2")),
        (&[0x5d, 0, 0], Err("lzma")),
        (&[0x89, b'L', b'Z', b'O'], Err("lzo")),
        (
            &[0x7f, b'E', b'L', b'F'],
            Err("none: an uncompressed ELF file"),
        ),
    ];
    let unsupported = |name: String| PayloadError::Unsupported { name };
    match KNOWN.iter().find(|(magic, _)| data.starts_with(magic)) {
        Some((_, Ok(compression))) => Ok(*compression),
        Some((_, Err(name))) => Err(unsupported((*name).to_owned())),
        None => Err(unsupported(format!(
            "unknown, it begins with {:02x?}",
            data.get(..6).unwrap_or(data)
        ))),
    }
}

/// Unpacks LZ4's legacy frames: a magic number, then blocks, each preceded by its compressed length.
fn lz4_legacy(mut data: &[u8], target: &mut [u8]) -> Result<(), PayloadError> {
    let size = target.len();
    let mut filled = 0;
    while let Some(word) = le_u32(data, 0) {
        data = &data[4..];
        if word == LZ4_LEGACY_MAGIC {
            continue;
        }
        let (block, rest) = data.split_at_checked(word as usize).ok_or_else(|| {
            damaged(
                filled,
                &format!("a block of {word:#x} bytes runs over the end"),
            )
        })?;
        let room = target.get_mut(filled..).unwrap_or_default();
        let room_len = room.len().min(LZ4_BLOCK);
        let written = lz4_flex::block::decompress_into(block, &mut room[..room_len])
            .map_err(|cause| damaged(filled, &cause))?;
        filled += written;
        data = rest;
    }
    complete(filled, size)
}

fn stream(mut from: impl Read, target: &mut [u8]) -> Result<(), PayloadError> {
    let mut filled = 0;
    while let Some(room) = target.get_mut(filled..).filter(|room| !room.is_empty()) {
        match from.read(room).map_err(|cause| damaged(filled, &cause))? {
            0 => break,
            read => filled += read,
        }
    }
    let surplus = from
        .read(&mut [0])
        .map_err(|cause| damaged(filled, &cause))?;
    complete(filled + surplus, target.len())
}

fn complete(filled: usize, size: usize) -> Result<(), PayloadError> {
    if filled == size {
        Ok(())
    } else {
        Err(damaged(filled, &format!("{size} bytes were announced")))
    }
}

fn damaged(at: usize, cause: &dyn std::fmt::Display) -> PayloadError {
    PayloadError::Damaged {
        at,
        cause: cause.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::{Compression, LZ4_BLOCK, LZ4_LEGACY_MAGIC, Payload, PayloadError};

    const SIZE: usize = LZ4_BLOCK + 12_345;

    /// Something that compresses, and is longer than one block.
    fn plain() -> Vec<u8> {
        (0..SIZE)
            .map(|at| (at / 3 % 251).to_le_bytes()[0])
            .collect()
    }

    fn lz4(plain: &[u8]) -> Vec<u8> {
        let mut data = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
        for block in plain.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            data.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            data.extend(block);
        }
        data
    }

    fn packed(compression: Compression, plain: &[u8]) -> Vec<u8> {
        let mut data = match compression {
            Compression::Lz4 => lz4(plain),
            Compression::Zstd => zstd::bulk::compress(plain, 1).unwrap(),
            Compression::Gzip => {
                let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                to.write_all(plain).unwrap();
                return to.finish().unwrap();
            }
            Compression::Xz => {
                let options = lzma_rust2::XzOptions::with_preset(0);
                let mut to = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                to.write_all(plain).unwrap();
                to.finish().unwrap()
            }
        };
        data.extend(u32::try_from(plain.len()).unwrap().to_le_bytes());
        data
    }

    /// A bzImage with two setup sectors, whose payload lies 0x40 bytes into the code.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 3 * 512 + 0x40];
        file[0x1f1] = 2;
        file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        file[0x248..0x24c].copy_from_slice(&0x40_u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        file.extend(payload);
        file
    }

    fn unpacked(file: &[u8]) -> Result<Vec<u8>, PayloadError> {
        let payload = Payload::find(file)?;
        let mut target = vec![0; payload.size()];
        payload.decompress_into(&mut target).map(|()| target)
    }

    const ALL: [Compression; 4] = [
        Compression::Lz4,
        Compression::Zstd,
        Compression::Gzip,
        Compression::Xz,
    ];

    #[test]
    fn every_compression_is_unpacked_whole() {
        let plain = plain();
        for compression in ALL {
            let file = bzimage(&packed(compression, &plain));
            let payload = Payload::find(&file).unwrap();
            assert_eq!((payload.compression(), payload.size()), (compression, SIZE));
            assert!(unpacked(&file).unwrap() == plain, "{compression:?}");
            let short = payload.decompress_into(&mut [0; 10]);
            assert!(
                matches!(
                    short,
                    Err(PayloadError::Buffer {
                        buffer: 10,
                        size: SIZE
                    })
                ),
                "{short:?}"
            );
        }
    }

    #[test]
    fn a_wrong_size_is_refused() {
        for compression in ALL {
            for size in [SIZE - 1, SIZE + 1] {
                let mut data = packed(compression, &plain());
                let at = data.len() - 4;
                data[at..].copy_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
                let got = unpacked(&bzimage(&data)).map(|_| ());
                assert!(
                    matches!(got, Err(PayloadError::Damaged { .. })),
                    "{compression:?} {size} {got:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_bzimage_says_why() {
        let whole = bzimage(&packed(Compression::Zstd, b"kernel"));
        let mut old = whole.clone();
        old[0x206] = 7;
        let check = |file: &[u8], want: &str| {
            let got = unpacked(file).unwrap_err().to_string();
            assert!(got.contains(want), "{got}");
        };
        check(b"", "not a bzImage");
        check(&whole[..0x208], "not a bzImage");
        check(&whole[..0x600], "truncated");
        check(&old, "boot protocol 0x207");
        check(&bzimage(b"BZh91AY&SY"), "bzip2");
        check(&bzimage(b"\x5d\0\0\0\x04"), "lzma");
        check(&bzimage(b"whatever"), "unknown, it begins with [77");
        check(
            &bzimage(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0]),
            "0 unpacked bytes",
        );
        check(
            &bzimage(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0xff]),
            "which no kernel has",
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damage_never_panics(which in 0..4_usize, changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8)) {
            let plain: Vec<u8> = (0..5000_usize).map(|at| (at * at % 253).to_le_bytes()[0]).collect();
            let mut file = bzimage(&packed(ALL[which], &plain));
            // The size stays: an announcement of a gigabyte would only be slow.
            let len = file.len() - 4;
            for (at, value) in changes {
                file[at % len] = value;
            }
            let _ = unpacked(&file);
        }
    }
}
