//! Names and addresses of the running kernel, its modules and its CPUs' variables, both ways.

use patcher::addr::Gva;
use patcher::kernel::names::{BPF, Found, Names};
use patcher::kernel::symbols::{self as own, Space};
use patcher::kernel::tasks::{Cpu, Tasks};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::place::Places;
use super::table::{Side, Table, line, or_dash};
use super::{Shown, Subject, ViewError};

/// Digits of an address that is written without `0x`.
const DIGITS: usize = 16;

/// What was asked for, unless it is all symbols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Those of this name.
    Name(String),
    /// What is at this address.
    Address(Gva),
}

impl Asked {
    /// Tells an address from a name: it begins with `0x`, or is 16 hexadecimal digits as in `/proc/kallsyms`.
    ///
    /// # Errors
    /// [`ViewError::Address`] when it is neither.
    pub fn parse(text: &str) -> Result<Self, ViewError> {
        let bare = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let address = match text.strip_prefix("0x") {
            Some(_) => number(text),
            None if bare => number(&format!("0x{text}")),
            None if !text.is_empty() => return Ok(Self::Name(text.to_owned())),
            None => None,
        };
        address
            .map(Gva)
            .map(Self::Address)
            .ok_or_else(|| ViewError::Address {
                text: text.to_owned(),
            })
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(at) => write!(f, "{at}"),
        }
    }
}

/// A number as C writes it: decimal, or hexadecimal behind `0x`.
pub(super) fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // A sign would be read, too.
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(digits, radix).ok().filter(|_| plain)
}

/// The symbol at an address, or those of a name, or all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Symbols {
    /// What is at the address that was asked for.
    At(SymbolAt),
    /// The kernel's in the order of addresses, then each module's, then BPF's.
    List(SymbolList),
}

/// Symbols.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SymbolList {
    /// The name that was asked for; left out when all are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The symbols.
    pub symbols: Vec<Symbol>,
}

/// What an address means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SymbolSpace {
    /// It is where the symbol is in the running kernel.
    Address,
    /// It is an offset into each CPU's area.
    PerCpu,
    /// It is a mere value.
    Absolute,
}

/// One symbol. What tells it from its namesakes is there only if a name was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Symbol {
    /// Its name.
    pub name: String,
    /// Address in the running kernel, offset or value, as `space` says.
    pub address: String,
    /// What `address` means.
    pub space: SymbolSpace,
    /// The letter of nm(1).
    pub kind: char,
    /// Bytes: of the kernel's own to the next symbol, of a module's as its symbol table says.
    pub size: u64,
    /// The module that it is in, `bpf` for code that BPF made; left out of the kernel's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Which of the kernel's own symbols of the name it is, from 1 in the order of addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<usize>,
    /// The neighbour of another name below it: symbols of one source file lie together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// The neighbour of another name above it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Where each CPU has it, when it is per CPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<SymbolOfCpu>,
}

/// Where one CPU has a symbol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SymbolOfCpu {
    /// The CPU.
    pub cpu: usize,
    /// Where.
    pub address: String,
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SymbolAt {
    /// The address.
    pub address: String,
    /// The symbol that it belongs to.
    pub symbol: String,
    /// Bytes from the symbol.
    pub offset: u64,
    /// Bytes of the symbol.
    pub size: u64,
    /// The module that it is in, or the update; `bpf` for code that BPF made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// The CPU whose variable it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<usize>,
}

/// Finds what was asked for.
pub(super) fn read(subject: &Subject<'_>, asked: Option<&Asked>) -> Result<Symbols, ViewError> {
    match asked {
        None => all(subject).map(Symbols::List),
        Some(Asked::Name(name)) => named(subject, name).map(Symbols::List),
        Some(Asked::Address(at)) => there(subject, *at).map(Symbols::At),
    }
}

fn space_of(space: Space) -> SymbolSpace {
    match space {
        Space::Image => SymbolSpace::Address,
        Space::PerCpu => SymbolSpace::PerCpu,
        Space::Absolute => SymbolSpace::Absolute,
    }
}

fn symbol(of: own::Symbol, space: Space, address: String) -> Symbol {
    Symbol {
        name: of.name,
        address,
        space: space_of(space),
        kind: char::from(of.kind),
        size: of.size,
        module: None,
        position: None,
        before: None,
        after: None,
        cpus: Vec::new(),
    }
}

fn of_module(of: &patcher::kernel::modules::symbols::ModuleSymbol, module: &str) -> Symbol {
    Symbol {
        name: of.name.clone(),
        address: of.address.to_string(),
        space: SymbolSpace::Address,
        kind: char::from(of.kind),
        size: of.size,
        module: Some(module.to_owned()),
        position: None,
        before: None,
        after: None,
        cpus: Vec::new(),
    }
}

/// All symbols: the kernel's in the order of addresses, then each module's, then BPF's.
fn all(subject: &Subject<'_>) -> Result<SymbolList, ViewError> {
    let kernel = subject.kernel;
    let names = Names::read(kernel, subject.guest)?;
    let table = kernel.image().symbols();
    let own = table.iter().map(|found| {
        let space = table.space(&found);
        let address = match space {
            Space::Image => kernel.runtime(found.address).0,
            Space::PerCpu | Space::Absolute => found.address.0,
        };
        symbol(found, space, format!("{address:#x}"))
    });
    let mut symbols: Vec<Symbol> = own.collect();
    for (module, its_symbols) in names.modules() {
        let defined = its_symbols.iter().filter(|symbol| !symbol.undefined);
        symbols.extend(defined.map(|symbol| of_module(symbol, &module.name)));
    }
    symbols.extend(names.bpf().iter().map(|code| of_module(code, BPF)));
    Ok(SymbolList {
        name: None,
        symbols,
    })
}

