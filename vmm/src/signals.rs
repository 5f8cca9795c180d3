//! Signals that ask the process to end, taken as events instead of interrupting it.
#![expect(unsafe_code, reason = "makes a signalfd")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// The signals, and what people call them.
const ENDING: [(libc::c_int, &str); 3] = [
    (libc::SIGTERM, "SIGTERM"),
    (libc::SIGINT, "SIGINT"),
    (libc::SIGHUP, "SIGHUP"),
];

/// A stream of ending signals.
#[derive(Debug)]
pub struct EndingSignals(File);

impl EndingSignals {
    /// Takes the signals for this thread and the threads that it makes from now on.
    ///
    /// # Errors
    /// What the system said.
    pub fn take() -> io::Result<Self> {
        let numbers = ENDING.map(|(number, _)| number);
        for number in numbers {
            match block_signal(number) {
                Ok(()) | Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
        let set = create_sigset(&numbers)?;
        // SAFETY: `set` is an initialised signal set that outlives the call.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, valid and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// The name of the next signal, if one has come.
    pub fn received(&mut self) -> Option<&'static str> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // The structure begins with the number (signalfd(2)).
        let number = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
        let known = ENDING.iter().find(|(it, _)| *it == number);
        Some(known.map_or("a signal", |(_, name)| name))
    }
}

impl AsRawFd for EndingSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
