//! Text of the made-up kernel as it must be, and every way in which it may not be.

use proptest::prelude::*;

use super::{Cause, Change, ChangedError, Summary, compare, compare_part};
use crate::addr::Gva;
use crate::kernel::testing::guest::{SLIDE, TinyGuest};
use crate::kernel::testing::patched::{
    ABSENT, CALL, CONSTANT, COUNT, COUNT_AT, COUNTED, COUNTING_RETURN, COUNTING_THUNK, ENDBR,
    FENCE, JUMP_LABEL, LOCK, MOVED, NOTHING, OPERATION, PLAIN, PRESENT, RETPOLINE, STATIC_CALL,
    TARGET, TRACER, TRAMPOLINE, branch,
};
use crate::kernel::testing::{FORMS, Form, TEXT};

const VICTIM: u64 = TEXT + 0x300;
const PATIENT: u64 = TEXT + 0x440;
const BEHIND_PATIENT: u64 = TEXT + 0x480;
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// A guest whose kernel has made of its text what its processor and keys ask for.
pub(crate) fn booted(form: Form) -> TinyGuest {
    let mut guest = TinyGuest::new(form, 4);
    let features = guest.at("boot_cpu_data") + 4 + u64::from(PRESENT / 32) * 4;
    guest.put_bytes(features, &(1_u32 << (PRESENT % 32)).to_le_bytes());
    let operation = guest.at("pv_ops") + 8;
    guest.put(operation, VICTIM + SLIDE);
    let key = guest.at("__SCK__made");
    guest.put(key, VICTIM + SLIDE);
    let pointer = guest.at("made_pointer");
    guest.put(pointer, 0x1122_3344_5566_7788);
    let mut write = |at: u64, bytes: &[u8]| guest.put_bytes(at + SLIDE, bytes);
    write(VICTIM, &NOP5);
    write(PATIENT, &NOP5);
    write(BEHIND_PATIENT, &NOP5);
    write(FENCE, &[0x0f, 0xae, 0xe8, 0x66, 0x90]);
    write(MOVED, &branch(0xe8, MOVED, TEXT + 0x340));
    write(STATIC_CALL, &branch(0xe8, STATIC_CALL, VICTIM));
    write(TRAMPOLINE, &branch(0xe9, TRAMPOLINE, VICTIM));
    write(RETPOLINE, &[0xff, 0xd0, 0x0f, 0x1f, 0x00]);
    write(LOCK, &[0x3e]);
    write(ENDBR, &[0x66, 0x0f, 0x1f, 0x00]);
    write(OPERATION, &branch(0xe8, OPERATION, VICTIM));
    write(OPERATION + 5, &[0x90]);
    if form == Form::New {
        write(CONSTANT, &0x1122_3344_5566_7788_u64.to_le_bytes());
    }
    guest
}

fn compared(guest: &mut TinyGuest) -> Result<(Summary, Vec<Change>), ChangedError> {
    let kernel = guest.kernel();
    let mut changes = Vec::new();
    let summary = compare(&kernel, guest, &[], |change| changes.push(change.clone()))?;
    Ok((summary, changes))
}

#[test]
fn a_part_differs_as_the_whole_does_there() {
    for form in FORMS {
        let mut guest = booted(form);
        guest.put_bytes(VICTIM + SLIDE + 0x20, &[0x66]);
        let (_, all) = compared(&mut guest).unwrap();
        let kernel = guest.kernel();
        let part = |part: std::ops::Range<Gva>| {
            let mut changes = Vec::new();
            let each = |change: &Change| changes.push(change.clone());
            let summary = compare_part(&kernel, &guest, &[], &part, each).unwrap();
            (summary.compared, changes)
        };
        let victim = Gva(VICTIM + SLIDE)..Gva(VICTIM + SLIDE + 0x40);
        let there = all
            .iter()
            .filter(|change| victim.contains(&change.range.start));
        let there: Vec<_> = there.cloned().collect();
        assert!(there.len() > 1, "{form:?}: {there:x?}");
        assert_eq!(part(victim), (0x40, there), "{form:?}");
        assert_eq!(part(Gva(0x1000)..Gva(0x2000)).0, 0, "{form:?}");
        assert_eq!(part(Gva(u64::MAX)..Gva(0)).0, 0, "{form:?}");
    }
}

