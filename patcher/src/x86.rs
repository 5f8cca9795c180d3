//! The x86-64 architecture, as far as a patcher needs it.

pub mod depth;
pub mod frames;
pub mod insn;
pub mod paging;
#[cfg(test)]
pub(crate) mod run;
