//! Packages applied to a made-up kernel in a made-up guest, from the package's bytes to the guest's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    ApplyError, ApplyOptions, Arena, CommitFailed, Life, Model, Report, Request, apply, reuse,
    revert, settle,
};
use crate::addr::{Gpa, Gva};
use crate::commit::CommitError;
use crate::edition::list::Use;
use crate::edition::object::Package;
use crate::edition::object::tests::Maker;
use crate::guest::fake::{FakeGuest, Fault, Region as Memory};
use crate::kernel::locate::Kernel;
use crate::kernel::stack::Who;
use crate::kernel::testing::guest::{SLIDE, TinyGuest};
use crate::kernel::testing::orc::{AFTER_CALL, FUNCTION, FUNCTIONS, Rule, entry, function};
use crate::kernel::testing::{BUILD_ID, FORMS, Form, TEXT, task};
use crate::kernel::unwind::{End, OtherCode, Reason, Stack, stacks};
use crate::observe::verify;
use crate::plan::Lead;
use crate::rule;
use crate::x86::insn::{NOP5, whole_instructions};

const ARENA: Gpa = Gpa(0x1_0000_0000);
/// Where `patient` is in the image, and its jump behind the fentry site.
const JUMP: u64 = TEXT + 0x445;

/// A package whose edition of `function` calls the original.
pub(super) fn package(function: &str, position: u32, build_id: &[u8]) -> Package {
    let mut maker = Maker::for_kernel(&[0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0], build_id);
    maker.relocate_text(1, 4, "__fentry__", -4);
    maker.relocate_text(6, 4, &format!("exopatch_original_{function}"), -4);
    maker.edition(function, position, 0);
    maker.orc();
    Package::parse(&maker.finish()).unwrap()
}

/// A running guest, its kernel and an empty arena.
pub(super) fn booted(form: Form) -> (FakeGuest, Kernel, Arena) {
    let mut tiny = TinyGuest::new(form, 4);
    // It sleeps in the function that it began with.
    let first = TEXT + SLIDE + FUNCTIONS + function::FIRST * FUNCTION + AFTER_CALL;
    tiny.task(7, "worker", &[0, 0, 0, 0, 0, 0, first]);
    started(tiny)
}

pub(super) fn started(mut tiny: TinyGuest) -> (FakeGuest, Kernel, Arena) {
    let kernel = tiny.kernel();
    let memory = vec![
        Memory {
            at: Gpa(0),
            bytes: tiny.memory,
        },
        Memory {
            at: ARENA,
            bytes: vec![0; 6 << 20],
        },
    ];
    let guest = FakeGuest::new(memory, tiny.vcpus, ARENA..Gpa(ARENA.0 + (6 << 20)));
    let arena = Arena::new(&guest, &kernel).unwrap();
    (guest, kernel, arena)
}

pub(super) fn apply_it(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    package: &Package,
    check_only: bool,
) -> Result<Report, ApplyError> {
    let request = Request::new(1, package);
    apply(guest, kernel, arena, &request, &options(check_only))
}

pub(super) fn options<'a>(check_only: bool) -> ApplyOptions<'a> {
    ApplyOptions {
        deadline: Instant::now() + Duration::from_millis(200),
        check_only,
        doing: &|_| {},
        written: &|| {},
        hook: &|_| {},
    }
}

/// Takes updates back at once.
pub(super) fn undo(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    updates: &[u64],
) -> Result<Report, ApplyError> {
    undo_by(guest, kernel, arena, updates, Model::Immediate)
}

/// Takes updates back by a model.
pub(super) fn undo_by(
    guest: &mut FakeGuest,
    kernel: &Kernel,
    arena: &mut Arena,
    updates: &[u64],
    model: Model,
) -> Result<Report, ApplyError> {
    revert(guest, kernel, arena, updates, model, &options(false))
}

