//! Recorded guests: booted in the lab with a load, and looked at natively.
//!
//! `exopatch-record KERNEL LOAD MEMORY_MIB CORE...` makes them; it runs in the lab.

use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use patcher::guest::Registers as _;
use patcher::guest::dump::Dump;
use patcher::kernel::locate::Kernel;
use vmm::kernel_index;

use crate::lab;
use crate::stock::{self, Stock};

/// Seconds that a boot and its recordings may take in the lab. A large guest's are slow to write.
const LIMIT_S: u32 = 600;
/// Threads that sleep beside those of a busy guest.
const SLEEPERS: u32 = 200;
/// How recordings are written: they are made anew when that changes.
const FORMAT: &str = include_str!("../../patcher/src/guest/core.rs");

/// What a guest does when it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// This many threads sleep.
    Sleepers(u32),
    /// Some threads sleep, and others go through the kernel in many ways.
    Busy,
}

impl Load {
    /// What starts it, as words of the guest's command line.
    #[must_use]
    pub fn words(self) -> String {
        match self {
            Self::Sleepers(count) => format!("exopatch.run=probe,sleepers,{count}"),
            Self::Busy => format!("exopatch.run=probe,churn,6,&,probe,sleepers,{SLEEPERS}"),
        }
    }

    /// The line that the guest prints when all of it is there.
    #[must_use]
    pub fn begun(self) -> String {
        let count = match self {
            Self::Sleepers(count) => count,
            Self::Busy => SLEEPERS,
        };
        format!("sleepers: {count}")
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sleepers(count) => write!(f, "sleepers-{count}"),
            Self::Busy => f.write_str("busy"),
        }
    }
}

impl FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.strip_prefix("sleepers-");
        match count.map(str::parse) {
            Some(Ok(count)) => Ok(Self::Sleepers(count)),
            None if text == "busy" => Ok(Self::Busy),
            _ => Err(format!("'{text}' is no load")),
        }
    }
}

/// A guest to record.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// Its kernel.
    pub stock: Stock,
    /// What it does.
    pub load: Load,
    /// Its memory.
    pub memory_mib: u64,
}

impl Recorded {
    /// Boots the guest in the lab and records it into each of `cores`, one after another.
    ///
    /// # Errors
    /// When that failed each time it was tried.
    pub fn record(&self, cores: &[PathBuf]) -> Result<(), String> {
        let (load, memory) = (self.load.to_string(), self.memory_mib.to_string());
        let mut args = vec![self.stock.0, &load, &memory];
        for core in cores {
            args.push(core.to_str().ok_or("a path is not UTF-8")?);
        }
        lab::run(&stock::program("exopatch-record"), &args, LIMIT_S).map(drop)
    }

    /// The recording that is kept of this guest, made now if there is none yet of the same kernel, programs, load and format.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn kept(&self) -> Result<PathBuf, String> {
        let mut made_of = DefaultHasher::new();
        for file in ["package", "initramfs.stamp"] {
            let path = self.stock.file(file);
            let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            text.hash(&mut made_of);
        }
        (self.load.words(), self.memory_mib, FORMAT).hash(&mut made_of);
        let dir = stock::cache().join("recorded");
        let (name, load) = (self.stock.0, self.load);
        let core = dir.join(format!("{name}-{load}-{:016x}.core", made_of.finish()));
        if !core.exists() {
            fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
            let new = core.with_extension("new");
            self.record(std::slice::from_ref(&new))?;
            fs::rename(&new, &core).map_err(|error| format!("{}: {error}", core.display()))?;
        }
        Ok(core)
    }
}

/// A recording and its kernel, opened.
#[derive(Debug)]
pub struct Opened {
    /// The guest.
    pub dump: Dump,
    /// What it runs.
    pub kernel: Kernel,
}

/// Opens the recording in `core` of a guest that ran `stock`.
///
/// # Errors
/// When it cannot be read, or is of another kernel.
pub fn open(stock: Stock, core: &Path) -> Result<Opened, String> {
    let failed = |error: &dyn fmt::Display| format!("{}: {error}", core.display());
    let bytes = fs::read(core).map_err(|error| failed(&error))?;
    let dump = Dump::parse(Arc::new(bytes)).map_err(|error| failed(&error))?;
    let image = kernel_index::load(&stock.file("vmlinuz")).map_err(|error| failed(&error))?;
    let kernel =
        Kernel::locate(Arc::new(image), &dump, dump.vcpus()).map_err(|error| failed(&error))?;
    Ok(Opened { dump, kernel })
}
