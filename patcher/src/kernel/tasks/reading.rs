//! Tasks that are read one by one: what is asked of each, wherever it was found.

use super::{Hidden, Rest, Task, Turns};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::gather::{Fields, Gather};
use crate::kernel::layout::TaskLayout;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;

/// What reads tasks one by one.
pub(crate) struct Reading<'r, R: ?Sized> {
    layout: &'r TaskLayout,
    stack_size: u64,
    memory: &'r Memory<'r, R>,
    fields: Fields,
}

impl<'r, R: ReadPhys + ?Sized> Reading<'r, R> {
    /// Reads them from `memory`.
    pub(crate) fn new(kernel: &'r Kernel, memory: &'r Memory<'r, R>) -> Self {
        let layout = &kernel.layout().task;
        let mut fields = vec![
            (layout.stack, 8),
            (layout.pid, 4),
            (layout.comm, 16),
            (layout.sp, 8),
        ];
        if let Some(graph) = &layout.graph {
            fields.extend([(graph.entries, 8), (graph.last, 4)]);
        }
        if let Some(rethook) = &layout.rethook {
            fields.push((rethook.first, 8));
        }
        Self {
            layout,
            stack_size: kernel.layout().stack_size,
            memory,
            fields: Gather::new(&fields).fields(),
        }
    }

    /// The task at `at`, which has had these turns.
    pub(crate) fn task(&mut self, at: Gva, turns: Option<Turns>) -> Result<Task, KernelError> {
        self.fields.read(self.memory, at)?;
        let (layout, fields) = (self.layout, &self.fields);
        let stack = Gva(fields.u64(layout.stack));
        let unsound = || KernelError::Unsound {
            what: "task's stack",
            at,
            value: stack.0,
        };
        let len = if stack.0 == 0 { 0 } else { self.stack_size };
        let graph = layout.graph.as_ref().map_or((0, 0), |graph| {
            let last = i64::from(fields.u32(graph.last).cast_signed());
            let count = u64::try_from(last.saturating_add(graph.first_count)).unwrap_or(0);
            (fields.u64(graph.entries), count.saturating_mul(graph.unit))
        });
        let rethook = layout.rethook.as_ref();
        Ok(Task {
            at,
            pid: fields.u32(layout.pid),
            comm: fields.array(layout.comm),
            stack: stack.range(len).ok_or_else(unsound)?,
            saved_sp: Gva(fields.u64(layout.sp)),
            cpu: None,
            turns,
            rest: Rest::Unknown,
            hidden: Hidden {
                graph,
                rethook: rethook.map_or(0, |hook| fields.u64(hook.first)),
            },
        })
    }
}
