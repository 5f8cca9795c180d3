//! When nobody in the guest can still be reading what was taken back.
//!
//! The kernel reads what it knows of code with preemption off: who was reading has come to an end once its CPU is seen in the user's code,
//! asleep in its idle task, or with another task than before. A vCPU that is halted elsewhere is not idle: it may wait for a lock.
//! Sources: kernel `kernel/module/main.c` (`__module_address()`), `arch/x86/kernel/kvm.c` (`kvm_wait()`).

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::guest::{Vcpu, VcpuState};
use crate::kernel::tasks::Tasks;

/// The vCPUs that have not been seen at rest since, with the task that each ran when it was first looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grace {
    left: BTreeMap<usize, Option<Gva>>,
}

impl Grace {
    /// It begins under the pause that took something back, of a guest with so many vCPUs.
    #[must_use]
    pub fn begin(vcpus: usize) -> Self {
        Self {
            left: (0..vcpus).map(|index| (index, None)).collect(),
        }
    }

    /// What is seen of the guest, whose tasks are `tasks`, under that pause or a later one.
    pub fn look(&mut self, vcpus: &[Vcpu], tasks: &Tasks) {
        self.left.retain(|index, before| {
            let Some(vcpu) = vcpus.get(*index) else {
                return true;
            };
            let now = current(vcpu, tasks);
            let first = before.or(now);
            *before = first;
            !at_rest(vcpu, tasks) && (now.is_none() || now == first)
        });
    }

    /// Whether what was taken back may be used for something else.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.left.is_empty()
    }
}

/// The task that a vCPU runs in the kernel, if it has the base of its CPU's own memory there.
fn current(vcpu: &Vcpu, tasks: &Tasks) -> Option<Gva> {
    let mut cpus = tasks.cpus.iter();
    let cpu = cpus.find(|cpu| vcpu.cpl == 0 && cpu.area == vcpu.gs_base);
    cpu.map(|cpu| cpu.current)
}

/// Nothing of the kernel's is under way on the CPU.
fn at_rest(vcpu: &Vcpu, tasks: &Tasks) -> bool {
    let idle = |stack: Gva| {
        let of = tasks
            .tasks
            .iter()
            .filter(|task| task.stack.contains(&stack));
        let mut of = of.map(|task| task.at);
        of.any(|task| tasks.cpus.iter().any(|cpu| cpu.idle == task))
    };
    match vcpu.state {
        VcpuState::Offline => true,
        VcpuState::Running => vcpu.cpl == 3,
        VcpuState::Halted => vcpu.cpl == 3 || idle(Gva(vcpu.rsp())),
    }
}

#[cfg(test)]
mod tests {
    use super::Grace;
    use crate::guest::VcpuState;
    use crate::kernel::tasks::Tasks;
    use crate::kernel::testing::Form;
    use crate::kernel::testing::guest::TinyGuest;

    #[test]
    fn it_is_over_when_each_has_been_at_rest_once() {
        let mut guest = TinyGuest::new(Form::New, 4);
        let worker = guest.task(7, "worker", &[]);
        let (idle, busy) = (guest.stack_top(1) - 64, guest.stack_top(worker) - 64);
        let kernel = guest.kernel();
        let tasks = Tasks::read(&kernel, &guest).unwrap();
        let look = |state, cpl, stack, over| {
            let mut vcpus = guest.vcpus.clone();
            (vcpus[1].state, vcpus[1].cpl, vcpus[1].gpr[4]) = (state, cpl, stack);
            let mut grace = Grace::begin(2);
            grace.look(&vcpus, &tasks);
            assert_eq!(grace.is_over(), over, "{state:?} {cpl} {stack:#x}");
        };
        look(VcpuState::Running, 0, idle, false);
        look(VcpuState::Halted, 0, busy, false);
        look(VcpuState::Halted, 0, idle, true);
        look(VcpuState::Running, 3, busy, true);
        look(VcpuState::Offline, 0, busy, true);
        let (mut grace, mut vcpus) = (Grace::begin(2), guest.vcpus.clone());
        vcpus[1].cpl = 0;
        grace.look(&vcpus, &tasks);
        assert!(!grace.is_over());
        vcpus[0].cpl = 0;
        vcpus[1].cpl = 3;
        grace.look(&vcpus, &tasks);
        assert!(grace.is_over(), "at rest at different times");
    }

    #[test]
    fn a_cpu_that_runs_another_task_has_been_at_rest() {
        let mut guest = TinyGuest::new(Form::New, 4);
        let (one, other) = (guest.task(7, "one", &[]), guest.task(8, "other", &[]));
        let mut grace = Grace::begin(1);
        let mut look = |guest: &mut TinyGuest, runs, known, over| {
            guest.run(0, runs);
            let kernel = guest.kernel();
            let tasks = Tasks::read(&kernel, &*guest).unwrap();
            let mut vcpu = guest.vcpus[0];
            (vcpu.state, vcpu.cpl) = (VcpuState::Running, 0);
            vcpu.gs_base = if known { tasks.cpus[0].area } else { 0 };
            grace.look(&[vcpu], &tasks);
            assert_eq!(grace.is_over(), over, "task {runs}, {known}");
        };
        look(&mut guest, other, false, false);
        look(&mut guest, one, true, false);
        look(&mut guest, one, true, false);
        // Between two bases it is not known what the CPU is.
        look(&mut guest, other, false, false);
        look(&mut guest, other, true, true);
    }
}
