//! Compiles an edition with the kernel's own build system: the only module that spawns a process.
//!
//! The compiler, its options and objtool are those of the kernel's headers (`Documentation/kbuild/modules.rst`), so the
//! object has the same calling convention, mitigations and unwind table as the kernel. It is built as the single object of a
//! module: only then does kbuild run objtool on it where IBT delays objtool to the link.
//! Nothing outside a temporary directory is touched, except the package, which appears whole or not at all.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::object::{Package, PackageError, build_id_text};

/// The header that editions include.
pub const HEADER: &str = include_str!("exopatch.h");
/// The header that the compiler includes before them: it makes static branches test their keys.
const KEYS: &str = include_str!("exopatch_keys.h");
/// The header that editions with hooks include too.
const HOOKS: &str = include_str!("exopatch_hooks.h");

/// Why no package was made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The source cannot be read.
    #[error("cannot read the edition's source {path}: {cause}")]
    Source {
        /// The source.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// There are no headers to compile against.
    #[error(
        "{path} holds no kernel headers that can be built against ({missing} is missing); \
         install linux-headers of exactly this kernel, or name their directory with --headers"
    )]
    Headers {
        /// Where they were looked for.
        path: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// The headers are those of another kernel.
    #[error(
        "the headers in {path} are of {found}, the kernel is {wanted}; install linux-headers-{wanted}, or name their directory with --headers"
    )]
    OtherHeaders {
        /// The headers.
        path: PathBuf,
        /// The release that they are of.
        found: String,
        /// The release of the kernel.
        wanted: String,
    },
    /// A program is missing.
    #[error(
        "`{tool}` is needed to compile an edition and is not installed; try: apt-get install {package}"
    )]
    Tool {
        /// The program.
        tool: String,
        /// The Debian package that has it.
        package: String,
    },
    /// The build failed; `output` is what make and the compiler said.
    #[error("{output}\n{source} could not be compiled as an edition; what the compiler said is above", source = path.display())]
    Compile {
        /// The source.
        path: PathBuf,
        /// Output of make, the compiler and objtool, as it was.
        output: String,
    },
    /// It compiled, but not to an object that can be applied.
    #[error("{source} compiles, but cannot be used as an edition: {cause}", source = path.display())]
    Unusable {
        /// The source.
        path: PathBuf,
        /// What stands in the way.
        cause: PackageError,
    },
    /// Files of the build or the package cannot be written.
    #[error("cannot write {path}: {cause}")]
    Write {
        /// What was to be written.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// make cannot work in the temporary directory.
    #[error(
        "kernels cannot be built in {path}, whose name holds a space or a character special to make; set TMPDIR to another directory"
    )]
    TemporaryDirectory {
        /// The directory.
        path: PathBuf,
    },
}

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct Build<'a> {
    /// The edition's C source.
    pub source: &'a Path,
    /// Headers of exactly the kernel that it is for.
    pub headers: &'a Path,
    /// Build-id of that kernel.
    pub build_id: &'a [u8],
    /// Release of that kernel (`uname -r`), if known: headers of another are then refused.
    pub release: Option<&'a str>,
    /// The package to write.
    pub out: &'a Path,
}

/// A package that was built.
#[derive(Clone, Debug)]
pub struct Built {
    /// What it holds.
    pub package: Package,
    /// Warnings of the compiler and of objtool, as they were; empty if there were none.
    pub warnings: String,
}

/// The directories where the headers of kernel `release` are installed, in order.
#[must_use]
pub fn header_directories(release: &str) -> Vec<PathBuf> {
    vec![
        PathBuf::from(format!("/lib/modules/{release}/build")),
        PathBuf::from(format!("/usr/src/linux-headers-{release}")),
    ]
}

/// Compiles an edition and writes its package.
///
/// # Errors
/// [`BuildError`]. The package is then as it was before, or absent.
pub fn build(what: &Build<'_>) -> Result<Built, BuildError> {
    let source = std::fs::read(what.source).map_err(|cause| BuildError::Source {
        path: what.source.into(),
        cause,
    })?;
    check_headers(what)?;
    let stem = stem(what.source);
    let work = tempfile::Builder::new()
        .prefix("exopatch-build-")
        .tempdir()
        .map_err(written(&std::env::temp_dir()))?;
    write_tree(what, &source, &stem, work.path())?;
    let warnings = make(what, &stem, work.path())?;
    let object = work.path().join(format!("{stem}.o"));
    let bytes = std::fs::read(&object).map_err(|cause| BuildError::Source {
        path: object.clone(),
        cause,
    })?;
    let package = Package::parse(&bytes).map_err(|cause| BuildError::Unusable {
        path: what.source.into(),
        cause,
    })?;
    write_whole(what.out, &bytes)?;
    Ok(Built { package, warnings })
}

