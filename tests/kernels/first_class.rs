//! Does the guest's own kernel know code of ours as it knows its own: by name, on stacks, in warnings and faults?

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use patcher::apply::{self, ApplyOptions, Arena, Model, Request};
use patcher::edition::object::Package;
use patcher::guest::{Guest as _, PausedGuest as _};
use patcher::kernel::arena::CODE;
use patcher::kernel::locate::Kernel;
use patcher::publish::{Published, published};
use tests::guest::{Guest, Options};
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, count, one_line};

/// The longest that a thread takes to fall asleep.
const LIMIT: Duration = Duration::from_secs(20);
/// Applies and reverts in a row, unless `EXOPATCH_ROUNDS` says otherwise.
const ROUNDS: usize = 200;
/// Rounds after which the guest unloads a module and loads it again.
const RELOAD: usize = 20;
/// Updates that are in effect at the same time.
const MANY: usize = 20;
/// The guest unloads one of its modules, which a program of its own uses, and loads it again.
const UNLOAD: &str =
    "kill $(pidof probe) 2>/dev/null; usleep 100000; rmmod evdev && ! grep -q ^evdev /proc/modules";
const LOAD: &str = "insmod /lib/modules/evdev.ko && grep -q ^evdev /proc/modules";

/// The functions of `/proc/PID/stack` from the innermost out, each with what stands in brackets behind it.
pub(crate) fn told(guest: &mut Guest, pid: &str) -> Vec<String> {
    let stack = guest.file(&format!("/proc/{pid}/stack"));
    let frame = |line: &str| {
        let place = line.strip_prefix("[<0>] ").expect("a frame");
        let (function, rest) = place.split_once('+').expect("an offset");
        let module = rest.split_once(' ').map(|(_, module)| format!(" {module}"));
        format!("{function}{}", module.unwrap_or_default())
    };
    stack.lines().map(frame).collect()
}

/// A process that sleeps beneath the edition is seen there by the guest, before and after the update is reverted.
fn sleeps(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let modules = guest.file("/proc/modules");
    let update = apply(&guest, &stock.edition("hrtimer_nanosleep_same"));
    let pid = one_line(&mut guest, "sleep 1000 >/dev/null 2>&1 & echo $!");
    let pid = pid.trim().to_owned();
    let edition = "nanosleep_same [exopatch]".to_owned();
    let end = Instant::now() + LIMIT;
    let frames = loop {
        let frames = told(&mut guest, &pid);
        if frames.contains(&edition) {
            break frames;
        }
        assert!(Instant::now() < end, "{pid} does not sleep: {frames:?}");
    };
    println!("{stock:?}: {frames:?}");
    // From the edition on in both directions: what it calls goes on in the kernel's own function, and its caller is there to the end.
    let at = frames.iter().position(|frame| *frame == edition);
    let (inner, outer) = frames.split_at(at.expect("it was found"));
    assert_eq!(inner.last().map(String::as_str), Some("hrtimer_nanosleep"));
    let last = outer.last().expect("a last frame");
    assert!(last.starts_with("entry_SYSCALL_64"), "{frames:?}");
    revert(&guest, update);
    assert_eq!(told(&mut guest, &pid), frames);
    assert_eq!(guest.file("/proc/modules"), modules);
    one_line(&mut guest, &format!("kill {pid}"));
    assert_clean(&mut guest);
}

#[test]
fn a_6_1_sees_who_sleeps_in_an_edition() {
    sleeps(LTS_6_1);
}

#[test]
fn a_6_12_sees_who_sleeps_in_an_edition() {
    sleeps(NEWEST_6_12);
}

/// The guest's log from the line that holds `from` on.
fn log_from(guest: &mut Guest, from: &str) -> Vec<String> {
    let _ = one_line(guest, "dmesg >/tmp/log");
    let log = guest.file("/tmp/log");
    let lines = log.lines().map(str::to_owned);
    lines.skip_while(|line| !line.contains(from)).collect()
}

