//! Looks into a recorded guest: its kernel, tasks, stacks and text, and how long looking took.
//!
//! `cargo run --release --example inspect -- --kernel BZIMAGE --dump CORE [--tasks] [--symbols FILE] [--text N] [--stacks FILE]
//! [--corrupt N] [--brief] [--log FILE] [--modules FILE] [--type NAME] [--name NAME] [--changed] [--flip N] [--write CORE]
//! [FUNCTION...]`
//!
//! `--symbols` compares every symbol with a copy of the guest's `/proc/kallsyms`, `--text` compares the first 16 bytes
//! after the fentry site of every Nth function with the guest's memory, `--stacks` looks for every frame of a copy of the guest's
//! `/proc/PID/stack` (each after a line `STACK PID`), `--corrupt` looks N times at damaged memory. For each FUNCTION
//! it says who is in it. `--brief` says only that, and where the vCPUs are. `--log` compares the guest's log with a copy of its
//! console, `--modules` the modules' symbols with a copy of its `/proc/kallsyms`; `-` instead of a file shows them. `--type` shows
//! a type as C, or where a member lies (`task_struct.thread.sp`), `--name` all symbols of a name, or what is at an address (`0x...`),
//! `--changed` compares all text with what must be there, `--flip` the same with N bits flipped.
//! `--write` writes the guest as a core file anew.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

mod views;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::{Gpa, Gva, LinkAddr};
use patcher::guest::dump::Dump;
use patcher::guest::{GuestError, ReadPhys, Registers};
use patcher::kernel::arena::ArenaLayout;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::names::Names;
use patcher::kernel::payload::Payload;
use patcher::kernel::sites::SiteKind;
use patcher::kernel::stack::{ScanError, stack_words};
use patcher::kernel::tasks::Tasks;
use patcher::kernel::text::TextError;
use patcher::kernel::{changed, log};

const ROUNDS: usize = 101;

#[derive(Default)]
struct Options {
    kernel: String,
    dump: String,
    tasks: bool,
    brief: bool,
    symbols: Option<String>,
    text: Option<usize>,
    stacks: Option<String>,
    corrupt: u64,
    log: Option<String>,
    modules: Option<String>,
    types: Vec<String>,
    names: Vec<String>,
    changed: bool,
    write: Option<String>,
    flip: u64,
    functions: Vec<String>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--kernel" => options.kernel = value()?,
            "--dump" => options.dump = value()?,
            "--symbols" => options.symbols = Some(value()?),
            "--text" => options.text = Some(value()?.parse()?),
            "--stacks" => options.stacks = Some(value()?),
            "--corrupt" => options.corrupt = value()?.parse()?,
            "--log" => options.log = Some(value()?),
            "--modules" => options.modules = Some(value()?),
            "--changed" => options.changed = true,
            "--flip" => options.flip = value()?.parse()?,
            "--write" => options.write = Some(value()?),
            "--name" => options.names.push(value()?),
            "--type" => options.types.push(value()?),
            "--brief" => options.brief = true,
            "--tasks" => options.tasks = true,
            _ => options.functions.push(arg),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let vmlinux = Payload::unpack(&std::fs::read(&options.kernel)?)?;
    let image = Arc::new(Image::parse(Arc::new(vmlinux))?);
    let dump = Dump::parse(Arc::new(std::fs::read(&options.dump)?))?;
    let kernel = Kernel::locate(image.clone(), &dump, dump.vcpus())?;
    if views::show(&options, &kernel, &dump)? {
        return Ok(());
    }
    if options.brief {
        return brief(&kernel, &dump, &options.functions);
    }
    println!(
        "slide {:#x}, page tables {:?}",
        kernel.slide(),
        kernel.tables()
    );
    println!(
        "{:?}, text in flux: {:?}",
        kernel.boot_state(&dump)?,
        kernel.text_in_flux(&dump)?
    );
    println!("returns: {:x?}", kernel.return_form(&dump)?);
    let everything = Gva(0)..Gva(u64::MAX);
    println!("kprobes: {:?}", kernel.kprobes_in(&dump, &[everything])?);
    println!(
        "arena: {:?}",
        ArenaLayout::plan(&kernel, &dump, &(Gpa(0x1_0000_0000)..Gpa(0x1_0060_0000)))?.code
    );
    timings(&kernel, &dump)?;
    let tasks = Tasks::read(&kernel, &dump)?;
    println!(
        "{} tasks, {} CPUs, {} stacks without a task",
        tasks.tasks.len(),
        tasks.cpus.len(),
        tasks.unowned.len()
    );
    if options.tasks {
        for task in &tasks.tasks {
            println!(
                "TASK {} ({}) cpu {:?} sp {} in {:?}",
                task.pid,
                task.name(),
                task.cpu,
                task.saved_sp,
                task.stack
            );
        }
        println!("{:?}", tasks.cpus);
    }
    if let Some(path) = &options.symbols {
        compare_symbols(&kernel, path)?;
    }
    if let Some(step) = options.text {
        compare_text(&kernel, &dump, step)?;
    }
    if let Some(path) = &options.stacks {
        compare_stacks(&kernel, &dump, path)?;
    }
    corrupt(&kernel, &dump, options.corrupt);
    for name in &options.functions {
        let symbol = image.symbols().lookup(name)?;
        let start = kernel.runtime(symbol.address);
        let forbidden = start
            .range(symbol.size)
            .ok_or("a function at the end of memory")?;
        println!(
            "{name}: {:?}",
            stack_words(&kernel, &dump, dump.vcpus(), &[forbidden])
        );
    }
    Ok(())
}

