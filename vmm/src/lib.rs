//! A KVM virtual machine monitor that boots stock Linux kernels and updates them while they run.
