//! The JSON of the API, as types: what a client sends and gets. The OpenAPI document is generated from them.
//!
//! Times are unsigned: `_us` microseconds, `_ms` milliseconds; `at_ms` counts from the start of the VM, as `uptime_ms`
//! does. Addresses are hexadecimal strings, as JSON's numbers do not hold 64 bits. Fields are only ever added.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// What every failed call answers with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Names the kind of failure for programs; stable.
    #[schema(example = "package_for_other_kernel")]
    pub code: String,
    /// What failed.
    pub message: String,
    /// Why it failed.
    pub cause: String,
    /// What to do about it.
    pub hint: String,
}

/// The server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// Version of exopatch.
    pub version: String,
    /// Process id of the VMM.
    pub pid: u32,
}

/// Whether the guest executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The guest runs.
    Running,
    /// All vCPUs and devices are stopped.
    Paused,
    /// The guest has stopped for good; `end` says why.
    Ended,
}

/// The virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Whether the guest executes.
    pub state: VmState,
    /// Why the guest has ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Host time since the guest was started.
    pub uptime_ms: u64,
    /// The kernel's file on the host.
    pub kernel: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// The terminal on the host that the guest's console is on, if one was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
    /// What the guest's kernel said when it panicked, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic: Option<String>,
    /// How often it was stopped, and for how long.
    #[serde(default)]
    pub pauses: Pauses,
}

/// The pauses of a virtual machine since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pauses {
    /// How many a user asked for.
    pub by_user: u64,
    /// How many exopatch made, to change the kernel or to look at it.
    pub by_exopatch: u64,
    /// How long the guest stood still in those of exopatch, all together.
    pub total_us: u64,
    /// The newest of those, oldest first.
    pub last: Vec<Pause>,
}

/// One pause that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// When the guest ran again.
    pub at_ms: u64,
    /// How long it stood still.
    pub pause_us: u64,
}

/// Answer to a press of the power button.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PowerButton {
    /// Whether the guest has a driver that listens to the button by now.
    pub heard: bool,
}

/// Answer to a pause or a resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Transition {
    /// `false` when the VM was in that state already.
    pub changed: bool,
    /// How long the change took.
    pub took_us: u64,
    /// What stopping it was made of, if it was running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// The virtual machine afterwards.
    pub vm: Vm,
}

/// What stopping the guest was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stop {
    /// From the request to the last vCPU's registers.
    pub stop_us: u64,
    /// Of that: until no device was doing anything.
    pub devices_us: u64,
    /// System calls that each vCPU's thread spent on it.
    pub ioctls: Vec<u32>,
}

/// The option of calls that pause the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DeadlineQuery {
    /// Give up after this many milliseconds (1 to 600000); the guest is then as it was. 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    pub deadline_ms: Option<u64>,
}

/// Options of an apply.
#[derive(Clone, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ApplyQuery {
    /// A name for people; the package's file name is a good one.
    #[param(max_length = 128)]
    pub name: Option<String>,
    /// Do everything but write to the guest.
    #[serde(default)]
    pub check: bool,
    /// Give up after this many milliseconds (1 to 600000); the guest is then as it was. 5000 when left out. The time
    /// that the first operation needs to read the kernel's image does not count.
    #[param(minimum = 1, maximum = 600_000)]
    pub deadline_ms: Option<u64>,
    /// The updates whose place it takes, by number with commas between them, or `all` that are in effect: they go in the same moment.
    pub instead_of: Option<String>,
    /// Who may be where at the switch. Left out: `immediate` for an update of one function, `per-task` for one of several, which belong together.
    pub model: Option<Model>,
    /// Instead of a package: functions of the kernel, by name with commas between them, whose editions are their own clones. The body is then empty.
    pub clone: Option<String>,
    /// The calls that its editions are for, as a rule; all when left out.
    #[param(max_length = 4096)]
    pub rule: Option<String>,
    /// Count the calls that get to its editions, and those that get to the originals.
    #[serde(default)]
    pub count: bool,
    /// `false`: answer 202 at once, the operation goes on; follow it at its `Location` or in the events.
    pub wait: Option<bool>,
}

/// Who may be where when a group of functions is switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Model {
    /// Anywhere but in the few bytes that change: what runs goes on as it began, and the next call gets to the new side.
    Immediate,
    /// Nobody in the old side: it is tried until that is so, or the deadline.
    Quiescent,
    /// Whoever is in the old side goes on by it until he was seen outside.
    PerTask,
}

