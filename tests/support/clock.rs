//! Time that passes only when a test says so.

use std::sync::mpsc;
use std::time::Duration;

/// tokio's clock, held. A paused clock alone jumps ahead whenever the runtime waits for a socket; a
/// blocking task under way keeps it from that.
pub struct Clock {
    _release: mpsc::Sender<()>,
}

impl Clock {
    /// Holds the clock of this runtime, which must have one thread, until dropped.
    pub fn hold() -> Self {
        tokio::time::pause();
        let (release, released) = mpsc::channel();
        tokio::task::spawn_blocking(move || released.recv().is_err());
        Self { _release: release }
    }

    /// Lets time pass, by a second at a time, until this is done, which it must be within a hundred hours.
    pub async fn until<T>(&self, done: impl Future<Output = T>) -> T {
        let mut done = std::pin::pin!(done);
        let begun = tokio::time::Instant::now();
        loop {
            assert!(begun.elapsed() < Duration::from_secs(360_000), "it has no deadline");
            tokio::select! {
                biased;
                done = &mut done => return done,
                () = self.advance(Duration::from_secs(1)) => {}
            }
        }
    }

    pub async fn advance(&self, by: Duration) {
        tokio::time::advance(by).await;
    }
}

/// Lets all that has something to do do it.
pub async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}