fn written(path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |cause| BuildError::Write { path, cause }
}

/// The base name of the object: make must not find anything special in it.
fn stem(source: &Path) -> String {
    let stem = source
        .file_stem()
        .map(OsStr::to_string_lossy)
        .unwrap_or_default();
    let plain: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '_' {
                c
            } else {
                '_'
            }
        })
        .collect();
    // The prefix keeps it from being a target that kbuild knows, or the name of a file of ours.
    format!("edition_{plain}")
}

/// Refuses directories that are no headers, headers of another kernel, and a missing compiler, before make says it worse.
fn check_headers(what: &Build<'_>) -> Result<(), BuildError> {
    let path = || what.headers.to_owned();
    let missing = |missing| BuildError::Headers {
        path: path(),
        missing,
    };
    for file in [
        "Makefile",
        "include/config/auto.conf",
        "include/generated/utsrelease.h",
        "tools/objtool/objtool",
    ] {
        if !what.headers.join(file).exists() {
            return Err(missing(file));
        }
    }
    let utsrelease = std::fs::read_to_string(what.headers.join("include/generated/utsrelease.h"));
    let utsrelease = utsrelease.map_err(|_| missing("include/generated/utsrelease.h"))?;
    if let (Some(found), Some(wanted)) = (quoted(&utsrelease, "#define UTS_RELEASE "), what.release)
        && found != wanted
    {
        return Err(BuildError::OtherHeaders {
            path: path(),
            found: found.into(),
            wanted: wanted.into(),
        });
    }
    let config = std::fs::read_to_string(what.headers.join("include/config/auto.conf"));
    let config = config.map_err(|_| missing("include/config/auto.conf"))?;
    let compiler =
        quoted(&config, "CONFIG_CC_VERSION_TEXT=").and_then(|text| text.split(' ').next());
    for tool in ["make"].into_iter().chain(compiler) {
        if !in_path(tool) {
            let package = tool.trim_start_matches("x86_64-linux-gnu-").to_owned();
            return Err(BuildError::Tool {
                tool: tool.into(),
                package,
            });
        }
    }
    Ok(())
}

/// The quoted string that follows `prefix` on a line of its own.
fn quoted<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
    line.trim().strip_prefix('"')?.strip_suffix('"')
}

fn in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// Fills the temporary directory with what make needs.
fn write_tree(what: &Build<'_>, source: &[u8], stem: &str, work: &Path) -> Result<(), BuildError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,@".contains(c);
    let Some(dir) = work.to_str().filter(|dir| dir.chars().all(plain)) else {
        return Err(BuildError::TemporaryDirectory { path: work.into() });
    };
    let source_path = std::path::absolute(what.source).map_err(written(what.source))?;
    // Diagnostics then name the file that the user knows. In a C string only these two need an escape.
    let shown = source_path
        .to_string_lossy()
        .replace('\\', "\\\\")
        .replace('"', "\\\"");
    let mut text = format!("#line 1 \"{shown}\"\n").into_bytes();
    text.extend_from_slice(source);
    // Headers beside the source are found through a link, whose name has nothing special to make.
    let kbuild = format!(
        "obj-m := {stem}.o\nccflags-y := -g0 -I{dir} -iquote {dir}/beside -include {dir}/exopatch_keys.h\n"
    );
    let kernel = format!(
        "#define EXOPATCH_KERNEL \"{}\"\n",
        build_id_text(what.build_id)
    );
    let files: [(String, &[u8]); 6] = [
        (format!("{stem}.c"), &text),
        ("Kbuild".into(), kbuild.as_bytes()),
        ("exopatch.h".into(), HEADER.as_bytes()),
        ("exopatch_keys.h".into(), KEYS.as_bytes()),
        ("exopatch_hooks.h".into(), HOOKS.as_bytes()),
        ("exopatch_kernel.h".into(), kernel.as_bytes()),
    ];
    for (name, bytes) in files {
        let path = work.join(name);
        std::fs::write(&path, bytes).map_err(written(&path))?;
    }
    if let Some(beside) = source_path.parent() {
        let link = work.join("beside");
        std::os::unix::fs::symlink(beside, &link).map_err(written(&link))?;
    }
    Ok(())
}

