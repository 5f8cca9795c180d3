//! A kernel made up for tests: an ELF image with kallsyms, BTF, patch sites and relocations in either of their forms.

mod bpf;
pub(crate) mod guest;
pub(crate) mod kallsyms;
pub(crate) mod orc;
pub(crate) mod patched;
pub(crate) mod shadow;
mod types;
pub(crate) mod views;

use std::collections::BTreeMap;

use self::kallsyms::{kallsyms, kallsyms_base};
pub(crate) use self::types::{Basic, Btf, btf, task};

/// Where the text of the image is linked.
pub(crate) const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Where its variables are linked.
pub(crate) const DATA: u64 = 0xffff_ffff_8120_0000;
/// Where its symbols are linked.
pub(crate) const RODATA: u64 = 0xffff_ffff_8130_0000;
/// Bytes of a stack.
pub(crate) const STACK: u64 = 0x4000;
pub(crate) const BUILD_ID: [u8; 20] = *b"build-id of a tester";

/// Which of the forms that occur a made-up kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As before Linux 6.2: addresses before the names.
    Old,
    /// As Debian's 6.1.170: the same, and the alphabetical order between markers and tokens. Preemptible throughout.
    OldSorted,
    /// As from 6.9 on: addresses after the tokens, hot per-CPU data in one structure, several lists of areas.
    New,
}

impl Form {
    /// Where a mutex has its owner: behind the waiters, where it lends them its priority.
    pub(crate) fn mutex_owner(self) -> u64 {
        if self == Self::OldSorted { 24 } else { 0 }
    }

    /// What the code is called at which a new task begins.
    fn first_code(self) -> &'static str {
        match self {
            Self::New => "ret_from_fork_asm",
            _ => "ret_from_fork",
        }
    }
}

pub(crate) const FORMS: [Form; 3] = [Form::Old, Form::OldSorted, Form::New];

/// A symbol: address, kind, name.
pub(crate) type Sym = (u64, char, String);

/// The symbols of the made-up kernel, in the order of addresses. Some 600 of them only make up the number.
pub(crate) fn symbols(form: Form) -> Vec<Sym> {
    let mut all: BTreeMap<u64, Vec<(char, String)>> = BTreeMap::new();
    let mut add = |address: u64, kind: char, name: &str| {
        all.entry(address)
            .or_default()
            .push((kind, name.to_owned()))
    };
    let percpu: &[(u64, &str)] = match form {
        Form::New => &[
            (0x100, "pcpu_hot"),
            (0x20, "cea_exception_stacks"),
            (0x40, "runqueues"),
            (0x80, "cached_stacks"),
        ],
        _ => &[
            (0x10, "current_task"),
            (0x30, "cpu_number"),
            (0x34, "behind_cpu_number"),
            (0x18, "hardirq_stack_ptr"),
            (0x20, "cea_exception_stacks"),
            (0x40, "runqueues"),
            (0x80, "cached_stacks"),
        ],
    };
    percpu.iter().for_each(|(at, name)| add(*at, 'A', name));
    add(0x90, 'A', "behind_cached_stacks");
    add(0x180, 'A', "__per_cpu_end");
    for (offset, name) in [
        (0, "_text"),
        (0x80, "__entry_text_start"),
        (0x100, "asm_exc_divide_error"),
        (0x200, "__entry_text_end"),
        (0x240, form.first_code()),
        (0x300, "victim"),
        (0x340, "twin"),
        (0x380, "twin"),
        (0x3c0, "thread_stack_free_rcu"),
        (0x400, "__x86_return_thunk"),
        (0x440, "patient"),
        (0x480, "behind_patient"),
        (0x500, "return_to_handler"),
        (0x540, "arch_rethook_trampoline"),
        (0x5c0, "ftrace_regs_caller"),
        (0x600, "ftrace_regs_caller_end"),
    ] {
        add(TEXT + offset, if name == "twin" { 't' } else { 'T' }, name);
    }
    (0..600).for_each(|index| {
        add(
            TEXT + 0x1000 + index * 16,
            'T',
            &format!("filler_{index:03}_of_many"),
        )
    });
    for (offset, name) in patched::TEXT_SYMBOLS {
        add(TEXT + offset, 'T', name);
    }
    for (offset, name) in DATA_SYMBOLS.iter().chain(&patched::DATA_SYMBOLS) {
        let absent = match form {
            Form::New => *name == "vmap_area_list",
            _ => name.contains("vmap_nodes") || *name == "fgraph_array",
        };
        if !absent {
            add(DATA + offset, 'D', name);
        }
    }
    all.into_iter()
        .flat_map(|(at, names)| names.into_iter().map(move |(kind, name)| (at, kind, name)))
        .collect()
}

