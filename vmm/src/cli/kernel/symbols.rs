//! `exopatch kernel symbols`: names and addresses of the running kernel, both ways.

use patcher::addr::Gva;
use patcher::kernel::names::{Found, Names, Place};
use patcher::kernel::symbols::Space;
use patcher::kernel::tasks::Tasks;
use serde::Serialize;

use super::Shown;
use super::failure::Failure;
use super::recording::Recording;
use super::table::{Side, Table, line, or_dash};

/// Digits of an address that is written without `0x`.
const DIGITS: usize = 16;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked<'a> {
    Name(&'a str),
    Address(Gva),
}

impl<'a> Asked<'a> {
    /// Tells an address from a name: it begins with `0x`, or is 16 hexadecimal digits as in `/proc/kallsyms`.
    pub(super) fn parse(text: &'a str) -> Result<Self, Failure> {
        let none = || Failure::Address {
            text: text.to_owned(),
        };
        let number = |digits| u64::from_str_radix(digits, 16).map(Gva);
        let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match text.strip_prefix("0x") {
            // A sign would be read, too.
            Some(digits) if hex(digits) => number(digits).map(Self::Address).map_err(|_| none()),
            None if text.len() == DIGITS && hex(text) => {
                number(text).map(Self::Address).map_err(|_| none())
            }
            None if !text.is_empty() => Ok(Self::Name(text)),
            _ => Err(none()),
        }
    }
}

/// What an address means: in the image or a module, an offset into each CPU's area, or a mere value.
fn space_name(space: Space) -> &'static str {
    match space {
        Space::Image => "address",
        Space::PerCpu => "per_cpu",
        Space::Absolute => "absolute",
    }
}

/// Every symbol.
#[derive(Debug, Serialize)]
pub(super) struct All {
    symbols: Vec<Symbol>,
}

#[derive(Debug, Serialize)]
struct Symbol {
    name: String,
    /// Address in the running kernel, offset or value, as `space` says.
    address: String,
    space: &'static str,
    /// The letter of nm(1).
    kind: char,
    size: u64,
    module: Option<String>,
}

/// All symbols: the kernel's in the order of addresses, then each module's.
pub(super) fn all(recording: &Recording) -> Result<All, Failure> {
    let Recording { dump, kernel } = recording;
    let names = Names::read(kernel, dump)?;
    let table = kernel.image().symbols();
    // Asked once, as it looks a symbol up by name.
    let end = table.optional("__per_cpu_end")?.map(|end| end.address);
    let own = table.iter().map(|symbol| {
        let (space, address) = match symbol.percpu {
            false => (Space::Image, kernel.runtime(symbol.address).0),
            true if end.is_some_and(|end| symbol.address <= end) => {
                (Space::PerCpu, symbol.address.0)
            }
            true => (Space::Absolute, symbol.address.0),
        };
        Symbol {
            name: symbol.name,
            address: format!("{address:#x}"),
            space: space_name(space),
            kind: char::from(symbol.kind),
            size: symbol.size,
            module: None,
        }
    });
    let mut symbols: Vec<Symbol> = own.collect();
    for (module, of_module) in names.modules() {
        let defined = of_module.iter().filter(|symbol| !symbol.undefined);
        symbols.extend(defined.map(|symbol| Symbol {
            name: symbol.name.clone(),
            address: symbol.address.to_string(),
            space: space_name(Space::Image),
            kind: char::from(symbol.kind),
            size: symbol.size,
            module: Some(module.name.clone()),
        }));
    }
    Ok(All { symbols })
}

impl Shown for All {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("ADDRESS", Side::Right),
            ("KIND", Side::Left),
            ("SIZE", Side::Right),
            ("MODULE", Side::Left),
            ("NAME", Side::Left),
        ]);
        for symbol in &self.symbols {
            table.row([
                symbol.address.clone(),
                symbol.kind.to_string(),
                symbol.size.to_string(),
                or_dash(symbol.module.as_ref()),
                symbol.name.clone(),
            ]);
        }
        table.text()
    }
}

/// The symbols of one name.
#[derive(Debug, Serialize)]
pub(super) struct Named {
    name: String,
    symbols: Vec<Namesake>,
}

#[derive(Debug, Serialize)]
struct Namesake {
    #[serde(flatten)]
    symbol: Symbol,
    /// Which of the kernel's own symbols of the name it is, from 1 in the order of addresses.
    position: Option<usize>,
    /// Its neighbours of another name: symbols of one source file lie together.
    before: Option<String>,
    after: Option<String>,
    /// Where each CPU has it, when it is per CPU.
    cpus: Vec<OfCpu>,
}

#[derive(Debug, Serialize)]
struct OfCpu {
    cpu: usize,
    address: String,
}

