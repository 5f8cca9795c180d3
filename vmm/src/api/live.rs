//! The API's machine for real: the virtual machine and its update session, in the API's terms.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use patcher::apply::tune::SetChange;
use patcher::guest::{Guest, GuestError, PausedGuest, dump};

use super::convert;
use super::error::ApiError;
use super::machine::{Counted, Done, Machine};
use super::wire;
use crate::events::Events;
use crate::guest::KvmGuest;
use crate::sparse::SparseFile;
use crate::updates::{self, Model, Order, Session, Use};
use crate::views::{Asked, Seen, View};
use crate::vm::{PauseError, ResumeError, State, Vm};

/// Who killed the guest, as its end tells it.
const BY: &str = "the API";

/// A virtual machine and its update session.
#[derive(Clone, Debug)]
pub struct Live {
    vm: Vm,
    session: Session,
}

impl Live {
    /// The machine `vm` with the update session on it.
    #[must_use]
    pub fn new(vm: Vm, session: Session) -> Self {
        Self { vm, session }
    }

    fn alive(&self) -> Result<(), ApiError> {
        match self.vm.ended() {
            Some(_) => Err(ended()),
            None => Ok(()),
        }
    }
}

impl Machine for Live {
    fn events(&self) -> &Events {
        self.vm.events()
    }

    fn vm(&self) -> wire::Vm {
        convert::vm(self.vm.status())
    }

    fn pause(&self, deadline: Duration) -> Result<Option<wire::Stop>, ApiError> {
        let paused = matches!(self.vm.status().state, State::Paused { by_user: true, .. });
        let stats = self
            .vm
            .pause(Instant::now() + deadline)
            .map_err(|cause| not_paused(&cause))?;
        Ok((!paused).then(|| convert::stop(stats)))
    }

    fn resume(&self) -> Result<bool, ApiError> {
        match self.vm.resume() {
            Ok(()) => Ok(true),
            Err(ResumeError::NotPaused) => self.alive().map(|()| false),
            Err(ResumeError::Ended) => Err(ended()),
            Err(cause @ ResumeError::Unsound) => Err(ApiError::new(
                StatusCode::CONFLICT,
                updates::BROKEN,
                "the guest was not resumed",
                cause.to_string(),
                "exopatch vm dump writes what it was; exopatch vm kill ends it",
            )),
        }
    }

    fn power_button(&self) -> Result<bool, ApiError> {
        self.alive()?;
        Ok(self.vm.power_button())
    }

    fn kill(&self) -> Result<(), ApiError> {
        self.alive()?;
        self.vm.kill(BY);
        Ok(())
    }

