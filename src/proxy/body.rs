//! The body of a message: buffered, streaming, or a buffered start with a stream behind it.
//!
//! Only what is buffered can be sent again, and a clone of it is a reference count.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::gathered::Gathered;
use super::headers::strip_trailers;
use super::room::Share;
use super::wakes;

/// Which side of the proxy a body comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client.
    Downstream,
    /// The API.
    Upstream,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Downstream => "downstream",
            Self::Upstream => "upstream",
        })
    }
}

/// Why a body could not be read to its end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BodyError {
    /// The connection broke, or the framing did.
    #[error("the {0} body broke off")]
    Broken(Side, #[source] Arc<hyper::Error>),
    /// The stream of HTTP/2 that it came in was reset.
    #[error("the {0} body broke off")]
    Reset(Side),
    /// Nothing came for `limits.idle_timeout`.
    #[error("the {0} body stood still for {1:?}")]
    Idle(Side, Duration),
    /// It came with fewer bytes a second than `limits.min_rate`.
    #[error("the {0} body came with less than {1} bytes a second")]
    Dripping(Side, usize),
    /// Not all of it came within `limits.body_timeout`.
    #[error("the {0} body did not end within {1:?}")]
    Slow(Side, Duration),
}

/// A message's body. What is large of it is boxed: a request on its way is moved from one future or queue into the next, again
/// and again.
#[derive(Debug)]
pub enum Body {
    /// All of it is here.
    Buffered(Bytes),
    /// It comes as it comes, and is not kept.
    Streaming(Box<Streaming>),
    /// Its start was looked at; the rest comes as it comes.
    Resumed(Box<Resumed>),
}

const _: () = assert!(size_of::<Body>() <= 40, "moved with its request, again and again");

/// A body whose start was looked at.
#[derive(Debug)]
pub struct Resumed {
    pub start: VecDeque<Frame<Bytes>>,
    pub rest: Rest,
}

/// What comes behind the part of a body that was looked at.
#[derive(Debug)]
pub enum Rest {
    /// Nothing.
    End,
    /// The rest of the stream.
    Stream(Box<Streaming>),
    /// The stream broke.
    Broken(Broken),
}

/// How an answer broke. That is said a moment after all that came before, since hyper then drops what it has not written
/// yet, the head of the message too.
#[derive(Debug)]
pub struct Broken {
    /// `None` once it was said.
    error: Option<BodyError>,
    /// Once all that came before was read.
    moment: Option<Pin<Box<Sleep>>>,
}

impl Broken {
    /// How long the other side has to take what came before.
    const MOMENT: Duration = Duration::from_millis(100);

    pub fn new(error: BodyError) -> Self {
        Self { error: Some(error), moment: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<BodyError>> {
        let moment = self.moment.get_or_insert_with(|| Box::pin(tokio::time::sleep(Self::MOMENT)));
        ready!(moment.as_mut().poll(cx));
        Poll::Ready(self.error.take())
    }
}

impl Body {
    /// A body without content.
    pub const fn empty() -> Self {
        Self::Buffered(Bytes::new())
    }

    /// The part of it that is still to come.
    pub fn stream(&mut self) -> Option<&mut Streaming> {
        match self {
            Self::Streaming(stream) => Some(stream),
            Self::Resumed(resumed) => match &mut resumed.rest {
                Rest::Stream(stream) => Some(stream),
                Rest::End | Rest::Broken(_) => None,
            },
            Self::Buffered(_) => None,
        }
    }

    /// Why nothing follows what was looked at, if it ought to.
    pub fn broken(&self) -> Option<&BodyError> {
        match self {
            Self::Resumed(resumed) => match &resumed.rest {
                Rest::Broken(broken) => broken.error.as_ref(),
                Rest::End | Rest::Stream(_) => None,
            },
            Self::Buffered(_) | Self::Streaming(_) => None,
        }
    }

    /// What was looked at, and what follows.
    pub fn resumed(start: VecDeque<Frame<Bytes>>, rest: Rest) -> Self {
        Self::Resumed(Box::new(Resumed { start, rest }))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let stream = match &mut *self {
            Self::Buffered(bytes) if bytes.is_empty() => return Poll::Ready(None),
            Self::Buffered(bytes) => {
                return Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes)))));
            }
            Self::Streaming(stream) => stream,
            Self::Resumed(resumed) => match (resumed.start.pop_front(), &mut resumed.rest) {
                (Some(frame), _) => return Poll::Ready(Some(Ok(frame))),
                (None, Rest::Stream(rest)) => rest,
                (None, Rest::Broken(broken)) => {
                    return broken.poll(cx).map(|error| error.map(Err));
                }
                (None, Rest::End) => return Poll::Ready(None),
            },
        };
        match ready!(Pin::new(stream.as_mut()).poll_frame(cx)) {
            Some(Err(error)) if stream.side == Side::Upstream => {
                *self = Self::resumed(VecDeque::new(), Rest::Broken(Broken::new(error)));
                self.poll_frame(cx)
            }
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Buffered(bytes) => bytes.is_empty(),
            Self::Streaming(stream) => stream.is_end_stream(),
            Self::Resumed(resumed) => {
                resumed.start.is_empty()
                    && match &resumed.rest {
                        Rest::End => true,
                        Rest::Stream(rest) => rest.is_end_stream(),
                        Rest::Broken(broken) => broken.error.is_none(),
                    }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Buffered(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Streaming(stream) => stream.size_hint(),
            Self::Resumed(resumed) => {
                let start: u64 = resumed
                    .start
                    .iter()
                    .filter_map(|frame| frame.data_ref())
                    .map(|data| data.len() as u64)
                    .sum();
                let rest = match &resumed.rest {
                    Rest::End => SizeHint::with_exact(0),
                    Rest::Stream(rest) => rest.size_hint(),
                    Rest::Broken(_) => SizeHint::new(),
                };
                let mut hint = SizeHint::new();
                hint.set_lower(start + rest.lower());
                // By its length, a message has no trailers.
                let has_trailers = resumed.start.iter().any(Frame::is_trailers);
                if let Some(upper) = rest.upper().filter(|_| !has_trailers) {
                    hint.set_upper(start + upper);
                }
                hint
            }
        }
    }
}

