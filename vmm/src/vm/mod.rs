//! One virtual machine from start to end: its threads, its pauses, its events.
//!
//! ```text
//! Starting --> Running <--> Paused (by a user, by a patcher, or both)
//!                 |            |
//!                 '--> Ended <-'
//! ```
//!
//! A user's pause and a patcher's nest: the guest runs only while neither holds it. A machine that a patcher gave up paused
//! (its memory is not known to be sound) never runs again.

pub(crate) mod breakpoint;
mod devices;
mod event_loop;
pub(crate) mod gate;
mod pause;
pub(crate) mod rendezvous;
mod start;
mod vcpu;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use vmm_sys_util::eventfd::EventFd;

pub use breakpoint::{BreakpointError, Walk};
pub use pause::{Pause, PauseError, PauseStats, Pauses, ResumeError};
pub use start::StartError;

use crate::config::Config;
use crate::end::EndReason;
use crate::events::{EventKind, Events};
use crate::guest::{GuestBusy, KvmGuest};
use crate::kvm::kick::{self, Kicker};
use crate::kvm::vcpu::Stopped;
use crate::memory::Memory;
use breakpoint::Breakpoint;
use devices::Devices;
use pause::Holds;
use rendezvous::Rendezvous;

/// How long the console may take to swallow the guest's last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long breakpoints that a guest begins to use may not work, while ours is there.
const OWN_BREAKPOINTS_LOOK: Duration = Duration::from_millis(50);

/// A handle on a virtual machine. Clones are the same machine.
#[derive(Clone, Debug)]
pub struct Vm(pub(crate) Arc<Inner>);

/// What the handle's clones share.
pub(crate) struct Inner {
    config: Config,
    events: Arc<Events>,
    pub(crate) memory: Arc<Memory>,
    rendezvous: Rendezvous<Stopped>,
    pub(crate) breakpoint: Breakpoint,
    kickers: Vec<(Kicker, u64)>,
    threads: OnceLock<Vec<JoinHandle<()>>>,
    holds: Mutex<Holds>,
    devices: Devices,
    end: Mutex<Ending>,
    ended: Condvar,
    stop_loop: EventFd,
    pub(crate) patcher_at_work: AtomicBool,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("config", &self.config)
            .field("rendezvous", &self.rendezvous)
            .field("holds", &self.holds)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Ending {
    /// The first line of what the guest's kernel said about its panic.
    panic: Option<String>,
    reason: Option<EndReason>,
    /// All vCPU threads have returned.
    complete: bool,
}

/// What a machine does now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// It stands still.
    Paused {
        /// A user asked for it.
        by_user: bool,
        /// A patcher is at work.
        by_patcher: bool,
        /// A patcher gave it up: it cannot be resumed.
        unsound: bool,
    },
    /// It is over.
    Ended(EndReason),
}

/// What can be told about a machine at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it does.
    pub state: State,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Guest RAM, in MiB.
    pub memory_mib: u64,
    /// The kernel file it was booted from.
    pub kernel: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// Time since it was started.
    pub uptime: Duration,
    /// The terminal that its console is on, if one was made for it.
    pub pty: Option<PathBuf>,
    /// The guest's kernel said that it panicked.
    pub panic: Option<String>,
    /// How often it was stopped, and for how long.
    pub pauses: Pauses,
}

impl Vm {
    /// What the machine is and does.
    #[must_use]
    pub fn status(&self) -> Status {
        let inner = &self.0;
        let (reason, panic) = {
            let end = inner.end.lock().unwrap_or_else(PoisonError::into_inner);
            (end.reason.clone(), end.panic.clone())
        };
        let (state, pauses) = {
            let holds = inner.holds();
            (holds.state(), holds.pauses())
        };
        let state = reason.map_or(state, State::Ended);
        Status {
            state,
            vcpus: inner.config.cpus,
            memory_mib: inner.config.memory / crate::layout::MIB,
            kernel: inner.config.kernel.clone(),
            cmdline: inner.config.cmdline.clone(),
            uptime: inner.events.elapsed(),
            pty: inner.devices.pty.clone(),
            panic,
            pauses,
        }
    }