    fn dump(&self, path: &Path, deadline: Duration) -> Result<wire::Dump, ApiError> {
        let mut guest = self.vm.guest().map_err(ApiError::busy)?;
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|cause| not_written(path, &cause))?;
        let written = write_dump(&mut guest, file, Instant::now() + deadline);
        if written.is_err()
            && let Err(cause) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %cause, "a part of a dump stays behind");
        }
        let (bytes, pause) = written.map_err(|failed| match failed {
            DumpFailed::Pause(error) => guest_failed(&error),
            DumpFailed::File(cause) => not_written(path, &cause),
        })?;
        Ok(wire::Dump {
            path: path.display().to_string(),
            bytes,
            pause_us: convert::us(pause),
        })
    }

    fn kernel(&self, deadline: Instant, done: Done<wire::Kernel>) -> Result<(), ApiError> {
        let file = self.vm.config().kernel.display().to_string();
        self.session
            .kernel(
                deadline,
                translated(done, |info| convert::kernel(file, info)),
            )
            .map_err(convert::error)
    }

    fn view(
        &self,
        asked: Asked,
        deadline: Instant,
        done: Done<Seen<View>>,
    ) -> Result<(), ApiError> {
        self.session
            .view(asked, deadline, translated(done, |seen| seen))
            .map_err(convert::error)
    }

    fn updates(&self) -> Vec<wire::Update> {
        let updates = self.session.updates();
        updates.into_iter().map(convert::update).collect()
    }

    fn apply(&self, order: Order, done: Done<wire::Update>) -> Result<wire::Update, ApiError> {
        self.session
            .apply(order, translated(done, convert::update))
            .map(convert::update)
            .map_err(convert::error)
    }

    fn revert(
        &self,
        id: u64,
        model: Option<Model>,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError> {
        self.session
            .revert(id, model, deadline, translated(done, convert::update))
            .map(convert::update)
            .map_err(convert::error)
    }

    fn reuse(
        &self,
        id: u64,
        how: Use,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError> {
        self.session
            .reuse(id, how, deadline, translated(done, convert::update))
            .map(convert::update)
            .map_err(convert::error)
    }

    fn force(
        &self,
        id: u64,
        deadline: Instant,
        done: Done<wire::Update>,
    ) -> Result<wire::Update, ApiError> {
        self.session
            .force(id, deadline, translated(done, convert::update))
            .map(convert::update)
            .map_err(convert::error)
    }

    fn change_set(
        &self,
        name: String,
        change: SetChange,
        done: Done<wire::Set>,
    ) -> Result<(), ApiError> {
        let of = name.clone();
        let done = translated(done, move |len| convert::changed_set(of, len));
        let asked = self.session.change_set(name, change, done);
        asked.map_err(convert::error)
    }

    fn drop_set(&self, name: String, done: Done<wire::SetList>) -> Result<(), ApiError> {
        let done = translated(done, |()| wire::SetList::default());
        self.session.drop_set(name, done).map_err(convert::error)
    }

    fn sets(&self, done: Done<wire::SetList>) -> Result<(), ApiError> {
        let done = translated(done, convert::sets);
        self.session.sets(done).map_err(convert::error)
    }

    fn set_time(&self, name: String, on: bool, done: Done<wire::Time>) -> Result<(), ApiError> {
        let of = name.clone();
        let done = translated(done, move |()| wire::Time { name: of, on });
        self.session
            .set_time(name, on, done)
            .map_err(convert::error)
    }

    fn drop_time(&self, name: String, done: Done<wire::TimeList>) -> Result<(), ApiError> {
        let done = translated(done, |()| wire::TimeList::default());
        self.session.drop_time(name, done).map_err(convert::error)
    }

    fn times(&self, done: Done<wire::TimeList>) -> Result<(), ApiError> {
        let done = translated(done, convert::times);
        self.session.times(done).map_err(convert::error)
    }

    fn counted(&self, done: Done<Counted>) -> Result<(), ApiError> {
        let done = translated(done, convert::counted);
        self.session.counted(done).map_err(convert::error)
    }

    fn verify(
        &self,
        id: u64,
        deadline: Instant,
        done: Done<wire::Verification>,
    ) -> Result<(), ApiError> {
        let done = translated(done, move |found| convert::verification(id, found));
        self.session
            .verify(id, deadline, done)
            .map_err(convert::error)
    }
}

/// The session's end of an operation, as the API's.
fn translated<T: 'static, W: 'static>(
    done: Done<W>,
    convert: impl FnOnce(T) -> W + Send + 'static,
) -> updates::Done<T> {
    Box::new(move |end| done(end.map(convert).map_err(convert::error)))
}

fn ended() -> ApiError {
    ApiError::new(
        StatusCode::CONFLICT,
        "guest_ended",
        "the call needs a guest that has not ended",
        "the guest has ended",
        "start another with exopatch run",
    )
}

fn not_paused(cause: &PauseError) -> ApiError {
    match cause {
        PauseError::Ended => ended(),
        PauseError::Vcpu { .. } | PauseError::Device => ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "pause_deadline_passed",
            "the guest was not paused",
            cause.to_string(),
            "try again with a later --deadline; if that never helps, the host is overloaded",
        ),
    }
}

fn guest_failed(cause: &GuestError) -> ApiError {
    match cause {
        GuestError::Ended => ended(),
        GuestError::Deadline { vcpu } => not_paused(&PauseError::Vcpu { vcpu: *vcpu }),
        GuestError::NoMemory { .. } | GuestError::Machine { .. } => ApiError::internal(cause),
    }
}

fn not_written(path: &Path, cause: &io::Error) -> ApiError {
    let (status, code) = match cause.kind() {
        io::ErrorKind::AlreadyExists => (StatusCode::CONFLICT, "file_exists"),
        _ => (StatusCode::UNPROCESSABLE_ENTITY, "cannot_write_file"),
    };
    ApiError::new(
        status,
        code,
        format!("{} was not written", path.display()),
        cause.to_string(),
        "give the path of a new file in a directory that the VMM's user can write to, with room for the guest's memory",
    )
}

enum DumpFailed {
    Pause(GuestError),
    File(io::Error),
}

/// Writes the guest to `file` under one pause; its length, and how long the pause was.
fn write_dump(
    guest: &mut KvmGuest,
    file: File,
    deadline: Instant,
) -> Result<(u64, Duration), DumpFailed> {
    let (memory, arena) = (guest.memory(), guest.arena());
    let began = Instant::now();
    let paused = guest.pause(deadline).map_err(DumpFailed::Pause)?;
    let mut out = SparseFile::new(file);
    dump::write(&mut out, &paused, &memory, &arena).map_err(DumpFailed::File)?;
    let bytes = out.finish().map_err(DumpFailed::File)?;
    paused.resume().map_err(DumpFailed::Pause)?;
    Ok((bytes, began.elapsed()))
}
