//! Packages with hooks, applied to a made-up kernel in a made-up guest that runs them, or not.

use std::cell::RefCell;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::whole_tests::{booted, live};
use super::{ApplyError, ApplyOptions, Arena, Model, Request, apply, revert, settle};
use crate::addr::Gpa;
use crate::edition::object::Package;
use crate::edition::object::tests::Maker;
use crate::guest::fake::{FakeGuest, FakePaused};
use crate::guest::{Guest, GuestError, ReadPhys};
use crate::kernel::locate::Kernel;
use crate::kernel::testing::{BUILD_ID, FORMS, Form};

/// What the guest does when it is asked to run a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runs {
    /// It returns that.
    Returns(i32),
    /// It begins, and does not end.
    Sleeps,
    /// No timer interrupt comes.
    Never,
}

/// A guest that does as told with each hook in turn, and the last time with all others.
struct Working {
    guest: FakeGuest,
    does: Vec<Runs>,
    /// Where the last word was stored.
    last: Gpa,
    /// Runs that are asleep: where to say that they have ended, and their number.
    asleep: Vec<(Gpa, u64)>,
}

impl ReadPhys for Working {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.guest.read_phys(at, buf)
    }
}

impl Guest for Working {
    type Paused<'g> = FakePaused<'g>;

    fn arena(&self) -> Range<Gpa> {
        self.guest.arena()
    }

    /// A number behind the address of a hook asks for its run.
    fn store(&mut self, at: Gpa, value: u64) -> Result<(), GuestError> {
        self.guest.store(at, value)?;
        let asked = at.0 == self.last.0 + 8 && value != 0;
        self.last = at;
        if !asked {
            return Ok(());
        }
        let does = self.does[0];
        if self.does.len() > 1 {
            self.does.remove(0);
        }
        let (taken, ended, result) = (Gpa(at.0 + 8), Gpa(at.0 + 16), Gpa(at.0 + 24));
        if does != Runs::Never {
            self.guest.poke(taken, &value.to_le_bytes())?;
        }
        match does {
            Runs::Returns(number) => {
                let number = i64::from(number);
                self.guest.poke(result, &number.to_le_bytes())?;
                self.guest.poke(ended, &value.to_le_bytes())?;
            }
            Runs::Sleeps => self.asleep.push((ended, value)),
            Runs::Never => {}
        }
        Ok(())
    }

    fn pause(&mut self, deadline: Instant) -> Result<FakePaused<'_>, GuestError> {
        self.guest.pause(deadline)
    }
}

impl Working {
    fn wake(&mut self) {
        for (ended, run) in std::mem::take(&mut self.asleep) {
            self.guest.poke(ended, &run.to_le_bytes()).unwrap();
        }
    }
}

