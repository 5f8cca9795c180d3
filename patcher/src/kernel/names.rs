//! Names and addresses of the whole running kernel, both ways: its image, its modules, the code that BPF made, and each CPU's variables.
//!
//! [`Names`] is a picture of one moment: modules come and go. An address has one answer or none; a name has as many as
//! there are symbols of it, each with what tells it from the others.

use std::ops::Range;

use super::bpf::{Bpf, BpfCode};
use super::locate::{Kernel, KernelError};
use super::modules::symbols::ModuleSymbol;
use super::modules::{self, Module, ModuleError};
use super::symbols::{Namesake, Space, Symbol};
use super::tasks::Tasks;
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;

/// The name that the kernel gives BPF's code where it names modules.
pub const BPF: &str = "bpf";

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The symbol.
    pub symbol: String,
    /// Bytes from it.
    pub offset: u64,
    /// Bytes of it: of the kernel's own to the next symbol, of a module's as its symbol table says.
    pub size: u64,
    /// The module that it is in, or [`BPF`]; `None` for the kernel's own.
    pub module: Option<String>,
    /// The CPU whose variable it is.
    pub cpu: Option<usize>,
}

/// A symbol of some name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// One of the kernel's own; `at` is `None` when each CPU has its own or it is but a value.
    Kernel {
        /// Where it is in the running kernel.
        at: Option<Gva>,
        /// What its address means.
        space: Space,
        /// Itself and its neighbours.
        of: Namesake,
    },
    /// One of a module's.
    Module {
        /// The module.
        module: String,
        /// Itself.
        symbol: ModuleSymbol,
    },
}

/// The names of one moment.
#[derive(Debug)]
pub struct Names<'a> {
    kernel: &'a Kernel,
    modules: Vec<(Module, Vec<ModuleSymbol>)>,
    /// The code that BPF made, in the order of addresses.
    bpf: Vec<ModuleSymbol>,
    /// Where each CPU's variables are.
    areas: Vec<(usize, Range<Gva>)>,
}

impl Kernel {
    /// The symbol of the image that the bytes at `at` of the running kernel belong to, and how far in.
    #[must_use]
    pub fn symbol_at(&self, at: Gva) -> Option<(Symbol, u64)> {
        let link = LinkAddr(at.0.wrapping_sub(self.slide()));
        let found = self.image().symbols().containing(link);
        found.filter(|(symbol, _)| !symbol.percpu)
    }
}

impl<'a> Names<'a> {
    /// Reads what `kernel` has in `guest`, which must stand still.
    ///
    /// # Errors
    /// When the modules or CPUs cannot be read.
    pub fn read<R: ReadPhys + ?Sized>(kernel: &'a Kernel, guest: &R) -> Result<Self, ModuleError> {
        let mut modules = Vec::new();
        for module in modules::read(kernel, guest)? {
            let mut symbols = module.symbols(kernel, guest)?;
            symbols.sort_by_key(|symbol| symbol.address);
            modules.push((module, symbols));
        }
        let symbols = kernel.image().symbols();
        let end = symbols.optional("__per_cpu_end")?;
        let mut areas = Vec::new();
        for cpu in &Tasks::read(kernel, guest)?.cpus {
            let len = end.as_ref().map_or(0, |end| symbols.percpu_offset(end));
            let unsound = KernelError::Unsound {
                what: "area of a CPU's variables",
                at: Gva(cpu.area),
                value: len,
            };
            areas.push((cpu.index, Gva(cpu.area).range(len).ok_or(unsound)?));
        }
        Ok(Self {
            kernel,
            modules,
            bpf: bpf(kernel, guest)?,
            areas,
        })
    }

    /// The modules, with their symbols in the order of addresses.
    #[must_use]
    pub fn modules(&self) -> &[(Module, Vec<ModuleSymbol>)] {
        &self.modules
    }

