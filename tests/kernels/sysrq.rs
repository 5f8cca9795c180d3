//! Are stacks those that the kernel itself prints into its log?
//!
//! `t`, written to `/proc/sysrq-trigger`, prints the stack of every task. Ours are taken before and after, with how often each task has left a
//! processor: who neither ran nor left one in all that time has slept in one place, and the three must be equal. `l` prints what every
//! processor was doing when an NMI came to it, or that it asked. Each is stopped as it is about to print: what we see then is
//! what it prints when it goes on, register by register and frame by frame. Frames of which the kernel is not sure count for nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::guest::{Guest as _, PausedGuest, Registers as _};
use patcher::kernel::locate::Kernel;
use patcher::kernel::tasks::Tasks;
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use tests::trace;
use vmm::guest::BreakError;
use vmm::views::stack::{FrameKind, Stack};
use vmm::views::{self, Asked, Subject, View, log, stack};

use crate::instant::keep_busy;

const CPUS: u32 = 2;
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
/// Room for the stacks of all tasks.
const LOG: &str = "log_buf_len=4M";
/// Threads that sleep in many ways, beside those of the kernel.
const SLEEPERS: usize = 42;
/// So many stacks of sleeping tasks are compared at least.
const FEWEST_ASLEEP: usize = 80;
/// So often every processor is asked what it does.
const ASKS: usize = 40;
/// So many of those are in the kernel at least, and not idle.
const FEWEST_BUSY: usize = 8;
/// Every processor comes here just before it prints, with the address of the registers that the NMI found; without one if it asked itself.
const PRINTS: &str = "nmi_cpu_backtrace";
/// What the kernel prints just behind that.
const PRINTED: &str = "NMI backtrace for cpu ";
/// How long to wait for one that comes to print before it is seen whether all have.
const HIT_LIMIT: Duration = Duration::from_secs(1);

/// Looks at a guest that stands still, as the command does.
fn see(kernel: &Kernel, paused: &impl PausedGuest, asked: &Asked) -> View {
    let subject = Subject {
        kernel,
        guest: paused,
        vcpus: paused.vcpus(),
        updates: &[],
    };
    views::take(asked, &subject).unwrap_or_else(|error| panic!("{asked:?}: {error}"))
}

/// Every stack of a guest that stands still.
fn stacks(kernel: &Kernel, paused: &impl PausedGuest) -> Vec<Stack> {
    match see(kernel, paused, &Asked::Stack(stack::Asked::All)) {
        View::Stack(seen) => seen.stacks,
        other => panic!("no stacks: {other:?}"),
    }
}

/// The guest's log.
fn log(guest: &Inside, kernel: &Kernel) -> Vec<log::LogRecord> {
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let paused = machine.pause(Instant::now() + PAUSE_LIMIT);
    match see(kernel, &paused.expect("a pause"), &Asked::Log) {
        View::Log(seen) => seen.records,
        other => panic!("no log: {other:?}"),
    }
}

/// The places of frames, as the kernel names them.
fn places(frames: &[stack::StackFrame]) -> Vec<String> {
    let place = |frame: &stack::StackFrame| frame.place.clone().unwrap_or(frame.address.clone());
    frames.iter().map(place).collect()
}

/// A task that does not run.
#[derive(Debug)]
struct Asleep {
    name: String,
    frames: Vec<String>,
    /// How often it has left a processor.
    switches: u64,
}

/// The tasks that do not run, by thread's id.
fn asleep(guest: &Inside, kernel: &Kernel) -> BTreeMap<u32, Asleep> {
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let paused = machine.pause(Instant::now() + PAUSE_LIMIT);
    let paused = paused.expect("a pause");
    let tasks = Tasks::read(kernel, &paused).expect("the tasks").tasks;
    let counts = ["nvcsw", "nivcsw"].map(|member| {
        let offset = kernel.image().types().offset_of("task_struct", member);
        offset.expect(member)
    });
    let switches: BTreeMap<u32, u64> = tasks
        .iter()
        .map(|task| {
            let count = |at: u64| {
                kernel
                    .read_u64(&paused, Gva(task.at.0 + at))
                    .expect("a count")
            };
            (task.pid, counts.map(count).iter().sum())
        })
        .collect();
    let stacks = stacks(kernel, &paused).into_iter().filter_map(|stack| {
        let (pid, None) = (stack.pid.filter(|pid| *pid != 0)?, stack.cpu) else {
            return None;
        };
        assert!(stack.reliable, "{stack:#?}");
        let asleep = Asleep {
            name: stack.name?,
            frames: places(&stack.frames),
            switches: switches[&pid],
        };
        Some((pid, asleep))
    });
    stacks.collect()
}

