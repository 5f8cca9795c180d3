//! The stock kernels that `guest-images/build` has made ready, and the editions that were built for them.

use std::env;
use std::path::{Path, PathBuf};

/// One of Debian's kernels as shipped, by its name in `guest-images/manifest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stock(pub &'static str);

/// The 6.1 cloud kernel that lacks the fixes the demo brings.
pub const LTS_6_1: Stock = Stock("6.1");
/// The newest 6.1 cloud kernel.
pub const NEWEST_6_1: Stock = Stock("6.1-new");
/// The newest 6.12 cloud kernel.
pub const NEWEST_6_12: Stock = Stock("6.12");
/// The cloud kernels.
pub const ALL: [Stock; 3] = [LTS_6_1, NEWEST_6_1, NEWEST_6_12];
/// The newest generic kernels: with all of Debian's drivers and options.
pub const GENERIC_6_1: Stock = Stock("6.1-generic");
/// See [`GENERIC_6_1`].
pub const GENERIC_6_12: Stock = Stock("6.12-generic");
/// The newest kernels that are preemptible throughout (`CONFIG_PREEMPT_RT`).
pub const RT_6_1: Stock = Stock("6.1-rt");
/// See [`RT_6_1`].
pub const RT_6_12: Stock = Stock("6.12-rt");
/// All of these: other configurations than the cloud kernels'.
pub const FLAVOURS: [Stock; 4] = [GENERIC_6_1, RT_6_1, GENERIC_6_12, RT_6_12];

/// The kernel of this name.
///
/// # Errors
/// When there is none.
pub fn named(name: &str) -> Result<Stock, String> {
    let mut all = ALL.into_iter().chain(FLAVOURS);
    all.find(|stock| stock.0 == name)
        .ok_or_else(|| format!("no kernel is called {name}"))
}

impl Stock {
    /// A file of this kernel: `vmlinuz`, `vmlinux`, `initramfs.cpio.gz`, `config`.
    ///
    /// # Panics
    /// When `guest-images/build` has not made it.
    #[must_use]
    pub fn file(self, name: &str) -> PathBuf {
        let path = cache().join("kernels").join(self.0).join(name);
        assert!(
            path.exists(),
            "{} is missing: run guest-images/build {}",
            path.display(),
            self.0
        );
        path
    }

    /// An edition that `scripts/test` has built for this kernel from `tests/editions/NAME.c`.
    ///
    /// # Panics
    /// When it has not been built.
    #[must_use]
    pub fn edition(self, name: &str) -> PathBuf {
        let path = editions().join(self.0).join(format!("{name}.xpu"));
        assert!(
            path.exists(),
            "{} is missing: run scripts/test editions",
            path.display()
        );
        path
    }

    /// A module for guests of this kernel that `scripts/peers` has built from `tests/peers/NAME.c`.
    ///
    /// # Panics
    /// When it has not been built.
    #[must_use]
    pub fn peer(self, name: &str) -> PathBuf {
        let path = target()
            .join("peers")
            .join(self.0)
            .join(format!("{name}.ko"));
        assert!(
            path.exists(),
            "{} is missing: run scripts/peers {}",
            path.display(),
            self.0
        );
        path
    }
}

/// Where the scripts keep what they fetch and make.
///
/// # Panics
/// When there is no home directory.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(dir) = env::var_os("EXOPATCH_CACHE") {
        return dir.into();
    }
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))
        .expect("HOME is set")
        .join("exopatch")
}

fn editions() -> PathBuf {
    env::var_os("EXOPATCH_EDITIONS").map_or_else(|| target().join("editions"), PathBuf::from)
}

/// The directory that cargo builds into.
#[must_use]
pub fn target() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests lie in the repository")
        .join("target");
    env::var_os("CARGO_TARGET_DIR").map_or(default, PathBuf::from)
}

/// Kernels of other series that `guest-images/layouts` fetches, to be looked into alone: the name of each, and its bzImage unless the
/// archive no longer has it.
///
/// # Panics
/// When there is no manifest, or none of them has been fetched.
#[must_use]
pub fn layouts() -> Vec<(String, Option<PathBuf>)> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let manifest = repository
        .expect("the tests lie in the repository")
        .join("guest-images/manifest");
    let manifest = std::fs::read_to_string(&manifest).expect("the manifest can be read");
    let name = |line: &str| Some(line.strip_prefix("layout ")?.split(' ').next()?.to_owned());
    let found = manifest.lines().filter_map(name).map(|name| {
        let path = cache().join("layouts").join(&name).join("vmlinuz");
        (name, path.exists().then_some(path))
    });
    let found: Vec<_> = found.collect();
    let any = found.iter().any(|(_, path)| path.is_some());
    assert!(any, "no kernel is there: run guest-images/layouts");
    found
}

/// The command under test.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn exopatch() -> PathBuf {
    env::var_os("EXOPATCH_BIN").map_or_else(|| program("exopatch"), PathBuf::from)
}

/// A program of this repository.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let path = target().join("release").join(name);
    assert!(
        path.exists(),
        "{} is missing: run cargo build --release",
        path.display()
    );
    path
}