/// An edition warns, and reads memory that is not there: the guest says where, and goes on.
fn warns(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let before = one_line(&mut guest, "cat /proc/version");
    let update = apply(&guest, &stock.edition("version_proc_show_warns"));
    for _ in 0..3 {
        let now = one_line(&mut guest, "cat /proc/version");
        assert_eq!(now, format!("{before}\nread 42 -14"), "{stock:?}");
    }
    let log = log_from(&mut guest, "WARNING:");
    let of = |what: &str| log.iter().filter(|line| line.contains(what)).count();
    let warning = "version_proc_show_warns.c:";
    assert_eq!(
        (of("WARNING:"), of(warning), of("said once")),
        (4, 4, 1),
        "{log:#?}"
    );
    // Where it was, and from where it was called.
    for line in log.iter().filter(|line| line.contains(warning)) {
        assert!(line.contains("version_proc_show_warns+0x"), "{line}");
        assert!(line.ends_with("[exopatch]"), "{line}");
    }
    assert!(of("RIP: 0010:version_proc_show_warns+0x") == 4, "{log:#?}");
    assert!(of("seq_read_iter+0x") >= 4, "{log:#?}");
    assert!(
        of(" ? version_proc_show_warns") <= of(" version_proc_show_warns"),
        "{log:#?}"
    );
    revert(&guest, update);
    assert_eq!(one_line(&mut guest, "cat /proc/version"), before);
    let _ = one_line(&mut guest, UNLOAD);
    let _ = one_line(&mut guest, LOAD);
}

#[test]
fn a_6_1_takes_warnings_and_faults_of_editions() {
    warns(LTS_6_1);
}

#[test]
fn a_6_12_takes_warnings_and_faults_of_editions() {
    warns(NEWEST_6_12);
}

/// An edition reads through a null pointer: the guest says where, kills who did it, and goes on.
fn falls(stock: Stock) {
    let mut guest = Guest::boot(&Options::new(stock));
    let update = apply(&guest, &stock.edition("unix_ioctl_null"));
    let asked = guest.sh("probe siocatmark 1");
    assert_ne!(asked.status, 0, "{}", asked.text());
    let log = log_from(
        &mut guest,
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    );
    let has = |what: &str| log.iter().any(|line| line.contains(what));
    assert!(has("RIP: 0010:unix_ioctl_null+0x"), "{log:#?}");
    assert!(
        log.iter()
            .any(|line| line.contains("RIP:") && line.ends_with("[exopatch]")),
        "{log:#?}"
    );
    assert!(
        has("sock_do_ioctl+0x") && has("__x64_sys_ioctl+0x"),
        "{log:#?}"
    );
    assert!(!has("Unable to access opcode bytes"), "{log:#?}");
    revert(&guest, update);
    assert_eq!(guest.sh("probe siocatmark 1").status, 0);
}

#[test]
fn a_6_1_names_the_edition_that_falls() {
    falls(LTS_6_1);
}

#[test]
fn a_6_12_names_the_edition_that_falls() {
    falls(NEWEST_6_12);
}

/// What the guest's kernel finds code by.
fn known(guest: &Inside, kernel: &Kernel) -> Published {
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let end = Instant::now() + LIMIT;
    loop {
        let paused = machine.pause(end).expect("a pause");
        let moving = kernel.text_in_flux(&paused).expect("its locks");
        if moving.is_none() {
            let found = published(kernel, &paused).expect("sound trees");
            paused.resume().expect("a guest that goes on");
            return found.expect("a kernel with modules");
        }
        drop(paused);
        assert!(Instant::now() < end, "{moving:?} is held");
    }
}

