//! One virtual machine: its memory slots, interrupt controllers, timer, and lines into them.
#![expect(unsafe_code, reason = "memory slots name host addresses")]

use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::VcpuHandle;
use super::{Hypervisor, KvmError, failed};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::Memory;

/// Local APIC identifiers from here on need 32-bit identifiers.
const FIRST_X2APIC_ID: u32 = 255;

/// A virtual machine.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    /// Declared after `vm`, so dropped after it: the guest reaches into it.
    memory: Arc<Memory>,
    run_size: usize,
    sync_registers: bool,
}

impl Machine {
    /// Makes a machine with PIC, I/O APIC and PIT, for `cpus` virtual CPUs, with a slot for each range of `memory`.
    ///
    /// # Errors
    /// The call that failed.
    pub fn new(hypervisor: &Hypervisor, cpus: u32, memory: Arc<Memory>) -> Result<Self, KvmError> {
        let kvm = &hypervisor.kvm;
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(usize::try_from(KVM_TSS).unwrap_or(usize::MAX))
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        if cpus > FIRST_X2APIC_ID {
            let mut cap = kvm_enable_cap {
                cap: Cap::X2ApicApi as u32,
                ..Default::default()
            };
            cap.args[0] =
                u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
            vm.enable_cap(&cap)
                .map_err(failed("KVM_ENABLE_CAP of KVM_CAP_X2APIC_API"))?;
        }
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(failed("KVM_CREATE_PIT2"))?;
        let run_size = kvm
            .get_vcpu_mmap_size()
            .map_err(failed("KVM_GET_VCPU_MMAP_SIZE"))?;
        let machine = Self {
            vm,
            memory,
            run_size,
            sync_registers: kvm.check_extension(Cap::SyncRegs),
        };
        machine.add_slots()?;
        Ok(machine)
    }

    fn add_slots(&self) -> Result<(), KvmError> {
        for (index, slot) in (0..).zip(self.memory.slots()) {
            let region = kvm_userspace_memory_region {
                slot: index,
                flags: 0,
                guest_phys_addr: slot.gpa,
                memory_size: slot.len,
                userspace_addr: slot.hva,
            };
            // SAFETY: the range stays mapped while `memory` lives, which this machine and each of its vCPUs keep alive.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// The call that failed.
    pub fn add_vcpu(&self, index: u32) -> Result<VcpuHandle, KvmError> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        VcpuHandle::new(
            vcpu,
            self.run_size,
            self.sync_registers,
            Arc::clone(&self.memory),
        )
    }

    /// An event whose every write raises interrupt line `line` and lets it go: an edge.
    ///
    /// # Errors
    /// The call that failed.
    pub fn edge_line(&self, line: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(|cause| KvmError::Call {
            call: "eventfd",
            cause,
        })?;
        self.vm
            .register_irqfd(&event, line)
            .map_err(failed("KVM_IRQFD"))?;
        Ok(event)
    }

    /// Holds interrupt line `line` up or down.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_line(&self, line: u32, up: bool) -> Result<(), KvmError> {
        self.vm
            .set_irq_line(line, up)
            .map_err(failed("KVM_IRQ_LINE"))
    }
}
