//! Are the stacks of recorded guests what drgn, which has the kernel's debug information, says that they are, frame by frame? And are the
//! symbols of an image those that vmlinux-to-elf finds?
//!
//! `scripts/test oracles` runs this: it makes drgn and the debug information ready, and the guests are booted in the lab.
#![expect(clippy::print_stdout, reason = "a test prints the figures that it saw")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use patcher::guest::Registers as _;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::stacks;
use serde_json::Value;
use tests::oracle;
use tests::recorded::{Load, Opened, Recorded, open};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use vmm::kernel_index;

/// Moments of each guest.
const MOMENTS: usize = 4;
const MEMORY_MIB: u64 = 256;
/// Where the kernel's half of the address space begins.
const KERNEL: u64 = 1 << 63;

/// The code of one stack, from the innermost frame out.
type Frames = Vec<u64>;

/// The stacks of one moment.
#[derive(Debug, Default, PartialEq, Eq)]
struct Moment {
    /// Of tasks that do not run, by where each task is.
    sleeping: BTreeMap<u64, Frames>,
    /// Of vCPUs. One in the user's code has none.
    cpus: BTreeMap<u64, Frames>,
    /// How many no task has.
    unowned: usize,
    /// Tasks that have ended and given up their stack; drgn follows what is left of it in memory.
    ended: BTreeSet<u64>,
}

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    sleeping: usize,
    in_kernel: usize,
    in_user: usize,
    frames: usize,
    /// Stacks that no task has: just given up by one that ended, or not yet taken by one that begins. drgn knows none of them.
    unowned: usize,
    ended: usize,
    different: Vec<String>,
}

impl Tally {
    fn add(&mut self, opened: &Opened, ours: &Moment, theirs: &Moment) {
        self.sleeping += self.compare(opened, "task at", &ours.sleeping, &theirs.sleeping);
        let cpus = self.compare(opened, "vCPU", &ours.cpus, &theirs.cpus);
        let in_user = ours
            .cpus
            .values()
            .filter(|frames| frames.is_empty())
            .count();
        self.in_user += in_user;
        self.in_kernel += cpus - in_user;
        self.unowned += ours.unowned;
        self.ended += ours.ended.len();
    }

    /// Compares the stacks that either has, and gives their number.
    fn compare(
        &mut self,
        opened: &Opened,
        whose: &str,
        ours: &BTreeMap<u64, Frames>,
        theirs: &BTreeMap<u64, Frames>,
    ) -> usize {
        let mut all: Vec<u64> = ours.keys().chain(theirs.keys()).copied().collect();
        all.sort_unstable();
        all.dedup();
        for key in &all {
            let (own, other) = (ours.get(key), theirs.get(key));
            self.frames += own.map_or(0, Vec::len);
            if own != other {
                let text = |frames: Option<&Frames>| named(opened, frames);
                self.different.push(format!(
                    "{whose} {key:#x}\n  exopatch: {}\n  drgn:     {}",
                    text(own),
                    text(other)
                ));
            }
        }
        all.len()
    }
}

fn named(opened: &Opened, frames: Option<&Frames>) -> String {
    let Some(frames) = frames else {
        return "has no such stack".to_owned();
    };
    let name = |ip: &u64| {
        let link = opened.kernel.link(patcher::addr::Gva(*ip));
        let symbols = opened.kernel.image().symbols();
        link.and_then(|link| symbols.containing(link)).map_or_else(
            || format!("{ip:#x}"),
            |(symbol, offset)| format!("{}+{offset:#x}", symbol.name),
        )
    };
    frames.iter().map(name).collect::<Vec<_>>().join(" ")
}

/// The stacks as exopatch follows them. All that a task has are reliable.
fn ours(opened: &Opened) -> Moment {
    let dump = &opened.dump;
    let found = stacks(&opened.kernel, dump, dump.vcpus(), &[]).expect("the stacks");
    let mut moment = Moment::default();
    let ended = found
        .tasks
        .tasks
        .iter()
        .filter(|task| task.stack.is_empty());
    moment.ended = ended.map(|task| task.at.0).collect();
    for stack in &found.stacks {
        let frames = stack.frames.iter().map(|frame| frame.ip.0).collect();
        match (
            &stack.who,
            stack.task.map(|task| found.tasks.tasks[task].at.0),
        ) {
            (Who::Unowned, _) => {
                moment.unowned += 1;
                continue;
            }
            (Who::Vcpu(cpu), _) => moment.cpus.insert(*cpu as u64, frames),
            (_, Some(task)) => moment.sleeping.insert(task, frames),
            (_, None) => panic!("{:?} has no task", stack.who),
        };
        assert!(stack.end.is_ok(), "{:?}: {:?}", stack.who, stack.end);
    }
    moment
}