/// What the kernel sees at `JUMP`, 6 bytes.
pub(super) fn live(guest: &FakeGuest, kernel: &Kernel) -> Vec<u8> {
    let mut bytes = vec![0; 6];
    let at = Gva(JUMP + SLIDE);
    kernel.read(guest, at, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_package_reaches_the_guest_and_leaves_it() {
    for form in FORMS {
        let (mut guest, kernel, mut arena) = booted(form);
        let before = live(&guest, &kernel);
        let package = package("patient", 0, &BUILD_ID);
        apply_it(&mut guest, &kernel, &mut arena, &package, true).unwrap();
        assert!(
            arena.holds.placed.is_empty() && arena.holds.space.used() == 64,
            "a check changes nothing"
        );
        assert_eq!(live(&guest, &kernel), before);

        let report = apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap();
        assert_eq!(report.tasks, 3);
        let observed = verify(&guest, &kernel, &arena.holds, 1);
        assert!(
            observed.bytes > 20 && observed.differences.is_empty(),
            "{observed:?}"
        );
        let placed = Arc::clone(&arena.holds.placed[&1]);
        let [redirection] = &placed.linked.redirections[..] else {
            panic!("one redirection")
        };
        let jump = whole_instructions(&live(&guest, &kernel), redirection.target.jump, 6).unwrap();
        assert_eq!(jump[0].near_branch_target(), redirection.edition.0);
        assert_eq!(jump.len(), 2, "the spare byte is a NOP");
        // The edition is executable where the kernel's tables say, and calls the head.
        let mut edition = vec![0; 10];
        kernel
            .read(&guest, redirection.edition, &mut edition)
            .unwrap();
        assert_eq!(edition[..5], NOP5);
        let edition = whole_instructions(&edition, redirection.edition, 10).unwrap();
        assert_eq!(edition[1].near_branch_target(), redirection.head.at.0);

        undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
        assert_eq!(live(&guest, &kernel), before);
        let observed = verify(&guest, &kernel, &arena.holds, 1);
        assert!(observed.differences.is_empty(), "its code is still there");
        let again = undo(&mut guest, &kernel, &mut arena, &[1]).unwrap_err();
        assert!(again.to_string().contains("not in effect"), "{again}");
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert_eq!(arena.holds.space.used(), 64);
        assert!(arena.holds.editions(1).is_empty());
    }
}

/// A package whose edition of `patient` calls the original, and goes on behind that 10 bytes into it.
pub(super) fn calling(form: Form) -> Package {
    calling_all(form, &["patient"])
}

/// For calls of this rule, which are not counted.
pub(super) fn how(rule: &str) -> Use {
    Use {
        rule: Some(Arc::new(rule::Rule::parse(rule).unwrap())),
        counted: false,
    }
}

/// The same of several functions.
pub(super) fn calling_all(form: Form, functions: &[&str]) -> Package {
    let edition = [
        0xe8, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
    ];
    let mut maker = Maker::for_kernel(&edition.repeat(functions.len()), &BUILD_ID);
    for (function, at) in functions.iter().zip((0..).step_by(edition.len())) {
        maker.relocate_text(at + 1, 4, "__fentry__", -4);
        maker.relocate_text(at + 6, 4, &format!("exopatch_original_{function}"), -4);
        maker.edition(function, 0, at);
    }
    maker.orc_entry(entry(form, Rule::Call((5, 8), (0, 0))));
    Package::parse(&maker.finish()).unwrap()
}

/// Updates lie on each other, and go one by one, two at once, or for another that takes their place.
#[test]
fn updates_lie_on_each_other() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let before = live(&guest, &kernel);
    let package = package("patient", 0, &BUILD_ID);
    let come = |arena: &mut Arena, guest: &mut FakeGuest, id: u64, instead_of: &[u64]| {
        let request = Request {
            instead_of,
            ..Request::new(id, &package)
        };
        apply(guest, &kernel, arena, &request, &options(false)).unwrap();
        let lead = arena.holds.placed[&id].linked.redirections[0].edition;
        let jump = whole_instructions(&live(guest, &kernel), Gva(JUMP + SLIDE), 5).unwrap();
        assert_eq!(jump[0].near_branch_target(), lead.0, "update {id} leads");
        let found = verify(&*guest, &kernel, &arena.holds, id);
        assert!(found.differences.is_empty(), "{found:?}");
    };
    let life = |arena: &Arena, id: u64| {
        let editions = arena.holds.editions(id).into_iter();
        editions.map(|edition| edition.life).collect::<Vec<_>>()
    };
    come(&mut arena, &mut guest, 1, &[]);
    come(&mut arena, &mut guest, 2, &[]);
    come(&mut arena, &mut guest, 3, &[]);
    assert_eq!(life(&arena, 1), [Life::Placed]);
    assert_eq!(life(&arena, 3), [Life::Active]);
    // From the middle: nothing changes for callers.
    let jump = live(&guest, &kernel);
    undo(&mut guest, &kernel, &mut arena, &[2]).unwrap();
    assert_eq!(live(&guest, &kernel), jump);
    assert_eq!(life(&arena, 2), [Life::Draining { by: None }]);
    settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
    come(&mut arena, &mut guest, 4, &[1, 3]);
    assert_eq!(life(&arena, 4), [Life::Active]);
    assert!(life(&arena, 2).is_empty(), "nobody was found in it");
    undo(&mut guest, &kernel, &mut arena, &[4]).unwrap();
    assert_eq!(live(&guest, &kernel), before);
    // The next one settles what is left of the others.
    settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
    assert_eq!(arena.holds.space.used(), 64);
    assert!(arena.holds.placed.is_empty() && arena.holds.drains.is_empty());
}

/// A jump of ours that somebody has changed is not written over.
#[test]
fn a_jump_that_is_not_as_it_was_left_is_refused() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let package = package("patient", 0, &BUILD_ID);
    apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap();
    let at = kernel.translate(&guest, Gva(JUMP + SLIDE)).unwrap();
    guest.poke(at, &[0xcc]).unwrap();
    let refused = |error: ApplyError| {
        let said = error.to_string();
        assert!(said.contains("was changed in the running kernel"), "{said}");
    };
    let request = Request::new(2, &package);
    refused(apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap_err());
    refused(undo(&mut guest, &kernel, &mut arena, &[1]).unwrap_err());
    assert_eq!(arena.holds.editions(1)[0].life, Life::Active);
}

