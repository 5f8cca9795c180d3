//! The rules of redirection, one pure function each: facts come in, permission or a [`Refusal`] comes out.
//!
//! All of them are checked before anything is written, and those about bytes that may change again under the pause.

use std::ops::Range;

use super::refusal::Refusal;
use crate::addr::{Gva, LinkAddr};
use crate::kernel::sites::{Site, SiteKind};
use crate::x86::insn::{self, BranchFound, ENDBR64, FENTRY_LEN, JUMP_LEN};

/// A part of the kernel's text with rules of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The symbols around it.
    pub bounds: (&'static str, &'static str),
    /// What it is called.
    pub name: &'static str,
    /// Why nothing in it is redirected.
    pub why: &'static str,
}

/// The regions of the kernel where nothing is redirected (`include/asm-generic/vmlinux.lds.h`).
pub const REGIONS: [Region; 5] = [
    Region {
        bounds: ("__init_begin", "__init_end"),
        name: "initialisation code",
        why: "it is freed once the kernel has booted",
    },
    Region {
        bounds: ("__entry_text_start", "__entry_text_end"),
        name: "entry code",
        why: "it runs on user page tables, where the arena is not mapped",
    },
    Region {
        bounds: ("__noinstr_text_start", "__noinstr_text_end"),
        name: "code that must not be instrumented",
        why: "it runs where the kernel's own state is not set up yet",
    },
    Region {
        bounds: ("__static_call_text_start", "__static_call_text_end"),
        name: "static call trampolines",
        why: "the kernel rewrites them at any time",
    },
    Region {
        bounds: ("__indirect_thunk_start", "__indirect_thunk_end"),
        name: "indirect branch thunks",
        why: "every indirect branch of the kernel runs through them",
    },
];

/// Where the jump goes in a function with a fentry site, which is its first instruction or follows `endbr64`: behind that. `None` if it has none.
///
/// `code` is the function's image from its first byte, `sites` what the image lists for it.
#[must_use]
pub fn after_fentry(code: &[u8], first: LinkAddr, sites: &[Site]) -> Option<u64> {
    let entry = before_all(code);
    let fentry = first.checked_add(entry)?;
    let mut listed = sites.iter();
    // Some compilers leave the ENDBR out of the function's padding and some kernels seal it away: both may hold.
    listed
        .any(|site| site.kind == SiteKind::Fentry && site.range.start == fentry)
        .then_some(entry + FENTRY_LEN as u64)
}

/// Bytes of `code` that stay before any jump: those of `endbr64`.
#[must_use]
pub fn before_all(code: &[u8]) -> u64 {
    if code.starts_with(&ENDBR64) {
        ENDBR64.len() as u64
    } else {
        0
    }
}

/// The function is one that the compiler made from C, by the kernel's types, and the only one of its name: `namesakes` counts those.
///
/// # Errors
/// [`Refusal::NoFentry`].
pub fn compiled(function: &str, at: Gva, in_types: bool, namesakes: usize) -> Result<(), Refusal> {
    let why = match (in_types, namesakes) {
        (false, _) => {
            "the kernel's types have no C function of that name that takes or gives anything: it may be assembly, which is called in ways of its own"
        }
        (true, 1) => return Ok(()),
        (true, _) => {
            "there are several of that name, so which of them is in the types is not known"
        }
    };
    Err(Refusal::NoFentry {
        function: function.into(),
        at,
        why,
    })
}

/// The function is none that the kernel calls in place of a privileged instruction: `operations` are those. Callers keep most registers there.
///
/// # Errors
/// [`Refusal::NoFentry`].
pub fn no_operation(function: &str, at: Gva, operations: &[u64]) -> Result<(), Refusal> {
    if !operations.contains(&at.0) {
        return Ok(());
    }
    Err(Refusal::NoFentry {
        function: function.into(),
        at,
        why: "it is a paravirtual operation, whose callers keep values in registers",
    })
}

/// There is room for the jump before the next symbol.
///
/// # Errors
/// [`Refusal::TooShort`].
pub fn room(function: &str, size: u64, jump_offset: u64) -> Result<(), Refusal> {
    let (room, needed) = (size.saturating_sub(jump_offset), JUMP_LEN as u64);
    if room >= needed {
        Ok(())
    } else {
        Err(Refusal::TooShort {
            function: function.into(),
            room,
            needed,
        })
    }
}

