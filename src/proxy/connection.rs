//! One downstream connection: HTTP/1 or HTTP/2 by its first bytes, and next to nothing while it is silent.
//!
//! hyper keeps two buffers of 8 KiB for each connection, requests or not. So it gets an HTTP/1 connection only
//! for as long as there is something to do on it: one that has fallen silent is taken back, with whatever hyper
//! had read ahead, and waits with a socket and a deadline alone. That also puts the keep-alive time and
//! the answer to an unreadable head into our hands.

mod exchanges;
pub(crate) mod first;
mod protocols;

use std::convert::Infallible;
use std::future::{Future, pending, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, DATE};
use http::{HeaderValue, Response, StatusCode};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use self::exchanges::{Ends, Exchanges};
use self::first::{PREFACE, first_bytes};
pub(super) use self::protocols::Served;
use self::protocols::{Protocols, breach};
use super::body::Body;
use super::connect::{Peer, Stream};
use super::error::Error;
use super::io::{Downstream, Head, HeadTimer, READ, is_over};
use super::stack::{Arrived, Observed};
use super::stage::Handle;
use super::streams::Activity;
use super::wakes::WakeFilter;
use crate::intercept::tunnel::Rewound;
use crate::observe::exchange::cut;
use crate::observe::metrics::Metrics;

/// How long, from the last sign of life of a connection on, a request may be on its way when the proxy is to stop.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// How long a connection has to be silent before it is taken back: beyond what lies between the requests of a
/// busy client, which shall not pay for it.
const SILENCE: Duration = Duration::from_millis(50);

/// How long a client that still sends after its answer is listened to, and how long between two pieces: closing at once would
/// reset the connection under the answer (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(5);
const LINGER_SILENCE: Duration = Duration::from_secs(1);
const LINGER_BUFFER: usize = 8 * 1024;

/// How often a connection is read from before others have their turn, if each time more has come than is read at once.
const READS: usize = 16;

/// Marks the answer to a CONNECT: what takes the connection over once that was sent.
#[derive(Clone)]
pub(super) struct TakesOver(pub mpsc::Sender<Box<dyn Stream>>);

/// What serves connections.
pub(super) struct Serving<H> {
    /// Looked up by each request, and whenever a connection was silent, so that a reload reaches those that are open.
    served: Arc<ArcSwap<Served<H>>>,
    /// By which the connection is served now.
    protocols: Arc<Protocols>,
    pub metrics: Arc<Metrics>,
    pub stop: CancellationToken,
    /// Connections close after their answer; `stop` implies it.
    pub drain: CancellationToken,
}

impl<H> Serving<H> {
    pub fn new(
        served: Arc<ArcSwap<Served<H>>>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
        drain: CancellationToken,
    ) -> Self {
        let protocols = Arc::clone(&served.load().protocols);
        Self { served, protocols, metrics, stop, drain }
    }
}

impl<H> Clone for Serving<H> {
    fn clone(&self) -> Self {
        Self {
            served: Arc::clone(&self.served),
            protocols: Arc::clone(&self.protocols),
            metrics: Arc::clone(&self.metrics),
            stop: self.stop.clone(),
            drain: self.drain.clone(),
        }
    }
}

/// A connection on which nothing is to do.
struct Silent<T> {
    stream: T,
    /// There was something to do before.
    was_asked: bool,
}

/// How hyper's part of an HTTP/1 connection came to its end.
enum End {
    /// By itself.
    Done(hyper::Result<()>),
    /// Nothing is to do.
    Silent,
    /// A head was begun, and did not end in time.
    Late,
}

