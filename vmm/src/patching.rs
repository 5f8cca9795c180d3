//! Carries out updates: the kernel's image and where the guest runs it, found when they are first needed and again
//! when the guest has gone to another kernel.
//!
//! Nothing is kept locked between operations, so that a dump or another tool can have the guest in between.

mod come;
mod look;
mod problem;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::apply::hooks::HookEvent;
use patcher::apply::tune::SetChange;
use patcher::apply::{
    self, ApplyError, ApplyOptions, Arena, Calls, Edition, Model, Report, Request,
};
use patcher::edition::clone;
use patcher::edition::list::Use;
use patcher::edition::object::Package;
use patcher::guest::{Guest, GuestError, PausedGuest, Registers};
use patcher::kernel::boot::BootState;
use patcher::kernel::image::Image;
use patcher::kernel::locate::{Kernel, LocateError};
use patcher::kernel::quiescence::Inside;
use patcher::kernel::unwind::Frame;
use patcher::observe;

use crate::guest::KvmGuest;
use crate::kernel_index;
use crate::updates::{
    Brings, KernelInfo, Passing, Patcher, Problem, Room, Running, Straggler, Task, Undo, Verified,
};
use crate::views::{self, Asked, Seen, View};
use crate::vm::{State, Vm};

/// Pauses in which the kernel must be found to be another before that is believed.
const LOOKS: u32 = 3;
/// First wait between two looks at a guest that still boots; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(5);
/// Longest such wait.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Updates the kernel of one virtual machine.
#[derive(Debug)]
pub struct KernelPatcher {
    vm: Vm,
    /// The image that the VM booted, once it was needed.
    image: Option<Arc<Image>>,
    /// The kernel that the guest ran when it was last looked at.
    found: Option<Found>,
    /// The kernel that was last looked at while none was found to be updated.
    seen: Option<Kernel>,
    generation: u64,
}

/// A kernel that has finished booting, and our arena in it.
#[derive(Debug)]
struct Found {
    kernel: Kernel,
    arena: Arena,
}

/// What a look at the guest found.
enum Look {
    /// The image's kernel, up and running.
    Booted(Kernel),
    /// The image's kernel, not (or no longer) ready for updates; or not yet there.
    NotReady(NotReady),
}

/// Why the guest cannot be updated now.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("its kernel has not been found in memory yet: {0}")]
    NotFound(LocateError),
    #[error("its kernel is {state}")]
    Booting { slide: u64, state: String },
}

impl KernelPatcher {
    /// A patcher for `vm`. Nothing is read before it is needed.
    #[must_use]
    pub fn new(vm: Vm) -> Self {
        Self {
            vm,
            image: None,
            found: None,
            seen: None,
            generation: 0,
        }
    }

    fn guest(&self) -> Result<KvmGuest, Problem> {
        if matches!(self.vm.status().state, State::Ended(_)) {
            return Err(problem::guest(&GuestError::Ended));
        }
        self.vm.guest().map_err(|busy| problem::busy(&busy))
    }

    /// The image that the VM booted.
    fn image(&mut self, doing: &dyn Fn(String)) -> Result<Arc<Image>, Problem> {
        if let Some(image) = &self.image {
            return Ok(Arc::clone(image));
        }
        doing("reading the kernel's image".to_owned());
        let path = &self.vm.config().kernel;
        let image = kernel_index::load(path).map_err(|error| problem::index(&error))?;
        Ok(Arc::clone(self.image.insert(Arc::new(image))))
    }

    /// Makes sure that `self.found` is a kernel that has booted, waiting for that until the deadline.
    fn find(
        &mut self,
        guest: &mut KvmGuest,
        image: &Arc<Image>,
        deadline: Instant,
        doing: &dyn Fn(String),
    ) -> Result<(), Problem> {
        if self.found.is_some() {
            return Ok(());
        }
        let mut wait = FIRST_WAIT;
        let kernel = loop {
            let why = match look(guest, image, deadline)? {
                Look::Booted(kernel) => break kernel,
                Look::NotReady(why) => why,
            };
            if deadline.saturating_duration_since(Instant::now()) <= wait {
                return Err(problem::not_ready(&why));
            }
            doing(format!("waiting for the guest to finish booting: {why}"));
            // The guest runs meanwhile: only it can get on.
            std::thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        };
        let arena = Arena::new(guest, &kernel).map_err(|error| problem::arena(&error))?;
        self.found = Some(Found { kernel, arena });
        Ok(())
    }