/// The function does not lie in `region`, which is at `range` in the running kernel.
///
/// # Errors
/// [`Refusal::Region`].
pub fn outside(
    function: &str,
    at: Gva,
    region: &Region,
    range: &Range<Gva>,
) -> Result<(), Refusal> {
    if range.contains(&at) {
        return Err(Refusal::Region {
            function: function.into(),
            at,
            region: region.name,
            why: region.why,
        });
    }
    Ok(())
}

/// None of the displaced bytes belongs to a place that the kernel changes at run time, or knows by its address.
///
/// Places whose bytes are settled at boot and predictable (returns, retpolines, calls, `lock` prefixes) pass: the comparison
/// of live bytes decides there.
///
/// # Errors
/// [`Refusal::Site`] with `runtime` giving the address in the running kernel.
pub fn no_site(
    function: &str,
    sites: &[Site],
    runtime: impl Fn(LinkAddr) -> Gva,
) -> Result<(), Refusal> {
    for site in sites {
        if let Some((name, why)) = forbidden(site.kind) {
            let at = runtime(site.range.start);
            return Err(Refusal::Site {
                function: function.into(),
                site: name,
                at,
                why,
            });
        }
    }
    Ok(())
}

/// What a site is called and why it cannot be displaced, or `None` when it can.
fn forbidden(kind: SiteKind) -> Option<(&'static str, &'static str)> {
    Some(match kind {
        SiteKind::JumpLabel => (
            "a static branch (jump label)",
            "the kernel rewrites it at any time",
        ),
        SiteKind::StaticCall => ("a static call", "the kernel rewrites it at any time"),
        SiteKind::Alternative => (
            "an alternative",
            "the kernel chose its bytes at boot for this processor",
        ),
        SiteKind::Paravirt => (
            "a paravirtual call",
            "the kernel chose its bytes at boot for this hypervisor",
        ),
        SiteKind::RuntimeConst => ("a runtime constant", "the kernel wrote it at boot"),
        SiteKind::Extable => ("an exception fixup", "the kernel finds it by its address"),
        SiteKind::Bug => ("a BUG or WARN", "the kernel finds it by its address"),
        SiteKind::Fentry => ("another fentry site", "the kernel rewrites it at any time"),
        SiteKind::Retpoline
        | SiteKind::ReturnThunk
        | SiteKind::Call
        | SiteKind::SmpLock
        | SiteKind::IbtEndbr => {
            return None;
        }
    })
}

/// No probe of the guest's own sits in the displaced bytes.
///
/// # Errors
/// [`Refusal::Site`].
pub fn no_kprobe(function: &str, probes: &[Gva]) -> Result<(), Refusal> {
    match probes.first() {
        Some(&at) => Err(Refusal::Site {
            function: function.into(),
            site: "a kprobe",
            at,
            why: "the guest put it there; remove it, or apply the update before it is set",
        }),
        None => Ok(()),
    }
}

/// Nothing in `code` (a part of the function, at `base`) leads to one of the `displaced` bytes.
///
/// # Errors
/// [`Refusal::BranchInto`], [`Refusal::JumpTable`], [`Refusal::Undecodable`].
pub fn no_branch_into(
    part: &str,
    code: &[u8],
    base: Gva,
    displaced: &Range<Gva>,
) -> Result<(), Refusal> {
    match insn::find_branch_into(code, base, displaced) {
        Ok(None) => Ok(()),
        Ok(Some(BranchFound::Into { at, to })) => Err(Refusal::BranchInto {
            part: part.into(),
            from: at,
            to,
        }),
        Ok(Some(BranchFound::Table { at, text })) => Err(Refusal::JumpTable {
            part: part.into(),
            at,
            text,
        }),
        Err(cause) => Err(Refusal::Undecodable {
            part: part.into(),
            cause,
        }),
    }
}

/// The function is not redirected by us: its bytes at `at` are not a jump into `arena`.
///
/// # Errors
/// [`Refusal::AlreadyRedirected`].
pub fn not_ours(function: &str, at: Gva, live: &[u8], arena: &Range<Gva>) -> Result<(), Refusal> {
    let Some((&[0xe9, a, b, c, d], _)) = live.split_first_chunk::<JUMP_LEN>() else {
        return Ok(());
    };
    let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
    let next = at.checked_add(JUMP_LEN as u64);
    match next.and_then(|next| next.checked_offset(distance)) {
        Some(to) if arena.contains(&to) => Err(Refusal::AlreadyRedirected {
            function: function.into(),
            to,
        }),
        _ => Ok(()),
    }
}

