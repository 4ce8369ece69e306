//! A socket whose small writes wait for the end of a turn, and who looks from beside it whether the client is still
//! there.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};

use hyper_util::client::legacy::connect::{Connected, Connection};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::turn::{Outlet, count_read, put_off};

/// A socket that puts writes off.
#[derive(Debug)]
pub(super) struct Socket(Arc<Mutex<Outlet>>);

impl Socket {
    pub fn new(stream: TcpStream) -> Self {
        Self(Arc::new(Mutex::new(Outlet::new(stream))))
    }

    pub fn watch(&self) -> Watch {
        Watch(Some(Arc::downgrade(&self.0)))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.lock().close();
    }
}

/// Sees a [`Socket`]'s end. hyper does not while it has bytes that it need not look at yet, a second request or
/// an empty line behind the first, and would send again for a client that has gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch(Option<Weak<Mutex<Outlet>>>);

impl Watch {
    /// Whether the client has closed the connection, or its half of it.
    pub fn is_gone(&self) -> bool {
        // In memory, hyper's word has to do.
        let Some(watched) = &self.0 else { return false };
        let Some(socket) = watched.upgrade() else { return true };
        let outlet = socket.lock();
        let ready = pin!(outlet.stream.ready(Interest::READABLE));
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
        count_read();
        let (mut outlet, before) = (self.0.lock(), buffer.filled().len());
        let polled = Pin::new(&mut outlet.stream).poll_read(cx, buffer);
        if matches!(polled, Poll::Ready(Ok(()))) && buffer.filled().len() == before {
            // Not the end, if what was written was told otherwise.
            outlet.failed()?;
        }
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(all) = put_off(&self.0, slices) {
            return Poll::Ready(Ok(all));
        }
        let mut outlet = self.0.lock();
        ready!(outlet.poll_written(&self.0, cx))?;
        let stream = Pin::new(&mut outlet.stream);
        match slices {
            // The system call for one piece costs less.
            [all] => stream.poll_write(cx, all),
            _ => stream.poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Ready as soon as it is put off; [`Self::poll_shutdown`] is once it is written.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outlet = self.0.lock();
        if outlet.is_put_off() {
            return Poll::Ready(Ok(()));
        }
        outlet.poll_written(&self.0, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outlet = self.0.lock();
        ready!(outlet.poll_written(&self.0, cx))?;
        Pin::new(&mut outlet.stream).poll_shutdown(cx)
    }
}

impl Connection for Socket {
    fn connected(&self) -> Connected {
        self.0.lock().stream.connected()
    }
}

#[cfg(test)]
mod tests;
