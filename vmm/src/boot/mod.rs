//! From files to a guest about to execute its first instruction.
//!
//! A `bzImage` is entered as it was shipped, by the 64-bit boot protocol: its own decompressor and its own KASLR run. An
//! ELF `vmlinux` is entered by the PVH protocol. Either way the guest finds memory map and ACPI tables, and the processors'
//! features are those that KVM supports, arranged as one package of single-threaded cores.

pub mod acpi;
pub mod cpuid;
pub mod e820;
pub mod entry;
pub mod image;
pub mod load;
pub mod msr;
