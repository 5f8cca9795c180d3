//! What of a recorded guest can be shown, or compared with what the guest said itself.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::{Gpa, Gva, LinkAddr};
use patcher::guest::dump::Dump;
use patcher::guest::{GuestError, ReadPhys, Registers, core};
use patcher::kernel::locate::Kernel;
use patcher::kernel::names::Names;
use patcher::kernel::{changed, log, modules};

use super::Options;

/// Shows what `options` ask for, and says whether they asked for anything that is shown here.
pub(super) fn show(
    options: &Options,
    kernel: &Kernel,
    dump: &Dump,
) -> Result<bool, Box<dyn Error>> {
    let mut shown = false;
    if let Some(path) = &options.log {
        show_log(kernel, dump, path)?;
        shown = true;
    }
    if let Some(path) = &options.modules {
        show_modules(kernel, dump, path)?;
        shown = true;
    }
    if let Some(path) = &options.write {
        write_core(kernel, dump, path)?;
        shown = true;
    }
    if options.changed {
        show_changed(kernel, dump)?;
        if options.flip > 0 {
            flip(kernel, dump, options.flip)?;
        }
        shown = true;
    }
    if !options.names.is_empty() {
        show_names(kernel, dump, &options.names)?;
        shown = true;
    }
    for name in &options.types {
        show_type(kernel, name)?;
        shown = true;
    }
    Ok(shown)
}

/// `struct task_struct` as C, or where `task_struct.thread.sp` lies.
fn show_type(kernel: &Kernel, name: &str) -> Result<(), Box<dyn Error>> {
    let types = kernel.image().types();
    let start = Instant::now();
    if let Some((of, path)) = name.split_once('.') {
        let member = types.member(of, path)?;
        println!("{name}: {member:?} ({:?})", start.elapsed());
        return Ok(());
    }
    for layout in types.layouts(name)? {
        print!("{layout}");
    }
    println!("{:?}", start.elapsed());
    Ok(())
}

/// Writes the guest as a core file anew.
fn write_core(kernel: &Kernel, dump: &Dump, path: &str) -> Result<(), Box<dyn Error>> {
    let memory: Vec<Range<Gpa>> = dump.memory().collect();
    let own = kernel.vmcoreinfo(dump)?;
    let start = Instant::now();
    let scanned = core::find_vmcoreinfo(dump, &memory);
    println!(
        "VMCOREINFO of {:?} bytes; by scanning {} ({:?})",
        own.as_ref().map(Vec::len),
        if scanned == own {
            "the same"
        } else {
            "DIFFERENT"
        },
        start.elapsed()
    );
    let start = Instant::now();
    let mut file = BufWriter::new(File::create(path)?);
    let contents = core::Contents {
        memory: &memory,
        arena: &dump.arena().unwrap_or(Gpa(0)..Gpa(0)),
        vmcoreinfo: own.as_deref(),
    };
    core::write_contents(&mut file, dump, &contents)?;
    println!("written in {:?}", start.elapsed());
    let again = Dump::parse(Arc::new(std::fs::read(path)?))?;
    let same = again.vcpus() == dump.vcpus() && again.memory().eq(dump.memory());
    println!("read back: {}", if same { "the same" } else { "DIFFERENT" });
    Ok(())
}

/// All text, compared with what must be there.
fn show_changed(kernel: &Kernel, dump: &Dump) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let summary = changed::compare(kernel, dump, &[], |_| ())?;
    println!(
        "{} bytes of text compared in {:?}",
        summary.compared,
        start.elapsed()
    );
    for (cause, count) in &summary.causes {
        println!("{cause:?}: {} places, {} bytes", count.places, count.bytes);
    }
    for change in summary.unexplained.iter().take(40) {
        println!("{change:02x?}");
    }
    Ok(())
}

/// A guest with some bits of its text flipped.
struct Flipped<'a> {
    dump: &'a Dump,
    at: BTreeMap<Gpa, u8>,
}

impl ReadPhys for Flipped<'_> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.dump.read_phys(at, buf)?;
        let end = Gpa(at.0 + buf.len() as u64);
        for (place, bit) in self.at.range(at..end) {
            buf[usize::try_from(place.0 - at.0).unwrap_or(0)] ^= 1 << bit;
        }
        Ok(())
    }
}

/// Every bit that is flipped somewhere in the text is noticed: the comparison names it, or refuses.
fn flip(kernel: &Kernel, dump: &Dump, count: u64) -> Result<(), Box<dyn Error>> {
    let text = kernel
        .image()
        .sections()
        .iter()
        .find(|section| section.name == ".text");
    let text = text.ok_or("no .text")?.range.clone();
    let step = (text.end.0 - text.start.0) / count.max(1);
    let (mut guest, mut flipped) = (
        Flipped {
            dump,
            at: BTreeMap::new(),
        },
        Vec::new(),
    );
    let mut random = 12345_u64;
    for index in 0..count {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let at = kernel.runtime(LinkAddr(
            text.start.0 + index * step + (random >> 33) % step,
        ));
        guest
            .at
            .insert(kernel.translate(dump, at)?, u8::try_from(random >> 61)?);
        flipped.push(at);
    }
    let mut seen = Vec::new();
    let result = changed::compare(kernel, &guest, &[], |change| {
        if change.cause == changed::Cause::Unexplained {
            seen.push(change.range.clone());
        }
    });
    let missed: Vec<Gva> = flipped
        .into_iter()
        .filter(|at| !seen.iter().any(|range| range.contains(at)))
        .collect();
    match result {
        Ok(_) => println!(
            "{count} bits flipped, {} not noticed: {:?}",
            missed.len(),
            missed.iter().take(9).collect::<Vec<_>>()
        ),
        Err(error) => println!("{count} bits flipped, refused: {error}"),
    }
    Ok(())
}