/// One line for each fact, the same for the same fact, to be counted over many recordings.
fn brief(kernel: &Kernel, dump: &Dump, functions: &[String]) -> Result<(), Box<dyn Error>> {
    let tasks = Tasks::read(kernel, dump)?;
    for vcpu in dump.vcpus() {
        let sp = Gva(vcpu.rsp());
        let on = |stack: &Range<Gva>| stack.start <= sp && sp <= stack.end;
        let place = match vcpu.cpl {
            3 => "user",
            _ if tasks
                .tasks
                .iter()
                .any(|task| on(&task.stack) && task.cpu.is_some()) =>
            {
                "current task"
            }
            _ if tasks.tasks.iter().any(|task| on(&task.stack)) => "other task",
            _ if tasks.cpus.iter().any(|cpu| on(&cpu.irq_stack)) => "irq stack",
            _ if tasks
                .cpus
                .iter()
                .any(|cpu| cpu.exception_stacks.iter().any(on)) =>
            {
                "exception stack"
            }
            _ if tasks.cpus.iter().any(|cpu| on(&cpu.entry_stack)) => "entry stack",
            _ if sp.0 >> 63 == 0 => "user stack in the kernel",
            _ => "elsewhere",
        };
        println!("BRIEF vCPU on {place}");
    }
    println!("BRIEF text in flux: {:?}", kernel.text_in_flux(dump)?);
    println!("BRIEF {} stacks without a task", tasks.unowned.len());
    for name in functions {
        let symbol = kernel.image().symbols().lookup(name)?;
        let forbidden = kernel
            .runtime(symbol.address)
            .range(symbol.size)
            .ok_or("at the end of memory")?;
        match stack_words(kernel, dump, dump.vcpus(), &[forbidden]) {
            Ok(_) => println!("BRIEF {name}: free"),
            Err(ScanError::Hit(_)) => println!("BRIEF {name}: taken"),
            Err(other) => println!("BRIEF {name}: {other}"),
        }
    }
    Ok(())
}

/// The median time of several rounds.
fn median<T>(
    mut work: impl FnMut() -> Result<T, Box<dyn Error>>,
) -> Result<Duration, Box<dyn Error>> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[ROUNDS / 2])
}

fn timings(kernel: &Kernel, dump: &Dump) -> Result<(), Box<dyn Error>> {
    let image = kernel.image();
    println!(
        "locate {:?}",
        median(|| Ok(Kernel::locate(image.clone(), dump, dump.vcpus())?))?
    );
    println!(
        "prove_same {:?}",
        median(|| Ok(kernel.prove_same(dump, dump.vcpus())?))?
    );
    println!(
        "text_in_flux {:?}",
        median(|| Ok(kernel.text_in_flux(dump)?))?
    );
    println!("tasks {:?}", median(|| Ok(Tasks::read(kernel, dump)?))?);
    let forbidden = [Gva(0xffff_ffff_ffff_f000)..Gva(0xffff_ffff_ffff_f008)];
    let scan = stack_words(kernel, dump, dump.vcpus(), &forbidden);
    println!(
        "scan {:?}: {scan:?}",
        median(|| Ok(stack_words(kernel, dump, dump.vcpus(), &forbidden)?))?
    );
    Ok(())
}

