//! The x86-64 architecture, as far as a patcher needs it.

pub mod depth;
pub mod frames;
pub mod insn;
pub mod paging;
pub mod registers;
#[cfg(test)]
pub(crate) mod run;
