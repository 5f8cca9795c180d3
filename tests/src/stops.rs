//! What the vCPUs of a guest were doing each time it was stopped, and whether their stacks could be followed.

use std::collections::BTreeMap;
use std::fmt;

use patcher::guest::{Vcpu, VcpuState};
use patcher::kernel::bpf::Bpf;
use patcher::kernel::locate::Kernel;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::{Frame, Stack, Stacks};

/// Where a vCPU was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In a user program.
    User,
    /// In the idle loop.
    Idle,
    /// On the way between the user and the kernel.
    Entry,
    /// Anywhere else in the kernel.
    Kernel,
}

/// The vCPUs of many stops, counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// How many there were at each place, and how many of them had a reliable stack.
    pub places: BTreeMap<Place, (usize, usize)>,
    /// Stacks of tasks that did not run, and how many of them were reliable.
    pub sleeping: (usize, usize),
    /// Stacks of no task: just given up by one that ended, or not yet taken by one that begins. Only their words can be looked at.
    pub unowned: usize,
    /// Stacks through code that BPF made.
    pub bpf: ThroughBpf,
    /// Why stacks were not reliable, with an example of each reason.
    pub reasons: BTreeMap<String, (usize, String)>,
}

/// Reliable stacks that led through code that BPF made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThroughBpf {
    /// Of vCPUs.
    pub running: usize,
    /// Of those, where the vCPU was in that code itself.
    pub innermost: usize,
    /// Of tasks that did not run.
    pub sleeping: usize,
}

impl Tally {
    /// Counts the vCPUs and tasks of one stop.
    pub fn add(&mut self, kernel: &Kernel, vcpus: &[Vcpu], found: &Stacks, bpf: &Bpf) {
        for stack in &found.stacks {
            self.bpf.add(stack, bpf);
            let reliable = stack.end.is_ok();
            let count = match stack.who {
                Who::Vcpu(index) => {
                    let place = place(kernel, &vcpus[index], stack);
                    self.places.entry(place).or_default()
                }
                Who::Unowned => {
                    self.unowned += 1;
                    continue;
                }
                _ => &mut self.sleeping,
            };
            count.0 += 1;
            count.1 += usize::from(reliable);
            if let Err(unreliable) = &stack.end {
                let reason = format!("{:?}", unreliable.reason);
                let name: String = reason.chars().take_while(|c| c.is_alphanumeric()).collect();
                let frames: Vec<_> = stack
                    .frames
                    .iter()
                    .map(|frame| frame.describe(kernel))
                    .collect();
                let example =
                    || format!("{:?}: {unreliable}; after {}", stack.who, frames.join(" "));
                self.reasons.entry(name).or_insert_with(|| (0, example())).0 += 1;
            }
        }
    }

    /// vCPUs stopped at `place`, and how many of them had a reliable stack.
    #[must_use]
    pub fn at(&self, place: Place) -> (usize, usize) {
        self.places.get(&place).copied().unwrap_or_default()
    }
}

impl ThroughBpf {
    fn add(&mut self, stack: &Stack, bpf: &Bpf) {
        let mut frames = stack.frames.iter();
        let within = |frame: &Frame| bpf.at(frame.ip).is_some();
        let innermost = stack.frames.first().is_some_and(within);
        if stack.end.is_err() || !frames.any(within) {
            return;
        }
        if matches!(stack.who, Who::Vcpu(_)) {
            self.running += 1;
            self.innermost += usize::from(innermost);
        } else {
            self.sleeping += 1;
        }
    }
}

fn place(kernel: &Kernel, vcpu: &Vcpu, stack: &Stack) -> Place {
    if vcpu.cpl == 3 {
        return Place::User;
    }
    let innermost = stack
        .frames
        .first()
        .map(|frame| frame.describe(kernel))
        .unwrap_or_default();
    let named = |name: &str| innermost.contains(name);
    let within = |start, end| {
        let (start, end) = (kernel.symbol(start), kernel.symbol(end));
        start.is_ok_and(|start| start.0 <= vcpu.rip) && end.is_ok_and(|end| vcpu.rip < end.0)
    };
    if vcpu.state == VcpuState::Halted || named("idle") || named("safe_halt") {
        Place::Idle
    } else if within("__entry_text_start", "__entry_text_end") {
        Place::Entry
    } else {
        Place::Kernel
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (all, reliable)) in &self.places {
            write!(f, "{place:?} {reliable}/{all}, ")?;
        }
        write!(
            f,
            "sleeping {}/{} reliable, {} stacks of no task",
            self.sleeping.1, self.sleeping.0, self.unowned
        )?;
        if self.bpf != ThroughBpf::default() {
            write!(f, ", {:?}", self.bpf)?;
        }
        for (count, example) in self.reasons.values() {
            write!(f, "\n  {count} times such as {example}")?;
        }
        Ok(())
    }
}
