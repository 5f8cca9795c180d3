//! From the machine's own types to the API's JSON types: the edge.

use std::time::Duration;

use axum::http::StatusCode;
use patcher::apply::hooks::{HookEvent, Stage};
use patcher::edition::hook::Moment;

use super::error::ApiError;
use super::machine::Counted;
use super::wire;
use crate::events::{Event, EventKind};
use crate::updates::{
    self, Cost, Edition, Failing, KernelInfo, Life, Model, Passing, Problem, Room, State, Update,
    Verified,
};
use crate::views::ViewError;
use crate::vm::{self, PauseStats, Pauses, Status};

/// Whole milliseconds.
pub(super) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Whole microseconds.
pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A count.
fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The machine.
pub(super) fn vm(status: Status) -> wire::Vm {
    let (state, end) = match status.state {
        vm::State::Running => (wire::VmState::Running, None),
        // What a patcher does for a moment is not a state that a client can act on.
        vm::State::Paused {
            by_user: false,
            unsound: false,
            ..
        } => (wire::VmState::Running, None),
        vm::State::Paused { .. } => (wire::VmState::Paused, None),
        vm::State::Ended(reason) => (wire::VmState::Ended, Some(reason.to_string())),
    };
    wire::Vm {
        state,
        end,
        vcpus: status.vcpus,
        memory_mib: status.memory_mib,
        uptime_ms: ms(status.uptime),
        kernel: status.kernel.display().to_string(),
        cmdline: status.cmdline,
        console: status.pty.map(|pty| pty.display().to_string()),
        panic: status.panic,
        pauses: pauses(status.pauses),
    }
}

fn pauses(pauses: Pauses) -> wire::Pauses {
    let last = pauses.last.into_iter().map(|pause| wire::Pause {
        at_ms: ms(pause.ended),
        pause_us: us(pause.length),
    });
    wire::Pauses {
        by_user: pauses.by_user,
        by_exopatch: pauses.by_patcher,
        total_us: us(pauses.total),
        last: last.collect(),
    }
}

/// What a pause cost.
pub(super) fn stop(stats: PauseStats) -> wire::Stop {
    wire::Stop {
        stop_us: us(stats.stop),
        devices_us: us(stats.devices),
        ioctls: stats.ioctls,
    }
}

/// One event.
pub(super) fn event(event: Event) -> wire::Event {
    let body = match event.kind {
        EventKind::Started => wire::EventBody::Started,
        EventKind::Paused { stop } => wire::EventBody::Paused { stop_us: us(stop) },
        EventKind::Resumed { paused } => wire::EventBody::Resumed {
            paused_us: us(paused),
        },
        EventKind::PowerButton => wire::EventBody::PowerButton,
        EventKind::Panic { line } => wire::EventBody::Panic { line },
        EventKind::LeftPaused => wire::EventBody::LeftPaused,
        EventKind::Ended(reason) => wire::EventBody::Ended {
            reason: reason.code().to_owned(),
            message: reason.to_string(),
        },
        EventKind::Update(changed) => wire::EventBody::Update {
            update: Box::new(update(*changed)),
        },
        EventKind::Other { code, message } => wire::EventBody::Other { code, message },
    };
    wire::Event {
        id: event.sequence,
        at_ms: ms(event.at),
        body,
    }
}

/// One update.
pub(super) fn update(update: Update) -> wire::Update {
    let state = match update.state {
        State::Queued => wire::UpdateState::Queued,
        State::Checking => wire::UpdateState::Checking,
        State::Checked => wire::UpdateState::Checked,
        State::Switching => wire::UpdateState::Switching,
        State::Applied => wire::UpdateState::Applied,
        State::Reverting => wire::UpdateState::Reverting,
        State::Reverted => wire::UpdateState::Reverted,
        State::Replaced => wire::UpdateState::Replaced,
        State::Refused => wire::UpdateState::Refused,
        State::Lost => wire::UpdateState::Lost,
        State::Broken => wire::UpdateState::Broken,
    };
    wire::Update {
        id: update.id,
        name: update.name,
        state,
        doing: update.doing,
        check: update.check,
        package_bytes: count(update.package_bytes),
        functions: update.functions,
        instead_of: update.instead_of,
        model: update.model.map(model),
        rule: update.how.rule.as_ref().map(ToString::to_string),
        counted: update.how.counted,
        editions: update.editions.into_iter().map(edition).collect(),
        hooks: update.hooks.into_iter().map(hook).collect(),
        bound: update.passing.map(bound),
        submitted_at_ms: ms(update.submitted),
        changed_at_ms: ms(update.changed),
        applied: update.applied.as_ref().map(report),
        reverted: update.reverted.as_ref().map(report),
        error: update.problem.map(|problem| error(problem).body),
    }
}

fn model(model: Model) -> wire::Model {
    match model {
        Model::Immediate => wire::Model::Immediate,
        Model::Quiescent => wire::Model::Quiescent,
        Model::PerTask => wire::Model::PerTask,
    }
}

/// The model that was asked for.
pub(super) fn asked_model(model: wire::Model) -> Model {
    match model {
        wire::Model::Immediate => Model::Immediate,
        wire::Model::Quiescent => Model::Quiescent,
        wire::Model::PerTask => Model::PerTask,
    }
}