/// What is at an address, and which symbols a name has.
fn show_names(kernel: &Kernel, dump: &Dump, asked: &[String]) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let names = Names::read(kernel, dump)?;
    println!("names read in {:?}", start.elapsed());
    for name in asked {
        let start = Instant::now();
        if let Some(hex) = name.strip_prefix("0x") {
            println!("{name}: {:?}", names.at(Gva(u64::from_str_radix(hex, 16)?)));
        } else {
            println!("{name}: {:#x?}", names.find(name));
        }
        println!("{:?}", start.elapsed());
    }
    Ok(())
}

/// The lines that the guest's console shows of its log.
fn console_lines(log: &log::Log, level: u8) -> Vec<String> {
    let records = log
        .records
        .iter()
        .filter(|record| record.level < level && !record.open);
    let lines = records.flat_map(|record| {
        let microseconds = record.nanoseconds / 1000;
        let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
        let prefix = format!("[{seconds:5}.{rest:06}] ");
        let lines: Vec<String> = record
            .text
            .split('\n')
            .map(|line| format!("{prefix}{line}"))
            .collect();
        lines
    });
    lines.collect()
}

fn show_log(kernel: &Kernel, dump: &Dump, path: &str) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let log = log::read(kernel, dump)?;
    let took = start.elapsed();
    let level = log.console_level.unwrap_or(8);
    println!(
        "log: {} records, {} bytes, unwritten {:?}, console level {level}, read in {took:?}",
        log.records.len(),
        log.records
            .iter()
            .map(|record| record.text.len())
            .sum::<usize>(),
        log.unwritten
    );
    if path == "-" {
        console_lines(&log, 8)
            .iter()
            .for_each(|line| println!("{line}"));
        return Ok(());
    }
    let text = std::fs::read(path)?;
    let text = String::from_utf8_lossy(&text);
    let guest: Vec<&str> = text
        .lines()
        .map(|line| line.trim_end_matches('\r'))
        .filter(|line| line.starts_with('[') && line.get(13..15) == Some("] "))
        .collect();
    let ours = console_lines(&log, level);
    let last = &ours[ours.len().saturating_sub(guest.len())..];
    println!(
        "{} lines on the console, {} here: {}",
        guest.len(),
        ours.len(),
        if last == guest {
            "the same"
        } else {
            "DIFFERENT"
        }
    );
    for (guest, ours) in guest
        .iter()
        .zip(last)
        .filter(|(guest, ours)| guest != ours)
        .take(3)
    {
        println!("  there {guest}\n  here  {ours}");
    }
    Ok(())
}

fn show_modules(kernel: &Kernel, dump: &Dump, path: &str) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let modules = modules::read(kernel, dump)?;
    let mut ours = Vec::new();
    for module in &modules {
        for symbol in module.symbols(kernel, dump)? {
            ours.push(format!(
                "{:016x} {} {}\t[{}]",
                symbol.address.0,
                char::from(symbol.kind),
                symbol.name,
                module.name
            ));
        }
    }
    println!(
        "{} modules, {} symbols, read in {:?}",
        modules.len(),
        ours.len(),
        start.elapsed()
    );
    for module in &modules {
        println!("{}", modules_line(module));
    }
    if path == "-" {
        return Ok(());
    }
    let text = std::fs::read_to_string(path)?;
    // What follows the modules' symbols there are the kernel's own makings, in brackets of double underscores.
    let guest: Vec<&str> = text
        .lines()
        .filter(|line| {
            line.contains('[') && !line.contains("\t[__builtin__") && !line.contains("\t[bpf]")
        })
        .collect();
    println!(
        "{} symbols of modules in the guest, {} here: {}",
        guest.len(),
        ours.len(),
        if guest == ours {
            "the same"
        } else {
            "DIFFERENT"
        }
    );
    for (guest, ours) in guest
        .iter()
        .zip(&ours)
        .filter(|(guest, ours)| guest != ours)
        .take(5)
    {
        println!("  there {guest}\n  here  {ours}");
    }
    Ok(())
}

/// The line of `/proc/modules`.
fn modules_line(module: &modules::Module) -> String {
    let mut users: String = module.users.iter().map(|user| format!("{user},")).collect();
    if module.permanent {
        users.push_str("[permanent],");
    }
    if users.is_empty() {
        users.push('-');
    }
    let state = match module.state {
        modules::ModuleState::Live => "Live",
        modules::ModuleState::Coming => "Loading",
        modules::ModuleState::Going => "Unloading",
        modules::ModuleState::Unformed => "Unformed",
    };
    let text = module.parts.first().map_or(0, |(_, range)| range.start.0);
    let taints = if module.taints.is_empty() {
        String::new()
    } else {
        format!(" ({})", module.taints)
    };
    let (name, size, references) = (&module.name, module.size, module.references);
    format!("{name} {size} {references} {users} {state} {text:#x}{taints}")
}
