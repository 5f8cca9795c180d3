//! A guest's initrd: that of its stock kernel, and behind it files of the host. The kernel unpacks concatenated archives in turn
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{self, Builder};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
/// Archives begin at multiples of this.
const ALIGNMENT: u64 = 4;

/// Writes to `path` the archive `stock` followed by one that holds `files` in `/files`.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(path: &Path, stock: &Path, files: &[PathBuf]) -> io::Result<()> {
    let mut initrd = File::create(path)?;
    let length = io::copy(&mut File::open(stock)?, &mut initrd)?;
    let padding = length.next_multiple_of(ALIGNMENT) - length;
    initrd.write_all(&[0; 3][..usize::try_from(padding).map_err(io::Error::other)?])?;
    let mut initrd = Builder::new("files")
        .ino(1)
        .mode(DIRECTORY)
        .nlink(2)
        .write(initrd, 0)
        .finish()?;
    for (path, ino) in files.iter().zip(2..) {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or(io::ErrorKind::InvalidFilename)?;
        let mut file = File::open(path)?;
        let length = u32::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut entry = Builder::new(&format!("files/{name}"))
            .ino(ino)
            .mode(FILE)
            .nlink(1)
            .write(initrd, length);
        io::copy(&mut file, &mut entry)?;
        initrd = entry.finish()?;
    }
    newc::trailer(initrd).map(drop)
}
