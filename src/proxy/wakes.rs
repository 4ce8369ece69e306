//! Wake-ups that are for nothing.
//!
//! hyper wakes a connection whenever a piece of a message's body is taken, so that it reads the next one. It does so for
//! the last one too, after which it has nothing to do (hyper 1.12: `proto/h1/dispatch.rs` drops its end of the body in the
//! poll in which the last piece of a known length comes): the connection is polled once more, and all that waits on it,
//! for 2 % of an update's instructions.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use http_body::{Body, Frame};

thread_local! {
    /// A piece is being taken on this thread.
    static TAKING: Cell<bool> = const { Cell::new(false) };
    /// The task that was to be woken by that.
    static HELD_BACK: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// For as long as a piece is taken. Then whoever is held back is woken after all.
struct Taking;

impl Taking {
    fn begin() -> Self {
        TAKING.set(true);
        Self
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        TAKING.set(false);
        if let Some(task) = HELD_BACK.take() {
            task.wake();
        }
    }
}

/// What a body yields.
type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

/// Takes the next piece of a body. Its connection is woken for the next one, unless this is the last. What wakes anybody
/// in a poll that yields no piece may be the taker's own, which it waits for.
pub(super) fn take<B: Body + Unpin>(body: &mut B, cx: &mut Context<'_>) -> Polled<B> {
    let _taking = Taking::begin();
    let polled = Pin::new(&mut *body).poll_frame(cx);
    if matches!(polled, Poll::Ready(Some(Ok(_)))) && body.is_end_stream() {
        HELD_BACK.take();
    }
    polled
}

/// Gives a connection a waker for all that it waits for, of which the wake-up for a last piece is taken out.
#[derive(Default)]
pub(super) struct WakeFilter(Option<(Arc<Filtered>, Waker)>);

/// The waker of the connection's task.
struct Filtered(Waker);

impl Wake for Filtered {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !TAKING.get() {
            self.0.wake_by_ref();
        } else if let Some(other) = HELD_BACK.replace(Some(self.0.clone())) {
            other.wake();
        }
    }
}

impl WakeFilter {
    /// The one for a task's.
    pub fn waker(&mut self, task: &Waker) -> &Waker {
        let known = self.0.take().filter(|(filtered, _)| filtered.0.will_wake(task));
        let (_, waker) = self.0.insert(known.unwrap_or_else(|| {
            let filtered = Arc::new(Filtered(task.clone()));
            (Arc::clone(&filtered), Waker::from(filtered))
        }));
        waker
    }
}

/// Drives a connection by such a waker.
pub(super) async fn filtered<F: Future>(connection: F) -> F::Output {
    let (mut connection, mut filter) = (pin!(connection), WakeFilter::default());
    poll_fn(|cx| connection.as_mut().poll(&mut Context::from_waker(filter.waker(cx.waker())))).await
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU32, Ordering};

    use bytes::Bytes;

    use super::*;

    /// A body that wakes whoever takes something of it, as if that were its sender.
    struct Waking {
        yields: Polled<Self>,
        is_over: bool,
    }

    impl Body for Waking {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<Self> {
            cx.waker().wake_by_ref();
            std::mem::replace(&mut self.yields, Poll::Pending)
        }

        fn is_end_stream(&self) -> bool {
            self.is_over
        }
    }

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often a task is woken that takes something of a body.
    fn woken(yields: Polled<Waking>, is_over: bool) -> u32 {
        let (count, mut filter) = (Arc::new(Count::default()), WakeFilter::default());
        let task = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(filter.waker(&task));
        let _ = take(&mut Waking { yields, is_over }, &mut cx);
        let taken = count.0.load(Ordering::Relaxed);
        cx.waker().wake_by_ref();
        assert_eq!(count.0.load(Ordering::Relaxed), taken + 1, "nothing is held back any longer");
        taken
    }

    fn piece() -> Polled<Waking> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"piece")))))
    }

    #[test]
    fn the_last_piece_of_a_body_wakes_nobody_and_any_other_does() {
        assert_eq!(woken(piece(), true), 0);
        assert_eq!(woken(piece(), false), 1);
    }

    /// Regression: the taker's own wake-up was dropped with the sender's, and a refusal was relayed at the retry's deadline.
    #[test]
    fn a_poll_that_yields_no_piece_wakes_whoever_waits_for_one() {
        for is_over in [true, false] {
            assert_eq!(woken(Poll::Pending, is_over), 1);
            assert_eq!(woken(Poll::Ready(None), is_over), 1);
        }
    }

    #[test]
    fn a_body_that_panics_leaves_nobody_asleep() {
        struct Panics;
        impl Body for Panics {
            type Data = Bytes;
            type Error = Infallible;

            fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<Self> {
                cx.waker().wake_by_ref();
                panic!("planted")
            }
        }
        let (count, mut filter) = (Arc::new(Count::default()), WakeFilter::default());
        let task = Waker::from(Arc::clone(&count));
        let waker = filter.waker(&task).clone();
        let taking = std::panic::AssertUnwindSafe(|| {
            let _ = take(&mut Panics, &mut Context::from_waker(&waker));
        });
        assert!(std::panic::catch_unwind(taking).is_err());
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
