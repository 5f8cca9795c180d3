//! A machine of a few instructions, to try this host's KVM with.

use std::sync::Arc;

use patcher::addr::{Gpa, Gva};

use crate::boot::entry::{self, Entry};
use crate::kvm::machine::Machine;
use crate::kvm::vcpu::{Exit, VcpuHandle};
use crate::kvm::{Hypervisor, KvmError};
use crate::layout::{Layout, MIB};
use crate::memory::{Memory, MemoryError};

/// Where the instructions are: beyond the descriptor table, below everything else.
const CODE: u64 = 0x1000;

/// Why the instructions did not run.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its memory cannot be written.
    #[error(transparent)]
    Guest(#[from] patcher::guest::GuestError),
    /// Guests have hardly any address space.
    #[error("no room for 2 MiB of memory in the guest's address space")]
    Layout,
    /// It came out of the guest in another way than it was to.
    #[error("{0}")]
    Exit(String),
}

/// A vCPU before `code`, in protected mode at ring 0. The machine is held by the vCPU.
///
/// # Errors
/// When there is no such machine to be had.
pub fn vcpu_before(hypervisor: &Hypervisor, code: &[u8]) -> Result<VcpuHandle, TrialError> {
    let phys_bits = hypervisor.limits()?.phys_bits;
    let layout = Layout::new(2 * MIB, phys_bits).ok_or(TrialError::Layout)?;
    let memory = Arc::new(Memory::new(layout)?);
    let machine = Machine::new(hypervisor, 1, Arc::clone(&memory))?;
    memory.write(Gpa(CODE), code)?;
    let vcpu = machine.add_vcpu(0)?;
    let (_, mut sregs) = vcpu.registers()?;
    let regs = entry::prepare(Entry::Pvh { rip: CODE }, &memory, &mut sregs)?;
    vcpu.set_registers(&regs, &sregs)?;
    Ok(vcpu)
}

/// Whether a breakpoint stops a guest here, once each time: some emulated processors run past it, and a KVM that interprets the guest
/// never gets past it, as it does not heed the resume flag.
///
/// # Errors
/// When that cannot be tried.
pub fn breakpoints_work() -> Result<bool, TrialError> {
    /// `nop`, then `out 0x80, al`.
    const CODE_WITH_PLACE: [u8; 3] = [0x90, 0xe6, 0x80];
    const PLACE: Gva = Gva(CODE);
    let mut stopped = false;
    let mut vcpu = vcpu_before(&Hypervisor::open()?, &CODE_WITH_PLACE)?;
    vcpu.set_breakpoint(Some(PLACE))?;
    loop {
        match vcpu.run()? {
            Exit::Debug(exception) if exception.at == PLACE && !stopped => {
                stopped = vcpu.debugged(exception)?;
            }
            Exit::Debug(_) => return Ok(false),
            Exit::PortWrite(0x80, _) => return Ok(stopped),
            Exit::Interrupted => {}
            other => return Err(TrialError::Exit(format!("{other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;

    use super::{CODE, breakpoints_work, vcpu_before};
    use crate::kvm::vcpu::Exit;
    use crate::kvm::{Hypervisor, KvmError};

    /// `nop`, `out 0x80, al`, and back to the `nop`.
    const LOOP: [u8; 5] = [0x90, 0xe6, 0x80, 0xeb, 0xfb];

    #[test]
    fn a_breakpoint_stops_before_its_instruction_each_time_until_it_is_taken_away() {
        let hypervisor = match Hypervisor::open() {
            Err(KvmError::NoDevice | KvmError::Permission(_)) => return,
            other => other.expect("KVM"),
        };
        if !breakpoints_work().expect("a trial") {
            return;
        }
        let mut vcpu = vcpu_before(&hypervisor, &LOOP).expect("a vCPU");
        let at = Gva(CODE);
        assert!(vcpu.set_breakpoint(Some(at)).expect("a breakpoint"));
        for _ in 0..3 {
            let exception = match vcpu.run().expect("a run") {
                Exit::Debug(exception) => exception,
                other => panic!("not at the breakpoint: {other:?}"),
            };
            assert_eq!(exception.at, at);
            assert!(vcpu.debugged(exception).expect("a vCPU that goes on"));
            assert!(matches!(vcpu.run(), Ok(Exit::PortWrite(0x80, _))));
        }
        assert!(vcpu.set_breakpoint(None).expect("none"));
        for _ in 0..3 {
            assert!(matches!(vcpu.run(), Ok(Exit::PortWrite(0x80, _))));
        }
    }
}
