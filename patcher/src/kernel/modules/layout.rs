//! Where `struct module` has what: resolved from the kernel's types.

use std::ops::Range;

use super::{ModuleError, ModuleState, PartKind};
use crate::addr::Gva;
use crate::kernel::gather::Gather;
use crate::kernel::image::Image;
use crate::kernel::types::{TypeError, Types};

/// Bytes that a name may have, its zero included (`MODULE_NAME_LEN`).
pub(super) const NAME: usize = 56;

/// The parts of a module's memory, and the bytes of all.
pub(super) type Parts = (Vec<(PartKind, Range<Gva>)>, u64);

/// Offsets into `struct module`.
pub(super) struct ModuleLayout {
    pub(super) list: u64,
    pub(super) state: u64,
    pub(super) name: u64,
    pub(super) taints: u64,
    pub(super) references: Option<u64>,
    pub(super) init: Option<u64>,
    pub(super) exit: Option<u64>,
    pub(super) memory: MemoryLayout,
    pub(super) users: Option<UserLayout>,
    pub(super) kallsyms: Option<KallsymsLayout>,
    states: Vec<(String, i64)>,
}

/// How the kernel describes a module's memory.
pub(super) enum MemoryLayout {
    /// One part for each kind (from Linux 6.4 on).
    Kinds(Vec<PartLayout>),
    /// The core and what is needed for the start, each with its kinds one behind the other.
    Halves(Vec<HalfLayout>),
}

pub(super) struct PartLayout {
    pub(super) kind: PartKind,
    pub(super) base: u64,
    pub(super) size: u64,
}

pub(super) struct HalfLayout {
    pub(super) base: u64,
    text: u64,
    ro: u64,
    sealed: u64,
    /// The size of the whole.
    pub(super) end: u64,
    kinds: [PartKind; 4],
}

impl HalfLayout {
    /// Each kind, and the field that says where it ends: the next begins there.
    pub(super) fn cuts(&self) -> impl Iterator<Item = (PartKind, u64)> {
        let ends = [self.text, self.ro, self.sealed, self.end];
        self.kinds.into_iter().zip(ends)
    }
}

/// The list of who uses a module.
pub(super) struct UserLayout {
    pub(super) head: u64,
    pub(super) link: u64,
    pub(super) source: u64,
}

pub(super) struct KallsymsLayout {
    pub(super) pointer: u64,
    pub(super) exports: u64,
    pub(super) export_count: u64,
}

impl ModuleLayout {
    pub(super) fn resolve(image: &Image) -> Result<Self, ModuleError> {
        let types = image.types();
        let of = |path: &str| types.offset_of("module", path);
        let name = types.member("module", "name")?;
        if name.size != NAME as u64 {
            return Err(ModuleError::Unknown {
                of: "length of a module's name",
                name: name.size.to_string(),
            });
        }
        let users = match of("source_list") {
            Ok(head) => Some(UserLayout {
                head,
                link: types.offset_of("module_use", "source_list")?,
                source: types.offset_of("module_use", "source")?,
            }),
            Err(_) => None,
        };
        let kallsyms = match of("kallsyms") {
            Ok(pointer) => Some(KallsymsLayout {
                pointer,
                exports: of("syms")?,
                export_count: of("num_syms")?,
            }),
            Err(_) => None,
        };
        Ok(Self {
            list: of("list")?,
            state: of("state")?,
            name: name.offset,
            taints: of("taints")?,
            references: of("refcnt").ok(),
            init: of("init").ok(),
            exit: of("exit").ok(),
            memory: memory(types)?,
            users,
            kallsyms,
            states: types.enumerators("module_state")?,
        })
    }

