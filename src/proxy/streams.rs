//! The streams of HTTP/2 connections, each a task with deadlines.
//!
//! hyper does not ask for more of an answer while its client grants no window, so nothing in the answer's body
//! can notice that: who opens many streams and reads none would hold their requests for ever.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, Sleep, sleep};

use crate::observe::exchange::cut;

thread_local! {
    /// The stream that is polled on this thread has got on with its answer.
    static GOT_ON: Cell<bool> = const { Cell::new(false) };
}

/// To be said when there is an answer, and whenever more of its body is asked for.
pub(super) fn got_on() {
    GOT_ON.set(true);
}

/// Runs streams, and ends those that take too long.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    /// From a stream's begin to its end.
    pub whole: Duration,
    /// The longest that a client may take nothing of an answer.
    pub stall: Duration,
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let (whole, limit) = (self.whole, self.stall);
        // Dropped, a stream is reset and its request with it.
        drop(tokio::spawn(async move {
            let mut stream = Stream { inner: Box::pin(stream), limit, stalled: None };
            if tokio::time::timeout(whole, &mut stream).await.is_err() {
                tracing::warn!("a stream took longer than limits.request_timeout, and was reset");
                cut(stream);
            }
        }));
    }
}

struct Stream<F> {
    inner: Pin<Box<F>>,
    limit: Duration,
    /// Armed once there is an answer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<F: Future<Output = ()>> Future for Stream<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        GOT_ON.set(false);
        // First, since the body has a deadline of its own for its sender, which began before this one.
        if self.inner.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let limit = self.limit;
        if GOT_ON.get() {
            match &mut self.stalled {
                Some(stalled) => stalled.as_mut().reset(Instant::now() + limit),
                none => *none = Some(Box::pin(sleep(limit))),
            }
        }
        let Some(stalled) = &mut self.stalled else { return Poll::Pending };
        stalled.as_mut().poll(cx).map(|()| {
            tracing::warn!(
                "a client took nothing of an answer for limits.idle_timeout: its stream was reset"
            );
        })
    }
}
