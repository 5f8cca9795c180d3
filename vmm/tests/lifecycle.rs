//! The life of a machine with guests of a few instructions: they run on every KVM, even one that interprets ring 0.
//!
//! Where there is no `/dev/kvm` at all there is nothing to test, and the tests say so.

use std::fs;
use std::time::{Duration, Instant};

use patcher::addr::Gpa;
use patcher::guest::{Guest, PausedGuest, ReadPhys, Registers};
use vmm::config::{Console, Options, Wanted};
use vmm::end::EndReason;
use vmm::events::EventKind;
use vmm::kvm::{Hypervisor, KvmError};
use vmm::vm::{PauseError, ResumeError, State, Vm};

/// Where guests are loaded and entered.
const CODE: u64 = 0x100_0000;
const SOON: Duration = Duration::from_secs(30);

/// `loop: inc dword [COUNTER]; jmp loop`
const COUNTING: [u8; 8] = [0xff, 0x05, 0x00, 0x80, 0x00, 0x01, 0xeb, 0xf8];
const COUNTER: u64 = CODE + 0x8000;

fn deadline() -> Instant {
    Instant::now() + SOON
}

/// `mov dx, port; mov ax, value; out dx, ax; jmp $`
fn write_word(port: u16, value: u16) -> Vec<u8> {
    let [port_low, port_high] = port.to_le_bytes();
    let [low, high] = value.to_le_bytes();
    vec![
        0x66, 0xba, port_low, port_high, 0x66, 0xb8, low, high, 0x66, 0xef, 0xeb, 0xfe,
    ]
}

/// An ELF kernel that is `code`, with a PVH note.
fn elf(code: &[u8]) -> Vec<u8> {
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    let segment = |kind: u32, offset: u64, len: u64| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(7_u32.to_le_bytes());
        header.extend(
            [offset, CODE, CODE, len, len, 1]
                .map(u64::to_le_bytes)
                .concat(),
        );
        header
    };
    let note = [4, 4, 0x12, u32::from_le_bytes(*b"Xen\0"), 0x100_0000].map(u32::to_le_bytes);
    let note = note.concat();
    let notes_at = 64 + 2 * 56;
    let code_at = notes_at + note.len() as u64;
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[6] = 1;
    file[16] = 2;
    file[18] = 62;
    file[20] = 1;
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    file[32] = 64;
    file[52] = 64;
    file[54] = 56;
    file[56] = 2;
    file.extend(segment(NOTE, notes_at, note.len() as u64));
    file.extend(segment(LOAD, code_at, code.len() as u64));
    file.extend(note);
    file.extend(code);
    file
}

/// Starts a guest, or nothing where there is no KVM.
#[expect(clippy::print_stderr, reason = "a test that cannot test says so")]
fn start(code: &[u8]) -> Option<Vm> {
    let hypervisor = match Hypervisor::open() {
        Err(error @ (KvmError::NoDevice | KvmError::Permission(_))) => {
            eprintln!("not tested: {error}");
            return None;
        }
        other => other.expect("KVM"),
    };
    let dir = tempfile::tempdir().expect("a directory");
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, elf(code)).expect("a kernel");
    let options = Options {
        kernel: Some(kernel),
        memory: Some("64M".parse().expect("a size")),
        console: Some(Console::Off),
        ..Options::default()
    };
    let limits = hypervisor.limits().expect("limits");
    let config = Wanted::new(options, None)
        .and_then(|wanted| wanted.validate(limits))
        .expect("a configuration");
    Some(Vm::start(&hypervisor, config, None).expect("a machine"))
}

fn check_end(code: &[u8], reason: &EndReason) {
    let Some(vm) = start(code) else { return };
    assert_eq!(&vm.wait(), reason);
    assert_eq!(vm.status().state, State::Ended(reason.clone()));
    let (past, _) = vm.events().subscribe(0);
    let last = past.last().map(|event| event.kind.clone());
    assert_eq!(last, Some(EventKind::Ended(reason.clone())));
    assert_eq!(vm.pause(deadline()), Err(PauseError::Ended));
}

#[test]
fn a_guest_powers_off_by_the_sleep_register() {
    check_end(&write_word(0x604, 5 << 10 | 1 << 13), &EndReason::PowerOff);
}

#[test]
fn a_guest_resets_by_the_acpi_register_and_by_the_keyboard_controller() {
    check_end(&write_word(0x606, 1), &EndReason::Reset);
    // mov al, 0xfe; out 0x64, al; jmp $
    check_end(&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], &EndReason::Reset);
}

#[test]
fn a_reset_after_a_reported_panic_is_the_panics_end() {
    // mov dx, 0x505; mov al, 1; out dx, al; mov al, 0xfe; out 0x64, al; jmp $
    let code = [
        0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe,
    ];
    let said = "reported by the guest's pvpanic driver".to_owned();
    check_end(&code, &EndReason::Panic(said));
}

#[test]
fn a_guest_without_exception_handlers_ends_in_a_triple_fault() {
    // An undefined instruction, and no descriptor table for its exception.
    check_end(&[0x0f, 0x0b, 0xeb, 0xfe], &EndReason::TripleFault);
}