#[test]
fn a_fault_at_any_write_leaves_the_guest_as_it_was() {
    let package = package("patient", 0, &BUILD_ID);
    let mut faults = 0;
    loop {
        let (mut guest, kernel, mut arena) = booted(Form::New);
        let before = guest.memory().to_vec();
        guest.fault = Fault::Write(faults);
        match apply_it(&mut guest, &kernel, &mut arena, &package, false) {
            Ok(_) => break,
            Err(ApplyError::Commit(CommitFailed::Commit(CommitError::RolledBack { .. }))) => {}
            Err(other) => panic!("write {faults}: {other}"),
        }
        assert!(
            guest.memory() == before && !guest.is_paused(),
            "write {faults}"
        );
        assert_eq!(arena.holds.space.used(), 64, "no room is taken");
        faults += 1;
    }
    // Two entries of the mapping, the code, its tables, what the kernel knows of them (each tree's first node, the bounds, the count; the node's
    // words in the tables), the jump.
    assert_eq!(faults, 12);
}

#[test]
fn what_stands_in_the_way_is_named() {
    let check =
        |function: &str, position: u32, change: &dyn Fn(&mut FakeGuest, &Kernel), what: &str| {
            let (mut guest, kernel, mut arena) = booted(Form::New);
            change(&mut guest, &kernel);
            let before = guest.memory().to_vec();
            let package = package(function, position, &BUILD_ID);
            let error = apply_it(&mut guest, &kernel, &mut arena, &package, false)
                .unwrap_err()
                .to_string();
            assert!(error.contains(what), "{what}: {error}");
            assert!(guest.memory() == before && !guest.is_paused());
        };
    let poke = |guest: &mut FakeGuest, kernel: &Kernel, at: u64, bytes: &[u8]| {
        let at = kernel.translate(&*guest, Gva(at)).unwrap();
        guest.poke(at, bytes).unwrap();
    };
    let nothing = |_: &mut FakeGuest, _: &Kernel| {};
    check("patients", 0, &nothing, "no symbol patients");
    check(
        "twin",
        0,
        &nothing,
        "2 symbols of the kernel are called twin",
    );
    check("twin", 2, &nothing, "no fentry site");
    check("twin", 3, &nothing, "number 3");
    check("asm_exc_divide_error", 0, &nothing, "entry code");
    check("victim", 0, &nothing, "a BUG or WARN");
    let probe =
        |guest: &mut FakeGuest, kernel: &Kernel| poke(guest, kernel, JUMP + SLIDE + 1, &[0xcc]);
    check("patient", 0, &probe, "kprobe");
    let loops = |guest: &mut FakeGuest, kernel: &Kernel| {
        poke(guest, kernel, JUMP + SLIDE + 6, &[0xeb, 0xf9])
    };
    check("patient", 0, &loops, "leads from");
    let state = |value: u8| {
        move |guest: &mut FakeGuest, kernel: &Kernel| {
            let at = kernel.symbol("system_state").unwrap();
            poke(guest, kernel, at.0, &[value]);
        }
    };
    check("patient", 0, &state(0), "has not finished booting");
    let locked = |guest: &mut FakeGuest, kernel: &Kernel| {
        let at = kernel.symbol("text_mutex").unwrap();
        poke(guest, kernel, at.0, &[0x80]);
    };
    check(
        "patient",
        0,
        &locked,
        "changing its own code at this moment (text_mutex)",
    );
    let inside = |guest: &mut FakeGuest, _: &Kernel| {
        if let Some(vcpu) = guest.vcpus_mut().first_mut() {
            (vcpu.rip, vcpu.cpl) = (JUMP + SLIDE + 1, 0);
        }
    };
    check("patient", 0, &inside, "vCPU 0");
}

