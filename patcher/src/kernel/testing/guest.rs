//! A guest made up for tests: memory in which the made-up kernel runs, moved, on two CPUs, with tasks and their stacks.

use std::sync::Arc;

use super::{DATA, Form, STACK, TEXT, address, image, parts, task};
use crate::addr::{Gpa, Gva, LinkAddr};
use crate::guest::{GuestError, ReadPhys, Vcpu, VcpuState};
use crate::kernel::image::Image;
use crate::kernel::locate::Kernel;
use crate::x86::paging::PageTables;

pub(crate) const SLIDE: u64 = 0x1240_0000;
/// Where the direct map of all memory begins.
pub(crate) const DIRECT: u64 = 0xffff_8880_0000_0000;
const VMALLOC: u64 = 0xffff_c900_0000_0000;
/// The interrupt table, and behind it each CPU's entry area.
pub(crate) const ENTRY_AREA: u64 = 0xffff_fe00_0000_0000;
const MEMORY: usize = 16 << 20;
const KERNEL_AT: u64 = 0x40_0000;
const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
/// The user's registers at the top of a stack.
const REGISTERS: u64 = 168;

pub(crate) struct TinyGuest {
    pub(crate) memory: Vec<u8>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) form: Form,
    pub(crate) tasks: Vec<u64>,
    tables: PageTables,
    areas: Vec<u64>,
    next_page: u64,
    next_object: u64,
    next_area: u64,
}

impl ReadPhys for TinyGuest {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        let start = usize::try_from(at.0).unwrap_or(usize::MAX);
        let none = || GuestError::NoMemory { at, len: buf.len() };
        let bytes = start
            .checked_add(buf.len())
            .and_then(|end| self.memory.get(start..end))
            .ok_or_else(none)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// A vCPU in the user's code.
pub(crate) fn vcpu(cr3: u64, levels: u8) -> Vcpu {
    Vcpu {
        state: VcpuState::Running,
        gpr: [0; 16],
        rip: 0x40_1000,
        rflags: 2,
        cpl: 3,
        cr0: 1 << 31 | 1,
        cr3,
        cr4: if levels == 5 { 1 << 12 } else { 0 },
        efer: 1 << 10,
        idt_base: ENTRY_AREA,
        gs_base: 0,
        event_pending: false,
    }
}

impl TinyGuest {
    /// A guest whose kernel has booted; its CPUs run the first task of each.
    pub(crate) fn new(form: Form, levels: u8) -> Self {
        let root = KERNEL_AT + (DATA - TEXT) + 0x1000;
        let mut guest = Self {
            memory: vec![0; MEMORY],
            vcpus: vec![vcpu(root, levels); 2],
            form,
            tasks: Vec::new(),
            tables: PageTables {
                root: Gpa(root),
                levels,
            },
            areas: Vec::new(),
            next_page: 0x10_0000,
            next_object: DIRECT + 0x20_0000,
            next_area: VMALLOC,
        };
        guest.map_kernel();
        guest.variables();
        for (pid, name) in [(0, "swapper/0"), (0, "swapper/1")] {
            guest.task(pid, name, &[]);
        }
        for cpu in 0..2 {
            guest.bring_up(cpu);
        }
        guest
    }

