//! The whole of an apply on a fake guest: every write is made to fail once, and every reason to wait comes and goes.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{ApplyOptions, CommitFailed, LOOKS, Report, commit};
use crate::addr::{Gpa, Gva};
use crate::commit::{Blocked, CommitError, Running, Scanned};
use crate::guest::fake::{Call, FakeGuest, Fault, Region};
use crate::guest::{ReadPhys, Registers};
use crate::kernel::rested::Rested;
use crate::plan::{Plan, Purpose, Write};

const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

/// A kernel whose text lies at guest-physical zero, and which is in the way for some tries.
#[derive(Default)]
struct Fake {
    busy: Cell<u32>,
    in_flux: Cell<u32>,
    other: bool,
}

fn count_down(cell: &Cell<u32>) -> bool {
    let left = cell.get();
    cell.set(left.saturating_sub(1));
    left > 0
}

impl Running for Fake {
    fn prove_same<G: ReadPhys + Registers>(&self, _: &G) -> Result<(), Blocked> {
        if self.other {
            Err(Blocked::OtherKernel {
                cause: "build-id".into(),
            })
        } else {
            Ok(())
        }
    }

    fn settled<G: ReadPhys>(&self, _: &G) -> Result<(), Blocked> {
        if count_down(&self.in_flux) {
            Err(Blocked::InFlux {
                cause: "text_mutex".into(),
            })
        } else {
            Ok(())
        }
    }

    fn first_look<G: ReadPhys>(&self, _: &G, _: &Plan, _: Instant) -> Rested {
        Rested::default()
    }

    fn scan<G: ReadPhys + Registers>(
        &self,
        _: &G,
        plan: &Plan,
        _: Rested,
    ) -> Result<Scanned, Blocked> {
        assert_eq!(plan.forbidden.len(), 1);
        if count_down(&self.busy) {
            Err(Blocked::Busy {
                cause: "vCPU 0".into(),
            })
        } else {
            Ok(Scanned {
                tasks: 3,
                words: 99,
                ..Scanned::default()
            })
        }
    }

    fn publishing<G: ReadPhys>(&self, _: &G, _: &Plan) -> Result<Vec<Write>, Blocked> {
        Ok(Vec::new())
    }

    fn translate<G: ReadPhys>(&self, _: &G, at: Gva) -> Result<Gpa, Blocked> {
        at.offset_from(TEXT).map(Gpa).ok_or(Blocked::Unreadable {
            cause: "not text".into(),
        })
    }
}

fn guest() -> FakeGuest {
    let text = (0..=255_u8).cycle().take(0x2000).collect();
    let memory = vec![
        Region {
            at: Gpa(0),
            bytes: text,
        },
        Region {
            at: Gpa(0x10_0000),
            bytes: vec![0; 0x1000],
        },
    ];
    FakeGuest::new(memory, Vec::new(), Gpa(0x10_0000)..Gpa(0x10_1000))
}

fn plan() -> Plan {
    let write = |purpose, at: u64, expect: Option<&[u8]>, bytes: &[u8]| Write {
        purpose,
        subject: "f".into(),
        gva: Gva(TEXT.0 + at),
        gpa: Gpa(at),
        expect: expect.map(<[u8]>::to_vec),
        bytes: bytes.to_vec(),
    };
    Plan {
        writes: vec![
            write(
                Purpose::Mapping,
                0x1000,
                Some(&[0, 1, 2, 3, 4, 5, 6, 7]),
                &[0xa1; 8],
            ),
            write(Purpose::Arena, 0x10_0040, None, &[0xc3; 100]),
            write(Purpose::Arena, 0x10_0800, None, &[7; 10]),
            write(
                Purpose::Trampoline,
                5,
                Some(&[5, 6, 7, 8, 9]),
                &[0xe9, 1, 2, 3, 4],
            ),
            write(
                Purpose::Trampoline,
                0x25,
                Some(&[0x25, 0x26, 0x27, 0x28, 0x29]),
                &[0xe9, 5, 6, 7, 8],
            ),
        ],
        forbidden: vec![Gva(TEXT.0 + 6)..Gva(TEXT.0 + 10)],
        ..Plan::default()
    }
}

/// The plan that takes the jumps of `plan` back.
fn back(plan: &Plan) -> Plan {
    let jumps = plan.writes.iter().rev();
    let jumps = jumps.filter(|write| write.purpose == Purpose::Trampoline);
    let writes = jumps.map(|write| Write {
        expect: Some(write.bytes.clone()),
        bytes: write.expect.clone().unwrap(),
        ..write.clone()
    });
    Plan {
        writes: writes.collect(),
        forbidden: plan.forbidden.clone(),
        ..Plan::default()
    }
}