#[test]
fn a_vcpu_at_the_first_displaced_byte_is_not_in_the_way() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let before = guest.vcpus_mut().clone();
    // Where ftrace returns to. In user mode the same address means nothing to the kernel.
    guest.vcpus_mut()[0].rip = JUMP + SLIDE + 1;
    assert_eq!(before[0].cpl, 3);
    let package = package("patient", 0, &BUILD_ID);
    assert!(apply_it(&mut guest, &kernel, &mut arena, &package, true).is_ok());
}

#[test]
fn another_kernel_is_refused() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let other = package("patient", 0, &[9; 20]);
    let error = apply_it(&mut guest, &kernel, &mut arena, &other, false).unwrap_err();
    assert!(error.to_string().contains(&"09".repeat(20)), "{error}");
    // The guest is reset and another kernel takes its place: the build-id is gone.
    let ours = package("patient", 0, &BUILD_ID);
    apply_it(&mut guest, &kernel, &mut arena, &ours, false).unwrap();
    guest
        .vcpus_mut()
        .iter_mut()
        .for_each(|vcpu| vcpu.idt_base += 0x1000);
    let error = undo(&mut guest, &kernel, &mut arena, &[1]).unwrap_err();
    assert!(
        error.to_string().contains("no longer runs the kernel"),
        "{error}"
    );
}

