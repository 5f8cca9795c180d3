//! One vCPU, as its own thread sees it: run, finish pending I/O, tell its registers.

pub mod breakpoint;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, Msrs, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use patcher::addr::Gva;
use patcher::guest::{Vcpu, VcpuState};

use self::breakpoint::DebugException;
use super::kick::Kicker;
use super::{KvmError, failed};
use crate::memory::Memory;

/// All that the kernel can put into the shared page on an exit.
pub const SYNC_ALL: u64 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as u64;

/// A vCPU for its own thread.
#[derive(Debug)]
pub struct VcpuHandle {
    fd: VcpuFd,
    kicker: Option<Kicker>,
    sync: u64,
    /// The last run came back with nothing begun and not finished.
    at_rest: bool,
    ioctls: u32,
    /// Where our breakpoint is, if there is one.
    breakpoint: Option<Gva>,
    /// Kept for as long as the guest can run.
    _memory: Arc<Memory>,
}

/// Why a vCPU came out of the guest.
#[derive(Debug)]
pub enum Exit<'a> {
    /// It was kicked, or has nothing to say: run it again if that is still wanted.
    Interrupted,
    /// `out` to a port.
    PortWrite(u16, &'a [u8]),
    /// `in` from a port: fill the bytes before the next run.
    PortRead(u16, &'a mut [u8]),
    /// A write to guest-physical memory that is not there.
    MemoryWrite(u64, &'a [u8]),
    /// A read of guest-physical memory that is not there: fill the bytes before the next run.
    MemoryRead(u64, &'a mut [u8]),
    /// It has acknowledged a level interrupt of this vector, on a machine whose I/O APIC is not KVM's.
    EndOfInterrupt(u8),
    /// A debug exception while a breakpoint is set: [`VcpuHandle::debugged`] says whose.
    Debug(DebugException),
    /// Triple fault.
    Shutdown,
    /// Anything that a sound guest never causes; the text says what.
    Broken(String),
}

/// A stopped vCPU: where it is, and what finding out has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Its registers.
    pub vcpu: Vcpu,
    /// System calls spent on stopping it, from its last return from the guest on.
    pub ioctls: u32,
}

impl VcpuHandle {
    pub(super) fn new(
        fd: VcpuFd,
        run_size: usize,
        sync_registers: bool,
        memory: Arc<Memory>,
    ) -> Result<Self, KvmError> {
        let kicker = Kicker::new(&fd, run_size)?;
        let vcpu = Self {
            fd,
            kicker: Some(kicker),
            sync: if sync_registers { SYNC_ALL } else { 0 },
            at_rest: true,
            ioctls: 0,
            breakpoint: None,
            _memory: memory,
        };
        vcpu.serve_debug_registers()?;
        Ok(vcpu)
    }

    /// Takes the controller's handle out; there is one.
    pub fn take_kicker(&mut self) -> Option<Kicker> {
        self.kicker.take()
    }

    /// Which register sets the kicker should ask for.
    #[must_use]
    pub fn sync(&self) -> u64 {
        self.sync
    }

    /// Sets the processor features.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))
    }

    /// Sets model-specific registers, all of them.
    ///
    /// # Errors
    /// The call that failed, or the first register that KVM does not know.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<(), KvmError> {
        let done = self.fd.set_msrs(msrs).map_err(failed("KVM_SET_MSRS"))?;
        match msrs.as_slice().get(done) {
            Some(left) => Err(KvmError::Call {
                call: "KVM_SET_MSRS",
                cause: io::Error::other(format!("register {:#x} is not known", left.index)),
            }),
            None => Ok(()),
        }
    }

    /// The general and the system registers.
    ///
    /// # Errors
    /// The call that failed.
    pub fn registers(&self) -> Result<(kvm_regs, kvm_sregs), KvmError> {
        Ok((
            self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
        ))
    }

    /// Sets the general and the system registers.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_registers(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))
    }

    /// The local APIC's register page.
    ///
    /// # Errors
    /// The call that failed.
    pub fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))
    }

    /// Sets the local APIC's register page.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError> {
        self.fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))
    }

    /// Runs the guest until it exits.
    ///
    /// # Errors
    /// The call that failed.
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        self.at_rest = false;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(errno) if errno.errno() == libc::EINTR => {
                self.at_rest = true;
                return Ok(Exit::Interrupted);
            }
            // A vCPU that waited for its startup message was woken.
            Err(errno) if errno.errno() == libc::EAGAIN => return Ok(Exit::Interrupted),
            Err(errno) => return Err(failed("KVM_RUN")(errno)),
        };
        Ok(match exit {
            VcpuExit::IoOut(port, bytes) => Exit::PortWrite(port, bytes),
            VcpuExit::IoIn(port, bytes) => Exit::PortRead(port, bytes),
            VcpuExit::MmioWrite(at, bytes) => Exit::MemoryWrite(at, bytes),
            VcpuExit::MmioRead(at, bytes) => Exit::MemoryRead(at, bytes),
            VcpuExit::IoapicEoi(vector) => Exit::EndOfInterrupt(vector),
            VcpuExit::Debug(debug) => Exit::Debug(DebugException::of(&debug)),
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
            VcpuExit::FailEntry(reason, cpu) => {
                Exit::Broken(format!("the processor refused to enter the guest: reason {reason:#x} on host CPU {cpu}"))
            }
            VcpuExit::InternalError => Exit::Broken(
                "KVM could not emulate an instruction; where ring 0 is interpreted that is to be expected, see `exopatch doctor`"
                    .to_owned(),
            ),
            other => Exit::Broken(format!("unexpected exit from the guest: {other:?}")),
        })
    }

    /// Whether the next run would return at once.
    pub fn is_kicked(&mut self) -> bool {
        self.fd.get_kvm_run().immediate_exit != 0
    }

    /// Withdraws a kick that has been served, before looking again at what is wanted.
    pub fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
        let run = self.fd.get_kvm_run();
        run.kvm_valid_regs = 0;
        // Bit 1 of the flags is always set (Intel SDM vol. 1, 3.4.3), so zero says: nothing was put here since.
        self.fd.sync_regs_mut().regs.rflags = 0;
        // The stores above must be visible before what is wanted is read: the kicker does it in the other order.
        fence(Ordering::SeqCst);
        self.ioctls = 0;
    }

    /// Whether the next stop needs one more run to finish what the last exit began or to bring the registers.
    fn is_settled(&mut self) -> bool {
        self.at_rest && (self.sync == 0 || self.fd.sync_regs_mut().regs.rflags != 0)
    }

    /// One run that only finishes pending I/O, or `None` when nothing is left to finish.
    ///
    /// Registers read before that are of the middle of an instruction (an `in` has not yet written its register). One
    /// instruction may exit several times: call again until `None`, serving each exit as usual.
    ///
    /// # Errors
    /// The call that failed.
    pub fn settle(&mut self) -> Result<Option<Exit<'_>>, KvmError> {
        if self.is_settled() {
            return Ok(None);
        }
        self.fd.set_kvm_immediate_exit(1);
        if self.sync != 0 {
            self.fd.set_sync_valid_reg(SyncReg::Register);
            self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            self.fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        }
        self.ioctls += 1;
        self.run().map(Some)
    }

    /// Where the vCPU is; to be called when settled.
    ///
    /// The run state is asked for first: asking lets KVM act on a startup message that has arrived.
    ///
    /// # Errors
    /// The call that failed.
    pub fn stopped(&mut self) -> Result<Stopped, KvmError> {
        let mp_state = self
            .fd
            .get_mp_state()
            .map_err(failed("KVM_GET_MP_STATE"))?
            .mp_state;
        self.ioctls += 1;
        let (regs, sregs, events) = if self.sync != 0 {
            let synced = self.fd.sync_regs();
            (synced.regs, synced.sregs, synced.events)
        } else {
            self.ioctls += 3;
            let (regs, sregs) = self.registers()?;
            let events = self
                .fd
                .get_vcpu_events()
                .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
            (regs, sregs, events)
        };
        let state = match mp_state {
            KVM_MP_STATE_RUNNABLE => VcpuState::Running,
            KVM_MP_STATE_HALTED => VcpuState::Halted,
            _ => VcpuState::Offline,
        };
        Ok(Stopped {
            vcpu: vcpu(state, &regs, &sregs, &events),
            ioctls: self.ioctls,
        })
    }

    /// Tells the guest's clock that it stood still, which also quiets the guest's watchdogs once.
    ///
    /// # Errors
    /// The call that failed. A guest that has no kvmclock (yet) is not an error.
    pub fn clock_stood_still(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            Err(errno) if errno.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL")(errno)),
            _ => Ok(()),
        }
    }
}

