//! What an operator expects of a list of processes: whose each task is, what it is at, and on whose behalf.
//!
//! Read beside [`Tasks`] for those who look, never for a decision: safety reads as little under a pause as it can. A fact whose member
//! the kernel lacks, or whose pointer leads to no memory, is left out.
//! Sources: kernel `include/linux/sched.h` (`task_state_index`), `fs/proc/array.c`.

use super::Tasks;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::gather::{Fields, Gather};
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::types::Types;

/// What a task is to the user who lists processes; each is `None` where the kernel does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// The thread group's id, which users call the process's.
    pub tgid: Option<u32>,
    /// The thread group's id of its parent; 0 for none.
    pub ppid: Option<u32>,
    /// Its state, as `ps` shows it.
    pub state: Option<State>,
    /// The real user's id, as the first user namespace has it.
    pub uid: Option<u32>,
    /// It is a thread of the kernel's own.
    pub kthread: Option<bool>,
}

/// A task's state: one of `R` (runs, or could), `S` (sleeps), `D` (sleeps whatever comes), `T` (stopped), `t` (stopped by its tracer), `X` (dead),
/// `Z` (a zombie), `P` (parked), `I` (an idle thread of the kernel).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(char);

/// The letters, in the order of the bits that mean them; none means the first.
const LETTERS: [char; 9] = ['R', 'S', 'D', 'T', 't', 'X', 'Z', 'P', 'I'];
/// The bits of a state that have a letter each.
const SHOWN: u32 = 0x7f;
const UNINTERRUPTIBLE: u32 = 2;
/// Uninterruptible, but no load: what only waits for work.
const IDLE: u32 = 0x400 | UNINTERRUPTIBLE;
/// It waits for a lock that sleeps, or is frozen.
const AS_UNINTERRUPTIBLE: u32 = 0x1000 | 0x8000;
/// `PF_KTHREAD`.
const KTHREAD: u32 = 0x0020_0000;

impl State {
    /// The state that a task's two words of it mean.
    fn of(state: u32, exit_state: u32) -> Self {
        let letter = if state & AS_UNINTERRUPTIBLE != 0 {
            'D'
        } else if state & IDLE == IDLE {
            'I'
        } else {
            let shown = (state | exit_state) & SHOWN;
            let index = (u32::BITS - shown.leading_zeros()) as usize;
            LETTERS.get(index).copied().unwrap_or('R')
        };
        Self(letter)
    }

    /// Its letter.
    #[must_use]
    pub fn letter(self) -> char {
        self.0
    }
}

/// Offsets into `task_struct`, as far as the kernel has them.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tgid: Option<u64>,
    /// Of the parent that a tracer does not displace.
    parent: Option<u64>,
    /// What a task loses with its number: from then on it has no parent.
    thread_pid: Option<u64>,
    /// The state, and that of one that ends.
    state: Option<(u64, u64)>,
    flags: Option<u64>,
    /// The credentials, and the user's id within them.
    user: Option<(u64, u64)>,
}

impl Layout {
    fn resolve(types: &Types) -> Self {
        let member = |path: &str| types.offset_of("task_struct", path).ok();
        // Linux 5.14 renamed it when all its readers were to be found.
        let state = member("__state").or_else(|| member("state"));
        Self {
            tgid: member("tgid"),
            parent: member("real_parent"),
            thread_pid: member("thread_pid"),
            state: state.zip(member("exit_state")),
            flags: member("flags"),
            user: member("real_cred").zip(types.offset_of("cred", "uid").ok()),
        }
    }

    fn gather(&self) -> Gather {
        let words = [self.parent, self.thread_pid, self.user.map(|user| user.0)];
        let (state, exit) = self.state.unzip();
        let halves = [self.tgid, state, exit, self.flags];
        let words = words.into_iter().flatten().map(|at| (at, 8));
        let halves = halves.into_iter().flatten().map(|at| (at, 4));
        Gather::new(&words.chain(halves).collect::<Vec<_>>())
    }

