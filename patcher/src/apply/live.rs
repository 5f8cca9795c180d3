//! What planning and committing ask of a kernel, answered by the located [`Kernel`].

use std::time::Instant;

use crate::addr::{Gpa, Gva, LinkAddr};
use crate::commit::{Blocked, Running, Scanned};
use crate::edition::link::{Resolve, Returns};
use crate::guest::{ReadPhys, Registers};
use crate::kernel::alternatives::Alternatives;
use crate::kernel::locate::Kernel;
use crate::kernel::quiescence::{Question, quiescent};
use crate::kernel::rested::Rested;
use crate::kernel::stack::ScanError;
use crate::kernel::symbols::{Space, SymbolError};
use crate::kernel::unwind::OtherCode;
use crate::plan::{Plan, Write, checks};
use crate::publish;

/// How often stacks are looked at before a pause, while tasks come and go meanwhile.
const FIRST_LOOKS: usize = 3;

/// A located kernel, and what it decided at boot for all of its code.
#[derive(Clone, Debug)]
pub(super) struct Live<'k> {
    pub(super) kernel: &'k Kernel,
    pub(super) returns: Returns,
    pub(super) alternatives: Alternatives,
}

impl Resolve for Live<'_> {
    fn build_id(&self) -> &[u8] {
        self.kernel.image().build_id()
    }

    fn symbol(&self, name: &str) -> Result<u64, SymbolError> {
        let symbols = self.kernel.image().symbols();
        let symbol = symbols.lookup(name)?;
        // A per-CPU variable is reached through the segment base, by its offset or by where the image has the first CPU's.
        let moves = match symbols.space(&symbol) {
            Space::Image => true,
            Space::PerCpu => symbols.percpu_start() != LinkAddr(0),
            Space::Absolute => false,
        };
        Ok(if moves {
            self.kernel.runtime(symbol.address).0
        } else {
            symbol.address.0
        })
    }

    fn returns(&self) -> Returns {
        self.returns
    }

    fn alternatives(&self) -> &Alternatives {
        &self.alternatives
    }
}

/// A located kernel, and the code of ours that its threads may be in.
#[derive(Clone, Debug)]
pub(super) struct Inhabited<'k> {
    pub(super) kernel: &'k Kernel,
    pub(super) others: Vec<OtherCode>,
}

fn unreadable(cause: impl std::fmt::Display) -> Blocked {
    Blocked::Unreadable {
        cause: cause.to_string(),
    }
}

/// What `plan` asks of the guest's threads.
fn question(plan: &Plan) -> Question<'_> {
    Question {
        forbidden: &plan.forbidden,
        watched: &plan.watched,
        group: &plan.group,
        graces: &plan.graces,
    }
}

impl Running for Inhabited<'_> {
    fn prove_same<G: ReadPhys + Registers>(&self, guest: &G) -> Result<(), Blocked> {
        let same = self.kernel.prove_same(guest, guest.vcpus());
        same.map_err(|error| Blocked::OtherKernel {
            cause: error.to_string(),
        })
    }

    fn settled<G: ReadPhys>(&self, guest: &G) -> Result<(), Blocked> {
        match self.kernel.text_in_flux(guest) {
            Ok(None) => Ok(()),
            Ok(Some(cause)) => Err(Blocked::InFlux {
                cause: cause.to_string(),
            }),
            Err(error) => Err(unreadable(error)),
        }
    }

    fn first_look<G: ReadPhys>(&self, guest: &G, plan: &Plan, until: Instant) -> Rested {
        // The lists of a guest that runs may be in motion. Then less is known before the pause, or nothing.
        let mut last = Rested::default();
        for _ in 0..FIRST_LOOKS {
            let look = Rested::look(self.kernel, guest, &question(plan), &self.others, until);
            let Ok(rested) = look else { continue };
            last = rested;
            if let Ok(false) = last.is_outdated(self.kernel, guest) {
                break;
            }
        }
        last
    }

    fn scan<G: ReadPhys + Registers>(
        &self,
        guest: &G,
        plan: &Plan,
        rested: Rested,
    ) -> Result<Scanned, Blocked> {
        // A probe that is not armed yet would be written over our jump when it is.
        let probes = self.kernel.kprobes_in(guest, &plan.forbidden);
        let probes = probes.map_err(unreadable)?;
        checks::no_kprobe("the redirected function", &probes).map_err(Blocked::Changed)?;
        let vcpus = guest.vcpus();
        let (question, others) = (question(plan), &self.others);
        match quiescent(self.kernel, guest, vcpus, &question, others, rested) {
            Ok(answer) => Ok(Scanned {
                tasks: answer.scan.tasks as u64,
                words: answer.scan.words,
                vcpus: guest.vcpus().len(),
                watched: answer.watched,
                inside: answer.inside,
                graces: answer.graces,
            }),
            Err(error @ (ScanError::Hit(_) | ScanError::Disagree { .. })) => Err(Blocked::Busy {
                cause: error.to_string(),
            }),
            Err(error) => Err(unreadable(error)),
        }
    }

    fn publishing<G: ReadPhys>(&self, guest: &G, plan: &Plan) -> Result<Vec<Write>, Blocked> {
        publish::writes(self.kernel, guest, plan)
    }

    fn translate<G: ReadPhys>(&self, guest: &G, at: Gva) -> Result<Gpa, Blocked> {
        self.kernel.translate(guest, at).map_err(unreadable)
    }
}
