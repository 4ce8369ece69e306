//! The streams of HTTP/2 connections, each a task with deadlines.
//!
//! hyper does not ask for more of an answer while its client grants no window, so nothing in the answer's body
//! can notice that: who opens many streams and reads none would hold their requests for ever.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::Executor;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::observe::exchange::cut;

/// How often it is looked whether a connection is busy still, at most.
const LOOK: Duration = Duration::from_millis(100);

thread_local! {
    /// The stream that is polled on this thread has got on with its answer.
    static GOT_ON: Cell<bool> = const { Cell::new(false) };
    /// What is executed next on this thread is the stream of a request that was just begun.
    static BEGUN: Cell<Option<Busy>> = const { Cell::new(None) };
    /// The stream that is polled on this thread: what it executes is what it becomes a tunnel by.
    static POLLED: Cell<Option<Arc<Shared>>> = const { Cell::new(None) };
}

/// To be said when there is an answer, and whenever more of its body is asked for.
pub(super) fn got_on() {
    GOT_ON.set(true);
}

/// The streams of one connection.
#[derive(Debug)]
pub(super) struct Activity(Mutex<Now>);

#[derive(Debug)]
struct Now {
    open: usize,
    /// There was one.
    has_begun: bool,
    /// When the last one began or ended.
    changed: Instant,
}

impl Activity {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Now { open: 0, has_begun: false, changed: Instant::now() })))
    }

    /// To be said when a request is given to its service, in the poll in which hyper then has its stream executed.
    pub fn begin(self: &Arc<Self>) {
        BEGUN.set(Some(self.busy()));
    }

    /// A stream is open for as long as this is there.
    fn busy(self: &Arc<Self>) -> Busy {
        self.change(|open| *open += 1);
        Busy(Arc::clone(self))
    }

    fn change(&self, change: impl FnOnce(&mut usize)) {
        let mut now = self.0.lock();
        change(&mut now.open);
        now.has_begun = true;
        now.changed = Instant::now();
    }

    /// Whether there ever was one.
    pub fn has_begun(&self) -> bool {
        self.0.lock().has_begun
    }

    /// Waits until there has been no stream for so long, or for as long as `first` before the first one.
    pub async fn ended(&self, first: Duration, limit: Duration) {
        loop {
            let silent_until = {
                let now = self.0.lock();
                let limit = if now.has_begun { limit } else { first };
                (now.open == 0).then(|| now.changed + limit)
            };
            match silent_until {
                Some(until) if until <= Instant::now() => return,
                Some(until) => sleep_until(until).await,
                None => sleep(limit.max(LOOK)).await,
            }
        }
    }
}

/// A stream that is open.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.change(|open| *open -= 1);
    }
}

/// What a stream has in common with what it is upgraded to.
#[derive(Debug)]
struct Shared {
    _busy: Busy,
    over: Notify,
}

/// What the stream is upgraded to, until dropped.
#[derive(Debug)]
pub(super) struct Upgrade(Arc<Shared>);

impl Upgrade {
    /// Of the stream that is polled now, if any is.
    pub fn begin() -> Option<Self> {
        let shared = POLLED.take();
        POLLED.set(shared.clone());
        shared.map(Self)
    }
}

impl Drop for Upgrade {
    fn drop(&mut self) {
        self.0.over.notify_one();
    }
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
        let Some(busy) = BEGUN.take() else {
            // It has no end but the tunnel's: but for a client that takes nothing of what is left, it would wait for ever.
            let (shared, stall) = (POLLED.take(), self.stall);
            drop(tokio::spawn(async move {
                let over = async {
                    match &shared {
                        Some(shared) => shared.over.notified().await,
                        None => std::future::pending().await,
                    }
                    sleep(stall).await;
                };
                tokio::select! {
                    () = stream => {}
                    () = over => {}
                }
            }));
            return;
        };
        let (whole, limit) = (self.whole, self.stall);
        // Dropped, a stream is reset and its request with it.
        drop(tokio::spawn(async move {
            let shared = Arc::new(Shared { _busy: busy, over: Notify::new() });
            let mut stream = Stream { inner: Box::pin(stream), shared, limit, stalled: None };
            if tokio::time::timeout(whole, &mut stream).await.is_err() {
                tracing::warn!("a stream took longer than limits.request_timeout, and was reset");
                cut(stream);
            }
        }));
    }
}

struct Stream<F> {
    inner: Pin<Box<F>>,
    shared: Arc<Shared>,
    limit: Duration,
    /// Armed once there is an answer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<F: Future<Output = ()>> Future for Stream<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        GOT_ON.set(false);
        POLLED.set(Some(Arc::clone(&self.shared)));
        // First, since the body has a deadline of its own for its sender, which began before this one.
        let polled = self.inner.as_mut().poll(cx);
        POLLED.take();
        if polled.is_ready() {
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
