//! A booted guest: its process, its console, and the client that drives it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::client::Client;
use crate::console::Console;
use crate::initrd;
use crate::packed;
use crate::scene;
use crate::stock::{self, Stock};

/// Far above what a boot takes in the lab; only a hang reaches it.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The same for one command in a booted guest.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(60);
pub(crate) const READY: &str = "exopatch-guest: ready";
pub(crate) const DONE: &str = "exopatch-guest: done ";
/// What a kernel's log holds only when something went wrong, as grep reads it.
const COMPLAINTS: [&str; 13] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "soft lockup",
    "hard LOCKUP",
    " stall",
    "ftrace bug",
    "general protection",
    "ACPI (BIOS )?Error",
    "Firmware Bug",
    "Clocksource",
    "clocksource: timekeeping",
];
/// Stands before each of them when a guest prints them.
const COMPLAINT: &str = "complaint: ";

/// How to boot a guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which kernel.
    pub stock: Stock,
    /// The file of the kernel to boot: `vmlinuz`, or `vmlinux` through PVH.
    pub kernel: &'static str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The guest's command line.
    pub cmdline: String,
    /// Files of the host that the guest has in `/files`, under the same names.
    pub files: Vec<PathBuf>,
    /// Where to serve the API instead of a path of the guest's own.
    pub socket: Option<PathBuf>,
}

impl Options {
    /// The usual guest: 2 vCPUs, 256 MiB, the kernel as shipped.
    #[must_use]
    pub fn new(stock: Stock) -> Self {
        Self {
            stock,
            kernel: "vmlinuz",
            cpus: 2,
            memory_mib: 256,
            cmdline: "console=ttyS0 quiet".to_owned(),
            files: Vec::new(),
            socket: None,
        }
    }

    /// The same with another number of vCPUs.
    #[must_use]
    pub fn cpus(self, cpus: u32) -> Self {
        Self { cpus, ..self }
    }

    /// The same with another memory size in MiB.
    #[must_use]
    pub fn memory_mib(self, memory_mib: u64) -> Self {
        Self { memory_mib, ..self }
    }

    /// The same booted from another file of the kernel.
    #[must_use]
    pub fn kernel(self, kernel: &'static str) -> Self {
        Self { kernel, ..self }
    }

    /// The same with files of the host in the guest's `/files`.
    #[must_use]
    pub fn files(self, files: Vec<PathBuf>) -> Self {
        Self { files, ..self }
    }

    /// The same with its API served at `socket`.
    #[must_use]
    pub fn socket(self, socket: PathBuf) -> Self {
        Self {
            socket: Some(socket),
            ..self
        }
    }

    /// The same with `words` added to the command line.
    #[must_use]
    pub fn cmdline(self, words: &str) -> Self {
        let cmdline = format!("{} {words}", self.cmdline);
        Self { cmdline, ..self }
    }
}

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    process: Child,
    input: ChildStdin,
    /// What the guest prints.
    pub console: Console,
    /// What exopatch itself prints.
    pub log: Console,
    /// Drives the guest from outside.
    pub client: Client,
    dir: TempDir,
    cpus: u32,
}

/// What a command in the guest gave.
#[derive(Debug)]
pub struct Answer {
    /// Its exit status.
    pub status: i32,
    /// The lines that came on the console meanwhile.
    pub lines: Vec<String>,
}

impl Answer {
    /// The answer that lies between `mark` and the line `end` of a console.
    pub(crate) fn between(console: &Console, mark: usize, end: usize) -> Self {
        let mut lines = console.since(mark);
        lines.truncate(end - mark + 1);
        let done = lines.pop().expect("the end was found");
        let status = done[DONE.len()..]
            .trim()
            .parse()
            .expect("the end carries a status");
        Self { status, lines }
    }

    /// All lines as one text.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }
}

