//! What time it was.

use std::time::{Instant, SystemTime};

/// A moment by both clocks, from which it is told what time another was. Looked at once for many exchanges.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocks {
    time: SystemTime,
    instant: Instant,
}

impl Clocks {
    pub fn read() -> Self {
        Self { time: SystemTime::now(), instant: Instant::now() }
    }

    /// What time it was at an earlier moment.
    pub fn time_of(self, earlier: Instant) -> SystemTime {
        self.time.checked_sub(self.instant.saturating_duration_since(earlier)).unwrap_or(self.time)
    }
}
