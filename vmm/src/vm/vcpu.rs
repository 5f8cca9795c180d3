//! What a vCPU's thread does all its life.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use patcher::addr::Gva;

use super::Inner;
use super::breakpoint::Walk;
use super::rendezvous::Wanted;
use crate::devices::bus::Request;
use crate::end::EndReason;
use crate::kvm::KvmError;
use crate::kvm::vcpu::breakpoint::DebugException;
use crate::kvm::vcpu::{Exit, VcpuHandle};

/// Runs vCPU `index` until the machine ends.
pub(super) fn thread(inner: &Arc<Inner>, mut vcpu: VcpuHandle, index: usize) {
    let life = catch_unwind(AssertUnwindSafe(|| live(inner, &mut vcpu, index)));
    match life {
        Ok(Ok(())) => {}
        Ok(Err(error)) => inner.end(EndReason::Error(format!("vCPU {index}: {error}"))),
        Err(_) => inner.end(EndReason::Error(format!(
            "the thread of vCPU {index} panicked; see the log"
        ))),
    }
    // The vCPU goes before the machine is said to be over.
    drop(vcpu);
    if inner.rendezvous.leave() {
        inner.complete();
    }
}

fn live(inner: &Inner, vcpu: &mut VcpuHandle, index: usize) -> Result<(), KvmError> {
    let runs = || inner.rendezvous.wanted() == Wanted::Run;
    loop {
        match inner.rendezvous.wanted() {
            Wanted::Run => {
                inner.breakpoint.wait_while_held(index, runs);
                if !runs() {
                    continue;
                }
                if !vcpu.set_breakpoint(inner.breakpoint.wanted())? {
                    inner.breakpoint.in_use(index);
                }
                match vcpu.run()? {
                    Exit::Debug(exception) => debugged(inner, vcpu, exception, index)?,
                    exit => serve(inner, exit, index),
                }
                // A kick that came too late for the stop it was meant for would make every run return at once.
                if runs() && vcpu.is_kicked() {
                    vcpu.clear_kick();
                }
            }
            Wanted::Stop => stand_still(inner, vcpu, index)?,
            Wanted::Exit => return Ok(()),
        }
    }
}

/// Finishes what the last exit began, tells where the vCPU is, and waits.
fn stand_still(inner: &Inner, vcpu: &mut VcpuHandle, index: usize) -> Result<(), KvmError> {
    while let Some(exit) = vcpu.settle()? {
        match exit {
            Exit::Debug(exception) => debugged(inner, vcpu, exception, index)?,
            exit => serve(inner, exit, index),
        }
    }
    let left = inner.rendezvous.park(index, vcpu.stopped()?);
    if left.tell_clock && inner.rendezvous.wanted() == Wanted::Run {
        vcpu.clock_stood_still()?;
    }
    vcpu.clear_kick();
    Ok(())
}

/// Serves a debug exception: a vCPU that came to the breakpoint is held before it.
fn debugged(
    inner: &Inner,
    vcpu: &mut VcpuHandle,
    exception: DebugException,
    index: usize,
) -> Result<(), KvmError> {
    if vcpu.debugged(exception)? {
        if let Some(steps) = inner.breakpoint.walk() {
            let path = walk(inner, vcpu, exception.at, steps, index)?;
            inner.breakpoint.walked(path);
        }
        inner.breakpoint.came(index, exception.at);
        // It may have set some since, that did not work.
        if vcpu.guest_has_breakpoints()? {
            inner.breakpoint.in_use(index);
        }
    }
    Ok(())
}

/// Has a vCPU that is at `at` make a walk, unless the guest is to stand still; gives where it was before each step, and where it is then.
fn walk(
    inner: &Inner,
    vcpu: &mut VcpuHandle,
    at: Gva,
    steps: Walk,
    index: usize,
) -> Result<Vec<Gva>, KvmError> {
    let mut path = vec![at];
    vcpu.begin_steps()?;
    while path.len() <= steps.most
        && path.last() != Some(&steps.to)
        && inner.rendezvous.wanted() == Wanted::Run
    {
        match vcpu.run()? {
            Exit::Debug(exception) => path.push(exception.at),
            Exit::Interrupted => vcpu.clear_kick(),
            exit => serve(inner, exit, index),
        }
    }
    vcpu.end_steps()?;
    Ok(path)
}

/// Serves an exit from the guest.
fn serve(inner: &Inner, exit: Exit<'_>, index: usize) {
    let request = match exit {
        Exit::Interrupted | Exit::Debug(_) => None,
        Exit::PortWrite(port, data) => inner.devices.ports.write(port.into(), data),
        Exit::PortRead(port, data) => {
            inner.devices.ports.read(port.into(), data);
            None
        }
        Exit::MemoryWrite(at, data) => inner.devices.memory.write(at, data),
        Exit::MemoryRead(at, data) => {
            inner.devices.memory.read(at, data);
            None
        }
        Exit::EndOfInterrupt(vector) => {
            inner.devices.end_of_interrupt(vector);
            None
        }
        Exit::Shutdown => {
            inner.end(EndReason::TripleFault);
            None
        }
        Exit::Broken(what) => {
            inner.end(EndReason::Error(format!("vCPU {index}: {what}")));
            None
        }
    };
    match request {
        None => {}
        Some(Request::PowerOff) => inner.end(EndReason::PowerOff),
        Some(Request::Reset) => inner.end(EndReason::Reset),
        Some(Request::Panicked(line)) => inner.panicked(line),
        Some(Request::Dead) => inner.end(EndReason::Panic("no reason was seen".to_owned())),
    }
}