/// The variables: offset from `DATA` and name.
pub(crate) const DATA_SYMBOLS: &[(u64, &str)] = &[
    (0, "init_task"),
    (0x1000, "init_top_pgt"),
    (0x2000, "level2_fixmap_pgt"),
    (0x3000, "__per_cpu_offset"),
    (0x3100, "nr_cpu_ids"),
    (0x3108, "__cpu_possible_mask"),
    (0x3110, "__cpu_online_mask"),
    (0x3118, "page_offset_base"),
    (0x3120, "vmalloc_base"),
    (0x3128, "vmap_area_list"),
    (0x3140, "vmap_nodes"),
    (0x3148, "nr_vmap_nodes"),
    (0x3150, "text_mutex"),
    (0x3170, "module_mutex"),
    (0x3190, "system_state"),
    (0x3198, "x86_return_thunk"),
    (0x3200, "kprobe_table"),
    (0x3400, "bp_desc"),
    (0x3500, "vmap_node_0"),
    (0x3600, "fgraph_array"),
    (0x3700, "modules"),
    (0x3710, "prb"),
    (0x3720, "console_printk"),
    (0x3730, "taint_flags"),
    (0x3740, "vmcoreinfo_data"),
    (0x3748, "vmcoreinfo_size"),
    (0x3760, "bpf_kallsyms"),
    (0x3780, "btf_modules"),
    (0x37a0, "klp_ops"),
    (0x37c0, "mod_tree"),
    (0x3800, "module_bug_list"),
    (0x3900, "total_forks"),
    (0x3908, "nr_threads"),
    (0x3910, "tasklist_lock"),
    (0x3e00, "__start_mcount_loc"),
    (0x3e18, "__stop_mcount_loc"),
    (0, "_sdata"),
    (0x3f80, "_edata"),
    (PARTS, "__start_rodata"),
    (PARTS + 0x7_0000, "__start_notes"),
    (PARTS + 0x7_003c, "__stop_notes"),
    (PARTS + 0x7_1000, "__start_BTF"),
    (PARTS + 0x7_1000 + BTF_LEN as u64, "__stop_BTF"),
    (PARTS + 0x8_2000, "__start_orc_unwind_ip"),
    (PARTS + 0x8_2000 + 4 * orc::COUNT, "__stop_orc_unwind_ip"),
    (PARTS + 0x8_4000, "__start_orc_unwind"),
    (PARTS + 0x8_4000 + 6 * orc::COUNT, "__stop_orc_unwind"),
    (PARTS + 0x8_8000, "trampoline_table"),
    (PARTS + 0x9_0000, "__end_rodata"),
    (PARTS + 0x9_1000, "_end"),
];

/// Where `RODATA` is from `DATA`.
const PARTS: u64 = RODATA - DATA;
/// Bytes of the types, with zeros behind them.
const BTF_LEN: usize = 0x4000;

/// The address of the first symbol called `name`.
pub(crate) fn address(form: Form, name: &str) -> u64 {
    symbols(form)
        .into_iter()
        .find(|(.., candidate)| candidate == name)
        .unwrap()
        .0
}

/// One section of the image.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) code: bool,
}

/// The text: `victim` is a function with a relocated field, a return and a call.
pub(crate) fn text() -> Vec<u8> {
    let mut text = vec![0xcc; 0x4000];
    let mut put = |at: usize, bytes: &[u8]| text[at..at + bytes.len()].copy_from_slice(bytes);
    // call __fentry__; push rbp; mov rax, imm32 (relocated); mov rbp, rsp; jmp to the return thunk
    put(
        0x300,
        &[
            0xe8, 0, 0, 0, 0, 0x55, 0x48, 0xc7, 0xc0, 0x00, 0x00, 0x20, 0x81, 0x48, 0x89, 0xe5,
        ],
    );
    put(0x310, &[0xe9, 0xeb, 0, 0, 0]);
    // `patient` can be redirected: call __fentry__; push rbp; mov rbp, rsp; push r12; pop r12; pop rbp; ret
    put(
        0x440,
        &[
            0xe8, 0x40, 0, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x41, 0x54, 0x41, 0x5c, 0x5d, 0xc3,
        ],
    );
    // `behind_patient` can be too, and returns at once: call __fentry__; push rbp; mov rbp, rsp; nop; pop rbp; ret
    put(
        0x480,
        &[
            0xe8, 0x40, 0, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x90, 0x5d, 0xc3,
        ],
    );
    // `return_to_handler`: sub rsp, 16
    put(0x500, &[0x48, 0x83, 0xec, 0x10]);
    orc::calls().for_each(|at| text[at] = 0xe8);
    patched::text(&mut text);
    text
}

