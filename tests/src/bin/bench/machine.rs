//! The machines that are compared: ours, and QEMU's microvm as a user would start it for the same guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tests::api::Api;
use tests::console::Console;
use tests::stock::{self, Stock};

const BOOT_LIMIT: Duration = Duration::from_secs(120);
const READY: &str = "exopatch-guest: ready";

/// Which machine runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Exopatch,
    QemuMicrovm,
}

/// A booted guest in one of the machines. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Machine {
    kind: Kind,
    process: Child,
    control: PathBuf,
    /// From the start of the process to its init obeying commands.
    pub(crate) boot: Duration,
    /// Goes with the machine.
    _dir: TempDir,
}

impl Machine {
    /// Starts the process and waits for the guest's init.
    pub(crate) fn boot(
        kind: Kind,
        stock: Stock,
        cpus: u32,
        workload: &str,
    ) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let control = dir.path().join("control.sock");
        let cmdline = format!("console=ttyS0 quiet {workload}");
        let mut command = command(kind, stock, cpus, &cmdline, &control);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let start = Instant::now();
        let mut process = command
            .spawn()
            .map_err(|error| format!("{kind:?} does not start: {error}"))?;
        let console = Console::follow(process.stdout.take().ok_or("no stdout")?);
        let log = Console::follow(process.stderr.take().ok_or("no stderr")?);
        let came_up = console.wait(0, BOOT_LIMIT, |line| line.contains(READY));
        let machine = Self {
            kind,
            process,
            control,
            boot: start.elapsed(),
            _dir: dir,
        };
        match came_up {
            Ok(_) => Ok(machine),
            Err(why) => Err(format!(
                "{kind:?} did not boot: {why}\n{}",
                log.since(0).join("\n")
            )),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    /// A connection that takes requests.
    pub(crate) fn connect(&self) -> Result<Control, String> {
        Ok(match self.kind {
            Kind::Exopatch => Control::Exopatch(Api::connect(&self.control)?),
            Kind::QemuMicrovm => Control::Qemu(Qmp::connect(&self.control)?),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let killed = self.process.kill().and_then(|()| self.process.wait());
        if let Err(error) = killed {
            eprintln!("process {} stays: {error}", self.process.id());
        }
    }
}

fn command(kind: Kind, stock: Stock, cpus: u32, cmdline: &str, control: &Path) -> Command {
    let (kernel, initrd) = (stock.file("vmlinuz"), stock.file("initramfs.cpio.gz"));
    let cpus = cpus.to_string();
    match kind {
        Kind::Exopatch => {
            let mut command = Command::new(stock::exopatch());
            command.args([
                "run",
                "--memory",
                "256M",
                "--cpus",
                &cpus,
                "--cmdline",
                cmdline,
            ]);
            command
                .arg("--kernel")
                .arg(kernel)
                .arg("--initrd")
                .arg(initrd)
                .arg("--api-sock")
                .arg(control);
            command
        }
        Kind::QemuMicrovm => {
            let mut command = Command::new("qemu-system-x86_64");
            // Without a clock at port 0x71 the stock kernel waits six seconds for one.
            command.args([
                "-M",
                "microvm,rtc=on",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                "256",
                "-smp",
                &cpus,
            ]);
            command.args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-append",
                cmdline,
            ]);
            command
                .arg("-kernel")
                .arg(kernel)
                .arg("-initrd")
                .arg(initrd);
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", control.display()));
            command
        }
    }
}

/// What is asked of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// The cheapest question there is.
    Status,
    Pause,
    Resume,
}

/// A connection to a machine's control socket.
#[derive(Debug)]
pub(crate) enum Control {
    Exopatch(Api),
    Qemu(Qmp),
}

impl Control {
    /// Sends a request and waits for its reply; gives the time between, in microseconds.
    pub(crate) fn request(&mut self, request: Request) -> Result<f64, String> {
        let start = Instant::now();
        match self {
            Self::Exopatch(api) => {
                let call = match request {
                    Request::Status => "GET /v1/vm",
                    Request::Pause => "POST /v1/vm/pause",
                    Request::Resume => "POST /v1/vm/resume",
                };
                api.call(call, b"")?;
            }
            Self::Qemu(qmp) => qmp.execute(match request {
                Request::Status => "query-status",
                Request::Pause => "stop",
                Request::Resume => "cont",
            })?,
        }
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }
}

/// A connection to QEMU's monitor (QMP).
#[derive(Debug)]
pub(crate) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(socket: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", socket.display());
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .map_err(failed)?;
        let mut qmp = Self(BufReader::new(stream));
        let _greeting = qmp.reply()?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    fn execute(&mut self, name: &str) -> Result<(), String> {
        let command = format!("{{\"execute\": \"{name}\"}}\n");
        let sent = self.0.get_mut().write_all(command.as_bytes());
        sent.map_err(|error| format!("{name}: {error}"))?;
        loop {
            let reply = self.reply().map_err(|error| format!("{name}: {error}"))?;
            if reply.get("return").is_some() {
                return Ok(());
            }
            // Events stand between a request and its reply.
            if reply.get("event").is_none() {
                return Err(format!("{name}: {reply}"));
            }
        }
    }

    fn reply(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err("QEMU hung up".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
