use std::future::poll_fn;
use std::net::TcpStream as Blocking;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::task::{spawn_blocking, yield_now};

use super::super::turn::{MOST, OPERATIONS, end_turn, end_turns, write_due};
use super::*;

/// Gives the test two ends of a connection, the first of which puts off, in either runtime, each of which tells when it
/// waits. The other end is looked at between two waits: it is no part of the runtime.
fn in_turns<F>(test: impl Fn(Socket, Blocking) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut several = Builder::new_multi_thread();
    several.worker_threads(1);
    for mut builder in [Builder::new_current_thread(), several] {
        let runtime = builder.enable_all().on_thread_park(end_turn).build().expect("it starts");
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("bound");
            let connecting = spawn_blocking(move || Blocking::connect(address));
            let (near, _) = listener.accept().await.expect("a connection");
            // The system has said so once.
            near.writable().await.expect("open");
            let far = connecting.await.expect("no panic").expect("it listens");
            // What never comes is a failure, not a wait without an end.
            far.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
            // In a task: the future of `block_on` has a thread of its own if there are others.
            tokio::spawn(test(Socket::new(near), far)).await.expect("no panic");
        });
    }
}

/// Polls it once.
async fn now<F: Future>(future: F) -> Poll<F::Output> {
    let mut future = pin!(future);
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

fn nothing_has_come(far: &Blocking) -> bool {
    far.set_nonblocking(true).expect("a socket");
    let come = far.peek(&mut [0]).map_err(|error| error.kind());
    far.set_nonblocking(false).expect("a socket");
    come == Err(io::ErrorKind::WouldBlock)
}

/// Waits for it without the runtime, which has no wait meanwhile.
fn has_come(far: &Blocking) -> bool {
    matches!(far.peek(&mut [0]), Ok(1))
}

async fn all(mut far: Blocking) -> Vec<u8> {
    let reading = spawn_blocking(move || {
        let mut all = Vec::new();
        io::Read::read_to_end(&mut far, &mut all).map(|_| all)
    });
    reading.await.expect("no panic").expect("it is open")
}

/// Writes until the system takes no more, and neither does the socket. How much that was.
async fn fill(near: &mut Socket) -> usize {
    let mut filled = 0;
    while let Poll::Ready(taken) = now(near.write(&[b'x'; 1_000])).await {
        filled += taken.expect("open");
        end_turn();
    }
    filled
}

async fn drain(mut far: Blocking, filled: usize) -> Blocking {
    let reading =
        spawn_blocking(move || io::Read::read_exact(&mut far, &mut vec![0; filled]).map(|()| far));
    reading.await.expect("no panic").expect("all of it comes")
}

#[test]
fn what_a_turn_writes_goes_out_at_its_end_and_in_order() {
    in_turns(async |mut near, far| {
        near.write_all(b"one, ").await.expect("open");
        near.write_all(b"two").await.expect("open");
        near.flush().await.expect("open");
        assert!(nothing_has_come(&far));
        let waiting = spawn_blocking(move || has_come(&far).then_some(far));
        let far = waiting.await.expect("no panic").expect("the turn has ended");
        near.shutdown().await.expect("open");
        assert_eq!(all(far).await, b"one, two");
    });
}

#[test]
fn a_thread_that_never_waits_writes_after_so_many_operations() {
    in_turns(async |mut near, far| {
        for _ in 0..OPERATIONS {
            near.write_all(b".").await.expect("open");
        }
        assert!(nothing_has_come(&far));
        near.write_all(b".").await.expect("open");
        assert!(has_come(&far));
    });
    in_turns(async |mut near, far| {
        near.write_all(b".").await.expect("open");
        for _ in 1..OPERATIONS {
            assert!(now(near.read(&mut [0])).await.is_pending());
        }
        assert!(nothing_has_come(&far));
        assert!(now(near.read(&mut [0])).await.is_pending());
        assert!(has_come(&far));
    });
}

#[test]
fn what_is_long_is_written_at_once_and_behind_what_was_put_off() {
    for (put_off, more, is_put_off) in [(1, MOST - 1, true), (1, MOST, false), (0, MOST + 1, false)]
    {
        in_turns(move |mut near, far| async move {
            near.write_all(&vec![b'a'; put_off]).await.expect("open");
            assert!(nothing_has_come(&far));
            near.write_all(&vec![b'b'; more]).await.expect("open");
            assert!(if is_put_off { nothing_has_come(&far) } else { has_come(&far) });
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
        let runtime = Handle::current();
        let elsewhere = std::thread::spawn(move || {
            let _runtime = runtime.enter();
            let mut cx = Context::from_waker(Waker::noop());
            assert!(Pin::new(&mut near).poll_write(&mut cx, b"now").is_ready());
            (near, has_come(&far))
        });
        assert!(elsewhere.join().expect("no panic").1);
    });
}

#[test]
fn a_thread_whose_turns_are_over_writes_what_it_has_and_puts_nothing_off() {
    in_turns(async |mut near, far| {
        near.write_all(b"one, ").await.expect("open");
        end_turns();
        assert!(has_come(&far));
        near.write_all(b"two").await.expect("open");
        assert_eq!(near.0.lock().room(), 0);
        end_turn();
        near.shutdown().await.expect("open");
        assert_eq!(all(far).await, b"one, two");
    });
}

/// Regression: what was put off before something long kept its room for as long as the connection was silent.
#[test]
fn a_silent_connection_keeps_no_room_for_what_it_puts_off() {
    in_turns(async |mut near, far| {
        near.write_all(b"short").await.expect("open");
        assert!(near.0.lock().room() >= MOST, "what comes next need not be moved");
        end_turn();
        assert_eq!(near.0.lock().room(), 0);
        near.write_all(b"short").await.expect("open");
        near.write_all(&[b'x'; MOST]).await.expect("open");
        assert_eq!(near.0.lock().room(), 0);
        drop(near);
        assert_eq!(all(far).await.len(), 5 + 5 + MOST);
    });
}

/// A task may go on in another thread than the one that has the socket in its list.
#[test]
fn what_another_thread_has_put_off_is_written_once_and_first() {
    in_turns(async |mut near, far| {
        near.write_all(b"one, ").await.expect("open");
        let runtime = Handle::current();
        let elsewhere = std::thread::spawn(move || {
            let _runtime = runtime.enter();
            let mut cx = Context::from_waker(Waker::noop());
            assert!(Pin::new(&mut near).poll_write(&mut cx, b"two").is_ready());
            near
        });
        let mut near = elsewhere.join().expect("no panic");
        end_turn();
        near.shutdown().await.expect("open");
        assert_eq!(all(far).await, b"one, two");
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
        let filled = fill(&mut near).await;
        assert!(now(near.flush()).await.is_pending());
        let far = drain(far, filled).await;
        near.flush().await.expect("all is written");
        near.write_all(b"and on").await.expect("open");
        near.shutdown().await.expect("open");
        assert_eq!(all(far).await, b"and on");
    });
}

#[test]
fn a_connection_is_shut_down_once_all_is_written_and_not_before() {
    in_turns(async |mut near, far| {
        let filled = fill(&mut near).await;
        assert!(now(near.shutdown()).await.is_pending());
        let closing = tokio::spawn(async move { near.shutdown().await });
        assert_eq!(all(far).await.len(), filled);
        closing.await.expect("no panic").expect("it is open");
    });
}

#[test]
fn who_waits_for_what_the_system_does_not_take_is_woken_and_told_if_it_fails() {
    in_turns(async |mut near, far| {
        fill(&mut near).await;
        let waiting = tokio::spawn(async move { near.flush().await });
        yield_now().await;
        assert!(!waiting.is_finished());
        // With so much unread, this is a reset.
        drop(far);
        assert!(waiting.await.expect("no panic").is_err());
    });
}

/// Regression: the system tells why a connection broke once, to a write that nobody waited for; the reader was told of an
/// orderly end.
#[test]
fn who_reads_is_told_why_what_was_put_off_could_not_be_written() {
    in_turns(async |mut near, far| {
        near.write_all(b"unread").await.expect("open");
        end_turn();
        assert!(has_come(&far));
        drop(far);
        while !near.watch().is_gone() {
            yield_now().await;
        }
        near.write_all(b"too late").await.expect("it is put off");
        end_turn();
        assert!(near.read(&mut [0]).await.is_err());
        assert_eq!(near.read(&mut [0]).await.expect("told before"), 0);
    });
}

#[test]
fn nothing_is_left_of_a_socket_that_is_dropped_while_the_system_takes_no_more() {
    in_turns(async |mut near, far| {
        let others = Handle::current().metrics().num_alive_tasks();
        let filled = fill(&mut near).await;
        assert_eq!(Handle::current().metrics().num_alive_tasks(), others + 1);
        drop(near);
        while Handle::current().metrics().num_alive_tasks() > others {
            yield_now().await;
        }
        assert!(all(far).await.len() < filled);
    });
}
