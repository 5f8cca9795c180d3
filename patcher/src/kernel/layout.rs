//! Where this kernel keeps its tasks, stacks and per-CPU data: offsets and link addresses, resolved once.
//!
//! Presence decides between the forms that occur; what has neither form is an error that names it.

use std::ops::Range;

use super::bpf::BpfLayout;
use super::census::CensusLayout;
use super::image::Image;
use super::symbols::SymbolError;
use super::types::TypeError;
use super::unwind::layout::UnwindLayout;
use crate::addr::LinkAddr;

/// Something that this needs is absent from the image.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    #[error(transparent)]
    Type(#[from] TypeError),
}

impl From<LayoutError> for super::locate::LocateError {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Symbol(error) => Self::Symbol(error),
            LayoutError::Type(error) => Self::Type(error),
        }
    }
}

/// All of it.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The variables that bound the direct map of all memory, where they are variables.
    pub(crate) direct_map: Option<Range<LinkAddr>>,
    pub(crate) cpus: CpuLayout,
    pub(crate) task: TaskLayout,
    /// What tells whether tasks came or went; a kernel without it has its lists walked under each pause.
    pub(crate) census: Option<CensusLayout>,
    pub(crate) vmap: VmapLayout,
    /// Bytes of a task's stack, and of an interrupt stack (`THREAD_SIZE` and `IRQ_STACK_SIZE` are one formula).
    pub(crate) stack_size: u64,
    /// Bytes of the user's registers at the top of a task's stack.
    pub(crate) user_registers: u64,
    pub(crate) flux: FluxLayout,
    pub(crate) bpf: Option<BpfLayout>,
    /// What unwinding needs; a kernel that lacks it can do without everything but that.
    pub(crate) unwind: Result<UnwindLayout, LayoutError>,
    /// Code that runs between the user and the kernel proper, part of it on the user's stack pointer.
    pub(crate) entry_text: Range<LinkAddr>,
}

/// What tells that the kernel is changing its own text.
#[derive(Clone, Debug)]
pub(crate) struct FluxLayout {
    /// The owner of each lock, with the lock's name.
    pub(crate) locks: Vec<(&'static str, LinkAddr)>,
    /// The count of users of the table for breakpoints that stand in for text.
    pub(crate) breakpoints: Option<LinkAddr>,
    /// Where probes are listed, in a kernel that can have any.
    pub(crate) probes: Option<ProbesLayout>,
}

/// The hash table of kprobes, and offsets into each.
#[derive(Clone, Debug)]
pub(crate) struct ProbesLayout {
    pub(crate) table: LinkAddr,
    pub(crate) link: u64,
    pub(crate) address: u64,
}

/// Per-CPU data: link addresses of tables, and offsets into each CPU's area.
#[derive(Clone, Debug)]
pub(crate) struct CpuLayout {
    /// The first byte of what each CPU has a copy of, where that is in the image: offsets of areas count from there.
    pub(crate) first: Option<LinkAddr>,
    pub(crate) offsets: LinkAddr,
    pub(crate) count: LinkAddr,
    pub(crate) possible: LinkAddr,
    pub(crate) online: LinkAddr,
    pub(crate) current: u64,
    pub(crate) idle: u64,
    pub(crate) irq_stack: u64,
    pub(crate) exception_stacks: u64,
    /// Where free stacks are kept for the next task, as `vm_struct` pointers.
    pub(crate) cached_stacks: Option<Range<u64>>,
    /// Each exception stack within all of them.
    pub(crate) exception: Vec<Range<u64>>,
    /// The exception stacks within a CPU's entry area.
    pub(crate) exception_in_area: u64,
    /// The entry stack within a CPU's entry area.
    pub(crate) entry_in_area: Range<u64>,
}

/// Offsets into `task_struct` and what it points to.
#[derive(Clone, Debug)]
pub(crate) struct TaskLayout {
    pub(crate) init_task: LinkAddr,
    pub(crate) tasks: u64,
    pub(crate) thread_node: u64,
    pub(crate) signal: u64,
    pub(crate) thread_head: u64,
    pub(crate) stack: u64,
    pub(crate) pid: u64,
    pub(crate) comm: u64,
    pub(crate) sp: u64,
    /// What tells whether a task has run; a kernel without it (`CONFIG_SMP`) is looked at wholly under each pause.
    pub(crate) turns: Option<TurnsLayout>,
    pub(crate) graph: Option<GraphLayout>,
    pub(crate) rethook: Option<RethookLayout>,
}

/// How often a task stopped running, because it wanted to and because it had to; when it began; whether it is on a CPU, and whether it is dead.
#[derive(Clone, Debug)]
pub(crate) struct TurnsLayout {
    pub(crate) voluntary: u64,
    pub(crate) involuntary: u64,
    pub(crate) since: u64,
    pub(crate) on_cpu: u64,
    pub(crate) exit_state: u64,
}

impl TurnsLayout {
    /// What of it counts turns: offsets and lengths.
    pub(crate) fn fields(&self) -> [(u64, u64); 3] {
        [self.voluntary, self.involuntary, self.since].map(|at| (at, 8))
    }
}

/// Where the function graph tracer keeps the return addresses that it took from the stack.
#[derive(Clone, Debug)]
pub(crate) struct GraphLayout {
    pub(crate) entries: u64,
    pub(crate) last: u64,
    /// Bytes that one step of `last` means.
    pub(crate) unit: u64,
    /// Steps in use when `last` is zero.
    pub(crate) first_count: i64,
}

/// Where return probes keep the return addresses that they took from the stack: a list.
#[derive(Clone, Debug)]
pub(crate) struct RethookLayout {
    pub(crate) first: u64,
    /// Of the link within a node.
    pub(crate) link: u64,
    /// Of the address within a node.
    pub(crate) address: u64,
}

/// The list of mapped areas, which every task's stack is one of.
#[derive(Clone, Debug)]
pub(crate) struct VmapLayout {
    pub(crate) lists: VmapLists,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) list: u64,
    pub(crate) vm: u64,
    pub(crate) flags: u64,
    /// `rcu_head.func` and the area of a stack that waits to be freed, at the stack's lowest address.
    pub(crate) freed: Option<FreedLayout>,
}