/// After `change` the cause of what is at `at` must be `want`, and nothing may be unexplained that is not there.
fn check(what: &str, change: &dyn Fn(&mut TinyGuest), at: u64, want: Option<Cause>) {
    for form in FORMS {
        let mut guest = booted(form);
        change(&mut guest);
        let (summary, changes) = compared(&mut guest).unwrap();
        let here = changes
            .iter()
            .find(|change| change.range.contains(&Gva(at + SLIDE)));
        assert_eq!(
            here.map(|change| change.cause),
            want,
            "{what} in {form:?}: {changes:x?}"
        );
        let allowed = u64::from(want == Some(Cause::Unexplained));
        let unexplained = summary
            .causes
            .get(&Cause::Unexplained)
            .map_or(0, |count| count.places);
        assert_eq!(
            unexplained, allowed,
            "{what} in {form:?}: {:x?}",
            summary.unexplained
        );
    }
}

#[test]
fn every_difference_has_its_cause() {
    for (at, want) in [
        (VICTIM, Cause::Fentry),
        (FENCE, Cause::Alternative),
        (MOVED, Cause::Alternative),
        (STATIC_CALL + 2, Cause::StaticCall),
        (TRAMPOLINE + 1, Cause::StaticCall),
        (RETPOLINE, Cause::Retpoline),
        (LOCK, Cause::SmpLock),
        (ENDBR, Cause::IbtEndbr),
    ] {
        check("as booted", &|_| (), at, Some(want));
    }
    for (form, want) in [
        (Form::New, Cause::Alternative),
        (Form::Old, Cause::Paravirt),
    ] {
        let (summary, changes) = compared(&mut booted(form)).unwrap();
        let call = changes
            .iter()
            .find(|change| change.range.start == Gva(OPERATION + SLIDE))
            .unwrap();
        assert_eq!(call.cause, want);
        assert_eq!(call.function, Some(("patched".to_owned(), 0x50)));
        assert_eq!(call.live[..5], branch(0xe8, OPERATION, VICTIM));
        assert_eq!(
            summary.causes.contains_key(&Cause::RuntimeConst),
            form == Form::New
        );
        assert_eq!(summary.compared, 0x3f00);
    }
}

