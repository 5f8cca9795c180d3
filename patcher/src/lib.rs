//! Reads a Linux kernel in a paused, running or recorded guest, and replaces its functions from outside.
//!
//! The stages are values, each consumed to get the next:
//! `Image -> Kernel -> Edition -> Linked -> Plan -> Quiescent -> Applied -> (reverted)`.
//! The crate knows no hypervisor, socket or wire format: [`guest`] is the one seam to the machine below.
#![forbid(unsafe_code)]

pub mod addr;
pub mod apply;
pub mod commit;
pub mod edition;
pub mod guest;
pub mod journal;
pub mod kernel;
pub mod observe;
pub mod plan;
pub mod publish;
pub mod rule;
pub mod x86;
