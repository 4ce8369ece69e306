//! Frames of many streams, gathered into few writes.
//!
//! HTTP/2's library writes each longer frame by itself. On a connection that many streams share, answers come in
//! handfuls: what its connection has written by the time that it has nothing more to do leaves at once.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The most that is gathered, in bytes. Then it is written, and waited for.
const MOST: usize = 64 * 1024;

/// A connection in hyper's hands, and in those of who writes for it.
pub(super) struct Gathering<T>(Arc<Mutex<Wire<T>>>);

struct Wire<T> {
    stream: T,
    /// To be written. Holds no memory while there is nothing, and never grows.
    gathered: BytesMut,
}

impl<T> Clone for Gathering<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Gathering<T> {
    pub fn new(stream: T) -> Self {
        Self(Arc::new(Mutex::new(Wire { stream, gathered: BytesMut::new() })))
    }
}

impl<T: AsyncWrite + Unpin> Gathering<T> {
    /// Drives what reads and writes here to its end. What it writes leaves whenever it has to wait.
    ///
    /// # Errors
    /// Its own, and those of writing.
    pub async fn drive<C, E>(
        &self,
        mut connection: Pin<&mut C>,
    ) -> Result<(), Box<dyn Error + Send + Sync>>
    where
        C: Future<Output = Result<(), E>>,
        E: Error + Send + Sync + 'static,
    {
        poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            if let Poll::Ready(Err(error)) = self.0.lock().poll_write_out(cx) {
                return Poll::Ready(Err(error.into()));
            }
            ended.map_err(Into::into)
        })
        .await
    }
}

impl<T: AsyncWrite + Unpin> Wire<T> {
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.gathered.has_remaining() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.gathered))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(written);
        }
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gathering<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().stream).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gathering<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut wire = self.0.lock();
        // What was taken off its start is no room.
        let room = |gathered: &BytesMut| gathered.capacity() - gathered.len();
        if room(&wire.gathered) == 0 {
            ready!(wire.poll_write_out(cx))?;
            wire.gathered.reserve(MOST);
        }
        let mut taken = 0;
        for slice in slices {
            let fits = slice.len().min(room(&wire.gathered));
            wire.gathered.extend_from_slice(&slice[..fits]);
            taken += fits;
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Asked for after each longer frame. It is done once there are no more: see [`Gathering::drive`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.lock();
        ready!(wire.poll_write_out(cx))?;
        Pin::new(&mut wire.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::proxy::io::Downstream;

    /// Takes so many bytes at once and so many in all, as long as it is open, and remembers what it was given.
    #[derive(Default)]
    struct Peer {
        is_shut: bool,
        at_once: usize,
        in_all: usize,
        written: Vec<Vec<u8>>,
    }

    impl AsyncWrite for Peer {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            assert!(!self.is_shut, "written after the end");
            let taken = bytes.len().min(self.at_once).min(self.in_all);
            if taken == 0 {
                return Poll::Pending;
            }
            self.in_all -= taken;
            self.written.push(bytes[..taken].to_vec());
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.is_shut = true;
            Poll::Ready(Ok(()))
        }
    }

    fn taking(at_once: usize, in_all: usize) -> Gathering<Peer> {
        Gathering::new(Peer { at_once, in_all, ..Peer::default() })
    }

    fn written(wire: &Gathering<Peer>) -> Vec<u8> {
        wire.0.lock().stream.written.concat()
    }

    /// Writes so many frames, each flushed, and then waits.
    async fn frames<T>(mut end: Gathering<T>, count: usize, frame: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin,
    {
        for _ in 0..count {
            let (head, rest) = frame.split_at(frame.len().min(9));
            let written = end.write_vectored(&[head, rest].map(io::IoSlice::new)).await?;
            end.write_all(&frame[written..]).await?;
            end.flush().await?;
        }
        std::future::pending().await
    }

    /// Polls it once.
    fn drive(wire: &Gathering<Peer>, connection: impl Future<Output = io::Result<()>>) {
        let mut connection = Box::pin(connection);
        let mut driven = Box::pin(wire.drive(connection.as_mut()));
        assert!(driven.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }

    #[test]
    fn all_that_is_written_before_a_connection_waits_leaves_at_once() {
        let wire = taking(usize::MAX, usize::MAX);
        drive(&wire, frames(wire.clone(), 8, b"a frame of some length".to_vec()));
        assert_eq!(wire.0.lock().stream.written, [b"a frame of some length".repeat(8)]);
        assert_eq!(wire.0.lock().gathered.capacity(), 0, "an idle connection holds memory");
    }

    #[test]
    fn a_peer_that_takes_little_at_once_gets_every_byte_in_order() {
        let wire = taking(5, usize::MAX);
        let frame: Vec<u8> = (0..=250).collect();
        drive(&wire, frames(wire.clone(), 600, frame.clone()));
        assert!(written(&wire) == frame.repeat(600));
    }

    #[test]
    fn no_more_is_gathered_for_a_slow_peer_than_there_is_room_for() {
        let wire = taking(1_000, 0);
        let frame: Vec<u8> = (0..=250).cycle().take(9_001).collect();
        let mut connection = Box::pin(frames(wire.clone(), 100, frame.clone()));
        let mut driven = Box::pin(wire.drive(connection.as_mut()));
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..2_000 {
            assert!(driven.as_mut().poll(&mut cx).is_pending());
            let mut held = wire.0.lock();
            assert!(held.gathered.capacity() <= MOST);
            held.stream.in_all = 777;
        }
        assert!(written(&wire) == frame.repeat(100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_for_too_long_is_given_up() {
        let limit = Duration::from_secs(60);
        let peer = tokio::io::join(tokio::io::empty(), Peer::default());
        let peer = Downstream::new(peer, Bytes::new(), limit, Arc::default());
        let wire = Gathering::new(peer);
        let mut connection = Box::pin(frames(wire.clone(), 1, vec![7; 5_000]));
        let begun = tokio::time::Instant::now();
        let ended = wire.drive(connection.as_mut()).await;
        assert_eq!(ended.expect_err("nothing was taken").to_string(), "the peer stopped reading");
        assert!(begun.elapsed() >= limit);
    }

    #[test]
    fn what_was_gathered_goes_before_the_end() {
        let wire = taking(1, usize::MAX);
        let mut end = wire.clone();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(Pin::new(&mut end).poll_write(&mut cx, b"GOAWAY"), Poll::Ready(Ok(6))));
        assert!(matches!(Pin::new(&mut end).poll_shutdown(&mut cx), Poll::Ready(Ok(()))));
        assert_eq!(written(&wire), b"GOAWAY");
        assert!(wire.0.lock().stream.is_shut);
    }
}