fn compare_symbols(kernel: &Kernel, path: &str) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(path)?;
    let mut guest = Vec::new();
    for line in text.lines().filter(|line| !line.contains('[')) {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next().ok_or("an empty line")?, 16)?;
        guest.push((
            address,
            words.next().ok_or("no kind")?.to_owned(),
            words.next().ok_or("no name")?.to_owned(),
        ));
    }
    let mut ours: Vec<(u64, String, String)> = Vec::new();
    for symbol in kernel.image().symbols().iter() {
        let address = if symbol.percpu {
            symbol.address.0
        } else {
            kernel.runtime(symbol.address).0
        };
        ours.push((address, char::from(symbol.kind).to_string(), symbol.name));
    }
    let same = guest == ours;
    println!(
        "{} symbols in the guest, {} here: {}",
        guest.len(),
        ours.len(),
        if same { "the same" } else { "DIFFERENT" }
    );
    for (guest, ours) in guest
        .iter()
        .zip(&ours)
        .filter(|(guest, ours)| guest != ours)
        .take(5)
    {
        println!("  {guest:x?} there, {ours:x?} here");
    }
    // Every address is found: at, in the middle of, and at the last byte of each symbol.
    let (mut tried, mut wrong) = (0, 0);
    for symbol in kernel
        .image()
        .symbols()
        .iter()
        .filter(|symbol| symbol.size > 0)
    {
        for offset in [0, symbol.size / 2, symbol.size - 1] {
            let at = LinkAddr(symbol.address.0 + offset);
            let found = kernel.image().symbols().containing(at);
            tried += 1;
            wrong += u32::from(found.is_none_or(|(found, at)| {
                (found.address, found.size, at) != (symbol.address, symbol.size, offset)
            }));
        }
    }
    println!("{tried} addresses looked up, {wrong} wrong");
    // Every name is found by itself, at its address.
    let symbols = kernel.image().symbols();
    let mut positions: BTreeMap<&str, usize> = BTreeMap::new();
    for (address, _, name) in &ours {
        let position = positions.entry(name).or_default();
        *position += 1;
        let found = symbols.lookup_nth(name, *position)?;
        let at = if found.percpu {
            found.address.0
        } else {
            kernel.runtime(found.address).0
        };
        if at != *address {
            println!("  {name} number {position}: {at:#x} instead of {address:#x}");
        }
    }
    Ok(())
}

fn compare_text(kernel: &Kernel, dump: &Dump, step: usize) -> Result<(), Box<dyn Error>> {
    let (mut same, mut different, mut undecidable) = (0, 0, BTreeMap::new());
    let text = kernel
        .image()
        .sections()
        .iter()
        .find(|section| section.name == ".text")
        .ok_or("no .text")?;
    let everything = LinkAddr(0)..LinkAddr(u64::MAX);
    for site in kernel
        .image()
        .shipped()?
        .sites()
        .first(SiteKind::Fentry, &everything, usize::MAX)
        .into_iter()
        .step_by(step)
    {
        if !text.range.contains(&site.range.start) {
            continue;
        }
        let at = kernel.runtime(site.range.end);
        match kernel.expected_text(at..Gva(at.0 + 16)) {
            Ok(expected) => match kernel.differs(dump, at, &expected)? {
                None => same += 1,
                Some(byte) => {
                    different += 1;
                    let mut live = [0; 16];
                    kernel.read(dump, at, &mut live)?;
                    println!(
                        "  {at} differs at {byte}: {expected:02x?} expected, {live:02x?} there"
                    );
                }
            },
            Err(TextError::Undecidable { site, .. }) => {
                *undecidable.entry(format!("{:?}", site.kind)).or_insert(0) += 1
            }
            Err(other) => return Err(other.into()),
        }
    }
    println!(
        "text after fentry: {same} as expected, {different} different, undecidable: {undecidable:?}"
    );
    Ok(())
}

