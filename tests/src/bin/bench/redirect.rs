//! What a redirected call costs: instructions that the guest executes between a function's first and its edition's, counted by stepping
//! through a call, and the time of a call beside that of the kernel's own function; of every kind of redirection, beside the guest kernel's own means to
//! replace a function, in one boot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::apply::tune::{SetChange, change_set};
use patcher::apply::{ApplyOptions, Arena, Model, Request, apply, revert};
use patcher::edition::list::Use;
use patcher::edition::object::Package;
use patcher::kernel::locate::Kernel;
use patcher::rule::Rule;
use serde_json::{Value, json};
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use vmm::guest::KvmGuest;
use vmm::vm::Walk;

use crate::figures::{Figures, Target, median};
use crate::outside::{inside, number};

/// The function that is replaced.
const FUNCTION: &str = "unix_ioctl";
/// Bytes of the room that is there for tracers, just before the jump.
const TRACERS: u64 = 5;
/// Steps that are made through a call: more than any way to an edition takes.
const STEPS: usize = 3000;
/// Calls that are timed at a time, and how often.
const CALLS: u32 = 20_000;
const TIMES: usize = 5;
/// What a step, an apply or a command may take.
const LIMIT: Duration = Duration::from_secs(30);
/// A way to redirect: its name, its rule, and what should come of it.
type Kind = (&'static str, Option<&'static str>, Option<Target>);

/// The redirections: a jump adds one instruction, and rules take a fifth of the kernel's own means at most, which is less than twenty.
const KINDS: [Kind; 4] = [
    ("direct", None, Some(Target::AtMost(1.0))),
    ("one rule", Some("pid != 1"), Some(Target::RatioAtMost(0.2))),
    (
        "four rules",
        Some("pid != 1 and cpu = 0 and cmd in 0x8900..0x890f and cmd in set marks"),
        Some(Target::RatioAtMost(0.2)),
    ),
    ("C predicate", Some("predicate of_marks"), None),
];
/// The guest kernel's own means, by the module that uses it.
const PEERS: [(&str, &str); 2] = [("kprobe", "kprobe_peer"), ("livepatch", "livepatch_peer")];

/// Every kind beside the peers, on both kernels.
pub(crate) fn redirect(figures: &mut Figures, samples: usize) -> Result<(), String> {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut all = Vec::new();
        for _ in 0..samples {
            all.push(inside(&["redirect", stock.0])?);
        }
        let middle = |kind: &str, field: &str| {
            let values = all.iter().map(|values| number(&values[kind], field));
            median(values.collect::<Result<_, _>>()?)
        };
        let own = middle("own", "ns")?;
        let livepatch = middle("livepatch", "added")?;
        let kinds = KINDS
            .into_iter()
            .flat_map(|(kind, _, target)| [(kind.to_owned(), target), (counted(kind), None)]);
        let peers = PEERS.map(|(peer, _)| (peer.to_owned(), None));
        for (name, target) in kinds.chain(peers) {
            figures.add(
                format!("redirect {}: instructions added, {name}", stock.0),
                middle(&name, "added")?,
                "instructions",
                Some(("livepatch", livepatch)),
                target,
            );
            figures.add(
                format!("redirect {}: time of a call, {name}", stock.0),
                middle(&name, "ns")?,
                "ns (lab)",
                Some(("the kernel's own", own)),
                None,
            );
        }
    }
    Ok(())
}

/// The name of a kind whose calls are counted.
fn counted(kind: &str) -> String {
    format!("{kind}, counted")
}

/// A guest whose function is replaced in one way after the other.
struct Bench {
    guest: Inside,
    kernel: Kernel,
    arena: Arena,
    package: Package,
    /// The updates so far.
    updates: u64,
    /// Where the function's jump goes, once there was one.
    jump: Gva,
}

/// Measures one kernel, in the lab or on hardware.
pub(crate) fn measure(stock: Stock) -> Result<Value, String> {
    let modules: Vec<PathBuf> = PEERS.iter().map(|(_, module)| stock.peer(module)).collect();
    let guest = Inside::boot_with_files(stock, 1, &modules);
    let kernel = guest.kernel(stock);
    let machine = guest.vm.guest().map_err(|busy| busy.to_string())?;
    let arena = Arena::new(&machine, &kernel).map_err(|error| error.to_string())?;
    drop(machine);
    let package = stock.edition("unix_ioctl_answer");
    let package =
        std::fs::read(&package).map_err(|error| format!("{}: {error}", package.display()))?;
    let package = Package::parse(&package).map_err(|error| error.to_string())?;
    let mut bench = Bench {
        guest,
        kernel,
        arena,
        package,
        updates: 0,
        jump: Gva(0),
    };
    let mut values = serde_json::Map::new();
    values.insert("own".to_owned(), json!({ "ns": bench.time()? }));
    for (kind, rule, _) in KINDS {
        for count in [false, true] {
            let name = if count {
                counted(kind)
            } else {
                kind.to_owned()
            };
            values.insert(name, bench.ours(rule, count)?);
        }
    }
    for (peer, module) in PEERS {
        values.insert(peer.to_owned(), bench.peer(module)?);
    }
    Ok(Value::Object(values))
}