    /// Why the machine has ended, once it has. Never waits for a pause that is under way, as [`Vm::status`] does.
    #[must_use]
    pub fn ended(&self) -> Option<EndReason> {
        let end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.reason.clone()
    }

    /// What happened and happens to it.
    #[must_use]
    pub fn events(&self) -> &Arc<Events> {
        &self.0.events
    }

    /// The configuration it was started with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Presses the power button. Returns whether the guest has a driver that listens to it; in a paused guest the press
    /// waits.
    pub fn power_button(&self) -> bool {
        let heard = self
            .0
            .devices
            .pm
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .press_power_button();
        self.0.events.publish(EventKind::PowerButton);
        heard
    }

    /// Ends the machine at once, as pulling its plug would. `by` completes the sentence "the guest was killed by ...".
    pub fn kill(&self, by: &str) {
        self.0.end(EndReason::Killed(by.to_owned()));
    }

    /// Waits until the machine has ended and its console has said everything.
    #[must_use]
    pub fn wait(&self) -> EndReason {
        let mut end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let (true, Some(reason)) = (end.complete, &end.reason) {
                return reason.clone();
            }
            end = self
                .0
                .ended
                .wait(end)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The guest, for a patcher. There is one at a time; dropping the guest makes room for the next.
    ///
    /// # Errors
    /// When another patcher is at work.
    pub fn guest(&self) -> Result<KvmGuest, GuestBusy> {
        KvmGuest::new(self)
    }
}

impl Inner {
    /// Interrupts vCPU `index`.
    fn kick(&self, index: usize) {
        if let Some((kicker, sync)) = self.kickers.get(index) {
            kicker.interrupt(*sync);
        }
        if let Some(thread) = self.threads.get().and_then(|all| all.get(index)) {
            kick::signal(thread);
        }
        self.breakpoint.wake();
    }

    /// Sets the breakpoint, on the vCPUs that run as well.
    pub(crate) fn set_breakpoint(&self, at: Gva) {
        self.breakpoint.set(at);
        self.kick_all();
    }

    /// Waits until somebody has come to the breakpoint. Meanwhile the vCPUs look now and then whether the guest has begun to use breakpoints
    /// itself, which do not work until they have looked.
    ///
    /// # Errors
    /// When nobody will come, or nobody has before `deadline`.
    pub(crate) fn wait_at_breakpoint(&self, deadline: Instant) -> Result<(), BreakpointError> {
        loop {
            let look = Instant::now() + OWN_BREAKPOINTS_LOOK;
            match self.breakpoint.wait(look.min(deadline)) {
                Err(BreakpointError::Deadline) if look < deadline => self.kick_all(),
                other => return other,
            }
        }
    }

    /// Takes the breakpoint away, from the vCPUs that run as well.
    pub(crate) fn clear_breakpoint(&self) {
        self.breakpoint.clear();
        self.kick_all();
    }

    fn kick_all(&self) {
        (0..self.kickers.len()).for_each(|index| self.kick(index));
    }

    /// Notes that the guest's kernel has panicked; it may still have things to say.
    fn panicked(&self, line: String) {
        {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            if end.panic.is_some() {
                return;
            }
            end.panic = Some(line.clone());
        }
        self.events.publish(EventKind::Panic { line });
    }

    /// Ends the machine: the first reason given counts, except that whatever follows a panic is the panic's end.
    pub(crate) fn end(&self, reason: EndReason) {
        {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            if end.reason.is_some() {
                return;
            }
            let of_guest = matches!(
                reason,
                EndReason::Reset | EndReason::TripleFault | EndReason::Panic(_)
            );
            let panic = end.panic.clone().filter(|_| of_guest);
            end.reason = Some(panic.map_or(reason, EndReason::Panic));
        }
        self.rendezvous.exit(|index| self.kick(index));
        self.breakpoint.end();
    }

    /// For the last vCPU thread: says that all is over.
    fn complete(&self) {
        let reason = {
            let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            end.reason.clone()
        };
        self.devices
            .serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .output()
            .finish(LAST_WORDS);
        if let Err(error) = self.stop_loop.write(1) {
            tracing::warn!(%error, "the event loop could not be stopped");
        }
        if let Some(reason) = reason {
            self.events.publish(EventKind::Ended(reason));
        }
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.complete = true;
        self.ended.notify_all();
    }
}
