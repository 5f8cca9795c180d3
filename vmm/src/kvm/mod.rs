//! Every ioctl: the only part of the program that talks to `/dev/kvm`.
//!
//! Above it nobody sees a file descriptor or an errno: calls have names, and errors say which call failed and what to do.

pub mod kick;
pub mod machine;
pub mod vcpu;

use std::io;

use kvm_ioctls::{Cap, Kvm};

use crate::config::Limits;

/// The device file.
pub const DEVICE: &str = "/dev/kvm";

/// What went wrong below.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM device.
    #[error(
        "/dev/kvm does not exist: KVM is not loaded, or this machine has no hardware virtualization; \
         try `modprobe kvm_intel` or `modprobe kvm_amd`, and see `exopatch doctor`"
    )]
    NoDevice,
    /// The user may not use it.
    #[error("/dev/kvm may not be opened: {0}; add your user to the group `kvm` and log in again")]
    Permission(io::Error),
    /// Some other reason.
    #[error("/dev/kvm cannot be opened: {0}; see `exopatch doctor`")]
    Open(io::Error),
    /// The host's kernel is too old or too bare.
    #[error("KVM of this host lacks {0}; a kernel 5.10 or newer has it")]
    Missing(&'static str),
    /// A call failed.
    #[error("{call} failed: {cause}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// Names the call of a failed ioctl.
pub(crate) fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |errno| KvmError::Call {
        call,
        cause: io::Error::from_raw_os_error(errno.errno()),
    }
}

/// Capabilities without which no guest runs, and how to call each in a message.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "user memory slots"),
    (Cap::Irqchip, "an interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Pit2, "a timer chip (KVM_CAP_PIT2)"),
    (
        Cap::ImmediateExit,
        "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
    ),
    (Cap::MpState, "the state of a vCPU (KVM_CAP_MP_STATE)"),
    (
        Cap::VcpuEvents,
        "pending events of a vCPU (KVM_CAP_VCPU_EVENTS)",
    ),
    (Cap::ExtCpuid, "CPUID of guests (KVM_CAP_EXT_CPUID)"),
];

/// An opened `/dev/kvm` that has what is needed.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens the device and checks its capabilities.
    ///
    /// # Errors
    /// When it is not there, not allowed, or lacks something.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|errno| {
            let cause = io::Error::from_raw_os_error(errno.errno());
            match cause.kind() {
                io::ErrorKind::NotFound => KvmError::NoDevice,
                io::ErrorKind::PermissionDenied => KvmError::Permission(cause),
                _ => KvmError::Open(cause),
            }
        })?;
        let hypervisor = Self { kvm };
        for (cap, name) in REQUIRED {
            if !hypervisor.kvm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        Ok(hypervisor)
    }

    /// What guests can be given here.
    ///
    /// # Errors
    /// When KVM does not tell the guest's CPUID.
    pub fn limits(&self) -> Result<Limits, KvmError> {
        Ok(Limits {
            max_vcpus: u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            phys_bits: self.phys_bits()?,
        })
    }

    /// Width of a guest-physical address (Intel SDM vol. 2, CPUID leaf 0x8000_0008).
    fn phys_bits(&self) -> Result<u8, KvmError> {
        const ADDRESS_SIZES: u32 = 0x8000_0008;
        /// What processors without the leaf have.
        const DEFAULT: u8 = 36;
        let cpuid = self.supported_cpuid()?;
        let leaf = cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == ADDRESS_SIZES);
        Ok(leaf.map_or(DEFAULT, |entry| entry.eax.to_le_bytes()[0]))
    }

    /// Whether guests may have the APIC timer by time stamp deadline; KVM does not report it with the other features.
    #[must_use]
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The processor features that guests can be given.
    ///
    /// # Errors
    /// When KVM does not tell them.
    pub fn supported_cpuid(&self) -> Result<kvm_bindings::CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
    }
}
