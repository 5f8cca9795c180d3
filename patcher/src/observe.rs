//! Is an update still in the guest, byte for byte? Reads only; the guest may run.

use crate::addr::Gva;
use crate::apply::Applied;
use crate::guest::ReadPhys;
use crate::kernel::locate::Kernel;
use crate::plan::{Purpose, Write};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Bytes that were compared.
    pub bytes: u64,
    /// What is not as it was written: where, and how it differs.
    pub differences: Vec<(Gva, String)>,
}

/// Compares the jumps and the code of `applied` with what the kernel sees at their places. Its variables, and the tables that the kernel knows it by, may have
/// changed, so only their mapping is looked at.
#[must_use]
pub fn verify<R: ReadPhys>(guest: &R, kernel: &Kernel, applied: &Applied) -> Observed {
    let mut observed = Observed::default();
    for write in &applied.plan.writes {
        let differs = match write.purpose {
            Purpose::Mapping => continue,
            // The kernel has links of its own in the tables.
            Purpose::Publication => mapped(guest, kernel, write),
            Purpose::Arena if write.gva.0 == applied.linked.data.at => mapped(guest, kernel, write),
            Purpose::Arena | Purpose::Trampoline => {
                observed.bytes += write.bytes.len() as u64;
                let mut live = vec![0; write.bytes.len()];
                match kernel.read(guest, write.gva, &mut live) {
                    Ok(()) => difference(write.gva, &write.bytes, &live),
                    Err(error) => Some(error.to_string()),
                }
            }
        };
        observed
            .differences
            .extend(differs.map(|text| (write.gva, text)));
    }
    observed
}

/// Why the kernel does not see `write` where it was made.
fn mapped<R: ReadPhys>(guest: &R, kernel: &Kernel, write: &Write) -> Option<String> {
    match kernel.translate(guest, write.gva) {
        Ok(gpa) if gpa == write.gpa => None,
        Ok(gpa) => Some(format!("the kernel sees {gpa} here, not {}", write.gpa)),
        Err(error) => Some(error.to_string()),
    }
}

/// How `live` differs from what was written at `at`.
fn difference(at: Gva, written: &[u8], live: &[u8]) -> Option<String> {
    let first = written
        .iter()
        .zip(live)
        .position(|(written, live)| written != live)?;
    let byte = |bytes: &[u8]| bytes.get(first).copied().unwrap_or_default();
    Some(format!(
        "{:#x} holds {:02x}, {:02x} was written",
        at.0.wrapping_add(first as u64),
        byte(live),
        byte(written)
    ))
}