    /// The code that BPF made, in the order of addresses: the kernel shows it as that of a module called [`BPF`].
    #[must_use]
    pub fn bpf(&self) -> &[ModuleSymbol] {
        &self.bpf
    }

    /// What is at `at`.
    #[must_use]
    pub fn at(&self, at: Gva) -> Option<Place> {
        if let Some((symbol, offset)) = self.kernel.symbol_at(at) {
            return Some(Place {
                symbol: symbol.name,
                offset,
                size: symbol.size,
                module: None,
                cpu: None,
            });
        }
        let cpu = self.areas.iter().find(|(_, area)| area.contains(&at));
        if let Some((cpu, area)) = cpu {
            let symbols = self.kernel.image().symbols();
            let within = symbols
                .percpu_start()
                .checked_add(at.offset_from(area.start)?)?;
            let (symbol, offset) = symbols.containing(within)?;
            return Some(Place {
                symbol: symbol.name,
                offset,
                size: symbol.size,
                module: None,
                cpu: Some(*cpu),
            });
        }
        if let Some(found) = self.in_bpf(at) {
            return Some(found);
        }
        let owner = |(module, _): &&(Module, Vec<ModuleSymbol>)| module.part_at(at).is_some();
        let (module, symbols) = self.modules.iter().find(owner)?;
        let part = module.part_at(at)?;
        let below = &symbols[..symbols.partition_point(|symbol| symbol.address <= at)];
        // What another part ends with does not reach into this one.
        let near = below.iter().rev().find(|symbol| !symbol.undefined);
        let symbol = near.filter(|symbol| module.part_at(symbol.address) == Some(part))?;
        Some(Place {
            symbol: symbol.name.clone(),
            offset: at.offset_from(symbol.address)?,
            size: symbol.size,
            module: Some(module.name.clone()),
            cpu: None,
        })
    }

    fn in_bpf(&self, at: Gva) -> Option<Place> {
        let after = self.bpf.partition_point(|code| code.address <= at);
        let code = self.bpf.get(after.checked_sub(1)?)?;
        let offset = at.offset_from(code.address)?;
        (offset < code.size).then(|| Place {
            symbol: code.name.clone(),
            offset,
            size: code.size,
            module: Some(BPF.to_owned()),
            cpu: None,
        })
    }

    /// All symbols called `name`: the kernel's own in the order of addresses, then the modules', then BPF's.
    #[must_use]
    pub fn find(&self, name: &str) -> Vec<Found> {
        let symbols = self.kernel.image().symbols();
        let own = symbols.namesakes(name).into_iter().map(|of| {
            let space = symbols.space(&of.symbol);
            Found::Kernel {
                at: (space == Space::Image).then(|| self.kernel.runtime(of.symbol.address)),
                space,
                of,
            }
        });
        let modules = self.modules.iter().flat_map(|(module, symbols)| {
            let named = symbols
                .iter()
                .filter(|symbol| symbol.name == name && !symbol.undefined);
            named.map(|symbol| Found::Module {
                module: module.name.clone(),
                symbol: symbol.clone(),
            })
        });
        let bpf = self.bpf.iter().filter(|code| code.name == name);
        let bpf = bpf.map(|code| Found::Module {
            module: BPF.to_owned(),
            symbol: code.clone(),
        });
        own.chain(modules).chain(bpf).collect()
    }

    /// Where CPU `cpu` has the variable that the per-CPU symbol `symbol` names.
    #[must_use]
    pub fn of_cpu(&self, symbol: &Symbol, cpu: usize) -> Option<Gva> {
        let (_, area) = self.areas.iter().find(|(index, _)| *index == cpu)?;
        let symbols = self.kernel.image().symbols();
        let at = area.start.checked_add(symbols.percpu_offset(symbol))?;
        (symbol.percpu && area.contains(&at)).then_some(at)
    }
}

