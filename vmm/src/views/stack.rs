//! Stacks frame by frame: of a task, of a vCPU, or of all. Each is reliable to its end, or unreliable with the reason and the place.

use patcher::addr::Gva;
use patcher::kernel::stack::Who;
use patcher::kernel::tasks::Tasks;
use patcher::kernel::unwind::{self, End, OtherCode, Unreliable, Via};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::place::Places;
use super::table::or_dash;
use super::{Shown, Subject, ViewError, text_of};
use crate::output::clean;

/// Whose stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The thread with this id; 0 are the idle tasks.
    Task(u32),
    /// The vCPU of this number.
    Cpu(usize),
    /// Every one.
    All,
}

impl Asked {
    /// Reads `PID`, `cpuN` or `all`.
    ///
    /// # Errors
    /// [`ViewError::Whose`].
    pub fn parse(text: &str) -> Result<Self, ViewError> {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let parsed = match text.strip_prefix("cpu") {
            _ if text == "all" => Some(Self::All),
            Some(number) if digits(number) => number.parse().ok().map(Self::Cpu),
            None if digits(text) => text.parse().ok().map(Self::Task),
            _ => None,
        };
        parsed.ok_or_else(|| ViewError::Whose {
            text: text.to_owned(),
        })
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "{pid}"),
            Self::Cpu(cpu) => write!(f, "cpu{cpu}"),
            Self::All => f.write_str("all"),
        }
    }
}

/// The stacks that were asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stacks {
    /// Of vCPUs first, then of tasks that do not run, then of no known task; those of vCPUs that came to a place in the order in which they came.
    pub stacks: Vec<Stack>,
    /// How many of them are reliable.
    pub reliable: usize,
    /// How many are not.
    pub unreliable: usize,
}

/// One stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stack {
    /// The vCPU whose registers it was followed from; a task without one does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<usize>,
    /// The thread's id; 0 for idle tasks. Left out when the task cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The task's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// It was followed to its end, and each frame is sure.
    pub reliable: bool,
    /// Where it ends, if it is reliable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<StackEnd>,
    /// Why it is not reliable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreliable: Option<Doubt>,
    /// From the innermost out; of an unreliable stack those before the reason.
    pub frames: Vec<StackFrame>,
}

/// Where a reliable stack ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StackEnd {
    /// At the registers of the user's code; without frames, the vCPU is in that code.
    User,
    /// In code on the way from or to the user, beneath which nothing of the kernel is.
    Entry,
    /// At the task's first function.
    First,
}

/// Why a stack is not reliable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Doubt {
    /// The reason.
    pub reason: String,
    /// The code whose caller could not be found; left out where no code is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// That code by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Its stack pointer, or where the stack begins.
    pub stack_pointer: String,
}

/// How a frame came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// A vCPU is here.
    Runs,
    /// It waits for a call to return here.
    Call,
    /// An interrupt or an exception came here.
    Interrupted,
    /// It will begin here.
    Begins,
}

/// One place in the code of a thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StackFrame {
    /// Where it goes on.
    pub address: String,
    /// How it came about.
    pub kind: FrameKind,
    /// Where on a stack that is written; left out for a register.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// As the kernel prints it: `symbol+offset/size [module]`. Left out for code without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
}

/// Follows all stacks, and keeps those that were asked for.
pub(super) fn read(subject: &Subject<'_>, asked: Asked) -> Result<Stacks, ViewError> {
    if let Asked::Cpu(cpu) = asked
        && cpu >= subject.vcpus.len()
    {
        let count = subject.vcpus.len();
        return Err(ViewError::NoCpu { cpu, count });
    }
    // Threads may be in editions. In a recorded guest nobody knows of those any more.
    let known = subject
        .updates
        .iter()
        .map(|update| update.code.code.clone());
    let others: Vec<OtherCode> = known.chain([OtherCode::arena()]).collect();
    let found = unwind::stacks(subject.kernel, subject.guest, subject.vcpus, &others)?;
    let places = Places::read(subject)?;
    let stacks = found
        .stacks
        .iter()
        .map(|of| stack(of, &found.tasks, &places));
    let stacks: Vec<Stack> = stacks.filter(|stack| asked.includes(stack)).collect();
    if let (Asked::Cpu(cpu), []) = (asked, stacks.as_slice()) {
        return Err(ViewError::CpuOffline { cpu });
    }
    if let (Asked::Task(pid), []) = (asked, stacks.as_slice()) {
        let exits = found.tasks.tasks.iter().any(|task| task.pid == pid);
        return Err(ViewError::NoTask { pid, exits });
    }
    Ok(Stacks::of(stacks))
}

impl Stacks {
    /// These.
    pub(crate) fn of(stacks: Vec<Stack>) -> Self {
        let reliable = stacks.iter().filter(|stack| stack.reliable).count();
        Self {
            unreliable: stacks.len() - reliable,
            reliable,
            stacks,
        }
    }
}

