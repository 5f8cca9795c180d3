//! What the entries of each table of patch sites look like.

use std::ops::Range;

use super::{SiteKind, SitesError};
use crate::kernel::types::{TypeError, Types};

/// How an entry says where its site is.
#[derive(Clone, Copy, Debug)]
pub(super) enum At {
    /// A signed 32-bit distance from the entry's own field at this offset.
    Relative(usize),
    /// A 64-bit address at this offset.
    Absolute(usize),
}

/// How an entry says how long its site is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Len {
    Fixed(u64),
    /// A byte of the entry at this offset.
    Byte(usize),
    /// As long as the instruction that the image has there: two bytes for a short jump or NOP, else five.
    JumpLabel,
    /// As long as the call, jump or `endbr64` that the image has there.
    Branch,
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) kind: SiteKind,
    pub(super) file: Range<usize>,
    pub(super) address: u64,
    pub(super) entry: usize,
    pub(super) at: At,
    pub(super) len: Len,
    /// Offset of the field that says where the kernel may go on from a site, relative to the field itself.
    pub(super) to: Option<usize>,
}

/// The shape of one table's entries.
pub(super) struct Shape {
    kind: SiteKind,
    entry: usize,
    at: At,
    len: Len,
    to: Option<usize>,
}

impl Shape {
    const fn relative(kind: SiteKind, entry: usize, len: Len) -> Self {
        Self {
            kind,
            entry,
            at: At::Relative(0),
            len,
            to: None,
        }
    }

    pub(super) fn table(
        &self,
        name: &str,
        file: Range<usize>,
        address: u64,
    ) -> Result<Table, SitesError> {
        // Sections may be padded to their alignment, but never by a whole entry.
        let whole = file.len() / self.entry * self.entry;
        let padded = name == ".parainstructions" || name == ".smp_locks";
        if whole != file.len() && !padded {
            return Err(SitesError::Shape {
                table: name.to_owned(),
                len: file.len(),
                entry: self.entry,
            });
        }
        let file = file.start..file.start + whole;
        Ok(Table {
            name: name.to_owned(),
            kind: self.kind,
            file,
            address,
            entry: self.entry,
            at: self.at,
            len: self.len,
            to: self.to,
        })
    }
}

/// The shape of the table in section `name`, if it is one of patch sites.
pub(super) fn section_shape(name: &str, types: &Types) -> Result<Option<Shape>, SitesError> {
    let ask = |answer: Result<u64, TypeError>| {
        let answer = answer.map_err(|cause| SitesError::Entry {
            table: name.to_owned(),
            cause,
        })?;
        Ok::<usize, SitesError>(usize::try_from(answer).unwrap_or(usize::MAX))
    };
    let member = |of: &str, path: &str| ask(types.offset_of(of, path));
    Ok(Some(match name {
        ".altinstructions" => Shape {
            kind: SiteKind::Alternative,
            entry: ask(types.size_of("alt_instr"))?.max(1),
            at: At::Relative(member("alt_instr", "instr_offset")?),
            len: Len::Byte(member("alt_instr", "instrlen")?),
            to: None,
        },
        ".parainstructions" => Shape {
            kind: SiteKind::Paravirt,
            entry: ask(types.size_of("paravirt_patch_site"))?.max(1),
            at: At::Absolute(member("paravirt_patch_site", "instr")?),
            len: Len::Byte(member("paravirt_patch_site", "len")?),
            to: None,
        },
        ".retpoline_sites" => Shape::relative(SiteKind::Retpoline, 4, Len::Branch),
        ".return_sites" => Shape::relative(SiteKind::ReturnThunk, 4, Len::Branch),
        ".call_sites" => Shape::relative(SiteKind::Call, 4, Len::Branch),
        ".ibt_endbr_seal" => Shape::relative(SiteKind::IbtEndbr, 4, Len::Fixed(4)),
        ".smp_locks" => Shape::relative(SiteKind::SmpLock, 4, Len::Fixed(1)),
        "__ex_table" => Shape {
            kind: SiteKind::Extable,
            entry: ask(types.size_of("exception_table_entry"))?.max(1),
            at: At::Relative(member("exception_table_entry", "insn")?),
            len: Len::Fixed(1),
            to: Some(member("exception_table_entry", "fixup")?),
        },
        "__bug_table" => Shape {
            kind: SiteKind::Bug,
            entry: ask(types.size_of("bug_entry"))?.max(1),
            at: At::Relative(member("bug_entry", "bug_addr_disp")?),
            len: Len::Fixed(2),
            to: None,
        },
        _ if name.starts_with("runtime_shift_") => {
            Shape::relative(SiteKind::RuntimeConst, 4, Len::Fixed(1))
        }
        _ if name.starts_with("runtime_") => {
            Shape::relative(SiteKind::RuntimeConst, 4, Len::Fixed(8))
        }
        _ if name.ends_with("_sites") => {
            return Err(SitesError::Unknown {
                table: name.to_owned(),
            });
        }
        _ => return Ok(None),
    }))
}

/// The tables that lie inside other sections: the symbols around each, and its shape.
pub(super) fn symbol_shapes(
    types: &Types,
) -> Result<[(&'static str, &'static str, Shape); 3], SitesError> {
    let size = |name: &str| {
        let size = types.size_of(name).map_err(|cause| SitesError::Entry {
            table: name.to_owned(),
            cause,
        })?;
        Ok::<usize, SitesError>(usize::try_from(size).unwrap_or(usize::MAX).max(1))
    };
    let mcount = Shape {
        kind: SiteKind::Fentry,
        entry: 8,
        at: At::Absolute(0),
        len: Len::Fixed(5),
        to: None,
    };
    let jump_target =
        types
            .offset_of("jump_entry", "target")
            .map_err(|cause| SitesError::Entry {
                table: "jump_entry".to_owned(),
                cause,
            })?;
    let jumps = Shape {
        to: Some(usize::try_from(jump_target).unwrap_or(usize::MAX)),
        ..Shape::relative(SiteKind::JumpLabel, size("jump_entry")?, Len::JumpLabel)
    };
    Ok([
        ("__start___jump_table", "__stop___jump_table", jumps),
        (
            "__start_static_call_sites",
            "__stop_static_call_sites",
            Shape::relative(
                SiteKind::StaticCall,
                size("static_call_site")?,
                Len::Fixed(5),
            ),
        ),
        ("__start_mcount_loc", "__stop_mcount_loc", mcount),
    ])
}