impl Model {
    /// Its name, as in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Immediate => "immediate",
            Self::Quiescent => "quiescent",
            Self::PerTask => "per-task",
        }
    }
}

/// How the editions of an update are to be used.
#[derive(Clone, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct UseQuery {
    /// The calls that they are for, as a rule; all when left out.
    #[param(max_length = 4096)]
    pub rule: Option<String>,
    /// Count the calls that get to them, and those that get to the originals.
    #[serde(default)]
    pub count: bool,
    /// Give up after this many milliseconds (1 to 600000); they are then used as before. 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    pub deadline_ms: Option<u64>,
    /// `false`: answer 202 at once, the operation goes on; follow it at its `Location` or in the events.
    pub wait: Option<bool>,
}

/// Options of a revert.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RevertQuery {
    /// Who may be where at the switch; as when the update came, when left out.
    pub model: Option<Model>,
    /// Give up after this many milliseconds (1 to 600000); the guest is then as it was. 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    pub deadline_ms: Option<u64>,
    /// `false`: answer 202 at once, the operation goes on; follow it at its `Location` or in the events.
    pub wait: Option<bool>,
}

/// Options of ending a switch.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ForceQuery {
    /// Give up after this many milliseconds (1 to 600000); the guest is then as it was. 5000 when left out.
    #[param(minimum = 1, maximum = 600_000)]
    pub deadline_ms: Option<u64>,
    /// `false`: answer 202 at once, the operation goes on; follow it at its `Location` or in the events.
    pub wait: Option<bool>,
}

/// Options of the event stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Go on after the event with this id: 0 gives all that are kept. `Last-Event-ID` goes before it.
    pub after: Option<u64>,
}

/// Where to write a dump of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DumpRequest {
    /// Absolute path of a new file on the VMM's host.
    #[schema(example = "/var/tmp/guest.core")]
    pub path: String,
    /// Give up pausing the guest after this many milliseconds (1 to 600000). 5000 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// A written dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Dump {
    /// The file.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// How long the guest was paused for it.
    pub pause_us: u64,
}

/// Where an update stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateState {
    /// Waits for the operation before it.
    Queued,
    /// Is being linked, planned and checked, up to the commit.
    Checking,
    /// All checks passed; nothing was written, as was asked.
    Checked,
    /// Its editions are in effect for all but some tasks, which have yet to leave what they replace.
    Switching,
    /// Its editions are in effect.
    Applied,
    /// Is being undone.
    Reverting,
    /// Was in effect, and has been undone.
    Reverted,
    /// Was in effect until another update took its place.
    Replaced,
    /// Was not applied; the guest is as it was.
    Refused,
    /// Was in effect in a kernel that no longer runs (reset or kexec).
    Lost,
    /// A write failed and so did its undo: the guest is kept paused.
    Broken,
}

impl UpdateState {
    /// All of them, in the order in which an update can come to them.
    pub const ALL: [Self; 11] = [
        Self::Queued,
        Self::Checking,
        Self::Checked,
        Self::Switching,
        Self::Applied,
        Self::Reverting,
        Self::Reverted,
        Self::Replaced,
        Self::Refused,
        Self::Lost,
        Self::Broken,
    ];

    /// Its name, as in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Checking => "checking",
            Self::Checked => "checked",
            Self::Switching => "switching",
            Self::Applied => "applied",
            Self::Reverting => "reverting",
            Self::Reverted => "reverted",
            Self::Replaced => "replaced",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Broken => "broken",
        }
    }

    /// Whether nothing more happens to the update by itself.
    #[must_use]
    pub fn is_settled(self) -> bool {
        !matches!(
            self,
            Self::Queued | Self::Checking | Self::Switching | Self::Reverting
        )
    }
}