    pub(super) fn gather(&self) -> Gather {
        let mut fields = vec![
            (self.list, 8),
            (self.state, 4),
            (self.name, NAME as u64),
            (self.taints, 8),
        ];
        fields.extend(self.references.map(|at| (at, 4)));
        fields.extend(self.init.into_iter().chain(self.exit).map(|at| (at, 8)));
        if let Some(kallsyms) = &self.kallsyms {
            let (pointer, exports) = (kallsyms.pointer, kallsyms.exports);
            fields.extend([(pointer, 8), (exports, 8), (kallsyms.export_count, 4)]);
        }
        match &self.memory {
            MemoryLayout::Kinds(kinds) => {
                fields.extend(
                    kinds
                        .iter()
                        .flat_map(|part| [(part.base, 8), (part.size, 4)]),
                );
            }
            MemoryLayout::Halves(halves) => {
                fields.extend(halves.iter().map(|half| (half.base, 8)));
                let sizes = halves.iter().flat_map(HalfLayout::cuts);
                fields.extend(sizes.map(|(_, at)| (at, 4)));
            }
        }
        Gather::new(&fields)
    }

    pub(super) fn state_of(&self, value: u32) -> Result<ModuleState, ModuleError> {
        let unknown = |name: String| ModuleError::Unknown {
            of: "module state",
            name,
        };
        let known = self.states.iter().find(|(_, of)| *of == i64::from(value));
        let (name, _) = known.ok_or_else(|| unknown(value.to_string()))?;
        Ok(match name.as_str() {
            "MODULE_STATE_LIVE" => ModuleState::Live,
            "MODULE_STATE_COMING" => ModuleState::Coming,
            "MODULE_STATE_GOING" => ModuleState::Going,
            "MODULE_STATE_UNFORMED" => ModuleState::Unformed,
            _ => return Err(unknown(name.clone())),
        })
    }
}

fn memory(types: &Types) -> Result<MemoryLayout, ModuleError> {
    let of = |path: &str| types.offset_of("module", path);
    if !types.has_member("module", "mem") {
        use PartKind::{Data, InitData, InitRoData, InitText, RoAfterInit, RoData, Text};
        let half = |name: &str, kinds| {
            let of = |path: &str| of(&format!("{name}.{path}"));
            Ok::<HalfLayout, TypeError>(HalfLayout {
                base: of("base")?,
                text: of("text_size")?,
                ro: of("ro_size")?,
                sealed: of("ro_after_init_size")?,
                end: of("size")?,
                kinds,
            })
        };
        return Ok(MemoryLayout::Halves(vec![
            half("core_layout", [Text, RoData, RoAfterInit, Data])?,
            half("init_layout", [InitText, InitRoData, InitData, InitData])?,
        ]));
    }
    let mut kinds = Vec::new();
    for (name, value) in types.enumerators("mod_mem_type")? {
        let kind = match name.as_str() {
            "MOD_TEXT" => PartKind::Text,
            "MOD_DATA" => PartKind::Data,
            "MOD_RODATA" => PartKind::RoData,
            "MOD_RO_AFTER_INIT" => PartKind::RoAfterInit,
            "MOD_INIT_TEXT" => PartKind::InitText,
            "MOD_INIT_DATA" => PartKind::InitData,
            "MOD_INIT_RODATA" => PartKind::InitRoData,
            "MOD_MEM_NUM_TYPES" | "MOD_INVALID" => continue,
            _ => {
                return Err(ModuleError::Unknown {
                    of: "kind of module memory",
                    name,
                });
            }
        };
        kinds.push(PartLayout {
            kind,
            base: of(&format!("mem[{value}].base"))?,
            size: of(&format!("mem[{value}].size"))?,
        });
    }
    Ok(MemoryLayout::Kinds(kinds))
}

/// The stretches that `parts` make up where they lie one behind the other.
pub(super) fn ranges_within(parts: &[(PartKind, Range<Gva>)]) -> Vec<Range<Gva>> {
    let mut ranges: Vec<Range<Gva>> = parts.iter().map(|(_, range)| range.clone()).collect();
    ranges.sort_by_key(|range| range.start);
    let mut stretches: Vec<Range<Gva>> = Vec::new();
    for range in ranges {
        match stretches.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => stretches.push(range),
        }
    }
    stretches
}
