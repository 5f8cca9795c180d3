//! Where the kernel keeps what unwinding reads: saved registers, and what its tracers took from the stacks. Resolved once.

use std::ops::Range;

use crate::addr::LinkAddr;
use crate::kernel::image::Image;
use crate::kernel::layout::LayoutError;
use crate::kernel::sites::SiteKind;
use crate::x86::depth::is_level;

/// All of it.
#[derive(Clone, Debug)]
pub(crate) struct UnwindLayout {
    pub(crate) registers: RegistersLayout,
    pub(crate) inactive: InactiveLayout,
    /// The code at which a task begins that has never run.
    pub(crate) forked: Range<LinkAddr>,
    /// First bytes of the thunks by which the kernel branches to where a register says: the unwind table calls them the end of
    /// the stack, or nothing, but there the stack is as at the entry of a function.
    pub(crate) thunks: Vec<LinkAddr>,
    /// Code that the kernel may have replaced at boot by other code which moves the stack pointer within it: the unwind table
    /// describes one of several, or none. `None` where it is not known which code that is.
    pub(crate) unlevel: Option<Vec<Range<LinkAddr>>>,
    pub(crate) graph: Option<TakenByGraph>,
    pub(crate) probe: Option<TakenByProbe>,
    pub(crate) ftrace: Option<FtraceLayout>,
    pub(crate) kprobe: Option<KprobeLayout>,
    pub(crate) module: Option<ModuleLayout>,
}

/// Offsets into the registers that are saved when code is interrupted (`struct pt_regs`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegistersLayout {
    pub(crate) ip: u64,
    pub(crate) cs: u64,
    pub(crate) sp: u64,
    pub(crate) ss: u64,
    pub(crate) bp: u64,
    pub(crate) r10: u64,
    pub(crate) r13: u64,
    pub(crate) di: u64,
    pub(crate) dx: u64,
    pub(crate) ax: u64,
    pub(crate) size: u64,
}

/// What a task leaves at its stack pointer when it stops running (`struct inactive_task_frame`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct InactiveLayout {
    pub(crate) bp: u64,
    pub(crate) ret: u64,
    pub(crate) size: u64,
}

/// Return addresses that the function graph tracer replaced by its own (`struct ftrace_ret_stack`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakenByGraph {
    /// What it put in their place.
    pub(crate) handler: LinkAddr,
    /// Bytes of that code.
    pub(crate) handler_len: u64,
    pub(crate) ret: u64,
    /// Address of the place on the stack.
    pub(crate) slot: u64,
    pub(crate) size: u64,
}

/// Return addresses that return probes replaced (`struct rethook_node` or `kretprobe_instance`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakenByProbe {
    /// What they put in their place.
    pub(crate) handler: LinkAddr,
    pub(crate) link: u64,
    pub(crate) ret: u64,
    /// Address of the place on the stack.
    pub(crate) slot: u64,
}

/// The tracer's trampolines: copies of code of the image (`struct ftrace_ops`).
#[derive(Clone, Debug)]
pub(crate) struct FtraceLayout {
    pub(crate) list: LinkAddr,
    /// The last of the list.
    pub(crate) list_end: LinkAddr,
    pub(crate) next: u64,
    pub(crate) flags: u64,
    pub(crate) trampoline: u64,
    pub(crate) size: u64,
    /// What is copied when all registers are to be saved, and otherwise.
    pub(crate) with_registers: Range<LinkAddr>,
    pub(crate) without: Range<LinkAddr>,
}

/// Copies of single instructions that kprobes execute out of line (`struct kprobe`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct KprobeLayout {
    pub(crate) address: u64,
    pub(crate) copy: u64,
    /// Bytes of the instruction, in one byte.
    pub(crate) len: u64,
}

/// Loaded modules (`struct module`).
#[derive(Clone, Debug)]
pub(crate) struct ModuleLayout {
    pub(crate) head: LinkAddr,
    pub(crate) list: u64,
    /// Where a pointer to code is, and where its size: of what stays, and of what is dropped after a module is loaded.
    pub(crate) text: [Range<u64>; 2],
    /// How many entries the unwind table has, and where its two arrays are.
    pub(crate) count: u64,
    pub(crate) ips: u64,
    pub(crate) entries: u64,
}

impl UnwindLayout {
    pub(crate) fn resolve(image: &Image) -> Result<Self, LayoutError> {
        let (symbols, types) = (image.symbols(), image.types());
        let register = |name| types.offset_of("pt_regs", name);
        let inactive = |name| types.offset_of("inactive_task_frame", name);
        let forked = match symbols.optional("ret_from_fork_asm")? {
            Some(forked) => forked,
            None => symbols.lookup("ret_from_fork")?,
        };
        Ok(Self {
            registers: RegistersLayout {
                ip: register("ip")?,
                cs: register("cs")?,
                sp: register("sp")?,
                ss: register("ss")?,
                bp: register("bp")?,
                r10: register("r10")?,
                r13: register("r13")?,
                di: register("di")?,
                dx: register("dx")?,
                ax: register("ax")?,
                size: types.size_of("pt_regs")?,
            },
            inactive: InactiveLayout {
                bp: inactive("bp")?,
                ret: inactive("ret_addr")?,
                size: types.size_of("inactive_task_frame")?,
            },
            forked: forked.address..LinkAddr(forked.address.0.saturating_add(forked.size)),
            thunks: thunks(image)?,
            unlevel: unlevel(image)?,
            graph: graph(image)?,
            probe: probe(image)?,
            ftrace: ftrace(image)?,
            kprobe: kprobe(image),
            module: module(image)?,
        })
    }
}

