//! Code of ours that is in the guest to stay: what each piece of it is, and how to unwind there.
//!
//! A thread may be in an edition, or come back to it, long after it was reverted: what is known of it is kept as long as the kernel runs.
//! Editions bring unwind entries of their own. Those of a head are the original's: each displaced instruction does in its new place what
//! it did in its old one, so what held before it there holds before it here.

use std::ops::Range;

use super::handler::Thunk;
use super::link::{Linked, Redirection};
use crate::addr::Gva;
use crate::kernel::locate::Kernel;
use crate::kernel::orc::{Orc, OrcError, OrcTable};
use crate::kernel::unwind::OtherCode;

/// The code of one update.
#[derive(Clone, Debug)]
pub struct Resident {
    /// Its pieces, each with the name of what it is, in the order of addresses.
    pub pieces: Vec<(Range<Gva>, String)>,
    /// All of it, with its unwind table if the kernel has one.
    pub code: OtherCode,
}

impl Resident {
    /// What `linked` is once it is in the guest that runs `kernel`.
    ///
    /// # Errors
    /// When its unwind entries are not those of this kernel, or not for its code.
    pub fn of(linked: &Linked, kernel: &Kernel) -> Result<Self, OrcError> {
        let table = match kernel.image().orc() {
            Ok(like) => Some(table(linked, kernel, like)?),
            Err(OrcError::Absent { .. }) => None,
            Err(other) => return Err(other.clone()),
        };
        Ok(Self {
            pieces: pieces(linked),
            code: OtherCode {
                name: "an update's code".to_owned(),
                range: range(linked),
                table,
            },
        })
    }
}

fn range(linked: &Linked) -> Range<Gva> {
    let at = Gva(linked.code.at);
    at.range(linked.code.bytes.len() as u64).unwrap_or(at..at)
}

/// Each edition under the name of the function that it replaces, each head under the one by which an edition calls it, and what asks predicates.
fn pieces(linked: &Linked) -> Vec<(Range<Gva>, String)> {
    let mut starts = Vec::new();
    for redirection in linked.all_redirections() {
        let name = &redirection.target.name;
        starts.push((redirection.edition, name.clone()));
        starts.push((redirection.head.at, format!("exopatch_original_{name}")));
    }
    let thunks = linked.thunks.iter();
    starts.extend(thunks.map(|thunk| (thunk.at, thunk.symbol())));
    starts.sort();
    let ends = starts.iter().skip(1).map(|(at, _)| *at);
    let ends: Vec<Gva> = ends.chain([range(linked).end]).collect();
    let pieces = starts.into_iter().zip(ends);
    pieces
        .filter(|((start, _), end)| start < end)
        .map(|((start, name), end)| (start..end, name))
        .collect()
}

/// The unwind table of all of it, with entries laid out as in `like`.
fn table(linked: &Linked, kernel: &Kernel, like: &OrcTable) -> Result<OrcTable, OrcError> {
    let code = range(linked);
    let mut entries = vec![(code.start, like.silence())];
    entries.extend(linked.orc.iter().cloned());
    for redirection in linked.all_redirections() {
        entries.extend(of_head(redirection, kernel, like));
    }
    for thunk in &linked.thunks {
        entries.extend(of_thunk(thunk, like)?);
    }
    laid_out(&code, entries, like)
}

/// The unwind table of `code` with these entries, each for what is from its address on, laid out as in `like`.
///
/// # Errors
/// When an entry is not of that layout, or not for `code`.
pub(crate) fn laid_out(
    code: &Range<Gva>,
    mut entries: Vec<(Gva, Vec<u8>)>,
    like: &OrcTable,
) -> Result<OrcTable, OrcError> {
    // Where a piece ends and the next begins at once, what is said of the next counts: the last entry for an address does.
    entries.sort_by_key(|(at, entry)| (*at, says(like, entry)));
    let mut ips = Vec::new();
    for (at, _) in &entries {
        let slot = code.start.0.wrapping_add(ips.len() as u64);
        let distance = i32::try_from(at.0.wrapping_sub(slot).cast_signed());
        let elsewhere = |_| OrcError::Elsewhere {
            from: at.0,
            to: at.0,
        };
        ips.extend(distance.map_err(elsewhere)?.to_le_bytes());
    }
    let entries = entries.into_iter().flat_map(|(_, entry)| entry).collect();
    OrcTable::like(
        like,
        code.start.0,
        ips,
        entries,
        &(code.start.0..code.end.0),
    )
}

/// Whether an entry says anything.
fn says(like: &OrcTable, entry: &[u8]) -> bool {
    let mut bytes = [0; 8];
    bytes
        .iter_mut()
        .zip(entry)
        .for_each(|(byte, of)| *byte = *of);
    like.decode(bytes) != Orc::Undefined
}

/// The entries of one head; behind it nothing is said.
fn of_head<'a>(
    redirection: &'a Redirection,
    kernel: &'a Kernel,
    like: &'a OrcTable,
) -> impl Iterator<Item = (Gva, Vec<u8>)> + 'a {
    let head = &redirection.head;
    let here = |offset: u64| Gva(head.at.0.wrapping_add(offset));
    let moved = head.moved.iter().map(move |(offset, original)| {
        let link = kernel.link(*original);
        let entry = link.and_then(|link| like.entry(link.0));
        let entry = entry.map_or_else(|| like.silence(), <[u8]>::to_vec);
        (here((*offset).into()), entry)
    });
    moved.chain([(here(head.bytes.len() as u64), like.silence())])
}

