//! Tells which functions of a kernel without fentry site have callers that rely on registers which they leave alone.
//!
//! `cargo run --release --example no_fentry -- BZIMAGE [--all]`
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::LinkAddr;
use patcher::kernel::image::Image;
use patcher::kernel::payload::Payload;
use patcher::plan::{checks, reliance::Callers};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: no_fentry BZIMAGE [--all]")?;
    let all = args.next().is_some();
    let vmlinux = Payload::unpack(&std::fs::read(&path)?)?;
    let image = Image::parse(Arc::new(vmlinux))?;
    let shipped = image.shipped()?;
    let start = Instant::now();
    let callers = Callers::of(&image)?;
    println!("all callers found in {:?}", start.elapsed());
    let symbols = image.symbols();
    let mut regions = Vec::new();
    for region in &checks::REGIONS {
        let bound = |name| symbols.optional(name).ok().flatten();
        if let (Some(first), Some(last)) = (bound(region.bounds.0), bound(region.bounds.1)) {
            regions.push((region.name, first.address..last.address));
        }
    }
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let start = Instant::now();
    for symbol in symbols
        .iter()
        .filter(|symbol| "tTwW".contains(char::from(symbol.kind)))
    {
        let Some(code) = symbol
            .address
            .range(symbol.size)
            .and_then(|range| shipped.text(range))
        else {
            continue;
        };
        let head = symbol.address..LinkAddr(symbol.address.0 + 16);
        let sites = shipped.sites().within(head);
        if checks::after_fentry(code, symbol.address, &sites).is_some() {
            *counts.entry("with fentry".into()).or_default() += 1;
            continue;
        }
        let region = regions
            .iter()
            .find(|(_, range)| range.contains(&symbol.address));
        let namesakes = symbols.namesakes(&symbol.name).len();
        let outcome = if let Some((name, _)) = region {
            (*name).to_owned()
        } else if !image.types().has_prototype(&symbol.name) {
            "not in the types".to_owned()
        } else if namesakes != 1 {
            "several of that name".to_owned()
        } else {
            match callers.none_relies(symbol.address) {
                Ok(()) => {
                    if all {
                        println!("can: {} {:x}", symbol.name, symbol.address.0);
                    }
                    "can be redirected, by its callers".to_owned()
                }
                Err(found) => {
                    let by = symbols.containing(found.caller);
                    let by = by
                        .map(|(by, at)| format!("{}+{at:#x}", by.name))
                        .unwrap_or_default();
                    println!(
                        "relied on: {} by {by}: {} at {:x}: {}",
                        symbol.name, found.registers, found.at.0, found.why
                    );
                    format!("relied on: {}", found.why)
                }
            }
        };
        *counts.entry(outcome).or_default() += 1;
    }
    println!("{counts:#?} in {:?}", start.elapsed());
    Ok(())
}