/// All symbols called `name`.
pub(super) fn named(recording: &Recording, name: &str) -> Result<Named, Failure> {
    let Recording { dump, kernel } = recording;
    let names = Names::read(kernel, dump)?;
    let cpus = Tasks::read(kernel, dump)?.cpus;
    let found = names.find(name);
    if found.is_empty() {
        // Its error knows similar names.
        kernel.image().symbols().lookup(name)?;
    }
    let of = |found| match found {
        Found::Kernel { at, space, of } => {
            let cpus = cpus.iter().filter_map(|cpu| {
                let address = names.of_cpu(&of.symbol, cpu.index)?.to_string();
                let cpu = cpu.index;
                Some(OfCpu { cpu, address })
            });
            let cpus = cpus.collect();
            let address = at.map_or_else(|| of.symbol.address.to_string(), |at| at.to_string());
            Namesake {
                cpus,
                symbol: Symbol {
                    name: of.symbol.name,
                    address,
                    space: space_name(space),
                    kind: char::from(of.symbol.kind),
                    size: of.symbol.size,
                    module: None,
                },
                position: Some(of.position),
                before: of.before,
                after: of.after,
            }
        }
        Found::Module { module, symbol } => Namesake {
            symbol: Symbol {
                name: symbol.name,
                address: symbol.address.to_string(),
                space: space_name(Space::Image),
                kind: char::from(symbol.kind),
                size: symbol.size,
                module: Some(module),
            },
            position: None,
            before: None,
            after: None,
            cpus: Vec::new(),
        },
    };
    Ok(Named {
        name: name.to_owned(),
        symbols: found.into_iter().map(of).collect(),
    })
}

impl Shown for Named {
    fn table(&self) -> String {
        let mut table = Table::new([
            ("ADDRESS", Side::Right),
            ("KIND", Side::Left),
            ("SIZE", Side::Right),
            ("POSITION", Side::Right),
            ("MODULE", Side::Left),
            ("WHERE", Side::Left),
            ("BETWEEN", Side::Left),
        ]);
        for found in &self.symbols {
            let Namesake { before, after, .. } = found;
            let between = match (before, after) {
                (None, None) => "-".to_owned(),
                _ => format!(
                    "{} and {}",
                    or_dash(before.as_ref()),
                    or_dash(after.as_ref())
                ),
            };
            let symbol = &found.symbol;
            table.row([
                symbol.address.clone(),
                symbol.kind.to_string(),
                symbol.size.to_string(),
                or_dash(found.position),
                or_dash(symbol.module.as_ref()),
                symbol.space.to_owned(),
                between,
            ]);
            for OfCpu { cpu, address } in &found.cpus {
                let empty = String::new;
                let place = format!("CPU {cpu}");
                table.row([
                    address.clone(),
                    empty(),
                    empty(),
                    empty(),
                    empty(),
                    place,
                    empty(),
                ]);
            }
        }
        table.text()
    }
}

/// What is at an address.
#[derive(Debug, Serialize)]
pub(super) struct There {
    address: String,
    symbol: String,
    /// Bytes from the symbol.
    offset: u64,
    module: Option<String>,
    /// The CPU whose variable it is.
    cpu: Option<usize>,
}

/// The symbol that `at` belongs to.
pub(super) fn at(recording: &Recording, at: Gva) -> Result<There, Failure> {
    let names = Names::read(&recording.kernel, &recording.dump)?;
    let found = names.at(at).ok_or(Failure::NothingAt { at })?;
    Ok(There {
        address: at.to_string(),
        symbol: found.symbol,
        offset: found.offset,
        module: found.module,
        cpu: found.cpu,
    })
}

impl Shown for There {
    fn table(&self) -> String {
        let mut text = String::new();
        line(&mut text, "address", &self.address);
        line(&mut text, "symbol", &self.symbol);
        line(&mut text, "offset", format_args!("{:#x}", self.offset));
        line(&mut text, "module", or_dash(self.module.as_ref()));
        line(&mut text, "cpu", or_dash(self.cpu));
        text
    }
}

/// A place in one word or three: `symbol+0x1f [module]`.
pub(super) fn place(place: &Place) -> String {
    let mut text = format!("{}+{:#x}", place.symbol, place.offset);
    if let Some(module) = &place.module {
        text.push_str(&format!(" [{module}]"));
    }
    if let Some(cpu) = place.cpu {
        text.push_str(&format!(" of CPU {cpu}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;

    use super::Asked;

    #[test]
    fn addresses_are_told_from_names() {
        let address = |text: &str| match Asked::parse(text) {
            Ok(Asked::Address(Gva(at))) => Some(at),
            _ => None,
        };
        assert_eq!(address("0xffffffff81000000"), Some(0xffff_ffff_8100_0000));
        assert_eq!(address("ffffffff81000000"), Some(0xffff_ffff_8100_0000));
        for name in ["deadbeef", "unix_ioctl", "x0", "a.constprop.0"] {
            assert!(matches!(Asked::parse(name), Ok(Asked::Name(found)) if found == name));
        }
        for wrong in ["", "0x", "0x+1", "0xg", "0x10000000000000000"] {
            assert!(Asked::parse(wrong).is_err(), "{wrong}");
        }
    }
}
