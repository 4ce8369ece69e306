//! Connections to upstreams, kept for the next request (RFC 9112 section 9.3).
//!
//! What a general client does beside that, it does for each request: it hashes where the request goes to, and lets two
//! futures race for a connection. Most requests go to one origin and find one. Done without, a request that is passed on
//! takes a tenth less CPU time on one thread, and a sixth less on several.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep};

use super::body::{Body, Progress};
use super::io::{History, Remembering, is_over};
use super::wakes::filtered;

/// Opens connections.
pub(super) trait Connect: Send + Sync + 'static {
    /// What it opens.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

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
    fn uri(&self) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
        Uri::from_parts(parts).expect("it has all three parts")
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
    /// The longest unused first.
    connections: Vec<Connection>,
    /// The most of them. To close what is used again in a moment costs more than to keep it: of 1,000 clients at once, two
    /// requests of three opened a connection where 64 were kept.
    most: usize,
    /// Something closes those whose time is over.
    is_watched: bool,
}

/// A connection without a request on it.
struct Connection {
    origin: Origin,
    sender: http1::SendRequest<Body>,
    history: History,
    last_used: Instant,
    /// Ends the wait for an answer. It goes on to the next request: to put a timer off costs next to nothing, to set one and to
    /// take it back costs two locks.
    alarm: Pin<Box<Sleep>>,
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
    /// A kept connection that was closed meanwhile hands a request back that it did not begin; another is found for it. One that is
    /// to be `fresh` gets a connection of its own: those that are kept may all be as stale as the one that it met before.
    ///
    /// # Errors
    /// If there is no connection, or no answer in time.
    pub async fn request(
        &self,
        origin: &Origin,
        request: &mut Request<Body>,
        patience: Patience,
        fresh: bool,
    ) -> Result<Response<Incoming>, PoolError> {
        let mut begun = Instant::now();
        loop {
            let kept = if fresh { None } else { self.take(origin, begun) };
            let is_reused = kept.is_some();
            let mut connection = match kept {
                Some(kept) => kept,
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
                    let was_stale = is_reused && !connection.history.is_answered();
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
        let mut kept = self.kept.lock();
        let connections = &mut kept.connections;
        let mut at = connections.len();
        while let Some(before) = at.checked_sub(1) {
            at = before;
            let connection = &connections[at];
            if connection.is_over(now, self.keep_alive) {
                over.push(connections.remove(at));
            } else if connection.origin == *origin {
                return Some(connections.remove(at));
            }
        }
        None
    }

    async fn connect(&self, origin: &Origin) -> Result<Connection, PoolError> {
        let stream = self.connector.connect(origin.uri()).await.map_err(PoolError::Connect)?;
        let history = stream.history();
        let mut builder = http1::Builder::new();
        builder.preserve_header_case(true);
        let handshake = builder.handshake(TokioIo::new(stream)).await;
        let failed = |source| PoolError::Exchange { source, was_stale: false };
        let (sender, driver) = handshake.map_err(failed)?;
        // How a connection ended, its last request is told.
        tokio::spawn(filtered(driver));
        let (origin, last_used, alarm) = (origin.clone(), Instant::now(), alarm());
        Ok(Connection { origin, sender, history, last_used, alarm })
    }

    /// Keeps a connection as soon as its answer is read.
    fn give_back(&self, mut connection: Connection) {
        if connection.sender.is_ready() {
            keep(&self.kept, connection, self.keep_alive);
            return;
        }
        let (kept, keep_alive) = (Arc::downgrade(&self.kept), self.keep_alive);
        tokio::spawn(async move {
            if poll_fn(|cx| connection.sender.poll_ready(cx)).await.is_ok()
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

/// What comes of `future`, if that is before the end; the end is asked for again when it has come. Pinned by who waits: what is moved
/// is copied, and a request that could not be sent has room in it.
fn in_time<F: Future>(
    mut alarm: Pin<&mut Sleep>,
    end: impl Fn() -> Instant,
    mut future: Pin<&mut F>,
) -> impl Future<Output = Option<F::Output>> {
    alarm.as_mut().reset(end());
    poll_fn(move |cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        if is_over(alarm.as_mut(), cx, &end) { Poll::Ready(None) } else { Poll::Pending }
    })
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
        // RFC 9112 section 3.2.1: an origin is sent no more than the path and query.
        if request.uri().authority().is_some() {
            let path = request.uri().path_and_query().cloned();
            *request.uri_mut() = path.map(Uri::from).unwrap_or_default();
        }
        self.history.begin();
        let mut sending = pin!(self.sender.try_send_request(taken(request)));
        let end = || patience.end(begun);
        let answer = in_time(self.alarm.as_mut(), end, sending.as_mut()).await;
        answer.ok_or(Unanswered::Late)?.map_err(|mut failed| {
            let unsent = failed.take_message();
            let is_unsent = unsent.is_some();
            if let Some(unsent) = unsent {
                *request = unsent;
            }
            Unanswered::Failed { source: failed.into_error(), is_unsent }
        })
    }

    /// It is closed, or may be at any moment.
    fn is_over(&self, now: Instant, keep_alive: Duration) -> bool {
        self.sender.is_closed() || now.duration_since(self.last_used) >= keep_alive
    }
}

/// Keeps a connection until its time is over.
fn keep(pool: &Arc<Mutex<Kept>>, mut connection: Connection, keep_alive: Duration) {
    connection.last_used = Instant::now();
    let mut kept = pool.lock();
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
        let (now, mut kept) = (Instant::now(), pool.lock());
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

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// How long an answer that never comes is waited for, the end as of when each wait begins.
    async fn waited(alarm: &mut Pin<Box<Sleep>>, end: impl Fn(Instant) -> Instant) -> Duration {
        let begun = Instant::now();
        let answer = in_time(alarm.as_mut(), || end(begun), pin!(pending::<()>())).await;
        assert!(answer.is_none());
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_that_went_off_while_nobody_waited_ends_the_next_wait_in_time_and_not_before()
    {
        let mut alarm = alarm();
        let end = Instant::now() + LIMIT;
        assert!(in_time(alarm.as_mut(), || end, pin!(ready(()))).await.is_some());
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