    fn map_kernel(&mut self) {
        let fixmap = KERNEL_AT + (DATA - TEXT) + 0x2000;
        for step in 0..2 {
            self.map(TEXT + SLIDE + step * HUGE, KERNEL_AT + step * HUGE, 2);
        }
        // The last table of the kernel's region is the one that the kernel calls its fixmap's.
        let upper = self.table(0xffff_ffff_c000_0000, 3);
        self.put_phys(upper + 511 * 8, fixmap | 3);
        for at in (0..MEMORY as u64).step_by(0x20_0000) {
            self.map(DIRECT + at, at, 2);
        }
        let idt = self.page();
        self.map(ENTRY_AREA, idt, 1);
        let image = Image::parse(Arc::new(image(self.form))).unwrap();
        for part in parts(self.form) {
            let mut bytes = part.bytes;
            let relocs = image.shipped().unwrap().relocs();
            relocs.apply(LinkAddr(part.at), &mut bytes, SLIDE).unwrap();
            let at = usize::try_from(KERNEL_AT + (part.at - TEXT)).unwrap();
            if part.name != ".data" {
                self.memory[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let handler = (TEXT + SLIDE + 0x100).to_le_bytes();
        let low = u64::from_le_bytes([
            handler[0], handler[1], 0x10, 0, 0, 0x8e, handler[2], handler[3],
        ]);
        self.put(ENTRY_AREA, low);
        self.put(
            ENTRY_AREA + 8,
            u64::from_le_bytes([handler[4], handler[5], handler[6], handler[7], 0, 0, 0, 0]),
        );
    }

    fn variables(&mut self) {
        self.put(self.at("nr_cpu_ids"), 2);
        self.put(self.at("__cpu_possible_mask"), 3);
        self.put(self.at("__cpu_online_mask"), 3);
        self.put(self.at("page_offset_base"), DIRECT);
        self.put(self.at("vmalloc_base"), VMALLOC);
        self.put(self.at("system_state"), 3);
        self.put(self.at("x86_return_thunk"), TEXT + SLIDE + 0x400);
        self.list(self.at("modules"), &[]);
        self.list(self.at("bpf_kallsyms"), &[]);
        self.list(self.at("btf_modules"), &[]);
        let bugs = self.at("module_bug_list");
        self.list(bugs, &[]);
        self.put(bugs + 8, bugs);
        self.put(self.at("mod_tree") + 24, u64::MAX);
        if self.form == Form::New {
            self.put(self.at("vmap_nodes"), self.at("vmap_node_0"));
            self.put(self.at("nr_vmap_nodes"), 1);
        }
    }

    /// Gives CPU `cpu` its stacks and its idle task.
    fn bring_up(&mut self, cpu: u64) {
        let area = DIRECT + 0x30_0000 + cpu * PAGE;
        self.put(self.at("__per_cpu_offset") + cpu * 8, area);
        let irq = self.stack(false);
        let entry = ENTRY_AREA + PAGE + cpu * 0x8000;
        for page in 0..8 {
            let at = self.page();
            self.map(entry + page * PAGE, at, 1);
        }
        let index = usize::try_from(cpu).unwrap();
        self.vcpus[index].gs_base = area;
        let idle = self.tasks[index];
        self.put(self.percpu(cpu, "hardirq_stack_ptr"), irq + STACK - 8);
        self.put(self.percpu(cpu, "cea_exception_stacks"), entry + 0x2000);
        self.put(self.percpu(cpu, "runqueues") + 8, idle);
        self.put(self.percpu(cpu, "current_task"), idle);
    }

    /// The per-CPU variable `name` of `cpu`.
    pub(crate) fn percpu(&self, cpu: u64, name: &str) -> u64 {
        let offset = match (self.form, name) {
            (Form::New, "current_task") => 0x100,
            (Form::New, "hardirq_stack_ptr") => 0x120,
            _ => address(self.form, name),
        };
        DIRECT + 0x30_0000 + cpu * PAGE + offset
    }

    /// The running kernel's address of `name`.
    pub(crate) fn at(&self, name: &str) -> u64 {
        address(self.form, name) + SLIDE
    }

    /// A new page.
    pub(crate) fn page(&mut self) -> u64 {
        self.next_page += PAGE;
        self.next_page - PAGE
    }

    /// Makes the next new page one with an even number.
    fn next_even_page(&mut self) {
        self.next_page = self.next_page.next_multiple_of(2 * PAGE);
    }

    /// `len` bytes of the kernel's heap.
    pub(crate) fn object(&mut self, len: u64) -> u64 {
        let at = self.next_object;
        self.next_object += len.next_multiple_of(64);
        at
    }

    pub(crate) fn put_phys(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes a word where the kernel sees it.
    pub(crate) fn put(&mut self, at: u64, value: u64) {
        let at = self.tables.translate(self, Gva(at)).unwrap().at;
        self.put_phys(at.0, value);
    }

    /// Writes `bytes`, which lie on one page.
    pub(crate) fn put_bytes(&mut self, at: u64, bytes: &[u8]) {
        let at = self.tables.translate(self, Gva(at)).unwrap().at;
        let at = usize::try_from(at.0).unwrap();
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.tables.read(self, Gva(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// The table of `level` that translates `at`, made if need be.
    fn table(&mut self, at: u64, level: u8) -> u64 {
        let mut table = self.tables.root.0;
        for current in (level + 1..=self.tables.levels).rev() {
            let entry = table + (at >> (12 + 9 * (u32::from(current) - 1)) & 511) * 8;
            let mut bytes = [0; 8];
            self.read_phys(Gpa(entry), &mut bytes).unwrap();
            let mut value = u64::from_le_bytes(bytes);
            if value == 0 {
                value = self.page() | 7;
                self.put_phys(entry, value);
            }
            table = value & !0xfff;
        }
        table
    }

    /// Maps one page of `level` at `at` to `to`.
    pub(crate) fn map(&mut self, at: u64, to: u64, level: u8) {
        let table = self.table(at, level);
        let large = if level > 1 { 0x80 } else { 0 };
        self.put_phys(
            table + (at >> (12 + 9 * (u32::from(level) - 1)) & 511) * 8,
            to | 3 | large,
        );
    }

    /// Puts the only vCPU on the user's tables, as page-table isolation has it: the kernel's tables, and on the next page the user's, which
    /// map only the entry area.
    pub(crate) fn isolate(&mut self) {
        self.next_even_page();
        let (own, user) = (self.page(), self.page());
        let root = usize::try_from(self.vcpus[0].cr3).unwrap();
        let tables = self.memory[root..root + 4096].to_vec();
        let at = usize::try_from(own).unwrap();
        self.memory[at..at + 4096].copy_from_slice(&tables);
        let entry = usize::try_from((ENTRY_AREA >> 39 & 511) * 8).unwrap();
        self.memory[at + 4096 + entry..at + 4096 + entry + 8]
            .copy_from_slice(&tables[entry..entry + 8]);
        self.vcpus = vec![vcpu(user | 0x805, 4)];
    }

    /// Takes away the page at `at`.
    pub(crate) fn unmap(&mut self, at: u64) {
        let entry = self.table(at, 1) + (at >> 12 & 511) * 8;
        self.put_phys(entry, 0);
    }

    /// A stack in an area of its own, which `task` says that a task's stack is.
    pub(crate) fn stack(&mut self, task: bool) -> u64 {
        let at = self.next_area;
        self.next_area += STACK + PAGE;
        for page in 0..STACK / PAGE {
            let to = self.page();
            self.map(at + page * PAGE, to, 1);
        }
        let (area, vm) = (self.object(72), self.object(64));
        self.put(area, at);
        self.put(area + 8, at + STACK + PAGE);
        self.put(area + 56, vm);
        self.put(vm + 24, if task { 0x22 } else { 4 });
        self.areas.push(area);
        at
    }

    /// The `vm_struct` of the newest area.
    pub(crate) fn last_vm(&self) -> u64 {
        self.areas.last().map_or(0, |area| self.get(area + 56))
    }

    /// A process that sleeps, whose live stack holds `words`. Returns its place in `tasks`.
    pub(crate) fn task(&mut self, pid: u64, name: &str, words: &[u64]) -> usize {
        let stack = self.stack(true);
        let at = if self.tasks.is_empty() {
            self.at("init_task")
        } else {
            self.object(0x200)
        };
        let signal = self.object(0x20);
        self.put(at + task::STACK, stack);
        self.put(at + task::SIGNAL, signal);
        self.put(at + task::PID, pid);
        self.put(at + task::TGID, pid);
        self.put(at + task::THREAD_PID, signal);
        let first = self.tasks.first().copied().unwrap_or(at);
        self.put(at + task::REAL_PARENT, first);
        let mut comm = [0; 16];
        comm[..name.len()].copy_from_slice(name.as_bytes());
        self.put(
            at + task::COMM,
            u64::from_le_bytes(comm[..8].try_into().unwrap()),
        );
        self.put(
            at + task::COMM + 8,
            u64::from_le_bytes(comm[8..].try_into().unwrap()),
        );
        self.put(
            at + task::CURR_RET_STACK,
            if self.form == Form::New {
                0
            } else {
                0xffff_ffff
            },
        );
        self.list(signal + 0x10, &[at + task::THREAD_NODE]);
        self.tasks.push(at);
        let index = self.tasks.len() - 1;
        let sp = self.push(index, words);
        self.put(at + task::SP, sp);
        index
    }

    /// Puts `words` on the stack of a task, below the user's registers; returns the stack pointer.
    pub(crate) fn push(&mut self, index: usize, words: &[u64]) -> u64 {
        let sp = self.stack_top(index) - REGISTERS - 8 * words.len() as u64;
        (sp..)
            .step_by(8)
            .zip(words)
            .for_each(|(at, word)| self.put(at, *word));
        sp
    }

    pub(crate) fn stack_top(&self, index: usize) -> u64 {
        self.get(self.tasks[index] + task::STACK) + STACK
    }

    /// Links `nodes` into a list with `head`.
    pub(crate) fn list(&mut self, head: u64, nodes: &[u64]) {
        let mut at = head;
        for node in nodes {
            self.put(at, *node);
            at = *node;
        }
        self.put(at, head);
    }

    /// CPU `cpu` runs task `index`.
    pub(crate) fn run(&mut self, cpu: u64, index: usize) {
        self.put(self.percpu(cpu, "current_task"), self.tasks[index]);
    }

    /// vCPU `cpu` is in the kernel at `rip` with the stack pointer `sp`.
    pub(crate) fn enter(&mut self, cpu: usize, rip: u64, sp: u64) {
        let vcpu = &mut self.vcpus[cpu];
        (vcpu.cpl, vcpu.rip, vcpu.gpr[4]) = (0, rip, sp);
    }

    /// Makes the lists of tasks (all but the second idle one) and of areas, and finds the kernel.
    pub(crate) fn kernel(&mut self) -> Kernel {
        self.link();
        let image = Arc::new(Image::parse(Arc::new(image(self.form))).unwrap());
        Kernel::locate(image, self, &self.vcpus).unwrap()
    }

    /// The same, with the kernel recovered from memory; its tracer has been made ready, as every kernel's is at boot.
    pub(crate) fn recovered(&mut self) -> Kernel {
        self.link();
        self.trace_nothing();
        let image = Arc::new(Image::from_memory(self, &self.vcpus).unwrap());
        Kernel::locate(image, self, &self.vcpus).unwrap()
    }

    /// Puts NOPs where `victim`, `patient` and `behind_patient` call the tracer.
    pub(crate) fn trace_nothing(&mut self) {
        for function in ["victim", "patient", "behind_patient"] {
            self.put_bytes(self.at(function), &[0x0f, 0x1f, 0x44, 0, 0]);
        }
    }

    pub(crate) fn link(&mut self) {
        let nodes: Vec<u64> = self
            .tasks
            .iter()
            .skip(2)
            .map(|at| at + task::TASKS)
            .collect();
        self.list(self.tasks[0] + task::TASKS, &nodes);
        let areas: Vec<u64> = self.areas.iter().map(|at| at + 40).collect();
        let head = match self.form {
            Form::New => self.at("vmap_node_0") + 16 + 8,
            _ => self.at("vmap_area_list"),
        };
        self.list(head, &areas);
    }
}
