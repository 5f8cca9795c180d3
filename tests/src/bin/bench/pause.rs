//! What updates of few and many functions cost a guest with few and many tasks and vCPUs: work under the pause, counted in the lab and timed
//! natively on recorded guests, and the pause by its parts beside the bare pause of the same machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use patcher::addr::Gpa;
use patcher::apply::{ApplyOptions, Arena, Model, Report, Request, apply};
use patcher::edition::object::Package;
use patcher::guest::fake::FakeGuest;
use patcher::kernel::locate::Kernel;
use serde_json::{Value, json};
use tests::api::Api;
use tests::recorded::{Load, Opened, Recorded, open};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::figures::{Figures, Target, median};
use crate::machine::{Kind, Machine};
use crate::many;
use crate::outside::{ARENA, ARENA_LEN, inside, number};

/// Functions that one update replaces.
const FUNCTIONS: [usize; 3] = [1, 10, 100];
/// Threads of the recorded guests, and the memory in MiB that these need.
const SIZES: [(u32, u64); 3] = [(100, 256), (1000, 256), (10_000, 768)];
/// vCPUs of the guests in the lab, and their threads.
const VCPUS: [u32; 3] = [1, 4, 8];
const THREADS: u32 = 100;
/// Check and commit at a thousand tasks.
const WORK_US: f64 = 300.0;
/// What one task of a larger guest may cost beside one of the guest before: the cost grows with the tasks, and no faster.
const LINEAR: f64 = 1.5;
/// In the first byte of the lock of the lists of tasks: somebody changes them.
const WRITER: u8 = 0xff;
/// How long a revert may take until its last task has left, and how often that is asked.
const LEFT: Duration = Duration::from_secs(60);
const ASKED: Duration = Duration::from_millis(20);
/// Applies of each kind on a recorded guest, and in the lab.
const ROUNDS: usize = 7;
const APPLIES: usize = 10;

/// All of it, on both kernels.
pub(crate) fn pause(figures: &mut Figures, _samples: usize) -> Result<(), String> {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let packages = natively(figures, stock, dir.path())?;
        in_lab(figures, stock, &packages)?;
    }
    Ok(())
}

/// Check and commit on recorded guests; gives the packages.
fn natively(figures: &mut Figures, stock: Stock, dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut packages = Vec::new();
    let mut a_task = [None; FUNCTIONS.len()];
    for (threads, memory_mib) in SIZES {
        let load = Load::Sleepers(threads);
        let core = Recorded {
            stock,
            load,
            memory_mib,
        };
        let Opened { dump, kernel } = open(stock, &core.kept()?)?;
        let guest = FakeGuest::from_dump(&dump, ARENA..Gpa(ARENA.0 + ARENA_LEN))
            .map_err(|error| error.to_string())?;
        drop(dump);
        if packages.is_empty() {
            for count in FUNCTIONS {
                packages.push(many::package(stock, &kernel, &guest, count, dir)?);
            }
        }
        let moving = in_motion(&kernel, &guest)?;
        for ((package, functions), before) in packages.iter().zip(FUNCTIONS).zip(&mut a_task) {
            eprintln!(
                "measuring updates {}: {functions} functions, {threads} threads",
                stock.0
            );
            let reports = rounds(&kernel, &guest, package, functions)?;
            let of = |part: &dyn Fn(&Report) -> u64| {
                median(reports.iter().map(|report| part(report) as f64).collect())
            };
            let name = |what: &str| {
                format!(
                    "update {}: {functions} functions, {threads} threads: {what}",
                    stock.0
                )
            };
            let (work, tasks) = (of(&|report| report.pause_us)?, of(&|report| report.tasks)?);
            let target = (threads == 1000).then_some(Target::AtMost(WORK_US));
            figures.add(name("check and commit, natively"), work, "us", None, target);
            let reports = rounds(&kernel, &moving, package, functions)?;
            let whole = median(
                reports
                    .iter()
                    .map(|report| report.pause_us as f64)
                    .collect(),
            )?;
            let what = name("the same, while tasks come and go");
            figures.add(what, whole, "us", None, None);
            let each = work / tasks * 1e3;
            let peer = before.map(|before| ("the guest before", before));
            let linear = peer.map(|_| Target::RatioAtMost(LINEAR));
            figures.add(name("of it a task"), each, "ns", peer, linear);
            *before = Some(each);
            for (what, unit, part) in [
                (
                    "bytes read",
                    "bytes",
                    (|it| it.bytes_read) as fn(&Report) -> u64,
                ),
                ("bytes written", "bytes", |it| it.bytes_written),
                ("stack words", "words", |it| it.stack_words),
            ] {
                figures.add(name(what), of(&part)?, unit, None, None);
            }
        }
    }
    Ok(packages)
}

/// The guest at a moment at which its lists of tasks change: nothing that was found out before the pause is known to be all then.
fn in_motion(kernel: &Kernel, guest: &FakeGuest) -> Result<FakeGuest, String> {
    let failed = |error: &dyn std::fmt::Display| format!("tasklist_lock: {error}");
    let mut guest = guest.clone();
    let lock = kernel
        .symbol("tasklist_lock")
        .map_err(|error| failed(&error))?;
    let lock = kernel
        .translate(&guest, lock)
        .map_err(|error| failed(&error))?;
    guest
        .poke(lock, &[WRITER])
        .map_err(|error| failed(&error))?;
    Ok(guest)
}

