//! `exopatch build`: from an edition's C source to an update package.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget};
use patcher::edition::build::{Build, BuildError, Built, build, header_directories};
use patcher::guest::ReadPhys;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use serde::Serialize;

use super::Global;
use crate::api::wire::ErrorBody;
use crate::failure::{FAILED, Failure, finish};
use crate::kernel_index::{self, IndexError};
use crate::output;

/// Longest banner that is looked at for the release, in bytes.
const BANNER: u64 = 256;

/// What to build
#[derive(Args, Clone, Debug)]
pub struct BuildArgs {
    /// The edition's source; it includes <exopatch.h> and declares what it replaces
    #[arg(value_name = "FILE.c")]
    source: PathBuf,
    /// The kernel that the update is for: the bzImage (vmlinuz) that the guest boots
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Headers of exactly that kernel [default: where its linux-headers package puts them]
    #[arg(long, value_name = "DIR")]
    headers: Option<PathBuf>,
    /// The package to write [default: the source's name with .xpu]
    #[arg(short, long, value_name = "FILE.xpu")]
    output: Option<PathBuf>,
}

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
enum BuildFailure {
    #[error(transparent)]
    Kernel(#[from] IndexError),
    #[error(
        "{path} does not say which release it is, so its headers cannot be found; name their directory with --headers"
    )]
    NoRelease { path: PathBuf },
    #[error(
        "the headers of kernel {release} are not installed (looked in {}); install linux-headers-{release}, \
         or name their directory with --headers",
        list(.looked)
    )]
    NoHeaders {
        release: String,
        looked: Vec<PathBuf>,
    },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("cannot print the result: {0}")]
    Output(#[from] std::io::Error),
}

impl Failure for BuildFailure {
    fn body(&self) -> ErrorBody {
        let (code, hint) = match self {
            Self::Kernel(_) => (
                "kernel_unusable",
                "give the vmlinuz of the kernel's package",
            ),
            Self::NoRelease { .. } => ("no_release", "name the headers' directory with --headers"),
            Self::NoHeaders { .. } => (
                "no_headers",
                "install them, or name their directory with --headers",
            ),
            Self::Build(_) => (
                "not_built",
                "correct the source, or install what is missing",
            ),
            Self::Output(_) => ("cannot_print", "see where standard output leads"),
        };
        ErrorBody {
            code: code.to_owned(),
            message: "no package was built".to_owned(),
            cause: self.to_string(),
            hint: hint.to_owned(),
        }
    }

    fn exit_code(&self) -> u8 {
        FAILED
    }
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

/// What was built, as it is printed.
#[derive(Debug, Serialize)]
struct Summary {
    package: String,
    build_id: String,
    functions: Vec<String>,
    warnings: String,
}

/// Builds, and says what came of it.
pub(super) fn main(args: &BuildArgs, global: &Global) -> ExitCode {
    let json = global.json;
    let out = match &args.output {
        Some(out) => out.clone(),
        None => args.source.with_extension("xpu"),
    };
    let progress = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    progress.set_message(format!("building {}", out.display()));
    progress.enable_steady_tick(std::time::Duration::from_millis(100));
    let built = make(args, &out);
    progress.finish_and_clear();
    let printed = built.and_then(|built| Ok(print(&summary(&built, &out), json)?));
    finish(printed, json)
}

fn make(args: &BuildArgs, out: &Path) -> Result<Built, BuildFailure> {
    let image = kernel_index::load(&args.kernel)?;
    let release = release(&image);
    let headers = match (&args.headers, &release) {
        (Some(headers), _) => headers.clone(),
        (None, Some(release)) => {
            let looked = header_directories(release);
            let found = looked.iter().find(|directory| directory.is_dir()).cloned();
            found.ok_or_else(|| BuildFailure::NoHeaders {
                release: release.clone(),
                looked,
            })?
        }
        (None, None) => {
            return Err(BuildFailure::NoRelease {
                path: args.kernel.clone(),
            });
        }
    };
    Ok(build(&Build {
        source: &args.source,
        headers: &headers,
        build_id: image.build_id(),
        release: release.as_deref(),
        out,
    })?)
}

/// The kernel's release (`uname -r`), from its banner: `Linux version RELEASE (...`.
pub(super) fn release(image: &Image) -> Option<String> {
    let at = image.symbols().lookup("linux_banner").ok()?.address;
    let banner = image.bytes(at.range(BANNER)?)?;
    release_in(banner)
}

/// The same, from the banner in the memory of a guest that runs `kernel`.
pub(super) fn release_in_memory<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
) -> Option<String> {
    let at = kernel.symbol("linux_banner").ok()?;
    let mut banner = vec![0; usize::try_from(BANNER).ok()?];
    kernel.read(guest, at, &mut banner).ok()?;
    release_in(&banner)
}

fn release_in(banner: &[u8]) -> Option<String> {
    let rest = banner.strip_prefix(b"Linux version ")?;
    let release = rest.split(|byte| *byte == b' ').next()?;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._+-~".contains(byte);
    (!release.is_empty() && release.iter().all(plain))
        .then(|| String::from_utf8_lossy(release).into_owned())
}

fn summary(built: &Built, out: &Path) -> Summary {
    let package = &built.package;
    let editions = package.editions().iter();
    let build_id = package.build_id().iter();
    Summary {
        package: out.display().to_string(),
        build_id: build_id.map(|byte| format!("{byte:02x}")).collect(),
        functions: editions.map(|edition| edition.function.clone()).collect(),
        warnings: built.warnings.clone(),
    }
}

fn print(summary: &Summary, json: bool) -> std::io::Result<()> {
    if json {
        return output::line(serde_json::to_string(summary)?);
    }
    if !summary.warnings.is_empty() {
        output::note(format_args!(
            "warnings of the build:\n{}",
            summary.warnings.trim_end()
        ));
    }
    output::line(format_args!(
        "{}: replaces {} in the kernel with build id {}",
        summary.package,
        summary.functions.join(", "),
        summary.build_id
    ))
}

#[cfg(test)]
mod tests {
    use super::release_in;

    #[test]
    fn the_release_is_read_from_the_banner() {
        let check = |banner: &[u8], release: Option<&str>| {
            assert_eq!(release_in(banner).as_deref(), release);
        };
        check(
            b"Linux version 6.1.0-47-cloud-amd64 (debian",
            Some("6.1.0-47-cloud-amd64"),
        );
        check(
            b"Linux version 6.12.117+deb12-cloud-amd64 (",
            Some("6.12.117+deb12-cloud-amd64"),
        );
        check(b"Linux version ../../etc (x", None);
        check(b"Linux version  (x", None);
        check(b"FreeBSD 14", None);
    }
}
