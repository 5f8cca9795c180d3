//! A KVM virtual machine monitor that boots stock Linux kernels and updates them while they run.
//!
//! Dependencies run one way: the API and the command line stand on [`vm`], which stands on `boot`, `devices` and
//! `kvm`; every ioctl and all `unsafe` are in `kvm`, `memory`, `terminal`, `kernel_index` and `cli::kernel::recording`.

pub mod api;
pub mod boot;
pub mod cli;
pub mod client;
pub mod config;
pub mod devices;
pub mod doctor;
pub mod end;
pub mod events;
pub mod failure;
pub mod guest;
pub mod kernel_index;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod output;
pub mod patching;
pub mod signals;
pub mod sparse;
pub mod terminal;
pub mod trial;
pub mod updates;
pub mod views;
pub mod vm;