fn hook(hook: HookEvent) -> wire::Hook {
    let (state, result, after, why) = match hook.stage {
        Stage::Began => (wire::HookState::Running, None, None, None),
        Stage::Ended { result, after } => (wire::HookState::Ended, Some(result), Some(after), None),
        Stage::Failed { why, after } => (wire::HookState::Failed, None, Some(after), Some(why)),
    };
    wire::Hook {
        name: hook.name,
        moment: match hook.moment {
            Moment::BeforeApply => wire::HookMoment::BeforeApply,
            Moment::AfterApply => wire::HookMoment::AfterApply,
            Moment::BeforeRevert => wire::HookMoment::BeforeRevert,
            Moment::AfterRevert => wire::HookMoment::AfterRevert,
        },
        state,
        result,
        after_ms: after.map(ms),
        why,
    }
}

fn bound(passing: Passing) -> Vec<wire::BoundTask> {
    let tasks = passing.tasks.into_iter();
    let bound = tasks.map(|task| wire::BoundTask {
        who: task.who,
        frames: task.frames,
        unreliable: task.unreliable,
    });
    bound.collect()
}

/// All sets.
pub(super) fn sets(sets: Vec<(String, Vec<u64>)>) -> wire::SetList {
    let set = |(name, mut keys): (String, Vec<u64>)| {
        keys.sort_unstable();
        wire::Set {
            name,
            len: count(keys.len()),
            keys: keys.iter().map(|key| format!("{key:#x}")).collect(),
        }
    };
    wire::SetList {
        sets: sets.into_iter().map(set).collect(),
    }
}

/// A set that was changed.
pub(super) fn changed_set(name: String, len: usize) -> wire::Set {
    wire::Set {
        name,
        len: count(len),
        keys: Vec::new(),
    }
}

/// All times that rules go by.
pub(super) fn times(times: Vec<(String, bool)>) -> wire::TimeList {
    let times = times.into_iter();
    wire::TimeList {
        times: times.map(|(name, on)| wire::Time { name, on }).collect(),
    }
}

/// What was counted.
pub(super) fn counted(counted: updates::Counted) -> Counted {
    let calls = counted.calls.into_iter().map(|calls| wire::Calls {
        function: calls.function,
        update: calls.update,
        calls: calls.calls,
    });
    Counted {
        calls: wire::CallList {
            at_ms: ms(counted.at),
            calls: calls.collect(),
        },
        arena: arena(counted.room),
    }
}

fn edition(edition: Edition) -> wire::Edition {
    let (state, why) = match edition.life {
        Life::Placed => (wire::EditionState::Placed, None),
        Life::Active => (wire::EditionState::Active, None),
        Life::Shadowed { by } => (wire::EditionState::Shadowed, Some(by.who().to_owned())),
        Life::Draining { by } => (wire::EditionState::Draining, by),
        Life::Kept { escape } => (wire::EditionState::Kept, Some(escape)),
    };
    wire::Edition {
        function: edition.function,
        at: edition.at.to_string(),
        state,
        why,
    }
}

fn report(cost: &Cost) -> wire::Report {
    let report = &cost.report;
    wire::Report {
        pauses: report.pauses,
        pause_us: report.pause_us,
        phases: wire::Phases {
            stop_us: report.phases.stop,
            prove_us: report.phases.prove,
            scan_us: report.phases.scan,
            verify_us: report.phases.verify,
            write_us: report.phases.write,
            resume_us: report.phases.resume,
        },
        bytes_read: report.bytes_read,
        bytes_written: report.bytes_written,
        stack_words: report.stack_words,
        tasks: report.tasks,
        total_us: us(cost.total),
    }
}

/// A failed operation.
pub(super) fn error(problem: Problem) -> ApiError {
    let status = match problem.failing {
        Failing::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        Failing::Conflict => StatusCode::CONFLICT,
        Failing::Deadline => StatusCode::GATEWAY_TIMEOUT,
        Failing::Busy => StatusCode::SERVICE_UNAVAILABLE,
        Failing::Unknown => StatusCode::NOT_FOUND,
        Failing::Failed | Failing::Broken => StatusCode::INTERNAL_SERVER_ERROR,
    };
    ApiError::new(
        status,
        problem.code,
        problem.message,
        problem.cause,
        problem.hint,
    )
}

/// What was asked for in words that make no sense.
pub(super) fn view_error(wrong: &ViewError) -> ApiError {
    ApiError::new(
        StatusCode::BAD_REQUEST,
        wrong.code(),
        "the request could not be read",
        wrong.to_string(),
        wrong.hint(),
    )
}

/// What a verification found.
pub(super) fn verification(id: u64, found: Verified) -> wire::Verification {
    let differences = found
        .differences
        .into_iter()
        .map(|(at, what)| wire::Difference {
            at: format!("{at:#x}"),
            what,
        });
    let differences: Vec<_> = differences.collect();
    wire::Verification {
        id,
        intact: differences.is_empty(),
        bytes: found.bytes,
        differences,
    }
}

/// The kernel, whose image is in `file`.
pub(super) fn kernel(file: String, info: KernelInfo) -> wire::Kernel {
    let (running, not_running) = match info.running {
        Ok(running) => (Some(running), None),
        Err(why) => (None, Some(why)),
    };
    let build_id = info.build_id.iter().map(|byte| format!("{byte:02x}"));
    wire::Kernel {
        file,
        build_id: build_id.collect(),
        symbols: count(info.symbols),
        running: running.map(|running| wire::RunningKernel {
            slide: format!("{:#x}", running.slide),
            booted: running.boot.is_none(),
            boot_phase: running.boot,
        }),
        not_running,
        arena: arena(info.arena),
    }
}

fn arena(room: Room) -> wire::Arena {
    wire::Arena {
        guest_physical: format!("{:#x}", room.start),
        bytes: room.bytes,
        used_bytes: room.used,
    }
}
