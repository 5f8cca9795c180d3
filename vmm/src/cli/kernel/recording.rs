//! A recorded guest and the image of its kernel, opened together. Where no file of the kernel is given, what the guest's memory holds of it
//! has to do.
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
use patcher::kernel::agree::{Agreed, agree};
use patcher::kernel::image::Image;
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
    /// The kernel that the recorded guest ran: its bzImage (vmlinuz), or the ELF file in it; without one it is recovered from memory
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

    /// Opens what is given: of both it is proved that they belong together.
    pub(super) fn open(&self) -> Result<Recording, Failure> {
        let missing = "--dump CORE";
        let path = self.dump.as_deref().ok_or(Failure::NotGiven { missing })?;
        let dump = open_dump(path)?;
        let image = match &self.kernel {
            Some(image) => kernel_index::load(image)?,
            None => recover(path, &dump)?,
        };
        let kernel = Kernel::locate(Arc::new(image), &dump, dump.vcpus()).map_err(|cause| {
            Failure::Locate {
                dump: path.to_owned(),
                kernel: self.kernel.clone(),
                cause,
            }
        })?;
        Ok(Recording { dump, kernel })
    }

    /// Proves that the kernel's file and the recorded guest's memory say the same of the kernel.
    pub(super) fn verify(&self, recording: &Recording) -> Result<Agreed, Failure> {
        let (Some(path), Some(kernel)) = (&self.dump, &self.kernel) else {
            let missing = "--kernel IMAGE";
            return Err(Failure::NotGiven { missing });
        };
        let memory = recover(path, &recording.dump)?;
        agree(recording.kernel.image(), &memory).map_err(|cause| Failure::Disagree {
            dump: path.clone(),
            kernel: kernel.clone(),
            cause,
        })
    }
}

fn recover(path: &Path, dump: &Dump) -> Result<Image, Failure> {
    Image::from_memory(dump, dump.vcpus()).map_err(|cause| Failure::Recover {
        dump: path.to_owned(),
        cause,
    })
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
