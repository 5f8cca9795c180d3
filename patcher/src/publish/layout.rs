//! Where this kernel has what it finds code by: its trees of modules, its list of bug tables, and in `struct module` all that
//! they lead to. Resolved from its types.
//!
//! Sources: kernel `include/linux/{module,rbtree_latch,rbtree_types}.h`, `kernel/module/{internal.h,tree_lookup.c}`, `lib/bug.c`.

use super::PublishError;
use super::tree::NodeLayout;
use crate::addr::Gva;
use crate::kernel::locate::Kernel;
use crate::kernel::types::{Member, TypeError, Types};

/// The two trees that the kernel looks in while it changes the other (`struct latch_tree_root`).
pub(super) const TREES: usize = 2;

/// All of it. Addresses are those of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The count of changes to the trees, four bytes: from it readers know that they have to look again.
    pub(super) changes: Gva,
    /// Where the address of each tree's first node is.
    pub(super) roots: [Gva; TREES],
    /// Below the first of these addresses and above the second there are no modules.
    pub(super) bounds: [Gva; 2],
    pub(super) node: NodeLayout,
    /// The list of modules with bug tables, where the kernel has one.
    pub(super) bugs: Option<Gva>,
    pub(super) links: Links,
    pub(super) module: ModuleLayout,
    pub(super) fixup: Option<FixupLayout>,
    pub(super) bug: Option<BugLayout>,
}

/// Offsets into `struct list_head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Links {
    pub(super) next: u64,
    pub(super) prev: u64,
}

/// Members of `struct module`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ModuleLayout {
    pub(super) size: u64,
    pub(super) name: Member,
    pub(super) state: Member,
    /// What `state` is of a module in use.
    pub(super) live: u64,
    pub(super) references: Option<Member>,
    /// Lists of which it is no part: each leads back to itself.
    pub(super) lists: Vec<u64>,
    pub(super) base: Member,
    /// All sizes of what begins at `base`; the first is that of the whole.
    pub(super) sizes: Vec<Member>,
    /// The node of each tree.
    pub(super) nodes: [u64; TREES],
    /// The pointer behind the nodes that leads back to the module.
    pub(super) owner: Member,
    pub(super) fixups: Option<[Member; 2]>,
    pub(super) bugs: Option<[Member; 2]>,
    /// Its link in the list of those with bug tables.
    pub(super) bug_link: u64,
    pub(super) symbols: Option<SymbolsLayout>,
    pub(super) orc: Option<OrcLayout>,
}

/// How a module says where its symbols are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SymbolsLayout {
    /// The pointer to the three that follow, and where it leads.
    pub(super) pointer: Member,
    pub(super) to: u64,
    pub(super) table: Member,
    pub(super) count: Member,
    pub(super) strings: Member,
    pub(super) types: Option<Member>,
}

/// How a module says where its unwind table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OrcLayout {
    pub(super) count: Member,
    pub(super) ips: Member,
    pub(super) entries: Member,
}

/// `struct exception_table_entry`: its bytes, and where it has what. Each address is a distance from its own place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FixupLayout {
    pub(super) size: u64,
    pub(super) insn: u64,
    pub(super) fixup: u64,
    /// What is to be done there.
    pub(super) data: u64,
}

/// `struct bug_entry`: its bytes, and where the distance of the instruction from there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BugLayout {
    pub(super) size: u64,
    pub(super) insn: u64,
}

impl Layout {
    /// That of `kernel`, or `None` when it has no tree to find modules in.
    pub(super) fn resolve(kernel: &Kernel) -> Result<Option<Self>, PublishError> {
        let (symbols, types) = (kernel.image().symbols(), kernel.image().types());
        let Some(root) = symbols.optional("mod_tree")? else {
            return Ok(None);
        };
        if !types.has_member("mod_tree_root", "root") {
            return Ok(None);
        }
        let root = kernel.runtime(root.address);
        let at = |path: &str| -> Result<Gva, TypeError> {
            let offset = types.offset_of("mod_tree_root", path)?;
            Ok(Gva(root.0.wrapping_add(offset)))
        };
        // The count got a type of its own in Linux 5.10.
        let changes = match at("root.seq.seqcount.sequence") {
            Ok(changes) => changes,
            Err(_) => at("root.seq.sequence")?,
        };
        let first = at("root.tree[0]")?;
        let second = at("root.tree[1]")?;
        let pointer = types.offset_of("rb_root", "rb_node")?;
        let bugs = symbols.optional("module_bug_list")?;
        Ok(Some(Self {
            changes,
            roots: [first, second].map(|at| Gva(at.0.wrapping_add(pointer))),
            bounds: [at("addr_min")?, at("addr_max")?],
            node: NodeLayout {
                parent: types.offset_of("rb_node", "__rb_parent_color")?,
                left: types.offset_of("rb_node", "rb_left")?,
                right: types.offset_of("rb_node", "rb_right")?,
            },
            bugs: bugs.map(|bugs| kernel.runtime(bugs.address)),
            links: Links {
                next: types.offset_of("list_head", "next")?,
                prev: types.offset_of("list_head", "prev")?,
            },
            module: module(types)?,
            fixup: fixup(types),
            bug: bug(types),
        }))
    }
}