fn number(of: &Value, name: &str) -> u64 {
    let value = &of[name];
    let text = value.as_str().and_then(|text| text.strip_prefix("0x"));
    let parsed = text.and_then(|text| u64::from_str_radix(text, 16).ok());
    parsed
        .or(value.as_u64())
        .unwrap_or_else(|| panic!("no number {name} in {of}"))
}

fn list<'a>(of: &'a Value, name: &str) -> &'a [Value] {
    of[name]
        .as_array()
        .unwrap_or_else(|| panic!("no list {name} in {of}"))
}

/// The stacks as drgn follows them. It lists a task that runs among the others too.
fn theirs(stock: Stock, core: &Path) -> Moment {
    let said = oracle::drgn("stacks.py", stock, core, &[]).expect("drgn");
    let frames = |of: &Value| -> Frames {
        let frames = list(of, "frames").iter();
        frames
            .map(|ip| number(&serde_json::json!({ "ip": ip }), "ip"))
            .filter(|ip| *ip >= KERNEL)
            .collect()
    };
    let mut moment = Moment::default();
    for task in list(&said, "tasks") {
        moment
            .sleeping
            .insert(number(task, "address"), frames(task));
    }
    for cpu in list(&said, "cpus") {
        moment.sleeping.remove(&number(cpu, "current"));
        moment.cpus.insert(number(cpu, "cpu"), frames(cpu));
    }
    moment
}

fn compare(stock: Stock) {
    // They stay, for a look at what differs.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let core = |moment| dir.join(format!("{}-{moment}.core", stock.0));
    let cores: Vec<_> = (0..MOMENTS).map(core).collect();
    let guest = Recorded {
        stock,
        load: Load::Busy,
        memory_mib: MEMORY_MIB,
    };
    guest.record(&cores).expect("recordings");
    let mut tally = Tally::default();
    for core in &cores {
        let opened = open(stock, core).expect("a recorded guest");
        let ours = ours(&opened);
        let mut theirs = theirs(stock, core);
        theirs.sleeping.retain(|task, _| !ours.ended.contains(task));
        tally.add(&opened, &ours, &theirs);
    }
    println!(
        "{stock:?}, {MOMENTS} moments, beside drgn by the address of each frame (its inlined functions and the user's code left out): \
         {} sleeping tasks, {} vCPUs in the kernel, {} in the user's code, {} frames; {} different; {} stacks of no task, {} tasks without one",
        tally.sleeping,
        tally.in_kernel,
        tally.in_user,
        tally.frames,
        tally.different.len(),
        tally.unowned,
        tally.ended
    );
    assert!(tally.different.is_empty(), "{}", tally.different.join("\n"));
    assert!(tally.sleeping > MOMENTS * 200, "{tally:?}");
}

#[test]
fn stacks_of_a_busy_6_1_are_those_of_drgn() {
    compare(LTS_6_1);
}

#[test]
fn stacks_of_a_busy_6_12_are_those_of_drgn() {
    compare(NEWEST_6_12);
}

/// The symbols of an image's own table, one by one and in its order, as vmlinux-to-elf finds them.
fn compare_symbols(stock: Stock) {
    let image = kernel_index::load(&stock.file("vmlinuz")).expect("an image");
    let ours = image.symbols().iter().map(|symbol| {
        let kind = char::from(symbol.kind);
        format!("{:016x} {kind} {}", symbol.address.0, symbol.name)
    });
    let ours: Vec<String> = ours.collect();
    let theirs = oracle::symbols(stock).expect("vmlinux-to-elf");
    let theirs = String::from_utf8(theirs).expect("text");
    let theirs: Vec<&str> = theirs.lines().collect();
    let differ = ours.iter().zip(&theirs).find(|(own, other)| own != other);
    assert_eq!(differ, None, "{stock:?}");
    assert_eq!(ours.len(), theirs.len(), "{stock:?}");
    println!("{stock:?}: {} symbols, as vmlinux-to-elf", ours.len());
}

#[test]
fn symbols_of_6_1_are_those_of_vmlinux_to_elf() {
    compare_symbols(LTS_6_1);
}

#[test]
fn symbols_of_6_12_are_those_of_vmlinux_to_elf() {
    compare_symbols(NEWEST_6_12);
}
