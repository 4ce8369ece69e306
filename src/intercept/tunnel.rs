//! Blind tunnels: bytes pass unseen and untouched, either side may end its half first, and a tunnel
//! through which nothing passes is ended.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// What passed through a tunnel, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Bytes from the client.
    pub sent: u64,
    /// Bytes to the client.
    pub received: u64,
    pub end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides had said all.
    Closed,
    /// One side broke off.
    Broken,
    /// Nothing passed for as long as is allowed.
    Idle,
}

impl End {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Broken => "broken",
            Self::Idle => "idle",
        }
    }
}

/// Passes bytes both ways until both have ended, or nothing has moved for `idle`.
pub(crate) async fn relay<A, B>(client: A, mut server: B, idle: Duration) -> Passed
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let traffic = Traffic::new();
    let mut client = Watched { inner: client, traffic: &traffic };
    let end = tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut client, &mut server) => match copied {
            Ok(_) => End::Closed,
            Err(_) => End::Broken,
        },
        () = traffic.silence(idle) => End::Idle,
    };
    Passed {
        sent: traffic.sent.load(Ordering::Relaxed),
        received: traffic.received.load(Ordering::Relaxed),
        end,
    }
}

/// What has passed so far. Atomic only so that it can be shared: one task looks at it.
struct Traffic {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            last: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    fn moved(&self, counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Ends when nothing has moved for `limit`. One timer for all: it is not set anew with every byte.
    async fn silence(&self, limit: Duration) {
        loop {
            let last = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed));
            if last.elapsed() >= limit {
                return;
            }
            tokio::time::sleep_until(last + limit).await;
        }
    }
}

/// The client's side of a tunnel: what is read from it was sent, what is written to it received.
struct Watched<'t, T> {
    inner: T,
    traffic: &'t Traffic,
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        self.traffic.moved(&self.traffic.sent, buffer.filled().len() - filled);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<'_, T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.traffic.moved(&self.traffic.received, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A stream some of whose first bytes were read already.
#[derive(Debug)]
pub(crate) struct Rewound<T> {
    start: Bytes,
    inner: T,
}

impl<T> Rewound<T> {
    pub fn new(start: Bytes, inner: T) -> Self {
        Self { start, inner }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewound<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.start.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buffer);
        }
        let fits = self.start.len().min(buffer.remaining());
        buffer.put_slice(&self.start[..fits]);
        self.start.advance(fits);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewound<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const IDLE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn each_side_may_end_its_half_while_the_other_goes_on() {
        let (mut client, client_side) = duplex(8);
        let (server_side, mut server) = duplex(8);
        let relaying = tokio::spawn(relay(client_side, server_side, IDLE));
        client.write_all(b"question").await.expect("open");
        client.shutdown().await.expect("open");
        let mut question = String::new();
        server.read_to_string(&mut question).await.expect("it ends");
        assert_eq!(question, "question");
        server.write_all(b"a longer answer").await.expect("open");
        server.shutdown().await.expect("open");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("it ends");
        assert_eq!(answer, "a longer answer");
        let passed = relaying.await.expect("no panic");
        assert_eq!(passed, Passed { sent: 8, received: 15, end: End::Closed });
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_when_nothing_has_moved_for_the_limit_and_not_before() {
        let (mut client, client_side) = duplex(64);
        let (server_side, mut server) = duplex(64);
        let relaying = tokio::spawn(relay(client_side, server_side, IDLE));
        let started = Instant::now();
        for _ in 0..3 {
            tokio::time::sleep(IDLE - Duration::from_millis(1)).await;
            server.write_all(b".").await.expect("open");
            client.read_exact(&mut [0]).await.expect("open");
        }
        let passed = relaying.await.expect("no panic");
        assert_eq!(passed, Passed { sent: 0, received: 3, end: End::Idle });
        assert_eq!(started.elapsed().as_secs(), 4 * IDLE.as_secs() - 1);
    }

    #[tokio::test]
    async fn what_was_read_before_comes_first() {
        let (mut far, near) = duplex(64);
        far.write_all(b"world").await.expect("open");
        drop(far);
        let mut text = String::new();
        let mut rewound = Rewound::new(Bytes::from_static(b"hello "), near);
        rewound.read_to_string(&mut text).await.expect("it ends");
        assert_eq!(text, "hello world");
    }
}
