//! Usage and bad input: what is wrong is named, with the file and a way out. Real kernels are looked at where there are some.

use std::path::Path;

use clap::Parser;
use clap::error::ErrorKind;
use patcher::addr::Gpa;
use patcher::guest::dump::write;
use patcher::guest::{GuestError, ReadPhys, Registers, Vcpu, VcpuState};
use patcher::kernel::locate::LocateError;

use super::failure::Failure;
use super::show;
use crate::cli::{Cli, Command};
use crate::failure::{FAILED, Failure as _, USAGE};

/// What the words after `exopatch kernel` come to; they are divided at spaces.
fn refused(words: &str) -> Failure {
    let words = ["exopatch", "kernel"].into_iter().chain(words.split(' '));
    let cli = Cli::try_parse_from(words).unwrap();
    let Command::Kernel(args) = cli.command else {
        panic!("{:?}", cli.command);
    };
    let asked = args.show.asked().map_err(Failure::from);
    asked
        .and_then(|asked| show(&args, asked.as_ref(), false))
        .unwrap_err()
}

/// The failure has this code and exit code, and its text and hint hold these.
fn check(failure: &Failure, code: (&str, u8), text: &str, hint: &str) {
    let body = failure.body();
    assert_eq!((body.code.as_str(), failure.exit_code()), code, "{failure}");
    assert!(body.message.contains(text), "{}", body.message);
    assert!(body.hint.contains(hint), "{}", body.hint);
}

/// A guest of zeros, with one vCPU that was never started.
struct Nothing([Vcpu; 1]);

impl ReadPhys for Nothing {
    fn read_phys(&self, _: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        buf.fill(0);
        Ok(())
    }
}

impl Registers for Nothing {
    fn vcpus(&self) -> &[Vcpu] {
        &self.0
    }
}

fn core() -> Vec<u8> {
    let vcpu = Vcpu {
        state: VcpuState::Offline,
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        cpl: 0,
        cr0: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
        idt_base: 0,
        gs_base: 0,
        event_pending: false,
    };
    let (memory, none) = ([Gpa(0)..Gpa(0x2000)], Gpa(0)..Gpa(0));
    let mut file = Vec::new();
    write(&mut file, &Nothing([vcpu]), &memory, &none).unwrap();
    file
}

/// What comes of `words` about a good dump, whose guest is none.
fn of_nothing(words: &str) -> (Failure, String) {
    let directory = tempfile::tempdir().unwrap();
    let dump = directory.path().join("guest.core").display().to_string();
    std::fs::write(&dump, core()).unwrap();
    (refused(&format!("--dump {dump} {words}")), dump)
}

/// What comes of `bytes` as a dump, with an image that is none either.
fn with_dump(bytes: &[u8]) -> (Failure, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name).display().to_string();
    let (dump, kernel) = (path("guest.core"), path("vmlinuz"));
    std::fs::write(&dump, bytes).unwrap();
    std::fs::write(&kernel, b"no kernel").unwrap();
    let words = format!("--dump {dump} --kernel {kernel} tasks");
    (refused(&words), dump)
}

/// One of each that needs a guest.
const VIEWS: [&str; 8] = [
    "info",
    "symbols",
    "modules",
    "tasks",
    "log",
    "text --changed",
    "stack --all",
    "disasm unix_ioctl",
];

#[test]
fn wrong_usage_is_told_by_the_command_line() {
    let check = |words: &str, kind: ErrorKind| {
        let all = ["exopatch", "kernel"].into_iter().chain(words.split(' '));
        assert_eq!(
            Cli::try_parse_from(all).err().map(|error| error.kind()),
            Some(kind),
            "{words}"
        );
    };
    check("text", ErrorKind::MissingRequiredArgument);
    check("types", ErrorKind::MissingRequiredArgument);
    check("types a b c", ErrorKind::UnknownArgument);
    check("symbols a b", ErrorKind::UnknownArgument);
    check("stack", ErrorKind::MissingRequiredArgument);
    check("stack 1 --all", ErrorKind::ArgumentConflict);
    check("stack 1 --at f", ErrorKind::ArgumentConflict);
    check("stack --all --count 2", ErrorKind::ArgumentConflict);
    check("disasm", ErrorKind::MissingRequiredArgument);
    check("disasm f --position x", ErrorKind::ValueValidation);
    check("frobnicate", ErrorKind::InvalidSubcommand);
    check("--help", ErrorKind::DisplayHelp);
    check("tasks --help", ErrorKind::DisplayHelp);
}