/// The running kernel's bytes from `at` are those that its image says.
///
/// # Errors
/// [`Refusal::Changed`].
pub fn unchanged(function: &str, at: Gva, expected: &[u8], live: &[u8]) -> Result<(), Refusal> {
    let same = expected
        .iter()
        .zip(live)
        .take_while(|(expected, live)| expected == live)
        .count();
    if same == expected.len() && same == live.len() {
        return Ok(());
    }
    let rest = |bytes: &[u8]| bytes.iter().skip(same).copied().collect::<Vec<u8>>();
    Err(Refusal::Changed {
        function: function.into(),
        at: Gva(at.0.wrapping_add(same as u64)),
        expected: rest(expected),
        live: rest(live),
        cause: likely_cause(live.get(same).copied()),
    })
}

/// Who puts such a byte into kernel text.
fn likely_cause(byte: Option<u8>) -> &'static str {
    match byte {
        Some(0xcc) => "a breakpoint: the guest has a kprobe there, or was just changing it",
        Some(0xe8) => "a call: the guest's function tracer or a BPF program hooks it",
        Some(0xe9) => "a jump: an optimised kprobe, a live patch or another patcher",
        Some(0xeb | 0x0f | 0x66) => "a jump or NOP: a static branch that was switched",
        _ => "the guest or someone else has patched it",
    }
}

#[cfg(test)]
mod tests {
    use super::{
        REGIONS, Refusal, after_fentry, compiled, no_branch_into, no_kprobe, no_operation, no_site,
        not_ours, outside, room, unchanged,
    };
    use crate::addr::{Gva, LinkAddr};
    use crate::kernel::sites::{Site, SiteKind};

    const AT: Gva = Gva(0xffff_ffff_9100_0000);
    const LINK: LinkAddr = LinkAddr(0xffff_ffff_8100_0000);

    fn site(kind: SiteKind, offset: u64, len: u64) -> Site {
        Site {
            kind,
            range: LINK.checked_add(offset).unwrap().range(len).unwrap(),
        }
    }

    #[test]
    fn the_jump_goes_after_fentry() {
        let check = |code: &[u8], sites: &[Site], want: Option<u64>| {
            assert_eq!(after_fentry(code, LINK, sites), want);
        };
        let fentry = [0xe8, 0, 0, 0, 0];
        let endbr = [0xf3, 0x0f, 0x1e, 0xfa, 0xe8, 0, 0, 0, 0];
        check(&fentry, &[site(SiteKind::Fentry, 0, 5)], Some(5));
        check(&endbr, &[site(SiteKind::Fentry, 4, 5)], Some(9));
        check(&endbr, &[site(SiteKind::Fentry, 0, 5)], None);
        check(&fentry, &[], None);
        check(&fentry, &[site(SiteKind::Call, 0, 5)], None);
        // A weak function's own site, further in.
        check(&fentry, &[site(SiteKind::Fentry, 16, 5)], None);
    }

    #[test]
    fn only_c_functions_do_without_fentry() {
        let refused = |result: Result<(), Refusal>, want: &str| {
            let Err(Refusal::NoFentry { why, .. }) = result else {
                panic!("{want}: {result:?}");
            };
            assert!(why.contains(want), "{why}");
        };
        assert_eq!(compiled("f", AT, true, 1), Ok(()));
        refused(compiled("f", AT, false, 1), "may be assembly");
        refused(compiled("f", AT, true, 2), "several");
        assert_eq!(no_operation("f", AT, &[AT.0 + 1]), Ok(()));
        refused(no_operation("f", AT, &[0, AT.0]), "paravirtual");
    }

    #[test]
    fn a_jump_needs_room() {
        assert_eq!(room("f", 16, 5), Ok(()));
        assert_eq!(room("f", 10, 5), Ok(()));
        assert_eq!(
            room("f", 9, 5),
            Err(Refusal::TooShort {
                function: "f".into(),
                room: 4,
                needed: 5
            })
        );
        assert!(room("f", 0, 9).is_err());
    }

    #[test]
    fn special_regions_are_refused() {
        for region in &REGIONS {
            let range = AT..Gva(AT.0 + 0x1000);
            assert!(
                matches!(
                    outside("f", AT, region, &range),
                    Err(Refusal::Region { .. })
                ),
                "{region:?}"
            );
            assert_eq!(outside("f", Gva(AT.0 - 1), region, &range), Ok(()));
            assert_eq!(outside("f", range.end, region, &range), Ok(()));
        }
    }

