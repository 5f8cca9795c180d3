//! The made-up kernel's types of modules and of its log.

use super::{Basic, Btf, Form};

/// Offsets of the made-up `module`.
pub(crate) mod module {
    pub(crate) const SIZE: u64 = 0x200;
    pub(crate) const STATE: u64 = 0;
    pub(crate) const LIST: u64 = 8;
    pub(crate) const NAME: u64 = 24;
    pub(crate) const EXPORTS: u64 = 80;
    pub(crate) const EXPORT_COUNT: u64 = 88;
    pub(crate) const TAINTS: u64 = 96;
    pub(crate) const INIT: u64 = 104;
    pub(crate) const REFERENCES: u64 = 120;
    pub(crate) const USERS: u64 = 128;
    pub(crate) const KALLSYMS: u64 = 144;
    pub(crate) const MEMORY: u64 = 160;
}

/// What `kernel/modules` asks about, in either form.
pub(super) fn module_types(btf: &mut Btf, form: Form, (int, long, byte, list): Basic) {
    let name = btf.array(byte, 56);
    let atomic = btf.structure("atomic_t", 4, &[("counter", int, 0)]);
    let unwind = [
        ("num_orcs", int, 0),
        ("orc_unwind_ip", long, 8),
        ("orc_unwind", long, 16),
    ];
    let arch = btf.structure("mod_arch_specific", 24, &unwind);
    let nodes = tree_types(btf, form, (int, long, byte, list));
    let tables = [
        ("symtab", long, 0),
        ("num_symtab", int, 8),
        ("strtab", long, 16),
        ("typetab", long, 24),
    ];
    let symbols = btf.structure("mod_kallsyms", 32, &tables);
    let mut members = vec![
        ("core_kallsyms", symbols, 336),
        ("extable", long, 368),
        ("num_exentries", int, 376),
        ("bug_list", list, 384),
        ("bug_table", long, 400),
        ("num_bugs", int, 408),
        ("target_list", list, 416),
        ("arch", arch, 0x1c0),
        ("state", int, 0),
        ("list", list, 8),
        ("name", name, 24),
        ("syms", long, 80),
        ("num_syms", int, 88),
        ("taints", long, 96),
        ("init", long, 104),
        ("exit", long, 112),
        ("refcnt", atomic, 120),
        ("source_list", list, 128),
        ("kallsyms", long, 144),
    ];
    if form == Form::New {
        // The nodes lie behind all parts.
        let part = [("base", long, 0), ("size", int, 8), ("mtn", nodes, 120)];
        let part = btf.structure("module_memory", 16, &part);
        members.push(("mem", btf.array(part, 7), 160));
        let kinds = [
            "TEXT",
            "DATA",
            "RODATA",
            "RO_AFTER_INIT",
            "INIT_TEXT",
            "INIT_DATA",
            "INIT_RODATA",
            "MEM_NUM_TYPES",
        ];
        let names: Vec<String> = kinds.iter().map(|kind| format!("MOD_{kind}")).collect();
        let values: Vec<(&str, u32)> = names.iter().map(String::as_str).zip(0..).collect();
        btf.enumeration("mod_mem_type", &values);
        btf.structure(
            "kernel_symbol",
            12,
            &[("value_offset", int, 0), ("name_offset", int, 4)],
        );
    } else {
        let fields = [
            ("base", long, 0),
            ("size", int, 8),
            ("text_size", int, 12),
            ("ro_size", int, 16),
            ("ro_after_init_size", int, 20),
            ("mtn", nodes, 120),
        ];
        let half = btf.structure("module_layout", 24, &fields);
        members.extend([("core_layout", half, 160), ("init_layout", half, 184)]);
        btf.structure(
            "kernel_symbol",
            16,
            &[("value", long, 0), ("name", long, 8)],
        );
    }
    btf.structure("module", 0x200, &members);
    list_types(btf, (int, long, byte, list));
}

/// What the lists of modules, of their types and of their users are made of, and what a module's state and taints are called.
fn list_types(btf: &mut Btf, (int, long, byte, list): Basic) {
    btf.structure(
        "btf_module",
        32,
        &[("list", list, 0), ("module", long, 16), ("btf", long, 24)],
    );
    let parsed = [
        ("data", long, 0),
        ("data_size", int, 8),
        ("start_id", int, 16),
        ("start_str_off", int, 20),
    ];
    btf.structure("btf", 24, &parsed);
    btf.structure(
        "module_use",
        48,
        &[("source_list", list, 0), ("source", long, 32)],
    );
    let states =
        ["LIVE", "COMING", "GOING", "UNFORMED"].map(|state| format!("MODULE_STATE_{state}"));
    let states: Vec<(&str, u32)> = states.iter().map(String::as_str).zip(0..).collect();
    btf.enumeration("module_state", &states);
    btf.structure(
        "taint_flag",
        3,
        &[
            ("c_true", byte, 0),
            ("c_false", byte, 1),
            ("module", byte, 2),
        ],
    );
}

