//! Unwind tables of both forms, those that are not sound, and damaged ones.

use std::sync::Arc;

use proptest::prelude::*;

use super::{Base, Content, FramePointer, Orc, OrcError, OrcTable};
use crate::kernel::image::Image;
use crate::kernel::testing::orc::{ENTRIES, FUNCTIONS, IPS, Rule, entry, function, rules};
use crate::kernel::testing::{FORMS, Form, Part, TEXT, elf, parts};

/// The image of `form` with its sections changed by `change`.
fn image(form: Form, change: impl Fn(&mut Part)) -> Image {
    let mut parts = parts(form);
    parts.iter_mut().for_each(change);
    parts.retain(|part| !part.bytes.is_empty());
    Image::parse(Arc::new(elf(&parts, &[&[], &[], &[]]))).unwrap()
}

fn call(base: Base, offset: i16, bp: FramePointer) -> Orc {
    Orc::Caller {
        base,
        offset,
        bp,
        content: Content::Call,
        signal: false,
    }
}

#[test]
fn both_forms_of_entries_are_understood() {
    let at = |number: u64| FUNCTIONS + number * 16;
    let saved = FramePointer::FromCallerSp(-16);
    let other = |content| Orc::Caller {
        base: Base::Sp,
        offset: 0,
        bp: FramePointer::Kept,
        content,
        signal: true,
    };
    let kept = FramePointer::Kept;
    for form in FORMS {
        let image = image(form, |_| {});
        let table = image.orc().unwrap();
        for (offset, want) in [
            (0, Orc::Undefined),
            (0x7f, Orc::Undefined),
            (0x80, Orc::End),
            (0xff, Orc::End),
            (0x100, other(Content::ProcessorFrame)),
            (0x110, other(Content::Registers)),
            (0x305, call(Base::Sp, 8, kept)),
            (0x306, call(Base::Sp, 16, saved)),
            (0x600, Orc::Undefined),
            (at(function::FRAME_POINTER), call(Base::Bp, 16, saved)),
            (at(function::OVER_ANOTHER_STACK), call(Base::AtSp, 8, kept)),
            (at(function::REALIGNED), call(Base::AtBp, -8, kept)),
            (at(function::BY_R10), call(Base::R10, 0, kept)),
            (at(function::BY_R13), call(Base::R13, 0, kept)),
            (
                at(function::BP_FROM_BP),
                call(Base::Sp, 24, FramePointer::FromBp(0)),
            ),
            (at(function::UNKNOWN), Orc::Undefined),
            (at(function::OTHERS), call(Base::Sp, 8, kept)),
            (0x3fff, Orc::Undefined),
        ] {
            assert_eq!(
                table.lookup(TEXT + offset),
                Some(want),
                "{form:?} {offset:#x}"
            );
        }
        assert_eq!(table.lookup(TEXT - 1), None);
        for offset in 0..0x4000 {
            let rules = rules().filter(|(at, _)| *at <= offset);
            let (_, rule) = rules.last().unwrap();
            let mut bytes = [0; 8];
            bytes[..6].copy_from_slice(&entry(form, rule));
            let got = table.lookup(TEXT + offset);
            assert_eq!(got, Some(table.decode(bytes)), "{form:?} {offset:#x}");
        }
    }
}

#[test]
fn tables_that_are_not_sound_are_refused() {
    type Change = fn(&mut Vec<u8>);
    let shape = |ips, entries| OrcError::Shape { ips, entries };
    let cases: [(u64, Change, OrcError); 6] = [
        (IPS, |bytes| bytes.truncate(4 * 10), shape(40, 6 * 36)),
        (
            ENTRIES,
            |bytes| bytes.truncate(6 * 30 + 1),
            shape(4 * 36, 181),
        ),
        (
            IPS,
            Vec::clear,
            OrcError::Absent {
                section: ".orc_unwind_ip",
            },
        ),
        // The fourth address drops below the third.
        (
            IPS,
            |bytes| bytes[12..16].copy_from_slice(&(-0x38_2000_i32).to_le_bytes()),
            OrcError::Unsorted {
                index: 3,
                at: TEXT + 12,
            },
        ),
        (
            IPS,
            |bytes| bytes[3] = 0x80,
            OrcError::Elsewhere { from: 0, to: 0 },
        ),
        // The entry of a traced function is said to have a frame already.
        (
            ENTRIES,
            |bytes| bytes[6 * 9] = 16,
            OrcError::Meaning {
                at: crate::addr::LinkAddr(TEXT + 0x300),
            },
        ),
    ];
    for (section, change, want) in cases {
        let image = image(Form::Old, |part| {
            if part.at == section {
                change(&mut part.bytes);
            }
        });
        let got = image.orc().unwrap_err().clone();
        let same = match (&got, &want) {
            (OrcError::Elsewhere { .. }, OrcError::Elsewhere { .. }) => true,
            _ => got == want,
        };
        assert!(same, "{got:?} instead of {want:?}");
    }
}

