//! The instructions of a function as they are in the guest's memory, beside those of the image where they differ, with the cause.
//!
//! Both are decoded from the function's first byte on, so that an instruction stands in both when they agree there. A module's functions have
//! no image to be compared with.

mod decode;

use patcher::addr::Gva;
use patcher::kernel::changed::{self, Change};
use patcher::kernel::names::Found;
use patcher::kernel::symbols::Space;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::decode::{Decoded, Targets, decode};
use super::place::Places;
use super::symbols::{self, number};
use super::table::{Side, Table, line};
use super::text::{TextDifference, UNEXPLAINED, cause_name, difference};
use super::{Shown, Subject, ViewError, hex};

/// Bytes of the longest function that is decoded.
const LONGEST: u64 = 256 << 10;

/// Which function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The function, or a place in it.
    pub of: Where,
    /// Which of several of that name, from 1.
    pub position: Option<usize>,
}

/// A function, or a place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// The one of this name, and how far in.
    Name(String, u64),
    /// The one that has this address.
    Address(Gva),
}

impl Asked {
    /// Reads a name or an address, each with `+OFFSET` behind it or not.
    ///
    /// # Errors
    /// [`ViewError::Address`].
    pub fn parse(text: &str, position: Option<usize>) -> Result<Self, ViewError> {
        let wrong = || ViewError::Address {
            text: text.to_owned(),
        };
        let (of, offset) = match text.rsplit_once('+') {
            Some((of, offset)) => (of, number(offset).ok_or_else(wrong)?),
            None => (text, 0),
        };
        let of = match symbols::Asked::parse(of).map_err(|_| wrong())? {
            symbols::Asked::Name(name) => Where::Name(name, offset),
            symbols::Asked::Address(at) => {
                Where::Address(at.checked_add(offset).ok_or_else(wrong)?)
            }
        };
        Ok(Self { of, position })
    }
}

impl std::fmt::Display for Where {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name, 0) => f.write_str(name),
            Self::Name(name, offset) => write!(f, "{name}+{offset:#x}"),
            Self::Address(at) => write!(f, "{at}"),
        }
    }
}

/// A function's instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disassembly {
    /// The function.
    pub function: String,
    /// The module that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Its first byte.
    pub address: String,
    /// Bytes to the next symbol, padding included.
    pub size: u64,
    /// The place that was asked for, in bytes from the first.
    pub asked: u64,
    /// Of memory and image, in the order of addresses.
    pub instructions: Vec<Instruction>,
    /// Where memory differs from the image.
    pub differences: Vec<TextDifference>,
    /// Why memory was not compared with the image, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_compared: Option<String>,
}

/// Where an instruction is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HeldBy {
    /// In the image only: the kernel, a tracer or an update has put another in its place.
    Image,
    /// In the guest's memory only.
    Memory,
    /// In both.
    Both,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instruction {
    /// Where it is.
    pub address: String,
    /// Bytes from the function's first.
    pub offset: u64,
    /// Where it is found.
    pub held_by: HeldBy,
    /// Its bytes in hexadecimal.
    pub bytes: String,
    /// As an assembler of AT&T syntax reads it; `(bad)` when it is none.
    pub text: String,
    /// What it branches to or refers to, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Why it differs from the image, of one in memory only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
}

impl Disassembly {
    /// Whether every difference from the image is known, and has a cause, as far as there is an image.
    pub(super) fn is_explained(&self) -> bool {
        let mut causes = self.differences.iter().map(|found| &found.cause);
        let compared = self.not_compared.is_none() || self.module.is_some();
        compared && causes.all(|cause| cause != UNEXPLAINED)
    }
}

/// A function that was found.
struct Function {
    name: String,
    module: Option<String>,
    start: Gva,
    size: u64,
    asked: u64,
}