/// An edition of `patient` and these hooks, which are begun from `behind_patient`.
fn package(hooks: &[(u32, &str, u64)]) -> Package {
    let mut code = vec![0xcc; 0x30];
    code[..10].copy_from_slice(&[0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
    code[0x10..0x1a].copy_from_slice(&[0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
    code[0x20] = 0xc3;
    let mut maker = Maker::for_kernel(&code, &BUILD_ID);
    for (at, function) in [(0, "patient"), (0x10, "behind_patient")] {
        maker.relocate_text(at + 1, 4, "__fentry__", -4);
        maker.relocate_text(at + 6, 4, &format!("exopatch_original_{function}"), -4);
    }
    maker.edition("patient", 0, 0);
    maker.hooks(hooks, ("behind_patient", 0x10), 64);
    maker.orc();
    Package::parse(&maker.finish()).unwrap()
}

const ALL: [(u32, &str, u64); 4] = [
    (0, "first", 0x20),
    (1, "second", 0x20),
    (2, "third", 0x20),
    (3, "fourth", 0x20),
];

struct Scene {
    guest: Working,
    kernel: Kernel,
    arena: Arena,
    told: RefCell<Vec<String>>,
}

impl Scene {
    fn new(form: Form, does: &[Runs]) -> Self {
        let (guest, kernel, arena) = booted(form);
        let guest = Working {
            guest,
            does: does.to_vec(),
            last: Gpa(0),
            asleep: Vec::new(),
        };
        Self {
            guest,
            kernel,
            arena,
            told: RefCell::default(),
        }
    }

    fn with<T>(
        &mut self,
        work: impl FnOnce(&mut Working, &Kernel, &mut Arena, &ApplyOptions<'_>) -> T,
    ) -> T {
        let told = &self.told;
        let options = ApplyOptions {
            deadline: Instant::now() + Duration::from_millis(200),
            check_only: false,
            doing: &|_| {},
            written: &|| told.borrow_mut().push("written".to_owned()),
            hook: &|hook| {
                let stage = format!("{:?}", hook.stage);
                let stage = stage.split("after").next().unwrap_or_default();
                told.borrow_mut().push(format!("{} {stage}", hook.name));
            },
        };
        work(&mut self.guest, &self.kernel, &mut self.arena, &options)
    }

    fn come(&mut self, id: u64, package: &Package) -> Result<(), ApplyError> {
        let request = Request::new(id, package);
        self.with(|guest, kernel, arena, options| {
            apply(guest, kernel, arena, &request, options).map(drop)
        })
    }

    fn go(&mut self, id: u64) -> Result<(), ApplyError> {
        self.with(|guest, kernel, arena, options| {
            revert(guest, kernel, arena, &[id], Model::Immediate, options).map(drop)
        })
    }

    fn settle(&mut self) {
        for _ in 0..8 {
            self.with(settle).unwrap();
        }
    }

    fn live(&self) -> Vec<u8> {
        live(&self.guest.guest, &self.kernel)
    }
}

#[test]
fn hooks_run_before_and_behind_each_switch() {
    for form in FORMS {
        let mut scene = Scene::new(form, &[Runs::Returns(0)]);
        let (before, used) = (scene.live(), scene.arena.holds.space.used());
        scene.come(1, &package(&ALL)).unwrap();
        assert_ne!(scene.live(), before);
        assert_eq!(scene.arena.holds.functions.iter().count(), 1);
        scene.go(1).unwrap();
        assert_eq!(scene.live(), before);
        let told = scene.told.borrow().join("; ");
        let ran = |name: &str| format!("{name} Began; {name} Ended {{ result: 0, ");
        let want = [
            ran("first"),
            "written".to_owned(),
            ran("second"),
            ran("third"),
            "written".to_owned(),
            ran("fourth"),
        ];
        assert_eq!(told, want.join("; "));
        scene.settle();
        assert!(scene.arena.holds.placed.is_empty());
        assert_eq!(scene.arena.holds.space.used(), used);
        assert!(!scene.arena.holds.is_settling());
    }
}

#[test]
fn a_hook_that_says_no_keeps_the_switch_from_being_made() {
    for form in FORMS {
        let no = Runs::Returns(-16);
        let mut scene = Scene::new(form, &[no, Runs::Returns(0), Runs::Returns(0), no]);
        let (before, used) = (scene.live(), scene.arena.holds.space.used());
        let error = scene.come(1, &package(&ALL)).unwrap_err().to_string();
        assert!(
            error.contains("hook first") && error.ends_with("returned -16"),
            "{error}"
        );
        assert_eq!(scene.live(), before);
        scene.settle();
        assert_eq!(scene.arena.holds.space.used(), used);

        scene.come(2, &package(&ALL)).unwrap();
        let error = scene.go(2).unwrap_err().to_string();
        assert!(error.contains("hook third"), "{error}");
        assert_ne!(scene.live(), before);
        assert_eq!(scene.arena.holds.functions.iter().count(), 1);
    }
}

#[test]
fn a_hook_that_is_late_keeps_its_code_until_it_has_ended() {
    for form in FORMS {
        let mut scene = Scene::new(form, &[Runs::Sleeps]);
        let (before, used) = (scene.live(), scene.arena.holds.space.used());
        let error = scene.come(1, &package(&ALL[..1])).unwrap_err().to_string();
        assert!(error.contains("has not ended within"), "{error}");
        assert_eq!(scene.live(), before);
        scene.settle();
        let [edition] = &scene.arena.holds.editions(1)[..] else {
            panic!("its code is gone")
        };
        let life = format!("{:?}", edition.life);
        assert!(life.contains("its hook first"), "{life}");
        assert!(scene.arena.holds.is_settling());
        let ended = |scene: &Scene| {
            let told = scene.told.borrow();
            told.iter().any(|told| told.contains("first Ended"))
        };
        assert!(!ended(&scene));
        scene.guest.wake();
        scene.settle();
        assert!(ended(&scene), "{form:?}: that it ended is told");
        assert!(scene.arena.holds.placed.is_empty());
        assert_eq!(scene.arena.holds.space.used(), used);
    }
}

#[test]
fn a_hook_that_no_interrupt_began_never_will_be() {
    for form in FORMS {
        let mut scene = Scene::new(form, &[Runs::Never]);
        let used = scene.arena.holds.space.used();
        let error = scene.come(1, &package(&ALL[..1])).unwrap_err().to_string();
        assert!(error.contains("was not begun"), "{error}");
        scene.settle();
        assert!(scene.arena.holds.placed.is_empty());
        assert_eq!(scene.arena.holds.space.used(), used);
    }
}

/// Behind the switch nothing depends on what a hook returns; but as long as one has not ended, no other of its update is begun.
#[test]
fn a_late_hook_behind_a_switch_is_told_and_keeps_the_next_from_running() {
    let mut scene = Scene::new(FORMS[0], &[Runs::Sleeps, Runs::Returns(-11)]);
    scene.come(1, &package(&ALL[1..])).unwrap();
    let told = scene.told.borrow().join("; ");
    assert!(
        told.contains("written; second Began; second Failed"),
        "{told}"
    );
    let error = scene.go(1).unwrap_err().to_string();
    assert!(error.contains("hook second of update 1"), "{error}");
    scene.guest.wake();
    let error = scene.go(1).unwrap_err().to_string();
    assert!(error.contains("returned -11"), "{error}");
}
