//! The seam to the machine that runs (or ran) the guest, owned by its consumer: this crate.
//!
//! Physical memory is readable always; registers only while paused or recorded; memory is written only through the
//! pause guard. Translation of guest-virtual addresses is not here: it is this crate's own.
//! Three implementations exist: the KVM virtual machine, a recorded guest, and the fake guest of the tests.

pub mod core;
pub mod counted;
pub mod dump;
pub mod fake;

use std::ops::Range;
use std::time::Instant;

use crate::addr::Gpa;

/// What can go wrong below the seam.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No guest memory is there.
    #[error("guest-physical {at}..+{len:#x} is not memory of this guest")]
    NoMemory {
        /// First byte asked for.
        at: Gpa,
        /// Bytes asked for.
        len: usize,
    },
    /// Not all vCPUs stopped in time; the guest runs on as it was.
    #[error("vCPU {vcpu} did not stop before the deadline")]
    Deadline {
        /// The first vCPU that was still running.
        vcpu: usize,
    },
    /// The guest has stopped for good (powered off, crashed or killed).
    #[error("the guest has ended")]
    Ended,
    /// The machine below failed; `cause` says how.
    #[error("the machine below the guest failed: {cause}")]
    Machine {
        /// What the machine reported.
        cause: String,
    },
}

/// Reads of guest-physical memory, possible at any time. Bytes read while the guest runs may be torn.
pub trait ReadPhys {
    /// Fills `buf` from guest-physical `at`.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`] when any byte of the range is not guest memory; `buf` is then unspecified.
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError>;
}

/// Whether a vCPU can be holding kernel state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// It executes instructions.
    Running,
    /// It waits in `hlt` for an interrupt.
    Halted,
    /// It was never started, or waits for a startup IPI: its registers mean nothing.
    Offline,
}

/// The registers of one stopped vCPU that decide where it is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Whether the other fields mean anything.
    pub state: VcpuState,
    /// General registers in encoding order: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15 (Intel SDM vol. 2, 2.2.1.2).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3, with PCID bits as the guest set them.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enable register.
    pub efer: u64,
    /// Linear address of the interrupt descriptor table.
    pub idt_base: u64,
    /// The active GS base.
    pub gs_base: u64,
    /// An interrupt, exception or NMI is being injected: `rip` is where it will return to.
    pub event_pending: bool,
}

impl Vcpu {
    /// The stack pointer.
    #[must_use]
    pub fn rsp(&self) -> u64 {
        self.gpr[4]
    }
}

/// Registers of all vCPUs, there while the guest is paused or recorded.
pub trait Registers {
    /// All vCPUs, by index.
    fn vcpus(&self) -> &[Vcpu];
}

/// A guest that can be paused, and only then written.
pub trait Guest: ReadPhys {
    /// The pause guard. Dropping it resumes the guest.
    type Paused<'g>: PausedGuest
    where
        Self: 'g;

    /// The guest-physical memory that was added for editions: never the guest's to allocate.
    fn arena(&self) -> Range<Gpa>;

    /// Stores an aligned word into the arena, at once for every vCPU, while the guest runs.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`] when `at` is not in the arena or not aligned to 8 bytes.
    fn store(&mut self, at: Gpa, value: u64) -> Result<(), GuestError>;

    /// Stops every vCPU and device before `deadline`.
    ///
    /// # Errors
    /// [`GuestError::Deadline`] when that could not be done in time: the guest then runs as before.
    fn pause(&mut self, deadline: Instant) -> Result<Self::Paused<'_>, GuestError>;
}

/// A stopped guest. Holding this is the only licence to write its memory; dropping it resumes the guest.
pub trait PausedGuest: ReadPhys + Registers {
    /// Writes `bytes` to guest-physical `at`.
    ///
    /// # Errors
    /// [`GuestError::NoMemory`] or [`GuestError::Machine`]; nothing or everything was written.
    fn write_phys(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError>;

    /// Resumes the guest.
    ///
    /// # Errors
    /// When a vCPU or device could not be let go.
    fn resume(self) -> Result<(), GuestError>;

    /// Gives the guard up and leaves the guest stopped: for a guest whose memory is no longer known to be sound.
    fn leave_paused(self);
}
