//! The requests of one connection, as hyper hands them over.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, Response, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

use super::super::body::Unread;
use super::super::connect::Peer;
use super::super::stack::{Arrived, Observed};
use super::super::stage::Handle;
use super::super::streams::{self, Activity};
use super::TakesOver;
use super::protocols::Served;

/// The exchanges of one connection.
pub(super) struct Exchanges<H> {
    pub served: Arc<ArcSwap<Served<H>>>,
    pub peer: Arc<Peer>,
    pub end: Arc<Ends>,
    /// Of HTTP/2.
    pub streams: Option<Arc<Activity>>,
}

/// What ends a connection. Shared by its exchanges as one, since a token's clones are counted under a lock.
pub(super) struct Ends {
    /// What takes the connection over (HTTP/1).
    pub taken: OnceLock<TakesOver>,
    /// What its client has not sent yet, or nobody has read (HTTP/1).
    pub unread: Unread,
    pub drain: CancellationToken,
}

impl<H> Service<Request<Incoming>> for Exchanges<H>
where
    H: Handle<Arrived, Response = Response<Observed>, Error = Infallible>,
{
    type Response = Response<Observed>;
    type Error = Infallible;
    // hyper keeps room for the future in each connection: a pointer's, not the stack's.
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let served = self.served.load_full();
        let end = Arc::clone(&self.end);
        if let Some(streams) = &self.streams {
            streams.begin();
        }
        let (version, is_http1) = (request.version(), request.version() < Version::HTTP_2);
        let is_stream = request.method() == Method::CONNECT && !is_http1;
        let upgrade = is_stream.then(|| hyper::upgrade::on(&mut request));
        // Here, since hyper drops a future that it has not polled yet if it sees the client leave.
        let arrived = served.begin.exchange(request, Arc::clone(&self.peer));
        Box::pin(async move {
            let mut response = served.stack.handle(arrived).await?;
            streams::got_on();
            if let Some(takes) = response.extensions_mut().remove::<TakesOver>() {
                match upgrade {
                    // A connection becomes one tunnel only: then it is HTTP no more.
                    None => drop(end.taken.set(takes)),
                    Some(upgrade) => drop(tokio::spawn(async move {
                        if let Ok(stream) = upgrade.await {
                            let _ = takes.0.send(Box::new(TokioIo::new(stream))).await;
                        }
                    })),
                }
            } else if is_http1
                && (end.drain.is_cancelled()
                    || end.unread.is_some()
                    // To HTTP/1.0, only the connection's end tells a message's that has no length.
                    || (version == Version::HTTP_10 && response.body().size_hint().exact().is_none()))
            {
                // Whatever the client does next, it is not on this connection (RFC 9112 section 9.6).
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                // Of another version, hyper would add that it stays open.
                *response.version_mut() = version;
            }
            Ok(response)
        })
    }
}
