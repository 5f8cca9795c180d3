//! Writes and calls that fail, and panics, at every step of switches by task and of what follows them, on a made-up kernel in a made-up guest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::passing_tests::{ELSEWHERE, bound, sleeping};
use super::whole_tests::{calling, options};
use super::{ApplyError, ApplyOptions, Arena, Model, Request, apply, revert, settle};
use crate::addr::Gpa;
use crate::edition::object::Package;
use crate::guest::fake::{FakeGuest, Fault};
use crate::kernel::locate::Kernel;
use crate::kernel::testing::Form;
use crate::observe::verify;

/// A guest, and what is done to it.
#[derive(Clone)]
struct Scene {
    guest: FakeGuest,
    arena: Arena,
}

/// One operation.
type Step = fn(&mut Scene, &Kernel, &Package) -> Result<(), ApplyError>;

/// Who sleeps in the function, or has left it, when an operation begins.
type Where = Option<u64>;

fn come(scene: &mut Scene, kernel: &Kernel, package: &Package) -> Result<(), ApplyError> {
    let request = Request {
        model: Model::PerTask,
        ..Request::new(1, package)
    };
    let Scene { guest, arena } = scene;
    apply(guest, kernel, arena, &request, &patient()).map(drop)
}

fn look(scene: &mut Scene, kernel: &Kernel, _: &Package) -> Result<(), ApplyError> {
    settle(&mut scene.guest, kernel, &mut scene.arena, &patient())
}

fn leave(scene: &mut Scene, kernel: &Kernel, _: &Package) -> Result<(), ApplyError> {
    let Scene { guest, arena } = scene;
    revert(guest, kernel, arena, &[1], Model::PerTask, &patient()).map(drop)
}

/// What can be told of a scene from outside: what functions lead to, who is bound, and the room that is taken.
fn told(scene: &Scene) -> String {
    let holds = &scene.arena.holds;
    let leads = holds.functions.iter().map(|function| function.lead);
    let leads: Vec<_> = leads.collect();
    format!(
        "{leads:?} {:?} {} {}",
        bound(&scene.arena),
        holds.space.used(),
        holds.is_settling()
    )
}

/// With time enough on any machine.
fn patient<'a>() -> ApplyOptions<'a> {
    ApplyOptions {
        deadline: Instant::now() + Duration::from_secs(60),
        ..options(false)
    }
}

/// What became of an operation with a fault.
#[derive(Debug, PartialEq, Eq)]
enum Became {
    /// It never came to the fault.
    Without,
    /// It came to it, and says that it is done.
    Done,
    /// It came to it, and says that it is not done, or says nothing.
    Over,
    /// It could not be brought to an end, and says so.
    Broken,
}

/// Does `step` with `fault`.
fn faulted(
    scene: &mut Scene,
    kernel: &Kernel,
    package: &Package,
    step: Step,
    fault: Fault,
) -> Became {
    scene.guest.count_anew();
    scene.guest.fault = fault;
    let end = catch_unwind(AssertUnwindSafe(|| step(scene, kernel, package)));
    let came = scene.guest.came_to_fault();
    scene.guest.fault = Fault::Never;
    match end {
        _ if !came => Became::Without,
        Ok(Err(error)) if error.is_broken() => Became::Broken,
        Ok(Ok(())) => Became::Done,
        _ => Became::Over,
    }
}

/// Each operation, with a fault at each of its calls in turn, leaves a guest that runs and that the next try brings to where it comes without one.
fn check(steps: &[(&str, Where, Step)]) -> usize {
    let (guest, kernel, arena, _, at): (_, _, _, _, Gpa) = sleeping(Form::New);
    let package = calling(Form::New);
    let mut scene = Scene { guest, arena };
    let mut faults = 0;
    for (name, goes, step) in steps {
        if let Some(goes) = goes {
            scene.guest.poke(at, &goes.to_le_bytes()).unwrap();
        }
        let before = scene.clone();
        step(&mut scene, &kernel, &package).unwrap();
        let want = told(&scene);
        for kind in [
            Fault::Write as fn(usize) -> Fault,
            Fault::Panic,
            Fault::Call,
        ] {
            for nth in 0.. {
                let mut tried = before.clone();
                let became = faulted(&mut tried, &kernel, &package, *step, kind(nth));
                if became == Became::Without {
                    assert_eq!(told(&tried), want, "{name}: without a fault");
                    break;
                }
                let what = format!("{name}: {:?}", kind(nth));
                faults += 1;
                assert_eq!(tried.guest.is_paused(), became == Became::Broken, "{what}");
                if became == Became::Broken {
                    continue;
                }
                // What could not be read once may have been read at the next try, in another way: with a handler for nobody, for one.
                let other_way = became == Became::Done && matches!(kind(nth), Fault::Call(_));
                for update in tried.arena.holds.placed.keys() {
                    let found = verify(&tried.guest, &kernel, &tried.arena.holds, *update);
                    assert!(found.differences.is_empty(), "{what}: {found:?}");
                }
                if other_way {
                    continue;
                }
                // What was done before a panic is done, and is not done again.
                if told(&tried) != want {
                    step(&mut tried, &kernel, &package)
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                assert_eq!(told(&tried), want, "{what}");
            }
        }
    }
    faults
}

#[test]
fn a_fault_at_any_step_of_a_switch_by_task_is_got_over() {
    let faults = check(&[
        ("switch", None, come as Step),
        ("look at one who is still there", None, look),
        ("end", Some(ELSEWHERE), look),
        ("taken back", None, leave),
        ("given back", None, look),
    ]);
    assert!(faults > 100, "{faults}");
}
