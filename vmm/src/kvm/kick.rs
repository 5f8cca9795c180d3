//! Getting a vCPU out of the guest from another thread, without a kick ever being lost.
//!
//! A signal alone can land between a thread's last look at what is wanted and its `KVM_RUN`, and is then lost. So the
//! kicker first sets `immediate_exit` through a second mapping of the vCPU's `kvm_run` page: whichever side of `KVM_RUN`
//! the signal lands on, the call returns with `EINTR` (Linux Documentation/virt/kvm/api.rst, section 5, `immediate_exit`).
#![expect(
    unsafe_code,
    reason = "a second mapping of kvm_run, written by atomics"
)]

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::KvmError;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick signal interrupt system calls instead of ending the process. Once per process is enough, more is harmless.
///
/// # Errors
/// When the handler could not be installed.
pub fn install_handler() -> Result<(), KvmError> {
    register_signal_handler(SIGRTMIN(), nothing).map_err(|errno| KvmError::Call {
        call: "sigaction",
        cause: io::Error::from_raw_os_error(errno.errno()),
    })
}

/// The controller's handle on one vCPU.
#[derive(Debug)]
pub struct Kicker {
    run: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping is process-wide, and all access to it is atomic.
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Kicker {
    /// Maps the vCPU's `kvm_run` page a second time. `size` is what KVM says the mapping has.
    pub(super) fn new(vcpu: &VcpuFd, size: usize) -> Result<Self, KvmError> {
        // SAFETY: a new mapping of the vCPU's own shared page, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        let mapped =
            NonNull::new(at).filter(|_| at != libc::MAP_FAILED && size >= size_of::<kvm_run>());
        match mapped {
            Some(run) => Ok(Self {
                run: run.cast(),
                size,
            }),
            None => Err(KvmError::Call {
                call: "mmap of a vCPU",
                cause: io::Error::last_os_error(),
            }),
        }
    }

    /// Makes the vCPU's current or next `KVM_RUN` return at once, with the registers of `sync` in its page.
    pub fn interrupt(&self, sync: u64) {
        let run = self.run.as_ptr();
        // SAFETY: the page stays mapped while `self` lives, is large enough for `kvm_run` (checked when it was mapped), and
        // both fields are naturally aligned; this mapping's bytes are only ever accessed atomically.
        let (valid, exit) = unsafe {
            (
                AtomicU64::from_ptr(&raw mut (*run).kvm_valid_regs),
                AtomicU8::from_ptr(&raw mut (*run).immediate_exit),
            )
        };
        valid.store(sync, Ordering::SeqCst);
        exit.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        unsafe {
            libc::munmap(self.run.as_ptr().cast(), self.size);
        }
    }
}

/// Interrupts whatever system call `thread` is in. A thread that has ended already needs no signal.
pub fn signal<T>(thread: &JoinHandle<T>) {
    if thread.is_finished() {
        return;
    }
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::warn!(%error, "a vCPU thread could not be signalled");
    }
}