#[test]
fn other_tables_are_read_like_the_images() {
    let image = image(Form::New, |_| {});
    let like = image.orc().unwrap();
    let entries: Vec<u8> = [Rule::End, Rule::Call((5, 24), (0, 0))]
        .into_iter()
        .flat_map(|rule| entry(Form::New, rule))
        .collect();
    let table = |at: u64, ips: [i32; 2]| {
        let ips = ips.iter().flat_map(|ip| ip.to_le_bytes()).collect();
        OrcTable::like(like, at, ips, entries.clone(), &(0x1_0000..0x2_0000))
    };
    let found = table(0x3_0000, [-0x2_0000, -0x1_fff4]).unwrap();
    assert_eq!(found.lookup(0x1_0007), Some(Orc::End));
    assert_eq!(found.entry(0x1_0007), Some(&entries[..6]));
    for form in FORMS {
        let image = super::tests::image(form, |_| {});
        let table = image.orc().unwrap();
        assert_eq!(table.silence().len(), table.entry_size());
        assert_eq!(table.decode([0; 8]), Orc::Undefined);
    }
    // A rule goes on over the edge of a block of the index.
    let over = table(0x3_0000, [-0x2_0000, -0x1_f000]).unwrap();
    assert_eq!(over.lookup(0x1_1003), Some(Orc::End));
    assert_ne!(over.lookup(0x1_1004), Some(Orc::End));
    assert_eq!(
        found.lookup(0x1_0010),
        Some(call(Base::Sp, 24, FramePointer::Kept))
    );
    assert!(matches!(
        table(0x3_0000, [-0x2_0000, -0x2_1000]),
        Err(OrcError::Unsorted { .. })
    ));
    assert!(matches!(
        table(0x4_0000, [-0x2_0000, -0x1_f000]),
        Err(OrcError::Elsewhere { .. })
    ));
    // The first address lies behind the end of the address space, the second before it.
    let ips = [1 << 12, -1 << 12]
        .iter()
        .flat_map(|ip: &i32| ip.to_le_bytes());
    let around = OrcTable::like(
        like,
        0_u64.wrapping_sub(8),
        ips.collect(),
        entries.clone(),
        &(0..u64::MAX),
    );
    assert!(matches!(around, Err(OrcError::Elsewhere { .. })));
}

proptest! {
    #[test]
    fn damage_never_panics(
        changes in proptest::collection::vec((any::<bool>(), any::<usize>(), any::<u8>()), 1..8),
        cut: Option<(bool, usize)>,
        at: u16,
    ) {
        let image = image(Form::New, |part| {
            for (ips, index, value) in &changes {
                if part.at == (if *ips { IPS } else { ENTRIES }) {
                    let len = part.bytes.len();
                    part.bytes[index % len] = *value;
                }
            }
            if let Some((ips, len)) = cut && part.at == (if ips { IPS } else { ENTRIES }) {
                part.bytes.truncate(1 + len % part.bytes.len());
            }
        });
        if let Ok(table) = image.orc() {
            let _ = table.lookup(TEXT + u64::from(at));
        }
    }
}

#[test]
fn an_entry_is_made_for_so_many_pushed_bytes() {
    for form in FORMS {
        let image = image(form, |_| {});
        let table = image.orc().unwrap();
        for pushed in [0, 8, 24, 48, 0x1000] {
            let entry = table.entered(pushed).unwrap();
            let mut bytes = [0; 8];
            bytes[..entry.len()].copy_from_slice(&entry);
            let want = call(Base::Sp, 8 + pushed, FramePointer::Kept);
            assert_eq!(table.decode(bytes), want, "{form:?} {pushed}");
        }
        assert_eq!(table.entered(i16::MAX), None);
    }
}
