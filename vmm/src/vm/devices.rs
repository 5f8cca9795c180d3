//! The devices of one machine, connected to its buses, its lines and its console.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::gate::Gate;
use super::start::StartError;
use crate::config::Console;
use crate::devices::acpi_pm::{self, AcpiPm};
use crate::devices::bus::Bus;
use crate::devices::console::{ConsoleLoop, Host, Parts, Quit};
use crate::devices::i8042::{self, I8042};
use crate::devices::io_apic::{self, IoApic, LINES, Message, Outlet};
use crate::devices::pvpanic::{self, PvPanic};
use crate::devices::serial::{self, SerialPort};
use crate::kvm::machine::Machine;
use crate::layout::{IO_APIC, SHORT_IDS};

/// What the machine keeps of its devices.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) ports: Bus,
    pub(super) memory: Bus,
    pub(super) pm: Arc<Mutex<AcpiPm>>,
    pub(super) serial: Arc<Mutex<SerialPort>>,
    pub(super) pty: Option<PathBuf>,
    pub(super) gate: Arc<Gate>,
    /// Where KVM has none that reaches all vCPUs.
    io_apic: Option<Arc<Mutex<IoApic>>>,
}

impl Devices {
    /// A vCPU has acknowledged the level interrupt `vector`.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        if let Some(chip) = &self.io_apic {
            let mut chip = chip.lock().unwrap_or_else(PoisonError::into_inner);
            chip.end_of_interrupt(vector);
        }
    }
}

/// Connects all devices; what the event loop serves is returned beside them. The gate is shut until the guest runs.
pub(super) fn connect(
    machine: &Arc<Machine>,
    cpus: u32,
    console: &Console,
    quit: Quit,
) -> Result<(Devices, ConsoleLoop), StartError> {
    let host = Host::open(console).map_err(StartError::Console)?;
    let pty = host.pty.clone();
    let gate = Arc::new(Gate::new()?);
    gate.shut(Instant::now());
    let line = machine.edge_line(serial::LINE)?;
    let Parts {
        port,
        host: console,
    } = ConsoleLoop::connect(host, line, Arc::clone(&gate), quit)?;
    let mut memory = Bus::default();
    let io_apic = if cpus > SHORT_IDS {
        let chip = Arc::new(Mutex::new(IoApic::new(Box::new(ToKvm(Arc::clone(
            machine,
        ))))));
        let at = u64::from(IO_APIC);
        memory.add(at..at + io_apic::SIZE, chip.clone())?;
        Some(chip)
    } else {
        None
    };
    let pm = Arc::new(Mutex::new(power_management(machine, io_apic.clone())));
    let mut ports = Bus::default();
    let com1 = u64::from(serial::PORT);
    ports.add(com1..com1 + u64::from(serial::PORTS), port.clone())?;
    let keyboard = Arc::new(Mutex::new(I8042));
    ports.add(i8042::PORT..i8042::PORT + i8042::PORTS, keyboard)?;
    let panic = u64::from(pvpanic::PORT);
    ports.add(panic..panic + 1, Arc::new(Mutex::new(PvPanic)))?;
    let power = u64::from(acpi_pm::PORT);
    ports.add(power..power + acpi_pm::PORTS, pm.clone())?;
    let devices = Devices {
        ports,
        memory,
        pm,
        serial: port,
        pty,
        gate,
        io_apic,
    };
    Ok((devices, console))
}

fn power_management(machine: &Arc<Machine>, io_apic: Option<Arc<Mutex<IoApic>>>) -> AcpiPm {
    let machine = Arc::clone(machine);
    AcpiPm::new(Box::new(move |up| {
        if let Some(chip) = &io_apic {
            let mut chip = chip.lock().unwrap_or_else(PoisonError::into_inner);
            chip.set_line(acpi_pm::SCI as usize, up);
        } else if let Err(error) = machine.set_line(acpi_pm::SCI, up) {
            tracing::error!(%error, "the power management interrupt could not be raised");
        }
    }))
}

/// An I/O APIC's messages, by way of KVM.
struct ToKvm(Arc<Machine>);

impl Outlet for ToKvm {
    fn routes(&self, routes: &[Option<Message>; LINES]) {
        if let Err(error) = self.0.set_routes(routes) {
            tracing::error!(%error, "interrupt lines could not be routed");
        }
    }

    fn send(&self, message: Message) {
        if let Err(error) = self.0.send(message) {
            tracing::error!(%error, ?message, "an interrupt could not be sent");
        }
    }
}
