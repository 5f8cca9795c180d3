//! Does a panic of exopatch, at any of its calls on the guest, leave the guest's kernel as it was, or wholly updated, and the guest running?
//!
//! The calls of a few applies and reverts are counted. Then each is done again and again with a panic at one of the calls that the shortest made: at
//! every pause, write and resume, and at reads all through. A program in the guest tells which edition answers it.

use std::cell::{Cell, RefCell};
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use patcher::addr::Gpa;
use patcher::apply::{ApplyOptions, Arena, Model, Request, apply, revert};
use patcher::edition::object::Package;
use patcher::guest::{Guest, GuestError, PausedGuest, ReadPhys, Registers, Vcpu};
use patcher::kernel::locate::Kernel;
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use vmm::guest::KvmGuest;

/// At least so many reads have a panic, of each operation's thousands.
const READS: usize = 16;
/// Operations whose calls are counted. How many looks one takes is up to who runs in the guest meanwhile.
const MEASURED: usize = 4;
/// How often, in all, an operation may make fewer calls than the shortest of these.
const SHORTER: usize = 24;
const LIMIT: Duration = Duration::from_secs(20);
/// What SIOCATMARK on a datagram socket gives when the edition answers.
const NEW: &str = "answer ENOTTY";

/// The kinds of call on a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Pause,
    Write,
    /// Behind a try in vain.
    Resume,
    /// Behind the last write.
    LastResume,
}

/// One call: the nth of its kind.
type Call = (Kind, usize);

/// The calls on a guest, as they are made, and the one that panics.
#[derive(Debug, Default)]
struct Calls {
    made: RefCell<Vec<Kind>>,
    panics: Option<Call>,
    /// Everything has been written.
    written: Cell<bool>,
}

impl Calls {
    fn call(&self, kind: Kind) {
        let nth = self.count(kind);
        self.made.borrow_mut().push(kind);
        assert!(
            self.panics != Some((kind, nth)),
            "{kind:?} {nth} is to panic"
        );
    }

    fn count(&self, kind: Kind) -> usize {
        self.made
            .borrow()
            .iter()
            .filter(|made| **made == kind)
            .count()
    }

    /// Those at which there is to be a panic: all but reads, and some of these; the last resume, behind which nothing is undone, last.
    fn chosen(&self) -> Vec<Call> {
        let kinds = [
            Kind::Read,
            Kind::Pause,
            Kind::Write,
            Kind::Resume,
            Kind::LastResume,
        ];
        let each = kinds.into_iter().flat_map(|kind| {
            let all = self.count(kind);
            let step = if kind == Kind::Read {
                (all / READS).max(1)
            } else {
                1
            };
            (0..all).step_by(step).map(move |nth| (kind, nth))
        });
        each.collect()
    }
}

/// A guest whose calls are counted.
struct Counted<'c, G> {
    guest: G,
    calls: &'c Calls,
}

impl<G: ReadPhys> ReadPhys for Counted<'_, G> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.calls.call(Kind::Read);
        self.guest.read_phys(at, buf)
    }
}

impl<G: Registers> Registers for Counted<'_, G> {
    fn vcpus(&self) -> &[Vcpu] {
        self.guest.vcpus()
    }
}

impl<'c, G: Guest> Guest for Counted<'c, G> {
    type Paused<'g>
        = Counted<'c, G::Paused<'g>>
    where
        Self: 'g;

    fn arena(&self) -> Range<Gpa> {
        self.guest.arena()
    }

    fn store(&mut self, at: Gpa, value: u64) -> Result<(), GuestError> {
        self.guest.store(at, value)
    }

    fn pause(&mut self, deadline: Instant) -> Result<Self::Paused<'_>, GuestError> {
        self.calls.call(Kind::Pause);
        let (guest, calls) = (self.guest.pause(deadline)?, self.calls);
        Ok(Counted { guest, calls })
    }
}

impl<P: PausedGuest> PausedGuest for Counted<'_, P> {
    fn write_phys(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), GuestError> {
        // Behind the write: what has been done must be undone.
        let written = self.guest.write_phys(at, bytes);
        self.calls.call(Kind::Write);
        written
    }

    fn resume(self) -> Result<(), GuestError> {
        self.calls.call(match self.calls.written.get() {
            true => Kind::LastResume,
            false => Kind::Resume,
        });
        self.guest.resume()
    }

    fn leave_paused(self) {
        self.guest.leave_paused();
    }
}

/// A guest, what is known of its kernel, and the update that is tried.
struct Scene {
    guest: Inside,
    kernel: Kernel,
    package: Package,
    arena: Arena,
    /// How many updates there were.
    updates: u64,
}

/// How an operation ended: what it gave (nothing if it panicked), and what calls it made.
struct End<T> {
    gave: Option<T>,
    calls: Calls,
}

/// When an operation panicked: before or behind the last write.
#[derive(Clone, Copy, Debug)]
enum Panicked {
    Before,
    Behind,
}

impl<T> End<T> {
    fn written(&self) -> bool {
        self.calls.written.get()
    }

    fn panicked(&self) -> Option<Panicked> {
        match (&self.gave, self.written()) {
            (Some(_), _) => None,
            (None, false) => Some(Panicked::Before),
            (None, true) => Some(Panicked::Behind),
        }
    }
}