/// All symbols called `name`.
fn named(subject: &Subject<'_>, name: &str) -> Result<SymbolList, ViewError> {
    let Subject { kernel, guest, .. } = subject;
    let names = Names::read(kernel, *guest)?;
    let cpus = Tasks::read(kernel, *guest)?.cpus;
    let found = names.find(name);
    if found.is_empty() {
        // Its error knows similar names.
        kernel.image().symbols().lookup(name)?;
    }
    let symbols = found
        .into_iter()
        .map(|found| namesake(found, &names, &cpus));
    Ok(SymbolList {
        name: Some(name.to_owned()),
        symbols: symbols.collect(),
    })
}

fn namesake(found: Found, names: &Names<'_>, cpus: &[Cpu]) -> Symbol {
    match found {
        Found::Kernel { at, space, of } => {
            let cpus = cpus.iter().filter_map(|cpu| {
                let address = names.of_cpu(&of.symbol, cpu.index)?.to_string();
                let cpu = cpu.index;
                Some(SymbolOfCpu { cpu, address })
            });
            let cpus = cpus.collect();
            let address = at.map_or_else(|| of.symbol.address.to_string(), |at| at.to_string());
            Symbol {
                position: Some(of.position),
                before: of.before,
                after: of.after,
                cpus,
                ..symbol(of.symbol, space, address)
            }
        }
        Found::Module { module, symbol } => of_module(&symbol, &module),
    }
}

/// What tells one of several symbols of a name from the others.
pub(super) fn whereabouts(found: &Found) -> String {
    match found {
        Found::Kernel { at, of, .. } => {
            let address = at.map_or_else(|| of.symbol.address.to_string(), |at| at.to_string());
            let neighbour = of.before.as_ref().or(of.after.as_ref());
            let near = neighbour.map(|near| format!(" near {near}"));
            format!("{address}{}", near.unwrap_or_default())
        }
        Found::Module { module, symbol } => format!("{} in {module}", symbol.address),
    }
}

/// The symbol that `at` belongs to.
fn there(subject: &Subject<'_>, at: Gva) -> Result<SymbolAt, ViewError> {
    let places = Places::read(subject)?;
    let found = places.at(at).ok_or(ViewError::NothingAt { at })?;
    Ok(SymbolAt {
        address: at.to_string(),
        symbol: found.symbol,
        offset: found.offset,
        size: found.size,
        module: found.module,
        cpu: found.cpu,
    })
}

impl Shown for Symbols {
    fn table(&self) -> String {
        match self {
            Self::At(found) => at_table(found),
            Self::List(list) if list.name.is_some() => named_table(&list.symbols),
            Self::List(list) => all_table(&list.symbols),
        }
    }
}

fn at_table(found: &SymbolAt) -> String {
    let mut text = String::new();
    line(&mut text, "address", &found.address);
    line(&mut text, "symbol", &found.symbol);
    line(&mut text, "offset", format_args!("{:#x}", found.offset));
    line(&mut text, "size", format_args!("{:#x}", found.size));
    line(&mut text, "module", or_dash(found.module.as_ref()));
    line(&mut text, "cpu", or_dash(found.cpu));
    text
}

fn all_table(symbols: &[Symbol]) -> String {
    let mut table = Table::new([
        ("ADDRESS", Side::Right),
        ("KIND", Side::Left),
        ("SIZE", Side::Right),
        ("MODULE", Side::Left),
        ("NAME", Side::Left),
    ]);
    for symbol in symbols {
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

fn space_name(space: SymbolSpace) -> &'static str {
    match space {
        SymbolSpace::Address => "address",
        SymbolSpace::PerCpu => "per CPU",
        SymbolSpace::Absolute => "absolute",
    }
}

fn named_table(symbols: &[Symbol]) -> String {
    let mut table = Table::new([
        ("ADDRESS", Side::Right),
        ("KIND", Side::Left),
        ("SIZE", Side::Right),
        ("POSITION", Side::Right),
        ("MODULE", Side::Left),
        ("WHERE", Side::Left),
        ("BETWEEN", Side::Left),
    ]);
    for symbol in symbols {
        let between = match (&symbol.before, &symbol.after) {
            (None, None) => "-".to_owned(),
            (before, after) => {
                let (before, after) = (or_dash(before.as_ref()), or_dash(after.as_ref()));
                format!("{before} and {after}")
            }
        };
        table.row([
            symbol.address.clone(),
            symbol.kind.to_string(),
            symbol.size.to_string(),
            or_dash(symbol.position),
            or_dash(symbol.module.as_ref()),
            space_name(symbol.space).to_owned(),
            between,
        ]);
        for SymbolOfCpu { cpu, address } in &symbol.cpus {
            let mut row: [String; 7] = std::array::from_fn(|_| String::new());
            row[0].clone_from(address);
            row[5] = format!("CPU {cpu}");
            table.row(row);
        }
    }
    table.text()
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
