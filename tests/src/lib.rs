//! What the tests of real kernels share: the stock kernels, a guest to boot them in, and the client that drives it.
//!
//! The tests run where `/dev/kvm` carries a kernel: on this machine, or in the lab (`scripts/test kernels` chooses).

pub mod api;
pub mod client;
pub mod console;
pub mod figures;
pub mod guest;
pub mod initrd;
pub mod inside;
pub mod lab;
pub mod oracle;
pub mod packed;
pub mod recorded;
pub mod scene;
pub mod stock;
pub mod stops;
pub mod trace;