/// BPF's code as symbols.
fn bpf<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Vec<ModuleSymbol>, KernelError> {
    let symbol = |code: &BpfCode| {
        Ok(ModuleSymbol {
            name: code.name(kernel, guest)?,
            address: code.range.start,
            kind: b't',
            size: code.range.end.0 - code.range.start.0,
            undefined: false,
        })
    };
    Bpf::read(kernel, guest)?
        .pieces()
        .iter()
        .map(symbol)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Found, Names, Place};
    use crate::addr::Gva;
    use crate::kernel::modules::tests::fixture;
    use crate::kernel::symbols::Space;
    use crate::kernel::testing::guest::SLIDE;
    use crate::kernel::testing::{FORMS, TEXT};

    const CODE: u64 = 0xffff_ffff_c0a0_0000;

    #[test]
    fn addresses_lead_to_names_wherever_they_are() {
        for form in FORMS {
            let mut fixture = fixture(form);
            let code = (CODE + 0x80, CODE + 0x90, "bpf_prog_1", true);
            fixture.guest.bpf(&[code]);
            let kernel = fixture.guest.kernel();
            let names = Names::read(&kernel, &fixture.guest).unwrap();
            let check = |at: u64, want: Option<(&str, u64, Option<&str>, Option<usize>)>| {
                let got = names.at(Gva(at));
                let want = want.map(|(symbol, offset, module, cpu)| Place {
                    symbol: symbol.to_owned(),
                    offset,
                    size: got.as_ref().map_or(0, |place| place.size),
                    module: module.map(str::to_owned),
                    cpu,
                });
                assert_eq!(got, want, "{form:?} {at:#x}");
            };
            check(TEXT + SLIDE + 0x305, Some(("victim", 5, None, None)));
            let victim = kernel.image().symbols().lookup("victim").unwrap();
            let place = names.at(kernel.runtime(victim.address)).unwrap();
            assert_eq!(place.size, victim.size);
            check(
                fixture.memory + 0x1f,
                Some(("alpha_close", 15, Some("alpha"), None)),
            );
            // Data of the module, behind its last symbol of code.
            check(fixture.memory + 0x600, None);
            check(
                fixture.guest.percpu(1, "runqueues") + 2,
                Some(("runqueues", 2, None, Some(1))),
            );
            check(0x1234, None);
            check(CODE + 0x8f, Some(("bpf_prog_1", 0xf, Some("bpf"), None)));
            check(CODE + 0x90, None);
            let runqueues = kernel.image().symbols().lookup("runqueues").unwrap();
            let at = fixture.guest.percpu(1, "runqueues");
            assert_eq!(names.of_cpu(&runqueues, 1), Some(Gva(at)));
            assert_eq!(names.of_cpu(&runqueues, 2), None);
        }
    }

    #[test]
    fn names_lead_to_all_that_bear_them() {
        for form in FORMS {
            let mut fixture = fixture(form);
            let code = (CODE, CODE + 0x10, "bpf_prog_1", true);
            fixture.guest.bpf(&[code]);
            let kernel = fixture.guest.kernel();
            let names = Names::read(&kernel, &fixture.guest).unwrap();
            let twins = names.find("twin");
            assert!(
                matches!(twins.as_slice(), [Found::Kernel { at: Some(_), .. }, Found::Kernel { of, .. }] if of.position == 2)
            );
            let hot = names.find("runqueues");
            assert!(matches!(
                hot.as_slice(),
                [Found::Kernel {
                    at: None,
                    space: Space::PerCpu,
                    ..
                }]
            ));
            let open = names.find("alpha_open");
            assert!(matches!(open.as_slice(), [Found::Module { module, .. }] if module == "alpha"));
            let program = names.find("bpf_prog_1");
            assert!(
                matches!(program.as_slice(), [Found::Module { module, .. }] if module == "bpf")
            );
            // Used there, and defined nowhere here.
            assert_eq!(names.find("printk"), []);
        }
    }
}