/// How a stack that waits to be freed says so.
#[derive(Clone, Debug)]
pub(crate) struct FreedLayout {
    pub(crate) callback: LinkAddr,
    pub(crate) func: u64,
    pub(crate) area: u64,
}

/// One list for all, or (from Linux 6.9 on) one for each of several nodes.
#[derive(Clone, Debug)]
pub(crate) enum VmapLists {
    One(LinkAddr),
    Nodes {
        nodes: LinkAddr,
        count: LinkAddr,
        size: u64,
        head: u64,
    },
}

impl Layout {
    pub(crate) fn resolve(image: &Image) -> Result<Self, LayoutError> {
        let (symbols, types) = (image.symbols(), image.types());
        let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address);
        let direct_map = match (
            symbols.optional("page_offset_base")?,
            symbols.optional("vmalloc_base")?,
        ) {
            (Some(start), Some(end)) => Some(start.address..end.address),
            _ => None,
        };
        Ok(Self {
            direct_map,
            cpus: cpus(image)?,
            task: task(image)?,
            census: CensusLayout::resolve(image),
            vmap: vmap(image)?,
            flux: flux(image)?,
            bpf: BpfLayout::resolve(image)?,
            unwind: UnwindLayout::resolve(image),
            stack_size: types.size_of("irq_stack")?,
            user_registers: types.size_of("pt_regs")?,
            entry_text: at("__entry_text_start")?..at("__entry_text_end")?,
        })
    }
}

/// The locks, the one that guards all text first. Only that one must exist.
const LOCKS: [&str; 5] = [
    "text_mutex",
    "jump_label_mutex",
    "static_call_mutex",
    "kprobe_mutex",
    "module_mutex",
];

fn flux(image: &Image) -> Result<FluxLayout, LayoutError> {
    let (symbols, types) = (image.symbols(), image.types());
    let owner = match types.offset_of("mutex", "rtmutex.owner") {
        // A kernel that is preemptible throughout makes mutexes of what lends its priority (`CONFIG_PREEMPT_RT`).
        Ok(owner) => owner,
        Err(_) => types.offset_of("mutex", "owner")?,
    };
    let mut locks = Vec::new();
    for (index, name) in LOCKS.into_iter().enumerate() {
        let lock = if index == 0 {
            Some(symbols.lookup(name)?)
        } else {
            symbols.optional(name)?
        };
        locks.extend(lock.and_then(|lock| Some((name, lock.address.checked_add(owner)?))));
    }
    let table = symbols.optional("bp_desc")?;
    let refs = types.offset_of("bp_patching_desc", "refs").ok();
    let breakpoints = table
        .zip(refs)
        .and_then(|(table, refs)| table.address.checked_add(refs));
    let probes = match symbols.optional("kprobe_table")? {
        Some(table) => Some(ProbesLayout {
            table: table.address,
            link: types.offset_of("kprobe", "hlist")?,
            address: types.offset_of("kprobe", "addr")?,
        }),
        None => None,
    };
    Ok(FluxLayout {
        locks,
        breakpoints,
        probes,
    })
}

