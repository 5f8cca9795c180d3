//! Whether this machine can run guests: not only whether `/dev/kvm` opens, but whether a kernel would get anywhere.
//!
//! A KVM without hardware underneath (`kvm_pvm`) interprets every ring-0 instruction, a million a second, and knows not all of
//! them. It looks like any other KVM until a kernel runs, so a loop in ring 0 is timed.

use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::kvm::vcpu::Exit;
use crate::kvm::{Hypervisor, KvmError};
use crate::trial::{self, TrialError};

/// How one check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it must be.
    Good,
    /// Guests cannot run like this.
    Bad,
    /// Could not be found out, because something before it is bad.
    Unknown,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// All checks, and what follows from them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Guests run here.
    pub can_run: bool,
    /// The same as a sentence.
    pub verdict: &'static str,
    /// The checks, each building on those before.
    pub checks: Vec<Check>,
}

/// Instructions of the timed loop.
const INSTRUCTIONS: u32 = 1_000_000;
/// The loop takes under a millisecond on hardware and about two seconds when interpreted.
const INTERPRETED_ABOVE: Duration = Duration::from_millis(200);

const LAB: &str = "run guests in the software-emulated lab instead: scripts/lab exopatch run ...";

/// Examines this machine. The loop takes up to some seconds where ring 0 is interpreted.
#[must_use]
pub fn examine() -> Report {
    let mut checks = vec![processor()];
    let opened = Hypervisor::open();
    checks.push(device(&opened));
    match &opened {
        Ok(hypervisor) => {
            checks.push(limits(hypervisor));
            checks.push(ring0(hypervisor));
        }
        Err(_) => {
            for name in ["limits", "ring 0"] {
                checks.push(Check {
                    name,
                    outcome: Outcome::Unknown,
                    found: "not looked at: there is no usable KVM".to_owned(),
                    advice: None,
                });
            }
        }
    }
    // The processor's flag explains; the timed loop decides.
    let can_run = checks
        .iter()
        .skip(1)
        .all(|check| check.outcome == Outcome::Good);
    Report {
        can_run,
        verdict: if can_run {
            "This machine can run guests."
        } else {
            "This machine cannot run guests as it is. What to do:"
        },
        checks,
    }
}

/// Whether the processor says that it has hardware virtualization.
#[must_use]
pub fn has_hardware_virtualization() -> Option<&'static str> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let flags = text.lines().find(|line| line.starts_with("flags"))?;
    let mut words = flags.split_ascii_whitespace();
    words.find_map(|word| match word {
        "vmx" => Some("VMX"),
        "svm" => Some("SVM"),
        _ => None,
    })
}

fn processor() -> Check {
    let found = has_hardware_virtualization();
    Check {
        name: "processor",
        outcome: if found.is_some() {
            Outcome::Good
        } else {
            Outcome::Bad
        },
        found: match found {
            Some(name) => format!("has {name}"),
            None => "shows neither VMX nor SVM".to_owned(),
        },
        advice: found.is_none().then(|| {
            format!(
                "on a physical machine, enable virtualization in the firmware; in a virtual one, enable nested \
                 virtualization on its host; or {LAB}"
            )
        }),
    }
}

fn device(opened: &Result<Hypervisor, KvmError>) -> Check {
    let (outcome, found, advice) = match opened {
        Ok(_) => (
            Outcome::Good,
            "opens, and has all that is needed".to_owned(),
            None,
        ),
        Err(error) => {
            let text = error.to_string();
            let (found, advice) = match text.split_once("; ") {
                Some((found, advice)) => (found.to_owned(), Some(advice.to_owned())),
                None => (text, None),
            };
            (Outcome::Bad, found, advice)
        }
    };
    Check {
        name: "/dev/kvm",
        outcome,
        found,
        advice,
    }
}

fn limits(hypervisor: &Hypervisor) -> Check {
    let (outcome, found) = match hypervisor.limits() {
        Ok(limits) => (
            Outcome::Good,
            format!(
                "up to {} vCPUs, {} bits of physical address",
                limits.max_vcpus, limits.phys_bits
            ),
        ),
        Err(error) => (Outcome::Bad, error.to_string()),
    };
    Check {
        name: "limits",
        outcome,
        found,
        advice: None,
    }
}

fn ring0(hypervisor: &Hypervisor) -> Check {
    let (outcome, found, advice) = match time_ring0(hypervisor) {
        Ok(time) if time < INTERPRETED_ABOVE => (
            Outcome::Good,
            format!("a million instructions in {time:.1?}"),
            None,
        ),
        Ok(time) => (
            Outcome::Bad,
            format!("is interpreted: a million instructions took {time:.1?}"),
            Some(format!(
                "this KVM has no hardware underneath, and a kernel would not get through its own decompression; {LAB}"
            )),
        ),
        Err(error) => (
            Outcome::Bad,
            format!("does not run: {error}"),
            Some(LAB.to_owned()),
        ),
    };
    Check {
        name: "ring 0",
        outcome,
        found,
        advice,
    }
}

/// Times a loop at ring 0.
fn time_ring0(hypervisor: &Hypervisor) -> Result<Duration, TrialError> {
    /// Two instructions a turn.
    const TURNS: u32 = INSTRUCTIONS / 2;
    let mut code = vec![0xb9]; // mov ecx, TURNS
    code.extend(TURNS.to_le_bytes());
    code.extend([
        0x49, // dec ecx
        0x75, 0xfd, // jnz to the dec
        0xe6, 0x80, // out 0x80, al
    ]);
    let mut vcpu = trial::vcpu_before(hypervisor, &code)?;
    let start = Instant::now();
    loop {
        match vcpu.run()? {
            Exit::PortWrite(0x80, _) => return Ok(start.elapsed()),
            Exit::Interrupted => {}
            other => return Err(TrialError::Exit(format!("{other:?}"))),
        }
    }
}