/// Newer and older forms than this one exist; where the kernel has another, nothing can be said of fixups.
fn fixup(types: &Types) -> Option<FixupLayout> {
    let name = "exception_table_entry";
    let of = |member| types.offset_of(name, member).ok();
    Some(FixupLayout {
        size: types.size_of(name).ok()?,
        insn: of("insn")?,
        fixup: of("fixup")?,
        data: of("data")?,
    })
}

fn bug(types: &Types) -> Option<BugLayout> {
    Some(BugLayout {
        size: types.size_of("bug_entry").ok()?,
        insn: types.offset_of("bug_entry", "bug_addr_disp").ok()?,
    })
}

fn module(types: &Types) -> Result<ModuleLayout, PublishError> {
    let of = |path: &str| types.member("module", path);
    let offset = |path: &str| types.offset_of("module", path);
    let pair = |a: &str, b: &str| match (of(a), of(b)) {
        (Ok(a), Ok(b)) => Some([a, b]),
        _ => None,
    };
    // Since Linux 6.4 each kind of memory has a part of its own; before, one part was for all that stays.
    let (text, sizes) = if types.has_member("module", "mem") {
        let kind = types.enumerator("mod_mem_type", "MOD_TEXT")?;
        (format!("mem[{kind}]"), &["size"][..])
    } else {
        let sizes = &["size", "text_size", "ro_size", "ro_after_init_size"][..];
        ("core_layout".to_owned(), sizes)
    };
    let part = |member: &str| of(&format!("{text}.{member}"));
    let node = |tree: usize| offset(&format!("{text}.mtn.node.node[{tree}]"));
    let lists = ["list", "source_list", "target_list"];
    let live = types.enumerator("module_state", "MODULE_STATE_LIVE")?;
    Ok(ModuleLayout {
        size: types.size_of("module")?,
        name: of("name")?,
        state: of("state")?,
        live: live.cast_unsigned(),
        references: of("refcnt").ok(),
        lists: lists
            .into_iter()
            .filter_map(|list| offset(list).ok())
            .collect(),
        base: part("base")?,
        sizes: sizes
            .iter()
            .map(|size| part(size))
            .collect::<Result<_, _>>()?,
        nodes: [node(0)?, node(1)?],
        owner: part("mtn.mod")?,
        fixups: pair("extable", "num_exentries"),
        bugs: pair("bug_table", "num_bugs"),
        bug_link: offset("bug_list").unwrap_or(0),
        symbols: symbols(types)?,
        orc: orc(types)?,
    })
}

fn symbols(types: &Types) -> Result<Option<SymbolsLayout>, PublishError> {
    let of = |path: &str| types.member("module", path);
    let (Ok(pointer), Ok(to)) = (of("kallsyms"), of("core_kallsyms")) else {
        return Ok(None);
    };
    let part = |member: &str| of(&format!("core_kallsyms.{member}"));
    Ok(Some(SymbolsLayout {
        pointer,
        to: to.offset,
        table: part("symtab")?,
        count: part("num_symtab")?,
        strings: part("strtab")?,
        types: part("typetab").ok(),
    }))
}

fn orc(types: &Types) -> Result<Option<OrcLayout>, PublishError> {
    let of = |path: &str| types.member("module", path);
    let Ok(count) = of("arch.num_orcs") else {
        return Ok(None);
    };
    Ok(Some(OrcLayout {
        count,
        ips: of("arch.orc_unwind_ip")?,
        entries: of("arch.orc_unwind")?,
    }))
}
