//! From a kernel's file, or a guest's memory, to an index of its symbols and types, and what a look-up in that costs. All of it natively.

use std::collections::BTreeSet;
use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::LinkAddr;
use patcher::guest::Registers as _;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::payload::Payload;
use serde_json::{Value, json};
use tests::oracle;
use tests::recorded::{Load, Recorded, open};
use tests::stock::{ALL, Stock};
use vmm::kernel_index;

use crate::figures::{Figures, Target, median};
use crate::outside::number;

/// Milliseconds that symbols and types may take beyond decompression.
const INDEX_MS: f64 = 30.0;
/// What the whole may take beside vmlinux-to-elf.
const OF_PEER: f64 = 1.0 / 20.0;
/// Anonymous memory of the index, in MiB.
const MEMORY_MIB: f64 = 30.0;
/// Symbols that are looked up, and how often each.
const SYMBOLS: usize = 500;
const ROUNDS: usize = 20;
/// Members that are looked up: of structures and paths that every kernel here has.
const MEMBERS: [(&str, &str); 8] = [
    ("task_struct", "thread.sp"),
    ("task_struct", "pid"),
    ("mm_struct", "pgd"),
    ("module", "list"),
    ("rq", "curr"),
    ("file", "f_op"),
    ("dentry", "d_name.name"),
    ("net_device", "name"),
];

/// Milliseconds of each sample.
#[derive(Default)]
struct Times {
    unpack: Vec<f64>,
    parse: Vec<f64>,
}

impl Times {
    /// Of both parts.
    fn whole(&self) -> Result<f64, String> {
        let parts = self.unpack.iter().zip(&self.parse);
        median(parts.map(|(unpack, parse)| unpack + parse).collect())
    }
}

/// Symbols and types from the bzImage.
pub(crate) fn index(figures: &mut Figures, samples: usize) -> Result<(), String> {
    for stock in ALL {
        let times = times(stock, samples)?;
        add_parts(figures, stock, &times)?;
    }
    Ok(())
}

fn add_parts(figures: &mut Figures, stock: Stock, times: &Times) -> Result<(), String> {
    let parts = [
        ("decompression", &times.unpack, None),
        (
            "symbols and types beyond it",
            &times.parse,
            Some(Target::AtMost(INDEX_MS)),
        ),
    ];
    for (name, times, target) in parts {
        let name = format!("index {}: {name}", stock.0);
        figures.add(name, median(times.clone())?, "ms", None, target);
    }
    Ok(())
}

fn times(stock: Stock, samples: usize) -> Result<Times, String> {
    eprintln!("measuring index {}", stock.0);
    let path = stock.file("vmlinuz");
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = fs::read(&path).map_err(|error| failed(&error))?;
    let mut times = Times::default();
    for _ in 0..samples {
        let payload = Payload::find(&file).map_err(|error| failed(&error))?;
        let mut vmlinux = vec![0; payload.size()];
        let start = Instant::now();
        payload
            .decompress_into(&mut vmlinux)
            .map_err(|error| failed(&error))?;
        times.unpack.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        let image = Image::parse(Arc::new(vmlinux)).map_err(|error| failed(&error))?;
        let looked_up = image.symbols().lookup("schedule");
        looked_up.map_err(|error| failed(&error))?;
        let (of, path) = MEMBERS[0];
        let member = image.types().member(of, path);
        member.map_err(|error| failed(&error))?;
        times.parse.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// The same beside vmlinux-to-elf, which finds the symbols alone and gets the image unpacked.
pub(crate) fn beside_peer(
    figures: &mut Figures,
    stock: Stock,
    samples: usize,
) -> Result<(), String> {
    let times = times(stock, samples.max(5))?;
    add_parts(figures, stock, &times)?;
    let mut peers = Vec::new();
    for _ in 0..samples {
        let start = Instant::now();
        oracle::symbols(stock)?;
        peers.push(start.elapsed().as_secs_f64() * 1e3);
    }
    figures.add(
        format!("index {}: from bzImage to index", stock.0),
        times.whole()?,
        "ms",
        Some(("vmlinux-to-elf", median(peers)?)),
        Some(Target::RatioAtMost(OF_PEER)),
    );
    Ok(())
}

/// Symbols, types and unwind table from a recorded guest's memory alone, beside the same from the bzImage.
pub(crate) fn from_memory(
    figures: &mut Figures,
    stock: Stock,
    samples: usize,
) -> Result<(), String> {
    eprintln!("measuring index {} from memory", stock.0);
    let opened = open(stock, &recorded(stock).kept()?)?;
    let dump = &opened.dump;
    let mut ours = Vec::new();
    for _ in 0..samples.max(5) {
        let start = Instant::now();
        let image = Image::from_memory(dump, dump.vcpus()).map_err(|error| error.to_string())?;
        ours.push(start.elapsed().as_secs_f64() * 1e3);
        if image.build_id() != opened.kernel.image().build_id() {
            return Err("the guest's memory holds another kernel".to_owned());
        }
    }
    let peer = times(stock, samples.max(5))?.whole()?;
    figures.add(
        format!("index {}: from memory to index", stock.0),
        median(ours)?,
        "ms",
        Some(("from bzImage to index", peer)),
        None,
    );
    Ok(())
}

/// Anonymous memory of the index, as a process of its own sees it.
pub(crate) fn memory(figures: &mut Figures, stock: Stock) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = std::process::Command::new(own)
        .args(["index-memory", stock.0])
        .output()
        .map_err(|error| error.to_string())?;
    let kib: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("index-memory: {error}: {output:?}"))?;
    figures.add(
        format!("index {}: anonymous memory", stock.0),
        number(&kib, "anonymous_kib")? / 1024.0,
        "MiB",
        None,
        Some(Target::AtMost(MEMORY_MIB)),
    );
    Ok(())
}

