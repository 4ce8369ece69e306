//! Connections to upstreams, kept for the next request (RFC 9112 section 9.3, RFC 9113 section 9.1).
//!
//! What a general client does beside that, it does for each request: it hashes where the request goes to, and lets two
//! futures race for a connection. Most requests go to one origin and find one. Done without, a request that is passed on
//! takes a tenth less CPU time on one thread, and a sixth less on several.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use http::header::{CONNECTION, Entry, HOST};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::client::legacy::connect::Connection as Negotiated;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep};

use super::body::{Body, Progress};
use super::io::{History, Remembering};
use super::wakes::filtered;

/// How often an HTTP/2 connection is asked whether it lives, and how long it may take to say so. A shared connection
/// is never idle for long: only this tells that its path died.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens connections.
pub(super) trait Connect: Send + Sync + 'static {
    /// What it opens.
    type Stream: AsyncRead + AsyncWrite + Negotiated + Send + Unpin + 'static;

    /// Opens one to the origin of `uri`.
    fn connect(
        &self,
        uri: Uri,
    ) -> impl Future<Output = Result<Remembering<Self::Stream>, BoxError>> + Send;
}

pub(super) type BoxError = Box<dyn StdError + Send + Sync>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum PoolError {
    /// There is no connection.
    #[error("cannot connect")]
    Connect(#[source] BoxError),
    /// There was one.
    #[error("no answer")]
    Exchange {
        source: hyper::Error,
        /// It had been used before, and was closed before it could be used again.
        was_stale: bool,
    },
    /// It was waited for long enough.
    #[error("no answer in time")]
    Late,
}

/// How long an answer may take to begin: `limit` from when there was a connection to send the request on, or from the last
/// movement of a body that is on its way still, and not while the client is waited for.
pub(super) struct Patience {
    pub limit: Duration,
    pub progress: Option<Progress>,
}

impl Patience {
    fn end(&self, begun: Instant) -> Instant {
        let from = match &self.progress {
            None => begun,
            // A client that keeps its body back has a deadline of its own, and it is not the upstream that is late.
            Some(progress) if progress.is_waiting() => Instant::now(),
            Some(progress) => progress.last().max(begun),
        };
        from + self.limit
    }
}

/// Where requests go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    pub scheme: Scheme,
    pub authority: Authority,
}

impl Origin {
    /// What stands at `path` there.
    fn uri(&self, path: Option<&PathAndQuery>) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path.cloned().unwrap_or(PathAndQuery::from_static("/")));
        Uri::from_parts(parts).expect("it has all three parts")
    }

    /// Makes a request one of HTTP/2's: the server's name stands in `:authority`, and in no `Host` beside it, and the connection
    /// has no fields (RFC 9113 section 8.2.2 and 8.3.1).
    fn make_http2(&self, request: &mut Request<Body>) {
        let named = request.headers_mut().remove(HOST);
        let named = named.and_then(|host| Authority::try_from(host.as_bytes()).ok());
        // A request that another connection has handed back has its name there already.
        let named = named.or_else(|| request.uri().authority().cloned());
        let authority = named.unwrap_or_else(|| self.authority.clone());
        let origin = Self { scheme: self.scheme.clone(), authority };
        *request.uri_mut() = origin.uri(request.uri().path_and_query());
        // It names `TE`, which hyper would drop with it.
        request.headers_mut().remove(CONNECTION);
    }
}

/// Connections to any number of origins.
pub(super) struct Pool<C> {
    connector: C,
    kept: Arc<Mutex<Kept>>,
    /// How long a connection is kept.
    keep_alive: Duration,
}

struct Kept {
    /// The longest unused first, but for HTTP/2's.
    connections: Vec<Connection>,
    /// The most of them. To close what is used again in a moment costs more than to keep it: of 1,000 clients at once, two
    /// requests of three opened a connection where 64 were kept.
    most: usize,
    /// Something closes those whose time is over.
    is_watched: bool,
}