/// KVM's register sets as the patcher sees them.
fn vcpu(state: VcpuState, regs: &kvm_regs, sregs: &kvm_sregs, events: &kvm_vcpu_events) -> Vcpu {
    let exception = events.exception.injected | events.exception.pending;
    let other = events.interrupt.injected | events.nmi.injected | events.smi.smm;
    Vcpu {
        state,
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
        // The current privilege level is that of the stack segment (AMD APM vol. 2, 4.9.1).
        cpl: sregs.ss.dpl,
        cr0: sregs.cr0,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        idt_base: sregs.idt.base,
        gs_base: sregs.gs.base,
        event_pending: exception | other != 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use patcher::addr::Gpa;
    use patcher::guest::VcpuState;

    use super::{Exit, SYNC_ALL, VcpuHandle};
    use crate::boot::entry::{self, Entry};
    use crate::kvm::kick::Kicker;
    use crate::kvm::machine::Machine;
    use crate::kvm::{Hypervisor, KvmError};
    use crate::layout::{Layout, MIB};
    use crate::memory::Memory;

    const CODE: u64 = 0x1000;

    /// A vCPU before `code` in protected mode; none where there is no KVM at all. A KVM that interprets is good enough.
    fn vcpu(code: &[u8], sync: bool) -> Option<(VcpuHandle, Kicker)> {
        let hypervisor = match Hypervisor::open() {
            Err(KvmError::NoDevice | KvmError::Permission(_)) => return None,
            other => other.expect("KVM"),
        };
        let layout = Layout::new(2 * MIB, 36).expect("a layout");
        let memory = Arc::new(Memory::new(layout).expect("memory"));
        memory.write(Gpa(CODE), code).expect("code");
        let machine = Machine::new(&hypervisor, 1, memory).expect("a machine");
        let mut vcpu = machine.add_vcpu(0).expect("a vCPU");
        if !sync {
            vcpu.sync = 0;
        }
        let (_, mut sregs) = vcpu.registers().expect("registers");
        let entry = Entry::Pvh { rip: CODE };
        let regs = entry::prepare(entry, &machine.memory(), &mut sregs).expect("an entry");
        vcpu.set_registers(&regs, &sregs).expect("registers");
        vcpu.clear_kick();
        let kicker = vcpu.take_kicker().expect("a kicker");
        Some((vcpu, kicker))
    }

    /// `in al, 0xe9`, then a jump to itself.
    const READ_PORT: [u8; 4] = [0xe4, 0xe9, 0xeb, 0xfe];

    fn check_pending_read(sync: bool) {
        let Some((mut vcpu, kicker)) = vcpu(&READ_PORT, sync) else {
            return;
        };
        match vcpu.run().expect("a run") {
            Exit::PortRead(0xe9, data) => data.fill(0x5a),
            other => panic!("not a read of the port: {other:?}"),
        }
        kicker.interrupt(vcpu.sync());
        while vcpu.settle().expect("settled").is_some() {}
        let stopped = vcpu.stopped().expect("registers");
        assert_eq!(stopped.vcpu.state, VcpuState::Running);
        assert_eq!(stopped.vcpu.rip, CODE + 2);
        assert_eq!(stopped.vcpu.gpr[0] & 0xff, 0x5a);
        assert_eq!(stopped.vcpu.cpl, 0);
        // One run to finish the read, one question for the run state; registers cost nothing more when they are synced.
        assert_eq!(stopped.ioctls, if sync { 2 } else { 5 });
    }

    #[test]
    fn registers_are_read_only_after_pending_input_is_complete() {
        check_pending_read(true);
        check_pending_read(false);
    }

    #[test]
    fn a_kick_before_the_run_is_not_lost_and_brings_the_registers() {
        let Some((mut vcpu, kicker)) = vcpu(&[0xeb, 0xfe], true) else {
            return;
        };
        kicker.interrupt(SYNC_ALL);
        assert!(matches!(vcpu.run().expect("a run"), Exit::Interrupted));
        assert!(vcpu.is_kicked());
        assert!(vcpu.settle().expect("settled").is_none());
        let stopped = vcpu.stopped().expect("registers");
        assert_eq!((stopped.vcpu.rip, stopped.ioctls), (CODE, 1));
        vcpu.clear_kick();
        assert!(!vcpu.is_kicked());
        // What the page still holds is of an earlier stop: it must be asked for again.
        assert!(vcpu.settle().expect("a run").is_some());
    }
}
