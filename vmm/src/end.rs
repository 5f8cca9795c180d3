//! How a guest's life ended, and the exit code that tells it to whoever started the process.

use std::fmt;

/// Why the guest runs no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// It powered itself off (ACPI S5).
    PowerOff,
    /// It asked for a reset: ACPI reset register, or the keyboard controller.
    Reset,
    /// Its kernel panicked; the text is what the kernel said first.
    Panic(String),
    /// A vCPU met a fault while delivering a double fault.
    TripleFault,
    /// It was ended from outside: by the API, a signal, or the console's escape key. The text says which.
    Killed(String),
    /// The machine below it failed.
    Error(String),
}

impl EndReason {
    /// The exit code of `exopatch run` for this end. Usage errors are 2.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Error(_) => 1,
            Self::Reset => 10,
            Self::Panic(_) => 11,
            Self::TripleFault => 12,
            Self::Killed(_) => 13,
        }
    }

    /// A fixed name for programs to test.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::PowerOff => "power_off",
            Self::Reset => "reset",
            Self::Panic(_) => "panic",
            Self::TripleFault => "triple_fault",
            Self::Killed(_) => "killed",
            Self::Error(_) => "error",
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Panic(line) => write!(f, "the guest's kernel panicked: {line}"),
            Self::TripleFault => f.write_str("the guest ended in a triple fault"),
            Self::Killed(by) => write!(f, "the guest was killed by {by}"),
            Self::Error(cause) => write!(f, "the virtual machine failed: {cause}"),
        }
    }
}

/// The table of exit codes, as `exopatch run --help` shows it.
pub const EXIT_CODES: &str = "\
Exit codes:
   0  the guest powered off
   1  the virtual machine could not be started, or failed
   2  wrong usage, or a configuration that cannot work
  10  the guest asked for a reset (reboot)
  11  the guest's kernel panicked
  12  the guest ended in a triple fault
  13  the guest was killed: by the API, a signal, or Ctrl-A x on the console";
