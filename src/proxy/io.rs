//! Connections that keep deadlines, and connections that remember who spoke last.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::time::Sleep;

use super::taker::Taker;

/// Whether an end has come that may have moved; a timer that comes before it is set again.
pub(super) fn is_over(
    mut timer: Pin<&mut Sleep>,
    cx: &mut Context<'_>,
    end: impl Fn() -> tokio::time::Instant,
) -> bool {
    while timer.as_mut().poll(cx).is_ready() {
        let end = end();
        if end <= timer.deadline() {
            return true;
        }
        timer.as_mut().reset(end);
    }
    false
}

/// What hyper does on an HTTP/1 connection, as far as it shows: told by the timer that it arms when, and only
/// when, one message is over and the head of the next is to come.
///
/// Atomic only so that it can be shared: one task looks at it.
#[derive(Debug)]
pub(crate) struct Head {
    /// How often it has begun to wait.
    begun: AtomicU32,
    waiting: AtomicBool,
    /// All that was written has been taken by the socket, which may have put it off.
    flushed: AtomicBool,
    /// The last read filled all the room that it was given.
    filled: AtomicBool,
    /// The status with which hyper refused a head.
    refused: AtomicU16,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            begun: AtomicU32::new(0),
            waiting: AtomicBool::new(false),
            flushed: AtomicBool::new(true),
            filled: AtomicBool::new(false),
            refused: AtomicU16::new(0),
        }
    }
}

impl Head {
    /// The next head is waited for, and nothing is left of what came before.
    pub fn waits(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) && self.flushed.load(Ordering::Relaxed)
    }

    /// How many heads were waited for so far.
    pub fn count(&self) -> u32 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether more has probably come than was read since this was asked last.
    pub fn has_more(&self) -> bool {
        self.filled.load(Ordering::Relaxed) && self.filled.swap(false, Ordering::Relaxed)
    }

    /// The status with which a head was refused.
    pub fn refused(&self) -> Option<StatusCode> {
        StatusCode::from_u16(self.refused.load(Ordering::Relaxed)).ok()
    }
}

/// hyper's timer for heads. It never fires: the deadline is kept by who looks at the [`Head`].
#[derive(Debug)]
pub(super) struct HeadTimer {
    head: Arc<Head>,
    any_moment: Instant,
}

impl HeadTimer {
    pub fn new(head: Arc<Head>) -> Self {
        Self { head, any_moment: Instant::now() }
    }
}

impl hyper::rt::Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.head.begun.fetch_add(1, Ordering::Relaxed);
        self.head.waiting.store(true, Ordering::Relaxed);
        Box::pin(Waiting(Arc::clone(&self.head)))
    }

    /// Asked for each head, for a deadline that nobody looks at.
    fn now(&self) -> Instant {
        self.any_moment
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep(Duration::ZERO)
    }
}

/// A wait for a head; dropped by hyper once it has one.
struct Waiting(Arc<Head>);

impl Future for Waiting {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

impl hyper::rt::Sleep for Waiting {}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.store(false, Ordering::Relaxed);
    }
}

/// A downstream connection in hyper's hands: some of it may have been read before, and the peer must take what is
/// written.
#[derive(Debug)]
pub(crate) struct Downstream<T> {
    inner: Take<T>,
    /// Read before, and to be read again.
    start: Bytes,
    taker: Taker,
    head: Arc<Head>,
    sparing: Option<Sparing>,
}

/// How many bytes of each message are read by [`SPARING`].
#[derive(Debug)]
struct Sparing {
    bytes: u64,
    /// Of the message that has this number by [`Head::count`], which begins with 1.
    left: u64,
    message: u32,
}

impl Sparing {
    /// The most to read next, in bytes.
    fn limit(&mut self, message: u32) -> u64 {
        if self.message != message {
            (self.message, self.left) = (message, self.bytes);
        }
        if self.left > 0 { SPARING } else { READ as u64 }
    }
}

impl<T: AsyncRead> Downstream<T> {
    pub fn new(inner: T, start: Bytes, write_limit: Duration, head: Arc<Head>) -> Self {
        let inner = inner.take(u64::MAX);
        Self { inner, start, taker: Taker::new(write_limit), head, sparing: None }
    }

