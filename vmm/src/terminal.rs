//! The terminal in raw mode while a guest's console or a view has it, and on its other screen for a view; and back again on every way out.
//!
//! Back means: when the guard is dropped, when any thread panics, and when the process crashes by a signal. Only an
//! uncatchable kill leaves it as it is (`reset` or `stty sane` helps then). The other screen and the cursor are those of xterm's control sequences
//! (DECSET 1049 and 25), which terminals share.
#![expect(
    unsafe_code,
    reason = "restores the default action of a signal inside its handler"
)]

use std::io;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcsetattr};
use vmm_sys_util::signal::register_signal_handler;

use crate::output;

/// How the terminal was; there is one terminal in a process.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();

/// Whether the terminal is on its other screen.
static OTHER_SCREEN: AtomicBool = AtomicBool::new(false);

/// To the other screen, without a cursor.
const TO_OTHER_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
/// Back, with the cursor.
const TO_OWN_SCREEN: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// Signals by which a program crashes, or is made to.
const CRASHES: [libc::c_int; 6] = [
    libc::SIGQUIT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];

/// Raw mode; dropping this ends it.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts standard input into raw mode if it is a terminal: every key goes to the guest as it is.
    ///
    /// # Errors
    /// When it is a terminal and refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let current = tcgetattr(stdin())?;
        let original = ORIGINAL.get_or_init(|| current);
        restore_on_crash()?;
        let mut raw = original.clone();
        raw.make_raw();
        // Our own messages end in a bare newline; the guest's in both, which this leaves alone.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// The terminal's other screen; dropping this ends it.
#[derive(Debug)]
pub struct OtherScreen(());

impl OtherScreen {
    /// Changes to the other screen of the terminal that standard output is.
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn enter() -> io::Result<Self> {
        restore_on_crash()?;
        OTHER_SCREEN.store(true, Ordering::SeqCst);
        let screen = Self(());
        output::text(TO_OTHER_SCREEN)?;
        Ok(screen)
    }
}

impl Drop for OtherScreen {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, if it was ever changed. Safe to call from a signal handler: two system calls at most.
pub fn restore() {
    // Nobody could be told of a failure, and no other way is left.
    if OTHER_SCREEN.swap(false, Ordering::SeqCst) {
        let _ = rustix::io::write(stdout(), TO_OWN_SCREEN);
    }
    if let Some(original) = ORIGINAL.get() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, original);
    }
}

/// Registers [`restore`] for panics and crashes, once.
fn restore_on_crash() -> io::Result<()> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
    });
    for signal in CRASHES {
        register_signal_handler(signal, crashed)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
    }
    Ok(())
}

extern "C" fn crashed(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    // SAFETY: both calls are allowed in a handler (signal-safety(7)). With the default action back, the signal that is
    // raised here ends the process with its own status as soon as the handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