/// Decodes a function.
pub(super) fn read(subject: &Subject<'_>, asked: &Asked) -> Result<Disassembly, ViewError> {
    let places = Places::read(subject)?;
    let function = find(subject, &places, asked)?;
    let live = live(subject, &function)?;
    let mut changes = Vec::new();
    let not_compared = match &function.module {
        Some(_) => Some("the files of modules are not known".to_owned()),
        None => compare(subject, &function, &mut changes).err(),
    };
    // Where nothing is known of the image, nothing is said to be in it.
    let image = match subject.kernel.image().shipped() {
        Ok(_) => image_of(&function, &live, &changes),
        Err(_) => Vec::new(),
    };
    let targets = Targets::new(subject, &places);
    let of = |bytes: &[u8]| decode(bytes, function.start, |it| targets.of(it));
    Ok(Disassembly {
        instructions: merge(&of(&live), &of(&image), &changes),
        differences: changes.iter().map(difference).collect(),
        function: function.name,
        module: function.module,
        address: function.start.to_string(),
        size: function.size,
        asked: function.asked,
        not_compared,
    })
}

/// Where the instruction is that begins at the place that was asked for.
pub(super) fn instruction(subject: &Subject<'_>, asked: &Asked) -> Result<Gva, ViewError> {
    let function = find(subject, &Places::read(subject)?, asked)?;
    let live = live(subject, &function)?;
    let (name, offset) = (function.name, function.asked);
    let begins = decode(&live, function.start, |_| None)
        .into_iter()
        .find(|instruction| instruction.offset == offset);
    begins
        .map(|instruction| instruction.at)
        .ok_or(ViewError::NoInstruction { name, offset })
}

/// The function's bytes in the guest's memory.
fn live(subject: &Subject<'_>, function: &Function) -> Result<Vec<u8>, ViewError> {
    let len = usize::try_from(function.size).unwrap_or(usize::MAX);
    let mut live = vec![0; len];
    subject
        .kernel
        .read(subject.guest, function.start, &mut live)
        .map_err(|error| ViewError::Kernel(error.into()))?;
    Ok(live)
}