/// What a module is found by: the two trees, and the node that a module has in each.
fn tree_types(btf: &mut Btf, form: Form, (int, long, _, _): Basic) -> u32 {
    let fields = [
        ("__rb_parent_color", long, 0),
        ("rb_right", long, 8),
        ("rb_left", long, 16),
    ];
    let node = btf.structure("rb_node", 24, &fields);
    let first = btf.structure("rb_root", 8, &[("rb_node", long, 0)]);
    let mut count = btf.structure("seqcount", 4, &[("sequence", int, 0)]);
    if form == Form::New {
        count = btf.structure("seqcount_latch_t", 4, &[("seqcount", count, 0)]);
    }
    let firsts = btf.array(first, 2);
    let root = [("seq", count, 0), ("tree", firsts, 8)];
    let root = btf.structure("latch_tree_root", 24, &root);
    let bounds = [
        ("root", root, 0),
        ("addr_min", long, 24),
        ("addr_max", long, 32),
    ];
    btf.structure("mod_tree_root", 40, &bounds);
    let nodes = btf.array(node, 2);
    let nodes = btf.structure("latch_tree_node", 48, &[("node", nodes, 0)]);
    btf.structure("mod_tree_node", 56, &[("mod", long, 0), ("node", nodes, 8)])
}

/// The types of a module that stand on [`super::btf`]'s, behind the numbers that those have: a pointer, a structure, an enumeration.
pub(crate) fn module_btf(first: u32, first_string: u32) -> Vec<u8> {
    // As `super::btf` numbers them.
    const INT: u32 = 1;
    const LIST: u32 = 4;
    const TASK: u32 = 9;
    let mut btf = Btf::behind(first, first_string);
    let task = btf.add("", 2, 0, TASK, &[]);
    let plain = |offset: u32| offset * 8;
    let members = [
        ("flag", INT, 3 << 24 | plain(4)),
        ("link", LIST, plain(16)),
        ("owner", task, plain(32)),
    ];
    let mut extra = Vec::new();
    for (name, kind, offset) in members {
        extra.extend([btf.string(name), kind, offset]);
    }
    btf.add("alpha_private", 4 | 0x80, members.len(), 40, &extra);
    let large = btf.string("ALPHA_LARGE");
    btf.add("alpha_mode", 19, 1, 8, &[large, 5, 1]);
    btf.finish()
}

/// What `kernel/log` asks about.
pub(super) fn log_types(btf: &mut Btf, (int, long, byte, _): Basic) {
    let short = btf.int(2);
    let descriptors = [
        ("count_bits", int, 0),
        ("descs", long, 8),
        ("infos", long, 16),
        ("head_id", long, 24),
        ("tail_id", long, 32),
    ];
    let descriptors = btf.structure("prb_desc_ring", 40, &descriptors);
    let texts = btf.structure(
        "prb_data_ring",
        32,
        &[("size_bits", int, 0), ("data", long, 8)],
    );
    btf.structure(
        "printk_ringbuffer",
        72,
        &[("desc_ring", descriptors, 0), ("text_data_ring", texts, 40)],
    );
    let place = btf.structure(
        "prb_data_blk_lpos",
        16,
        &[("begin", long, 0), ("next", long, 8)],
    );
    btf.structure(
        "prb_desc",
        24,
        &[("state_var", long, 0), ("text_blk_lpos", place, 8)],
    );
    let (subsystem, device) = (btf.array(byte, 16), btf.array(byte, 48));
    let about = btf.structure(
        "dev_printk_info",
        64,
        &[("subsystem", subsystem, 0), ("device", device, 16)],
    );
    let plain = |bytes: u32| bytes * 8;
    let fields = [
        ("seq", long, plain(0)),
        ("ts_nsec", long, plain(8)),
        ("text_len", short, plain(16)),
        ("facility", byte, plain(18)),
        ("level", byte, (3 << 24) | (plain(19) + 5)),
        ("caller_id", int, plain(20)),
        ("dev_info", about, plain(24)),
    ];
    let mut extra = Vec::new();
    for (name, kind, offset) in fields {
        extra.extend([btf.string(name), kind, offset]);
    }
    btf.add("printk_info", 4 | 0x80, fields.len(), 88, &extra);
}