    /// The guest, and the arena of its kernel once that has booted.
    fn arena(&mut self) -> Result<(KvmGuest, &mut Arena), Problem> {
        let image = self.image(&|_| {})?;
        let mut guest = self.guest()?;
        let deadline = Instant::now() + LONGEST_WAIT;
        self.find(&mut guest, &image, deadline, &|_| {})?;
        let found = self.found.as_mut().ok_or_else(problem::gone)?;
        Ok((guest, &mut found.arena))
    }

    /// Forgets the kernel that was found if the guest no longer runs it; whether that is so.
    ///
    /// One look can mislead, for instance at a vCPU that is between two states: several must agree.
    fn is_gone(&mut self, guest: &mut KvmGuest, deadline: Instant) -> bool {
        let Some(found) = &self.found else {
            return false;
        };
        for look in 0..LOOKS {
            let Ok(paused) = guest.pause(deadline) else {
                return false;
            };
            let proof = found.kernel.prove_same(&paused, paused.vcpus());
            if let Err(error) = paused.resume() {
                tracing::debug!(%error, "the guest ended while its kernel was looked at");
                return false;
            }
            let Err(error) = proof else {
                return false;
            };
            tracing::warn!(%error, look, "the guest's kernel is not the one that was found");
            std::thread::sleep(LONGEST_WAIT);
        }
        self.found = None;
        self.generation += 1;
        true
    }

    /// What it means that something was not done to the kernel that was found, now that it can be known whether that is gone.
    fn not_done(
        &mut self,
        guest: &mut KvmGuest,
        deadline: Instant,
        failed: &ApplyError,
        problem: impl FnOnce(&ApplyError) -> Problem,
    ) -> Problem {
        if !failed.is_broken() && self.is_gone(guest, deadline) {
            return problem::gone();
        }
        self.explain(problem(failed))
    }

    /// What a failure means, now that it can be known whether the guest has ended.
    fn explain(&self, problem: Problem) -> Problem {
        match self.vm.status().state {
            State::Ended(_) => problem::guest(&GuestError::Ended),
            _ => problem,
        }
    }
}

fn options<'a>(task: &Undo<'a>) -> ApplyOptions<'a> {
    ApplyOptions {
        deadline: task.deadline,
        check_only: false,
        doing: task.doing,
        written: task.written,
        hook: task.hook,
    }
}

/// Looks for the kernel of `image` under a short pause.
fn look(guest: &mut KvmGuest, image: &Arc<Image>, deadline: Instant) -> Result<Look, Problem> {
    let paused = guest
        .pause(deadline)
        .map_err(|error| problem::guest(&error))?;
    let located = Kernel::locate(Arc::clone(image), &paused, paused.vcpus());
    let looked = located.map(|kernel| (kernel.boot_state(&paused), kernel));
    paused.resume().map_err(|error| problem::guest(&error))?;
    match looked {
        Ok((Ok(BootState::Running), kernel)) => Ok(Look::Booted(kernel)),
        Ok((Ok(BootState::NotFinished { state }), kernel)) => {
            let slide = kernel.slide();
            Ok(Look::NotReady(NotReady::Booting { slide, state }))
        }
        Ok((Ok(BootState::Ending { state }), _)) => Err(problem::ending(&state)),
        Ok((Err(error), _)) => Err(problem::unreadable(&error)),
        Err(
            error @ (LocateError::NoVcpu | LocateError::Paging { .. } | LocateError::Slide { .. }),
        ) => Ok(Look::NotReady(NotReady::NotFound(error))),
        Err(error) => Err(problem::locate(&error)),
    }
}

