//! The host side of the serial console: where it goes, and the event loop's part in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::alarm::Alarm;
use super::output::{ConsoleOutput, WhenFull};
use super::serial::SerialPort;
use crate::config::Console;
use crate::vm::gate::Gate;

/// What the console is connected to on the host.
#[derive(Debug)]
pub struct Host {
    /// Where input comes from.
    pub input: Option<OwnedFd>,
    /// Whether a person types it, who may want the escape key.
    pub input_is_terminal: bool,
    /// Where output goes.
    pub output: Option<OwnedFd>,
    /// What to do when it is not read.
    pub when_full: WhenFull,
    /// The name of the new terminal, if one was made.
    pub pty: Option<PathBuf>,
    /// Keeps the new terminal from hanging up while nobody has it open.
    held: Option<OwnedFd>,
}

impl Host {
    /// Connects the console.
    ///
    /// # Errors
    /// When a file cannot be made, or a terminal.
    pub fn open(console: &Console) -> io::Result<Self> {
        let mut host = Self {
            input: None,
            input_is_terminal: false,
            output: None,
            when_full: WhenFull::Wait,
            pty: None,
            held: None,
        };
        match console {
            Console::Off => {}
            Console::Stdio => {
                host.input_is_terminal = isatty(io::stdin());
                host.input = Some(io::stdin().as_fd().try_clone_to_owned()?);
                host.output = Some(io::stdout().as_fd().try_clone_to_owned()?);
            }
            Console::File(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|error| {
                        io::Error::new(error.kind(), format!("{}: {error}", path.display()))
                    })?;
                host.output = Some(file.into());
            }
            Console::Pty => {
                let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
                let master = openpt(flags)?;
                grantpt(&master)?;
                unlockpt(&master)?;
                let peer = ioctl_tiocgptpeer(&master, flags)?;
                // The line discipline is the guest's: without this the host would echo what the guest prints back to it.
                let mut modes = tcgetattr(&peer)?;
                modes.make_raw();
                tcsetattr(&peer, OptionalActions::Now, &modes)?;
                let name = ptsname(&master, Vec::new())?;
                host.pty = Some(name.to_string_lossy().into_owned().into());
                host.input = Some(master.as_fd().try_clone_to_owned()?);
                host.output = Some(master);
                host.when_full = WhenFull::ForgetOldest;
                host.held = Some(peer);
            }
        }
        Ok(host)
    }
}

/// What a key means before it reaches the guest.
#[derive(Debug, Default)]
struct Escape {
    pending: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    /// Passes `typed` on into `kept`; returns true when the person wants out (Ctrl-A x). Ctrl-A twice is one Ctrl-A.
    fn filter(&mut self, typed: &[u8], kept: &mut Vec<u8>) -> bool {
        for key in typed {
            match (self.pending, *key) {
                (true, b'x' | b'X') => return true,
                (true, CTRL_A) => kept.push(CTRL_A),
                (true, key) => kept.extend([CTRL_A, key]),
                (false, CTRL_A) => {}
                (false, key) => kept.push(key),
            }
            self.pending = !self.pending && *key == CTRL_A;
        }
        false
    }
}

