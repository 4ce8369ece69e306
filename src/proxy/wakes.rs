//! Wake-ups that are for nothing.
//!
//! hyper wakes a connection whenever a piece of a message's body is taken, so that it reads the next one. It does so for
//! the last one too, after which it has nothing to do: the connection is polled once more, and all that waits on it.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use bytes::Bytes;
use http_body::{Body as _, Frame};
use hyper::body::Incoming;

thread_local! {
    /// A piece is being taken on this thread.
    static TAKING: Cell<bool> = const { Cell::new(false) };
    /// Who was to be woken by that.
    static HELD_BACK: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// Takes the next piece of a body, and wakes its connection unless it was the last.
pub(super) fn take(
    incoming: &mut Incoming,
    cx: &mut Context<'_>,
) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
    struct Until;
    impl Drop for Until {
        fn drop(&mut self) {
            TAKING.set(false);
        }
    }
    let polled = {
        let _until = Until;
        TAKING.set(true);
        Pin::new(&mut *incoming).poll_frame(cx)
    };
    if let Some(waker) = HELD_BACK.take()
        && !incoming.is_end_stream()
    {
        waker.wake();
    }
    polled
}

/// A connection's own waker, by which it is not woken for nothing.
#[derive(Default)]
pub(super) struct OnPurpose(Option<(Arc<Held>, Waker)>);

/// The waker of the connection's task.
struct Held(Waker);

impl Wake for Held {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if TAKING.get() {
            HELD_BACK.set(Some(self.0.clone()));
        } else {
            self.0.wake_by_ref();
        }
    }
}

/// Drives a connection by such a waker.
pub(super) async fn on_purpose<F: Future>(connection: F) -> F::Output {
    let (mut connection, mut waker) = (pin!(connection), OnPurpose::default());
    poll_fn(|cx| connection.as_mut().poll(&mut Context::from_waker(waker.waker(cx.waker())))).await
}

impl OnPurpose {
    /// The one for a task's.
    pub fn waker(&mut self, task: &Waker) -> &Waker {
        let known = self.0.take().filter(|(held, _)| held.0.will_wake(task));
        let (_, waker) = self.0.insert(known.unwrap_or_else(|| {
            let held = Arc::new(Held(task.clone()));
            (Arc::clone(&held), Waker::from(held))
        }));
        waker
    }
}
