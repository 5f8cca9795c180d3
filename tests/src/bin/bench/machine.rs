//! The machines that are compared: ours, and QEMU's microvm as a user would start it for the same guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
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
        let failed = |error: std::io::Error| format!("{}: {error}", self.control.display());
        let stream = UnixStream::connect(&self.control).map_err(failed)?;
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .map_err(failed)?;
        let mut control = Control {
            kind: self.kind,
            stream: BufReader::new(stream),
        };
        if self.kind == Kind::QemuMicrovm {
            control.line()?;
            control.request(Request::Capabilities)?;
        }
        Ok(control)
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
    /// QMP's handshake.
    Capabilities,
    /// The cheapest question there is.
    Status,
    Pause,
    Resume,
}

/// A connection to a machine's control socket.
#[derive(Debug)]
pub(crate) struct Control {
    kind: Kind,
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Sends a request and waits for its reply; gives the time between, in microseconds.
    pub(crate) fn request(&mut self, request: Request) -> Result<f64, String> {
        let start = Instant::now();
        match self.kind {
            Kind::Exopatch => self.http(request)?,
            Kind::QemuMicrovm => self.qmp(request)?,
        }
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }

    fn http(&mut self, request: Request) -> Result<(), String> {
        let line = match request {
            Request::Capabilities | Request::Status => "GET /v1/vm",
            Request::Pause => "POST /v1/vm/pause",
            Request::Resume => "POST /v1/vm/resume",
        };
        self.send(&format!(
            "{line} HTTP/1.1\r\nHost: exopatch\r\nContent-Length: 0\r\n\r\n"
        ))?;
        let status = self.line()?;
        let mut length = 0;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value
                    .trim()
                    .parse()
                    .map_err(|_| format!("{line}: {header}"))?;
            }
        }
        let mut body = vec![0; length];
        self.stream
            .read_exact(&mut body)
            .map_err(|error| error.to_string())?;
        let ok = status
            .split(' ')
            .nth(1)
            .is_some_and(|code| code.starts_with('2'));
        if ok {
            Ok(())
        } else {
            Err(format!(
                "{line}: {status} {}",
                String::from_utf8_lossy(&body)
            ))
        }
    }

    fn qmp(&mut self, request: Request) -> Result<(), String> {
        let name = match request {
            Request::Capabilities => "qmp_capabilities",
            Request::Status => "query-status",
            Request::Pause => "stop",
            Request::Resume => "cont",
        };
        self.send(&format!("{{\"execute\": \"{name}\"}}\n"))?;
        loop {
            let reply: Value =
                serde_json::from_str(&self.line()?).map_err(|error| format!("{name}: {error}"))?;
            if reply.get("return").is_some() {
                return Ok(());
            }
            // Events stand between a request and its reply.
            if reply.get("event").is_none() {
                return Err(format!("{name}: {reply}"));
            }
        }
    }

    fn send(&mut self, text: &str) -> Result<(), String> {
        self.stream
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(|error| error.to_string())
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        let read = self
            .stream
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
        if read == 0 {
            Err("the machine hung up".to_owned())
        } else {
            Ok(line.trim_end().to_owned())
        }
    }
}