#[test]
fn a_recorded_guest_needs_a_dump_and_to_be_verified_a_file_too() {
    let usage = ("no_recorded_guest", USAGE);
    for view in VIEWS.into_iter().chain(["info --verify"]) {
        check(
            &refused(&format!("--kernel x {view}")),
            usage,
            "--dump CORE was not given",
            "exopatch vm dump FILE",
        );
    }
    check(
        &refused("info --verify"),
        usage,
        "--dump CORE was not given",
        "exopatch vm dump FILE",
    );
}

#[test]
fn what_is_asked_for_is_read_before_any_file() {
    let files = "--dump /nowhere/core --kernel /nowhere/vmlinuz";
    let wrong = |view: &str, code: &str, text: &str, hint: &str| {
        check(
            &refused(&format!("{files} {view}")),
            (code, USAGE),
            text,
            hint,
        );
    };
    let address = "0xffffffff81000000";
    wrong("symbols 0xnumber", "no_address", "\"0xnumber\"", address);
    wrong("disasm f+x", "no_address", "\"f+x\"", address);
    wrong("stack cpu", "no_stack_owner", "\"cpu\"", "cpu0");
    let reply = refused(&format!("{files} stack --at f"));
    check(&reply, ("recorded_guest", FAILED), "comes to f", "--dump");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let missing = refused("--dump /nowhere/core --kernel /nowhere/vmlinuz tasks");
    check(
        &missing,
        ("cannot_read_file", USAGE),
        "/nowhere/core",
        "that you can read",
    );
    let device = refused("--dump /dev/null --kernel /nowhere/vmlinuz tasks");
    check(
        &device,
        ("cannot_read_file", USAGE),
        "no regular file",
        "that you can read",
    );
    let image = refused("--kernel /nowhere/vmlinuz types file");
    check(
        &image,
        ("cannot_read_file", USAGE),
        "/nowhere/vmlinuz",
        "that you can read",
    );
}

#[test]
fn what_is_no_dump_is_refused_by_name() {
    for bytes in [
        b"".as_slice(),
        b"KDUMP   ",
        b"\x7fELF\x02\x01\x01",
        &[0; 4096],
    ] {
        let (failure, dump) = with_dump(bytes);
        check(
            &failure,
            ("not_a_dump", FAILED),
            &dump,
            "exopatch vm dump FILE",
        );
    }
}

#[test]
fn a_dump_that_was_cut_short_says_where() {
    let whole = core();
    for len in [whole.len() - 1, whole.len() - 0x1000, 100] {
        let (failure, dump) = with_dump(&whole[..len]);
        check(&failure, ("dump_truncated", FAILED), &dump, "Make it again");
        assert!(
            failure.to_string().contains(&format!("{len:#x} bytes")),
            "{failure}"
        );
    }
}

#[test]
fn a_kernel_that_is_not_in_memory_needs_its_file() {
    for view in VIEWS {
        let (failure, dump) = of_nothing(view);
        let code = ("kernel_not_recovered", FAILED);
        check(&failure, code, &dump, "--kernel VMLINUZ");
        assert!(failure.to_string().contains("no vCPU"), "{failure}");
    }
}

#[test]
fn a_good_dump_needs_a_good_image() {
    let (failure, dump) = with_dump(&core());
    let kernel = Path::new(&dump).with_file_name("vmlinuz");
    let code = ("kernel_unusable", FAILED);
    check(
        &failure,
        code,
        &kernel.display().to_string(),
        "vmlinuz of the kernel's package",
    );
}

#[test]
fn another_kernel_is_told_by_its_build_id() {
    let failure = Failure::Locate {
        dump: "guest.core".into(),
        kernel: Some("vmlinuz".into()),
        cause: LocateError::BuildId {
            found: vec![0xab, 0x01],
            expected: vec![0xcd],
        },
    };
    check(
        &failure,
        ("other_kernel", FAILED),
        "guest.core",
        "build-id ab01",
    );
    assert!(failure.to_string().contains("the image's cd"), "{failure}");
}
