//! The types of the made-up kernel, and what puts a BTF section together.

use super::{Form, STACK, bpf, orc, patched, shadow, views};

/// Puts a BTF section together.
#[derive(Default)]
pub(crate) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
    /// Where the strings begin, of a module's types.
    first_string: u32,
}

impl Btf {
    pub(crate) fn string(&mut self, text: &str) -> u32 {
        if self.first_string == 0 {
            self.strings.resize(self.strings.len().max(1), 0);
        }
        if text.is_empty() {
            return 0;
        }
        let at = self.first_string + u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text.bytes().chain([0]));
        at
    }

    /// A type of `kind`; `extra` follows it. Returns its id.
    pub(crate) fn add(
        &mut self,
        name: &str,
        kind: u32,
        vlen: usize,
        size_or_type: u32,
        extra: &[u32],
    ) -> u32 {
        let name = self.string(name);
        let info = kind << 24 | u32::try_from(vlen).unwrap();
        let words = [name, info, size_or_type];
        self.types.extend(
            words
                .iter()
                .chain(extra)
                .flat_map(|word| word.to_le_bytes()),
        );
        self.count += 1;
        self.count
    }

    /// Those of a module, behind `first` types and `first_string` bytes of strings.
    pub(super) fn behind(first: u32, first_string: u32) -> Self {
        Self {
            count: first - 1,
            first_string,
            ..Self::default()
        }
    }

    pub(crate) fn int(&mut self, bytes: u32) -> u32 {
        self.add("int", 1, 0, bytes, &[bytes * 8])
    }

    pub(crate) fn array(&mut self, of: u32, count: u32) -> u32 {
        self.add("", 3, 0, 0, &[of, of, count])
    }

    /// A structure; members are name, type and offset in bytes.
    pub(crate) fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let mut extra = Vec::new();
        for (member, kind, offset) in members {
            extra.extend([self.string(member), *kind, offset * 8]);
        }
        self.add(name, 4, members.len(), size, &extra)
    }

    pub(crate) fn enumeration(&mut self, name: &str, values: &[(&str, u32)]) -> u32 {
        let mut extra = Vec::new();
        for (enumerator, value) in values {
            extra.extend([self.string(enumerator), *value]);
        }
        self.add(name, 6, values.len(), 4, &extra)
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        let (types, strings) = (
            u32::try_from(self.types.len()).unwrap(),
            u32::try_from(self.strings.len()).unwrap(),
        );
        let header = [0x0001_eb9f, 24, 0, types, types, strings];
        let mut bytes: Vec<u8> = header
            .iter()
            .flat_map(|word: &u32| word.to_le_bytes())
            .collect();
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}

/// Offsets of the made-up `task_struct`.
pub(crate) mod task {
    pub(crate) const STACK: u64 = 0x20;
    pub(crate) const TASKS: u64 = 0x40;
    pub(crate) const THREAD_NODE: u64 = 0x50;
    pub(crate) const SIGNAL: u64 = 0x60;
    pub(crate) const PID: u64 = 0x68;
    pub(crate) const COMM: u64 = 0x70;
    pub(crate) const RET_STACK: u64 = 0x80;
    pub(crate) const CURR_RET_STACK: u64 = 0x88;
    pub(crate) const RETHOOKS: u64 = 0x90;
    pub(crate) const NVCSW: u64 = 0x98;
    pub(crate) const NIVCSW: u64 = 0xa0;
    pub(crate) const START_TIME: u64 = 0xa8;
    pub(crate) const ON_CPU: u64 = 0xb0;
    pub(crate) const SP: u64 = 0x118;
    pub(crate) const STATE: u64 = 0x140;
    /// Four bytes, with as many of flags behind them.
    pub(crate) const EXIT_STATE: u64 = 0x148;
    pub(crate) const TGID: u64 = 0x150;
    pub(crate) const THREAD_PID: u64 = 0x158;
    pub(crate) const REAL_PARENT: u64 = 0x160;
    pub(crate) const REAL_CRED: u64 = 0x168;
    /// Of the credentials.
    pub(crate) const UID: u64 = 8;
}