/// What [`memory`] runs: how much anonymous memory this process has more with the index than without.
pub(crate) fn own_memory(stock: Stock) -> Result<Value, String> {
    let before = anonymous_kib()?;
    let image = kernel_index::load(&stock.file("vmlinuz")).map_err(|error| error.to_string())?;
    let wanted = Symbols::of(&image);
    wanted.look_up(&image)?;
    let after = anonymous_kib()?;
    Ok(json!({ "anonymous_kib": after.saturating_sub(before) }))
}

fn anonymous_kib() -> Result<u64, String> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.ok_or_else(|| format!("{path} has no RssAnon"))
}

/// Functions all over the kernel.
struct Symbols {
    names: Vec<String>,
    starts: Vec<LinkAddr>,
}

impl Symbols {
    /// Those that no other has the name or the address of: what is looked up has one answer.
    fn of(image: &Image) -> Self {
        let symbols = image.symbols();
        let mut found = Self {
            names: Vec::new(),
            starts: Vec::new(),
        };
        let all: Vec<_> = symbols
            .iter()
            .filter(|symbol| matches!(symbol.kind, b'T' | b't'))
            .collect();
        let mut seen = BTreeSet::new();
        let twice: BTreeSet<_> = all
            .iter()
            .map(|symbol| symbol.address)
            .filter(|address| !seen.insert(*address))
            .collect();
        let step = (all.len() / SYMBOLS).max(1);
        for symbol in all.into_iter().step_by(step) {
            let name = symbol.name.to_string();
            if symbols.lookup(&name).is_ok() && !twice.contains(&symbol.address) {
                found.names.push(name);
                found.starts.push(symbol.address);
            }
        }
        found
    }

    /// Nanoseconds of a look-up by name, by address, and of a member.
    fn look_up(&self, image: &Image) -> Result<[f64; 3], String> {
        let each = |times: usize, start: Instant| {
            start.elapsed().as_secs_f64() * 1e9 / (times * ROUNDS) as f64
        };
        let start = Instant::now();
        for name in self.names.iter().cycle().take(self.names.len() * ROUNDS) {
            let found = black_box(image.symbols().lookup(black_box(name)));
            found.map_err(|error| error.to_string())?;
        }
        let by_name = each(self.names.len(), start);
        let start = Instant::now();
        for address in self.starts.iter().cycle().take(self.starts.len() * ROUNDS) {
            let found = black_box(image.symbols().containing(black_box(*address)));
            found.ok_or_else(|| format!("nothing is at {address}"))?;
        }
        let by_address = each(self.starts.len(), start);
        let start = Instant::now();
        for (of, path) in MEMBERS.iter().cycle().take(MEMBERS.len() * ROUNDS) {
            let found = black_box(image.types().member(of, black_box(path)));
            found.map_err(|error| error.to_string())?;
        }
        Ok([by_name, by_address, each(MEMBERS.len(), start)])
    }

    /// What drgn is asked: addresses as the running kernel has them.
    fn wanted(&self, kernel: &Kernel) -> Value {
        json!({ "names": self.names, "addresses": self.runtime(kernel), "members": MEMBERS })
    }

    /// What it must find by name and of members. By address it may find a symbol around another: its table has their lengths.
    fn expected(&self, kernel: &Kernel) -> Result<[(&'static str, Vec<u64>); 2], String> {
        let types = kernel.image().types();
        let members = MEMBERS.iter().map(|(of, path)| types.offset_of(of, path));
        let members: Result<_, _> = members.collect();
        let members = members.map_err(|error| error.to_string())?;
        Ok([("names", self.runtime(kernel)), ("members", members)])
    }

    fn runtime(&self, kernel: &Kernel) -> Vec<u64> {
        self.starts.iter().map(|at| kernel.runtime(*at).0).collect()
    }
}

/// The guest that is looked into.
fn recorded(stock: Stock) -> Recorded {
    Recorded {
        stock,
        load: Load::Sleepers(100),
        memory_mib: 256,
    }
}

/// What look-ups cost, beside drgn with the kernel's debug information. Both must find the same.
pub(crate) fn lookups(figures: &mut Figures, stock: Stock) -> Result<(), String> {
    eprintln!("measuring look-ups {}", stock.0);
    let core = recorded(stock).kept()?;
    let opened = open(stock, &core)?;
    let (kernel, image) = (&opened.kernel, opened.kernel.image());
    let symbols = Symbols::of(image);
    let ours = symbols.look_up(image)?;
    let wanted = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    fs::write(wanted.path(), symbols.wanted(kernel).to_string())
        .map_err(|error| error.to_string())?;
    let theirs = oracle::drgn("lookups.py", stock, &core, &[wanted.path()])?;
    for (kind, expected) in symbols.expected(kernel)? {
        let found = theirs[kind]["found"]
            .as_array()
            .ok_or("drgn finds nothing")?;
        let differ = expected
            .iter()
            .zip(found)
            .find(|(own, other)| json!(own) != **other);
        if let Some((own, other)) = differ {
            return Err(format!("{kind}: drgn finds {other}, not {own:#x}"));
        }
    }
    let kinds = [
        ("names", "name to address"),
        ("addresses", "address to symbol"),
        ("members", "member path to offset"),
    ];
    for ((kind, name), ours) in kinds.into_iter().zip(ours) {
        let theirs = &theirs[kind];
        figures.add(
            format!("look-up {}: {name}", stock.0),
            ours / 1e3,
            "us",
            Some(("drgn", number(theirs, "each_us")?)),
            None,
        );
    }
    Ok(())
}
