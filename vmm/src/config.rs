//! What the user wants to run: options from flags and from one TOML file with the same names, validated as a whole.
//!
//! A [`Config`] has been checked against files and machine: what is left to fail when it starts is the machine itself.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde::Deserialize;

use crate::boot::image::{self, KernelFacts};
use crate::layout::{CMDLINE_ROOM, LARGE_PAGE, Layout, MIB};

/// The command line of a guest whose user gave none: its console is where exopatch shows it.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Memory of a guest whose user said nothing, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 * MIB;
/// Room that a kernel needs beside its image and initrd before it can say anything.
const MEMORY_SLACK: u64 = 16 * MIB;

/// Options as given: each may be missing.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// The kernel: a bzImage as shipped (vmlinuz), or an ELF vmlinux with a PVH entry
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, exactly [default: console=ttyS0]
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Memory: MiB, or with a unit such as 512M or 5G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<MemorySize>,
    /// Where the serial console goes: stdio, file:PATH, pty or off [default: stdio]
    #[arg(long, value_name = "WHERE")]
    pub console: Option<Console>,
    /// Serve the API on this unix socket
    #[arg(skip)]
    pub api_sock: Option<PathBuf>,
}

/// An amount of memory, in bytes, as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match &text[digits.len()..] {
            "" | "M" | "MiB" => MIB,
            "G" | "GiB" => 1024 * MIB,
            "T" | "TiB" => 1024 * 1024 * MIB,
            other => {
                return Err(format!(
                    "\"{other}\" is not a unit; write MiB as 512 or 512M, GiB as 5G"
                ));
            }
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(unit))
            .map(Self)
            .ok_or_else(|| format!("\"{text}\" is not an amount of memory; write 512, 512M or 5G"))
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Mib(u64),
            Text(String),
        }
        let text = match Form::deserialize(deserializer)? {
            Form::Mib(count) => count.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where the guest's serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// To this process's standard input and output.
    Stdio,
    /// Output to a file; no input.
    File(PathBuf),
    /// To a new pseudo-terminal, whose name is told.
    Pty,
    /// Nowhere.
    Off,
}

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("pty", _) => Ok(Self::Pty),
            ("off", _) => Ok(Self::Off),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!(
                "\"{text}\" is not a console; write stdio, file:PATH, pty or off"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Console {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Options with their place of origin, so that errors can name it.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    options: Options,
    file: Option<PathBuf>,
    from_flags: BTreeSet<&'static str>,
}

impl Wanted {
    /// Joins flags with a file; a flag wins over the same name in the file. Relative paths in the file start at its directory.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn new(flags: Options, file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut wanted = Self {
            options: Options::default(),
            file: file.map(Path::to_owned),
            from_flags: BTreeSet::new(),
        };
        if let Some(path) = file {
            wanted.options = read_file(path)?;
        }
        let Options {
            kernel,
            initrd,
            cmdline,
            cpus,
            memory,
            console,
            api_sock,
        } = flags;
        let from_flags = &mut wanted.from_flags;
        let options = &mut wanted.options;
        overlay(from_flags, "kernel", &mut options.kernel, kernel);
        overlay(from_flags, "initrd", &mut options.initrd, initrd);
        overlay(from_flags, "cmdline", &mut options.cmdline, cmdline);
        overlay(from_flags, "cpus", &mut options.cpus, cpus);
        overlay(from_flags, "memory", &mut options.memory, memory);
        overlay(from_flags, "console", &mut options.console, console);
        overlay(from_flags, "api-sock", &mut options.api_sock, api_sock);
        Ok(wanted)
    }

    /// Where option `name` was, or would be, given.
    fn place(&self, name: &'static str) -> String {
        match &self.file {
            Some(file) if !self.from_flags.contains(name) => {
                format!("{name} in {}", file.display())
            }
            _ => format!("--{name}"),
        }
    }

    /// Checks everything that can be checked before anything starts.
    ///
    /// # Errors
    /// All problems at once, each with its place and its way out.
    pub fn validate(self, limits: Limits) -> Result<Config, ConfigError> {
        let mut problems = Vec::new();
        let mut report = |name, what: String| {
            problems.push(Problem {
                place: self.place(name),
                what,
            });
        };
        let kernel = match &self.options.kernel {
            Some(path) => open_kernel(path)
                .map_err(|what| report("kernel", what))
                .ok(),
            None => {
                report(
                    "kernel",
                    "is missing; give it the vmlinuz of a kernel package".to_owned(),
                );
                None
            }
        };
        let initrd_len = match &self.options.initrd {
            Some(path) => open_regular(path)
                .map(|(_, len)| len)
                .map_err(|what| report("initrd", what))
                .ok(),
            None => Some(0),
        };
        let cpus = self.options.cpus.unwrap_or(1);
        if let Some(what) = cpus_problem(cpus, limits) {
            report("cpus", what);
        }
        let memory = self.options.memory.map_or(DEFAULT_MEMORY, |size| size.0);
        if let Some(what) = memory_problem(memory, limits, kernel, initrd_len) {
            report("memory", what);
        }
        let cmdline = self
            .options
            .cmdline
            .clone()
            .unwrap_or_else(|| DEFAULT_CMDLINE.to_owned());
        if let Some(what) = cmdline_problem(&cmdline, kernel) {
            report("cmdline", what);
        }
        let console = self.options.console.clone().unwrap_or(Console::Stdio);
        if let Console::File(path) = &console
            && let Some(what) = parent_problem(path)
        {
            report("console", what);
        }
        if let Some(what) = self.options.api_sock.as_deref().and_then(parent_problem) {
            report("api-sock", what);
        }
        match (self.options.kernel, kernel) {
            (Some(path), Some(facts)) if problems.is_empty() => Ok(Config {
                kernel: path,
                kernel_facts: facts,
                initrd: self.options.initrd,
                cmdline,
                cpus,
                memory,
                console,
                api_sock: self.options.api_sock,
            }),
            _ => Err(ConfigError::Problems(Problems(problems))),
        }
    }
}