    #[test]
    fn sites_that_change_or_are_known_by_address_are_refused() {
        let check = |kind: SiteKind, want: Option<&str>| {
            let got = no_site("f", &[site(kind, 5, 2)], |link| Gva(link.0 + 0x1000_0000));
            match (got, want) {
                (Ok(()), None) => {}
                (Err(Refusal::Site { site, at, .. }), Some(want)) => {
                    assert_eq!((site, at), (want, Gva(AT.0 + 5)));
                }
                (got, want) => panic!("{kind:?}: {got:?}, not {want:?}"),
            }
        };
        check(SiteKind::JumpLabel, Some("a static branch (jump label)"));
        check(SiteKind::StaticCall, Some("a static call"));
        check(SiteKind::Alternative, Some("an alternative"));
        check(SiteKind::Paravirt, Some("a paravirtual call"));
        check(SiteKind::Extable, Some("an exception fixup"));
        check(SiteKind::Bug, Some("a BUG or WARN"));
        check(SiteKind::Fentry, Some("another fentry site"));
        check(SiteKind::RuntimeConst, Some("a runtime constant"));
        check(SiteKind::ReturnThunk, None);
        check(SiteKind::Call, None);
        check(SiteKind::SmpLock, None);
        assert!(matches!(
            no_kprobe("f", &[AT]),
            Err(Refusal::Site {
                site: "a kprobe",
                at: AT,
                ..
            })
        ));
        assert_eq!(no_kprobe("f", &[]), Ok(()));
    }

    #[test]
    fn branches_into_displaced_bytes_are_refused() {
        let displaced = Gva(AT.0 + 5)..Gva(AT.0 + 10);
        // ten NOPs, then a loop back to `back` bytes before the end of the two-byte jump
        let check = |back: u8, want: Option<u64>| {
            let mut code = vec![0x90; 10];
            code.extend([0xeb, back.wrapping_neg()]);
            let want = want.map_or(Ok(()), |to| {
                Err(Refusal::BranchInto {
                    part: "f".into(),
                    from: Gva(AT.0 + 10),
                    to: Gva(AT.0 + to),
                })
            });
            assert_eq!(no_branch_into("f", &code, AT, &displaced), want);
        };
        check(2, None);
        check(3, Some(9));
        check(7, Some(5));
        check(8, None);
        assert!(matches!(
            no_branch_into("f", &[0x06], AT, &displaced),
            Err(Refusal::Undecodable { .. })
        ));
        let table = [0xff, 0x24, 0xc5, 0x00, 0x10, 0x00, 0x00];
        assert!(matches!(
            no_branch_into("f", &table, AT, &displaced),
            Err(Refusal::JumpTable { .. })
        ));
    }

    #[test]
    fn a_jump_into_the_arena_is_ours() {
        let arena = Gva(0xffff_ffff_ff80_0000)..Gva(0xffff_ffff_ffe0_0000);
        let to = Gva(arena.start.0 + 0x40);
        let ours = crate::x86::insn::jump(AT, to).unwrap();
        let want = Refusal::AlreadyRedirected {
            function: "f".into(),
            to,
        };
        assert_eq!(not_ours("f", AT, &ours, &arena), Err(want));
        let foreign = crate::x86::insn::jump(AT, Gva(AT.0 + 0x100)).unwrap();
        assert_eq!(not_ours("f", AT, &foreign, &arena), Ok(()));
        assert_eq!(
            not_ours("f", AT, &[0x55, 0x48, 0x89, 0xe5, 0x90], &arena),
            Ok(())
        );
        assert_eq!(not_ours("f", AT, &[0xe9], &arena), Ok(()));
    }

    #[test]
    fn changed_bytes_are_named() {
        let expected = [0x55, 0x48, 0x89, 0xe5, 0x53];
        assert_eq!(unchanged("f", AT, &expected, &expected), Ok(()));
        let check = |live: &[u8], offset: u64, cause: &str| {
            let Err(Refusal::Changed { at, cause: got, .. }) = unchanged("f", AT, &expected, live)
            else {
                panic!("{live:02x?} passed");
            };
            assert_eq!(at, Gva(AT.0 + offset));
            assert!(got.contains(cause), "{got}");
        };
        check(&[0xcc, 0x48, 0x89, 0xe5, 0x53], 0, "kprobe");
        check(&[0x55, 0x48, 0x89, 0xe5, 0x54], 4, "patched");
        check(&[0x55, 0xe9, 0x89, 0xe5, 0x53], 1, "jump");
        check(&[0x55, 0x48, 0x89, 0xe5], 4, "patched");
    }
}