/// Applies a package to copies of a recorded guest: nothing stops or goes there, so that a pause is the work under it.
fn rounds(
    kernel: &Kernel,
    guest: &FakeGuest,
    package: &Path,
    functions: usize,
) -> Result<Vec<Report>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", package.display());
    let bytes = std::fs::read(package).map_err(|error| failed(&error))?;
    let package = Package::parse(&bytes).map_err(|error| failed(&error))?;
    let model = if functions == 1 {
        Model::Immediate
    } else {
        Model::PerTask
    };
    let mut reports = Vec::new();
    for _ in 0..ROUNDS {
        // In a recorded guest no thread ever leaves the old side of a switch.
        let mut guest = guest.clone();
        let mut arena = Arena::new(&guest, kernel).map_err(|error| failed(&error))?;
        let options = ApplyOptions {
            deadline: Instant::now() + Duration::from_secs(5),
            check_only: false,
            doing: &|_| (),
            written: &|| (),
            hook: &|_| {},
        };
        let request = Request {
            model,
            ..Request::new(1, &package)
        };
        let report = apply(&mut guest, kernel, &mut arena, &request, &options);
        reports.push(report.map_err(|error| failed(&error))?);
    }
    Ok(reports)
}

/// The same updates in running guests.
fn in_lab(figures: &mut Figures, stock: Stock, packages: &[PathBuf]) -> Result<(), String> {
    for vcpus in VCPUS {
        let count = vcpus.to_string();
        let mut args = vec!["updates", stock.0, &count];
        for package in packages {
            args.push(package.to_str().ok_or("a temporary path is not UTF-8")?);
        }
        let values = inside(&args)?;
        let bare = number(&values, "bare_us")?;
        let name = |what: &str| format!("update {}, {vcpus} vCPUs: {what}", stock.0);
        let ioctls = number(&values, "ioctls_per_vcpu")?;
        figures.add(name("ioctls per vCPU"), ioctls, "ioctls", None, None);
        for (functions, values) in FUNCTIONS
            .iter()
            .zip(values["updates"].as_array().into_iter().flatten())
        {
            let peer = Some(("the bare pause", bare));
            let whole = number(values, "pause_us")?;
            let name = |what: &str| name(&format!("{functions} functions: {what}"));
            figures.add(name("pause"), whole, "us (lab)", peer, None);
            for part in ["stop_us", "prove_us", "scan_us", "verify_us", "write_us"] {
                let part_us = number(values, part)?;
                figures.add(
                    name(&format!("of it {}", part.trim_end_matches("_us"))),
                    part_us,
                    "us (lab)",
                    None,
                    None,
                );
            }
            let written = number(values, "bytes_written")?;
            figures.add(name("bytes written"), written, "bytes", None, None);
        }
    }
    Ok(())
}

/// Applies and reverts in a running guest, in the lab or on hardware.
pub(crate) fn measure(stock: Stock, vcpus: u32, packages: &[&str]) -> Result<Value, String> {
    let load = format!("exopatch.run=probe,sleepers,{THREADS}");
    let machine = Machine::boot(Kind::Exopatch, stock, vcpus, &load)?;
    let mut api = Api::connect(machine.control())?;
    let (mut bare, mut ioctls) = (Vec::new(), Vec::new());
    for _ in 0..APPLIES {
        let paused = api.call("POST /v1/vm/pause", b"")?;
        let each = paused["stop"]["ioctls"].as_array().ok_or("no ioctls")?;
        ioctls.extend(each.iter().filter_map(Value::as_f64));
        bare.push(number(&paused["stop"], "stop_us")?);
        api.call("POST /v1/vm/resume", b"")?;
    }
    let mut updates = Vec::new();
    for package in packages {
        let bytes = std::fs::read(package).map_err(|error| format!("{package}: {error}"))?;
        let mut reports = Vec::new();
        for _ in 0..APPLIES {
            let update = api.call("POST /v1/updates?deadline_ms=30000", &bytes)?;
            reports.push(update["applied"].clone());
            let update = format!("/v1/updates/{}", update["id"]);
            let revert = format!("POST {update}/revert?deadline_ms=30000");
            api.call(&revert, b"")?;
            gone(&mut api, &update)?;
        }
        updates.push(middle(&reports)?);
    }
    Ok(json!({ "bare_us": median(bare)?, "ioctls_per_vcpu": median(ioctls)?, "updates": updates }))
}

/// Waits until the last task has left `update`.
fn gone(api: &mut Api, update: &str) -> Result<(), String> {
    let begun = Instant::now();
    loop {
        let shown = api.call(&format!("GET {update}"), b"")?;
        if shown["state"] == "reverted" {
            return Ok(());
        }
        if begun.elapsed() > LEFT {
            return Err(format!("{update} is still {}", shown["state"]));
        }
        std::thread::sleep(ASKED);
    }
}

/// The middle of each number of several reports.
fn middle(reports: &[Value]) -> Result<Value, String> {
    let mut values = serde_json::Map::new();
    let parts = ["stop_us", "prove_us", "scan_us", "verify_us", "write_us"];
    let places = [
        ("pause_us", "/pause_us"),
        ("bytes_written", "/bytes_written"),
    ];
    let places = places.map(|(name, at)| (name, at.to_owned())).into_iter();
    let parts = parts.map(|part| (part, format!("/phases/{part}")));
    for (name, at) in places.chain(parts) {
        let all = reports
            .iter()
            .filter_map(|report| report.pointer(&at)?.as_f64());
        let middle = median(all.collect()).map_err(|why| format!("{name}: {why}"))?;
        values.insert(name.to_owned(), json!(middle));
    }
    Ok(Value::Object(values))
}