/// Many updates come and go, some of them for good, while the guest loads and unloads: its trees stay sound, and hold what is known.
fn many(stock: Stock, rounds: usize) {
    let guest = Inside::boot(stock, 2);
    let kernel = guest.kernel(stock);
    let modules = guest.file("/proc/modules");
    let package = fs::read(stock.edition("unix_ioctl_notty")).expect("a package");
    let package = Package::parse(&package).expect("a sound package");
    let before = known(&guest, &kernel);
    assert!(before.code.len() >= 2, "modules: {before:?}");
    let mut arena = {
        let machine = guest.vm.guest().expect("a guest that nobody else has");
        Arena::new(&machine, &kernel).expect("room for the arena")
    };
    let options = || ApplyOptions {
        deadline: Instant::now() + LIMIT,
        check_only: false,
        doing: &|_| {},
        written: &|| {},
        hook: &|_| {},
    };
    let ours = |known: Published| -> BTreeSet<_> {
        let code = known.code.into_iter().map(|(range, _)| range.start);
        code.filter(|at| CODE.contains(at)).collect()
    };
    let machine = || guest.vm.guest().expect("a guest that nobody else has");
    let revert = |arena: &mut Arena, id: u64| {
        let model = Model::Immediate;
        let done = apply::revert(&mut machine(), &kernel, arena, &[id], model, &options());
        let _ = done.unwrap_or_else(|why| panic!("{id}: {why}"));
    };
    // Until nobody can still be in it, or reading what the kernel knew of it.
    let settle = |arena: &mut Arena| {
        let end = Instant::now() + LIMIT;
        while arena.holds.is_settling() {
            assert!(Instant::now() < end, "{:?}", arena.holds.drains);
            let done = apply::settle(&mut machine(), &kernel, arena, &options());
            done.unwrap_or_else(|why| panic!("{why}"));
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let mut there: Vec<u64> = Vec::new();
    for round in 1..=rounds {
        let id = u64::try_from(round).expect("few rounds");
        let request = Request::new(id, &package);
        let done = apply::apply(&mut machine(), &kernel, &mut arena, &request, &options());
        let _ = done.unwrap_or_else(|why| panic!("{round}: {why}"));
        there.push(id);
        if round % RELOAD == 0 {
            let _ = guest.must(UNLOAD);
        }
        if round % 3 != 0 {
            let gone = there.remove(round * 7 % there.len());
            revert(&mut arena, gone);
            settle(&mut arena);
        }
        if there.len() > MANY {
            let gone = there.remove(0);
            revert(&mut arena, gone);
        }
        if round % RELOAD == 0 {
            let _ = guest.must(LOAD);
        }
        settle(&mut arena);
        let starts = arena.holds.placed.values();
        let want: BTreeSet<_> = starts
            .map(|placed| placed.resident.code.range.start)
            .collect();
        assert_eq!(ours(known(&guest, &kernel)), want, "{round}");
    }
    for id in there {
        revert(&mut arena, id);
    }
    settle(&mut arena);
    assert!(arena.holds.placed.is_empty(), "{:?}", arena.holds.drains);
    let mut after = known(&guest, &kernel);
    after.code.sort_by_key(|(range, _)| range.start);
    assert_eq!(after.code.len(), before.code.len(), "{after:?}");
    assert!(
        after
            .code
            .iter()
            .all(|(range, _)| !CODE.contains(&range.start))
    );
    assert!(
        after
            .bugs
            .iter()
            .all(|bugs| after.code.iter().any(|(_, module)| module == bugs))
    );
    let names = |text: &str| -> BTreeSet<String> {
        let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
        text.lines().map(name).collect()
    };
    assert_eq!(names(&guest.file("/proc/modules")), names(&modules));
    let log = guest.must("dmesg | grep -cE 'WARNING|BUG|Oops' || true");
    assert_eq!(log.trim(), "0");
}

#[test]
fn many_updates_leave_the_trees_of_6_1_sound() {
    many(LTS_6_1, count("EXOPATCH_ROUNDS", ROUNDS));
}

#[test]
fn many_updates_leave_the_trees_of_6_12_sound() {
    many(NEWEST_6_12, count("EXOPATCH_ROUNDS", ROUNDS));
}