fn try_it(
    guest: &mut FakeGuest,
    kernel: &Fake,
    plan: &Plan,
    check_only: bool,
) -> Result<Report, CommitFailed> {
    let deadline = Instant::now() + Duration::from_millis(100);
    let options = ApplyOptions {
        deadline,
        check_only,
        doing: &|_| {},
        written: &|| {},
        hook: &|_| {},
    };
    commit(guest, kernel, plan, &options).map(|(report, _)| report)
}

#[test]
fn an_update_is_applied_and_reverted() {
    let (mut guest, kernel, plan) = (guest(), Fake::default(), plan());
    let before = guest.memory().to_vec();
    let report = try_it(&mut guest, &kernel, &plan, false).unwrap();
    assert_eq!(
        (report.pauses, report.tasks, report.stack_words),
        (1, 3, 99)
    );
    assert_eq!(report.bytes_written, plan.len());
    assert_eq!(guest.memory()[0].bytes[5..10], [0xe9, 1, 2, 3, 4]);
    let order: Vec<Gpa> = guest
        .calls
        .iter()
        .filter_map(|call| {
            if let Call::Write { at, .. } = call {
                Some(*at)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(
        order,
        plan.writes
            .iter()
            .map(|write| write.gpa)
            .collect::<Vec<_>>(),
        "jumps come last"
    );

    try_it(&mut guest, &kernel, &back(&plan), false).unwrap();
    assert_eq!(
        guest.memory()[0].bytes[..0x1000],
        before[0].bytes[..0x1000],
        "text is as it was"
    );
    assert_eq!(guest.memory()[1].bytes[0x40], 0xc3, "the arena stays");
    assert!(!guest.is_paused());
}

#[test]
fn a_check_writes_nothing() {
    let (mut guest, plan) = (guest(), plan());
    let before = guest.memory().to_vec();
    let report = try_it(&mut guest, &Fake::default(), &plan, true).unwrap();
    assert_eq!(report.bytes_written, 0);
    assert_eq!(guest.memory(), before);
    assert_eq!(guest.calls, [Call::Pause, Call::Resume]);
}

#[test]
fn a_fault_at_any_write_leaves_memory_as_it_was() {
    let plan = plan();
    for n in 0..plan.writes.len() {
        let mut guest = guest();
        let before = guest.memory().to_vec();
        guest.fault = Fault::Write(n);
        let error = try_it(&mut guest, &Fake::default(), &plan, false).unwrap_err();
        let CommitFailed::Commit(CommitError::RolledBack { at, .. }) = error else {
            panic!("write {n}: {error}")
        };
        assert_eq!(at, plan.writes[n].gva);
        assert_eq!(guest.memory(), before, "write {n}");
        assert!(!guest.is_paused(), "write {n}");
        assert_eq!(guest.calls.last(), Some(&Call::Resume));
    }
}

#[test]
fn a_failed_undo_leaves_the_guest_paused() {
    let plan = plan();
    for n in 0..plan.writes.len() {
        let mut guest = guest();
        guest.fault = Fault::WritesFrom(n);
        let error = try_it(&mut guest, &Fake::default(), &plan, false).unwrap_err();
        assert!(
            matches!(error, CommitFailed::Commit(CommitError::Torn { .. })),
            "write {n}: {error}"
        );
        assert!(error.to_string().contains("stays paused"));
        assert!(guest.is_paused(), "write {n}");
        assert_eq!(guest.calls.last(), Some(&Call::LeftPaused));
    }
}

/// Applies the plan with a panic at call `n`; the guest, and whether there was one.
fn panics_at(fault: Fault) -> (FakeGuest, bool, bool) {
    let mut guest = guest();
    guest.fault = fault;
    let written = Cell::new(false);
    let options = ApplyOptions {
        deadline: Instant::now() + Duration::from_secs(10),
        check_only: false,
        doing: &|_| {},
        written: &|| written.set(true),
        hook: &|_| {},
    };
    let (kernel, plan) = (Fake::default(), plan());
    let end = catch_unwind(AssertUnwindSafe(|| {
        commit(&mut guest, &kernel, &plan, &options).map(drop)
    }));
    assert!(!matches!(end, Ok(Err(_))), "{fault:?}: {end:?}");
    (guest, written.get(), end.is_err())
}

#[test]
fn a_panic_at_any_call_leaves_memory_as_it_was_or_whole() {
    let (whole, ..) = panics_at(Fault::Never);
    let before = guest();
    let mut undone = 0;
    for n in 0.. {
        let (guest, written, panicked) = panics_at(Fault::Panic(n));
        let expected = if written { &whole } else { &before };
        assert_eq!(guest.memory(), expected.memory(), "call {n}");
        assert!(!guest.is_paused(), "call {n}");
        if !panicked {
            break;
        }
        let writes = guest.calls.iter();
        undone += usize::from(
            writes
                .clone()
                .any(|call| matches!(call, Call::Write { .. }))
                && !written,
        );
    }
    // At each write but the first something had been written already.
    assert!(undone >= plan().writes.len() - 1, "{undone}");
}

#[test]
fn a_panic_that_cannot_be_undone_leaves_the_guest_paused() {
    let mut left = 0;
    for n in 0.. {
        let (guest, written, panicked) = panics_at(Fault::PanicAndWrites(n));
        if written || !panicked {
            break;
        }
        // A write that panicked may have been done.
        let begun = guest
            .calls
            .iter()
            .any(|call| matches!(call, Call::Write { .. }));
        assert_eq!(guest.is_paused(), begun, "call {n}");
        let torn = guest.memory() != self::guest().memory();
        assert!(begun || !torn, "call {n}");
        left += usize::from(torn);
    }
    assert!(left > 0);
}

#[test]
fn what_passes_is_waited_for() {
    let check = |kernel: &Fake, pauses: u64| {
        let mut guest = guest();
        let report = try_it(&mut guest, kernel, &plan(), false).unwrap();
        assert_eq!(report.pauses, pauses);
        assert_eq!(
            guest
                .calls
                .iter()
                .filter(|call| **call == Call::Resume)
                .count() as u64,
            pauses
        );
    };
    check(
        &Fake {
            busy: Cell::new(3),
            ..Fake::default()
        },
        4,
    );
    check(
        &Fake {
            in_flux: Cell::new(2),
            ..Fake::default()
        },
        3,
    );
    check(
        &Fake {
            in_flux: Cell::new(1),
            busy: Cell::new(2),
            ..Fake::default()
        },
        4,
    );
}

#[test]
fn what_does_not_pass_ends_at_the_deadline() {
    let mut guest = guest();
    let before = guest.memory().to_vec();
    let kernel = Fake {
        busy: Cell::new(u32::MAX),
        ..Fake::default()
    };
    let error = try_it(&mut guest, &kernel, &plan(), false).unwrap_err();
    assert!(
        matches!(
            error,
            CommitFailed::Deadline {
                last: Blocked::Busy { .. },
                pauses: 3..
            }
        ),
        "{error}"
    );
    assert_eq!(
        (guest.memory(), guest.is_paused()),
        (before.as_slice(), false)
    );
}

#[test]
fn a_check_that_takes_too_long_commits_nothing() {
    let mut guest = guest();
    let before = guest.memory().to_vec();
    let options = ApplyOptions {
        deadline: Instant::now(),
        check_only: false,
        doing: &|_| {},
        written: &|| {},
        hook: &|_| {},
    };
    let error = commit(&mut guest, &Fake::default(), &plan(), &options).unwrap_err();
    assert!(
        matches!(
            error,
            CommitFailed::Deadline {
                last: Blocked::Late,
                pauses: 1
            }
        ),
        "{error}"
    );
    assert_eq!(
        (guest.memory(), guest.is_paused()),
        (before.as_slice(), false)
    );
}

#[test]
fn what_is_refused_is_not_tried_again() {
    let check = |guest: &mut FakeGuest, kernel: &Fake, what: &str, looks: u64| {
        let before = guest.memory().to_vec();
        let error = try_it(guest, kernel, &plan(), false).unwrap_err();
        assert!(matches!(error, CommitFailed::Refused(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(
            (guest.memory(), guest.is_paused()),
            (before.as_slice(), false)
        );
        let pauses = usize::try_from(looks).unwrap();
        assert_eq!(
            guest.calls,
            vec![[Call::Pause, Call::Resume]; pauses].concat()
        );
    };
    check(
        &mut guest(),
        &Fake {
            other: true,
            ..Fake::default()
        },
        "no longer runs the kernel",
        LOOKS,
    );
    // The guest set a kprobe after the plan was made.
    let mut probed = guest();
    probed.poke(Gpa(5), &[0xcc]).unwrap();
    check(&mut probed, &Fake::default(), "kprobe", 1);
    let mut mapped = guest();
    mapped.poke(Gpa(0x1000), &[0xff]).unwrap();
    check(
        &mut mapped,
        &Fake::default(),
        "f was changed in the running kernel",
        1,
    );
}

#[test]
fn a_guest_that_does_not_stop_is_left_alone() {
    let mut guest = guest();
    guest.fault = Fault::Pause;
    let error = try_it(&mut guest, &Fake::default(), &plan(), false).unwrap_err();
    assert!(matches!(error, CommitFailed::Pause(_)), "{error}");
    assert_eq!(guest.calls, [Call::Pause]);
}
