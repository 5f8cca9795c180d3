//! A machine for the tests of the API: it answers as it is told, and says what it was asked.

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use patcher::apply::tune::SetChange;

use super::error::ApiError;
use super::machine::{Counted, Done, Machine};
use super::wire::{
    Arena, CallList, Calls, Dump, Kernel, Pause, Pauses, Report, Set, SetList, Stop, Time,
    TimeList, Update, UpdateState, Verification, Vm, VmState,
};
use crate::events::Events;
use crate::updates::{InsteadOf, Model, Order, Use};
use crate::views::{Asked, Seen, View, disasm, log, modules, stack, symbols, tasks, text, types};

/// The double. A package that starts with `refuse`, `late` or `panic` meets that end.
#[derive(Debug, Default)]
pub(crate) struct Double {
    events: Events,
    paused: AtomicBool,
    pub(crate) ended: AtomicBool,
    /// While this is true, nobody is told any counts.
    pub(crate) busy: Arc<AtomicBool>,
    updates: Mutex<Vec<Update>>,
}

impl Double {
    fn alive(&self) -> Result<(), ApiError> {
        if self.ended.load(Ordering::Relaxed) {
            let status = StatusCode::CONFLICT;
            return Err(ApiError::new(status, "guest_ended", "m", "c", "h"));
        }
        Ok(())
    }

    fn find(&self, id: u64) -> Result<Update, ApiError> {
        let updates = self.updates.lock().unwrap();
        let found = updates.iter().find(|update| update.id == id);
        found.cloned().ok_or_else(|| ApiError::no_update(id))
    }

    fn put(&self, update: &Update) {
        let mut updates = self.updates.lock().unwrap();
        updates.retain(|other| other.id != update.id);
        updates.push(update.clone());
    }
}

impl Machine for Double {
    fn events(&self) -> &Events {
        &self.events
    }

    fn vm(&self) -> Vm {
        let state = if self.paused.load(Ordering::Relaxed) {
            VmState::Paused
        } else {
            VmState::Running
        };
        Vm {
            state,
            end: None,
            vcpus: 2,
            memory_mib: 256,
            uptime_ms: 7,
            kernel: "bzImage".to_owned(),
            cmdline: "quiet".to_owned(),
            console: None,
            panic: None,
            pauses: Pauses {
                by_user: 1,
                by_exopatch: 2,
                total_us: 1_000_300,
                last: vec![Pause {
                    at_ms: 5,
                    pause_us: 300,
                }],
            },
        }
    }

    fn pause(&self, _: Duration) -> Result<Option<Stop>, ApiError> {
        self.alive()?;
        let changed = !self.paused.swap(true, Ordering::Relaxed);
        Ok(changed.then(Stop::default))
    }

    fn resume(&self) -> Result<bool, ApiError> {
        self.alive()?;
        Ok(self.paused.swap(false, Ordering::Relaxed))
    }

    fn power_button(&self) -> Result<bool, ApiError> {
        self.alive().map(|()| true)
    }

    fn kill(&self) -> Result<(), ApiError> {
        self.alive()
    }

    fn dump(&self, path: &Path, _: Duration) -> Result<Dump, ApiError> {
        Ok(Dump {
            path: path.display().to_string(),
            bytes: 1,
            pause_us: 1,
        })
    }

    fn kernel(&self, _: Instant, done: Done<Kernel>) -> Result<(), ApiError> {
        done(Ok(Kernel {
            file: "bzImage".to_owned(),
            build_id: "00ff".to_owned(),
            symbols: 1,
            running: None,
            not_running: Some("not yet".to_owned()),
            arena: arena(),
        }));
        Ok(())
    }

    fn view(&self, asked: Asked, _: Instant, done: Done<Seen<View>>) -> Result<(), ApiError> {
        let none = |code| Err(no_such(code));
        let answer = match asked {
            Asked::Stack(stack::Asked::Task(9)) => none("no_such_task"),
            Asked::Disasm(asked) if asked.position == Some(9) => none("no_such_position"),
            asked => Ok(Seen {
                paused_us: Some(3),
                view: view(asked),
            }),
        };
        done(answer);
        Ok(())
    }

    fn updates(&self) -> Vec<Update> {
        self.updates.lock().unwrap().clone()
    }

    fn apply(&self, apply: Order, done: Done<Update>) -> Result<Update, ApiError> {
        assert!(
            !apply.brings.package().starts_with(b"panic"),
            "told to panic"
        );
        assert!(apply.deadline > Instant::now());
        let queued = Update {
            id: u64::try_from(self.updates.lock().unwrap().len()).unwrap() + 1,
            name: apply.name,
            state: UpdateState::Queued,
            doing: None,
            check: apply.check,
            package_bytes: u64::try_from(apply.brings.package().len()).unwrap(),
            functions: Vec::new(),
            instead_of: match apply.instead_of {
                InsteadOf::These(these) => these,
                InsteadOf::All => Vec::new(),
            },
            model: None,
            rule: apply.how.rule.map(|rule| rule.to_string()),
            counted: apply.how.counted,
            editions: Vec::new(),
            hooks: Vec::new(),
            bound: None,
            submitted_at_ms: 1,
            changed_at_ms: 1,
            applied: None,
            reverted: None,
            error: None,
        };
        let refusal = |status, code| Err(ApiError::new(status, code, "m", "c", "h"));
        let end = if apply.brings.package().starts_with(b"refuse") {
            refusal(StatusCode::UNPROCESSABLE_ENTITY, "wrong_kernel")
        } else if apply.brings.package().starts_with(b"late") {
            refusal(StatusCode::GATEWAY_TIMEOUT, "not_quiescent")
        } else {
            Ok(Update {
                state: if apply.check {
                    UpdateState::Checked
                } else {
                    UpdateState::Applied
                },
                applied: Some(Report::default()),
                ..queued.clone()
            })
        };
        self.put(end.as_ref().unwrap_or(&queued));
        std::thread::spawn(move || done(end));
        Ok(queued)
    }