/// The types that this crate asks about.
pub(crate) fn btf(form: Form) -> Vec<u8> {
    let mut btf = Btf::default();
    let (int, long, byte) = (btf.int(4), btf.int(8), btf.int(1));
    let list = btf.structure("list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let basic = (int, long, byte, list);
    task_types(&mut btf, form, basic);
    stack_types(&mut btf, basic);
    text_types(&mut btf, form, basic);
    views::module_types(&mut btf, form, basic);
    views::log_types(&mut btf, basic);
    bpf::types(&mut btf, basic);
    shadow::types(&mut btf, basic);
    patched::types(&mut btf, form, basic);
    orc::types(&mut btf, form, basic);
    if form == Form::New {
        btf.structure(
            "pcpu_hot",
            64,
            &[
                ("current_task", long, 0),
                ("cpu_number", int, 12),
                ("hardirq_stack_ptr", long, 32),
            ],
        );
        let busy = btf.structure("rb_list", 32, &[("root", long, 0), ("head", list, 8)]);
        btf.structure("vmap_node", 64, &[("busy", busy, 16)]);
    }
    btf.finish()
}

/// Four bytes, eight bytes, one byte, a list's link.
pub(crate) type Basic = (u32, u32, u32, u32);

fn task_types(btf: &mut Btf, form: Form, (int, long, byte, list): Basic) {
    let state = match form {
        Form::New => ("__state", int, 0x140),
        _ => ("state", long, 0x140),
    };
    let node = btf.structure("llist_node", 8, &[("next", long, 0)]);
    let comm = btf.array(byte, 16);
    let thread = btf.structure("thread_struct", 0x40, &[("sp", long, 0x18)]);
    let hooks = btf.structure("llist_head", 8, &[("first", long, 0)]);
    btf.structure(
        "task_struct",
        0x200,
        &[
            ("stack", long, 0x20),
            ("tasks", list, 0x40),
            ("thread_node", list, 0x50),
            ("signal", long, 0x60),
            ("pid", int, 0x68),
            ("comm", comm, 0x70),
            ("ret_stack", long, 0x80),
            ("curr_ret_stack", int, 0x88),
            ("rethooks", hooks, 0x90),
            ("nvcsw", long, 0x98),
            ("nivcsw", long, 0xa0),
            ("start_time", long, 0xa8),
            ("on_cpu", int, 0xb0),
            ("thread", thread, 0x100),
            state,
            ("exit_state", int, 0x148),
            ("flags", int, 0x14c),
            ("tgid", int, 0x150),
            ("thread_pid", long, 0x158),
            ("real_parent", long, 0x160),
            ("real_cred", long, 0x168),
        ],
    );
    btf.structure("signal_struct", 0x20, &[("thread_head", list, 0x10)]);
    btf.structure(
        "ftrace_ret_stack",
        32,
        &[("ret", long, 0), ("retp", long, 24)],
    );
    btf.structure(
        "rethook_node",
        48,
        &[
            ("llist", node, 16),
            ("ret_addr", long, 32),
            ("frame", long, 40),
        ],
    );
    let user = btf.structure("kuid_t", 4, &[("val", int, 0)]);
    btf.structure("cred", 0x40, &[("uid", user, 8)]);
}

fn stack_types(btf: &mut Btf, (_, long, byte, list): Basic) {
    let stack = btf.array(byte, u32::try_from(STACK).unwrap());
    btf.structure(
        "irq_stack",
        u32::try_from(STACK).unwrap(),
        &[("stack", stack, 0)],
    );
    let (page, pages) = (btf.array(byte, 4096), btf.array(byte, 8192));
    let exceptions = [
        ("DF_stack_guard", page, 0),
        ("DF_stack", pages, 0x1000),
        ("NMI_stack_guard", page, 0x3000),
        ("NMI_stack", pages, 0x4000),
    ];
    let exceptions = btf.structure("cea_exception_stacks", 0x6000, &exceptions);
    btf.structure(
        "cpu_entry_area",
        0x8000,
        &[
            ("entry_stack_page", page, 0x1000),
            ("estacks", exceptions, 0x2000),
        ],
    );
    btf.structure("rq", 16, &[("idle", long, 8)]);
    btf.structure(
        "vmap_area",
        72,
        &[
            ("va_start", long, 0),
            ("va_end", long, 8),
            ("list", list, 40),
            ("vm", long, 56),
        ],
    );
    btf.structure("vm_struct", 64, &[("flags", long, 24)]);
    let head = btf.structure("callback_head", 16, &[("next", long, 0), ("func", long, 8)]);
    btf.structure(
        "vm_stack",
        24,
        &[("rcu", head, 0), ("stack_vm_area", long, 16)],
    );
}

fn text_types(btf: &mut Btf, form: Form, (int, long, byte, _): Basic) {
    let owner = u32::try_from(form.mutex_owner()).unwrap();
    if owner == 0 {
        btf.structure("mutex", 32, &[("owner", long, owner)]);
        let queued = btf.structure("qrwlock", 8, &[("cnts", int, 0)]);
        btf.structure("rwlock_t", 8, &[("raw_lock", queued, 0)]);
    } else {
        let lending = btf.structure("rt_mutex_base", 32, &[("owner", long, owner)]);
        btf.structure("mutex", 32, &[("rtmutex", lending, 0)]);
        let members = [("readers", int, 0), ("rtmutex", lending, 8)];
        let lock = btf.structure("rwbase_rt", 40, &members);
        btf.structure("rwlock_t", 40, &[("rwbase", lock, 0)]);
    }
    btf.structure("bp_patching_desc", 16, &[("refs", int, 12)]);
    let hash = btf.structure("hlist_node", 16, &[("next", long, 0)]);
    let copy = btf.structure(
        "arch_specific_insn",
        16,
        &[("insn", long, 0), ("size", byte, 12)],
    );
    btf.structure(
        "kprobe",
        80,
        &[
            ("hlist", hash, 0),
            ("addr", long, 40),
            ("flags", int, 48),
            ("ainsn", copy, 56),
        ],
    );
    btf.structure("bug_entry", 12, &[("bug_addr_disp", int, 0)]);
    btf.structure(
        "exception_table_entry",
        12,
        &[("insn", int, 0), ("fixup", int, 4), ("data", int, 8)],
    );
    btf.structure(
        "jump_entry",
        16,
        &[("code", int, 0), ("target", int, 4), ("key", long, 8)],
    );
    btf.structure("static_call_site", 8, &[("addr", int, 0), ("key", int, 4)]);
    btf.enumeration(
        "system_states",
        &[
            ("SYSTEM_BOOTING", 0),
            ("SYSTEM_RUNNING", 3),
            ("SYSTEM_HALT", 4),
        ],
    );
}
