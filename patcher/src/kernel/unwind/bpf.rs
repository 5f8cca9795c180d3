//! How to unwind in code that BPF made: by what each instruction of it does, followed from the first.
//!
//! A program or trampoline makes a frame by the frame pointer at once and drops it when it returns; a dispatcher has none. Which holds
//! where is proved on the code itself ([`crate::x86::frames`]), as the guest has it now: parts of it are patched as long as it is used.
//! A tail call leaves its frame to the program that it jumps to, behind the place where that would make one.
//! Source: kernel `arch/x86/net/bpf_jit_comp.c`.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::reason::Reason;
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::kernel::bpf::{Bpf, BpfCode, BpfKind};
use crate::kernel::locate::Kernel;
use crate::kernel::memory::Memory;
use crate::kernel::orc::{Base, Content, FramePointer, Orc};
use crate::x86::frames::{Caller, Frames, Unclear};

/// Bytes of the largest piece of code that is followed: to do that takes time while the guest stands still.
const MAX_FOLLOWED: u64 = 256 << 10;

type Followed = Rc<Result<Frames, Unclear>>;

/// The BPF code of one guest, while it stands still: read when a stack first leads there.
pub(crate) struct BpfFrames<'a, R: ?Sized> {
    kernel: &'a Kernel,
    memory: &'a Memory<'a, R>,
    code: OnceCell<Bpf>,
    /// What was followed, by where it begins.
    followed: RefCell<HashMap<Gva, Followed>>,
}

impl<'a, R: ReadPhys + ?Sized> BpfFrames<'a, R> {
    pub(crate) fn new(kernel: &'a Kernel, memory: &'a Memory<'a, R>) -> Self {
        Self {
            kernel,
            memory,
            code: OnceCell::new(),
            followed: RefCell::default(),
        }
    }

    /// How to find the caller of code at `at`; `None` where BPF has none.
    pub(crate) fn rule(&self, at: Gva) -> Result<Option<Orc>, Reason> {
        let Some(piece) = self.code()?.at(at) else {
            return Ok(None);
        };
        let mut unclear = None;
        for start in begins(piece) {
            let end = piece.range.end;
            let followed = self.follow(start, end)?;
            match (&*followed, at.offset_from(start)) {
                (Ok(frames), Some(offset)) => {
                    if let Some(caller) = frames.at(offset) {
                        return Ok(Some(rule(caller)));
                    }
                }
                (Err(Unclear { offset }), _) => {
                    unclear = Some(Gva(start.0.wrapping_add(*offset)));
                }
                (Ok(_), None) => {}
            }
        }
        Err(Reason::Unclear {
            at,
            start: piece.range.start,
            place: unclear.unwrap_or(at),
        })
    }

    fn code(&self) -> Result<&Bpf, Reason> {
        if let Some(code) = self.code.get() {
            return Ok(code);
        }
        let read = Bpf::read_from(self.kernel, self.memory).map_err(Reason::unreadable)?;
        Ok(self.code.get_or_init(|| read))
    }

    /// Goes through the code from `start`, at most to `end`.
    fn follow(&self, start: Gva, end: Gva) -> Result<Followed, Reason> {
        if let Some(known) = self.followed.borrow().get(&start) {
            return Ok(Rc::clone(known));
        }
        let len = end.0.saturating_sub(start.0);
        let followed = if len > MAX_FOLLOWED {
            Err(Unclear { offset: 0 })
        } else {
            let mut code = vec![0; usize::try_from(len).unwrap_or(0)];
            self.memory
                .read(start, &mut code)
                .map_err(Reason::unreadable)?;
            Frames::follow(&code)
        };
        let followed = Rc::new(followed);
        self.followed
            .borrow_mut()
            .insert(start, Rc::clone(&followed));
        Ok(followed)
    }
}

/// Where code may be entered: a dispatcher is written to one half of its memory while the other is in use.
fn begins(piece: &BpfCode) -> impl Iterator<Item = Gva> {
    let start = piece.range.start;
    let half = (piece.range.end.0 - start.0) / 2;
    let second = (piece.kind == BpfKind::Dispatcher).then_some(Gva(start.0 + half));
    [start].into_iter().chain(second)
}

fn rule(caller: Caller) -> Orc {
    match caller {
        Caller::Above(depth) => {
            i16::try_from(depth).map_or(Orc::Undefined, |by| Orc::ENTERED.lower(by))
        }
        Caller::Dropped => Orc::ENTERED,
        Caller::ByFramePointer => Orc::Caller {
            base: Base::Bp,
            offset: 16,
            bp: FramePointer::FromCallerSp(-16),
            content: Content::Call,
            signal: false,
        },
    }
}
