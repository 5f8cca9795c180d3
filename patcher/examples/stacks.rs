//! Prints every stack of a recorded guest, and how fast they were followed: `stacks CORE BZIMAGE [--compare FILE] [--quiet]`.
//!
//! `--compare` holds them against a copy of the guest's own `/proc/PID/stack`: lines `TASK PID (name) state ...` and `STACK PID`, then
//! the frames. Both leave out the scheduler's functions, as the guest's kernel does. A task that was running then, or that
//! is not where it was, is listed as a difference with its state; `--quiet` prints the differences and the figures only.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::Gva;
use patcher::guest::Registers as _;
use patcher::guest::dump::Dump;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::payload::Payload;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::{Stack, Stacks, stacks};

const ROUNDS: u32 = 101;

fn main() -> Result<(), Box<dyn Error>> {
    let (mut paths, mut compare, mut quiet) = (Vec::new(), None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--compare" => compare = args.next(),
            "--quiet" => quiet = true,
            _ => paths.push(arg),
        }
    }
    let [core, image] = paths.as_slice() else {
        return Err("usage: stacks CORE BZIMAGE [--compare FILE] [--quiet]".into());
    };
    let vmlinux = Payload::unpack(&std::fs::read(image)?)?;
    let image = Arc::new(Image::parse(Arc::new(vmlinux))?);
    println!(
        "unwind table of {} entries",
        image.orc().map_err(Clone::clone)?.len()
    );
    let dump = Dump::parse(Arc::new(std::fs::read(core)?))?;
    let kernel = Kernel::locate(image, &dump, dump.vcpus())?;
    let found = stacks(&kernel, &dump, dump.vcpus(), &[])?;
    if !quiet {
        found.stacks.iter().for_each(|stack| print(&kernel, stack));
    }
    summary(&kernel, &found);
    timing(&kernel, &dump, &found)?;
    match compare {
        Some(path) => compare_with(&kernel, &found, &std::fs::read_to_string(path)?),
        None => Ok(()),
    }
}

fn name(who: &Who) -> String {
    match who {
        Who::Vcpu(index) => format!("vCPU {index}"),
        Who::Task { pid, name } => format!("task {pid} ({name})"),
        Who::CpuStack(index) => format!("stack of vCPU {index}"),
        Who::Unowned => "a stack of no known task".to_owned(),
    }
}

fn print(kernel: &Kernel, stack: &Stack) {
    println!("{}", name(&stack.who));
    for frame in &stack.frames {
        println!("  {} {} {:?}", frame.ip, frame.describe(kernel), frame.via);
    }
    match &stack.end {
        Ok(end) => println!("  ends: {end:?}"),
        Err(unreliable) => println!("  UNRELIABLE: {unreliable}"),
    }
}

fn summary(kernel: &Kernel, found: &Stacks) {
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for stack in &found.stacks {
        let who = match stack.who {
            Who::Vcpu(_) => "vCPU",
            Who::Unowned => "no task",
            _ => "sleeping",
        };
        let end = match &stack.end {
            Ok(end) => format!("{end:?}"),
            Err(_) => "UNRELIABLE".to_owned(),
        };
        *ends.entry(format!("{who}: {end}")).or_default() += 1;
    }
    println!(
        "{} tasks, {} stacks: {ends:?}",
        found.tasks.tasks.len(),
        found.stacks.len()
    );
    for stack in found.stacks.iter().filter(|stack| stack.end.is_err()) {
        print(kernel, stack);
    }
}

fn timing(kernel: &Kernel, dump: &Dump, found: &Stacks) -> Result<(), Box<dyn Error>> {
    let frames: usize = found.stacks.iter().map(|stack| stack.frames.len()).sum();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        stacks(kernel, dump, dump.vcpus(), &[])?;
        times.push(start.elapsed());
    }
    times.sort();
    let median = times[times.len() / 2];
    println!(
        "{frames} frames in {median:?} (tasks and their lists included): {:.0} frames and {:.0} tasks a second; {} bytes read",
        frames as f64 / median.as_secs_f64(),
        found.tasks.tasks.len() as f64 / median.as_secs_f64(),
        found.bytes_read
    );
    Ok(())
}

/// A task as the guest described it: its state, and its frames.
#[derive(Default)]
struct Described {
    state: String,
    frames: Vec<String>,
}

fn described(text: &str) -> BTreeMap<u32, Described> {
    let mut all: BTreeMap<u32, Described> = BTreeMap::new();
    let mut pid = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("TASK ") {
            let number = rest
                .split(' ')
                .next()
                .and_then(|number| number.parse().ok());
            let state = rest
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            if let (Some(number), Some(state)) = (number, state) {
                all.entry(number).or_default().state = state.to_string();
            }
        } else if let Some(number) = line.strip_prefix("STACK ") {
            pid = number.trim().parse().unwrap_or(0);
        } else if let Some(frame) = line.strip_prefix("[<0>] ") {
            all.entry(pid).or_default().frames.push(frame.to_owned());
        }
    }
    all
}

fn compare_with(kernel: &Kernel, found: &Stacks, text: &str) -> Result<(), Box<dyn Error>> {
    let range = |name: &str| -> Result<Range<Gva>, Box<dyn Error>> {
        let symbol = |end| kernel.symbol(&format!("__{name}_text_{end}"));
        Ok(symbol("start")?..symbol("end")?)
    };
    let hidden = [range("sched")?, range("lock")?];
    let (mut same, mut frames, mut different) = (0, 0, 0);
    let guest = described(text);
    for (pid, described) in &guest {
        let stack = found.stacks.iter().find(|stack| match &stack.who {
            Who::Task { pid: own, .. } => own == pid,
            _ => stack
                .task
                .is_some_and(|task| found.tasks.tasks[task].pid == *pid),
        });
        let Some(stack) = stack else {
            println!(
                "  task {pid} ({}) is gone, or in the user's code",
                described.state
            );
            different += 1;
            continue;
        };
        let visible = stack
            .frames
            .iter()
            .filter(|frame| !hidden.iter().any(|range| range.contains(&frame.ip)));
        let ours: Vec<String> = visible.map(|frame| frame.describe(kernel)).collect();
        if ours == described.frames {
            same += 1;
            frames += ours.len();
        } else {
            different += 1;
            println!("  {} was in state {}", name(&stack.who), described.state);
            println!("    guest: {}", described.frames.join(" "));
            println!("    here:  {}", ours.join(" "));
        }
    }
    println!(
        "{} tasks described by the guest: {same} equal, with {frames} frames; {different} different",
        guest.len()
    );
    Ok(())
}
