//! A recorded guest and the image of its kernel, opened together: what can be asked needs both.
//!
//! The dump is mapped, not read: it is as large as the guest was, and little of it is looked at.
#![expect(unsafe_code, reason = "maps the dump into memory")]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use patcher::guest::Registers;
use patcher::guest::dump::Dump;
use patcher::kernel::locate::Kernel;

use super::failure::{Failure, unreadable};
use crate::kernel_index;
use crate::views::Subject;

/// Where they are.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Files {
    /// Look at this recorded guest, not at a running one: an ELF core by exopatch vm dump or QEMU's dump-guest-memory
    #[arg(long, global = true, value_name = "CORE")]
    pub(super) dump: Option<PathBuf>,
    /// The kernel that the recorded guest ran: its bzImage (vmlinuz), or the ELF file in it
    #[arg(long, global = true, value_name = "IMAGE")]
    pub(super) kernel: Option<PathBuf>,
}

/// A recorded guest whose kernel is known.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) dump: Dump,
    pub(super) kernel: Kernel,
}

impl Recording {
    /// What views are taken of.
    pub(super) fn subject(&self) -> Subject<'_> {
        Subject {
            kernel: &self.kernel,
            guest: &self.dump,
            vcpus: self.dump.vcpus(),
            updates: &[],
        }
    }
}

impl Files {
    /// Whether a recorded guest is meant.
    pub(super) fn any(&self) -> bool {
        self.dump.is_some() || self.kernel.is_some()
    }

    /// Opens both, and proves that they belong together.
    pub(super) fn open(&self) -> Result<Recording, Failure> {
        let missing = |missing| Failure::NotGiven { missing };
        let path = self.dump.as_deref().ok_or(missing("--dump CORE"))?;
        let image_path = self.kernel.as_deref().ok_or(missing("--kernel IMAGE"))?;
        let dump = open_dump(path)?;
        let image = Arc::new(kernel_index::load(image_path)?);
        let kernel =
            Kernel::locate(image, &dump, dump.vcpus()).map_err(|cause| Failure::Locate {
                dump: path.to_owned(),
                kernel: image_path.to_owned(),
                cause,
            })?;
        Ok(Recording { dump, kernel })
    }
}

fn open_dump(path: &Path) -> Result<Dump, Failure> {
    // Asked first: to open a pipe is to wait for its writer.
    if !std::fs::metadata(path).map_err(unreadable(path))?.is_file() {
        let cause = io::Error::other("it is no regular file");
        return Err(unreadable(path)(cause));
    }
    let file = File::open(path).map_err(unreadable(path))?;
    // SAFETY: nothing but this mapping's owner reads it, and only by copies out of it: a guest's memory that changes
    // meanwhile is as untrusted as one that was recorded so. Cutting the file short ends this command with a signal.
    let bytes = unsafe { Mmap::map(&file) }.map_err(unreadable(path))?;
    Dump::parse(Arc::new(bytes)).map_err(|cause| Failure::Dump {
        path: path.to_owned(),
        cause,
    })
}