fn overlay<T>(
    from_flags: &mut BTreeSet<&'static str>,
    name: &'static str,
    into: &mut Option<T>,
    flag: Option<T>,
) {
    if flag.is_some() {
        *into = flag;
        from_flags.insert(name);
    }
}

fn read_file(path: &Path) -> Result<Options, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|cause| ConfigError::Unreadable {
        path: path.to_owned(),
        cause,
    })?;
    let mut options: Options = toml::from_str(&text).map_err(|cause| ConfigError::Syntax {
        path: path.to_owned(),
        cause: Box::new(cause),
    })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    for it in [
        &mut options.kernel,
        &mut options.initrd,
        &mut options.api_sock,
    ]
    .into_iter()
    .flatten()
    {
        *it = directory.join(&*it);
    }
    if let Some(Console::File(it)) = &mut options.console {
        *it = directory.join(&*it);
    }
    Ok(options)
}

fn open_regular(path: &Path) -> Result<(File, u64), String> {
    let file = File::open(path)
        .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
    let metadata = file
        .metadata()
        .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    if !metadata.is_file() {
        return Err(format!("{} is not a regular file", path.display()));
    }
    Ok((file, metadata.len()))
}

fn open_kernel(path: &Path) -> Result<KernelFacts, String> {
    let (file, _) = open_regular(path)?;
    image::probe(&file).map_err(|error| match &error {
        image::ImageError::Read(cause) => format!("{} {error}: {cause}", path.display()),
        _ => format!("{} {error}", path.display()),
    })
}

fn cpus_problem(cpus: u32, limits: Limits) -> Option<String> {
    if cpus == 0 {
        return Some("must be at least 1".to_owned());
    }
    (cpus > limits.max_vcpus).then(|| {
        format!(
            "{cpus} is more than the {} virtual CPUs that KVM carries on this machine",
            limits.max_vcpus
        )
    })
}

fn memory_problem(
    memory: u64,
    limits: Limits,
    kernel: Option<KernelFacts>,
    initrd: Option<u64>,
) -> Option<String> {
    if !memory.is_multiple_of(LARGE_PAGE) || memory == 0 {
        return Some("must be a multiple of 2 MiB above zero".to_owned());
    }
    if let (Some(kernel), Some(initrd)) = (kernel, initrd) {
        let needed = kernel
            .end
            .saturating_add(initrd)
            .saturating_add(MEMORY_SLACK);
        if memory < needed {
            return Some(format!(
                "{} MiB is too little: this kernel and its initrd need at least {} MiB to start",
                memory / MIB,
                needed.div_ceil(LARGE_PAGE) * 2
            ));
        }
    }
    if Layout::new(memory, limits.phys_bits).is_none() {
        return Some(format!(
            "{} MiB does not fit the {} bits of physical address that guests have on this machine",
            memory / MIB,
            limits.phys_bits
        ));
    }
    None
}

fn cmdline_problem(cmdline: &str, kernel: Option<KernelFacts>) -> Option<String> {
    if cmdline.contains('\0') {
        return Some("contains a zero byte".to_owned());
    }
    let max = kernel?.cmdline_max.min(CMDLINE_ROOM - 1);
    let len = cmdline.len();
    (len as u64 > max).then(|| format!("is {len} bytes long; this kernel takes at most {max}"))
}

/// Whether a file could be made at `path`, as far as its directory goes.
fn parent_problem(path: &Path) -> Option<String> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Some(format!("{} is a directory", path.display())),
    };
    let why = match parent.metadata() {
        Ok(metadata) if metadata.is_dir() => return None,
        Ok(_) => "not a directory".to_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!(
        "{} cannot be made in {}: {why}",
        path.display(),
        parent.display()
    ))
}

/// What the machine below can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest number of virtual CPUs.
    pub max_vcpus: u32,
    /// Bits of a guest-physical address (CPUID 0x8000_0008).
    pub phys_bits: u8,
}

impl Limits {
    /// No limits: for a look at the options where there is no machine.
    pub const NONE: Self = Self {
        max_vcpus: u32::MAX,
        phys_bits: 64,
    };
}