/// Every frame that the guest reported must be found, on the stack of the task that it was reported of.
fn compare_stacks(kernel: &Kernel, dump: &Dump, path: &str) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(path)?;
    let (mut pid, mut found, mut missing) = (0, 0, 0);
    let tasks = Tasks::read(kernel, dump)?;
    for line in text.lines() {
        if let Some(number) = line.strip_prefix("STACK ") {
            let Ok(number) = number.trim().parse() else {
                continue;
            };
            pid = number;
            if !tasks.tasks.iter().any(|task| task.pid == pid) {
                println!("  task {pid} is not there (any more)");
            }
        }
        let Some((name, offset)) = line
            .strip_prefix("[<0>] ")
            .and_then(|frame| frame.split_once("+0x"))
        else {
            continue;
        };
        let offset = u64::from_str_radix(offset.split('/').next().unwrap_or(offset), 16)?;
        let positions =
            (1..).map_while(|position| kernel.image().symbols().lookup_nth(name, position).ok());
        let forbidden: Vec<Range<Gva>> = positions
            .map(|symbol| Gva(kernel.runtime(symbol.address).0 + offset))
            .map(|at| at..Gva(at.0 + 1))
            .collect();
        if words_of(kernel, dump, &tasks, pid)?
            .iter()
            .any(|word| forbidden.iter().any(|range| range.contains(word)))
        {
            found += 1;
        } else {
            missing += 1;
            println!("  {line} of task {pid} was not found");
        }
    }
    println!("frames of /proc/PID/stack: {found} found, {missing} not");
    Ok(())
}

/// The words above the saved stack pointer of task `pid`.
fn words_of(
    kernel: &Kernel,
    dump: &Dump,
    tasks: &Tasks,
    pid: u32,
) -> Result<Vec<Gva>, Box<dyn Error>> {
    let Some(task) = tasks.tasks.iter().find(|task| task.pid == pid && pid != 0) else {
        return Ok(Vec::new());
    };
    let len = task
        .stack
        .end
        .offset_from(task.saved_sp)
        .ok_or("a stack pointer above its stack")?;
    let mut bytes = vec![0; usize::try_from(len)?];
    kernel.read(dump, task.saved_sp, &mut bytes)?;
    Ok(bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| Gva(u64::from_le_bytes(*word)))
        .collect())
}

/// A guest whose memory lies: now and then a word is another word of what was read, or its neighbour.
struct Corrupt<'a> {
    dump: &'a Dump,
    seed: Cell<u64>,
}

impl ReadPhys for Corrupt<'_> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        self.dump.read_phys(at, buf)?;
        let seed = self
            .seed
            .get()
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.seed.set(seed);
        let random = seed >> 33;
        if random.is_multiple_of(400) && buf.len() >= 8 {
            let word = usize::try_from(random >> 9).unwrap_or(0) % (buf.len() / 8) * 8;
            let change: u64 = match random >> 9 & 3 {
                0 => 0,
                1 => seed,
                2 => u64::from_le_bytes(buf[..8].try_into().unwrap_or_default()),
                _ => {
                    u64::from_le_bytes(buf[word..word + 8].try_into().unwrap_or_default())
                        ^ 1 << (random >> 12 & 63)
                }
            };
            buf[word..word + 8].copy_from_slice(&change.to_le_bytes());
        }
        Ok(())
    }
}

/// Whatever a guest's memory holds, looking ends, soon.
fn corrupt(kernel: &Kernel, dump: &Dump, rounds: u64) {
    type Look = fn(&Kernel, &Corrupt<'_>) -> Result<(), String>;
    fn end<T, E: ToString>(result: Result<T, E>) -> Result<(), String> {
        result.map(drop).map_err(|error| error.to_string())
    }
    let looks: [(&str, Look); 4] = [
        ("stacks", |kernel, guest| {
            let forbidden = [Gva(0xffff_ffff_ffff_f000)..Gva(0xffff_ffff_ffff_f008)];
            end(stack_words(kernel, guest, guest.dump.vcpus(), &forbidden))
        }),
        ("names and modules", |kernel, guest| {
            end(Names::read(kernel, guest))
        }),
        ("log", |kernel, guest| end(log::read(kernel, guest))),
        ("text", |kernel, guest| {
            end(changed::compare(kernel, guest, &[], |_| ()))
        }),
    ];
    for (name, look) in looks {
        // All text is much to read.
        let rounds = if name == "text" { rounds / 20 } else { rounds };
        let (mut slowest, mut ends) = (Duration::ZERO, BTreeMap::new());
        for seed in 0..rounds {
            let guest = Corrupt {
                dump,
                seed: Cell::new(seed),
            };
            let start = Instant::now();
            let end = match look(kernel, &guest) {
                Ok(()) => "an answer".to_owned(),
                Err(error) => error
                    .chars()
                    .take_while(|char| !char.is_ascii_digit())
                    .collect(),
            };
            slowest = slowest.max(start.elapsed());
            *ends.entry(end).or_insert(0) += 1;
        }
        if rounds > 0 {
            println!("{name} of damaged memory: slowest {slowest:?}, {ends:#?}");
        }
    }
}
