//! Does a guest's memory alone say of its kernel what the kernel's file says?
//!
//! One recorded guest is looked at both ways by the command. Busy ones are stopped where nobody chose, and every stack is followed both
//! ways: memory may know less, and then says why, but never something else.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::guest::{Guest as _, PausedGuest as _, Registers as _};
use patcher::kernel::agree::agree;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::{Stack, stacks};
use serde_json::Value;
use tests::client::Reply;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use vmm::kernel_index;
use vmm::vm::Vm;

use crate::stops::{PLAIN, PROBED, TRACED, boot, next};
use crate::witness::count;

/// Views that must be equal, word for word; of all symbols and types that is proved by what they agree on.
const EQUAL: [&[&str]; 6] = [
    &["symbols", "unix_ioctl"],
    &["types", "task_struct", "thread.sp"],
    &["modules"],
    &["tasks"],
    &["log"],
    &["stack", "--all"],
];
/// Stops under each load, unless `EXOPATCH_STOPS` says otherwise.
const STOPS: usize = 100;
/// Of stacks that the file can follow, memory must follow at least these in a thousand.
const FOLLOWED_PERMILLE: usize = 995;

/// What `exopatch kernel --dump DUMP ARGS...` says, with the kernel's file or without.
fn look(guest: &Guest, dump: &Path, file: Option<&Path>, args: &[&str]) -> Reply {
    let path = |path: &Path| path.to_str().expect("a path of text").to_owned();
    let mut words = vec!["kernel".to_owned(), "--dump".to_owned(), path(dump)];
    if let Some(file) = file {
        words.extend(["--kernel".to_owned(), path(file)]);
    }
    words.extend(args.iter().map(|word| (*word).to_owned()));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    guest.client.call(&words)
}

fn recorded(stock: Stock) {
    let guest = Guest::boot(&Options::new(stock));
    let dump = guest.dir().join("guest.core");
    let to = dump.to_str().expect("a path of text");
    let _ = guest.client.call(&["vm", "dump", to]).expect("the dump");
    let file = stock.file("vmlinuz");

    let verified = look(&guest, &dump, Some(&file), &["info", "--verify"]).expect("info");
    assert_eq!(verified["source"], "file");
    println!("{stock:?}: agreed on {}", verified["verified"]);
    let own = look(&guest, &dump, None, &["info"]).expect("info");
    assert_eq!(own["source"], "memory");
    for field in [
        "release", "build_id", "symbols", "types", "slide", "boot", "tasks", "vcpus",
    ] {
        assert_eq!(own[field], verified[field], "{field}");
    }
    for view in EQUAL {
        let of_file = look(&guest, &dump, Some(&file), view).expect(view[0]);
        let of_memory = look(&guest, &dump, None, view).expect(view[0]);
        assert!(of_file == of_memory, "{view:?} differ");
        println!("{view:?}: equal, {} characters", of_file.to_string().len());
    }
    let text = look(&guest, &dump, None, &["text", "--changed"]);
    assert_eq!(text.refusal("a comparison"), "image_needed", "{text:?}");
    let code = look(&guest, &dump, None, &["disasm", "unix_ioctl"]).expect("disasm");
    let why = code["not_compared"].as_str().unwrap_or_default();
    assert!(why.contains("image file"), "{code:#}");
    let lines = code["instructions"].as_array().expect("instructions");
    let of_memory = |line: &&Value| line["held_by"] == "memory";
    assert_eq!(lines.iter().filter(of_memory).count(), lines.len());
    assert!(!lines.is_empty());
}

/// Stacks that were followed both ways.
#[derive(Debug, Default)]
struct Compared {
    /// Of vCPUs, frame by frame equal.
    running: usize,
    /// Of tasks.
    sleeping: usize,
    /// That neither can follow.
    neither: usize,
    /// That memory alone cannot, with the reasons.
    lost: Vec<String>,
}

impl Compared {
    fn add(&mut self, file: &Stack, memory: &Stack) {
        assert_eq!(file.who, memory.who);
        match (&file.end, &memory.end) {
            (Ok(_), Err(why)) => self.lost.push(format!("{:?}: {why}", file.who)),
            (Err(_), Err(_)) => self.neither += 1,
            _ => {
                assert_eq!(file, memory);
                match file.who {
                    Who::Vcpu(_) => self.running += 1,
                    _ => self.sleeping += 1,
                }
            }
        }
    }
}

/// Stops the guest `stops` times, and follows every stack by `stock`'s file and by memory alone.
fn compare(vm: &Vm, stock: Stock, stops: usize) -> Compared {
    let mut guest = vm.guest().expect("a guest that nobody else has");
    let mut file = Some(kernel_index::load(&stock.file("vmlinuz")).expect("an index"));
    let (mut compared, mut kernels, mut random) = (Compared::default(), None, 0x9e37_79b9_u64);
    for _ in 0..stops {
        std::thread::sleep(Duration::from_micros(next(&mut random) % 2000));
        let paused = guest
            .pause(Instant::now() + Duration::from_secs(10))
            .unwrap_or_else(|error| panic!("{error}; the guest ended with {:?}", vm.ended()));
        let (file, memory) = kernels.get_or_insert_with(|| {
            let start = Instant::now();
            let memory = Image::from_memory(&paused, paused.vcpus()).expect("a kernel in memory");
            println!("recovered in {:?}", start.elapsed());
            let file = file.take().expect("it is taken once");
            println!("{:?}", agree(&file, &memory).expect("one kernel"));
            [file, memory]
                .map(|image| {
                    Kernel::locate(Arc::new(image), &paused, paused.vcpus()).expect("the kernel")
                })
                .into()
        });
        let follow = |kernel| stacks(kernel, &paused, paused.vcpus(), &[]).expect("the stacks");
        let (by_file, by_memory) = (follow(file), follow(memory));
        assert_eq!(by_file.stacks.len(), by_memory.stacks.len());
        for (file, memory) in by_file.stacks.iter().zip(&by_memory.stacks) {
            compared.add(file, memory);
        }
        paused.resume().expect("a guest that goes on");
    }
    compared
}

fn busy(stock: Stock, scripts: &[&str]) {
    for script in scripts {
        let dir = tempfile::tempdir().expect("a directory");
        let vm = boot(dir.path(), stock, script);
        let compared = compare(&vm, stock, count("EXOPATCH_STOPS", STOPS));
        vm.kill("the end of the test");
        let _ = vm.wait();
        println!("{stock:?}: {compared:?}");
        let equal = compared.running + compared.sleeping;
        assert!(
            compared.running > 0 && compared.sleeping > 0,
            "{compared:?}"
        );
        let all = equal + compared.lost.len();
        assert!(equal * 1000 >= all * FOLLOWED_PERMILLE, "{compared:?}");
    }
}

#[test]
fn memory_says_of_a_6_1_what_its_file_says() {
    recorded(LTS_6_1);
}

#[test]
fn memory_says_of_a_6_12_what_its_file_says() {
    recorded(NEWEST_6_12);
}

#[test]
fn stacks_of_a_busy_6_1_are_the_same_from_memory_alone() {
    busy(LTS_6_1, &[PLAIN]);
}

#[test]
fn stacks_of_a_busy_6_12_are_the_same_from_memory_alone() {
    busy(NEWEST_6_12, &[PLAIN]);
}

#[test]
fn traced_stacks_of_6_1_are_the_same_from_memory_alone() {
    busy(LTS_6_1, &[PROBED, TRACED]);
}

#[test]
fn traced_stacks_of_6_12_are_the_same_from_memory_alone() {
    busy(NEWEST_6_12, &[PROBED, TRACED]);
}
