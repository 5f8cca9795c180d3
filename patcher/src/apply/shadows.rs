//! What of the guest's own comes before the jumps of redirected functions: looked at now and then while the guest runs.

use super::arena::Arena;
use crate::addr::Gva;
use crate::edition::list::Function;
use crate::guest::ReadPhys;
use crate::kernel::locate::{Kernel, KernelError};
use crate::plan::Lead;
use crate::x86::insn::JUMP_LEN;

/// Whether there is a function to be looked at.
#[must_use]
pub fn is_watching(arena: &Arena) -> bool {
    arena.holds.functions.iter().any(is_led)
}

/// Looks which functions have something before their jumps that may lead calls elsewhere; whether that is not as it was.
///
/// # Errors
/// When the guest cannot be read, or is just changing it. What was known before stays known then.
pub fn watch<R: ReadPhys>(
    guest: &R,
    kernel: &Kernel,
    arena: &mut Arena,
) -> Result<bool, KernelError> {
    let led = arena
        .holds
        .functions
        .iter()
        .filter(|function| is_led(function));
    let found = led.map(|function| {
        let at = function.target.function;
        let site = function.target.jump.0.checked_sub(JUMP_LEN as u64);
        // The jump of a function without such a site is its first instruction.
        let Some(site) = site.map(Gva).filter(|site| *site >= at) else {
            return Ok(None);
        };
        let shadow = kernel.shadow(guest, at, site)?;
        Ok(shadow.map(|shadow| (at, shadow)))
    });
    let found: Result<Vec<_>, KernelError> = found.collect();
    let shadows = found?.into_iter().flatten().collect();
    let changed = arena.holds.shadows != shadows;
    arena.holds.shadows = shadows;
    Ok(changed)
}

fn is_led(function: &Function) -> bool {
    function.lead != Lead::Original
}