impl Scene {
    fn new(stock: Stock) -> Self {
        let guest = Inside::boot(stock, 2);
        let kernel = guest.kernel(stock);
        let package = fs::read(stock.edition("unix_ioctl_notty")).expect("a package");
        let package = Package::parse(&package).expect("a package");
        let machine = guest.vm.guest().expect("a guest that nobody else has");
        let arena = Arena::new(&machine, &kernel).expect("an arena");
        drop(machine);
        let _ = guest.must("(probe churn 2 >/dev/null 2>&1 &)");
        Self {
            guest,
            kernel,
            package,
            arena,
            updates: 0,
        }
    }

    /// Does something to the guest that may panic at a call.
    fn run<T>(
        &mut self,
        at: Option<Call>,
        run: impl FnOnce(&mut Self, &mut Counted<'_, KvmGuest>, &ApplyOptions<'_>) -> T,
    ) -> End<T> {
        let calls = Calls {
            panics: at,
            ..Calls::default()
        };
        let options = ApplyOptions {
            deadline: Instant::now() + LIMIT,
            check_only: false,
            doing: &|_| {},
            written: &|| calls.written.set(true),
            hook: &|_| {},
        };
        let mut counted = Counted {
            guest: self.guest.vm.guest().expect("a guest that nobody else has"),
            calls: &calls,
        };
        let gave = catch_unwind(AssertUnwindSafe(|| run(self, &mut counted, &options)));
        drop(counted);
        End {
            gave: gave.ok(),
            calls,
        }
    }

    fn apply(&mut self, at: Option<Call>) -> End<u64> {
        self.updates += 1;
        self.run(at, |scene, guest, options| {
            let request = Request::new(scene.updates, &scene.package);
            let report = apply(guest, &scene.kernel, &mut scene.arena, &request, options);
            let _ = report.expect("an apply");
            scene.updates
        })
    }

    fn revert(&mut self, update: u64, at: Option<Call>) -> End<()> {
        self.run(at, |scene, guest, options| {
            let report = revert(
                guest,
                &scene.kernel,
                &mut scene.arena,
                &[update],
                Model::Immediate,
                options,
            );
            let _ = report.expect("a revert");
        })
    }

    /// Whether the edition answers a program of the guest now; the guest runs.
    fn is_new(&self) -> bool {
        let answer = self.guest.must(
            "rm -f /tmp/answer; probe answers 1 >/tmp/answer & \
             until grep -qs answer /tmp/answer; do usleep 5000; done; kill $!; cat /tmp/answer",
        );
        answer.contains(NEW)
    }
}

/// The calls of the operation that made the fewest.
fn fewest(measured: Vec<Calls>) -> Calls {
    let measured = measured.into_iter();
    let fewest = measured.min_by_key(|calls| calls.made.borrow().len());
    fewest.expect("an operation")
}

/// Has an operation panic at each of the calls. `operate` does it with a panic at one, and tells whether there was one before or behind the last write;
/// there is none when it ended before that call: nothing was in the way. Then it is done again.
fn panic_at_each(
    stock: Stock,
    what: &str,
    calls: Vec<Call>,
    mut operate: impl FnMut(Call) -> Option<Panicked>,
) {
    let (mut panics, mut behind, mut shorter) = (0, 0, 0);
    for call in calls {
        let panicked = loop {
            if let Some(panicked) = operate(call) {
                break panicked;
            }
            shorter += 1;
            assert!(shorter <= SHORTER, "{what} ended before {call:?}");
        };
        match panicked {
            Panicked::Before => panics += 1,
            Panicked::Behind => behind += 1,
        }
    }
    println!(
        "{stock:?}: {panics} panics in {what}, {behind} behind the last write; {shorter} ended before"
    );
    assert!(panics > READS && behind == 1);
}

fn applies(stock: Stock) {
    let mut scene = Scene::new(stock);
    assert!(!scene.is_new());
    let mut measure = || {
        let whole = scene.apply(None);
        let applied = whole.gave.expect("an update");
        assert!(scene.is_new());
        let _ = scene.revert(applied, None);
        whole.calls
    };
    // The first one maps the arena too.
    let _ = measure();
    let calls = fewest((0..MEASURED).map(|_| measure()).collect());
    panic_at_each(stock, "applies", calls.chosen(), |call| {
        let end = scene.apply(Some(call));
        assert_eq!(scene.is_new(), end.written(), "apply, {call:?}");
        // What was written is in effect, and known to be.
        if end.written() {
            let _ = scene.revert(scene.updates, None);
            assert!(!scene.is_new(), "the update behind {call:?} is undone");
        }
        end.panicked()
    });
}

fn reverts(stock: Stock) {
    let mut scene = Scene::new(stock);
    let mut measure = || {
        let applied = scene.apply(None).gave.expect("an update");
        scene.revert(applied, None).calls
    };
    let calls = fewest((0..MEASURED).map(|_| measure()).collect());
    let mut applied = scene.apply(None).gave.expect("an update");
    panic_at_each(stock, "reverts", calls.chosen(), |call| {
        let end = scene.revert(applied, Some(call));
        assert_eq!(scene.is_new(), !end.written(), "revert, {call:?}");
        if end.written() {
            applied = scene.apply(None).gave.expect("an update");
        }
        end.panicked()
    });
}

#[test]
fn a_panic_anywhere_in_an_apply_leaves_a_6_1_whole() {
    applies(LTS_6_1);
}

#[test]
fn a_panic_anywhere_in_an_apply_leaves_a_6_12_whole() {
    applies(NEWEST_6_12);
}

#[test]
fn a_panic_anywhere_in_a_revert_leaves_a_6_1_whole() {
    reverts(LTS_6_1);
}

#[test]
fn a_panic_anywhere_in_a_revert_leaves_a_6_12_whole() {
    reverts(NEWEST_6_12);
}