/// One update: a set of editions that is applied and reverted as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Update {
    /// Number of the update in this VM, from 1.
    pub id: u64,
    /// Its name, as given on apply.
    pub name: String,
    /// Where it stands.
    pub state: UpdateState,
    /// What is being done or waited for right now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// Was asked to be checked only.
    pub check: bool,
    /// Length of the package; 0 for clones.
    pub package_bytes: u64,
    /// The kernel functions that it replaces, once the package was read.
    pub functions: Vec<String>,
    /// The updates whose place it takes.
    #[serde(default)]
    pub instead_of: Vec<u64>,
    /// Who may be where when it is switched, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Model>,
    /// The calls that its editions are for; all if there is no rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Calls are counted.
    #[serde(default)]
    pub counted: bool,
    /// Its editions, while they are in the guest.
    #[serde(default)]
    pub editions: Vec<Edition>,
    /// Its hooks that have been begun, and what became of each when it was last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<Hook>,
    /// The tasks that have yet to leave the old side of its switch, while that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<Vec<BoundTask>>,
    /// When it was handed in.
    pub submitted_at_ms: u64,
    /// When `state` last changed.
    pub changed_at_ms: u64,
    /// What applying (or checking) it cost the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<Report>,
    /// What reverting it cost the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverted: Option<Report>,
    /// Why the last operation on it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// A hook, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Hook {
    /// Its name.
    pub name: String,
    /// When it runs.
    pub moment: HookMoment,
    /// Where it stands.
    pub state: HookState,
    /// What it returned, once it has ended: zero, or a negative error number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<i32>,
    /// How long it took, or was waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
    /// Why it was not run, or not seen to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HookMoment {
    /// Before the switch to the update's editions: its result decides whether that is made.
    BeforeApply,
    /// Behind that switch.
    AfterApply,
    /// Before the switch away from them: its result decides whether that is made.
    BeforeRevert,
    /// Behind that switch.
    AfterRevert,
}

/// Where a hook stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HookState {
    /// The guest is led to begin it, or it runs.
    Running,
    /// It has returned.
    Ended,
    /// It was not run, or not seen to end yet.
    Failed,
}

/// Where an edition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EditionState {
    /// It is in the arena, beneath another one: nothing leads to it.
    Placed,
    /// Calls of its function get to it.
    Active,
    /// It is active, but something of the guest's own comes before it and may lead calls elsewhere.
    Shadowed,
    /// Nothing leads to it any more, but a thread may be in it or come back to it.
    Draining,
    /// Nothing leads to it, but it stays: an address of it may be known to the guest.
    Kept,
}

impl EditionState {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Placed,
        Self::Active,
        Self::Shadowed,
        Self::Draining,
        Self::Kept,
    ];

    /// Its name, as in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Active => "active",
            Self::Shadowed => "shadowed",
            Self::Draining => "draining",
            Self::Kept => "kept",
        }
    }
}

/// One edition of an update.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Edition {
    /// The kernel function.
    pub function: String,
    /// Guest-virtual address of the edition, hexadecimal.
    pub at: String,
    /// Where it stands.
    pub state: EditionState,
    /// Why it is still there, if nothing leads to it: who was in it when that was looked at last, or what may know its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A task that has yet to leave the old side of a switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BoundTask {
    /// Which task.
    pub who: String,
    /// Its stack when it was last looked at, from the innermost frame out.
    pub frames: Vec<String>,
    /// Why the stack cannot be followed further, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreliable: Option<String>,
}

/// The calls of a function that got to one of its editions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Calls {
    /// The function.
    pub function: String,
    /// The update whose edition it is; left out for the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<u64>,
    /// How many since they are counted.
    pub calls: u64,
}

/// A set that rules ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// How many keys are in it.
    pub len: u64,
    /// The keys, hexadecimal; left out by calls that only change some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
}

/// All sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetList {
    /// The sets, by name.
    pub sets: Vec<Set>,
}

/// What is to change in a set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetChange {
    /// Keys to put in: decimal, or `0x` and hexadecimal; none is zero.
    #[serde(default)]
    pub add: Vec<String>,
    /// Keys to take out, first.
    #[serde(default)]
    pub remove: Vec<String>,
    /// Keys that the set is to have room for, if this makes it; 400 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u64>,
}

/// A time that rules go by: `during NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Time {
    /// Its name.
    pub name: String,
    /// Whether it has begun and not ended.
    pub on: bool,
}

/// All such times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TimeList {
    /// The times, by name.
    pub times: Vec<Time>,
}

/// Whether a time is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TimeChange {
    /// Begin it, or else end it.
    pub on: bool,
}

/// All calls that are counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CallList {
    /// When they were read: milliseconds since the start of the VM.
    pub at_ms: u64,
    /// The calls, by function.
    pub calls: Vec<Calls>,
}