/// A connection with room for one more request.
struct Connection {
    origin: Origin,
    sender: Sender,
    history: History,
    last_used: Instant,
    /// Ends the wait for an answer. With HTTP/1 it goes on to the next request: to put a timer off costs next to nothing,
    /// to set one and to take it back costs two locks.
    alarm: Pin<Box<Sleep>>,
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    /// One of several at once.
    Http2(http2::SendRequest<Body>),
}

impl<C: Connect> Pool<C> {
    /// An empty one, which keeps up to `most` connections without a request on them.
    pub fn new(connector: C, keep_alive: Duration, most: usize) -> Self {
        let kept = Kept { connections: Vec::new(), most, is_watched: false };
        Self { connector, kept: Arc::new(Mutex::new(kept)), keep_alive }
    }

    /// Sends a request and returns the head of its answer. The request is taken out, unless it was not begun: a future that takes
    /// one has room for it twice, and each of those around it once or twice more, which was half of what is kept for an
    /// exchange.
    ///
    /// A kept connection that was closed meanwhile hands a request back that it did not begin; another is found for it.
    ///
    /// # Errors
    /// If there is no connection, or no answer in time.
    pub async fn request(
        &self,
        origin: &Origin,
        request: &mut Request<Body>,
        patience: Patience,
    ) -> Result<Response<Incoming>, PoolError> {
        let mut begun = Instant::now();
        loop {
            let (mut connection, is_reused) = match self.take(origin, begun) {
                Some(kept) => (kept, true),
                None => {
                    // Seldom, and large.
                    let connected = Box::pin(self.connect(origin)).await?;
                    begun = Instant::now();
                    connected
                }
            };
            match connection.send(request, &patience, begun).await {
                Ok(answer) => {
                    self.give_back(connection);
                    return Ok(answer);
                }
                Err(Unanswered::Failed { is_unsent: true, .. }) if is_reused => {}
                Err(Unanswered::Failed { source, .. }) => {
                    let was_stale = connection.was_stale(is_reused, &source);
                    return Err(PoolError::Exchange { source, was_stale });
                }
                Err(Unanswered::Late) => return Err(PoolError::Late),
            }
        }
    }

    /// A kept connection to `origin`, the last used one: the others' time may come to an end.
    fn take(&self, origin: &Origin, now: Instant) -> Option<Connection> {
        // Closed when nobody waits for it any more.
        let mut over = Vec::new();
        let mut kept = lock(&self.kept);
        let connections = &mut kept.connections;
        let mut at = connections.len();
        while let Some(before) = at.checked_sub(1) {
            at = before;
            let connection = &mut connections[at];
            if connection.is_over(now, self.keep_alive) {
                over.push(connections.remove(at));
            } else if connection.origin == *origin {
                connection.last_used = now;
                return Some(connection.shared().unwrap_or_else(|| connections.remove(at)));
            }
        }
        None
    }

