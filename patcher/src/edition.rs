//! Editions: from a source file to placed bytes.
//!
//! [`build`] compiles one against a kernel's headers, [`object`] reads the package back, [`link`] resolves it against the
//! running kernel and gives every byte its place in the arena ([`space`]), [`clone`] makes a package of functions that the kernel has, [`predicate`] says which functions
//! rules may ask, [`hook`] what runs before and after, [`list`] has the editions of each function, and [`resident`] is what
//! stays in the arena, for good if an address of it can [`escape`].

pub mod build;
pub mod clone;
pub mod escape;
pub mod handler;
pub mod hook;
pub mod link;
pub mod list;
pub mod object;
pub mod predicate;
pub mod reloc;
pub mod resident;
pub mod section;
pub mod set;
pub mod space;
