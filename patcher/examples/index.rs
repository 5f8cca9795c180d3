//! Unpacks and indexes a kernel, or recovers that of a recorded guest from its memory, and prints how long that took and what was found.
//!
//! `cargo run --release --example index -- BZIMAGE|CORE [NAME...]`
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use patcher::guest::Registers;
use patcher::guest::dump::Dump;
use patcher::kernel::image::{Image, Shipped};
use patcher::kernel::payload::Payload;
use patcher::kernel::sites::SiteKind;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: index BZIMAGE|CORE [SYMBOL...]")?;
    let file = std::fs::read(&path)?;
    let image = if file.starts_with(b"\x7fELF") {
        recover(file)?
    } else {
        unpack(&file)?
    };
    let start = Instant::now();
    let schedule = image.symbols().lookup("schedule")?;
    println!("{schedule:x?} in {:?}", start.elapsed());
    println!(
        "{image:?} {:?} {:?} {:?}",
        image.types(),
        image.shipped().map(Shipped::relocs),
        image.shipped().map(Shipped::sites)
    );
    println!("{:?}", image.orc());
    match image.shipped() {
        Ok(shipped) => println!("{} fentry sites", shipped.sites().count(SiteKind::Fentry)),
        Err(why) => println!("{why}"),
    }
    for name in args {
        match name.split_once('.') {
            Some((of, member)) => println!("{name}: {:?}", image.types().member(of, member)),
            None => println!("{name}: {:x?}", image.symbols().lookup(&name)),
        }
    }
    Ok(())
}

fn unpack(file: &[u8]) -> Result<Image, Box<dyn Error>> {
    let payload = Payload::find(file)?;
    let mut vmlinux = vec![0; payload.size()];
    vmlinux.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    let start = Instant::now();
    payload.decompress_into(&mut vmlinux)?;
    println!(
        "{:?}: {} bytes unpacked in {:?}",
        payload.compression(),
        payload.size(),
        start.elapsed()
    );
    let vmlinux = Arc::new(vmlinux);
    timed("indexed", || Ok(Image::parse(vmlinux)?))
}

fn recover(core: Vec<u8>) -> Result<Image, Box<dyn Error>> {
    let dump = Dump::parse(Arc::new(core))?;
    timed("recovered from memory", || {
        Ok(Image::from_memory(&dump, dump.vcpus())?)
    })
}

/// Makes an image, and says how long that took and what memory it has.
fn timed(
    what: &str,
    make: impl FnOnce() -> Result<Image, Box<dyn Error>>,
) -> Result<Image, Box<dyn Error>> {
    let before = anonymous_memory()?;
    let start = Instant::now();
    let image = make()?;
    let elapsed = start.elapsed();
    let memory = anonymous_memory()?.saturating_sub(before);
    println!("{what} in {elapsed:?}, with {memory} KiB of memory");
    Ok(image)
}

/// Anonymous memory of this process, in KiB.
fn anonymous_memory() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