/// Whether something is left of the body that a client of HTTP/1 is sending: for as long as it is, no other request can be read of
/// its connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Unread(Arc<AtomicBool>);

impl Unread {
    pub fn is_some(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, is_some: bool) {
        self.0.store(is_some, Ordering::Relaxed);
    }
}

/// A stream with a deadline for every silence in it, and perhaps a least rate.
#[derive(Debug)]
pub struct Streaming {
    incoming: Incoming,
    side: Side,
    idle: Duration,
    /// Armed only while nothing comes.
    silence: Option<Silence>,
    rate: Option<Rate>,
    progress: Option<Progress>,
    unread: Option<Unread>,
    is_http2: bool,
}

#[derive(Debug)]
struct Silence {
    since: Instant,
    end: Pin<Box<Sleep>>,
}

/// What a sender has done with the time that it was given: only time in which it was waited for, since it is not
/// at fault if nobody reads.
#[derive(Debug)]
struct Rate {
    /// In bytes a second.
    least: usize,
    bytes: u64,
    waited: Duration,
}

impl Rate {
    /// How much longer it may be waited for: `grace`, and as long as its bytes may have taken.
    fn left(&self, grace: Duration) -> Duration {
        let earned = Duration::from_secs(self.bytes / self.least as u64);
        grace.saturating_add(earned).saturating_sub(self.waited)
    }
}

impl Streaming {
    /// A stream from `side` that may be silent for `idle` at most.
    pub fn new(incoming: Incoming, side: Side, idle: Duration) -> Self {
        let (silence, rate, progress, unread) = (None, None, None, None);
        Self { incoming, side, idle, silence, rate, progress, unread, is_http2: false }
    }

    /// It came by HTTP/2, whose streams say where they end. hyper takes one that was reset without an error, or whose connection
    /// did not answer, for one that has ended (hyper 1.12: `body/incoming.rs`).
    pub fn http2(mut self, is_http2: bool) -> Self {
        self.is_http2 = is_http2;
        self
    }

    /// Cuts a sender that stays below so many bytes a second once it was waited for as long as it may be silent;
    /// 0 for none.
    pub fn at_least(mut self, rate: usize) -> Self {
        self.rate = (rate > 0).then_some(Rate { least: rate, bytes: 0, waited: Duration::ZERO });
        self
    }

    /// Says so there until its end has come; for good, if trailers come.
    pub(super) fn telling(mut self, unread: &Unread) -> Self {
        unread.set(true);
        self.unread = Some(unread.clone());
        self
    }

    /// Lets somebody else see when this stream last moved, and how it failed.
    pub fn watch(&mut self) -> Progress {
        self.progress.get_or_insert_with(Progress::new).clone()
    }

    fn failed(&self, error: BodyError) -> BodyError {
        if let Some(progress) = &self.progress {
            let _ = progress.seen.error.set(error.clone());
        }
        error
    }
}

