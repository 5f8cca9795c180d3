//! Real kernels in real guests. Each module is a question; each test boots its own guests, through [`tests::guest`].
//!
//! `scripts/test kernels [FILTER]` runs them where a KVM that carries a kernel is.
#![expect(clippy::print_stdout, reason = "a test prints the figures that it saw")]

mod adaptive;
mod asleep;
mod at;
mod boot;
mod bpf;
mod clocks;
mod clones;
mod coexist;
mod contexts;
mod end;
mod first_class;
mod flavours;
mod hooks;
mod input;
mod instant;
mod killed;
mod no_fentry;
mod ordinary;
mod panics;
mod patch;
mod pause;
mod predicates;
mod processes;
mod recover;
mod residents;
mod rules;
mod see;
mod shadows;
mod stacking;
mod stops;
mod sysrq;
mod types;
mod watch;
mod witness;
