//! Applies an edition to a recorded guest and takes it back, over and over, and prints what the pauses cost:
//! `apply_recorded BZIMAGE CORE PACKAGE [TIMES]`. The guest's memory is a copy; the recording stays as it is.
#![expect(clippy::print_stdout, reason = "an example reports there")]

use std::error::Error;
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
use patcher::observe::verify;

/// Where a recording without an arena gets one: above the memory of any small guest.
const ARENA: Gpa = Gpa(1 << 36);
const ARENA_LEN: u64 = 6 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (paths, times) = match arguments.as_slice() {
        [image, core, package] => ([image, core, package], 100),
        [image, core, package, times] => ([image, core, package], times.parse()?),
        _ => return Err("usage: apply_recorded BZIMAGE CORE PACKAGE [TIMES]".into()),
    };
    let [image, core, package] = paths.map(std::fs::read);
    let kernel_image = Arc::new(Image::parse(Arc::new(Payload::unpack(&image?)?))?);
    let dump = Dump::parse(Arc::new(core?))?;
    let mut guest = FakeGuest::from_dump(&dump, ARENA..Gpa(ARENA.0 + ARENA_LEN))?;
    let kernel = Kernel::locate(kernel_image, &dump, dump.vcpus())?;
    drop(dump);
    let package = Package::parse(&package?)?;
    let mut arena = Arena::new(&guest, &kernel)?;
    let before = guest.memory().to_vec();

    let mut reports = Vec::new();
    for _ in 0..times {
        let options = ApplyOptions {
            deadline: Instant::now() + Duration::from_secs(1),
            check_only: false,
            doing: &|what| println!("{what}"),
            written: &|| (),
            hook: &|_| {},
        };
        let request = Request::new(1, &package);
        let report = apply(&mut guest, &kernel, &mut arena, &request, &options)?;
        let placed = arena.holds.placed.get(&1).ok_or("nothing was applied")?;
        let linked = placed.linked.clone();
        let observed = verify(&guest, &kernel, &arena.holds, 1);
        if !observed.differences.is_empty() {
            return Err(format!("{:x?}", observed.differences).into());
        }
        if reports.is_empty() {
            for redirection in &linked.redirections {
                println!("{redirection:#x?}");
            }
            println!(
                "code at {:#x}, {} bytes; data at {:#x}, {} bytes",
                linked.code.at,
                linked.code.bytes.len(),
                linked.data.at,
                linked.data.bytes.len()
            );
        }
        reports.push(report);
        reports.push(revert(
            &mut guest,
            &kernel,
            &mut arena,
            &[1],
            Model::Immediate,
            &options,
        )?);
    }
    print_report(&reports);
    let changed: Vec<String> = before
        .iter()
        .zip(guest.memory())
        .flat_map(|(before, after)| {
            let differs = before
                .bytes
                .iter()
                .zip(&after.bytes)
                .enumerate()
                .filter(|(_, (before, after))| before != after);
            differs.map(|(offset, _)| format!("{:#x}", (before.at.0 + offset as u64) & !0xfff))
        })
        .collect();
    let pages: std::collections::BTreeSet<String> = changed.into_iter().collect();
    println!(
        "pages that differ after the last revert (the arena's mapping, and the arena): {pages:?}"
    );
    Ok(())
}

/// A line of the table: its name and the value that it shows.
type Row<'a> = (&'a str, &'a dyn Fn(&Report) -> u64);

/// The median of each part, over applies and reverts.
fn print_report(reports: &[Report]) {
    let median = |of: &dyn Fn(&Report) -> u64| {
        let mut values: Vec<u64> = reports.iter().map(of).collect();
        values.sort_unstable();
        (
            values.get(values.len() / 2).copied().unwrap_or_default(),
            values.last().copied().unwrap_or_default(),
        )
    };
    let rows: [Row<'_>; 11] = [
        ("pauses", &|report| report.pauses),
        ("pause, us", &|report| report.pause_us),
        ("  stop", &|report| report.phases.stop),
        ("  prove", &|report| report.phases.prove),
        ("  scan", &|report| report.phases.scan),
        ("  verify", &|report| report.phases.verify),
        ("  write", &|report| report.phases.write),
        ("  resume", &|report| report.phases.resume),
        ("tasks", &|report| report.tasks),
        ("stack words", &|report| report.stack_words),
        ("bytes read", &|report| report.bytes_read),
    ];
    println!("{:>12} {:>10} {:>10}", "", "median", "worst");
    for (name, of) in rows {
        let (median, worst) = median(of);
        println!("{name:>12} {median:>10} {worst:>10}");
    }
}
