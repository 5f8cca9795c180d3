//! Real kernels in real guests. Each module is a question; each test boots its own guests, through [`tests::guest`].
//!
//! `scripts/test kernels [FILTER]` runs them where a KVM that carries a kernel is.

mod boot;
mod end;