    /// A new connection, or one that another request has got meanwhile: whether it is such a one.
    async fn connect(&self, origin: &Origin) -> Result<(Connection, bool), PoolError> {
        let stream = self.connector.connect(origin.uri(None)).await.map_err(PoolError::Connect)?;
        if stream.is_http2()
            && let Some(shared) = self.take(origin, Instant::now())
        {
            // Of several requests at once this was not the first, and one connection takes them all.
            return Ok((shared, true));
        }
        let failed = |source| PoolError::Exchange { source, was_stale: false };
        let (history, is_http2) = (stream.history(), stream.is_http2());
        let stream = TokioIo::new(stream);
        // How a connection ended, its last request is told.
        let sender = if is_http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT)
                .keep_alive_while_idle(true);
            let (sender, driver) = builder.handshake(stream).await.map_err(failed)?;
            tokio::spawn(driver);
            Sender::Http2(sender)
        } else {
            let mut builder = http1::Builder::new();
            builder.preserve_header_case(true);
            let (sender, driver) = builder.handshake(stream).await.map_err(failed)?;
            tokio::spawn(filtered(driver));
            Sender::Http1(sender)
        };
        let (origin, last_used) = (origin.clone(), Instant::now());
        let connection = Connection { origin, sender, history, last_used, alarm: alarm() };
        if let Some(shared) = connection.shared() {
            keep(&self.kept, shared, self.keep_alive);
        }
        Ok((connection, false))
    }

    /// Keeps a connection as soon as its answer is read.
    fn give_back(&self, mut connection: Connection) {
        let Sender::Http1(sender) = &mut connection.sender else { return };
        if sender.is_ready() {
            keep(&self.kept, connection, self.keep_alive);
            return;
        }
        let (kept, keep_alive) = (Arc::downgrade(&self.kept), self.keep_alive);
        tokio::spawn(async move {
            let Sender::Http1(sender) = &mut connection.sender else { return };
            if poll_fn(|cx| sender.poll_ready(cx)).await.is_ok()
                && let Some(kept) = kept.upgrade()
            {
                keep(&kept, connection, keep_alive);
            }
        });
    }
}

/// Why a connection gave no answer.
enum Unanswered {
    Failed {
        source: hyper::Error,
        /// The request was not begun, and is where it was.
        is_unsent: bool,
    },
    Late,
}

/// Far off; each request sets it.
fn alarm() -> Pin<Box<Sleep>> {
    Box::pin(sleep(Duration::MAX))
}

/// What comes of `future`, if that is before the end; the end is asked for again when it has come.
async fn in_time<F: Future>(
    mut alarm: Pin<&mut Sleep>,
    end: impl Fn() -> Instant,
    future: F,
) -> Option<F::Output> {
    let mut future = pin!(future);
    alarm.as_mut().reset(end());
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        while alarm.as_mut().poll(cx).is_ready() {
            let end = end();
            if end <= alarm.deadline() {
                return Poll::Ready(None);
            }
            alarm.as_mut().reset(end);
        }
        Poll::Pending
    })
    .await
}

fn taken(request: &mut Request<Body>) -> Request<Body> {
    std::mem::replace(request, Request::new(Body::empty()))
}

impl Connection {
    /// Sends a request, unless it cannot be begun.
    async fn send(
        &mut self,
        request: &mut Request<Body>,
        patience: &Patience,
        begun: Instant,
    ) -> Result<Response<Incoming>, Unanswered> {
        let (alarm, end) = (self.alarm.as_mut(), || patience.end(begun));
        let answer = match &mut self.sender {
            Sender::Http1(sender) => {
                // RFC 9112 section 3.2.1: an origin is sent no more than the path and query.
                if let Some(authority) = request.uri().authority() {
                    // One that a connection of HTTP/2 has handed back has its name there alone.
                    let named = HeaderValue::from_str(authority.as_str());
                    if let (Entry::Vacant(host), Ok(named)) =
                        (request.headers_mut().entry(HOST), named)
                    {
                        host.insert(named);
                    }
                    let path = request.uri().path_and_query().cloned();
                    *request.uri_mut() = path.map(Uri::from).unwrap_or_default();
                }
                in_time(alarm, end, sender.try_send_request(taken(request))).await
            }
            Sender::Http2(sender) => {
                self.origin.make_http2(request);
                in_time(alarm, end, sender.try_send_request(taken(request))).await
            }
        };
        answer.ok_or(Unanswered::Late)?.map_err(|mut failed| {
            let unsent = failed.take_message();
            let is_unsent = unsent.is_some();
            if let Some(unsent) = unsent {
                *request = unsent;
            }
            Unanswered::Failed { source: failed.into_error(), is_unsent }
        })
    }

