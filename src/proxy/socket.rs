//! A socket whose small writes wait for the end of a turn, and who looks from beside it whether the client is still
//! there.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker, ready};

use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::turn::{Outlet, lock, put_off, read};

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
        lock(&self.0).close();
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
        let outlet = lock(&socket);
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
        read();
        Pin::new(&mut lock(&self.0).stream).poll_read(cx, buffer)
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
        let mut outlet = lock(&self.0);
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

    /// Ready as soon as somebody is sure to write it.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outlet = lock(&self.0);
        if outlet.is_put_off() {
            return Poll::Ready(Ok(()));
        }
        outlet.poll_written(&self.0, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outlet = lock(&self.0);
        ready!(outlet.poll_written(&self.0, cx))?;
        Pin::new(&mut outlet.stream).poll_shutdown(cx)
    }
}

impl Connection for Socket {
    fn connected(&self) -> Connected {
        lock(&self.0).stream.connected()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::super::turn::{MOST, OPERATIONS, end_turn, write_due};
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::runtime::Builder;

    /// Two ends of a connection, the first of which puts off, in a runtime that tells when it waits. What is looked at
    /// between two waits has its other end in another thread.
    fn in_turns<F: Future>(test: impl FnOnce(Socket, std::net::TcpStream) -> F) -> F::Output {
        let runtime = Builder::new_current_thread().enable_all().on_thread_park(end_turn).build();
        runtime.expect("it starts").block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("bound");
            let connecting =
                tokio::task::spawn_blocking(move || std::net::TcpStream::connect(address));
            let (near, _) = listener.accept().await.expect("a connection");
            // The system has said so once.
            near.writable().await.expect("open");
            let far = connecting.await.expect("no panic").expect("it listens");
            test(Socket::new(near), far).await
        })
    }

    /// Polls it once.
    async fn now<F: Future>(future: F) -> Poll<F::Output> {
        let mut future = pin!(future);
        poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
    }

    /// Whether something has come.
    fn has_come(far: &std::net::TcpStream) -> bool {
        far.set_nonblocking(true).expect("a socket");
        let come = far.peek(&mut [0]).is_ok();
        far.set_nonblocking(false).expect("a socket");
        come
    }

    fn all(mut far: std::net::TcpStream) -> impl Future<Output = Vec<u8>> {
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut far, &mut all).map(|_| all)
        });
        async { reading.await.expect("no panic").expect("it is open") }
    }

    #[test]
    fn what_a_turn_writes_goes_out_at_its_end_and_in_order() {
        in_turns(async |mut near, far| {
            near.write_all(b"one, ").await.expect("open");
            near.write_all(b"two").await.expect("open");
            near.flush().await.expect("open");
            assert!(!has_come(&far));
            let peeking = tokio::task::spawn_blocking(move || far.peek(&mut [0]).map(|_| far));
            let far = peeking.await.expect("no panic").expect("it has come");
            near.shutdown().await.expect("open");
            assert_eq!(all(far).await, b"one, two");
        });
    }

    #[test]
    fn a_thread_that_never_waits_writes_after_so_many_operations() {
        in_turns(async |mut near, far| {
            near.write_all(b".").await.expect("open");
            for _ in 1..OPERATIONS {
                near.write_all(b".").await.expect("open");
            }
            assert!(!has_come(&far));
            near.write_all(b".").await.expect("open");
            assert!(has_come(&far));
        });
        in_turns(async |mut near, far| {
            near.write_all(b".").await.expect("open");
            for _ in 0..=OPERATIONS {
                assert!(now(near.read(&mut [0])).await.is_pending());
            }
            assert!(has_come(&far));
        });
    }

    #[test]
    fn what_is_long_is_written_at_once_and_behind_what_was_put_off() {
        for (put_off, more, is_put_off) in
            [(1, MOST - 1, true), (1, MOST, false), (0, MOST + 1, false)]
        {
            in_turns(async |mut near, far| {
                near.write_all(&vec![b'a'; put_off]).await.expect("open");
                assert!(!has_come(&far));
                near.write_all(&vec![b'b'; more]).await.expect("open");
                assert_eq!(has_come(&far), !is_put_off, "{put_off} and {more} bytes");
                drop(near);
                assert_eq!(all(far).await, [vec![b'a'; put_off], vec![b'b'; more]].concat());
            });
        }
    }

    #[test]
    fn what_takes_long_lets_others_writes_go_first() {
        in_turns(async |mut near, far| {
            near.write_all(b"now").await.expect("open");
            write_due();
            assert!(has_come(&far));
        });
    }

    #[test]
    fn a_thread_that_does_not_tell_when_it_waits_puts_nothing_off() {
        in_turns(async |mut near, far| {
            let elsewhere = std::thread::spawn(move || {
                let slices = [IoSlice::new(b"now")];
                let mut cx = Context::from_waker(Waker::noop());
                assert!(Pin::new(&mut near).poll_write_vectored(&mut cx, &slices).is_ready());
                (near, has_come(&far))
            });
            assert!(elsewhere.join().expect("no panic").1);
        });
    }

    #[test]
    fn what_was_put_off_is_written_though_the_socket_is_dropped() {
        in_turns(async |mut near, far| {
            near.write_all(b"the last word").await.expect("open");
            drop(near);
            assert!(has_come(&far));
            assert_eq!(all(far).await, b"the last word");
        });
    }

    /// What is put off and not taken is written without anybody asking for it: not every writer flushes again.
    #[test]
    fn what_the_system_does_not_take_at_once_is_written_once_it_does() {
        in_turns(async |mut near, far| {
            let mut sent = 0;
            // The peer reads nothing. In the end the system takes no more, and then neither does the socket.
            while let Poll::Ready(taken) = now(near.write(&[b'x'; 1_000])).await {
                sent += taken.expect("open");
                end_turn();
            }
            assert!(now(near.flush()).await.is_pending());
            let there = tokio::task::spawn_blocking(move || {
                let mut there = vec![0; sent];
                let mut far = far;
                io::Read::read_exact(&mut far, &mut there).map(|()| far)
            });
            let far = there.await.expect("no panic").expect("all of it comes");
            near.flush().await.expect("all is written");
            near.write_all(b"and on").await.expect("open");
            near.shutdown().await.expect("open");
            assert_eq!(all(far).await, b"and on");
        });
    }

    #[test]
    fn who_waits_for_what_the_system_does_not_take_is_woken_and_told_if_it_fails() {
        in_turns(async |mut near, far| {
            let piece = [b'x'; 1_000];
            let failed = async {
                loop {
                    near.write_all(&piece).await?;
                    near.flush().await?;
                }
            };
            let closing = async {
                tokio::task::spawn_blocking(move || {
                    while !has_come(&far) {}
                    drop(far);
                })
                .await
                .expect("no panic");
            };
            let (failed, ()) = tokio::join!(failed, closing);
            let failed: io::Result<()> = failed;
            assert!(failed.is_err());
        });
    }
}