/// The entries of what asks a predicate.
fn of_thunk(thunk: &Thunk, like: &OrcTable) -> Result<Vec<(Gva, Vec<u8>)>, OrcError> {
    let end = Gva(thunk.at.0.wrapping_add(thunk.bytes.len() as u64));
    let pushed = thunk.pushed().map(|(at, pushed)| {
        let entry = like.entered(pushed);
        Ok((at, entry.ok_or(OrcError::Field { field: "sp_offset" })?))
    });
    pushed.chain([Ok((end, like.silence()))]).collect()
}

#[cfg(test)]
mod tests {
    use super::{Resident, table};
    use crate::addr::Gva;
    use crate::edition::link::{Linked, Placed, Redirection};
    use crate::kernel::orc::{Orc, OrcError};
    use crate::kernel::testing::guest::{SLIDE, TinyGuest};
    use crate::kernel::testing::orc::{Rule, entry};
    use crate::kernel::testing::{FORMS, Form, TEXT};
    use crate::plan::target::Target;
    use crate::x86::insn::Head;

    const CODE: u64 = 0xffff_ffff_ff80_0040;

    fn redirection(name: &str, edition: u64, head: u64, moved: &[(u32, u64)]) -> Redirection {
        let of = |(at, old): &(u32, u64)| (*at, Gva(TEXT + SLIDE + old));
        Redirection {
            target: Target {
                name: name.to_owned(),
                function: Gva(TEXT),
                size: 0x20,
                jump: Gva(TEXT + 5),
                displaced: Vec::new(),
            },
            edition: Gva(CODE + edition),
            head: Head {
                at: Gva(CODE + head),
                bytes: vec![0; 16],
                moved: moved.iter().map(of).collect(),
            },
        }
    }

    /// Two editions without a gap between them, and their heads: of instructions before and behind a push, and of some in silent code.
    fn linked(form: Form) -> Linked {
        let call = |by| entry(form, Rule::Call((5, by), (0, 0))).to_vec();
        let orc = [
            (0, call(8)),
            (0x40, vec![0; 6]),
            (0x40, call(24)),
            (0x70, vec![0; 6]),
        ];
        Linked {
            code: Placed {
                at: CODE,
                bytes: vec![0; 0x100],
            },
            data: Placed::default(),
            redirections: vec![
                redirection("f", 0, 0x80, &[(0, 0x305), (1, 0x306), (4, 0x30a)]),
                redirection("g", 0x40, 0xc0, &[(0, 0x605)]),
            ],
            orc: orc.map(|(at, entry)| (Gva(CODE + at), entry)).into(),
            ..Linked::default()
        }
    }

    #[test]
    fn a_head_is_unwound_as_its_original_and_an_edition_by_its_own_table() {
        for form in FORMS {
            let kernel = TinyGuest::new(form, 4).kernel();
            let like = kernel.image().orc().unwrap();
            let original = |at: u64| like.lookup(TEXT + at).unwrap();
            assert_ne!(original(0x305), original(0x306));
            let resident = Resident::of(&linked(form), &kernel).unwrap();
            let table = resident.code.table.unwrap();
            let deep = Orc::ENTERED.lower(16);
            for (offsets, want) in [
                (0..0x40, Orc::ENTERED),
                (0x40..0x70, deep),
                (0x70..0x80, Orc::Undefined),
                (0x80..0x81, original(0x305)),
                (0x81..0x90, original(0x306)),
                (0x90..0x100, Orc::Undefined),
            ] {
                for offset in offsets {
                    let got = table.lookup(CODE + offset);
                    assert_eq!(got, Some(want), "{form:?} {offset:#x}");
                }
            }
            let pieces = resident.pieces.iter().map(|(range, name)| {
                let offset = |at: Gva| at.0 - CODE;
                (offset(range.start), offset(range.end), name.as_str())
            });
            let want = [
                (0, 0x40, "f"),
                (0x40, 0x80, "g"),
                (0x80, 0xc0, "exopatch_original_f"),
                (0xc0, 0x100, "exopatch_original_g"),
            ];
            assert_eq!(pieces.collect::<Vec<_>>(), want);
        }
    }

    #[test]
    fn entries_that_are_not_for_the_code_are_refused() {
        let kernel = TinyGuest::new(Form::New, 4).kernel();
        let like = kernel.image().orc().unwrap();
        let refused = |change: &dyn Fn(&mut Linked)| {
            let mut linked = linked(Form::New);
            change(&mut linked);
            table(&linked, &kernel, like).unwrap_err()
        };
        let outside = refused(&|linked| linked.orc[3].0 = Gva(CODE + 0x101));
        assert!(matches!(outside, OrcError::Elsewhere { .. }), "{outside}");
        let far = refused(&|linked| linked.orc[3].0 = Gva(0x1000));
        assert!(matches!(far, OrcError::Elsewhere { .. }), "{far}");
        let short = refused(&|linked| linked.orc[3].1.truncate(5));
        assert!(matches!(short, OrcError::Shape { .. }), "{short}");
    }
}