#[test]
fn a_killed_guest_ends_running_or_paused() {
    for paused in [false, true] {
        let Some(vm) = start(&COUNTING) else { return };
        if paused {
            vm.pause(deadline()).expect("paused");
        }
        vm.kill("a test");
        assert_eq!(vm.wait(), EndReason::Killed("a test".to_owned()));
        assert!(vm.resume().is_err());
    }
}

fn counter(guest: &impl ReadPhys) -> u32 {
    let mut bytes = [0; 4];
    guest.read_phys(Gpa(COUNTER), &mut bytes).expect("memory");
    u32::from_le_bytes(bytes)
}

/// Waits until the guest has counted on.
fn runs(guest: &impl ReadPhys) {
    let before = counter(guest);
    let limit = deadline();
    while counter(guest) == before {
        assert!(Instant::now() < limit, "the guest does not run");
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_stands_still_while_anybody_holds_it_and_runs_when_nobody_does() {
    let Some(vm) = start(&COUNTING) else { return };
    let mut guest = vm.guest().expect("the guest");
    assert!(vm.guest().is_err(), "two patchers at once");
    assert_eq!(vm.resume(), Err(ResumeError::NotPaused));
    runs(&guest);
    for _ in 0..100 {
        let paused = guest.pause(deadline()).expect("paused");
        let vcpu = paused.vcpus()[0];
        assert!((CODE..CODE + 8).contains(&vcpu.rip), "{vcpu:x?}");
        let before = counter(&paused);
        std::thread::yield_now();
        assert_eq!(counter(&paused), before);
        paused.resume().expect("resumed");
        runs(&guest);
    }
    let pauses = vm.status().pauses;
    assert_eq!((pauses.by_user, pauses.by_patcher), (0, 100));
    assert!(
        pauses.last.iter().map(|it| it.length).sum::<Duration>() < pauses.total,
        "{pauses:?}"
    );
    vm.pause(deadline()).expect("paused by the user");
    let before = counter(&guest);
    guest
        .pause(deadline())
        .expect("paused by the patcher too")
        .resume()
        .expect("resumed");
    assert_eq!(counter(&guest), before);
    let state = State::Paused {
        by_user: true,
        by_patcher: false,
        unsound: false,
    };
    assert_eq!(vm.status().state, state);
    let paused = guest.pause(deadline()).expect("paused by both");
    vm.resume().expect("the user's pause ended");
    assert_eq!(counter(&paused), before);
    drop(paused);
    runs(&guest);
    // Those of the patcher stopped nothing that ran.
    let later = vm.status().pauses;
    assert_eq!((later.by_user, later.by_patcher), (1, 100));
    assert_eq!(later.last, pauses.last);
    vm.kill("the test's end");
}

#[test]
fn what_is_written_under_a_pause_is_what_the_guest_executes() {
    let Some(vm) = start(&COUNTING) else { return };
    let mut guest = vm.guest().expect("the guest");
    runs(&guest);
    let power_off = write_word(0x604, 5 << 10 | 1 << 13);
    // It must be about to execute the first byte that is written, not one in the middle.
    loop {
        let mut paused = guest.pause(deadline()).expect("paused");
        if paused.vcpus()[0].rip == CODE {
            paused.write_phys(Gpa(CODE), &power_off).expect("written");
            break;
        }
    }
    assert_eq!(vm.wait(), EndReason::PowerOff);
}

#[test]
fn a_guest_that_was_given_up_never_runs_again() {
    let Some(vm) = start(&COUNTING) else { return };
    let mut guest = vm.guest().expect("the guest");
    runs(&guest);
    guest.pause(deadline()).expect("paused").leave_paused();
    let before = counter(&guest);
    assert_eq!(vm.resume(), Err(ResumeError::Unsound));
    guest
        .pause(deadline())
        .expect("still paused")
        .resume()
        .expect("released");
    assert_eq!(counter(&guest), before);
    vm.kill("the test's end");
    assert!(matches!(vm.wait(), EndReason::Killed(_)));
}

#[test]
fn a_deadline_that_has_passed_leaves_the_guest_running() {
    let Some(vm) = start(&COUNTING) else { return };
    let guest = vm.guest().expect("the guest");
    runs(&guest);
    match vm.pause(Instant::now()) {
        Err(PauseError::Vcpu { vcpu: 0 }) => {
            runs(&guest);
            assert_eq!(vm.status().state, State::Running);
        }
        // The vCPU may have been quick enough.
        Ok(_) => vm.resume().expect("resumed"),
        other => panic!("{other:?}"),
    }
    vm.kill("the test's end");
}

#[test]
fn the_arena_is_the_guests_memory_above_its_ram() {
    let Some(vm) = start(&COUNTING) else { return };
    let mut guest = vm.guest().expect("the guest");
    let arena = guest.arena();
    assert_eq!(arena.start, Gpa(1 << 32));
    let mut paused = guest.pause(deadline()).expect("paused");
    let last = Gpa(arena.end.0 - 4);
    paused.write_phys(last, b"last").expect("written");
    paused
        .write_phys(last, b"beyond")
        .expect_err("past the end");
    let mut found = [0; 4];
    paused.read_phys(last, &mut found).expect("read");
    assert_eq!(&found, b"last");
    drop(paused);
    vm.kill("the test's end");
}
