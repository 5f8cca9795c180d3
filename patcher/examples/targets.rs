//! Tells which functions of a recorded guest's kernel could be redirected, and why the others could not.
//!
//! `cargo run --release --example targets -- BZIMAGE CORE [--all]`
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use iced_x86::Code;
use patcher::addr::{Gva, LinkAddr};
use patcher::edition::link::Returns;
use patcher::edition::object::Edition;
use patcher::guest::Registers as _;
use patcher::guest::dump::Dump;
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::payload::Payload;
use patcher::kernel::text::ReturnForm;
use patcher::plan::checks;
use patcher::plan::refusal::Refusal;
use patcher::plan::target::{Target, TargetError};
use patcher::x86::insn::{self, JUMP_LEN};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [image, core, rest @ ..] = arguments.as_slice() else {
        return Err("usage: targets BZIMAGE CORE [--all]".into());
    };
    let all = !rest.is_empty();
    let image = Image::parse(Arc::new(Payload::unpack(&std::fs::read(image)?)?))?;
    let dump = Dump::parse(Arc::new(std::fs::read(core)?))?;
    let kernel = Kernel::locate(Arc::new(image), &dump, dump.vcpus())?;
    let returns = match kernel.return_form(&dump)? {
        ReturnForm::Ret => Returns::Plain,
        ReturnForm::Jump(thunk) => Returns::Thunk(thunk),
    };
    let shipped = kernel.image().shipped()?;
    let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut functions, mut found, mut padded) = (0, 0, 0);
    let symbols = kernel.image().symbols().iter();
    for symbol in symbols.filter(|symbol| "tTwW".contains(char::from(symbol.kind))) {
        let range = symbol.address.range(symbol.size);
        let Some(code) = range.and_then(|range| shipped.text(range)) else {
            continue;
        };
        let head = symbol.address..LinkAddr(symbol.address.0.saturating_add(16));
        let sites = shipped.sites().within(head);
        if checks::after_fentry(code, symbol.address, &sites).is_none() {
            continue;
        }
        let namesakes = kernel.image().symbols().namesakes(&symbol.name);
        let mut namesakes = namesakes.iter();
        let position = namesakes.position(|other| other.symbol.address == symbol.address);
        let edition = Edition {
            function: symbol.name.clone(),
            position: u32::try_from(position.map_or(0, |nth| nth + 1))?,
            section: 0,
            offset: 0,
        };
        functions += 1;
        let nowhere = Gva(0)..Gva(0);
        match Target::find(&kernel, &dump, &edition, &nowhere, returns, |_| None) {
            Ok(target) => {
                found += 1;
                let offset = usize::try_from(target.jump.0 - target.function.0)?;
                let displaced = code.get(offset..).unwrap_or_default();
                let displaced = insn::whole_instructions(displaced, target.jump, JUMP_LEN)?;
                if displaced.iter().any(|insn| insn.code() == Code::Int3) {
                    padded += 1;
                    if all {
                        println!("with padding: {} {displaced:?}", symbol.name);
                    }
                }
            }
            Err(error) => {
                *refused.entry(kind(&error)).or_default() += 1;
                if all {
                    println!("{}: {error}", kind(&error));
                }
            }
        }
    }
    println!(
        "{found} of {functions} functions with fentry can be redirected, {padded} of them into the padding behind them; refused: {refused:#?}"
    );
    Ok(())
}

/// What kind of refusal it is.
fn kind(error: &TargetError) -> &'static str {
    let TargetError::Refused(refusal) = error else {
        return "unreadable";
    };
    match refusal {
        Refusal::TooShort { .. } => "too short",
        Refusal::Region { region, .. } => region,
        Refusal::Site { site, .. } => site,
        Refusal::BranchInto { .. } => "a branch into the displaced bytes",
        Refusal::JumpTable { .. } => "a jump through a table",
        Refusal::Undecodable { .. } => "undecodable",
        Refusal::Immovable { .. } => "immovable",
        _ => "other",
    }
}
