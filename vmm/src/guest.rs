//! The running machine as the patcher's guest: the one place where the two meet.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use patcher::addr::{Gpa, Gva};
use patcher::guest::{Guest, GuestError, PausedGuest, ReadPhys, Registers, Vcpu};

use crate::vm::{BreakpointError, Inner, PauseError, PauseStats, Vm, Walk};

/// Another patcher is at work on the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another update of this guest is at work; try again when it is done")]
pub struct GuestBusy;

/// The guest of a machine, for one patcher at a time.
#[derive(Debug)]
pub struct KvmGuest {
    machine: Arc<Inner>,
    last_pause: PauseStats,
}

impl KvmGuest {
    pub(crate) fn new(vm: &Vm) -> Result<Self, GuestBusy> {
        if vm.0.patcher_at_work.swap(true, Ordering::Acquire) {
            return Err(GuestBusy);
        }
        Ok(Self {
            machine: Arc::clone(&vm.0),
            last_pause: PauseStats::default(),
        })
    }

    /// All guest-physical memory, ascending: RAM, then the arena.
    #[must_use]
    pub fn memory(&self) -> Vec<Range<Gpa>> {
        let layout = self.machine.memory.layout();
        layout.ram.iter().chain([&layout.arena]).cloned().collect()
    }

    /// Sets a breakpoint before the instruction at `at`, on every vCPU. The kernel's text holds nothing of it.
    pub fn break_at(&mut self, at: Gva) -> Break<'_> {
        self.machine.set_breakpoint(at);
        Break { guest: self, at }
    }

    /// What the last pause cost. All zero when the guest was standing still already.
    #[must_use]
    pub fn last_pause(&self) -> &PauseStats {
        &self.last_pause
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.machine.patcher_at_work.store(false, Ordering::Release);
    }
}

impl ReadPhys for KvmGuest {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.machine.memory.read_phys(at, buf)
    }
}

impl Guest for KvmGuest {
    type Paused<'g> = KvmPaused<'g>;

    fn arena(&self) -> Range<Gpa> {
        self.machine.memory.arena()
    }

    fn store(&mut self, at: Gpa, value: u64) -> Result<(), GuestError> {
        self.machine.memory.store(at, value)
    }

    fn pause(&mut self, deadline: Instant) -> Result<KvmPaused<'_>, GuestError> {
        let (stopped, stats) =
            self.machine
                .hold_for_patcher(deadline)
                .map_err(|error| match error {
                    PauseError::Vcpu { vcpu } => GuestError::Deadline { vcpu },
                    PauseError::Ended => GuestError::Ended,
                    PauseError::Device => GuestError::Machine {
                        cause: error.to_string(),
                    },
                })?;
        self.last_pause = stats;
        Ok(KvmPaused {
            machine: &self.machine,
            vcpus: stopped.iter().map(|it| it.vcpu).collect(),
            held: true,
        })
    }
}

/// Why the guest does not stand still at a breakpoint; it runs as before.
#[derive(Debug, thiserror::Error)]
pub enum BreakError {
    /// Nobody came there.
    #[error(transparent)]
    Breakpoint(#[from] BreakpointError),
    /// Somebody came, but the guest could not be stopped.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// A guest with a breakpoint. Dropping this takes the breakpoint away, and lets every vCPU go on that came to it.
#[derive(Debug)]
pub struct Break<'g> {
    guest: &'g mut KvmGuest,
    at: Gva,
}

impl Break<'_> {
    /// Stops the guest when a vCPU is about to execute the instruction: the guest, and the vCPUs that are there. They execute it when the guest
    /// is resumed.
    ///
    /// # Errors
    /// When nobody came there before `deadline`, or the guest did not stop.
    pub fn next(&mut self, deadline: Instant) -> Result<(KvmPaused<'_>, Vec<usize>), BreakError> {
        self.guest.machine.wait_at_breakpoint(deadline)?;
        let machine = Arc::clone(&self.guest.machine);
        let paused = self.guest.pause(deadline)?;
        let there = machine.breakpoint.take();
        let is_there = |index: &usize| {
            let vcpu = paused.vcpus.get(*index);
            vcpu.is_some_and(|vcpu| vcpu.rip == self.at.0)
        };
        if !there.iter().all(is_there) {
            let cause = "a vCPU that was held at a breakpoint has left it".to_owned();
            return Err(GuestError::Machine { cause }.into());
        }
        Ok((paused, there))
    }

    /// Has the first vCPU that is about to execute the instruction make a walk, in which nothing interrupts it, and gives where it was before each
    /// step, and behind the last. The guest runs on.
    ///
    /// # Errors
    /// When nobody came there before `deadline`.
    pub fn walk(self, walk: Walk, deadline: Instant) -> Result<Vec<Gva>, BreakpointError> {
        let machine = &self.guest.machine;
        machine.breakpoint.set_walk(walk);
        machine.wait_at_breakpoint(deadline)?;
        Ok(machine.breakpoint.path())
    }

    /// What the last stop cost.
    #[must_use]
    pub fn last_pause(&self) -> &PauseStats {
        self.guest.last_pause()
    }
}

impl Drop for Break<'_> {
    fn drop(&mut self) {
        self.guest.machine.clear_breakpoint();
    }
}

/// The guest while it stands still for a patcher.
#[derive(Debug)]
pub struct KvmPaused<'g> {
    machine: &'g Inner,
    vcpus: Vec<Vcpu>,
    held: bool,
}

impl ReadPhys for KvmPaused<'_> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.machine.memory.read_phys(at, buf)
    }
}

impl Registers for KvmPaused<'_> {
    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }
}

impl PausedGuest for KvmPaused<'_> {
    fn write_phys(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        self.machine.memory.write(at, bytes)
    }

    fn resume(mut self) -> Result<(), GuestError> {
        self.held = false;
        if self.machine.release_from_patcher() {
            Ok(())
        } else {
            Err(GuestError::Ended)
        }
    }

    fn leave_paused(mut self) {
        self.held = false;
        self.machine.give_up();
    }
}

impl Drop for KvmPaused<'_> {
    fn drop(&mut self) {
        if self.held {
            self.machine.release_from_patcher();
        }
    }
}
