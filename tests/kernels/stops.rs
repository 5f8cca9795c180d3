//! Can the stacks of vCPUs be followed wherever they are stopped?
//!
//! The machine runs in the test's own process: a stop costs no call from outside, so that many of them can be looked at.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use patcher::guest::{Guest as _, PausedGuest as _, Registers as _};
use patcher::kernel::bpf::Bpf;
use patcher::kernel::locate::Kernel;
use patcher::kernel::unwind::stacks;
use tests::figures;
use tests::initrd;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use tests::stops::{Place, Tally};
use vmm::config::{Console, MemorySize, Options, Wanted};
use vmm::kernel_index;
use vmm::kvm::Hypervisor;
use vmm::vm::Vm;

use crate::witness::count;

/// Stops of each kind of load, unless `EXOPATCH_STOPS` says otherwise.
const STOPS: usize = 400;
const CPUS: u32 = 4;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The longest that the guest runs between two stops.
const LONGEST_RUN_US: u64 = 2000;
/// Of kernel-mode stops beside entry text and idle, at least these in a hundred must be reliable.
const RELIABLE_PERCENT: usize = 99;

/// What a guest is busy with while it is stopped: the script that it runs.
pub(crate) const PLAIN: &str = "echo exopatch-guest: loaded; probe churn 6";
/// The same with probes on functions that the load goes through, at their entry, behind it, and at their return.
pub(crate) const PROBED: &str = "cd /sys/kernel/tracing
echo 'p:entry unix_ioctl' >kprobe_events
echo 'r:return vfs_read' >>kprobe_events
echo 'p:fault handle_mm_fault' >>kprobe_events
echo 1 >events/kprobes/enable && echo exopatch-guest: loaded
probe churn 6";
/// The same with every call of file systems and memory management traced to its return.
pub(crate) const TRACED: &str = "cd /sys/kernel/tracing
echo 'vfs_*' >set_ftrace_filter; echo '*_fault' >>set_ftrace_filter
echo function_graph >current_tracer && echo exopatch-guest: loaded
probe churn 6";

/// The same with BPF programs on functions that the load goes through, at their entry, at their return, and in place of it; and with
/// others that run in system calls of their own.
const BPF: &str = "probe bpf 6 | while read -r line; do echo exopatch-guest: loaded, $line; done";

