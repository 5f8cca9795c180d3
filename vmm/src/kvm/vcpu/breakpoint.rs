//! A hardware breakpoint of ours on a vCPU, of which the guest holds nothing: neither its memory nor its debug registers.
//!
//! KVM loads the processor's debug registers with ours while the guest runs (Linux Documentation/virt/kvm/api.rst,
//! `KVM_SET_GUEST_DEBUG`). Meanwhile every debug exception comes to us first, and those that are the guest's own (its single steps) are given
//! back; but breakpoints that the guest has set itself would not work, so that none of ours is set while it has any.
//!
//! A guest that touches its debug registers is usually given the processor's own until it next leaves. If it leaves for us in between
//! and ours are loaded, KVM takes them for the guest's when it comes back (`KVM_DEBUGREG_WONT_EXIT` in kernel `arch/x86/kvm/x86.c`), and the guest has
//! a breakpoint that it never set. So debugging is on from a vCPU's beginning: then each of these accesses is KVM's to serve, and
//! costs an exit that stays in the host's kernel.
//!
//! KVM makes steps of its own where it waits for the end of an NMI, and while debugging is on their exceptions come to us too (`nmi_singlestep` in kernel
//! `arch/x86/kvm/svm/svm.c`). Such a step comes while an NMI waits that could not be injected, to a guest whose flags do not say that it steps: KVM
//! has taken its own flag away by then.
//!
//! An instruction breakpoint is a fault: the instruction has not been executed, and runs when the resume flag is set
//! (Intel SDM vol. 3, 18.3.1.1; AMD APM vol. 2, 13.1.4).

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, kvm_debug_exit_arch, kvm_guest_debug, kvm_guest_debug_arch,
};
use patcher::addr::Gva;

use super::VcpuHandle;
use crate::kvm::{KvmError, failed};

/// In DR7: breakpoint 0 is on, for instructions, in every task; and the bit that is always set.
const FIRST_ON: u64 = 1 << 1 | 1 << 10;
/// In DR7: any breakpoint is on.
const ANY_ON: u64 = 0xff;
/// In DR6: breakpoint 0 was come to.
const AT_FIRST: u64 = 1 << 0;
/// In DR6: which breakpoints were come to.
const AT_ANY: u64 = 0xf;
/// In DR6: a debug register was touched that is guarded, a single step was made, the task was switched.
const OTHER_CAUSES: u64 = 1 << 13 | SINGLE_STEP | 1 << 15;
const SINGLE_STEP: u64 = 1 << 14;
/// In the flags: the next instruction runs whatever breakpoint is on it.
const RESUME: u64 = 1 << 16;

/// In the flags: an exception comes behind the next instruction.
const STEPS: u64 = 1 << 8;

/// A debug exception that the guest did not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugException {
    /// The instruction that it was raised before.
    pub at: Gva,
    /// Its cause, as DR6 tells it.
    cause: u64,
}

impl DebugException {
    pub(super) fn of(exit: &kvm_debug_exit_arch) -> Self {
        Self {
            at: Gva(exit.pc),
            cause: exit.dr6,
        }
    }
}

impl VcpuHandle {
    /// Turns debugging on, without a breakpoint. Before the guest first runs.
    ///
    /// # Errors
    /// The call that failed.
    pub(super) fn serve_debug_registers(&self) -> Result<(), KvmError> {
        self.set_guest_debug(None, 0)
    }

    /// Sets the breakpoint before the instruction at `wanted`, or takes it away.
    /// Returns false, with none there, when the guest has breakpoints of its own: those that it has set since ours was there included.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_breakpoint(&mut self, wanted: Option<Gva>) -> Result<bool, KvmError> {
        let in_use = wanted.is_some() && self.guest_has_breakpoints()?;
        let possible = wanted.filter(|_| !in_use);
        if possible != self.breakpoint {
            self.set_guest_debug(possible, 0)?;
            self.breakpoint = possible;
        }
        Ok(!in_use)
    }

    /// Sees to it that a vCPU with a debug exception runs on as if there were no breakpoint. Returns whether it was at ours.
    ///
    /// # Errors
    /// The call that failed.
    pub fn debugged(&mut self, exception: DebugException) -> Result<bool, KvmError> {
        let mut regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let mut cause = exception.cause;
        if cause & SINGLE_STEP != 0 && regs.rflags & STEPS == 0 && self.nmi_waits()? {
            cause &= !SINGLE_STEP;
        }
        let ours = self.breakpoint == Some(exception.at)
            && cause & AT_FIRST != 0
            // The guest hears of its step first, and comes to the breakpoint after that.
            && cause & SINGLE_STEP == 0;
        if ours {
            regs.rflags |= RESUME;
            self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
        } else if cause & (AT_ANY | OTHER_CAUSES) != 0 {
            self.give_back(cause)?;
        }
        Ok(ours)
    }

    /// Whether there is an NMI for the guest that it has not got yet.
    fn nmi_waits(&self) -> Result<bool, KvmError> {
        let events = self.fd.get_vcpu_events();
        let events = events.map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(events.nmi.pending != 0)
    }

    /// Has each run from here on execute one instruction of the guest, and no interrupt: until the next [`VcpuHandle::set_breakpoint`], which
    /// finds none there. What the guest saves of its flags meanwhile says that it steps.
    ///
    /// # Errors
    /// The call that failed.
    pub fn begin_steps(&mut self) -> Result<(), KvmError> {
        self.breakpoint = None;
        self.set_guest_debug(None, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ)
    }

    /// Ends that.
    ///
    /// # Errors
    /// The call that failed.
    pub fn end_steps(&mut self) -> Result<(), KvmError> {
        self.set_guest_debug(None, 0)
    }

    /// Whether the guest has breakpoints of its own.
    ///
    /// # Errors
    /// The call that failed.
    pub fn guest_has_breakpoints(&self) -> Result<bool, KvmError> {
        let own = self.fd.get_debug_regs();
        let own = own.map_err(failed("KVM_GET_DEBUGREGS"))?;
        Ok(own.dr7 & ANY_ON != 0)
    }

    /// Raises an exception in the guest, with its cause in the guest's own DR6.
    fn give_back(&mut self, cause: u64) -> Result<(), KvmError> {
        let own = self.fd.get_debug_regs();
        let mut own = own.map_err(failed("KVM_GET_DEBUGREGS"))?;
        own.dr6 = own.dr6 & !(AT_ANY | OTHER_CAUSES) | cause & OTHER_CAUSES;
        self.fd
            .set_debug_regs(&own)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.set_guest_debug(self.breakpoint, KVM_GUESTDBG_INJECT_DB)
    }

    fn set_guest_debug(&self, at: Option<Gva>, more: u32) -> Result<(), KvmError> {
        let mut control = KVM_GUESTDBG_ENABLE | more;
        let mut debugreg = [0; 8];
        if let Some(at) = at {
            control |= KVM_GUESTDBG_USE_HW_BP;
            (debugreg[0], debugreg[7]) = (at.0, FIRST_ON);
        }
        let wanted = kvm_guest_debug {
            control,
            pad: 0,
            arch: kvm_guest_debug_arch { debugreg },
        };
        self.fd
            .set_guest_debug(&wanted)
            .map_err(failed("KVM_SET_GUEST_DEBUG"))
    }
}