/// What one operation cost the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Number of pauses that were needed: those before the last found the guest not quiescent.
    pub pauses: u64,
    /// The guest's stand-still in the last pause.
    pub pause_us: u64,
    /// The parts of `pause_us`.
    pub phases: Phases,
    /// Bytes of guest memory read in the last pause.
    pub bytes_read: u64,
    /// Bytes of guest memory written in the last pause.
    pub bytes_written: u64,
    /// Stack words compared with the displaced code.
    pub stack_words: u64,
    /// Tasks whose stacks were read.
    pub tasks: u64,
    /// From hand-in to the end, waiting included.
    pub total_us: u64,
}

/// The phases of a pause, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Phases {
    /// Stopping all vCPUs.
    pub stop_us: u64,
    /// Proving that this is still the same kernel.
    pub prove_us: u64,
    /// Scanning the stacks.
    pub scan_us: u64,
    /// Comparing the bytes that get replaced.
    pub verify_us: u64,
    /// Writing.
    pub write_us: u64,
    /// Letting the vCPUs go.
    pub resume_us: u64,
}

/// All updates of this VM, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpdateList {
    /// The updates.
    pub updates: Vec<Update>,
}

/// Whether the guest still holds what an update wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// The update.
    pub id: u64,
    /// Every byte is as written.
    pub intact: bool,
    /// Bytes compared.
    pub bytes: u64,
    /// The places that differ.
    pub differences: Vec<Difference>,
}

/// A place where the guest's memory is not what an update wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// Guest-virtual address, hexadecimal.
    pub at: String,
    /// What is there.
    pub what: String,
}

/// The guest's kernel, as the patcher knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kernel {
    /// The kernel's file on the host.
    pub file: String,
    /// Build id of the image, hexadecimal.
    pub build_id: String,
    /// Number of symbols in the image.
    pub symbols: u64,
    /// The running kernel, if the guest runs that image and has got far enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<RunningKernel>,
    /// Why no running kernel was found, if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_running: Option<String>,
    /// The memory for editions.
    pub arena: Arena,
}

/// The kernel found in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunningKernel {
    /// Distance between linked and running addresses, hexadecimal.
    pub slide: String,
    /// Its boot is over, so that it can be updated.
    pub booted: bool,
    /// What it still waits for, while its boot is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_phase: Option<String>,
}

/// The memory that the VMM adds to the guest for editions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Arena {
    /// Guest-physical address of its first byte, hexadecimal.
    pub guest_physical: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes of code and data placed so far.
    pub used_bytes: u64,
}

/// Something that happened, as it is sent in the event stream: the SSE `id` is `id`, the SSE `event` is `kind`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Number of the event, from 1, rising by one.
    pub id: u64,
    /// When it happened.
    pub at_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub body: EventBody,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum EventBody {
    /// The guest runs from now on.
    Started,
    /// A user's pause stopped the guest.
    Paused {
        /// From the request until every vCPU and device stood still.
        stop_us: u64,
    },
    /// A user's pause ended.
    Resumed {
        /// How long the guest stood still.
        paused_us: u64,
    },
    /// The power button was pressed.
    PowerButton,
    /// The guest's kernel said that it panicked.
    Panic {
        /// The line with which it said so.
        line: String,
    },
    /// The guest was left paused, as its memory is not known to be sound.
    LeftPaused,
    /// The guest has ended: the last event.
    Ended {
        /// Names the reason for programs.
        reason: String,
        /// Tells the reason to people.
        message: String,
    },
    /// An update changed state, or got on.
    Update {
        /// The update as it is now.
        update: Box<Update>,
    },
    /// Events were dropped before this reader got to them: look at the resources again.
    Missed {
        /// How many.
        count: u64,
    },
    /// Something else.
    Other {
        /// Names it for programs.
        code: String,
        /// Tells it to people.
        message: String,
    },
}

impl EventBody {
    /// The name of the kind, as in the JSON.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Paused { .. } => "paused",
            Self::Resumed { .. } => "resumed",
            Self::PowerButton => "power-button",
            Self::Panic { .. } => "panic",
            Self::LeftPaused => "left-paused",
            Self::Ended { .. } => "ended",
            Self::Update { .. } => "update",
            Self::Missed { .. } => "missed",
            Self::Other { .. } => "other",
        }
    }
}