impl Bench {
    fn machine(&self) -> Result<KvmGuest, String> {
        self.guest.vm.guest().map_err(|busy| busy.to_string())
    }

    /// One kind of ours.
    fn ours(&mut self, rule: Option<&str>, counted: bool) -> Result<Value, String> {
        let rule = rule.map(Rule::parse).transpose();
        let rule = rule.map_err(|error| error.to_string())?.map(Arc::new);
        self.updates += 1;
        let update = self.updates;
        let mut machine = self.machine()?;
        let options = ApplyOptions {
            deadline: Instant::now() + LIMIT,
            check_only: false,
            doing: &|_| (),
            written: &|| (),
            hook: &|_| {},
        };
        let (kernel, arena) = (&self.kernel, &mut self.arena);
        let marks = SetChange {
            add: vec![0x8905],
            ..SetChange::default()
        };
        change_set(&mut machine, arena, "marks", &marks).map_err(|error| error.to_string())?;
        let request = Request {
            how: Use { rule, counted },
            ..Request::new(update, &self.package)
        };
        apply(&mut machine, kernel, arena, &request, &options)
            .map_err(|error| error.to_string())?;
        let edition = arena.holds.editions(update);
        let edition = edition.first().ok_or("the update has no edition")?.at;
        drop(machine);
        self.jump = self.led()?;
        let added = self.added(edition, self.jump)?;
        let ns = self.time()?;
        let mut machine = self.machine()?;
        let undone = revert(
            &mut machine,
            &self.kernel,
            &mut self.arena,
            &[update],
            Model::Immediate,
            &options,
        );
        undone.map_err(|error| error.to_string())?;
        Ok(json!({ "added": added, "ns": ns }))
    }

    /// Where the function's jump goes: what stands before it is executed in any case.
    fn led(&self) -> Result<Gva, String> {
        let mut functions = self.arena.holds.functions.iter();
        let function = functions.find(|function| function.target.name == FUNCTION);
        Ok(function.ok_or("nothing was redirected")?.target.jump)
    }

    /// The guest's own means: what it puts into the room that is there for tracers is all added.
    fn peer(&mut self, module: &str) -> Result<Value, String> {
        self.guest.must(&format!("insmod /files/{module}.ko"));
        let entry = self
            .guest
            .must(&format!("grep ' answer.*\\[{module}\\]' /proc/kallsyms"));
        let entry = entry.split_whitespace().next().unwrap_or_default();
        let entry = u64::from_str_radix(entry, 16).map_err(|error| format!("{entry}: {error}"))?;
        let room = Gva(self.jump.0 - TRACERS);
        let added = self.added(Gva(entry), room)?;
        let ns = self.time()?;
        let end = format!(
            "if [ -d /sys/kernel/livepatch/{module} ]; then echo 0 >/sys/kernel/livepatch/{module}/enabled; while [ -d /sys/kernel/livepatch/{module} ]; do usleep 20000; done; fi; rmmod {module}"
        );
        self.guest.must(&end);
        Ok(json!({ "added": added, "ns": ns }))
    }

    /// Instructions that a call executes before it comes to `edition`, but for those of the function before `own`.
    fn added(&self, edition: Gva, own: Gva) -> Result<usize, String> {
        let function = self.kernel.symbol(FUNCTION);
        let function = function.map_err(|error| error.to_string())?;
        let mut machine = self.machine()?;
        let walk = Walk {
            to: edition,
            most: STEPS,
        };
        let asked = self.guest.begin("probe siocatmark 5 200");
        let path = machine
            .break_at(function)
            .walk(walk, Instant::now() + LIMIT)
            .map_err(|error| error.to_string())?;
        drop(machine);
        let end = Instant::now() + LIMIT;
        while self.guest.answered(asked).is_none() {
            if Instant::now() > end {
                return Err("the guest does not go on behind its steps".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let came = path.iter().position(|at| *at == edition).ok_or_else(|| {
            let begin: Vec<String> = path
                .iter()
                .take(40)
                .map(|at| format!("{:#x}", at.0))
                .collect();
            format!(
                "a call did not get to {:#x} in {} steps: {}",
                edition.0,
                path.len(),
                begin.join(" ")
            )
        })?;
        let way = path.iter().take(came);
        let added = way.filter(|at| !(function..own).contains(*at));
        Ok(added.count())
    }

    /// Nanoseconds that a call takes, as its caller sees it.
    fn time(&self) -> Result<f64, String> {
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let said = self.guest.must(&format!("probe calls {CALLS}"));
            let ns = said.split_whitespace().nth(3);
            let ns: f64 = ns.and_then(|ns| ns.parse().ok()).ok_or(said.clone())?;
            times.push(ns / f64::from(CALLS));
        }
        median(times)
    }
}
