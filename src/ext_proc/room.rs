//! The memory that the bodies of a stream take.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

use crate::proxy::room::{Room, Share};

/// What one stream takes of the room, while a body is on its way.
pub(super) struct Held(Mutex<State>);

struct State {
    /// A body is awaited: what comes is counted. Heads are not: they have their own bounds in Envoy.
    awaits: bool,
    share: Share,
    /// There was no room for it.
    is_full: bool,
}

impl Held {
    pub fn of(room: &Room) -> Arc<Self> {
        let state = State { awaits: false, share: room.share(), is_full: false };
        Arc::new(Self(Mutex::new(state)))
    }

    /// From now on what comes is a body.
    pub fn awaits_body(&self) {
        self.0.lock().awaits = true;
    }

    /// The body has come whole: what it takes is for its exchange to hold.
    pub fn hand_over(&self) -> Option<OwnedSemaphorePermit> {
        let mut state = self.0.lock();
        state.awaits = false;
        state.share.hand_over()
    }

    /// Whether a body ended because there was no room for it.
    pub fn is_full(&self) -> bool {
        self.0.lock().is_full
    }

    /// Takes so many bytes more of a body, if there are some.
    pub fn take(&self, bytes: usize) -> bool {
        let mut state = self.0.lock();
        if !state.awaits {
            return true;
        }
        state.is_full |= !state.share.take(bytes);
        !state.is_full
    }
}

/// The bytes of a stream, as far as there is room for them.
pub(super) struct Metered<B> {
    pub body: B,
    pub held: Arc<Held>,
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Body for Metered<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(Status::from_error(error.into())))),
            None => return Poll::Ready(None),
        };
        let length = frame.data_ref().map_or(0, Bytes::len);
        Poll::Ready(Some(if self.held.take(length) {
            Ok(frame)
        } else {
            Err(Status::resource_exhausted("limits.max_buffered"))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