    /// Has no more than [`READ`] read at once; and less of the first so many bytes of each message, or of [`SPARED`], which
    /// may wait for the rest of their body, on many connections at once, each with a buffer for what is read next.
    pub fn sparing(mut self, bytes: usize) -> Self {
        let bytes = bytes.min(SPARED) as u64;
        self.sparing = Some(Sparing { bytes, left: 0, message: 0 });
        self
    }

    /// Puts back what was read, to be read again.
    pub fn rewind(&mut self, start: Bytes) {
        self.start = start;
    }

    /// The connection itself.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }

    /// What hyper writes while it waits for a head, all else being said, is its answer to one that it could not
    /// read: a bare status. That is kept, and not sent.
    fn is_refusal(&self, bytes: &[u8]) -> bool {
        if !self.head.waits() {
            return false;
        }
        let status = bytes.get(9..12).and_then(|status| StatusCode::from_bytes(status).ok());
        if let Some(status) = status {
            self.head.refused.store(status.as_u16(), Ordering::Relaxed);
        }
        status.is_some()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Downstream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.start.is_empty() {
            let this = &mut *self;
            let limit = match &mut this.sparing {
                Some(sparing) => sparing.limit(this.head.count()),
                None => u64::MAX,
            };
            let room = limit.min(buffer.remaining() as u64);
            let before = buffer.filled().len();
            this.inner.set_limit(limit);
            let polled = Pin::new(&mut this.inner).poll_read(cx, buffer);
            let read = (buffer.filled().len() - before) as u64;
            if let Some(sparing) = &mut this.sparing {
                sparing.left = sparing.left.saturating_sub(read);
            }
            if read == room && read > 0 {
                this.head.filled.store(true, Ordering::Relaxed);
            }
            return polled;
        }
        let fits = self.start.len().min(buffer.remaining());
        buffer.put_slice(&self.start[..fits]);
        self.start.advance(fits);
        if self.start.is_empty() {
            // Even so it would hold all that it was.
            self.start = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Downstream<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_refusal(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        self.head.flushed.store(false, Ordering::Relaxed);
        let polled = Pin::new(self.inner.get_mut()).poll_write(cx, bytes);
        self.taker.guard(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.is_refusal(slices.first().map_or(&[], |slice| slice)) {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        self.head.flushed.store(false, Ordering::Relaxed);
        let polled = Pin::new(self.inner.get_mut()).poll_write_vectored(cx, slices);
        self.taker.guard(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(self.inner.get_mut()).poll_flush(cx);
        // Not for good: a socket that has put something off may find that the system takes no more.
        self.head.flushed.store(matches!(polled, Poll::Ready(Ok(()))), Ordering::Relaxed);
        self.taker.guard(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The answer is still to come.
        if self.head.refused().is_some() {
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(self.inner.get_mut()).poll_shutdown(cx);
        self.taker.guard(cx, polled)
    }
}

/// Whether anything was read of an upstream connection since the last request on it was begun.
#[derive(Debug, Clone, Default)]
pub(super) struct History(Arc<AtomicBool>);

impl History {
    /// A request begins, of which nothing is answered.
    pub fn begin(&self) {
        self.0.store(false, Ordering::Release);
    }

    pub fn is_answered(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn read(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The most that is read at once, in bytes. More of it is out of the caches before it is written: 100 MB came down with
/// 0.84 of HAProxy's throughput by up to 400 KiB, which is what hyper would read, 0.89 by 64 KiB and 1.0 by 32. Less takes
/// more CPU time for as much: down a tenth, up a third by 16 KiB.
pub(super) const READ: usize = 32 * 1024;

/// The most that is read at once of what may have to be kept, in bytes: hyper's buffer does not grow beyond half of
/// [`READ`] unless that was filled. A cache line less, since what is not aligned takes longer to copy: by a byte less, an
/// update of 200 KB took 4 % more CPU time.
const SPARING: u64 = READ as u64 / 2 - 64;

/// How much of a message is read by [`SPARING`] at most, in bytes. Who has sent more of what has to be kept holds as much of
/// `limits.max_buffered`, to which the larger buffers add a sixteenth at most, as `limits.max_head` is by default. By a quarter of it,
/// 500 slow bodies took 7 MB more, and an update of 200 KB 0 to 3 % less CPU time.
const SPARED: usize = 8 * READ;

/// An upstream connection that keeps its [`History`], and is read by [`READ`].
///
/// A server may answer before it has read a request to its end, and close: what is written then fails, though the answer is
/// there, and hyper would look for it no more. So the reader is told what failed, once nothing is left to be read.
#[derive(Debug)]
pub(super) struct Remembering<T> {
    inner: Take<T>,
    history: History,
    /// Why nothing can be written any more.
    broken: Option<io::Error>,
    taker: Taker,
}

impl<T: AsyncRead> Remembering<T> {
    /// One that may take nothing of what is written, and say nothing, for so long at most.
    pub fn new(inner: T, write_limit: Duration) -> Self {
        let (inner, history) = (inner.take(READ as u64), History::default());
        Self { inner, history, broken: None, taker: Taker::new(write_limit) }
    }

    pub fn history(&self) -> History {
        self.history.clone()
    }

    /// What became of a write: one that failed is as good as done, and so is whatever follows it.
    fn written<R>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<R>>,
        all: R,
    ) -> Poll<io::Result<R>> {
        match polled {
            Poll::Ready(Err(error)) => {
                self.broken = Some(error);
                self.taker.moved();
                Poll::Ready(Ok(all))
            }
            polled => self.taker.guard(cx, polled),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Remembering<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        self.inner.set_limit(READ as u64);
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if buffer.filled().len() > filled {
            self.history.read();
            // It may answer first, and at length.
            self.taker.moved();
        } else if matches!(polled, Poll::Ready(Ok(())))
            && let Some(error) = self.broken.take()
        {
            return Poll::Ready(Err(error));
        }
        polled
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Remembering<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.broken.is_some() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let polled = Pin::new(self.inner.get_mut()).poll_write(cx, bytes);
        self.written(cx, polled, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = || slices.iter().map(|slice| slice.len()).sum();
        if self.broken.is_some() {
            return Poll::Ready(Ok(all()));
        }
        let polled = Pin::new(self.inner.get_mut()).poll_write_vectored(cx, slices);
        self.written(cx, polled, all())
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken.is_some() {
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(self.inner.get_mut()).poll_flush(cx);
        self.written(cx, polled, ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(self.inner.get_mut()).poll_shutdown(cx);
        self.taker.guard(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// How much is read at once where there is `room` for so much.
    async fn read<T: AsyncRead + Unpin>(io: &mut Downstream<T>, room: usize) -> usize {
        let mut buffer = vec![0; room];
        io.read(&mut buffer).await.unwrap()
    }

    /// Regression: all that had come first was held for as long as there was the connection.
    #[tokio::test]
    async fn what_was_read_before_is_given_up_once_it_was_read_again() {
        let start = Bytes::from(vec![b'x'; 100]);
        let (held, head) = (start.clone(), Arc::new(Head::default()));
        let mut io = Downstream::new(tokio::io::empty(), start, Duration::MAX, head);
        assert_eq!(read(&mut io, 60).await, 60);
        assert!(!held.is_unique());
        assert_eq!(read(&mut io, 60).await, 40);
        assert!(held.is_unique());
    }

    #[tokio::test]
    async fn what_may_have_to_be_kept_of_each_message_never_fills_half_of_the_buffer() {
        for (sparing, times) in [(READ, 3), (8 * READ, 17), (1 << 20, 17)] {
            let (mut peer, stream) = tokio::io::duplex(1 << 20);
            peer.write_all(&[b'x'; 1 << 20]).await.unwrap();
            let head = Arc::new(Head::default());
            let timer = HeadTimer::new(Arc::clone(&head));
            let mut io = Downstream::new(stream, Bytes::new(), Duration::MAX, Arc::clone(&head))
                .sparing(sparing);
            for message in 0..3 {
                drop(hyper::rt::Timer::sleep(&timer, Duration::ZERO));
                for kept in 1..=times {
                    assert_eq!(read(&mut io, READ).await, READ / 2 - 64, "{message} {kept}");
                    assert!(head.has_more(), "others shall have their turn");
                }
                for room in [READ, 2 * READ] {
                    let much = read(&mut io, room).await;
                    assert_eq!(much, READ, "{message}: what is longer streams");
                    assert!(head.has_more());
                }
            }
            assert_eq!(read(&mut io, 100).await, 100, "there is no more room");
            assert!(head.has_more());
        }
    }
}
