//! The kernel's image, made ready for the patcher: from the file that was booted to symbols and types.
//!
//! Neither the file nor what it unpacks to is ever held in anonymous memory: both are mappings of temporary files that
//! have no name. They are copies of ours, so nobody can change or truncate them while they are mapped.
#![expect(unsafe_code, reason = "maps files into memory")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};
use patcher::kernel::image::{Image, ImageError};
use patcher::kernel::payload::{Payload, PayloadError};

/// Why a kernel's file cannot be used for updates.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file cannot be read.
    #[error("cannot read the kernel {path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// There is no room for the unpacked kernel.
    #[error("cannot make a temporary file of {bytes} bytes for the kernel in {directory}: {cause}")]
    Temporary {
        /// Where it should be.
        directory: PathBuf,
        /// Its length.
        bytes: u64,
        /// What the system said.
        cause: io::Error,
    },
    /// It is not a bzImage that can be unpacked.
    #[error("cannot unpack the kernel {path}: {cause}")]
    Payload {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: PayloadError,
    },
    /// What it unpacks to cannot be used.
    #[error("cannot use the kernel {path} for updates: {cause}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: ImageError,
    },
}

/// Reads the kernel in `path`: a bzImage, or the ELF file that one unpacks to.
///
/// # Errors
/// When it cannot be read or unpacked, or lacks what updates need.
pub fn load(path: &Path) -> Result<Image, IndexError> {
    let file = map_copy(path)?;
    let vmlinux = if file.starts_with(b"\x7fELF") {
        file
    } else {
        unpack(path, &file)?
    };
    Image::parse(Arc::new(vmlinux)).map_err(|cause| IndexError::Image {
        path: path.to_owned(),
        cause,
    })
}

/// A private copy of the file, mapped.
fn map_copy(path: &Path) -> Result<Mmap, IndexError> {
    let unreadable = |cause| IndexError::File {
        path: path.to_owned(),
        cause,
    };
    let mut source = File::open(path).map_err(unreadable)?;
    let bytes = source.metadata().map_err(unreadable)?.len();
    let no_room = |cause| no_room(bytes, cause);
    let mut copy = tempfile::tempfile().map_err(no_room)?;
    io::copy(&mut source, &mut copy).map_err(unreadable)?;
    copy.seek(SeekFrom::Start(0)).map_err(no_room)?;
    // SAFETY: the file has no name and its descriptor is ours alone, so nothing changes or truncates it while mapped.
    unsafe { Mmap::map(&copy) }.map_err(no_room)
}

/// What the bzImage in `file` unpacks to, mapped.
fn unpack(path: &Path, file: &[u8]) -> Result<Mmap, IndexError> {
    let broken = |cause| IndexError::Payload {
        path: path.to_owned(),
        cause,
    };
    let payload = Payload::find(file).map_err(broken)?;
    let bytes = u64::try_from(payload.size()).unwrap_or(u64::MAX);
    let no_room = |cause| no_room(bytes, cause);
    let target = tempfile::tempfile().map_err(no_room)?;
    allocate(&target, bytes).map_err(no_room)?;
    // SAFETY: as above; and the mapping is not shared before it is made read-only.
    let mut mapping = unsafe { MmapMut::map_mut(&target) }.map_err(no_room)?;
    payload.decompress_into(&mut mapping).map_err(broken)?;
    mapping.make_read_only().map_err(no_room)
}

/// Makes the file `bytes` long, with room behind each. Without room, a later write to the mapping would be a fatal signal.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for as long as the call lasts, and no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn no_room(bytes: u64, cause: io::Error) -> IndexError {
    IndexError::Temporary {
        directory: std::env::temp_dir(),
        bytes,
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::load;

    /// Writes `bytes` to a file, loads it as a kernel, and compares the error's text.
    fn check(bytes: &[u8], error: &str) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinuz");
        std::fs::write(&path, bytes).unwrap();
        let text = load(&path).err().unwrap().to_string();
        assert!(text.contains(error), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        check(b"", "not a bzImage");
        check(b"#!/bin/sh\n", "not a bzImage");
        check(b"\x7fELF", "not a readable ELF file");
        let missing = load(std::path::Path::new("/nowhere/vmlinuz"))
            .err()
            .unwrap();
        assert!(
            missing
                .to_string()
                .contains("cannot read the kernel /nowhere/vmlinuz")
        );
    }
}