/// The package of the clones of functions of the kernel that the guest runs.
fn clones(
    guest: &KvmGuest,
    kernel: &Kernel,
    arena: &Arena,
    names: &[String],
) -> Result<Package, Problem> {
    let redirected = |at| arena.holds.functions.redirected(at);
    clone::package(kernel, guest, names, redirected).map_err(|error| problem::clones(&error))
}

impl Patcher for KernelPatcher {
    fn apply(&mut self, task: &Task<'_>) -> Result<Report, Problem> {
        let package = match task.brings {
            Brings::Package(bytes) => {
                let package = Package::parse(bytes).map_err(|error| problem::package(&error))?;
                let editions = package.editions().iter();
                (task.functions)(editions.map(|edition| edition.function.clone()).collect());
                Some(package)
            }
            Brings::Clones(names) => {
                (task.functions)(names.clone());
                None
            }
        };
        let reading = Instant::now();
        let image = self.image(task.doing)?;
        // Reading it is done once, and by us: the time that was given is for the guest.
        let deadline = task.deadline + reading.elapsed();
        // Known without the guest: then it need not be waited for.
        if let Some(package) = &package
            && package.build_id() != image.build_id()
        {
            return Err(problem::other_build(package.build_id(), image.build_id()));
        }
        // Functions that come together belong together, unless somebody says that they do not.
        let usual = |package: &Package| match package.editions() {
            [_] => Model::Immediate,
            _ => Model::PerTask,
        };
        let mut guest = self.guest()?;
        let options = ApplyOptions {
            deadline,
            check_only: task.check,
            doing: task.doing,
            written: task.written,
            hook: task.hook,
        };
        loop {
            self.find(&mut guest, &image, deadline, task.doing)?;
            let Some(Found { kernel, arena }) = &mut self.found else {
                continue;
            };
            let package = match (&package, task.brings) {
                (Some(package), _) => Cow::Borrowed(package),
                (None, brings) => {
                    (task.doing)("cloning".to_owned());
                    Cow::Owned(clones(&guest, kernel, arena, brings.clones())?)
                }
            };
            (task.doing)("linking and planning".to_owned());
            let request = Request {
                id: task.update,
                package: &package,
                instead_of: task.instead_of,
                model: task.model.unwrap_or(usual(&package)),
                how: task.how.clone(),
            };
            let error = match apply::apply(&mut guest, kernel, arena, &request, &options) {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            if error.is_broken() || !self.is_gone(&mut guest, deadline) {
                return Err(self.explain(problem::apply(&error)));
            }
        }
    }

    fn revert(&mut self, updates: &[u64], task: &Undo<'_>) -> Result<Report, Problem> {
        let mut guest = self.guest()?;
        let Some(Found { kernel, arena }) = &mut self.found else {
            return Err(problem::gone());
        };
        let options = options(task);
        let placed = updates
            .first()
            .and_then(|update| arena.holds.placed.get(update));
        let came = placed.map_or_else(Model::default, |placed| placed.model);
        let model = task.model.unwrap_or(came);
        match apply::revert(&mut guest, kernel, arena, updates, model, &options) {
            Ok(report) => Ok(report),
            Err(failed) => Err(self.not_done(&mut guest, task.deadline, &failed, problem::revert)),
        }
    }

    fn reuse(&mut self, update: u64, how: &Use, task: &Undo<'_>) -> Result<Report, Problem> {
        let mut guest = self.guest()?;
        let Some(Found { kernel, arena }) = &mut self.found else {
            return Err(problem::gone());
        };
        let options = options(task);
        match apply::reuse(&mut guest, kernel, arena, update, how.clone(), &options) {
            Ok(report) => Ok(report),
            Err(failed) => Err(self.not_done(&mut guest, task.deadline, &failed, problem::reuse)),
        }
    }

    fn force(&mut self, update: u64, task: &Undo<'_>) -> Result<(), Problem> {
        let mut guest = self.guest()?;
        let Some(Found { kernel, arena }) = &mut self.found else {
            return Err(problem::gone());
        };
        match apply::force(&mut guest, kernel, arena, update, &options(task)) {
            Ok(()) => Ok(()),
            Err(failed) => Err(self.not_done(&mut guest, task.deadline, &failed, problem::force)),
        }
    }

    fn change_set(&mut self, name: &str, change: &SetChange) -> Result<usize, Problem> {
        let (mut guest, arena) = self.arena()?;
        let changed = apply::tune::change_set(&mut guest, arena, name, change);
        changed.map_err(|error| problem::sets(&error))
    }

    fn drop_set(&mut self, name: &str) -> Result<(), Problem> {
        let Some(Found { arena, .. }) = &mut self.found else {
            return Err(problem::gone());
        };
        apply::tune::drop_set(arena, name).map_err(|error| problem::sets(&error))
    }

    fn sets(&self) -> Vec<(String, Vec<u64>)> {
        let holds = self.found.iter().map(|found| &found.arena.holds);
        let sets = holds.flat_map(|holds| &holds.sets);
        sets.map(|(name, set)| (name.clone(), set.keys().collect()))
            .collect()
    }

    fn set_time(&mut self, name: &str, on: bool) -> Result<(), Problem> {
        let (mut guest, arena) = self.arena()?;
        let set = apply::times::set_time(&mut guest, arena, name, on);
        set.map_err(|error| problem::times(&error))
    }

    fn drop_time(&mut self, name: &str) -> Result<(), Problem> {
        let Some(Found { arena, .. }) = &mut self.found else {
            return Err(problem::gone());
        };
        apply::times::drop_time(arena, name).map_err(|error| problem::times(&error))
    }

    fn times(&self) -> Vec<(String, bool)> {
        let found = self.found.iter();
        let times = found.flat_map(|found| found.arena.holds.times());
        times.map(|(name, on)| (name.clone(), *on)).collect()
    }

    fn is_watching(&self) -> bool {
        let found = self.found.as_ref();
        found.is_some_and(|found| apply::shadows::is_watching(&found.arena))
    }

    fn watch(&mut self) -> Result<bool, Problem> {
        let guest = self.guest()?;
        let Some(Found { kernel, arena }) = &mut self.found else {
            return Ok(false);
        };
        let changed = apply::shadows::watch(&guest, kernel, arena);
        changed.map_err(|error| problem::unreadable(&error))
    }

    fn has_clocks(&self) -> bool {
        let found = self.found.as_ref();
        found.is_some_and(|found| found.arena.holds.has_clocks())
    }

    fn tick(&mut self) -> Result<(), Problem> {
        let mut guest = self.guest()?;
        let Some(Found { arena, .. }) = &mut self.found else {
            return Ok(());
        };
        let ticked = apply::tune::tick(&mut guest, arena, Instant::now());
        ticked.map_err(|error| problem::sets(&error))
    }

    fn passing(&self, update: u64) -> Option<Passing> {
        let Found { kernel, arena } = self.found.as_ref()?;
        let mut passing = arena.holds.passing.iter();
        let passing = passing.find(|passing| passing.update == update)?;
        let name = |frame: &Frame| match arena.holds.name(frame.ip) {
            Some(ours) => ours,
            None => frame.describe(kernel),
        };
        let straggler = |inside: &Inside| Straggler {
            who: inside.who.to_string(),
            frames: inside.frames.iter().map(name).collect(),
            unreliable: inside.unreliable.as_ref().map(ToString::to_string),
        };
        Some(Passing {
            tasks: passing.inside.iter().map(straggler).collect(),
        })
    }

    fn calls(&mut self) -> Result<Vec<Calls>, Problem> {
        let guest = self.guest()?;
        let Some(Found { kernel, arena }) = &self.found else {
            return Ok(Vec::new());
        };
        let calls = apply::calls(&guest, kernel, &arena.holds);
        calls.map_err(|error| problem::unreadable(&error))
    }

    fn editions(&self, update: u64) -> Vec<Edition> {
        let found = self.found.as_ref();
        found.map_or_else(Vec::new, |found| found.arena.holds.editions(update))
    }

    fn is_settling(&self) -> bool {
        let found = self.found.as_ref();
        found.is_some_and(|found| found.arena.holds.is_settling())
    }

    fn settle(&mut self, deadline: Instant, hook: &dyn Fn(&HookEvent)) -> Result<(), Problem> {
        // A guest that its user has paused does not go on.
        if !matches!(self.vm.status().state, State::Running) {
            return Ok(());
        }
        let mut guest = self.guest()?;
        let Some(Found { kernel, arena }) = &mut self.found else {
            return Ok(());
        };
        let options = ApplyOptions {
            deadline,
            check_only: false,
            doing: &|_| {},
            written: &|| {},
            hook,
        };
        match apply::settle(&mut guest, kernel, arena, &options) {
            Ok(()) => Ok(()),
            Err(failed) => Err(self.not_done(&mut guest, deadline, &failed, problem::settle)),
        }
    }

    fn room(&self) -> Room {
        let arena = self.vm.0.memory.arena();
        let found = self.found.as_ref();
        Room {
            start: arena.start.0,
            bytes: arena.end.0.saturating_sub(arena.start.0),
            used: found.map_or(0, |found| found.arena.holds.space.used()),
        }
    }

    fn is_sound(&self) -> bool {
        !matches!(self.vm.status().state, State::Paused { unsound: true, .. })
    }

    fn verify(&mut self, update: u64, deadline: Instant) -> Result<Verified, Problem> {
        let mut guest = self.guest()?;
        if self.is_gone(&mut guest, deadline) {
            return Err(problem::gone());
        }
        let Some(Found { kernel, arena }) = &self.found else {
            return Err(problem::gone());
        };
        let observed = observe::verify(&guest, kernel, &arena.holds, update);
        let differences = observed.differences.into_iter();
        Ok(Verified {
            bytes: observed.bytes,
            differences: differences.map(|(at, what)| (at.0, what)).collect(),
        })
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn kernel(&mut self, deadline: Instant) -> Result<KernelInfo, Problem> {
        let reading = Instant::now();
        let image = self.image(&|_| {})?;
        let deadline = deadline + reading.elapsed();
        let mut guest = self.guest()?;
        self.is_gone(&mut guest, deadline);
        let running = match &self.found {
            Some(found) => Ok(Running {
                slide: found.kernel.slide(),
                boot: None,
            }),
            None => match look(&mut guest, &image, deadline) {
                Ok(Look::Booted(kernel)) => Ok(Running {
                    slide: kernel.slide(),
                    boot: None,
                }),
                Ok(Look::NotReady(NotReady::Booting { slide, state })) => Ok(Running {
                    slide,
                    boot: Some(state),
                }),
                Ok(Look::NotReady(why)) => Err(why.to_string()),
                Err(problem) => Err(problem.cause),
            },
        };
        Ok(KernelInfo {
            build_id: image.build_id().to_vec(),
            symbols: image.symbols().iter().count(),
            running,
            arena: self.room(),
        })
    }

    fn view(&mut self, asked: &Asked, deadline: Instant) -> Result<Seen<View>, Problem> {
        let reading = Instant::now();
        let image = self.image(&|_| {})?;
        let deadline = deadline + reading.elapsed();
        if let Some(view) = views::of_image(asked, &image) {
            let seen = |view| Seen {
                paused_us: Some(0),
                view,
            };
            return view.map(seen).map_err(|error| problem::view(&error));
        }
        let mut guest = self.guest()?;
        let found = self.found.as_ref();
        let updated =
            found.map(|Found { kernel, arena }| (kernel, look::updates(kernel, &arena.holds)));
        let mut known = look::Known {
            image: &image,
            updated,
            seen: &mut self.seen,
        };
        let seen = known.view(&mut guest, asked, deadline);
        seen.map_err(|problem| self.explain(problem))
    }
}