impl Guest {
    /// Boots a guest and waits until it obeys commands.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot(options: &Options) -> Self {
        let mut guest = Self::start(options);
        guest.wait_ready();
        guest
    }

    /// Starts a guest without waiting for it.
    ///
    /// # Panics
    /// When the process cannot be started.
    #[must_use]
    pub fn start(options: &Options) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the socket");
        let socket = options
            .socket
            .clone()
            .unwrap_or_else(|| dir.path().join("api.sock"));
        let initrd = dir.path().join("initrd");
        initrd::write(
            &initrd,
            &options.stock.file("initramfs.cpio.gz"),
            &options.files,
        )
        .expect("an initrd for the guest");
        let mut process = Command::new(stock::exopatch())
            .arg("run")
            .arg("--kernel")
            .arg(options.stock.file(options.kernel))
            .arg("--initrd")
            .arg(&initrd)
            .args(["--cmdline", &options.cmdline])
            .args(["--cpus", &options.cpus.to_string()])
            .args(["--memory", &format!("{}M", options.memory_mib)])
            .arg("--api-sock")
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("exopatch starts");
        let console = Console::follow(process.stdout.take().expect("stdout is piped"));
        let log = Console::follow(process.stderr.take().expect("stderr is piped"));
        let input = process.stdin.take().expect("stdin is piped");
        Self {
            process,
            input,
            console,
            log,
            client: Client::new(socket),
            dir,
            cpus: options.cpus,
        }
    }

    /// A directory that goes with the guest.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// The process id of the machine's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the guest obeys commands.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn wait_ready(&mut self) {
        let ready = self
            .console
            .wait(0, BOOT_LIMIT, |line| line.contains(READY));
        if let Err(why) = ready {
            panic!("no boot: {why}\n{}", self.condition());
        }
    }

    /// What the guest and its machine are doing and what exopatch said, for a test that fails.
    #[must_use]
    pub fn condition(&self) -> String {
        // One that closes its output is about to end.
        std::thread::sleep(Duration::from_millis(200));
        let scene = scene::of(self.pid(), &self.client, self.cpus);
        format!("{scene}exopatch said:\n{}", self.log.since(0).join("\n"))
    }

    /// Types `line` on the guest's console.
    ///
    /// # Panics
    /// When the guest has ended.
    pub fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}")
            .and_then(|()| self.input.flush())
            .expect("the guest takes input");
    }

    /// Runs a shell command in the guest and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn sh(&mut self, command: &str) -> Answer {
        let mark = self.console.mark();
        self.type_line(command);
        let end = self
            .console
            .wait(mark, COMMAND_LIMIT, |line| line.starts_with(DONE))
            .unwrap_or_else(|why| {
                let condition = self.condition();
                let nudged = self.nudged(mark);
                panic!("'{command}' did not end: {why}\n{condition}\n{nudged}")
            });
        Answer::between(&self.console, mark, end)
    }

    /// What a file of the guest holds. It comes packed.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn file(&mut self, path: &str) -> String {
        let answer = self.sh(&packed::command(path));
        assert_eq!(answer.status, 0, "{path}: {}", answer.text());
        packed::unpack(&answer.text())
            .unwrap_or_else(|error| panic!("{path} came damaged: {error}"))
    }

    /// Whether a further line makes a guest go on that seems to wait for one: then what was typed had come, and its interrupt had not.
    fn nudged(&mut self, mark: usize) -> String {
        self.type_line("#");
        let went_on = self
            .console
            .wait(mark, Duration::from_secs(5), |line| line.starts_with(DONE));
        format!("a further line made it go on: {}", went_on.is_ok())
    }

    /// Waits for a console line from `mark` on.
    ///
    /// # Panics
    /// When it does not come.
    #[must_use]
    pub fn wait_line(&self, mark: usize, what: &str, wanted: impl Fn(&str) -> bool) -> usize {
        let found = self.console.wait(mark, COMMAND_LIMIT, wanted);
        found.unwrap_or_else(|why| panic!("no {what}: {why}\n{}", self.condition()))
    }

    /// Waits for the process to end by itself and gives its exit status.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait_end(&mut self) -> i32 {
        let deadline = Instant::now() + COMMAND_LIMIT;
        loop {
            if let Some(status) = self
                .process
                .try_wait()
                .expect("the process can be waited for")
            {
                return status.code().unwrap_or(128);
            }
            let log = || self.log.since(0).join("\n");
            assert!(
                Instant::now() < deadline,
                "exopatch did not end; it said:\n{}",
                log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The warnings, oopses, lockups and firmware complaints in the kernel's log. The guest itself looks for them: a whole log
    /// takes seconds over an emulated serial line.
    ///
    /// # Panics
    /// When the guest cannot look.
    pub fn complaints(&mut self) -> Vec<String> {
        // What programs in the background print may come between: the mark tells the log's lines from theirs.
        let found = self.sh(&format!(
            "dmesg | grep -E '{}' >/tmp/complaints; found=$?; sed 's/^/{COMPLAINT}/' /tmp/complaints; exit $found",
            COMPLAINTS.join("|")
        ));
        match found.status {
            0 => {
                let text = |line: &String| Some(line.split_once(COMPLAINT)?.1.to_owned());
                let complaints: Vec<_> = found.lines.iter().filter_map(text).collect();
                assert!(!complaints.is_empty(), "lost in {:#?}", found.lines);
                complaints
            }
            // grep's word for nothing found.
            1 => Vec::new(),
            _ => panic!("the log cannot be searched: {}", found.text()),
        }
    }
}

impl Drop for Guest {
    #[expect(
        clippy::print_stderr,
        reason = "a destructor has no other way to say it"
    )]
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            let killed = self.process.kill().and_then(|()| self.process.wait());
            if let Err(error) = killed {
                eprintln!("the guest's process {} stays: {error}", self.process.id());
            }
        }
    }
}
