//! A Linux kernel seen from outside: its image on the host, and the same kernel running in a guest.
//!
//! [`image::Image`] is what the file says, or what the guest's memory still holds of it; [`locate::Kernel`] is an image together with where and how a guest runs it.
//! Nothing is chosen by the kernel's version: presence of a symbol, a type or a member decides.

pub mod agree;
pub(crate) mod ahead;
pub mod alternatives;
pub mod arena;
pub mod boot;
pub mod bpf;
pub(crate) mod btf;
pub(crate) mod bytes;
mod census;
pub mod changed;
pub(crate) mod entered;
pub mod flux;
mod ftrace;
pub(crate) mod gather;
pub mod image;
pub(crate) mod kallsyms;
pub(crate) mod layout;
pub mod locate;
pub mod log;
pub(crate) mod memory;
pub mod modules;
pub mod names;
pub mod orc;
pub mod payload;
pub mod quiescence;
pub mod recover;
pub mod relocs;
pub mod rested;
pub(crate) mod running;
pub mod shadow;
pub mod sites;
pub mod stack;
pub mod symbols;
pub mod tasks;
#[cfg(test)]
pub(crate) mod testing;
pub mod text;
pub mod types;
pub mod unwind;
pub(crate) mod vmap;
pub mod vmcoreinfo;
