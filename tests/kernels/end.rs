//! Does the process end when the guest does, with a status that tells how?

use tests::guest::{Guest, Options};
use tests::stock;

/// The statuses of `exopatch run`, as its help lists them.
const POWER_OFF: i32 = 0;