impl Asked {
    fn includes(self, stack: &Stack) -> bool {
        match self {
            Self::Task(pid) => stack.pid == Some(pid),
            Self::Cpu(cpu) => stack.cpu == Some(cpu),
            Self::All => true,
        }
    }
}

fn stack(of: &unwind::Stack, tasks: &Tasks, places: &Places<'_>) -> Stack {
    let cpu = match of.who {
        Who::Vcpu(index) | Who::CpuStack(index) => Some(index),
        Who::Task { .. } | Who::Unowned => None,
    };
    let task = match (of.task, cpu) {
        (Some(index), _) => tasks.tasks.get(index),
        // A vCPU in the user's code is on no stack: what its CPU runs is whose code that is.
        (None, Some(cpu)) if of.frames.is_empty() && of.end.is_ok() => {
            tasks.tasks.iter().find(|task| task.cpu == Some(cpu))
        }
        (None, _) => None,
    };
    let frames = of.frames.iter().map(|frame| frame_of(frame, places));
    Stack {
        cpu,
        pid: task.map(|task| task.pid),
        name: task.map(|task| task.name()),
        reliable: of.end.is_ok(),
        ends: of.end.as_ref().ok().map(|end| match end {
            End::User => StackEnd::User,
            End::Entry => StackEnd::Entry,
            End::First => StackEnd::First,
        }),
        unreliable: of.end.as_ref().err().map(|doubt| doubt_of(doubt, places)),
        frames: frames.collect(),
    }
}

fn doubt_of(of: &Unreliable, places: &Places<'_>) -> Doubt {
    Doubt {
        reason: of.reason.to_string(),
        address: (of.ip != Gva(0)).then(|| of.ip.to_string()),
        place: places.at(of.ip).map(|place| text_of(&place)),
        stack_pointer: of.sp.to_string(),
    }
}

fn frame_of(of: &unwind::Frame, places: &Places<'_>) -> StackFrame {
    let kind = match of.via {
        Via::Runs => FrameKind::Runs,
        Via::Call => FrameKind::Call,
        Via::Interrupted => FrameKind::Interrupted,
        Via::Begins => FrameKind::Begins,
    };
    // A call may be the last instruction of its function, which it belongs to though it returns behind it.
    let back = u64::from(kind == FrameKind::Call);
    let place = places.at(Gva(of.ip.0.wrapping_sub(back))).map(|mut place| {
        place.offset += back;
        text_of(&place)
    });
    StackFrame {
        address: of.ip.to_string(),
        kind,
        slot: of.at.map(|at| at.to_string()),
        place,
    }
}

impl Shown for Stacks {
    fn table(&self) -> String {
        let mut text = String::new();
        for stack in &self.stacks {
            text.push_str(&clean(&heading(stack)));
            text.push('\n');
            for frame in &stack.frames {
                let kind = match frame.kind {
                    FrameKind::Runs => "  runs here",
                    FrameKind::Call => "",
                    FrameKind::Interrupted => "  interrupted here",
                    FrameKind::Begins => "  begins here",
                };
                let place = or_dash(frame.place.as_ref());
                text.push_str(&format!("  {}  {}{kind}\n", frame.address, clean(&place)));
            }
            text.push_str(&format!("  {}\n\n", clean(&verdict(stack))));
        }
        let (count, reliable) = (self.stacks.len(), self.reliable);
        text + &format!(
            "{count} stacks: {reliable} reliable, {} unreliable\n",
            self.unreliable
        )
    }
}

/// Whose stack it is.
fn heading(stack: &Stack) -> String {
    let task = match (stack.pid, &stack.name) {
        (Some(pid), Some(name)) => format!("task {pid} ({name})"),
        _ => "no known task".to_owned(),
    };
    match stack.cpu {
        Some(cpu) => format!("{task} on vCPU {cpu}"),
        None => task,
    }
}

fn verdict(stack: &Stack) -> String {
    match (&stack.unreliable, stack.ends) {
        (Some(doubt), _) => {
            let place = doubt.place.as_ref().or(doubt.address.as_ref());
            let place = place.map(|place| format!(" {place},"));
            format!(
                "unreliable: {}, at{} stack pointer {}",
                doubt.reason,
                place.unwrap_or_default(),
                doubt.stack_pointer
            )
        }
        (None, Some(StackEnd::User)) if stack.frames.is_empty() => {
            "reliable: it is in the user's code".to_owned()
        }
        (None, Some(StackEnd::User)) => "reliable, to the user's registers".to_owned(),
        (None, Some(StackEnd::Entry)) => "reliable, to the entry from the user's code".to_owned(),
        (None, Some(StackEnd::First) | None) => "reliable, to the task's first function".to_owned(),
    }
}