/// The next of a row of numbers that looks random (Marsaglia's xorshift).
pub(crate) fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Boots `stock` in this process with `script` as its load, and waits until that runs.
pub(crate) fn boot(dir: &Path, stock: Stock, script: &str) -> Vm {
    let (load, archive, console) = (dir.join("load.sh"), dir.join("initrd"), dir.join("console"));
    fs::write(&load, script).expect("a script");
    initrd::write(&archive, &stock.file("initramfs.cpio.gz"), &[load]).expect("an initrd");
    let options = Options {
        kernel: Some(stock.file("vmlinuz")),
        initrd: Some(archive),
        cmdline: Some("console=ttyS0 quiet exopatch.run=sh,/files/load.sh".to_owned()),
        cpus: Some(CPUS),
        memory: Some(MemorySize(256 << 20)),
        console: Some(Console::File(console.clone())),
        api_sock: None,
    };
    let hypervisor = Hypervisor::open().expect("KVM");
    let limits = hypervisor.limits().expect("KVM's limits");
    let config = Wanted::new(options, None).and_then(|wanted| wanted.validate(limits));
    let vm = Vm::start(&hypervisor, config.expect("a configuration"), None).expect("a machine");
    let end = Instant::now() + BOOT_LIMIT;
    loop {
        let said = fs::read_to_string(&console).unwrap_or_default();
        if said.contains("exopatch-guest: loaded") {
            return vm;
        }
        assert!(
            Instant::now() < end && vm.ended().is_none(),
            "{stock:?} did not come up: {said}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Stops the guest `stops` times at places that nobody chose, and looks at every stack.
fn stop_at_random(vm: &Vm, stock: Stock, stops: usize, seed: u64) -> Tally {
    let image = kernel_index::load(&stock.file("vmlinuz")).expect("an index");
    let mut guest = vm.guest().expect("a guest that nobody else has");
    let mut tally = Tally::default();
    let (mut random, mut kernel, mut image) = (seed, None, Some(image));
    for _ in 0..stops {
        std::thread::sleep(Duration::from_micros(next(&mut random) % LONGEST_RUN_US));
        let paused = guest
            .pause(Instant::now() + Duration::from_secs(10))
            .unwrap_or_else(|error| panic!("{error}; the guest ended with {:?}", vm.ended()));
        let kernel = kernel.get_or_insert_with(|| {
            let image = image.take().expect("it is taken once");
            Kernel::locate(image.into(), &paused, paused.vcpus()).expect("the kernel")
        });
        let found = stacks(kernel, &paused, paused.vcpus(), &[]).expect("the stacks");
        let bpf = Bpf::read(kernel, &paused).expect("the BPF code");
        tally.add(kernel, paused.vcpus(), &found, &bpf);
        paused.resume().expect("a guest that goes on");
    }
    tally
}

/// Follows all stacks of a guest that is busy with `script`, at that many stops unless `EXOPATCH_STOPS` says otherwise.
pub(crate) fn check(stock: Stock, script: &str, stops: usize) -> Tally {
    let dir = tempfile::tempdir().expect("a directory");
    let vm = boot(dir.path(), stock, script);
    let stops = count("EXOPATCH_STOPS", stops);
    let seed = count("EXOPATCH_SEED", 0x2545_f491_4f6c_dd1d) as u64;
    let tally = stop_at_random(&vm, stock, stops, seed);
    vm.kill("the end of the test");
    let _ = vm.wait();
    println!("{stock:?}, {stops} stops, seed {seed}: {tally}");
    // Before any of it is judged: what was not reliable counts too.
    note(&tally, stops);
    let (all, reliable) = tally.at(Place::Kernel);
    assert!(
        all > stops / 10,
        "{stock:?}: the load is hardly ever in the kernel: {tally}"
    );
    assert!(
        reliable * 100 >= all * RELIABLE_PERCENT,
        "{stock:?}: {tally}"
    );
    for place in [Place::Idle, Place::User] {
        let (all, reliable) = tally.at(place);
        assert_eq!(all, reliable, "{stock:?}, {place:?}: {tally}");
    }
    assert_eq!(tally.sleeping.0, tally.sleeping.1, "{stock:?}: {tally}");
    tally
}

/// Leaves the figures.
fn note(tally: &Tally, stops: usize) {
    let (in_kernel, in_kernel_reliable) = tally.at(Place::Kernel);
    let (in_entry, in_entry_reliable) = tally.at(Place::Entry);
    figures::note(&serde_json::json!({
        "stops": stops,
        "in_kernel": in_kernel,
        "in_kernel_reliable": in_kernel_reliable,
        "in_entry": in_entry,
        "in_entry_reliable": in_entry_reliable,
        "idle": tally.at(Place::Idle).0,
        "in_user": tally.at(Place::User).0,
        "sleeping": tally.sleeping.0,
        "sleeping_reliable": tally.sleeping.1,
        "of_no_task": tally.unowned,
    }));
}

/// BPF's code is not only loaded: vCPUs are stopped in it and beneath it, and tasks sleep there.
fn through_bpf(stock: Stock) {
    let Tally { bpf, .. } = check(stock, BPF, STOPS);
    let stops = count("EXOPATCH_STOPS", STOPS);
    assert!(bpf.running > stops / 20, "{stock:?}: {bpf:?}");
    assert!(bpf.sleeping > 0 && bpf.innermost > 0, "{stock:?}: {bpf:?}");
}

#[test]
fn stacks_of_a_busy_6_1_are_reliable_wherever_it_stops() {
    check(LTS_6_1, PLAIN, STOPS);
}

#[test]
fn stacks_of_a_busy_6_12_are_reliable_wherever_it_stops() {
    check(NEWEST_6_12, PLAIN, STOPS);
}

#[test]
fn stacks_through_kprobes_are_reliable() {
    check(LTS_6_1, PROBED, STOPS);
    check(NEWEST_6_12, PROBED, STOPS);
}

#[test]
fn stacks_through_bpf_on_6_1_are_reliable() {
    through_bpf(LTS_6_1);
}

#[test]
fn stacks_through_bpf_on_6_12_are_reliable() {
    through_bpf(NEWEST_6_12);
}

#[test]
fn stacks_under_the_graph_tracer_are_reliable() {
    check(LTS_6_1, TRACED, STOPS);
    check(NEWEST_6_12, TRACED, STOPS);
}
