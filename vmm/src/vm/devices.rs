//! The devices of one machine, connected to its buses, its lines and its console.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::gate::Gate;
use super::start::StartError;
use crate::config::Console;
use crate::devices::acpi_pm::{self, AcpiPm};
use crate::devices::bus::Bus;
use crate::devices::console::{ConsoleLoop, Host, Parts, Quit};
use crate::devices::i8042::{self, I8042};
use crate::devices::pvpanic::{self, PvPanic};
use crate::devices::serial::{self, SerialPort};
use crate::kvm::machine::Machine;

/// What the machine keeps of its devices.
#[derive(Debug)]
pub(super) struct Devices {
    pub(super) ports: Bus,
    /// Nothing is there yet: what the guest reads outside its memory is all ones.
    pub(super) memory: Bus,
    pub(super) pm: Arc<Mutex<AcpiPm>>,
    pub(super) serial: Arc<Mutex<SerialPort>>,
    pub(super) pty: Option<PathBuf>,
    pub(super) gate: Arc<Gate>,
}

/// Connects all devices; what the event loop serves is returned beside them. The gate is shut until the guest runs.
pub(super) fn connect(
    machine: &Arc<Machine>,
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
    let pm = Arc::new(Mutex::new(power_management(machine)));
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
        memory: Bus::default(),
        pm,
        serial: port,
        pty,
        gate,
    };
    Ok((devices, console))
}

fn power_management(machine: &Arc<Machine>) -> AcpiPm {
    let machine = Arc::clone(machine);
    AcpiPm::new(Box::new(move |up| {
        if let Err(error) = machine.set_line(acpi_pm::SCI, up) {
            tracing::error!(%error, "the power management interrupt could not be raised");
        }
    }))
}
