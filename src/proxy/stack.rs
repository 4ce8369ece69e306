//! The spine: every layer that a request passes, outermost first.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HOST, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tower::ServiceBuilder;

use super::body::{Body, BodyError};
use super::error::Error;
use super::headers::Headers;
use super::retry::Retry;
use super::sanitize::Sanitize;
use super::stage::{Handle, Stage, StageLayer};
use super::upstream::Upstream;
use crate::config::Config;
use crate::observe::exchange::{Exchange, Line};
use crate::observe::metrics::Metrics;

/// The whole way of a request, from a parsed head to an answer.
pub(super) fn stack(
    config: &Arc<Config>,
    metrics: &Arc<Metrics>,
    upstream: Upstream,
) -> impl Handle<Request<Incoming>, Response = Response<Observed>, Error = Infallible> {
    ServiceBuilder::new()
        // Outermost, so that one line and one report tell the client's view, whatever happens below.
        .layer(StageLayer(Observe { config: Arc::clone(config), metrics: Arc::clone(metrics) }))
        // The only place where an error becomes a response.
        .layer(StageLayer(Problems))
        // Before anything is read: a target that is not served costs nothing.
        .layer(StageLayer(Target { config: Arc::clone(config) }))
        // Above the retry: a body is inspected once, and what is sent again is what was sent.
        .layer(StageLayer(Sanitize { config: Arc::clone(config) }))
        // Above the headers: each attempt is a request of its own to the upstream.
        .layer(StageLayer(Retry::new(Arc::clone(config))))
        // Just above the wire, so that nothing above sees the upstream's side of the message.
        .layer(StageLayer(Headers::new(Arc::clone(config))))
        .service(upstream)
}

/// The report of a contact write, for the client (RFC 9651).
const REPORT: HeaderName = HeaderName::from_static("optin-proxy");

/// Keeps the record of an exchange.
#[derive(Clone)]
struct Observe {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
}

impl<S> Stage<Request<Incoming>, S> for Observe
where
    S: Handle<Request<Incoming>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Observed>;
    type Error = Infallible;

    async fn handle(
        &self,
        mut request: Request<Incoming>,
        inner: &S,
    ) -> Result<Response<Observed>, Infallible> {
        let exchange = Arc::new(Exchange::begin(&request, Arc::clone(&self.metrics)));
        request.extensions_mut().insert(Arc::clone(&exchange));
        // Written even if the client goes away and this future with it.
        let mut line = Line { exchange, complete: false, sent: 0 };

        let mut response = inner.handle(request).await?;

        line.exchange.answered(response.status());
        // Nobody else's report is taken for ours.
        response.headers_mut().remove(REPORT);
        if self.config.log.report_header
            && let Some(report) = line.exchange.report()
        {
            response.headers_mut().insert(REPORT, report);
        }
        Ok(response.map(|body| {
            line.complete = body.is_end_stream();
            Observed { body, line }
        }))
    }
}

/// A response's body that ends the record of its exchange.
pub struct Observed {
    body: Body,
    line: Line,
}

impl http_body::Body for Observed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.line.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
                self.line.complete = self.body.is_end_stream();
            }
            Poll::Ready(None) => self.line.complete = true,
            Poll::Ready(Some(Err(error))) => {
                tracing::warn!(error = %error, "answer broke off");
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Answers for the proxy where it has an answer of its own.
#[derive(Clone)]
struct Problems;

impl<S> Stage<Request<Incoming>, S> for Problems
where
    S: Handle<Request<Incoming>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Infallible;

    async fn handle(
        &self,
        request: Request<Incoming>,
        inner: &S,
    ) -> Result<Response<Body>, Infallible> {
        let exchange = request.extensions().get::<Arc<Exchange>>().cloned().unwrap_or_default();
        let to_head = request.method() == http::Method::HEAD;
        Ok(match inner.handle(request).await {
            Ok(response) => response,
            Err(error) => {
                let problem = error.problem();
                exchange.failed(problem.name, &error);
                let response = problem.into_response();
                // hyper drops a body to HEAD on HTTP/1 only.
                if to_head { response.map(|_| Body::empty()) } else { response }
            }
        })
    }
}

/// Marks a request of a client that knows this proxy as a proxy, not as the API: no id of it carries
/// the proxy's own origin.
#[derive(Debug, Clone, Copy)]
pub(super) struct AbsoluteForm;

/// Decides whether a target is served, and names its host in one way.
#[derive(Clone)]
struct Target {
    config: Arc<Config>,
}

impl<S> Stage<Request<Incoming>, S> for Target
where
    S: Handle<Request<Incoming>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(
        &self,
        mut request: Request<Incoming>,
        inner: &S,
    ) -> Result<Response<Body>, Error> {
        if request.method() == http::Method::CONNECT {
            return Err(Error::Connect);
        }
        // hyper undoes chunks, and would drop the name of any other transfer coding with them.
        if request
            .headers()
            .get_all(TRANSFER_ENCODING)
            .into_iter()
            .any(|coding| !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"))
        {
            return Err(Error::TransferCoding);
        }
        // RFC 9112 section 3.2: which of two is meant, nobody can say.
        if request.headers().get_all(HOST).into_iter().count() > 1 {
            return Err(Error::SeveralHosts);
        }
        if let Some(authority) = request.uri().authority().cloned() {
            if authority.as_str().contains('@') {
                return Err(Error::BadTarget);
            }
            let is_absolute_form = request.version() != http::Version::HTTP_2;
            let upstream = &self.config.upstream.authority;
            if is_absolute_form {
                let same_host = authority.host().eq_ignore_ascii_case(upstream.host());
                let port = authority.port_u16();
                if !same_host
                    || !(port == upstream.port_u16() || port.is_none_or(|port| port == 80))
                {
                    return Err(Error::ForeignTarget);
                }
                request.extensions_mut().insert(AbsoluteForm);
            }
            // RFC 9112 section 3.2.2: the target's authority counts, whatever Host says. HTTP/2 has
            // it in :authority.
            if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
                request.headers_mut().insert(HOST, host);
            }
        }
        inner.handle(request).await
    }
}
