//! The parts that are timed here, and those that ask the part inside the lab. A boot gets a fresh lab for each sample: an emulated host that has
//! run guests boots the next one more slowly.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::Gpa;
use patcher::apply::{ApplyOptions, Arena, Model, Report, Request, apply, revert};
use patcher::edition::object::Package;
use patcher::guest::Registers as _;
use patcher::guest::dump::Dump;
use patcher::guest::fake::FakeGuest;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::payload::Payload;
use serde_json::Value;
use tests::lab;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::figures::{Figures, Target, median};

/// Seconds until the lab is ready that are too many.
const LAB_START_S: f64 = 6.0;
/// Work under the pause of an apply, natively.
const PAUSE_WORK_US: f64 = 300.0;
/// Anonymous memory beside guest memory, in MiB: without and with the kernel's index.
const MEMORY_MIB: f64 = 8.0;
const MEMORY_INDEXED_MIB: f64 = 32.0;
/// Applies and reverts on a recorded guest.
const RECORDED_ROUNDS: usize = 200;
/// Where the copy of a recorded guest gets an arena: above the memory of any small guest.
pub(crate) const ARENA: Gpa = Gpa(1 << 36);
pub(crate) const ARENA_LEN: u64 = 6 << 20;

/// What a part may take before its lab counts as wedged.
const PART_LIMIT_S: u32 = 150;

/// Runs a part inside a fresh lab and gives the numbers that it printed.
pub(crate) fn inside(args: &[&str]) -> Result<Value, String> {
    eprintln!("measuring {}", args.join(" "));
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = lab::run(&own, &[&["inside"], args].concat(), PART_LIMIT_S)?;
    serde_json::from_slice(&output).map_err(|error| format!("{args:?}: {error}"))
}

pub(crate) fn number(values: &Value, name: &str) -> Result<f64, String> {
    values[name]
        .as_f64()
        .ok_or_else(|| format!("no {name} in {values}"))
}

/// From asking for the lab to a command having run in it.
pub(crate) fn lab_start(figures: &mut Figures, samples: usize) -> Result<(), String> {
    let mut times = Vec::new();
    for _ in 0..samples {
        let run = |action: &str| {
            let status = Command::new(lab::script())
                .args(["--name", "bench", action])
                .stdout(Stdio::null())
                .status();
            status
                .map_err(|error| error.to_string())
                .and_then(|status| {
                    if status.success() {
                        Ok(())
                    } else {
                        Err(format!("scripts/lab {action}: {status}"))
                    }
                })
        };
        let start = Instant::now();
        run("up")?;
        times.push(start.elapsed().as_secs_f64());
        run("down")?;
    }
    figures.add(
        "lab: start to ready",
        median(times)?,
        "s",
        None,
        Some(Target::AtMost(LAB_START_S)),
    );
    Ok(())
}

/// Process start to init, beside QEMU's microvm with the same kernel and initramfs.
pub(crate) fn boot(figures: &mut Figures, samples: usize) -> Result<(), String> {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..samples {
            ours.push(number(&inside(&["boot", "exopatch", stock.0])?, "boot_s")?);
            peers.push(number(&inside(&["boot", "qemu", stock.0])?, "boot_s")?);
        }
        let name = format!("boot {}: process start to init", stock.0);
        let peer = Some(("QEMU microvm", median(peers)?));
        figures.add(
            name,
            median(ours)?,
            "s",
            peer,
            Some(Target::RatioAtMost(1.0)),
        );
    }
    Ok(())
}

/// A bare pause of two busy processors, beside QEMU's stop.
pub(crate) fn pause(figures: &mut Figures, samples: usize) -> Result<(), String> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        ours.push(inside(&["pause", "exopatch"])?);
        peers.push(inside(&["pause", "qemu"])?);
    }
    let middle = |values: &[Value], name: &str| {
        median(
            values
                .iter()
                .filter_map(|value| value[name].as_f64())
                .collect(),
        )
    };
    let parts = [
        (
            "pause: request to reply",
            "stop",
            "pause_us",
            Some(Target::RatioAtMost(1.0)),
        ),
        ("resume: request to reply", "cont", "resume_us", None),
        (
            "cheapest request on the same socket",
            "query-status",
            "status_us",
            None,
        ),
    ];
    for (name, peer, field, target) in parts {
        let peer_value = middle(&peers, field)?;
        figures.add(
            name,
            middle(&ours, field)?,
            "us (lab)",
            Some((&format!("QEMU {peer}"), peer_value)),
            target,
        );
    }
    Ok(())
}

