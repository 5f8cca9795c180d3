//! The parts that need guests. Each prints one JSON object of numbers for the part outside.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::api::Api;
use tests::client::Client;
use tests::stock::{LTS_6_1, Stock, named};

use crate::figures::median;
use crate::machine::{Control, Kind, Machine, Request};
use crate::pause;
use crate::redirect;

/// Requests of each kind in one sample.
const REQUESTS: usize = 50;
/// Applies in one sample.
const APPLIES: usize = 20;
/// Mappings of at least this length are the guest's memory.
const GUEST_MAPPING_KIB: u64 = 128 << 10;

/// Measures one part, in the lab or on hardware.
pub(crate) fn measure(part: &str, args: &[&str]) -> Result<Value, String> {
    match (part, args) {
        ("boot", ["exopatch", name]) => boot(Kind::Exopatch, named(name)?),
        ("boot", ["qemu", name]) => boot(Kind::QemuMicrovm, named(name)?),
        ("pause", ["exopatch"]) => bare_pause(Kind::Exopatch),
        ("pause", ["qemu"]) => bare_pause(Kind::QemuMicrovm),
        ("apply", [name, dump]) => apply(named(name)?, dump),
        ("memory", []) => memory(),
        ("updates", [name, vcpus, packages @ ..]) => {
            let vcpus = vcpus.parse().map_err(|_| format!("{vcpus} vCPUs"))?;
            pause::measure(named(name)?, vcpus, packages)
        }
        ("redirect", [name]) => redirect::measure(named(name)?),
        _ => Err(format!("there is no part {part} {args:?}")),
    }
}

fn boot(kind: Kind, stock: Stock) -> Result<Value, String> {
    let machine = Machine::boot(kind, stock, 1, "")?;
    Ok(json!({ "boot_s": machine.boot.as_secs_f64() }))
}

fn bare_pause(kind: Kind) -> Result<Value, String> {
    let machine = Machine::boot(kind, LTS_6_1, 2, "exopatch.run=probe,busy,2")?;
    let mut control = machine.connect()?;
    let (mut status, mut pauses, mut resumes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REQUESTS {
        let ask = |control: &mut Control, request, times: &mut Vec<f64>| -> Result<(), String> {
            times.push(control.request(request)?);
            Ok(())
        };
        ask(&mut control, Request::Status, &mut status)?;
        ask(&mut control, Request::Pause, &mut pauses)?;
        ask(&mut control, Request::Resume, &mut resumes)?;
        // The guest gets to run between pauses, as in use.
        thread::sleep(Duration::from_millis(5));
    }
    Ok(
        json!({ "status_us": median(status)?, "pause_us": median(pauses)?, "resume_us": median(resumes)? }),
    )
}

/// Applies and reverts, and leaves a recording of the guest for the native part.
fn apply(stock: Stock, dump: &str) -> Result<Value, String> {
    let machine = Machine::boot(Kind::Exopatch, stock, 2, "exopatch.run=probe,answers,2")?;
    // A try before this one may have got as far as that.
    if Path::new(dump).exists() {
        fs::remove_file(dump).map_err(|error| format!("{dump}: {error}"))?;
    }
    let recorded = Client::new(machine.control().to_owned()).call(&["vm", "dump", dump]);
    if recorded.status != 0 {
        return Err(format!("the recording failed: {recorded:?}"));
    }
    let package = stock.edition("unix_ioctl_notty");
    let package = fs::read(&package).map_err(|error| format!("{}: {error}", package.display()))?;
    let mut api = Api::connect(machine.control())?;
    let (mut reports, mut ioctls) = (Vec::new(), Vec::new());
    for _ in 0..APPLIES {
        let update = api.call("POST /v1/updates?deadline_ms=20000", &package)?;
        reports.push(update["applied"].clone());
        let id = &update["id"];
        let revert = format!("POST /v1/updates/{id}/revert?deadline_ms=20000");
        api.call(&revert, b"")?;
        // The same stop by itself tells what each vCPU's thread did for it.
        let paused = api.call("POST /v1/vm/pause", b"")?;
        let each = paused["stop"]["ioctls"].as_array().ok_or("no ioctls")?;
        ioctls.extend(each.iter().filter_map(Value::as_f64));
        api.call("POST /v1/vm/resume", b"")?;
    }
    let middle = |name: &str| {
        let values = reports.iter().filter_map(|report| report[name].as_f64());
        median(values.collect()).map_err(|why| format!("{name}: {why}"))
    };
    let mut counts = serde_json::Map::new();
    for name in [
        "pauses",
        "pause_us",
        "bytes_read",
        "bytes_written",
        "stack_words",
        "tasks",
    ] {
        counts.insert(name.to_owned(), json!(middle(name)?));
    }
    counts.insert("ioctls_per_vcpu".to_owned(), json!(median(ioctls)?));
    Ok(Value::Object(counts))
}

/// Anonymous memory of the process beside the guest's: after boot, with the kernel's index loaded, and at the highest.
fn memory() -> Result<Value, String> {
    let machine = Machine::boot(Kind::Exopatch, LTS_6_1, 2, "")?;
    let booted = anonymous_kib(machine.pid())?;
    let client = Client::new(machine.control().to_owned());
    let package = LTS_6_1.edition("unix_ioctl_notty");
    let applying = thread::spawn(move || {
        client.call(&["update", "apply", package.to_str().unwrap_or_default()])
    });
    let mut peak = booted;
    let end = Instant::now() + Duration::from_secs(60);
    while !applying.is_finished() && Instant::now() < end {
        peak = peak.max(anonymous_kib(machine.pid())?);
    }
    let reply = applying.join().map_err(|_| "the client panicked")?;
    if reply.status != 0 {
        return Err(format!("the apply failed: {} {}", reply.json, reply.stderr));
    }
    let indexed = anonymous_kib(machine.pid())?;
    Ok(json!({ "booted_kib": booted, "indexed_kib": indexed, "peak_kib": peak.max(indexed) }))
}

/// Sums `Anonymous` over the mappings that are too short to be guest memory.
fn anonymous_kib(pid: u32) -> Result<u64, String> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(Path::new(&path)).map_err(|error| format!("{path}: {error}"))?;
    let field = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?
            .trim()
            .split(' ')
            .next()?
            .parse()
            .ok()
    };
    let (mut size, mut sum) = (0, 0);
    for line in text.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        }
        if let Some(kib) = field(line, "Anonymous:").filter(|_| size < GUEST_MAPPING_KIB) {
            sum += kib;
        }
    }
    Ok(sum)
}
