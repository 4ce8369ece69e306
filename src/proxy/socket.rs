//! A client's socket, and who looks from beside it whether the client is still there.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// The socket of a downstream connection. Whoever serves the connection has it to itself: the lock is never waited
/// for.
#[derive(Debug)]
pub(super) struct Socket(Arc<Mutex<TcpStream>>);

/// Sees a [`Socket`]'s end. hyper does not while it has bytes that it need not look at yet, a second request or
/// an empty line behind the first, and would send again for a client that has gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch(Option<Weak<Mutex<TcpStream>>>);

impl Socket {
    pub fn new(stream: TcpStream) -> Self {
        Self(Arc::new(Mutex::new(stream)))
    }

    pub fn watch(&self) -> Watch {
        Watch(Some(Arc::downgrade(&self.0)))
    }

    fn stream(&self) -> MutexGuard<'_, TcpStream> {
        lock(&self.0)
    }
}

fn lock(stream: &Mutex<TcpStream>) -> MutexGuard<'_, TcpStream> {
    // There is nothing in it that a panic could leave half done.
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Whether the client has closed the connection, or its half of it.
    pub fn is_gone(&self) -> bool {
        // In memory, hyper's word has to do.
        let Some(watched) = &self.0 else { return false };
        let Some(stream) = watched.upgrade() else { return true };
        let stream = lock(&stream);
        let ready = pin!(stream.ready(Interest::READABLE));
        match ready.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(ready)) => ready.is_read_closed(),
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A head alone, most often: the system call for one piece costs less.
        if let [all] = slices {
            return self.poll_write(cx, all);
        }
        Pin::new(&mut *self.stream()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_shutdown(cx)
    }
}
