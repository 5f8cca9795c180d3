//! How often editions were called: the cells that handlers count in, one for each CPU, read while the guest runs.

use super::arena::Holdings;
use crate::edition::handler::LINE;
use crate::edition::list::UpdateId;
use crate::guest::ReadPhys;
use crate::kernel::locate::{Kernel, KernelError};

/// The calls of one function that got to one of its editions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calls {
    /// The function.
    pub function: String,
    /// The update whose edition it is; `None` for the original.
    pub update: Option<UpdateId>,
    /// How many since they are counted. Each CPU's is exact; those of several are read one after the other.
    pub calls: u64,
}

/// All calls that are counted, by function, the original first.
///
/// # Errors
/// When the cells cannot be read.
pub fn calls<R: ReadPhys>(
    guest: &R,
    kernel: &Kernel,
    holds: &Holdings,
) -> Result<Vec<Calls>, KernelError> {
    let Some(workshop) = &holds.workshop else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for ((function, update), at) in &holds.counters {
        let Some(function) = holds.functions.get(*function) else {
            continue;
        };
        let mut bytes = vec![0; usize::try_from(workshop.counter_len()).unwrap_or_default()];
        kernel.read(guest, *at, &mut bytes)?;
        let line = usize::try_from(LINE).unwrap_or(usize::MAX);
        let cells = bytes.chunks(line).filter_map(|cell| cell.first_chunk());
        let cells = cells.map(|cell| u64::from_le_bytes(*cell));
        all.push(Calls {
            function: function.target.name.clone(),
            update: *update,
            calls: cells.fold(0, u64::wrapping_add),
        });
    }
    Ok(all)
}