#[test]
fn what_the_keys_say_now_must_be_there() {
    let on = |guest: &mut TinyGuest| {
        let key = guest.at("made_key");
        guest.put(key, 1);
    };
    check("a branch that is off", &|_| (), JUMP_LABEL, None);
    check(
        "a branch that should be on",
        &on,
        JUMP_LABEL,
        Some(Cause::Unexplained),
    );
    let taken = |guest: &mut TinyGuest| {
        on(guest);
        guest.put_bytes(JUMP_LABEL + SLIDE, &branch(0xe9, JUMP_LABEL, TARGET));
    };
    check(
        "a branch that is on",
        &taken,
        JUMP_LABEL,
        Some(Cause::JumpLabel),
    );
    let elsewhere = |guest: &mut TinyGuest| {
        let key = guest.at("__SCK__made");
        guest.put(key, PATIENT + SLIDE);
        guest.put_bytes(TRAMPOLINE + SLIDE, &branch(0xe9, TRAMPOLINE, PATIENT));
    };
    check(
        "a call that was not changed",
        &elsewhere,
        STATIC_CALL + 2,
        Some(Cause::Unexplained),
    );
    let nowhere = |guest: &mut TinyGuest| {
        let key = guest.at("__SCK__made");
        guest.put(key, 0);
        guest.put_bytes(STATIC_CALL + SLIDE, &NOP5);
        guest.put_bytes(TRAMPOLINE + SLIDE, &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    };
    check(
        "a call of nothing",
        &nowhere,
        STATIC_CALL,
        Some(Cause::StaticCall),
    );
    let feature = |guest: &mut TinyGuest| {
        let at = guest.at("boot_cpu_data") + 4 + u64::from(ABSENT / 32) * 4;
        let both = 1_u32 << (PRESENT % 32) | 1 << (ABSENT % 32);
        guest.put_bytes(at, &both.to_le_bytes());
    };
    check(
        "an alternative that is not called for",
        &feature,
        MOVED,
        Some(Cause::Unexplained),
    );
    let operation = |guest: &mut TinyGuest| {
        let at = guest.at("pv_ops") + 8;
        guest.put(at, NOTHING + SLIDE);
        guest.put_bytes(OPERATION + SLIDE, &[0x66, 0x0f, 0x1f, 0x44, 0, 0]);
    };
    check(
        "an operation that is nothing",
        &operation,
        RETPOLINE,
        Some(Cause::Retpoline),
    );
}

/// Makes a record of the function tracer for `victim`.
fn traced(guest: &mut TinyGuest, flags: u64, to: u64) {
    let (page, records) = (guest.object(24), guest.object(16));
    let pages = guest.at("ftrace_pages_start");
    guest.put(pages, page);
    guest.put(page + 8, records);
    guest.put(page + 16, 1);
    guest.put(records, VICTIM + SLIDE);
    guest.put(records + 8, flags);
    guest.put_bytes(VICTIM + SLIDE, &branch(0xe8, VICTIM, to));
}

#[test]
fn tracing_and_probes_explain_what_they_wrote() {
    let to = TRACER;
    check(
        "a traced function",
        &|guest| traced(guest, 1 << 31 | 1, to),
        VICTIM + 2,
        Some(Cause::Fentry),
    );
    check(
        "a call that nobody traces",
        &|guest| traced(guest, 0, to),
        VICTIM + 2,
        Some(Cause::Unexplained),
    );
    check(
        "a call to elsewhere",
        &|guest| traced(guest, 1 << 31, to + 1),
        VICTIM + 2,
        Some(Cause::Unexplained),
    );
    let own = |guest: &mut TinyGuest| {
        traced(guest, 1 << 31, TEXT + 0x3800);
        let (list, ops) = (guest.at("ftrace_ops_list"), guest.object(32));
        guest.put(list, ops);
        guest.put(ops + 8, TEXT + SLIDE + 0x3800);
        guest.put(ops + 16, 64);
    };
    check(
        "a tracer with code of its own",
        &own,
        VICTIM + 2,
        Some(Cause::Fentry),
    );
    check(
        "a direct call",
        &|guest| traced(guest, 1 << 31 | 1 << 23, PATIENT),
        VICTIM + 2,
        Some(Cause::Fentry),
    );
    let bpf = |flags: u64, trampoline: bool, offset: u64| {
        move |guest: &mut TinyGuest| {
            traced(guest, flags, TEXT + 0x3900 + offset);
            let start = TEXT + SLIDE + 0x3900;
            guest.bpf(&[(start, start + 64, "bpf_made", !trampoline)]);
        }
    };
    let direct = 1 << 31 | 1 << 23;
    for (what, prepare, want) in [
        ("a trampoline of BPF", bpf(direct, true, 0), Cause::Bpf),
        ("a place in it", bpf(direct, true, 1), Cause::Fentry),
        ("a program of BPF", bpf(direct, false, 0), Cause::Fentry),
        (
            "a call that is not direct",
            bpf(1 << 31, true, 0),
            Cause::Unexplained,
        ),
    ] {
        check(what, &prepare, VICTIM + 2, Some(want));
    }
    let probe = |guest: &mut TinyGuest, flags: u64, code: &[u8]| {
        let (table, probe) = (guest.at("kprobe_table"), guest.object(80));
        guest.put(table, probe);
        guest.put(probe + 40, PLAIN + SLIDE);
        guest.put(probe + 48, flags);
        guest.put(probe + 64, PATIENT + SLIDE);
        guest.put_bytes(PLAIN + SLIDE, code);
    };
    check(
        "a probe",
        &|guest| probe(guest, 0, &[0xcc]),
        PLAIN,
        Some(Cause::Kprobe),
    );
    check(
        "a probe that is off",
        &|guest| probe(guest, 2, &[0xcc]),
        PLAIN,
        Some(Cause::Unexplained),
    );
    let jump = branch(0xe9, PLAIN, PATIENT);
    check(
        "an optimised probe",
        &|guest| probe(guest, 4, &jump),
        PLAIN,
        Some(Cause::Kprobe),
    );
    check(
        "a breakpoint of nobody",
        &|guest| guest.put_bytes(PLAIN + SLIDE, &[0xcc]),
        PLAIN,
        Some(Cause::Unexplained),
    );
}

/// Makes the kernel count its calls.
fn counting(guest: &mut TinyGuest) {
    let thunk = guest.at("x86_return_thunk");
    guest.put(thunk, COUNTING_RETURN + SLIDE);
    let pad = COUNTED - COUNT.len() as u64;
    let mut code = COUNT;
    let distance = COUNT_AT.wrapping_sub(pad) + 0x10;
    code[4..8].copy_from_slice(&distance.to_le_bytes()[..4]);
    let mut write = |at: u64, bytes: &[u8]| guest.put_bytes(at + SLIDE, bytes);
    write(VICTIM + 16, &branch(0xe9, VICTIM + 16, COUNTING_RETURN));
    write(RETPOLINE, &branch(0xe8, RETPOLINE, COUNTING_THUNK));
    write(CALL, &branch(0xe8, CALL, pad));
    write(pad, &code);
}

#[test]
fn counted_calls_go_where_they_are_counted() {
    let pad = COUNTED - COUNT.len() as u64;
    check("a call", &counting, CALL + 1, Some(Cause::CallThunk));
    check(
        "the code that counts",
        &counting,
        pad,
        Some(Cause::CallThunk),
    );
    check(
        "an indirect call",
        &counting,
        RETPOLINE + 1,
        Some(Cause::Retpoline),
    );
    let past = |guest: &mut TinyGuest| {
        counting(guest);
        guest.put_bytes(CALL + SLIDE, &branch(0xe8, CALL, COUNTED));
    };
    check("a call past it", &past, CALL + 1, Some(Cause::Unexplained));
    let never = |guest: &mut TinyGuest| guest.put_bytes(CALL + SLIDE, &branch(0xe8, CALL, pad));
    check(
        "a call that is not to be counted",
        &never,
        CALL + 1,
        Some(Cause::Unexplained),
    );
    let other = |guest: &mut TinyGuest| {
        counting(guest);
        guest.put_bytes(pad + SLIDE + 8, &[6]);
    };
    check(
        "code that counts otherwise",
        &other,
        pad + 8,
        Some(Cause::Unexplained),
    );
    let called = |guest: &mut TinyGuest| {
        counting(guest);
        let key = guest.at("__SCK__made");
        guest.put(key, COUNTED + SLIDE);
        guest.put_bytes(STATIC_CALL + SLIDE, &branch(0xe8, STATIC_CALL, pad));
        guest.put_bytes(TRAMPOLINE + SLIDE, &branch(0xe9, TRAMPOLINE, COUNTED));
    };
    check(
        "a static call",
        &called,
        STATIC_CALL + 1,
        Some(Cause::StaticCall),
    );
}

#[test]
fn our_own_trampolines_are_given() {
    let mut guest = booted(Form::New);
    guest.put_bytes(PLAIN + SLIDE, &[0xe9, 1, 2, 3, 4]);
    let kernel = guest.kernel();
    let ours = Gva(PLAIN + SLIDE)..Gva(PLAIN + SLIDE + 5);
    let summary = compare(&kernel, &guest, &[ours], |_| ()).unwrap();
    assert_eq!(
        summary.causes.get(&Cause::Ours).map(|count| count.places),
        Some(1)
    );
    assert_eq!(summary.unexplained, []);
}

#[test]
fn a_guest_that_cannot_be_compared_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut TinyGuest), want: &str| {
        let mut guest = booted(Form::New);
        change(&mut guest);
        let got = compared(&mut guest).unwrap_err().to_string();
        assert!(got.contains(want), "{got}");
    };
    let set = |name: &'static str, value: u64| {
        move |guest: &mut TinyGuest| {
            let at = guest.at(name);
            guest.put(at, value);
        }
    };
    refused(&set("system_state", 0), "it is in state SYSTEM_BOOTING");
    refused(
        &set("text_mutex", 0xffff_8880_0020_0000),
        "text_mutex is held",
    );
    refused(
        &|guest| guest.put_bytes(RETPOLINE + SLIDE, &[0xff, 0xd1]),
        "its indirect branch at",
    );
    refused(
        &|guest| guest.put_bytes(ENDBR + SLIDE, &[0x0f, 0x1f, 0x40, 0]),
        "its sealed endbr64 at",
    );
    refused(&set("ftrace_pages_start", 1), "cannot be compared");
}