/// What the kernel printed of every task: its state and frames, by thread's id.
fn told(records: &[log::LogRecord]) -> BTreeMap<u32, (char, Vec<String>)> {
    let begin = records
        .iter()
        .rposition(|record| record.text == "sysrq: Show State");
    let records = &records[begin.expect("the key's name")..];
    // Another writer's lines may come between.
    let own = records
        .iter()
        .filter(|record| record.task == records[0].task);
    let lines: Vec<&str> = own.flat_map(|record| record.text.lines()).collect();
    let tasks = lines.split_inclusive(|line| line.starts_with("task:"));
    // Each part ends with the line that the next belongs to.
    let parts: Vec<&[&str]> = tasks.collect();
    let parts = parts.windows(2).map(|pair| {
        let head = *pair[0].last().expect("a task's line");
        let word = |name: &str| {
            let value = head
                .split_once(name)
                .and_then(|(_, rest)| rest.split_whitespace().next());
            value.unwrap_or_else(|| panic!("no {name} in {head:?}"))
        };
        let state = word(" state:").chars().next().expect(head);
        let frames = trace::frames(pair[1].iter().copied());
        (word(" pid:").parse().expect(head), (state, frames))
    });
    parts.collect()
}

/// How stacks compared.
#[derive(Debug, Default)]
struct Compared {
    equal: usize,
    /// Of those that are equal.
    frames: usize,
    /// Those that the kernel gave up on: what it printed is the first part of what we see.
    given_up: usize,
    /// How many could not be compared, and why not.
    skipped: BTreeMap<&'static str, usize>,
}

impl Compared {
    fn skip(&mut self, why: &'static str) {
        *self.skipped.entry(why).or_default() += 1;
    }

    /// Holds a stack of ours against what the kernel printed.
    fn hold(&mut self, whose: &str, own: &[String], guests: &[String]) {
        if own == guests {
            self.equal += 1;
            self.frames += own.len();
            return;
        }
        let gave_up = !guests.is_empty() && own.starts_with(guests);
        assert!(gave_up, "{whose}: {own:#?} are not {guests:#?}");
        println!(
            "{whose}: the kernel gave up after {}: {own:?}",
            guests.len()
        );
        self.given_up += 1;
    }
}

fn sleeping_tasks(stock: Stock) {
    let guest = Inside::boot_with(stock, CPUS, LOG);
    let kernel = guest.kernel(stock);
    let load = format!(
        "probe sleepers {SLEEPERS} >/tmp/load & while ! grep -q : /tmp/load; do usleep 50000; done"
    );
    let _ = guest.must(&load);
    let before = asleep(&guest, &kernel);
    let _ = guest.must("echo t >/proc/sysrq-trigger");
    let after = asleep(&guest, &kernel);
    let told = told(&log(&guest, &kernel));
    let mut compared = Compared::default();
    for (pid, own) in &before {
        let (Some(later), Some((state, guests))) = (after.get(pid), told.get(pid)) else {
            compared.skip("came, went or ran");
            continue;
        };
        if own.switches != later.switches {
            compared.skip("ran between");
            continue;
        }
        let whose = format!("{pid} ({}) in state {state}", own.name);
        assert_eq!(own.frames, later.frames, "{whose} did not sleep");
        compared.hold(&whose, &own.frames, guests);
    }
    println!("{stock:?}: {} tasks were printed; {compared:?}", told.len());
    assert!(compared.equal >= FEWEST_ASLEEP, "{compared:?}");
    assert_eq!(compared.given_up, 0, "{compared:?}");
}

/// A processor that is about to print.
#[derive(Debug)]
struct Hit {
    /// The registers that the NMI found, by the names under which they are printed.
    registers: BTreeMap<String, u64>,
    frames: Vec<stack::StackFrame>,
}

/// The registers that the kernel prints, and what it calls them.
const REGISTERS: [(&str, &str); 16] = [
    ("RSP", "sp"),
    ("RAX", "ax"),
    ("RBX", "bx"),
    ("RCX", "cx"),
    ("RDX", "dx"),
    ("RSI", "si"),
    ("RDI", "di"),
    ("RBP", "bp"),
    ("R08", "r8"),
    ("R09", "r9"),
    ("R10", "r10"),
    ("R11", "r11"),
    ("R12", "r12"),
    ("R13", "r13"),
    ("R14", "r14"),
    ("R15", "r15"),
];

/// The registers that lie at `at`; none when nothing does.
fn registers(kernel: &Kernel, paused: &impl PausedGuest, at: u64) -> BTreeMap<String, u64> {
    let types = kernel.image().types();
    let one = |(printed, member): &(&str, &str)| {
        let offset = types.offset_of("pt_regs", member).expect(member);
        let value = kernel.read_u64(paused, Gva(at + offset));
        ((*printed).to_owned(), value.expect("a register"))
    };
    let there = REGISTERS.iter().filter(|_| at != 0);
    there.map(one).collect()
}

