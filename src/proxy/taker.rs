//! Peers that must take what is written.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Sleep;

/// What a peer is waited for that must take what is written: one that stops reading would hold the connection, and what is
/// buffered for it, for ever.
#[derive(Debug)]
pub(super) struct Taker {
    limit: Duration,
    /// Armed only while it takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Taker {
    pub fn new(limit: Duration) -> Self {
        Self { limit, stalled: None }
    }

    /// The peer has moved: what it takes next is waited for anew.
    pub fn moved(&mut self) {
        self.stalled = None;
    }

    /// What becomes of a write: one that waits for too long fails.
    pub fn guard<R>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if polled.is_ready() {
            self.moved();
            return polled;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer stopped reading")))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::io::Remembering;
    use super::*;

    /// Regression: of an API that answered before it had read an upload, and read no more, each connection was kept for ever.
    #[tokio::test(start_paused = true)]
    async fn an_api_that_takes_nothing_of_what_is_written_and_says_nothing_is_given_up() {
        const LIMIT: Duration = Duration::from_secs(60);
        let (near, mut far) = tokio::io::duplex(16);
        let mut io = Remembering::new(near, LIMIT);
        // To be slow is no fault.
        for _ in 0..4 {
            let reading = async {
                tokio::time::sleep(LIMIT - Duration::from_secs(1)).await;
                far.read_exact(&mut [0; 32]).await
            };
            let (written, read) = tokio::join!(io.write_all(&[b'x'; 32]), reading);
            assert!(written.is_ok() && read.is_ok());
        }
        // Nor is it to say something first.
        let reading = async {
            for _ in 0..4 {
                tokio::time::sleep(LIMIT - Duration::from_secs(1)).await;
                far.write_all(b"x").await?;
            }
            far.read_exact(&mut [0; 32]).await
        };
        let (mut answer, mut upload) = tokio::io::split(&mut io);
        let mut said = [0; 4];
        let all = (upload.write_all(&[b'x'; 32]), answer.read_exact(&mut said), reading);
        let (written, heard, read) = tokio::join!(all.0, all.1, all.2);
        assert!(written.is_ok() && heard.is_ok() && read.is_ok());
        let begun = tokio::time::Instant::now();
        let failed = io.write_all(&[b'x'; 17]).await.unwrap_err();
        assert_eq!((failed.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, LIMIT));
    }
}