    /// The same once more, if it takes several requests at once.
    fn shared(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        Some(Self {
            origin: self.origin.clone(),
            sender: Sender::Http2(sender.clone()),
            history: self.history.clone(),
            last_used: self.last_used,
            alarm: alarm(),
        })
    }

    /// It is closed, or may be at any moment.
    fn is_over(&self, now: Instant, keep_alive: Duration) -> bool {
        let is_closed = match &self.sender {
            Sender::Http1(sender) => sender.is_closed(),
            Sender::Http2(sender) => sender.is_closed(),
        };
        is_closed || now.duration_since(self.last_used) >= keep_alive
    }

    /// Whether it was closed before it said a word on a request, and may have been so before that was sent. On a connection of
    /// HTTP/2, others may have had their answers meanwhile.
    fn was_stale(&self, is_reused: bool, error: &hyper::Error) -> bool {
        match &self.sender {
            Sender::Http1(_) => self.history.was_stale(),
            Sender::Http2(_) => {
                // What h2 says itself, it says of a connection that is there; and a ping that nobody answers tells of nothing.
                let is_said = error.source().is_some_and(|cause| cause.is::<h2::Error>());
                is_reused && !is_said && !error.is_timeout()
            }
        }
    }
}

/// Keeps a connection until its time is over.
fn keep(pool: &Arc<Mutex<Kept>>, mut connection: Connection, keep_alive: Duration) {
    connection.last_used = Instant::now();
    let mut kept = lock(pool);
    let is_full = kept.connections.len() == kept.most;
    let longest_unused = is_full.then(|| kept.connections.remove(0));
    kept.connections.push(connection);
    if !std::mem::replace(&mut kept.is_watched, true) {
        tokio::spawn(watch(Arc::downgrade(pool), keep_alive));
    }
    drop(kept);
    drop(longest_unused);
}

/// Closes connections whose time is over, as long as there are any.
async fn watch(pool: Weak<Mutex<Kept>>, keep_alive: Duration) {
    loop {
        tokio::time::sleep(keep_alive).await;
        let Some(pool) = pool.upgrade() else { return };
        let (now, mut kept) = (Instant::now(), lock(&pool));
        let over = |connection: &mut Connection| connection.is_over(now, keep_alive);
        let over: Vec<_> = kept.connections.extract_if(.., over).collect();
        kept.is_watched = !kept.connections.is_empty();
        let is_watched = kept.is_watched;
        // To close many takes its time, for which nobody waits.
        drop(kept);
        drop(over);
        if !is_watched {
            return;
        }
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    // It is whole between any two statements: a poisoned lock is as good as any.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// How long an answer that never comes is waited for, the end as of when each wait begins.
    async fn waited(alarm: &mut Pin<Box<Sleep>>, end: impl Fn(Instant) -> Instant) -> Duration {
        let begun = Instant::now();
        let answer = in_time(alarm.as_mut(), || end(begun), pending::<()>()).await;
        assert!(answer.is_none());
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_that_went_off_while_nobody_waited_ends_the_next_wait_in_time_and_not_before()
    {
        let mut alarm = alarm();
        let end = Instant::now() + LIMIT;
        assert!(in_time(alarm.as_mut(), || end, ready(())).await.is_some());
        tokio::time::sleep(2 * LIMIT).await;
        assert_eq!(waited(&mut alarm, |begun| begun + LIMIT).await, LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_is_put_off_and_brought_forward_from_one_wait_to_the_next() {
        let mut alarm = alarm();
        for limit in [LIMIT, 2 * LIMIT, LIMIT / 2, LIMIT] {
            assert_eq!(waited(&mut alarm, |begun| begun + limit).await, limit);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_moves_is_waited_for_until_it_moves_no_more() {
        let moved_until = Instant::now() + 3 * LIMIT;
        let end = |_| Instant::now().min(moved_until) + LIMIT;
        assert_eq!(waited(&mut alarm(), end).await, 4 * LIMIT);
    }
}