impl http_body::Body for Streaming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = wakes::take(&mut this.incoming, cx) {
            let frame = frame.map(|frame| frame.map(end_to_end));
            // The next request may be among what hyper took for trailers, and is lost then: it looks for two whole line ends, of
            // which httparse has read the first without a CR for the end (hyper 1.12: `proto/h1/decode.rs`). So nothing behind
            // trailers is read as a request, as if they were never there to their end.
            if matches!(&frame, Some(Ok(frame)) if frame.is_trailers()) {
                this.unread = None;
            }
            let silence = this.silence.take();
            if let Some(rate) = &mut this.rate {
                rate.waited += silence.map_or(Duration::ZERO, |silence| silence.since.elapsed());
                if let Some(Ok(frame)) = &frame {
                    rate.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                }
            }
            if let Some(progress) = &this.progress {
                progress.made();
            }
            if let Some(unread) = &this.unread
                && (frame.is_none() || this.incoming.is_end_stream())
            {
                unread.set(false);
            }
            let side = this.side;
            if frame.is_none() && this.is_http2 && !this.incoming.is_end_stream() {
                return Poll::Ready(Some(Err(this.failed(BodyError::Reset(side)))));
            }
            return Poll::Ready(frame.map(|frame| {
                frame.map_err(|error| this.failed(BodyError::Broken(side, Arc::new(error))))
            }));
        }
        let (idle, rate) = (this.idle, this.rate.as_ref());
        let limit = rate.map_or(idle, |rate| rate.left(idle).min(idle));
        let silence = this.silence.get_or_insert_with(|| Silence {
            since: Instant::now(),
            end: Box::pin(tokio::time::sleep(limit)),
        });
        if let Some(progress) = &this.progress {
            progress.seen.is_waiting.store(true, Ordering::Relaxed);
        }
        ready!(silence.end.as_mut().poll(cx));
        let error = match rate {
            Some(rate) if limit < idle => BodyError::Dripping(this.side, rate.least),
            _ => BodyError::Idle(this.side, idle),
        };
        Poll::Ready(Some(Err(this.failed(error))))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// Of trailers, what is meant for more than one connection.
fn end_to_end(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            strip_trailers(&mut trailers);
            Frame::trailers(trailers)
        }
        Err(data) => data,
    }
}

/// When a stream last moved, and how it failed.
#[derive(Debug, Clone)]
pub struct Progress {
    start: Instant,
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Milliseconds after the start.
    last: AtomicU64,
    /// Its sender is waited for.
    is_waiting: AtomicBool,
    error: OnceLock<BodyError>,
}

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), seen: Arc::default() }
    }

    fn made(&self) {
        let elapsed = self.start.elapsed().as_millis();
        self.seen.last.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.seen.is_waiting.store(false, Ordering::Relaxed);
    }

    /// Whether the stream would go on if its sender did.
    pub fn is_waiting(&self) -> bool {
        self.seen.is_waiting.load(Ordering::Relaxed)
    }

    /// The moment of the last movement; before any, that of the first look.
    pub fn last(&self) -> Instant {
        self.start + Duration::from_millis(self.seen.last.load(Ordering::Relaxed))
    }

    /// Why the stream could not be read to its end, if that was so.
    pub fn error(&self) -> Option<BodyError> {
        self.seen.error.get().cloned()
    }
}

/// What reading ahead found.
#[derive(Debug)]
pub(super) enum Ahead {
    /// The body ended within the cap.
    Whole(Bytes),
    /// There is more; `start` holds what was read.
    More { start: VecDeque<Frame<Bytes>>, rest: Box<Streaming> },
    /// It was not read to its end: there is no room for it among the bodies of others.
    NoRoom,
}

/// Reads a body to its end, or until it is longer than `cap` bytes. Trailers of a whole body are
/// dropped: it is framed anew, by its length. Each byte that is kept is taken of `share`.
pub(super) async fn read_ahead(
    mut body: Box<Streaming>,
    cap: usize,
    share: &mut Share,
) -> Result<Ahead, BodyError> {
    let mut gathered = Gathered::default();
    let mut announced = http_body::Body::size_hint(&*body).exact();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            let length = gathered.len();
            if let Some(whole) =
                announced.take_if(|whole| length as u64 >= (*whole).div_ceil(EARLY))
            {
                let whole = usize::try_from(whole).unwrap_or(usize::MAX);
                if share.take_early(whole.saturating_sub(length)) {
                    gathered.make_room(whole);
                }
            }
            if !share.take(data.len()) {
                return Ok(Ahead::NoRoom);
            }
            gathered.push(data);
        }
        if gathered.len() > cap {
            let start = VecDeque::from([Frame::data(gathered.into_bytes())]);
            return Ok(Ahead::More { start, rest: body });
        }
    }
    Ok(Ahead::Whole(gathered.into_bytes()))
}

/// The part of an announced body that has to be here before there is room for all of it: so the rest is copied once (1,500
/// lists: 0.93 to 0.955 of a request's CPU time), and who announces much gets four times what came at most.
const EARLY: u64 = 4;

#[cfg(test)]
mod tests;