/// Work under the pause of an apply: counted in the lab, and timed natively on the recorded guest.
pub(crate) fn work(figures: &mut Figures) -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    for stock in [LTS_6_1, NEWEST_6_12] {
        let dump = dir.path().join(format!("{}.core", stock.0));
        let counted = inside(&[
            "apply",
            stock.0,
            dump.to_str().ok_or("a temporary path is not UTF-8")?,
        ])?;
        let of = |name: &str| format!("apply {}: {name}", stock.0);
        let per_vcpu = number(&counted, "ioctls_per_vcpu")?;
        for (name, unit) in [
            ("bytes_read", "bytes"),
            ("bytes_written", "bytes"),
            ("stack_words", "words"),
            ("tasks", "tasks"),
        ] {
            figures.add(
                of(&name.replace('_', " ")),
                number(&counted, name)?,
                unit,
                None,
                None,
            );
        }
        figures.add(of("ioctls per vCPU"), per_vcpu, "ioctls", None, None);
        figures.add(
            of("pause"),
            number(&counted, "pause_us")?,
            "us (lab)",
            None,
            None,
        );
        recorded(figures, stock, &dump)?;
    }
    Ok(())
}

/// The same applies and reverts on the guest's recording, natively: nothing stops or goes there, so the rest of the pause is left.
fn recorded(figures: &mut Figures, stock: Stock, dump: &Path) -> Result<(), String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("the recorded guest of {}: {error}", stock.0);
    let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let image = Arc::new(unpack(stock)?);
    let dump = Dump::parse(Arc::new(read(dump)?)).map_err(|error| failed(&error))?;
    let kernel = Kernel::locate(image, &dump, dump.vcpus()).map_err(|error| failed(&error))?;
    let package = Package::parse(&read(&stock.edition("unix_ioctl_notty"))?)
        .map_err(|error| failed(&error))?;
    let mut guest = FakeGuest::from_dump(&dump, ARENA..Gpa(ARENA.0 + ARENA_LEN))
        .map_err(|error| failed(&error))?;
    drop(dump);
    let mut arena = Arena::new(&guest, &kernel).map_err(|error| failed(&error))?;
    let mut reports = Vec::new();
    for _ in 0..RECORDED_ROUNDS {
        let options = ApplyOptions {
            deadline: Instant::now() + Duration::from_secs(1),
            check_only: false,
            doing: &|_| (),
            written: &|| (),
            hook: &|_| {},
        };
        let request = Request::new(1, &package);
        let report = apply(&mut guest, &kernel, &mut arena, &request, &options)
            .map_err(|error| failed(&error))?;
        reports.push(report);
        revert(
            &mut guest,
            &kernel,
            &mut arena,
            &[1],
            Model::Immediate,
            &options,
        )
        .map_err(|error| failed(&error))?;
    }
    let middle = |of: &dyn Fn(&Report) -> u64| {
        median(reports.iter().map(|report| of(report) as f64).collect())
    };
    let tasks = middle(&|report| report.tasks)?;
    let name = format!(
        "apply {}: work under the pause, natively, {tasks} tasks",
        stock.0
    );
    figures.add(
        name,
        middle(&|report| report.pause_us)?,
        "us",
        None,
        Some(Target::AtMost(PAUSE_WORK_US)),
    );
    Ok(())
}

fn unpack(stock: Stock) -> Result<Image, String> {
    let path = stock.file("vmlinuz");
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = fs::read(&path).map_err(|error| failed(&error))?;
    let vmlinux = Payload::unpack(&file).map_err(|error| failed(&error))?;
    Image::parse(Arc::new(vmlinux)).map_err(|error| failed(&error))
}

/// Anonymous memory of the VMM beside guest memory.
pub(crate) fn memory(figures: &mut Figures) -> Result<(), String> {
    let measured = inside(&["memory"])?;
    let mib = |name: &str| number(&measured, name).map(|kib| kib / 1024.0);
    let parts = [
        ("memory: VMM after boot", "booted_kib", MEMORY_MIB),
        (
            "memory: with the kernel's index",
            "indexed_kib",
            MEMORY_INDEXED_MIB,
        ),
        (
            "memory: highest while indexing and applying",
            "peak_kib",
            MEMORY_INDEXED_MIB,
        ),
    ];
    for (name, field, bound) in parts {
        figures.add(name, mib(field)?, "MiB", None, Some(Target::AtMost(bound)));
    }
    Ok(())
}
