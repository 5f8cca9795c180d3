//! A timer that rings once, as something that an event loop can wait for.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// The timer; clones are the same timer.
#[derive(Clone, Debug)]
pub struct Alarm(Arc<OwnedFd>);

impl Alarm {
    /// A timer that is not set.
    ///
    /// # Errors
    /// What the system said.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Makes it ring `after` from now, instead of whenever it was to ring.
    pub fn set(&self, after: Duration) {
        let zero = Timespec::default();
        let spec = Itimerspec {
            it_interval: zero,
            it_value: Timespec::try_from(after).unwrap_or(zero),
        };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec) {
            tracing::warn!(%error, "a timer could not be set");
        }
    }

    /// Whether it has rung since it was last asked.
    #[must_use]
    pub fn has_rung(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Alarm;

    #[test]
    fn it_rings_once() {
        let alarm = Alarm::new().expect("an alarm");
        assert!(!alarm.has_rung());
        alarm.set(Duration::from_millis(1));
        let deadline = Instant::now() + Duration::from_secs(9);
        while !alarm.has_rung() {
            assert!(Instant::now() < deadline, "it never rang");
            std::thread::yield_now();
        }
        assert!(!alarm.has_rung());
    }
}