/// Runs the kernel's build of one object; returns warnings.
fn make(what: &Build<'_>, stem: &str, work: &Path) -> Result<String, BuildError> {
    let headers = std::path::absolute(what.headers).map_err(written(what.headers))?;
    let mut command = Command::new("make");
    command
        .arg("--silent")
        .arg("-C")
        .arg(headers)
        .arg(format!("M={}", work.display()))
        .arg(format!("{stem}.o"));
    // An exopatch that is itself run by make must not lend its options to this one.
    for variable in [
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "MAKEFILES",
        "ARCH",
        "CROSS_COMPILE",
        "O",
        "M",
        "KBUILD_OUTPUT",
    ] {
        command.env_remove(variable);
    }
    let output = command.output().map_err(|_| BuildError::Tool {
        tool: "make".into(),
        package: "make".into(),
    })?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let text = text.trim_end().to_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(BuildError::Compile {
            path: what.source.into(),
            output: text,
        })
    }
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)
        .map_err(written(path))?;
    file.write_all(bytes).map_err(written(path))?;
    file.persist(path).map_err(|error| BuildError::Write {
        path: path.into(),
        cause: error.error,
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Build, BuildError, build, quoted, stem};

    /// Builds `source` against a directory that looks like headers but compiles nothing.
    fn check(dir: &Path, source: &Path, release: Option<&str>) -> BuildError {
        let out = dir.join("out.xpu");
        let error = build(&Build {
            source,
            headers: &dir.join("headers"),
            build_id: &[0xab; 20],
            release,
            out: &out,
        });
        assert!(!out.exists(), "nothing is left behind");
        error.unwrap_err()
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("an edition.c");
        assert!(matches!(
            check(dir.path(), &source, None),
            BuildError::Source { .. }
        ));
        write(&source, "not C");
        assert!(matches!(
            check(dir.path(), &source, None),
            BuildError::Headers {
                missing: "Makefile",
                ..
            }
        ));

        let headers = dir.path().join("headers");
        write(
            &headers.join("Makefile"),
            "%.o: ; @echo 'a compiler would complain' >&2; exit 1\n",
        );
        write(
            &headers.join("include/config/auto.conf"),
            "CONFIG_CC_VERSION_TEXT=\"x86_64-linux-gnu-gcc-4711 (x) 1\"\n",
        );
        write(
            &headers.join("include/generated/utsrelease.h"),
            "#define UTS_RELEASE \"6.1.0-x\"\n",
        );
        write(&headers.join("tools/objtool/objtool"), "");
        let error = check(dir.path(), &source, None).to_string();
        assert!(error.contains("apt-get install gcc-4711"), "{error}");
        let error = check(dir.path(), &source, Some("6.1.0-y")).to_string();
        assert!(
            error.contains("are of 6.1.0-x, the kernel is 6.1.0-y"),
            "{error}"
        );

        write(
            &headers.join("include/config/auto.conf"),
            "CONFIG_CC_VERSION_TEXT=\"make 1\"\n",
        );
        let error = check(dir.path(), &source, Some("6.1.0-x")).to_string();
        assert!(
            error.starts_with("a compiler would complain")
                && error.contains("an edition.c could not be compiled"),
            "{error}"
        );

        write(
            &headers.join("Makefile"),
            "%.o: ; @echo 'no object' >$(M)/$@\n",
        );
        assert!(matches!(
            check(dir.path(), &source, None),
            BuildError::Unusable { .. }
        ));
    }

    #[test]
    fn names_are_plain_to_make() {
        assert_eq!(stem(Path::new("/a b/un-ix $(x).c")), "edition_un_ix___x_");
        assert_eq!(quoted("X=\"a b\"\nY=\"c\"", "Y="), Some("c"));
        assert_eq!(quoted("X=1", "X="), None);
    }
}
