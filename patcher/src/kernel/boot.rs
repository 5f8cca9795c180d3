//! How far the guest's kernel has got in its life.
//!
//! `system_state` becomes `SYSTEM_RUNNING` after the kernel has patched its alternatives, freed its init memory and
//! made its text read-only (kernel `init/main.c`, `kernel_init()`), so that this one value stands for all of them.

use super::locate::{Kernel, KernelError};
use crate::guest::ReadPhys;

/// The enumeration that says so.
const STATES: &str = "system_states";

/// Whether a kernel can be updated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootState {
    /// It has booted and is not on its way down.
    Running,
    /// It still boots: its text is still being patched.
    NotFinished {
        /// The kernel's name for its state.
        state: String,
    },
    /// It halts, powers off, restarts or suspends.
    Ending {
        /// The kernel's name for its state.
        state: String,
    },
}

impl Kernel {
    /// Whether the kernel has finished booting.
    ///
    /// # Errors
    /// When the state cannot be read or is none that the kernel's types know.
    pub fn boot_state<R: ReadPhys + ?Sized>(&self, guest: &R) -> Result<BootState, KernelError> {
        let at = self.symbol("system_state")?;
        let value = self.read_u32(guest, at)?;
        let states = self.image().types().enumerators(STATES)?;
        let running = self.image().types().enumerator(STATES, "SYSTEM_RUNNING")?;
        let unsound = KernelError::Unsound {
            what: "system_state",
            at,
            value: value.into(),
        };
        let (state, value) = states
            .into_iter()
            .find(|(_, state)| *state == i64::from(value))
            .ok_or(unsound)?;
        Ok(match value.cmp(&running) {
            std::cmp::Ordering::Less => BootState::NotFinished { state },
            std::cmp::Ordering::Equal => BootState::Running,
            std::cmp::Ordering::Greater => BootState::Ending { state },
        })
    }
}
