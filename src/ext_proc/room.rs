//! The memory that messages take until they are whole: all of them together no more than `limits.max_buffered`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// What one stream takes of the room.
pub(super) struct Held {
    room: Arc<Semaphore>,
    taken: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Held {
    pub fn of(room: &Arc<Semaphore>) -> Arc<Self> {
        Arc::new(Self { room: Arc::clone(room), taken: Mutex::default() })
    }

    /// Takes so many bytes more, if there are some.
    fn take(&self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(more) = Arc::clone(&self.room).try_acquire_many_owned(bytes) else { return false };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *taken {
            Some(taken) => taken.merge(more),
            none => *none = Some(more),
        }
        true
    }

    /// A message has come whole, and is dealt with before anything else is read. Of the next one no more than a frame can
    /// have come with it.
    pub fn give_back(&self) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
