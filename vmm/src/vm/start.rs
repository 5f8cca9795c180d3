//! Putting a machine together and letting it go.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use super::breakpoint::Breakpoint;
use super::event_loop::{self, Signals, Subscriber};
use super::pause::Holds;
use super::rendezvous::Rendezvous;
use super::{Ending, Inner, Vm, devices, vcpu};
use crate::boot::acpi::{self, AcpiError};
use crate::boot::cpuid::{self, TooManyLeaves};
use crate::boot::entry::{self, Entry};
use crate::boot::load::{self, LoadError};
use crate::boot::msr::{self, TooManyMsrs};
use crate::config::Config;
use crate::devices::bus::Overlap;
use crate::devices::console::Quit;
use crate::end::EndReason;
use crate::events::{EventKind, Events};
use crate::kvm::kick::{self, Kicker};
use crate::kvm::machine::Machine;
use crate::kvm::vcpu::VcpuHandle;
use crate::kvm::{Hypervisor, KvmError};
use crate::layout::Layout;
use crate::memory::{Memory, MemoryError};
use crate::signals::EndingSignals;

/// A vCPU thread serves exits and writes logs; it never recurses.
const VCPU_STACK: usize = 256 * 1024;

/// Why a machine could not be started. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or boot parameters.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] TooManyLeaves),
    /// Model-specific registers.
    #[error(transparent)]
    Msr(#[from] TooManyMsrs),
    /// Low memory for the entry state.
    #[error(transparent)]
    Entry(#[from] patcher::guest::GuestError),
    /// Device addresses.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// The configuration is not for this machine.
    #[error("{memory} bytes of memory do not fit the guest's {phys_bits} bits of physical address")]
    AddressWidth {
        /// RAM asked for.
        memory: u64,
        /// What guests have here.
        phys_bits: u8,
    },
    /// The console.
    #[error("the console cannot be connected: {0}")]
    Console(#[source] io::Error),
    /// Threads, events.
    #[error("the host gave no thread or event: {0}")]
    Host(#[from] io::Error),
}

impl Vm {
    /// Starts a machine. With `signals`, those end it.
    ///
    /// # Errors
    /// When any part of it cannot be had; nothing is left of the others then.
    pub fn start(
        hypervisor: &Hypervisor,
        config: Config,
        signals: Option<EndingSignals>,
    ) -> Result<Self, StartError> {
        let events = Arc::new(Events::new());
        kick::install_handler()?;
        let (machine, mut vcpus) = hardware(hypervisor, &config)?;
        let to_end: Arc<OnceLock<Weak<Inner>>> = Arc::default();
        let (devices, console) =
            devices::connect(&machine, config.cpus, &config.console, quit(&to_end))?;
        let stop_loop = EventFd::new(libc::EFD_NONBLOCK)?;
        let inner = Arc::new(Inner {
            rendezvous: Rendezvous::new(vcpus.len()),
            breakpoint: Breakpoint::new(vcpus.len()),
            config,
            events,
            memory: machine.memory(),
            kickers: vcpus.iter_mut().filter_map(kicker).collect(),
            threads: OnceLock::new(),
            holds: Mutex::new(Holds::default()),
            devices,
            end: Mutex::new(Ending::default()),
            ended: Condvar::new(),
            stop_loop: stop_loop.try_clone()?,
            patcher_at_work: AtomicBool::new(false),
        });
        to_end.get_or_init(|| Arc::downgrade(&inner));
        let mut subscribers: Vec<Subscriber> = vec![Box::new(console)];
        if let Some(signals) = signals {
            subscribers.push(Box::new(Signals {
                signals,
                machine: Arc::downgrade(&inner),
            }));
        }
        event_loop::spawn(subscribers, stop_loop)?;
        tracing::debug!(after = ?inner.events.elapsed(), "the machine is put together");
        Self::go(inner, vcpus)
    }

    /// Makes the vCPU threads, and lets them run when all are there.
    fn go(inner: Arc<Inner>, vcpus: Vec<VcpuHandle>) -> Result<Self, StartError> {
        let mut threads = Vec::new();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&inner);
            let spawned = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(VCPU_STACK)
                .spawn(move || vcpu::thread(&shared, vcpu, index));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    inner.rendezvous.exit(|_| {});
                    drop(inner.stop_loop.write(1));
                    return Err(error.into());
                }
            }
        }
        drop(inner.threads.set(threads));
        inner.events.publish(EventKind::Started);
        inner.rendezvous.resume(false);
        inner.devices.gate.open();
        Ok(Self(inner))
    }
}

/// Ends the machine once there is one.
fn quit(machine: &Arc<OnceLock<Weak<Inner>>>) -> Quit {
    let machine = Arc::clone(machine);
    Box::new(move |by| {
        if let Some(machine) = machine.get().and_then(Weak::upgrade) {
            machine.end(EndReason::Killed(by.to_owned()));
        }
    })
}

fn kicker(vcpu: &mut VcpuHandle) -> Option<(Kicker, u64)> {
    let sync = vcpu.sync();
    vcpu.take_kicker().map(|kicker| (kicker, sync))
}

/// Memory with kernel and tables in it, and the vCPUs before the kernel's entry.
fn hardware(
    hypervisor: &Hypervisor,
    config: &Config,
) -> Result<(Arc<Machine>, Vec<VcpuHandle>), StartError> {
    let phys_bits = hypervisor.limits()?.phys_bits;
    let layout = Layout::new(config.memory, phys_bits).ok_or(StartError::AddressWidth {
        memory: config.memory,
        phys_bits,
    })?;
    let memory = Arc::new(Memory::new(layout)?);
    let machine = Arc::new(Machine::new(hypervisor, config.cpus, Arc::clone(&memory))?);
    let entry = load::load(config, &memory)?;
    acpi::write(&memory, config.cpus)?;
    let vcpus = make_vcpus(hypervisor, &machine, entry, config.cpus)?;
    Ok((machine, vcpus))
}

/// Makes the vCPUs; the first stands at the kernel's entry, the others wait for their startup message.
fn make_vcpus(
    hypervisor: &Hypervisor,
    machine: &Machine,
    entry: Entry,
    count: u32,
) -> Result<Vec<VcpuHandle>, StartError> {
    let supported = hypervisor.supported_cpuid()?;
    let tsc_deadline = hypervisor.has_tsc_deadline();
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = machine.add_vcpu(index)?;
        vcpu.set_cpuid(&cpuid::of_vcpu(&supported, index, count, tsc_deadline)?)?;
        vcpu.set_msrs(&msr::initial(index, count)?)?;
        let mut lapic = vcpu.lapic()?;
        msr::connect_pins(&mut lapic, count);
        vcpu.set_lapic(&lapic)?;
        if index == 0 {
            let (_, mut sregs) = vcpu.registers()?;
            let regs = entry::prepare(entry, &machine.memory(), &mut sregs)?;
            vcpu.set_registers(&regs, &sregs)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