#[test]
fn every_flipped_bit_is_noticed() {
    for form in [Form::New, Form::Old] {
        let mut guest = booted(form);
        let kernel = guest.kernel();
        for at in (TEXT..TEXT + 0x3f00).filter(|at| at % 64 < 12 || *at >= TEXT + 0x3600) {
            let old = guest.get(at + SLIDE);
            guest.put(at + SLIDE, old ^ 1 << (at % 8));
            let seen = compare(&kernel, &guest, &[], |_| ());
            let noticed =
                seen.is_err() || seen.is_ok_and(|summary| !summary.unexplained.is_empty());
            assert!(noticed, "{form:?} {at:#x}");
            guest.put(at + SLIDE, old);
        }
    }
}

proptest! {
    #[test]
    fn damage_never_panics(form in 0..3_usize, changes in proptest::collection::vec((0..2_u8, 0..0x800_u64, any::<u64>(), 0..3_u8), 1..8)) {
        let mut guest = booted(FORMS[form]);
        traced(&mut guest, 1 << 31, TRACER);
        let heap = guest.object(8);
        for (place, offset, value, how) in changes {
            // Among the variables, or what they point to.
            let base = if place == 0 { guest.at("kprobe_table") } else { heap - 0x800 };
            let at = base + offset / 8 * 8;
            let old = guest.get(at);
            guest.put(at, match how {
                0 => value,
                1 => heap - 0x800 + value % 0x800,
                _ => old ^ 1 << (value & 63),
            });
        }
        guest.link();
        let kernel = guest.kernel();
        let _ = compare(&kernel, &guest, &[], |_| ());
    }
}