/// A configuration that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The kernel file.
    pub kernel: PathBuf,
    /// What it was found to be.
    pub kernel_facts: KernelFacts,
    /// The initial RAM disk, if any.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Number of virtual CPUs, at least 1.
    pub cpus: u32,
    /// Guest RAM in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// Where the console goes.
    pub console: Console,
    /// Where the API is served, if at all.
    pub api_sock: Option<PathBuf>,
}

/// One thing wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The option, and where it was given.
    pub place: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// Everything wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n       ")?;
            }
            write!(f, "{}: {}", problem.place, problem.what)?;
        }
        Ok(())
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file could not be read.
    #[error("--config: {} cannot be read: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The configuration file is not TOML, or has unknown names or wrong types.
    #[error("--config: {}: {cause}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        cause: Box<toml::de::Error>,
    },
    /// It was understood, and cannot work.
    #[error("{0}")]
    Problems(Problems),
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::{Config, ConfigError, Console, Limits, MemorySize, Options, Wanted};
    use crate::boot::image::KernelKind;
    use crate::layout::MIB;

    const LIMITS: Limits = Limits {
        max_vcpus: 8,
        phys_bits: 40,
    };

    /// An ELF kernel with one segment of 2 MiB at 16 MiB and nothing in it.
    fn kernel_bytes() -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes[64 + 24..64 + 32].copy_from_slice(&(16 * MIB).to_le_bytes());
        bytes[64 + 40..64 + 48].copy_from_slice(&(2 * MIB).to_le_bytes());
        bytes
    }

    fn check(toml: &str, flags: Options) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("kernel"), kernel_bytes()).expect("a kernel");
        let file = dir.path().join("vm.toml");
        fs::write(&file, toml).expect("a file");
        Wanted::new(flags, Some(&file))?.validate(LIMITS)
    }

    fn refused(toml: &str, flags: Options) -> String {
        check(toml, flags).expect_err("refused").to_string()
    }

    #[test]
    fn a_file_alone_makes_a_machine_with_defaults_for_the_rest() {
        let config = check("kernel = \"kernel\"\ncpus = 2", Options::default()).expect("good");
        assert_eq!(config.kernel_facts.kind, KernelKind::Elf);
        assert_eq!((config.cpus, config.memory), (2, 512 * MIB));
        assert_eq!(config.cmdline, "console=ttyS0");
        assert_eq!(config.console, Console::Stdio);
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Options {
            cpus: Some(3),
            memory: Some(MemorySize(64 * MIB)),
            ..Options::default()
        };
        let toml = "kernel = \"kernel\"\ncpus = 2\nmemory = \"1G\"\nconsole = \"off\"";
        let config = check(toml, flags).expect("good");
        assert_eq!((config.cpus, config.memory), (3, 64 * MIB));
        assert_eq!(config.console, Console::Off);
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let flags = Options {
            cpus: Some(9),
            ..Options::default()
        };
        let text = refused(
            "kernel = \"missing\"\nmemory = 3\ncmdline = \"a\\u0000\"",
            flags,
        );
        for word in [
            "--cpus: 9 is more than the 8",
            "kernel in /",
            "missing cannot be opened: No such file",
            "memory in /",
            "multiple of 2 MiB",
            "cmdline in /",
        ] {
            assert!(text.contains(word), "no \"{word}\" in: {text}");
        }
    }

    #[test]
    fn what_the_machine_cannot_carry_is_refused() {
        let with =
            |line: &str| refused(&format!("kernel = \"kernel\"\n{line}"), Options::default());
        assert!(with("memory = 18").contains("at least 34 MiB"));
        assert!(with("memory = \"2T\"").contains("40 bits"));
        assert!(with("cpus = 0").contains("at least 1"));
        let long = "x".repeat(3000);
        assert!(with(&format!("cmdline = \"{long}\"")).contains("at most 2047"));
        assert!(with("console = \"file:/no/such/dir/log\"").contains("No such file"));
        assert!(with("api-sock = \"/no/such/dir/api\"").contains("No such file"));
        assert!(with("initrd = \".\"").contains("not a regular file"));
    }

    #[test]
    fn a_file_that_is_not_ours_is_refused_where_it_is_wrong() {
        for (toml, word) in [
            ("kernle = \"x\"", "kernle"),
            ("kernel = 3", "kernel"),
            ("memory = \"much\"", "much"),
            ("console = \"tty\"", "tty"),
            ("[[", "TOML"),
        ] {
            let text = refused(toml, Options::default());
            assert!(text.contains("vm.toml"), "{text}");
            assert!(text.contains(word), "no \"{word}\" in: {text}");
        }
        let missing = Wanted::new(Options::default(), Some(Path::new("/no/such/file")));
        let text = missing.expect_err("refused").to_string();
        assert!(text.contains("No such file"), "{text}");
    }

    #[test]
    fn memory_is_read_as_people_write_it() {
        for (text, mib) in [("512", 512), ("512M", 512), ("5G", 5120), ("1T", 1 << 20)] {
            assert_eq!(text.parse(), Ok(MemorySize(mib * MIB)), "{text}");
        }
        for text in ["", "M", "5K", "-1", "1.5G", "99999999999999999999"] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }
}