/// Ends the machine, for the reason given.
pub(crate) type Quit = Box<dyn Fn(&'static str) + Send>;

/// The event loop's part: input to the guest, output that waits.
pub(crate) struct ConsoleLoop {
    port: Arc<Mutex<SerialPort>>,
    gate: Arc<Gate>,
    input: Option<File>,
    /// The input cannot be waited for (a regular file): it is always ready.
    always_ready: bool,
    watched: bool,
    escape: Option<Escape>,
    quit: Quit,
    /// Read from the input, not yet taken by the guest.
    ahead: Vec<u8>,
    hungry: EventFd,
    timer: Alarm,
    _held: Option<OwnedFd>,
}

/// The two ends of a console.
pub(crate) struct Parts {
    /// For the bus.
    pub(crate) port: Arc<Mutex<SerialPort>>,
    /// For the event loop.
    pub(crate) host: ConsoleLoop,
}

const INPUT: u32 = 0;
const HUNGRY: u32 = 1;
const TIMER: u32 = 2;
const OPENED: u32 = 3;

/// What reading ahead has brought.
enum Input {
    Some,
    None,
    Ended,
}

/// As much as the UART's FIFO takes.
const READ_SIZE: usize = 64;

impl ConsoleLoop {
    /// Puts a serial port in front of `host`; `line` raises its interrupt.
    ///
    /// # Errors
    /// When an event or a timer could not be made.
    pub(crate) fn connect(
        host: Host,
        line: EventFd,
        gate: Arc<Gate>,
        quit: Quit,
    ) -> io::Result<Parts> {
        let hungry = EventFd::new(libc::EFD_NONBLOCK)?;
        // The port sets it, the loop waits for it.
        let timer = Alarm::new()?;
        let output = ConsoleOutput::new(host.output, host.when_full, timer.clone());
        let port = SerialPort::new(line, output, hungry.try_clone()?);
        let port = Arc::new(Mutex::new(port));
        Ok(Parts {
            port: Arc::clone(&port),
            host: Self {
                port,
                gate,
                input: host.input.map(File::from),
                always_ready: false,
                watched: false,
                escape: host.input_is_terminal.then(Escape::default),
                quit,
                ahead: Vec::new(),
                hungry,
                timer,
                _held: host.held,
            },
        })
    }

    /// Moves input to the guest until one of them has enough.
    fn pump(&mut self, readable: bool, ops: &mut EventOps<'_>) {
        let gate = Arc::clone(&self.gate);
        let Some(_inside) = gate.enter() else {
            self.unwatch(ops);
            return;
        };
        let mut readable = readable || self.always_ready;
        loop {
            let taken = self
                .port
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .feed(&self.ahead);
            self.ahead.drain(..taken);
            if !self.ahead.is_empty() {
                self.unwatch(ops);
                return;
            }
            if !readable {
                self.watch(ops);
                return;
            }
            match self.read() {
                Input::Some => readable = self.always_ready,
                Input::None => readable = false,
                Input::Ended => {
                    self.unwatch(ops);
                    self.input = None;
                    return;
                }
            }
        }
    }

    /// Reads ahead.
    fn read(&mut self) -> Input {
        let Some(input) = &self.input else {
            return Input::None;
        };
        let mut buffer = [0; READ_SIZE];
        let typed = match rustix::io::read(input, &mut buffer) {
            Ok(0) => return Input::Ended,
            Ok(count) => &buffer[..count],
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Input::None,
            Err(error) => {
                tracing::debug!(%error, "console input has ended");
                return Input::Ended;
            }
        };
        match &mut self.escape {
            Some(escape) => {
                if escape.filter(typed, &mut self.ahead) {
                    (self.quit)("Ctrl-A x");
                }
            }
            None => self.ahead.extend_from_slice(typed),
        }
        Input::Some
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let Some(input) = &self.input else { return };
        if self.watched || self.always_ready {
            return;
        }
        match ops.add(Events::with_data(input, INPUT, EventSet::IN)) {
            Ok(()) => self.watched = true,
            // epoll(7) refuses regular files: they never block.
            Err(_) => {
                self.always_ready = true;
                if let Err(error) = self.hungry.write(1) {
                    tracing::warn!(%error, "console input could not be started");
                }
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps<'_>) {
        let Some(input) = &self.input else { return };
        if !self.watched {
            return;
        }
        self.watched = false;
        if let Err(error) = ops.remove(Events::with_data(input, INPUT, EventSet::IN)) {
            tracing::warn!(%error, "console input could not be held");
        }
    }
}

impl MutEventSubscriber for ConsoleLoop {
    fn init(&mut self, ops: &mut EventOps) {
        let events = [
            Events::with_data(&self.hungry, HUNGRY, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
            Events::with_data(self.gate.opened(), OPENED, EventSet::IN),
        ];
        for event in events {
            if let Err(error) = ops.add(event) {
                tracing::error!(%error, "the console could not be connected to the event loop");
            }
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            INPUT => self.pump(true, ops),
            HUNGRY => {
                drop(self.hungry.read());
                self.pump(false, ops);
            }
            OPENED => {
                drop(self.gate.opened().read());
                self.pump(false, ops);
            }
            _ => {
                if self.timer.has_rung() {
                    self.port
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .flush();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Escape;

    fn check(typed: &[u8], kept: &[u8], quits: bool) {
        let mut escape = Escape::default();
        let mut found = Vec::new();
        let quit = typed.iter().any(|key| escape.filter(&[*key], &mut found));
        assert_eq!((found.as_slice(), quit), (kept, quits), "{typed:?}");
    }

    #[test]
    fn the_escape_key_quits_and_can_itself_be_typed() {
        check(b"ls\r", b"ls\r", false);
        check(b"\x01x", b"", true);
        check(b"a\x01\x01x", b"a\x01x", false);
        check(b"\x01d", b"\x01d", false);
        check(b"\x01\x01\x01x", b"\x01", true);
    }
}
