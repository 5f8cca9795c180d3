//! One virtual machine: its memory slots, interrupt controllers, timer, and lines into them.
#![expect(unsafe_code, reason = "memory slots name host addresses")]

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::VcpuHandle;
use super::{Hypervisor, KvmError, failed};
use crate::devices::io_apic::{LINES, Message};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS, SHORT_IDS};
use crate::memory::Memory;

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
    /// Makes a machine for `cpus` virtual CPUs, with a slot for each range of `memory`: with PIC, I/O APIC and PIT, or with none of the three
    /// when the vCPUs are more than [`SHORT_IDS`], whom KVM's I/O APIC cannot reach.
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
        if cpus > SHORT_IDS {
            local_apics_alone(&vm)?;
        } else {
            all_controllers(&vm)?;
        }
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

    /// Says which message each line sends from now on: of a machine whose I/O APIC is not KVM's.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_routes(&self, routes: &[Option<Message>; LINES]) -> Result<(), KvmError> {
        let entries: Vec<kvm_irq_routing_entry> = (0..)
            .zip(routes)
            .filter_map(|(line, message)| message.map(|message| route(line, message)))
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::Call {
            call: "KVM_SET_GSI_ROUTING",
            cause: io::ErrorKind::InvalidInput.into(),
        })?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(failed("KVM_SET_GSI_ROUTING"))
    }

    /// Sends an interrupt message.
    ///
    /// # Errors
    /// The call that failed.
    pub fn send(&self, message: Message) -> Result<(), KvmError> {
        let [low, high] = address(message);
        let message = kvm_msi {
            address_lo: low,
            address_hi: high,
            data: message.data,
            ..Default::default()
        };
        let sent = self.vm.signal_msi(message);
        sent.map(drop).map_err(failed("KVM_SIGNAL_MSI"))
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

/// Gives `vm` what a PC has: two 8259s, an I/O APIC and a timer chip.
fn all_controllers(vm: &VmFd) -> Result<(), KvmError> {
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    let timer = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(timer).map_err(failed("KVM_CREATE_PIT2"))
}

/// Gives `vm` local APICs with 32-bit identifiers and nothing else; lines are routed as messages.
fn local_apics_alone(vm: &VmFd) -> Result<(), KvmError> {
    let ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(
        vm,
        Cap::X2ApicApi,
        ids.into(),
        "KVM_ENABLE_CAP of KVM_CAP_X2APIC_API",
    )?;
    enable(
        vm,
        Cap::SplitIrqchip,
        LINES as u64,
        "KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP",
    )
}

fn enable(vm: &VmFd, cap: Cap, argument: u64, call: &'static str) -> Result<(), KvmError> {
    let mut wanted = kvm_enable_cap {
        cap: cap as u32,
        ..Default::default()
    };
    wanted.args[0] = argument;
    vm.enable_cap(&wanted).map_err(failed(call))
}

/// The lower and the upper half of where a message goes.
fn address(message: Message) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

fn route(line: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: line,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [low, high] = address(message);
    entry.u.msi.address_lo = low;
    entry.u.msi.address_hi = high;
    entry.u.msi.data = message.data;
    entry
}