/// A thread that sleeps beneath an edition is followed through it and through the head, while the update is in effect and after.
#[test]
fn stacks_lead_through_editions_that_stay() {
    for form in FORMS {
        let after = |number| TEXT + SLIDE + FUNCTIONS + number * FUNCTION + AFTER_CALL;
        let stack = [
            0,
            0,
            0,
            0,
            0,
            0,
            after(function::OTHERS),
            after(function::FIRST),
        ];
        let mut tiny = TinyGuest::new(form, 4);
        let sleeper = tiny.task(7, "sleeper", &stack);
        let slot = tiny.get(tiny.tasks[sleeper] + task::SP) + 8 * 6;
        let (mut guest, kernel, mut arena) = started(tiny);
        let package = calling(form);
        apply_it(&mut guest, &kernel, &mut arena, &package, false).unwrap();
        let placed = Arc::clone(&arena.holds.placed[&1]);
        let [redirection] = &placed.linked.redirections[..] else {
            panic!("one redirection")
        };
        let back = redirection.edition.0 + 10;
        let at = kernel.translate(&guest, Gva(slot)).unwrap();
        guest.poke(at, &back.to_le_bytes()).unwrap();

        let vcpus = guest.vcpus_mut().clone();
        let follow = |guest: &FakeGuest, arena: &Arena| {
            let placed = arena.holds.placed.values();
            let known = placed.map(|placed| placed.resident.code.clone());
            let others: Vec<_> = known.chain([OtherCode::arena()]).collect();
            let found = stacks(&kernel, guest, &vcpus, &others).unwrap();
            let of_it = |stack: &Stack| matches!(&stack.who, Who::Task { pid: 7, .. });
            let stack = found.stacks.into_iter().find(of_it).unwrap();
            let ips: Vec<u64> = stack.frames.iter().map(|frame| frame.ip.0).collect();
            (ips, stack.end.map_err(|unreliable| unreliable.reason))
        };
        let whole = (vec![back, after(function::FIRST)], Ok(End::First));
        assert_eq!(follow(&guest, &arena), whole, "{form:?}");
        // Nothing is known of it in another arena.
        let mut other = arena.clone();
        let unknown = OtherCode {
            table: None,
            ..placed.resident.code.clone()
        };
        let mut forgotten = (*placed).clone();
        forgotten.resident.code = unknown;
        other.holds.placed.insert(1, Arc::new(forgotten));
        let (frames, end) = follow(&guest, &other);
        assert!(
            frames.is_empty() && matches!(end, Err(Reason::NoTable { .. })),
            "{end:?}"
        );
        let refused = undo(&mut guest, &kernel, &mut other, &[1]);
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.contains("task 7 (sleeper) cannot be followed"),
            "{refused}"
        );
        undo(&mut guest, &kernel, &mut arena, &[1]).unwrap();
        assert_eq!(follow(&guest, &arena), whole, "{form:?}, reverted");
        // As long as it sleeps there the room is not used again.
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        let by = Some("task 7 (sleeper)".to_owned());
        assert_eq!(arena.holds.editions(1)[0].life, Life::Draining { by });
        guest
            .poke(at, &after(function::OTHERS).to_le_bytes())
            .unwrap();
        settle(&mut guest, &kernel, &mut arena, &options(false)).unwrap();
        assert_eq!(arena.holds.space.used(), 64);
        assert!(arena.holds.editions(1).is_empty());
    }
}

/// A rule or a count makes a handler of the jump; without them it is a jump again.
#[test]
fn editions_are_used_by_rules_and_counted() {
    let (mut guest, kernel, mut arena) = booted(Form::New);
    let package = package("patient", 0, &BUILD_ID);
    let rule = |text: &str| Some(Arc::new(rule::Rule::parse(text).unwrap()));
    let request = Request {
        how: Use {
            rule: rule("pid = 7"),
            counted: false,
        },
        ..Request::new(1, &package)
    };
    apply(&mut guest, &kernel, &mut arena, &request, &options(false)).unwrap();
    let lead = |arena: &Arena| arena.holds.functions.iter().next().unwrap().lead;
    let first = lead(&arena);
    assert!(matches!(first, Lead::Handler(_)), "{first:?}");
    let way = |arena: &Arena| arena.holds.functions.iter().next().unwrap().way.clone();
    assert_eq!(
        way(&arena).len(),
        2,
        "the edition, and the original behind it"
    );
    let mut again = |how: Use| {
        reuse(&mut guest, &kernel, &mut arena, 1, how, &options(false)).unwrap();
        assert!(
            verify(&guest, &kernel, &arena.holds, 1)
                .differences
                .is_empty()
        );
        (lead(&arena), way(&arena))
    };
    let (second, _) = again(Use {
        rule: rule("pid = 8"),
        counted: true,
    });
    assert!(matches!(second, Lead::Handler(at) if Some(at) != first.address()));
    let (counted, way) = again(Use {
        rule: None,
        counted: true,
    });
    assert!(matches!(counted, Lead::Handler(_)) && way.len() == 1 && way[0].counter.is_some());
    let (plain, _) = again(Use::default());
    assert!(matches!(plain, Lead::Edition(_)), "{plain:?}");
    let none = reuse(
        &mut guest,
        &kernel,
        &mut arena,
        9,
        Use::default(),
        &options(false),
    );
    assert!(
        none.unwrap_err()
            .to_string()
            .contains("update 9 is not in effect")
    );
}
