//! ACPI tables: which processors, which interrupt controllers, which devices, how to power off (ACPI 6.5).
//!
//! Everything is declared as it is: no keyboard, no VGA, no CMOS clock (the guest's clock is kvmclock). The system is always
//! in ACPI mode; the power button is the fixed one.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use patcher::addr::Gpa;
use patcher::guest::GuestError;

use crate::devices::{acpi_pm, pvpanic, serial};
use crate::layout::{ACPI_TABLES, ACPI_TABLES_END, IO_APIC, LOCAL_APIC, SHORT_IDS};
use crate::memory::Memory;

const OEM: [u8; 6] = *b"EXOPAT";
const OEM_TABLE: [u8; 8] = *b"EXOPATCH";
const OEM_REVISION: u32 = 1;

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// So many processors that their table leaves its range.
    #[error("ACPI tables of {cpus} processors take more than the {room} bytes there are for them")]
    Room {
        /// Processors.
        cpus: u32,
        /// Bytes.
        room: u64,
    },
    /// Guest memory is not where the layout says.
    #[error(transparent)]
    Memory(#[from] GuestError),
}

/// Writes the tables of a machine with `cpus` processors; the RSDP is at [`ACPI_TABLES`].
///
/// # Errors
/// When they do not fit.
pub fn write(memory: &Memory, cpus: u32) -> Result<(), AcpiError> {
    let mut writer = Writer {
        memory,
        // Behind the RSDP, on the 64-byte boundary that the FACS wants (5.2.10).
        next: ACPI_TABLES + 64,
        cpus,
    };
    let facs = writer.put(&bytes(&FACS::new()))?;
    let dsdt = writer.put(dsdt().as_slice())?;
    let fadt = writer.put(&bytes(&fadt(facs, dsdt)))?;
    let madt = writer.put(madt(cpus).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.put(&bytes(&xsdt))?;
    memory.write(Gpa(ACPI_TABLES), &bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(())
}

struct Writer<'m> {
    memory: &'m Memory,
    next: u64,
    cpus: u32,
}

impl Writer<'_> {
    /// Writes a table behind the others and returns where.
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > ACPI_TABLES_END {
            return Err(AcpiError::Room {
                cpus: self.cpus,
                room: ACPI_TABLES_END - ACPI_TABLES,
            });
        }
        self.memory.write(Gpa(at), table)?;
        self.next = end.next_multiple_of(16);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    /// Boot flags (5.2.9.3): there is no VGA to probe, and no CMOS clock.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    /// Latencies that say: no such state (5.2.9).
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;
    let port = |address: u16, bits: u8, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::try_from(acpi_pm::SCI).unwrap_or_default().into();
    fadt.pm1a_evt_blk = u32::from(acpi_pm::PORT).into();
    fadt.pm1a_cnt_blk = u32::from(acpi_pm::CONTROL_PORT).into();
    fadt.pm1_evt_len = acpi_pm::EVENT_LEN;
    fadt.pm1_cnt_len = acpi_pm::CONTROL_LEN;
    fadt.x_pm1a_evt_blk = port(
        acpi_pm::PORT,
        acpi_pm::EVENT_LEN * 8,
        AccessSize::WordAccess,
    );
    fadt.x_pm1a_cnt_blk = port(
        acpi_pm::CONTROL_PORT,
        acpi_pm::CONTROL_LEN * 8,
        AccessSize::WordAccess,
    );
    fadt.reset_reg = port(acpi_pm::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.finalize()
}

/// Processors and interrupt controllers (5.2.12). Identifiers from 255 on need the x2APIC form.
fn madt(cpus: u32) -> Sdt {
    const HEADER: u32 = 36;
    const REVISION: u8 = 5;
    /// There is a pair of 8259s too.
    const PC_AT_COMPATIBLE: u32 = 1;
    const NO_8259: u32 = 0;
    const ENABLED: u32 = 1;
    /// Interrupt source override flags: active high, level.
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
    let mut table = Sdt::new(*b"APIC", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    let flags = if cpus > SHORT_IDS {
        NO_8259
    } else {
        PC_AT_COMPATIBLE
    };
    body.extend(flags.to_le_bytes());
    for id in 0..cpus {
        match u8::try_from(id) {
            Ok(id) if id < u8::MAX => {
                body.extend([0, 8, id, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                body.extend([9, 16, 0, 0]);
                body.extend(id.to_le_bytes());
                body.extend(ENABLED.to_le_bytes());
                body.extend(id.to_le_bytes());
            }
        }
    }
    body.extend([1, 12, 0, 0]);
    body.extend(IO_APIC.to_le_bytes());
    body.extend(0_u32.to_le_bytes());
    // Without an override the SCI would be taken as active low.
    body.extend([2, 10, 0, acpi_pm::SCI.to_le_bytes()[0]]);
    body.extend(acpi_pm::SCI.to_le_bytes());
    body.extend(ACTIVE_HIGH_LEVEL.to_le_bytes());
    table.append_slice(&body);
    table
}

/// Devices and the way to soft off.
fn dsdt() -> Sdt {
    const HEADER: u32 = 36;
    const REVISION: u8 = 2;
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let com1 = bytes(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(serial::PORT, serial::PORT, 1, serial::PORTS),
                    &Interrupt::new(true, true, false, false, serial::LINE),
                ]),
            ),
        ],
    ));
    let panic = bytes(&Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1)]),
            ),
        ],
    ));
    table.append_slice(&Scope::raw(Path::new("_SB_"), [com1, panic].concat()));
    let s5 = acpi_pm::SLEEP_TYPE_S5;
    table.append_slice(&bytes(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&s5, &s5, &0_u8, &0_u8]),
    )));
    table
}

#[cfg(test)]
mod tests {
    use super::{dsdt, madt};

    fn check(table: &[u8], signature: &[u8; 4]) {
        assert_eq!(&table[..4], signature);
        let len = u32::from_le_bytes([table[4], table[5], table[6], table[7]]);
        assert_eq!(len as usize, table.len());
        let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum");
    }

    #[test]
    fn tables_have_their_length_and_checksum() {
        check(dsdt().as_slice(), b"DSDT");
        check(madt(4).as_slice(), b"APIC");
    }

    #[test]
    fn processors_beyond_255_are_declared_by_x2apic_entries() {
        let count = |cpus| {
            let table = madt(cpus);
            let mut rest = &table.as_slice()[44..];
            let (mut local, mut x2) = (0, 0);
            while let [kind, len, ..] = *rest {
                local += u32::from(kind == 0);
                x2 += u32::from(kind == 9);
                rest = &rest[usize::from(len)..];
            }
            (local, x2)
        };
        assert_eq!(count(1), (1, 0));
        assert_eq!(count(255), (255, 0));
        assert_eq!(count(300), (255, 45));
    }
}
