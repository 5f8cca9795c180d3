//! Our code as the guest's kernel knows code: what it needs to name it, unwind it, fix up its faults and see its warnings.
//!
//! The kernel finds all of that through the `struct module` that it has for an address, in `mod_tree`, and through the list of bug
//! tables, `module_bug_list`. A [`Unit`] of code of ours gets a `struct module` of its own in those two, and in no other list: it is
//! in no view of the guest's modules, has no references, and cannot be unloaded. What the tables say never changes while the guest
//! can find them; only the kernel itself writes there (a node's links, that a warning was given once).
//!
//! [`place`] makes the bytes before the pause; [`writes`] says under it which words of the guest's own change, since the guest's
//! tree is another whenever it loads a module. Nobody who looks is in the middle of a change: the guest stands still, its count of
//! changes tells who had begun to look to begin again, and `module_mutex` (see [`crate::kernel::flux`]) is free.
//! Memory of a unit that was taken back is somebody else's only after [`Grace`].
//!
//! Sources: kernel `kernel/module/{main,tree_lookup,kallsyms}.c`, `kernel/extable.c`, `lib/bug.c`, `arch/x86/kernel/unwind_orc.c`.

mod bytes;
mod grace;
mod layout;
mod links;
mod tree;

use std::ops::Range;
use std::sync::Arc;

use self::layout::Layout;
use crate::addr::Gva;
use crate::edition::link::{Linked, Placed};
use crate::edition::space::{ArenaSpace, Full};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::orc::OrcTable;
use crate::kernel::symbols::SymbolError;
use crate::kernel::types::TypeError;

pub use self::bytes::{BUGS, FIXUPS};
pub use self::grace::Grace;
pub use self::links::{Published, published, writes};

/// What the guest shows in brackets behind the names of our code.
pub const NAME: &str = "exopatch";

/// Why code cannot be made known to the kernel.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The kernel lacks a symbol.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The kernel lacks a type or member.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// The kernel's lists of modules cannot be read, or are unsound.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No room in the arena.
    #[error(transparent)]
    Full(#[from] Full),
    /// The code has a table, and the kernel cannot be told of it.
    #[error(
        "the kernel has no place for {table} of code that was added to it, and the edition needs one"
    )]
    Unknown {
        /// Name of the section.
        table: &'static str,
    },
    /// A table is not one of this kernel's.
    #[error(
        "section {table} of the package has {len} bytes, which are no whole entries of {entry}"
    )]
    Shape {
        /// Name of the section.
        table: &'static str,
        /// Its length in bytes.
        len: u64,
        /// Bytes of an entry.
        entry: u64,
    },
    /// An entry is about other code.
    #[error(
        "entry {index} of section {table} of the package is about {at}, which is not in the package's code"
    )]
    Outside {
        /// Name of the section.
        table: &'static str,
        /// Which entry, from zero.
        index: usize,
        /// The address that it gives.
        at: Gva,
    },
    /// Code and tables are too far apart.
    #[error("{to} is out of reach of the table at {at}")]
    Far {
        /// The place in the table.
        at: Gva,
        /// What it is about.
        to: Gva,
    },
    /// Two entries are about one instruction.
    #[error("section {table} of the package has two entries for the instruction at {at}")]
    Twice {
        /// Name of the section.
        table: &'static str,
        /// The instruction.
        at: Gva,
    },
}

/// A symbol of the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its first byte.
    pub at: Gva,
    /// Its bytes.
    pub size: u64,
    /// Its name.
    pub name: String,
}

/// What to do when an instruction faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixup {
    /// The instruction.
    pub insn: Gva,
    /// Where to go on.
    pub fixup: Gva,
    /// The kernel's own word for how (`EX_TYPE_*` of `arch/x86/include/asm/extable_fixup_types.h`).
    pub data: u32,
}

/// A table that is in the arena already, as its code was linked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its first byte.
    pub at: Gva,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Code of ours that lies in one piece, and what the kernel is told of it.
#[derive(Clone, Debug)]
pub struct Unit {
    /// What stands in brackets behind the names of its symbols; at most 55 bytes of it.
    pub name: String,
    /// All of it.
    pub code: Range<Gva>,
    /// Its symbols.
    pub symbols: Vec<Symbol>,
    /// How to unwind it.
    pub orc: Option<OrcTable>,
    /// The instructions that may fault.
    pub fixups: Vec<Fixup>,
    /// The warnings, as `struct bug_entry`, in the arena's writable part.
    pub bugs: Option<Table>,
}

/// A unit whose tables have their place, to be linked into the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// The code that it is about.
    pub code: Range<Gva>,
    /// Its `struct module`.
    pub module: Gva,
    /// Whether it has warnings.
    bugs: bool,
    layout: Arc<Layout>,
}

impl Unit {
    /// The unit of a package that was linked for `kernel`; `orc` is how to unwind all its code.
    ///
    /// # Errors
    /// When its exception table is none of this kernel's, or about other code.
    pub fn of(
        linked: &Linked,
        kernel: &Kernel,
        orc: Option<OrcTable>,
    ) -> Result<Self, PublishError> {
        let at = Gva(linked.code.at);
        let heads = linked.all_redirections().map(|redirection| Symbol {
            at: redirection.head.at,
            size: redirection.head.bytes.len() as u64,
            name: format!("exopatch_original_{}", redirection.target.name),
        });
        let thunks = linked.thunks.iter().map(|thunk| Symbol {
            at: thunk.at,
            size: thunk.bytes.len() as u64,
            name: thunk.symbol(),
        });
        Ok(Self {
            name: NAME.to_owned(),
            code: at.range(linked.code.bytes.len() as u64).unwrap_or(at..at),
            symbols: linked
                .functions
                .iter()
                .cloned()
                .chain(heads)
                .chain(thunks)
                .collect(),
            orc,
            fixups: match &linked.fixups {
                Some(table) => bytes::fixups(kernel, table)?,
                None => Vec::new(),
            },
            bugs: linked.bugs.clone(),
        })
    }
}

/// Gives the tables of `unit` their place in `space`. `None` when the kernel has nothing to find code by, and `unit` needs nothing of the kind.
///
/// # Errors
/// [`PublishError`].
pub fn place(
    unit: &Unit,
    kernel: &Kernel,
    space: &mut ArenaSpace,
) -> Result<Option<(Placed, Publication)>, PublishError> {
    let Some(layout) = Layout::resolve(kernel)? else {
        let needs = [
            (FIXUPS, !unit.fixups.is_empty()),
            (BUGS, unit.bugs.is_some()),
        ];
        return match needs.into_iter().find(|(_, needs)| *needs) {
            Some((table, _)) => Err(PublishError::Unknown { table }),
            None => Ok(None),
        };
    };
    bytes::checked(unit, &layout)?;
    let placed = bytes::place(unit, &layout, space)?;
    let publication = Publication {
        code: unit.code.clone(),
        module: Gva(placed.at),
        bugs: unit.bugs.is_some(),
        layout: Arc::new(layout),
    };
    Ok(Some((placed, publication)))
}