fn thunks(image: &Image) -> Result<Vec<LinkAddr>, LayoutError> {
    const REGISTERS: [&str; 15] = [
        "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut thunks = Vec::new();
    for register in REGISTERS {
        let name = format!("__x86_indirect_thunk_{register}");
        let thunk = image.symbols().optional(&name)?;
        thunks.extend(thunk.map(|thunk| thunk.address));
    }
    Ok(thunks)
}

/// The places of alternatives of which any moves the stack pointer, in the order of their addresses.
fn unlevel(image: &Image) -> Result<Option<Vec<Range<LinkAddr>>>, LayoutError> {
    let Ok(shipped) = image.shipped() else {
        return Ok(None);
    };
    let (sites, types) = (shipped.sites(), image.types());
    if sites.count(SiteKind::Alternative) == 0 {
        return Ok(Some(Vec::new()));
    }
    let from = types.offset_of("alt_instr", "repl_offset")?;
    let len = types.offset_of("alt_instr", "replacementlen")?;
    let everywhere = LinkAddr(0)..LinkAddr(u64::MAX);
    let mut found: Vec<Range<LinkAddr>> = Vec::new();
    for entry in sites.entries(SiteKind::Alternative, &everywhere) {
        let len = usize::try_from(len).ok().and_then(|at| entry.bytes.get(at));
        let code = entry.relative(from).zip(len);
        let code = code.and_then(|(from, len)| shipped.bytes(from.range((*len).into())?));
        if !code.is_some_and(is_level) {
            found.push(entry.site.range);
        }
    }
    found.sort_by_key(|range| (range.start, range.end));
    // Of several for one place, which are as long as the longest.
    found.dedup_by(|next, kept| {
        let same = next.start == kept.start;
        if same {
            kept.end = kept.end.max(next.end);
        }
        same
    });
    Ok(Some(found))
}

fn graph(image: &Image) -> Result<Option<TakenByGraph>, LayoutError> {
    const ENTRY: &str = "ftrace_ret_stack";
    let Some(handler) = image.symbols().optional("return_to_handler")? else {
        return Ok(None);
    };
    let types = image.types();
    Ok(Some(TakenByGraph {
        handler: handler.address,
        handler_len: handler.size,
        ret: types.offset_of(ENTRY, "ret")?,
        slot: types.offset_of(ENTRY, "retp")?,
        size: types.size_of(ENTRY)?,
    }))
}

fn probe(image: &Image) -> Result<Option<TakenByProbe>, LayoutError> {
    let types = image.types();
    for (handler, node, slot) in [
        ("arch_rethook_trampoline", "rethook_node", "frame"),
        ("__kretprobe_trampoline", "kretprobe_instance", "fp"),
    ] {
        if let Some(handler) = image.symbols().optional(handler)? {
            return Ok(Some(TakenByProbe {
                handler: handler.address,
                link: types.offset_of(node, "llist")?,
                ret: types.offset_of(node, "ret_addr")?,
                slot: types.offset_of(node, slot)?,
            }));
        }
    }
    Ok(None)
}

fn ftrace(image: &Image) -> Result<Option<FtraceLayout>, LayoutError> {
    const OPS: &str = "ftrace_ops";
    let (symbols, types) = (image.symbols(), image.types());
    if !types.has_member(OPS, "trampoline") {
        return Ok(None);
    }
    let at = |name: &str| symbols.lookup(name).map(|symbol| symbol.address);
    Ok(Some(FtraceLayout {
        list: at("ftrace_ops_list")?,
        list_end: at("ftrace_list_end")?,
        next: types.offset_of(OPS, "next")?,
        flags: types.offset_of(OPS, "flags")?,
        trampoline: types.offset_of(OPS, "trampoline")?,
        size: types.offset_of(OPS, "trampoline_size")?,
        with_registers: at("ftrace_regs_caller")?..at("ftrace_regs_caller_end")?,
        without: at("ftrace_caller")?..at("ftrace_caller_end")?,
    }))
}

fn kprobe(image: &Image) -> Option<KprobeLayout> {
    let types = image.types();
    let member = |path| types.offset_of("kprobe", path).ok();
    Some(KprobeLayout {
        address: member("addr")?,
        copy: member("ainsn.insn")?,
        len: member("ainsn.size")?,
    })
}

fn module(image: &Image) -> Result<Option<ModuleLayout>, LayoutError> {
    const MODULE: &str = "module";
    let types = image.types();
    let Some(head) = image.symbols().optional("modules")? else {
        return Ok(None);
    };
    let member = |path: &str| types.offset_of(MODULE, path);
    // Linux 6.4 made one array of what had been two structures.
    let text = if types.has_member(MODULE, "core_layout") {
        [
            member("core_layout.base")?..member("core_layout.text_size")?,
            member("init_layout.base")?..member("init_layout.text_size")?,
        ]
    } else {
        let part = |name| {
            let index = types.enumerator("mod_mem_type", name)?;
            let field = |field| member(&format!("mem[{index}].{field}"));
            Ok::<_, LayoutError>(field("base")?..field("size")?)
        };
        [part("MOD_TEXT")?, part("MOD_INIT_TEXT")?]
    };
    Ok(Some(ModuleLayout {
        head: head.address,
        list: member("list")?,
        text,
        count: member("arch.num_orcs")?,
        ips: member("arch.orc_unwind_ip")?,
        entries: member("arch.orc_unwind")?,
    }))
}