    /// What the task says whose fields have just been read, and what lies one pointer further.
    fn process<R: ReadPhys + ?Sized>(&self, memory: &Memory<'_, R>, task: &Fields) -> Process {
        // Where memory ends the answer ends: nothing else depends on it.
        let beyond = |pointer: u64, offset: u64| {
            let at = pointer.checked_add(offset)?;
            memory.u32(Gva(at)).ok()
        };
        let numbered = self.thread_pid.is_none_or(|at| task.u64(at) != 0);
        let ppid = self.parent.zip(self.tgid).and_then(|(parent, tgid)| {
            if numbered {
                beyond(task.u64(parent), tgid)
            } else {
                Some(0)
            }
        });
        Process {
            tgid: self.tgid.map(|at| task.u32(at)),
            ppid,
            state: self
                .state
                .map(|(state, exit)| State::of(task.u32(state), task.u32(exit))),
            uid: self
                .user
                .and_then(|(user, uid)| beyond(task.u64(user), uid)),
            kthread: self.flags.map(|at| task.u32(at) & KTHREAD != 0),
        }
    }
}

/// Reads what there is to say of each of `tasks`, in their order. `guest` must still stand where they were read.
///
/// # Errors
/// When a task lies outside the guest's memory.
pub fn read<R: ReadPhys + ?Sized>(
    kernel: &Kernel,
    guest: &R,
    tasks: &Tasks,
) -> Result<Vec<Process>, KernelError> {
    let memory = Memory::new(kernel, guest)?;
    let layout = Layout::resolve(kernel.image().types());
    let gather = layout.gather();
    let mut fields = gather.fields();
    let mut all = Vec::with_capacity(tasks.tasks.len());
    for task in &tasks.tasks {
        fields.read(&memory, task.at)?;
        all.push(layout.process(&memory, &fields));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Layout, Process, State, read};
    use crate::kernel::memory::Memory;
    use crate::kernel::tasks::Tasks;
    use crate::kernel::testing::guest::TinyGuest;
    use crate::kernel::testing::{FORMS, Form, task};

    #[test]
    fn a_state_is_the_letter_of_its_highest_bit() {
        let check = |state: u32, exit_state: u32, want: char| {
            let got = State::of(state, exit_state).letter();
            assert_eq!(got, want, "{state:#x} {exit_state:#x}");
        };
        check(0, 0, 'R');
        check(1, 0, 'S');
        check(2, 0, 'D');
        check(0x102, 0, 'D');
        check(0x2001, 0, 'S');
        check(0x104, 0, 'T');
        check(8, 0, 't');
        check(0x80, 0x10, 'X');
        check(0x80, 0x20, 'Z');
        check(0x40, 0, 'P');
        check(0x402, 0, 'I');
        check(0x400, 0, 'R');
        check(0x8000, 0, 'D');
        check(0x1000, 0, 'D');
        // One that is neither new nor woken yet, and bits that no kernel has.
        check(0x800, 0, 'R');
        check(u32::MAX, u32::MAX, 'D');
        check(0x7fff_0fff & !0x400, 0, 'P');
    }

    /// A guest with a process of user 1000, a second thread's parent, a kernel thread, and one that has ended.
    fn guest(form: Form) -> TinyGuest {
        let mut guest = TinyGuest::new(form, 4);
        for (pid, name) in [(2, "kthreadd"), (7, "shell"), (8, "child"), (9, "gone")] {
            guest.task(pid, name, &[]);
        }
        let cred = guest.object(0x40);
        guest.put(cred + task::UID, 0xdead_0000_03e8);
        let at = |index: usize| guest.tasks[index];
        let (kthreadd, shell, child, gone) = (at(2), at(3), at(4), at(5));
        guest.put(kthreadd + task::EXIT_STATE, 0x0020_8040 << 32);
        guest.put(kthreadd + task::STATE, 0x402);
        for user in [shell, child] {
            guest.put(user + task::REAL_CRED, cred);
            guest.put(user + task::STATE, 0xffff_ffff_0000_0001);
        }
        guest.put(child + task::REAL_PARENT, shell);
        guest.put(child + task::TGID, 7);
        guest.put(child + task::STATE, 0x104);
        guest.put(gone + task::EXIT_STATE, 0x10);
        guest.put(gone + task::REAL_PARENT, shell);
        guest.put(gone + task::THREAD_PID, 0);
        guest
    }

    fn seen(guest: &mut TinyGuest) -> Vec<Process> {
        let kernel = guest.kernel();
        let tasks = Tasks::read(&kernel, guest).unwrap();
        read(&kernel, guest, &tasks).unwrap()
    }

    fn process(tgid: u32, ppid: u32, state: char, uid: Option<u32>, kthread: bool) -> Process {
        Process {
            tgid: Some(tgid),
            ppid: Some(ppid),
            state: Some(State(state)),
            uid,
            kthread: Some(kthread),
        }
    }

    #[test]
    fn whose_a_task_is_and_what_it_is_at() {
        for form in FORMS {
            // The second idle task is in no list: it comes last.
            assert_eq!(
                seen(&mut guest(form)),
                [
                    process(0, 0, 'R', None, false),
                    process(2, 0, 'I', None, true),
                    process(7, 0, 'S', Some(1000), false),
                    process(7, 7, 'T', Some(1000), false),
                    process(9, 0, 'X', None, false),
                    process(0, 0, 'R', None, false),
                ],
                "{form:?}"
            );
        }
    }

    #[test]
    fn what_the_kernel_lacks_is_left_out() {
        let mut guest = guest(Form::New);
        let kernel = guest.kernel();
        let memory = Memory::new(&kernel, &guest).unwrap();
        let child = crate::addr::Gva(guest.tasks[4]);
        let whole = Layout::resolve(kernel.image().types());
        let check = |layout: Layout, want: Process| {
            let gather = layout.gather();
            let mut fields = gather.fields();
            fields.read(&memory, child).unwrap();
            assert_eq!(layout.process(&memory, &fields), want, "{layout:?}");
        };
        let full = process(7, 7, 'T', Some(1000), false);
        check(whole, full);
        check(
            Layout {
                tgid: None,
                ..whole
            },
            Process {
                tgid: None,
                ppid: None,
                ..full
            },
        );
        check(
            Layout {
                user: None,
                state: None,
                thread_pid: None,
                ..whole
            },
            Process {
                uid: None,
                state: None,
                ..full
            },
        );
        let none = Layout {
            tgid: None,
            parent: None,
            thread_pid: None,
            state: None,
            flags: None,
            user: None,
        };
        check(none, Process::default());
    }

    #[test]
    fn pointers_to_nowhere_lead_to_no_answer() {
        for wild in [1, 0xffff_ffff_ffff_ffff, 0x8000_0000_0000_0000, 0x41_4141] {
            let mut guest = guest(Form::New);
            let child = guest.tasks[4];
            guest.put(child + task::REAL_PARENT, wild);
            guest.put(child + task::REAL_CRED, wild);
            let want = Process {
                ppid: None,
                ..process(7, 0, 'T', None, false)
            };
            assert_eq!(seen(&mut guest)[3], want, "{wild:#x}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Whatever the kernel's heap holds, looking ends and nothing panics.
        #[test]
        fn hostile_memory_never_panics(changes in proptest::collection::vec((0..0x1000_u64, any::<u64>()), 1..40)) {
            let mut guest = guest(Form::New);
            let kernel = guest.kernel();
            let tasks = Tasks::read(&kernel, &guest).unwrap();
            for (at, value) in changes {
                guest.put(crate::kernel::testing::guest::DIRECT + 0x20_0000 + at / 8 * 8, value);
            }
            prop_assert_eq!(read(&kernel, &guest, &tasks).unwrap().len(), 6);
        }
    }
}