/// Every difference of the function from the image; the error says why that cannot be told.
fn compare(
    subject: &Subject<'_>,
    function: &Function,
    changes: &mut Vec<Change>,
) -> Result<(), String> {
    let range = function
        .start
        .range(function.size)
        .unwrap_or(function.start..function.start);
    let jumps = super::text::jumps(subject);
    let each = |change: &Change| changes.push(change.clone());
    let found = changed::compare_part(subject.kernel, subject.guest, &jumps, &range, each);
    match found {
        Ok(summary) if summary.compared == function.size => Ok(()),
        Ok(_) => Err("it is not in the text that stays when the kernel has booted".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The image's bytes: memory's, but for the differences.
fn image_of(function: &Function, live: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut image = live.to_vec();
    for change in changes {
        let start = change.range.start.offset_from(function.start);
        let start = start.and_then(|start| usize::try_from(start).ok());
        let place = start.and_then(|start| image.get_mut(start..start + change.image.len()));
        if let Some(place) = place {
            place.copy_from_slice(&change.image);
        }
    }
    image
}

/// The function that was asked for.
fn find(subject: &Subject<'_>, places: &Places<'_>, asked: &Asked) -> Result<Function, ViewError> {
    let function = match &asked.of {
        Where::Address(at) => at_address(places, *at)?,
        Where::Name(name, offset) => by_name(subject, places, name, *offset, asked.position)?,
    };
    let (name, size) = (function.name.clone(), function.size);
    if function.asked >= size {
        let offset = function.asked;
        return Err(ViewError::BeyondFunction { name, offset, size });
    }
    if size > LONGEST {
        return Err(ViewError::TooLong { name, size });
    }
    Ok(function)
}

fn at_address(places: &Places<'_>, at: Gva) -> Result<Function, ViewError> {
    let place = places.at(at).ok_or(ViewError::NothingAt { at })?;
    if place.cpu.is_some() {
        return Err(ViewError::NotCode { name: place.symbol });
    }
    Ok(Function {
        start: Gva(at.0.wrapping_sub(place.offset)),
        asked: place.offset,
        size: place.size,
        name: place.symbol,
        module: place.module,
    })
}

fn by_name(
    subject: &Subject<'_>,
    places: &Places<'_>,
    name: &str,
    asked: u64,
    position: Option<usize>,
) -> Result<Function, ViewError> {
    let found = places.names.find(name);
    if found.is_empty() {
        // Its error knows similar names.
        subject.kernel.image().symbols().lookup(name)?;
    }
    let count = found.len();
    let chosen = match (position, count) {
        (None, 0 | 1) => found.into_iter().next(),
        (None, _) => {
            let candidates = found.iter().map(symbols::whereabouts).collect();
            let name = name.to_owned();
            return Err(ViewError::Ambiguous { name, candidates });
        }
        (Some(position), _) => position
            .checked_sub(1)
            .and_then(|at| found.into_iter().nth(at)),
    };
    let Some(chosen) = chosen else {
        let (name, position) = (name.to_owned(), position.unwrap_or(1));
        return Err(ViewError::Position {
            name,
            position,
            count,
        });
    };
    let (start, size, kind, module) = match chosen {
        Found::Kernel { at, space, of } => {
            let at = at.filter(|_| space == Space::Image).unwrap_or(Gva(0));
            (at, of.symbol.size, of.symbol.kind, None)
        }
        Found::Module { module, symbol } => {
            (symbol.address, symbol.size, symbol.kind, Some(module))
        }
    };
    let name = name.to_owned();
    if !b"tTwW".contains(&kind) {
        return Err(ViewError::NotCode { name });
    }
    Ok(Function {
        name,
        module,
        start,
        size,
        asked,
    })
}

/// The instructions of memory and image in one order: those of the image stand before what took their place.
fn merge(memory: &[Decoded], image: &[Decoded], changes: &[Change]) -> Vec<Instruction> {
    let same = |one: &Decoded, others: &[Decoded]| {
        let found = others.binary_search_by_key(&one.offset, |other| other.offset);
        found.is_ok_and(|at| others[at].bytes == one.bytes)
    };
    let of_memory = memory.iter().map(|one| {
        let held_by = if same(one, image) {
            HeldBy::Both
        } else {
            HeldBy::Memory
        };
        (held_by, one)
    });
    let of_image = image.iter().filter(|one| !same(one, memory));
    let mut all: Vec<_> = of_memory
        .chain(of_image.map(|one| (HeldBy::Image, one)))
        .collect();
    all.sort_by_key(|(held_by, one)| (one.offset, *held_by));
    all.into_iter()
        .map(|(held_by, one)| shown(held_by, one, changes))
        .collect()
}

fn shown(held_by: HeldBy, of: &Decoded, changes: &[Change]) -> Instruction {
    let mut causes = Vec::new();
    if held_by == HeldBy::Memory {
        let end = Gva(of.at.0.wrapping_add(of.bytes.len() as u64));
        let own = changes
            .iter()
            .filter(|change| change.range.start < end && of.at < change.range.end);
        for cause in own.map(|change| cause_name(change.cause).to_owned()) {
            if !causes.contains(&cause) {
                causes.push(cause);
            }
        }
    }
    Instruction {
        address: of.at.to_string(),
        offset: of.offset,
        held_by,
        bytes: hex(&of.bytes),
        text: of.text.clone(),
        target: of.target.clone(),
        causes,
    }
}

impl Shown for Disassembly {
    fn table(&self) -> String {
        let mut text = String::new();
        let module = self.module.as_ref().map(|module| format!(" [{module}]"));
        let module = module.unwrap_or_default();
        line(
            &mut text,
            "function",
            format_args!("{}{module}", self.function),
        );
        line(&mut text, "address", &self.address);
        line(&mut text, "size", self.size);
        if let Some(why) = &self.not_compared {
            line(&mut text, "not compared", why);
        }
        let mut table = Table::new([
            ("", Side::Left),
            ("ADDRESS", Side::Right),
            ("OFFSET", Side::Right),
            ("BYTES", Side::Left),
            ("INSTRUCTION", Side::Left),
            ("CAUSE", Side::Left),
        ]);
        let asked = self.instructions.iter().rev().find(|instruction| {
            self.asked != 0
                && instruction.offset <= self.asked
                && instruction.held_by != HeldBy::Image
        });
        for instruction in &self.instructions {
            let mark = match instruction.held_by {
                HeldBy::Both => " ",
                HeldBy::Memory => "+",
                HeldBy::Image => "-",
            };
            let here = asked.is_some_and(|asked| asked == instruction);
            let target = instruction.target.as_ref();
            let target = target
                .map(|target| format!("  <{target}>"))
                .unwrap_or_default();
            table.row([
                format!("{mark}{}", if here { ">" } else { "" }),
                instruction.address.clone(),
                format!("+{:#x}", instruction.offset),
                instruction.bytes.clone(),
                format!("{}{target}", instruction.text),
                instruction.causes.join(", "),
            ]);
        }
        text.push('\n');
        text + &table.text()
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::kernel::changed::{Cause, Change};

    use super::decode::decode;
    use super::{Function, HeldBy, image_of, merge};

    const START: Gva = Gva(0xffff_ffff_8100_0000);

    fn change(offset: u64, cause: Cause, image: &[u8], live: &[u8]) -> Change {
        let at = Gva(START.0 + offset);
        Change {
            range: at..Gva(at.0 + live.len() as u64),
            cause,
            function: None,
            image: image.to_vec(),
            expected: live.to_vec(),
            live: live.to_vec(),
        }
    }

    #[test]
    fn what_the_image_has_stands_before_what_took_its_place() {
        // nop; push; jump to a function, of which only the displacement differs; ret where a jump to a thunk was.
        let live = [
            0x0f, 0x1f, 0x44, 0, 0, 0x55, 0xe8, 4, 0, 0, 0, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc,
        ];
        let changes = [
            change(0, Cause::Fentry, &[0xe8, 0x10, 0, 0, 0], &live[..5]),
            change(7, Cause::StaticCall, &[8], &[4]),
            change(11, Cause::ReturnThunk, &[0xe9, 1, 2, 3, 4], &live[11..]),
        ];
        let function = Function {
            name: "f".to_owned(),
            module: None,
            start: START,
            size: 16,
            asked: 0,
        };
        let image = image_of(&function, &live, &changes);
        let of = |bytes: &[u8]| decode(bytes, START, |_| None);
        let merged = merge(&of(&live), &of(&image), &changes);
        let got: Vec<_> = merged
            .iter()
            .map(|line| {
                let word = line.text.split(' ').next().unwrap_or_default();
                (line.offset, line.held_by, word, line.causes.join(","))
            })
            .collect();
        let want = [
            (0, HeldBy::Image, "call", ""),
            (0, HeldBy::Memory, "nopl", "fentry"),
            (5, HeldBy::Both, "push", ""),
            (6, HeldBy::Image, "call", ""),
            (6, HeldBy::Memory, "call", "static_call"),
            (11, HeldBy::Image, "jmp", ""),
            (11, HeldBy::Memory, "ret", "return_thunk"),
            (12, HeldBy::Memory, "int3", "return_thunk"),
            (13, HeldBy::Memory, "int3", "return_thunk"),
            (14, HeldBy::Memory, "int3", "return_thunk"),
            (15, HeldBy::Memory, "int3", "return_thunk"),
        ];
        let want = want.map(|(at, held_by, word, cause)| (at, held_by, word, cause.to_owned()));
        assert_eq!(got, want);
    }
}
