//! The devices of the machine, one file each, and the bus that finds them.
//!
//! Devices know no KVM: they raise lines that they are given, and what the guest asks of the machine itself they return
//! as a [`bus::Request`]. Their registers are served on the vCPU's own thread, their host side by the event loop.

pub mod acpi_pm;
pub mod alarm;
pub mod bus;
pub mod console;
pub mod i8042;
pub mod io_apic;
pub mod output;
pub mod panic_watch;
pub mod pvpanic;
pub mod serial;