/// Has the guest ask `asks` times what its processors do, and stops each as it is about to print that. By processor, in their order.
fn taken(guest: &Inside, kernel: &Kernel, asks: usize) -> BTreeMap<usize, Vec<Hit>> {
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let mut breakpoint = machine.break_at(kernel.symbol(PRINTS).expect(PRINTS));
    let mut all: BTreeMap<usize, Vec<Hit>> = BTreeMap::new();
    let ask = "echo l >/proc/sysrq-trigger; usleep 20000";
    let mark = guest.begin(&format!("for i in $(seq {asks}); do {ask}; done"));
    let answer = loop {
        match breakpoint.next(Instant::now() + HIT_LIMIT) {
            Ok((paused, came)) => {
                let seen = stacks(kernel, &paused);
                for cpu in came {
                    let own = seen.iter().find(|stack| stack.cpu == Some(cpu));
                    let own = own.expect("the processor's stack").clone();
                    assert!(own.reliable, "{own:#?}");
                    let hit = Hit {
                        // Where the first argument is.
                        registers: registers(kernel, &paused, paused.vcpus()[cpu].gpr[7]),
                        frames: own.frames,
                    };
                    all.entry(cpu).or_default().push(hit);
                }
                paused.resume().expect("a guest that goes on");
            }
            Err(BreakError::Breakpoint(_)) if guest.vm.ended().is_none() => {}
            Err(error) => panic!("{error}; the guest ended with {:?}", guest.vm.ended()),
        }
        if let Some(answer) = guest.answered(mark) {
            break answer;
        }
    };
    assert_eq!(answer.status, 0, "{}", answer.text());
    all
}

/// What each processor printed, as the lines from its name on. By processor, in their order.
fn printed(records: &[log::LogRecord]) -> BTreeMap<usize, Vec<Vec<&str>>> {
    let mut all: BTreeMap<usize, Vec<Vec<&str>>> = BTreeMap::new();
    // Whose lines are whose: a task's, or a processor's outside any.
    let mut open = BTreeMap::new();
    for record in records {
        let writer = (record.task, record.cpu);
        for line in record.text.lines() {
            if let Some(rest) = line.strip_prefix(PRINTED) {
                let cpu = rest.split(' ').next().and_then(|cpu| cpu.parse().ok());
                let cpu: usize = cpu.expect(line);
                open.insert(writer, cpu);
                all.entry(cpu).or_default().push(Vec::new());
            }
            if line.starts_with("sysrq: ") {
                open.remove(&writer);
            }
            let lines = open
                .get(&writer)
                .and_then(|cpu| all.get_mut(cpu)?.last_mut());
            if let Some(lines) = lines {
                lines.push(line);
            }
        }
    }
    all
}

/// Holds what a processor printed against how it was seen as it was about to.
fn hold(compared: &mut Compared, whose: &str, hit: &Hit, lines: &[&str]) {
    if lines[0].contains("skipped: idling") {
        compared.skip("idle");
    } else if trace::of_user(lines) {
        compared.skip("in the user's code");
    } else {
        let mut registers = trace::registers(lines);
        registers.retain(|name, _| REGISTERS.iter().any(|(printed, _)| printed == name));
        assert_eq!(registers, hit.registers, "{whose}: {lines:#?}");
        let guests = trace::frames(lines.iter().copied());
        if registers.is_empty() {
            // It printed from within the function, which we see it about to enter.
            let own = |frame: &String| frame.starts_with(PRINTS);
            let behind = guests.iter().rposition(own).expect("the function itself") + 1;
            compared.hold(whose, &places(&hit.frames[1..]), &guests[behind..]);
        } else {
            let interrupted = |frame: &stack::StackFrame| frame.kind == FrameKind::Interrupted;
            let first = hit.frames.iter().position(interrupted).expect(whose);
            compared.hold(whose, &places(&hit.frames[first..]), &guests);
        }
    }
}

fn processors(stock: Stock) {
    let guest = Inside::boot_with(stock, CPUS, LOG);
    let kernel = guest.kernel(stock);
    keep_busy(&guest, &[]);
    let taken = taken(&guest, &kernel, ASKS);
    let records = log(&guest, &kernel);
    let printed = printed(&records);
    let (mut found, mut asked) = (Compared::default(), Compared::default());
    assert!(taken.keys().eq(printed.keys()), "{:?}", printed.keys());
    for (cpu, hits) in &taken {
        let printed = &printed[cpu];
        assert_eq!(hits.len(), printed.len(), "processor {cpu}");
        for (index, (hit, lines)) in hits.iter().zip(printed).enumerate() {
            let compared = if hit.registers.is_empty() {
                &mut asked
            } else {
                &mut found
            };
            hold(
                compared,
                &format!("processor {cpu}, print {index}"),
                hit,
                lines,
            );
        }
    }
    println!("{stock:?}: found by an NMI {found:?}, asked themselves {asked:?}");
    assert!(found.equal >= FEWEST_BUSY, "{found:?}");
    assert!(asked.equal >= FEWEST_BUSY, "{asked:?}");
    assert!(found.given_up * 10 <= found.equal, "{found:?}");
    assert_eq!(asked.given_up, 0, "{asked:?}");
}

#[test]
fn tasks_of_a_6_1_sleep_where_its_log_says() {
    sleeping_tasks(LTS_6_1);
}

#[test]
fn tasks_of_a_6_12_sleep_where_its_log_says() {
    sleeping_tasks(NEWEST_6_12);
}

#[test]
fn processors_of_a_6_1_are_where_its_log_says() {
    processors(LTS_6_1);
}

#[test]
fn processors_of_a_6_12_are_where_its_log_says() {
    processors(NEWEST_6_12);
}
