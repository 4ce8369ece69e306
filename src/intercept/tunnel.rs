//! Blind tunnels: bytes pass unseen and untouched, either side may end its half first, and a tunnel
//! through which nothing passes is ended.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::{InspectReader, InspectWriter};

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides had said all.
    Closed,
    /// One side broke off.
    Broken,
    /// Nothing passed for as long as is allowed.
    Idle,
    /// The proxy did not wait any longer.
    Cut,
}

impl End {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Broken => "broken",
            Self::Idle => "idle",
            Self::Cut => "cut",
        }
    }
}

/// Passes bytes both ways until both have ended, or nothing has moved for `idle`. Counts them in `traffic`.
pub(crate) async fn relay<A, B>(client: A, mut server: B, idle: Duration, traffic: &Traffic) -> End
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let sent = InspectReader::new(client, |bytes| Traffic::count(&traffic.sent, bytes));
    let mut client = InspectWriter::new(sent, |bytes| Traffic::count(&traffic.received, bytes));
    tokio::select! {
        copied = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER) => match copied {
            Ok(_) => End::Closed,
            Err(_) => End::Broken,
        },
        () = traffic.silence(idle) => End::Idle,
    }
}

/// What a tunnel keeps for each direction, in bytes: two of them are most of its memory.
const BUFFER: usize = 16 * 1024;

/// What has passed so far. Atomic only so that it can be shared: one task looks at it.
#[derive(Default)]
pub(crate) struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    /// Bytes from the client.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes to the client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn count(passed: &AtomicU64, bytes: &[u8]) {
        passed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    fn total(&self) -> u64 {
        self.sent() + self.received()
    }

    /// Ends when nothing has moved for `limit`, or up to an eighth longer: it looks now and then, so that
    /// no byte has to look at the clock.
    async fn silence(&self, limit: Duration) {
        let (mut seen, mut looks) = (self.total(), 0);
        while looks < LOOKS {
            tokio::time::sleep(limit / LOOKS).await;
            let total = self.total();
            looks = if total == seen { looks + 1 } else { 0 };
            seen = total;
        }
    }
}

/// How often a tunnel is looked at in the time that it may be silent.
const LOOKS: u32 = 8;

/// A stream some of whose first bytes were read already.
#[derive(Debug)]
pub(crate) struct Rewound<T> {
    start: Bytes,
    inner: T,
}

impl<T> Rewound<T> {
    pub fn new(start: Bytes, inner: T) -> Self {
        // Empty, it would still keep the buffer that it is of.
        let start = if start.is_empty() { Bytes::new() } else { start };
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
        if self.start.is_empty() {
            self.start = Bytes::new();
        }
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

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const IDLE: Duration = Duration::from_secs(60);

    /// Relays, and tells what was sent and received, and how it ended.
    async fn relayed(client: DuplexStream, server: DuplexStream) -> (u64, u64, End) {
        let traffic = Traffic::default();
        let end = relay(client, server, IDLE, &traffic).await;
        (traffic.sent(), traffic.received(), end)
    }

    #[tokio::test(start_paused = true)]
    async fn each_side_may_end_its_half_while_the_other_goes_on() {
        let (mut client, client_side) = duplex(8);
        let (server_side, mut server) = duplex(8);
        let relaying = tokio::spawn(relayed(client_side, server_side));
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
        assert_eq!(passed, (8, 15, End::Closed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_when_nothing_has_moved_for_the_limit_and_not_before() {
        for moves in 0..9 {
            let (mut client, client_side) = duplex(64);
            let (server_side, mut server) = duplex(64);
            let relaying = tokio::spawn(relayed(client_side, server_side));
            for _ in 0..moves {
                tokio::time::sleep(IDLE * 59 / 60).await;
                server.write_all(b".").await.expect("open");
                client.read_exact(&mut [0]).await.expect("open");
            }
            let quiet = tokio::time::Instant::now();
            let passed = relaying.await.expect("no panic");
            assert_eq!(passed, (0, moves, End::Idle));
            let quiet = quiet.elapsed();
            assert!(quiet >= IDLE && quiet < IDLE * 9 / 8, "{quiet:?} after {moves} moves");
        }
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

    /// Regression: of a handshake that fails, the client got no alert, since TLS has one write for both.
    #[tokio::test]
    async fn pieces_are_written_at_once() {
        let mut rewound = Rewound::new(Bytes::new(), Vec::new());
        assert!(rewound.is_write_vectored());
        let pieces = [IoSlice::new(b"hello, "), IoSlice::new(b"alert")];
        assert_eq!(rewound.write_vectored(&pieces).await.expect("memory"), 12);
    }

    /// Regression: a tunnel kept the whole head of its CONNECT for as long as it lasted.
    #[tokio::test]
    async fn what_was_read_is_not_kept() {
        let head = Bytes::from(vec![b'x'; 100]);
        let empty = Rewound::new(head.slice(100..), tokio::io::empty());
        assert!(head.is_unique());
        drop(empty);
        let mut read = Rewound::new(head.slice(99..), tokio::io::empty());
        assert!(!head.is_unique());
        read.read_exact(&mut [0]).await.expect("one byte");
        assert!(head.is_unique());
    }
}