/// The variables; most are zero. The tracer's table lists `victim`, `patient` and `behind_patient`.
fn data() -> Vec<u8> {
    let mut data = vec![0; 0x4000];
    data[0x3e00..0x3e08].copy_from_slice(&(TEXT + 0x300).to_le_bytes());
    data[0x3e08..0x3e10].copy_from_slice(&(TEXT + 0x440).to_le_bytes());
    data[0x3e10..0x3e18].copy_from_slice(&(TEXT + 0x480).to_le_bytes());
    // The first taint is a module's, the second is not, the third is.
    data[0x3730..0x3739].copy_from_slice(b"PG\x01S \x00O \x01");
    patched::data(&mut data);
    data
}

/// A table of signed 32-bit distances from each entry to a site, `entry` bytes apart.
pub(crate) fn relative(table: u64, entry: usize, sites: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; sites.len() * entry];
    for (index, site) in sites.iter().enumerate() {
        let from = table + u64::try_from(index * entry).unwrap();
        let distance = i32::try_from(site.wrapping_sub(from).cast_signed()).unwrap();
        bytes[index * entry..index * entry + 4].copy_from_slice(&distance.to_le_bytes());
    }
    bytes
}

fn notes() -> Vec<u8> {
    let mut notes = Vec::new();
    for (kind, name, value) in [
        (6_u32, "Xen\0", &b"linux\0\0\0"[..]),
        (3, "GNU\0", &BUILD_ID[..]),
    ] {
        for word in [4, u32::try_from(value.len()).unwrap(), kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(name.bytes().chain(value.iter().copied()));
    }
    notes
}

/// The sections of the made-up kernel.
pub(crate) fn parts(form: Form) -> Vec<Part> {
    let part = |name, at, bytes| Part {
        name,
        at,
        bytes,
        code: false,
    };
    let mut types = btf(form);
    assert!(types.len() <= BTF_LEN, "{:#x}", types.len());
    types.resize(BTF_LEN, 0);
    let returns = RODATA + 0x8_0000;
    let bugs = RODATA + 0x8_1000;
    let mut all = vec![
        Part {
            name: ".text",
            at: TEXT,
            bytes: text(),
            code: true,
        },
        part(".data", DATA, data()),
        part(".rodata", RODATA, kallsyms(form, &symbols(form))),
        part(".notes", RODATA + 0x7_0000, notes()),
        part(".BTF", RODATA + 0x7_1000, types),
        part(
            ".return_sites",
            returns,
            relative(returns, 4, &[TEXT + 0x310]),
        ),
        part("__bug_table", bugs, relative(bugs, 12, &[TEXT + 0x308])),
        part(".orc_unwind_ip", orc::IPS, orc::ips()),
        part(".orc_unwind", orc::ENTRIES, orc::entries(form)),
    ];
    all.extend(patched::parts(form));
    all
}

/// The ELF file: `parts`, and relocations of `[64-bit, inverse 32-bit, 32-bit]` sites behind it.
pub(crate) fn elf(parts: &[Part], relocs: &[&[u64]; 3]) -> Vec<u8> {
    let (mut body, mut names, mut headers) = (vec![0; 64], vec![0], vec![0; 64]);
    let mut header = |name: u32, kind: u32, flags: u64, at: u64, offset: usize, len: usize| {
        let mut bytes = Vec::new();
        [name, kind]
            .iter()
            .for_each(|word| bytes.extend(word.to_le_bytes()));
        let words = [
            flags,
            at,
            u64::try_from(offset).unwrap(),
            u64::try_from(len).unwrap(),
            0,
            1,
            0,
        ];
        words
            .iter()
            .for_each(|word| bytes.extend(word.to_le_bytes()));
        headers.extend(bytes);
    };
    for part in parts {
        body.resize(body.len().next_multiple_of(16), 0);
        let name = u32::try_from(names.len()).unwrap();
        names.extend(part.name.bytes().chain([0]));
        header(
            name,
            1,
            if part.code { 6 } else { 2 },
            part.at,
            body.len(),
            part.bytes.len(),
        );
        body.extend(&part.bytes);
    }
    let name = u32::try_from(names.len()).unwrap();
    names.extend(b".shstrtab\0");
    header(name, 3, 0, 0, body.len(), names.len());
    body.extend(names);
    body.resize(body.len().next_multiple_of(8), 0);
    let at = u64::try_from(body.len()).unwrap();
    let count = u16::try_from(parts.len() + 2).unwrap();
    body.extend(headers);
    let mut put = |at: usize, bytes: &[u8]| body[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(40, &at.to_le_bytes());
    put(52, &[64, 0, 56, 0, 0, 0, 64, 0]);
    put(60, &count.to_le_bytes());
    put(62, &(count - 1).to_le_bytes());
    for list in relocs {
        body.extend([0; 4]);
        list.iter()
            .for_each(|site| body.extend(&site.to_le_bytes()[..4]));
    }
    body
}

/// The whole image.
pub(crate) fn image(form: Form) -> Vec<u8> {
    let add64 = [DATA + 0x3198, kallsyms_base(form)];
    elf(&parts(form), &[&add64, &[], &[TEXT + 0x309]])
}