impl<H> Serving<H>
where
    H: Handle<Arrived, Response = Response<Observed>, Error = Infallible>,
{
    /// A connection until its end, or until it becomes a tunnel. Whether its client ever said a word.
    pub async fn connection<T>(mut self, mut stream: T, peer: Peer) -> bool
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (peer, mut spoke) = (Arc::new(peer), false);
        let (mut since, mut asked, mut was_long) = (Instant::now(), false, false);
        loop {
            self.update();
            let limit = if asked { self.protocols.keep_alive } else { self.protocols.head };
            let start = match was_long {
                false => self.next_bytes(&mut stream, since, limit).await,
                true => None,
            };
            let Some(start) = start else {
                // Writes what is put off of an answer, and tells a TLS client that nothing was cut off.
                let _ = timeout(self.protocols.idle, stream.shutdown()).await;
                return spoke;
            };
            spoke = true;
            // That may have been a long time.
            self.update();
            // Boxed, so that a silent connection has no room for what serves a busy one.
            if start.starts_with(PREFACE) {
                Box::pin(self.http2(stream, start, peer)).await;
                return true;
            }
            let Some(silent) = Box::pin(self.http1(stream, start, Arc::clone(&peer))).await else {
                return true;
            };
            stream = silent.stream;
            if silent.was_asked {
                (since, asked) = (Instant::now(), true);
            } else {
                // Lines that are empty put nothing off.
                was_long = since.elapsed() >= limit;
            }
        }
    }

    /// From now on this connection is served by the last configuration.
    fn update(&mut self) {
        self.protocols = Arc::clone(&self.served.load().protocols);
    }

    fn is_outdated(&self) -> bool {
        !Arc::ptr_eq(&self.protocols, &self.served.load().protocols)
    }

    /// Waits for a request to begin: `None` if there will be none.
    ///
    /// `since` there was none, and `limit` is how long that may be.
    async fn next_bytes<T>(&self, stream: &mut T, since: Instant, limit: Duration) -> Option<Bytes>
    where
        T: AsyncRead + Unpin,
    {
        let mut reading = pin!(first_bytes(stream));
        tokio::select! {
            // What has come already is served, even if the proxy is to stop.
            biased;
            bytes = &mut reading => bytes,
            () = sleep_until(since + limit) => None,
            // A client that was busy a moment ago, or has just connected, may have sent its next request already.
            () = self.stop.cancelled() => timeout_at(since + ON_ITS_WAY, reading).await.ok().flatten(),
        }
    }

    fn exchanges(&self, peer: Arc<Peer>, streams: Option<Arc<Activity>>) -> Exchanges<H> {
        let (unread, drain) = (peer.unread.clone(), self.drain.clone());
        let end = Arc::new(Ends { taken: OnceLock::new(), unread, drain });
        Exchanges { served: Arc::clone(&self.served), peer, end, streams }
    }

    /// Serves HTTP/1 until the connection falls silent, and gives it back then.
    async fn http1<T>(&mut self, stream: T, start: Bytes, peer: Arc<Peer>) -> Option<Silent<T>>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let client = peer.address;
        let head = Arc::new(Head::default());
        // Of TLS, no more is read at once than a record, which is half of [`READ`]: to read less would cut each in two, and
        // room for more would be left empty.
        let is_tls = peer.tunnel.is_some();
        let mut io = Downstream::new(stream, start, self.protocols.idle, Arc::clone(&head));
        if !is_tls {
            io = io.sparing(self.protocols.max_body);
        }
        let mut service = self.exchanges(peer, None);
        let mut begun = false;
        loop {
            let mut builder = self.protocols.http1.clone();
            if is_tls {
                builder.max_buf_size(self.protocols.max_head.max(READ / 2));
            }
            builder.timer(HeadTimer::new(Arc::clone(&head)));
            let mut connection = builder.serve_connection(TokioIo::new(io), service);
            let Some(end) = self.drive(&mut connection, &head, begun).await else {
                tracing::warn!(%client, "a request took longer than limits.request_timeout: its connection is closed");
                cut(connection);
                return None;
            };
            let parts = connection.into_parts();
            (io, service) = (parts.io.into_inner(), parts.service);
            match end {
                // Its head goes on where it was. Lines that are empty begin none (RFC 9112 section 2.2).
                End::Silent if !parts.read_buf.iter().all(|it| b"\r\n".contains(it)) => {
                    self.update();
                    io.rewind(parts.read_buf);
                    begun = true;
                }
                // Who has waited for one head has been asked nothing.
                End::Silent => {
                    return Some(Silent { stream: io.into_inner(), was_asked: head.count() > 1 });
                }
                End::Late => {
                    let mut stream = io.into_inner();
                    self.refuse(&mut stream, Error::HeadTimeout, client).await;
                    self.linger(&mut stream, true).await;
                    return None;
                }
                End::Done(ended) => {
                    if let Err(error) = &ended {
                        tracing::debug!(%error, "connection ended");
                    }
                    let mut stream = io.into_inner();
                    if let Some(status) = head.refused() {
                        let error = match status {
                            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Error::HeadTooLong,
                            StatusCode::URI_TOO_LONG => {
                                Error::TargetTooLong(self.protocols.max_target)
                            }
                            _ => Error::BadHead,
                        };
                        self.refuse(&mut stream, error, client).await;
                    } else if let Some(TakesOver(takes)) = service.end.taken.get() {
                        // Fails only where nobody waits for it any more.
                        let _ = takes.try_send(Box::new(Rewound::new(parts.read_buf, stream)));
                        return None;
                    }
                    // Behind a head that could not be read, a body may come.
                    let unread = head.refused().is_some() || service.end.unread.is_some();
                    self.linger(&mut stream, unread).await;
                    return None;
                }
            }
        }
    }

    /// Lets hyper do its part; `None` if an exchange took longer than any may. `begun`: the connection was given back in
    /// the middle of a head.
    async fn drive<T>(
        &self,
        connection: &mut http1::Connection<TokioIo<Downstream<T>>, Exchanges<H>>,
        head: &Head,
        begun: bool,
    ) -> Option<End>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut stop = pin!(self.stop.cancelled());
        let mut clock = pin!(sleep(SILENCE));
        let first = head.count() + 1;
        let (mut seen, mut until) = (None, clock.deadline());
        let mut filter = WakeFilter::default();
        poll_fn(|cx| {
            // What is read now is another configuration's.
            if head.waits() && self.is_outdated() {
                return Poll::Ready(Some(End::Silent));
            }
            for _ in 0..READS {
                let mut cx = Context::from_waker(filter.waker(cx.waker()));
                if let Poll::Ready(ended) = Pin::new(&mut *connection).poll(&mut cx) {
                    return Poll::Ready(Some(End::Done(ended)));
                }
                if !head.has_more() {
                    break;
                }
            }
            let (waits, count) = (head.waits(), head.count());
            let in_begun = begun && count == first;
            let (limit, end) = match waits {
                false => (self.protocols.whole, None),
                true if in_begun => (self.protocols.head, Some(End::Late)),
                // Ended by hyper, it would lose what hyper has of a head.
                true if stop.as_mut().poll(cx).is_ready() => return Poll::Ready(Some(End::Silent)),
                true => (SILENCE, Some(End::Silent)),
            };
            if seen.replace((waits, count)) != Some((waits, count)) {
                until = Instant::now() + limit;
                if let Some(End::Silent) = end {
                    until = self.protocols.together(until);
                }
                // It never comes after `until`; if it comes before, it is set again. To put a timer off costs next to
                // nothing, to bring it forward costs a lock.
                if waits || clock.deadline() > until {
                    clock.as_mut().reset(until);
                }
            }
            if is_over(clock.as_mut(), cx, || until) { Poll::Ready(end) } else { Poll::Pending }
        })
        .await
    }

    /// Says what is wrong with a head that could not be read, where hyper would send a bare status or nothing.
    async fn refuse<T: AsyncWrite + Unpin>(
        &self,
        stream: &mut T,
        error: Error,
        client: SocketAddr,
    ) {
        self.metrics.malformed.inc();
        let problem = error.problem();
        tracing::warn!(%client, status = problem.status.as_u16(), error = problem.name, "no request could be read");
        let mut response = problem.into_response();
        let Body::Buffered(body) = std::mem::replace(response.body_mut(), Body::empty()) else {
            return;
        };
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let date = httpdate::fmt_http_date(SystemTime::now());
        if let Ok(date) = HeaderValue::from_maybe_shared(Bytes::from(date)) {
            headers.insert(DATE, date);
        }
        let mut message = format!("HTTP/1.1 {}\r\n", response.status()).into_bytes();
        for (name, value) in response.headers() {
            message.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
        message.extend_from_slice(b"\r\n");
        message.extend_from_slice(&body);
        let writing = async {
            stream.write_all(&message).await?;
            stream.shutdown().await
        };
        // Who takes no answer, this one or one before it, is let go.
        let _ = timeout(self.protocols.idle, writing).await;
    }

    /// Lets a client that still sends, as it must if something is `unread`, read what it was told, before the connection closes.
    async fn linger<T: AsyncRead + Unpin>(&self, stream: &mut T, unread: bool) {
        let mut byte = [0];
        let more = poll_fn(|cx| {
            let mut buffer = ReadBuf::new(&mut byte);
            let polled = Pin::new(&mut *stream).poll_read(cx, &mut buffer);
            Poll::Ready(match polled.is_ready() {
                true => !buffer.filled().is_empty(),
                false => unread,
            })
        });
        if !more.await {
            return;
        }
        let draining = async {
            // Not in the future, whose room every connection has.
            let mut buffer = Vec::with_capacity(LINGER_BUFFER);
            while let Ok(Ok(1..)) = timeout(LINGER_SILENCE, stream.read_buf(&mut buffer)).await {
                buffer.clear();
            }
        };
        // All is answered, so a stop does not wait for it as long.
        let stopped = async {
            self.stop.cancelled().await;
            sleep(LINGER_SILENCE).await;
        };
        tokio::select! {
            _ = timeout(LINGER, draining) => {}
            () = stopped => {}
        }
    }

    async fn http2<T>(&self, stream: T, start: Bytes, peer: Arc<Peer>)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let client = peer.address;
        let io = Downstream::new(stream, start, self.protocols.idle, Arc::default());
        let streams = Activity::new();
        let service = self.exchanges(peer, Some(Arc::clone(&streams)));
        // One that comes while the proxy drains, and stays, is served until it is to stop.
        let ends = if self.drain.is_cancelled() { &self.stop } else { &self.drain };
        let is_over = async {
            tokio::select! {
                () = ends.cancelled() => {}
                // However often it answers to a ping.
                () = streams.ended(self.protocols.head, self.protocols.keep_alive) => {}
            }
        };
        let connection = self.protocols.http2.serve_connection(TokioIo::new(io), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = is_over => {
                connection.as_mut().graceful_shutdown();
                // hyper waits until its client has answered a ping. One that does not read never does; if it has asked nothing, it
                // has no answer to lose.
                let unused = async {
                    sleep(ON_ITS_WAY).await;
                    if streams.has_begun() {
                        pending::<()>().await;
                    }
                };
                tokio::select! {
                    ended = connection => ended,
                    () = unused => return,
                }
            }
        };
        let Err(error) = ended else { return };
        if let Some(reason) = breach(&error) {
            self.metrics.malformed.inc();
            tracing::warn!(%client, error = %reason, "what came is no HTTP/2, or too much of it: its connection is closed");
        } else {
            tracing::debug!(%error, "connection ended");
        }
    }
}

#[cfg(test)]
mod tests;