    fn reuse(&self, id: u64, how: Use, _: Instant, done: Done<Update>) -> Result<Update, ApiError> {
        let update = self.find(id)?;
        done(Ok(Update {
            rule: how.rule.map(|rule| rule.to_string()),
            counted: how.counted,
            ..update.clone()
        }));
        Ok(update)
    }

    fn force(&self, id: u64, _: Instant, done: Done<Update>) -> Result<Update, ApiError> {
        let update = self.find(id)?;
        done(Ok(update.clone()));
        Ok(update)
    }

    fn change_set(&self, name: String, change: SetChange, done: Done<Set>) -> Result<(), ApiError> {
        let len = u64::try_from(change.add.len().saturating_sub(change.remove.len())).unwrap();
        done(Ok(Set {
            name,
            len,
            keys: Vec::new(),
        }));
        Ok(())
    }

    fn drop_set(&self, name: String, done: Done<SetList>) -> Result<(), ApiError> {
        done(match name.as_str() {
            "none" => Err(no_such("no_such_set")),
            _ => Ok(SetList::default()),
        });
        Ok(())
    }

    fn sets(&self, done: Done<SetList>) -> Result<(), ApiError> {
        done(Ok(SetList::default()));
        Ok(())
    }

    fn set_time(&self, name: String, on: bool, done: Done<Time>) -> Result<(), ApiError> {
        done(Ok(Time { name, on }));
        Ok(())
    }

    fn drop_time(&self, name: String, done: Done<TimeList>) -> Result<(), ApiError> {
        done(match name.as_str() {
            "none" => Err(no_such("no_such_time")),
            _ => Ok(TimeList::default()),
        });
        Ok(())
    }

    fn times(&self, done: Done<TimeList>) -> Result<(), ApiError> {
        done(Ok(TimeList::default()));
        Ok(())
    }

    fn counted(&self, done: Done<Counted>) -> Result<(), ApiError> {
        self.alive()?;
        let calls = |update| Calls {
            function: "f".to_owned(),
            update,
            calls: 7,
        };
        let counted = Counted {
            calls: CallList {
                at_ms: 1,
                calls: vec![calls(None), calls(Some(1))],
            },
            arena: arena(),
        };
        let busy = Arc::clone(&self.busy);
        std::thread::spawn(move || {
            while busy.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            done(Ok(counted));
        });
        Ok(())
    }

    fn revert(
        &self,
        id: u64,
        _: Option<Model>,
        _: Instant,
        done: Done<Update>,
    ) -> Result<Update, ApiError> {
        let mut update = self.find(id)?;
        update.state = UpdateState::Reverting;
        let mut reverted = update.clone();
        reverted.state = UpdateState::Reverted;
        done(Ok(reverted));
        Ok(update)
    }

    fn verify(&self, id: u64, _: Instant, done: Done<Verification>) -> Result<(), ApiError> {
        self.find(id)?;
        done(Ok(Verification {
            id,
            intact: true,
            bytes: 5,
            differences: Vec::new(),
        }));
        Ok(())
    }
}

fn arena() -> Arena {
    Arena {
        guest_physical: "0x110000000".to_owned(),
        bytes: 3 << 21,
        used_bytes: 64,
    }
}

/// A view with as little in it as can be.
fn view(asked: Asked) -> View {
    match asked {
        Asked::Symbols(Some(symbols::Asked::Address(at))) => {
            View::Symbols(symbols::Symbols::At(symbols::SymbolAt {
                address: at.to_string(),
                symbol: "f".to_owned(),
                offset: 1,
                size: 2,
                module: None,
                cpu: None,
            }))
        }
        Asked::Symbols(of) => View::Symbols(symbols::Symbols::List(symbols::SymbolList {
            name: of.map(|of| of.to_string()),
            symbols: Vec::new(),
        })),
        Asked::Types(types::Asked { name, .. }) => {
            View::Types(types::Types::Layouts(types::TypeLayouts {
                name,
                layouts: Vec::new(),
            }))
        }
        Asked::Modules => View::Modules(modules::Modules {
            modules: Vec::new(),
        }),
        Asked::Tasks => View::Tasks(tasks::Tasks {
            tasks: Vec::new(),
            cpus: Vec::new(),
            unowned_stacks: Vec::new(),
        }),
        Asked::Log => View::Log(log::Log {
            records: Vec::new(),
            unwritten: Vec::new(),
            console_level: Some(7),
        }),
        Asked::Text(asked) => View::Text(text::Text {
            compared: u64::from(asked.each),
            causes: [].into(),
            differences: Vec::new(),
        }),
        Asked::Stack(_) | Asked::At(_) => View::Stack(stack::Stacks {
            stacks: Vec::new(),
            reliable: 0,
            unreliable: 0,
        }),
        Asked::Disasm(asked) => View::Disasm(disasm::Disassembly {
            function: asked.of.to_string(),
            module: None,
            address: "0x10".to_owned(),
            size: 0,
            asked: 0,
            instructions: Vec::new(),
            differences: Vec::new(),
            not_compared: None,
        }),
    }
}

/// There is nothing of that name.
fn no_such(code: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, code, "m", "c", "h")
}
