//! Connections that keep deadlines, and connections that remember who spoke last.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// A downstream connection with the deadlines that hyper does not keep.
///
/// * The peer must take what is written: a reader that stops would otherwise hold the connection, and
///   what is buffered for it, for ever.
/// * The peer must say which protocol it speaks: hyper-util waits for that without a limit.
#[derive(Debug)]
pub(super) struct Deadlines<T> {
    inner: T,
    write_limit: Duration,
    /// Armed only while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Until the first bytes tell HTTP/1 from HTTP/2; then the protocol's own deadlines hold.
    undecided: Option<Undecided>,
    /// Cancelled by the first byte that comes.
    spoke: CancellationToken,
}

#[derive(Debug)]
struct Undecided {
    deadline: Pin<Box<Sleep>>,
    /// How much of HTTP/2's preface has come.
    matched: usize,
}

/// RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl<T> Deadlines<T> {
    pub fn new(inner: T, first_bytes: Duration, write_limit: Duration) -> Self {
        let deadline = Box::pin(tokio::time::sleep(first_bytes));
        let undecided = Some(Undecided { deadline, matched: 0 });
        Self { inner, write_limit, stalled: None, undecided, spoke: CancellationToken::new() }
    }

    /// Becomes cancelled once the peer has said something.
    pub fn spoke(&self) -> CancellationToken {
        self.spoke.clone()
    }

    /// The connection itself.
    pub fn into_inner(self) -> T {
        self.inner
    }

    fn guard<R>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if polled.is_ready() {
            self.stalled = None;
            return polled;
        }
        let limit = self.write_limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer stopped reading")))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Deadlines<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let filled = buffer.filled().len();
        let polled = Pin::new(&mut this.inner).poll_read(cx, buffer);
        let Some(undecided) = &mut this.undecided else { return polled };
        if polled.is_pending() {
            ready!(undecided.deadline.as_mut().poll(cx));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no request came")));
        }
        let read = &buffer.filled()[filled..];
        if !read.is_empty() {
            this.spoke.cancel();
        }
        let is_preface = PREFACE[undecided.matched..].starts_with(read) && !read.is_empty();
        undecided.matched += read.len();
        if !is_preface || undecided.matched == PREFACE.len() {
            this.undecided = None;
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Deadlines<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.guard(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.guard(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.guard(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.guard(cx, polled)
    }
}

/// What is known of an upstream connection when a request on it fails.
#[derive(Debug, Clone, Default)]
pub(super) struct History(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    /// Requests that were begun on this connection.
    requests: AtomicU32,
    /// Something was read since the last of them was begun.
    answered: AtomicBool,
}

impl Default for Counts {
    fn default() -> Self {
        // As if an answer had just ended: the next write begins a request.
        Self { requests: AtomicU32::new(0), answered: AtomicBool::new(true) }
    }
}

impl History {
    /// The connection had been used before, and the last request on it got not a byte of an answer:
    /// the upstream had closed it while it was idle, and never saw that request.
    pub fn was_stale(&self) -> bool {
        self.0.requests.load(Ordering::Acquire) > 1 && !self.0.answered.load(Ordering::Acquire)
    }

    fn wrote(&self) {
        if self.0.answered.swap(false, Ordering::AcqRel) {
            self.0.requests.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn read(&self) {
        self.0.answered.store(true, Ordering::Release);
    }
}

/// An upstream connection that keeps its [`History`].
#[derive(Debug)]
pub(super) struct Remembering<T> {
    inner: T,
    history: History,
}

impl<T> Remembering<T> {
    pub fn new(inner: T) -> Self {
        Self { inner, history: History::default() }
    }
}

impl<T: Connection> Connection for Remembering<T> {
    fn connected(&self) -> Connected {
        self.inner.connected().extra(self.history.clone())
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Remembering<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if buffer.filled().len() > filled {
            self.history.read();
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Remembering<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.history.wrote();
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.history.wrote();
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