fn cpus(image: &Image) -> Result<CpuLayout, LayoutError> {
    let (symbols, types) = (image.symbols(), image.types());
    let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address);
    let own = |name: &str| {
        symbols
            .lookup(name)
            .map(|symbol| symbols.percpu_offset(&symbol))
    };
    let members = types.members("cea_exception_stacks")?;
    let stacks = members
        .into_iter()
        .filter(|(name, _)| !name.ends_with("_guard"));
    let entry = types.member("cpu_entry_area", "entry_stack_page")?;
    let cached = symbols.optional("cached_stacks")?;
    let first = symbols.percpu_start();
    let cached = cached.map(|cached| (symbols.percpu_offset(&cached), cached.size));
    Ok(CpuLayout {
        first: (first != LinkAddr(0)).then_some(first),
        offsets: at("__per_cpu_offset")?,
        count: at("nr_cpu_ids")?,
        possible: at("__cpu_possible_mask")?,
        online: at("__cpu_online_mask")?,
        current: hot(image, "current_task")?,
        idle: own("runqueues")?.saturating_add(types.offset_of("rq", "idle")?),
        irq_stack: hot(image, "hardirq_stack_ptr")?,
        exception_stacks: own("cea_exception_stacks")?,
        cached_stacks: cached.map(|(start, size)| start..start.saturating_add(size)),
        exception: stacks
            .map(|(_, stack)| stack.offset..stack.offset.saturating_add(stack.size))
            .collect(),
        exception_in_area: types.offset_of("cpu_entry_area", "estacks")?,
        entry_in_area: entry.offset..entry.offset.saturating_add(entry.size),
    })
}

/// Offset into each CPU's area of the variable `name`, one of those that are used most: Linux 6.2 gathered them in one structure, 6.15 took it
/// apart again.
pub(crate) fn hot(image: &Image, name: &str) -> Result<u64, LayoutError> {
    let symbols = image.symbols();
    if let Some(alone) = symbols.optional(name)? {
        return Ok(symbols.percpu_offset(&alone));
    }
    let all = symbols.lookup("pcpu_hot")?;
    let member = image.types().offset_of("pcpu_hot", name)?;
    Ok(symbols.percpu_offset(&all).saturating_add(member))
}

fn task(image: &Image) -> Result<TaskLayout, LayoutError> {
    let types = image.types();
    let member = |path: &str| types.offset_of("task_struct", path);
    let graph = match (member("ret_stack"), member("curr_ret_stack")) {
        (Ok(entries), Ok(last)) => {
            // Linux 6.11 lets several tracers share the stack and points to the next free word, not to the last entry.
            let words = image.symbols().has("fgraph_array");
            let unit = if words {
                8
            } else {
                types.size_of("ftrace_ret_stack")?
            };
            Some(GraphLayout {
                entries,
                last,
                unit,
                first_count: i64::from(!words),
            })
        }
        _ => None,
    };
    let rethook = match (member("rethooks"), member("kretprobe_instances")) {
        (Ok(first), _) => Some(RethookLayout {
            first,
            link: types.offset_of("rethook_node", "llist")?,
            address: types.offset_of("rethook_node", "ret_addr")?,
        }),
        (_, Ok(first)) => Some(RethookLayout {
            first,
            link: types.offset_of("kretprobe_instance", "llist")?,
            address: types.offset_of("kretprobe_instance", "ret_addr")?,
        }),
        _ => None,
    };
    Ok(TaskLayout {
        init_task: image.symbols().lookup("init_task")?.address,
        tasks: member("tasks")?,
        thread_node: member("thread_node")?,
        signal: member("signal")?,
        thread_head: types.offset_of("signal_struct", "thread_head")?,
        stack: member("stack")?,
        pid: member("pid")?,
        comm: member("comm")?,
        sp: member("thread.sp")?,
        turns: turns(&member).ok(),
        graph,
        rethook,
    })
}

fn turns(member: &dyn Fn(&str) -> Result<u64, TypeError>) -> Result<TurnsLayout, TypeError> {
    Ok(TurnsLayout {
        voluntary: member("nvcsw")?,
        involuntary: member("nivcsw")?,
        since: member("start_time")?,
        on_cpu: member("on_cpu")?,
        exit_state: member("exit_state")?,
    })
}

fn vmap(image: &Image) -> Result<VmapLayout, LayoutError> {
    let (symbols, types) = (image.symbols(), image.types());
    let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address);
    let lists = match symbols.optional("vmap_area_list")? {
        Some(list) => VmapLists::One(list.address),
        None => VmapLists::Nodes {
            nodes: at("vmap_nodes")?,
            count: at("nr_vmap_nodes")?,
            size: types.size_of("vmap_node")?,
            head: types.offset_of("vmap_node", "busy.head")?,
        },
    };
    let freed = match symbols.optional("thread_stack_free_rcu")? {
        Some(callback) => Some(FreedLayout {
            callback: callback.address,
            func: types.offset_of("vm_stack", "rcu.func")?,
            area: types.offset_of("vm_stack", "stack_vm_area")?,
        }),
        None => None,
    };
    Ok(VmapLayout {
        lists,
        start: types.offset_of("vmap_area", "va_start")?,
        end: types.offset_of("vmap_area", "va_end")?,
        list: types.offset_of("vmap_area", "list")?,
        vm: types.offset_of("vmap_area", "vm")?,
        flags: types.offset_of("vm_struct", "flags")?,
        freed,
    })
}
