//! Tells which functions of a kernel with a fentry site can be cloned, and why the others cannot.
//!
//! `cargo run --release --example clones -- BZIMAGE [--all]`
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::LinkAddr;
use patcher::edition::clone::{CloneError, Trial};
use patcher::kernel::image::Image;
use patcher::kernel::payload::Payload;
use patcher::plan::checks;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: clones BZIMAGE [--all]")?;
    let all = args.next().is_some();
    let vmlinux = Payload::unpack(&std::fs::read(&path)?)?;
    let image = Image::parse(Arc::new(vmlinux))?;
    let shipped = image.shipped()?;
    let trial = Trial::of(&image);
    let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut functions, mut cloned, mut bytes) = (0, 0_usize, [0_u64; 2]);
    let start = Instant::now();
    let symbols = image.symbols().iter();
    for symbol in symbols.filter(|symbol| "tTwW".contains(char::from(symbol.kind))) {
        let range = symbol.address.range(symbol.size);
        let Some(code) = range.and_then(|range| shipped.text(range)) else {
            continue;
        };
        let head = symbol.address..LinkAddr(symbol.address.0 + 16);
        let sites = shipped.sites().within(head);
        if checks::after_fentry(code, symbol.address, &sites).is_none() {
            continue;
        }
        functions += 1;
        match trial.size(&symbol) {
            Ok(size) => {
                cloned += 1;
                bytes[0] += symbol.size;
                bytes[1] += size;
            }
            Err(CloneError::Refused(error)) => {
                if all {
                    println!("{error}");
                }
                *refused.entry(error.reason.kind()).or_default() += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let [before, after] = bytes;
    println!(
        "{cloned} of {functions} functions with fentry can be cloned: {before} bytes become {after}, with their cold parts"
    );
    println!("refused: {refused:#?} in {:?}", start.elapsed());
    Ok(())
}
