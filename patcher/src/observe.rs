//! Is an update still in the guest, byte for byte? Reads only; the guest may run.

use std::sync::Arc;

use crate::addr::Gva;
use crate::apply::Holdings;
use crate::apply::handlers::Made;
use crate::edition::list::UpdateId;
use crate::guest::ReadPhys;
use crate::kernel::locate::Kernel;
use crate::plan::Purpose;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Bytes that were compared.
    pub bytes: u64,
    /// What is not as it was written: where, and how it differs.
    pub differences: Vec<(Gva, String)>,
}

/// Compares the code of an update with what the kernel sees at its place, and the jumps of the functions that it replaces with where they
/// should lead. Its variables, and the tables that the kernel knows it by, may have changed, so only their mapping is looked at. Nothing is compared of an update that is not there.
#[must_use]
pub fn verify<R: ReadPhys>(
    guest: &R,
    kernel: &Kernel,
    holds: &Holdings,
    update: UpdateId,
) -> Observed {
    let mut observed = Observed::default();
    let Some(placed) = holds.placed.get(&update) else {
        return observed;
    };
    for write in &placed.writes {
        if write.purpose == Purpose::Mapping {
            continue;
        }
        // The kernel has links of its own in the tables.
        if write.purpose == Purpose::Arena && write.gva.0 != placed.linked.data.at {
            observed.compare(guest, kernel, write.gva, &write.bytes);
            continue;
        }
        let differs = match kernel.translate(guest, write.gva) {
            Ok(gpa) if gpa == write.gpa => None,
            Ok(gpa) => Some(format!("the kernel sees {gpa} here, not {}", write.gpa)),
            Err(error) => Some(error.to_string()),
        };
        let differs = differs.map(|text| (write.gva, text));
        observed.differences.extend(differs);
    }
    for function in holds.functions.of(update) {
        let Some(function) = holds.functions.get(function) else {
            continue;
        };
        let jump = function.target.jump;
        match function.target.bytes(function.lead) {
            Ok(bytes) => observed.compare(guest, kernel, jump, &bytes),
            Err(error) => observed.differences.push((jump, error.to_string())),
        }
        let of_it = |made: &&Arc<Made>| made.function == function.target.function;
        for made in holds.made.iter().filter(of_it) {
            let assembled = &made.assembled;
            observed.compare(guest, kernel, assembled.at, &assembled.bytes);
        }
    }
    observed
}

impl Observed {
    /// Compares what the kernel sees at `at` with what should be there.
    fn compare<R: ReadPhys>(&mut self, guest: &R, kernel: &Kernel, at: Gva, should: &[u8]) {
        self.bytes += should.len() as u64;
        let mut live = vec![0; should.len()];
        let differs = match kernel.read(guest, at, &mut live) {
            Ok(()) => difference(at, should, &live),
            Err(error) => Some(error.to_string()),
        };
        self.differences.extend(differs.map(|text| (at, text)));
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
