//! The spine: every layer that a request passes, outermost first.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, Entry, HOST, TRANSFER_ENCODING};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::Semaphore;
use tower::ServiceBuilder;

use super::body::{Body, BodyError, Side, Streaming};
use super::budget::Budget;
use super::call::{Call, Forward};
use super::connect::{Connect, Peer, Target, unreachable};
use super::error::Error;
use super::headers::{Headers, is_ours};
use super::retry::Retry;
use super::sanitize::Sanitize;
use super::stage::{Handle, Stage, StageLayer};
use super::streams;
use super::upstream::Upstream;
use crate::config::{Config, Limits};
use crate::intercept::Way;
use crate::observe::exchange::{Exchange, Line};
use crate::observe::ids::REQUEST_ID;
use crate::observe::journal::Journal;
use crate::observe::metrics::Metrics;
use crate::observe::record::Decision;

/// The whole way of a request, from a parsed head to an answer.
pub(super) fn stack(
    config: &Arc<Config>,
    upstream: Upstream,
    connect: Connect,
    budget: &Arc<Budget>,
) -> impl Handle<Arrived, Response = Response<Observed>, Error = Infallible> + use<> {
    ServiceBuilder::new()
        // Outermost, so that one line and one report tell the client's view, whatever happens below.
        .layer(StageLayer(Observe { has_report: config.log.report_header }))
        // The only place where an error becomes a response.
        .layer(StageLayer(Problems))
        // Before any work: what is too much is refused at once, and never queued.
        .layer(StageLayer(Shed::new(&config.limits)))
        // Before anything is read: a target that is not served costs nothing. CONNECT goes no further: what is
        // opened by it comes back from the top.
        .layer(StageLayer(Admit { config: Arc::clone(config), connect: Arc::new(connect) }))
        // Above the retry: a body is inspected once, and what is sent again is what was sent.
        .layer(StageLayer(Sanitize::new(Arc::clone(config))))
        // Above the headers: each attempt is a request of its own to the upstream.
        .layer(StageLayer(Retry::new(Arc::clone(config), Arc::clone(budget))))
        // Just above the wire, so that nothing above sees the upstream's side of the message.
        .layer(StageLayer(Headers::new(Arc::clone(config))))
        .service(upstream)
}

/// A request that has come.
pub(super) struct Arrived {
    call: Box<Call>,
    /// Ends its record, whatever becomes of it: even if its client goes away before anything is done, and the call with it.
    line: Line,
}

/// Begins the record of each exchange.
pub(super) struct Begin {
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    journal: Option<Journal>,
}

impl Begin {
    pub fn new(config: &Arc<Config>, metrics: &Arc<Metrics>, journal: Option<&Journal>) -> Self {
        let (config, metrics) = (Arc::clone(config), Arc::clone(metrics));
        Self { config, metrics, journal: journal.cloned() }
    }

    /// That of a request which came on this connection.
    pub fn exchange(&self, request: Request<Incoming>, peer: Arc<Peer>) -> Arrived {
        let limits = &self.config.limits;
        let is_http2 = request.version() == Version::HTTP_2;
        let request = request.map(|incoming| {
            if incoming.is_end_stream() {
                return Body::empty();
            }
            let stream = Streaming::new(incoming, Side::Downstream, limits.idle_timeout);
            let stream = stream.http2(is_http2).at_least(limits.min_rate);
            Body::Streaming(Box::new(stream.telling(&peer.unread)))
        });
        let (metrics, journal) = (Arc::clone(&self.metrics), self.journal.clone());
        let exchange = Arc::new(Exchange::begin(&request, Some(peer), metrics, journal));
        let (forward, sent) = (None, None);
        let exchanged = Arc::clone(&exchange);
        let call = Call { request, exchange: exchanged, forward, sent, fresh: false };
        Arrived { call: Box::new(call), line: Line { exchange, complete: false, sent: 0 } }
    }
}

/// The report of a contact write, for the client (RFC 9651).
const REPORT: HeaderName = HeaderName::from_static("optin-proxy");

/// Tells an exchange's record of its answer, and the client what was done.
#[derive(Clone)]
struct Observe {
    /// `log.report_header`.
    has_report: bool,
}

impl<S> Stage<Arrived, S> for Observe
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Observed>;
    type Error = Infallible;

    async fn handle(
        &self,
        Arrived { call, mut line }: Arrived,
        inner: &S,
    ) -> Result<Response<Observed>, Infallible> {
        let mut response = inner.handle(call).await?;

        line.exchange.answered(response.status());
        let headers = response.headers_mut();
        // Nobody else's report is taken for ours.
        match self.has_report.then(|| line.exchange.report()).flatten() {
            Some(report) => drop(headers.insert(REPORT, report)),
            None => super::headers::remove(headers, &[REPORT]),
        }
        // The API's own is not taken away.
        if let Entry::Vacant(vacant) = headers.entry(REQUEST_ID)
            && let Some(id) = line.exchange.id().value()
        {
            vacant.insert(id);
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
        streams::got_on();
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.line.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
                // Nobody asks for what is behind trailers.
                self.line.complete = frame.is_trailers() || self.body.is_end_stream();
            }
            Poll::Ready(None) => self.line.complete = true,
            Poll::Ready(Some(Err(error))) => {
                tracing::warn!(request_id = %self.line.exchange.id(), error = %error, "answer broke off");
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

impl<S> Stage<Box<Call>, S> for Problems
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Infallible;

    async fn handle(&self, call: Box<Call>, inner: &S) -> Result<Response<Body>, Infallible> {
        let (request, exchange) = (&call.request, Arc::clone(&call.exchange));
        let to_head = request.method() == Method::HEAD;
        let is_connect = request.method() == Method::CONNECT;
        let is_http1 = request.version() < Version::HTTP_2;
        Ok(match inner.handle(call).await {
            Ok(response) => response,
            Err(error) => {
                let problem = error.problem();
                exchange.failed(problem.name, &error);
                let mut response = problem.into_response();
                // What follows may be meant for the tunnel, or for content of another length, and is no request.
                if is_http1 && (is_connect || matches!(error, Error::LookAlike)) {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                // hyper drops a body to HEAD on HTTP/1 only.
                if to_head { response.map(|_| Body::empty()) } else { response }
            }
        })
    }
}

/// Refuses what is more than can be done at once.
#[derive(Clone)]
struct Shed {
    slots: Arc<Semaphore>,
    most: usize,
}

impl Shed {
    fn new(limits: &Limits) -> Self {
        Self { slots: Arc::new(Semaphore::new(limits.max_requests)), most: limits.max_requests }
    }
}

impl<S> Stage<Box<Call>, S> for Shed
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, call: Box<Call>, inner: &S) -> Result<Response<Body>, Error> {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            return Err(Error::TooManyRequests(self.most));
        };
        call.exchange.holds_slot(slot);
        inner.handle(call).await
    }
}

/// Decides whether a client and its target are served, and names the target's host in one way.
#[derive(Clone)]
struct Admit {
    config: Arc<Config>,
    connect: Arc<Connect>,
}

impl<S> Stage<Box<Call>, S> for Admit
where
    S: Handle<Box<Call>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, mut call: Box<Call>, inner: &S) -> Result<Response<Body>, Error> {
        let Call { request, exchange, forward, .. } = &mut *call;
        let peer = exchange.peer();
        if peer.is_some_and(|peer| !self.config.listen.allows(peer.address.ip())) {
            return Err(Error::ClientDenied);
        }
        let tunnel = peer.and_then(|peer| peer.tunnel.as_deref());
        if request.method() == Method::CONNECT {
            if tunnel.is_some() {
                return Err(Error::NestedConnect);
            }
            self.authenticate(request.headers())?;
            check_message(request)?;
            // RFC 9110 section 9.3.6: what a server takes for content may be meant for the tunnel.
            let headers = request.headers();
            if headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
                || headers.contains_key(TRANSFER_ENCODING)
            {
                return Err(Error::ConnectContent);
            }
            return self.connect.handle(request, exchange).await;
        }
        // RFC 9110 section 9.3.8: it would show the client's credentials to whoever reads the answer.
        if request.method() == Method::TRACE {
            return Err(Error::Trace);
        }
        let target_length = request.uri().path_and_query().map_or(0, |it| it.as_str().len());
        if target_length > self.config.limits.max_target {
            return Err(Error::TargetTooLong(self.config.limits.max_target));
        }
        check_message(request)?;
        // RFC 9112 section 3.2.4: it names the server, of which OPTIONS alone can ask something.
        if request.uri().path() == "*" && request.method() != Method::OPTIONS {
            return Err(Error::BadTarget);
        }
        *forward = match (tunnel, request.uri().authority()) {
            (Some(tunnel), authority) => {
                agree(tunnel, authority, request.headers())?;
                Some(Forward::Api)
            }
            (None, Some(authority)) if request.version() != Version::HTTP_2 => {
                let authority = authority.clone();
                self.authenticate(request.headers())?;
                // Seldom.
                let leads = self.absolute(request.uri().scheme(), &authority, exchange);
                Some(Box::pin(leads).await?)
            }
            // A base URL; HTTP/2 has its authority in a field of its own.
            (None, _) => None,
        };
        name_host(request, tunnel)?;
        inner.handle(call).await
    }
}

impl Admit {
    /// Requests to a proxy carry its credentials (RFC 9110 section 11.7). Those to a base URL cannot, and
    /// reach nothing but the API, which has credentials of its own.
    fn authenticate(&self, headers: &HeaderMap) -> Result<(), Error> {
        match &self.config.listen.proxy_auth {
            Some(credentials) if !credentials.are_in(headers) => Err(Error::ProxyAuth),
            _ => Ok(()),
        }
    }

    /// Where a target in absolute form leads (RFC 9112 section 3.2.2).
    async fn absolute(
        &self,
        scheme: Option<&Scheme>,
        authority: &Authority,
        exchange: &Exchange,
    ) -> Result<Forward, Error> {
        let is_plain = match scheme {
            Some(scheme) if *scheme == Scheme::HTTP => true,
            Some(scheme) if *scheme == Scheme::HTTPS => false,
            _ => return Err(Error::BadTarget),
        };
        let default_port = if is_plain { 80 } else { 443 };
        let target = Target::of(authority, Some(default_port)).map_err(|error| match error {
            Error::BadAuthority(None) => Error::BadTarget,
            error => error,
        })?;
        exchange.concerns(&target);
        let rules = &self.config.intercept.rules;
        let way = rules.judge(&target.host, target.port, is_plain)?;
        let upstream = &self.config.upstream;
        let own_default = if upstream.scheme == Scheme::HTTPS { 443 } else { 80 };
        // By its own port or, where that is the default one, by http's: it is asked by https all the same.
        let is_upstream = Target::of(&upstream.authority, Some(own_default)).is_ok_and(|api| {
            let is_port = api.port == target.port || (api.port == own_default && target.port == 80);
            api.host == target.host && is_port
        });
        match way {
            Way::Intercept => {
                exchange.decided(Decision::Intercepted);
                Ok(Forward::Api)
            }
            // By its own name it is a host like others, and the API if it is let through.
            Way::Elsewhere if is_upstream => {
                let admitted = self.connect.guard.admit(&target.host, target.port).await;
                admitted.map_err(|error| unreachable(error, &target))?;
                exchange.decided(Decision::Intercepted);
                Ok(Forward::Api)
            }
            Way::Elsewhere if is_plain => {
                exchange.decided(Decision::Forwarded);
                Ok(Forward::Elsewhere(Arc::new(target)))
            }
            Way::Elsewhere => Err(Error::ConnectRequired),
        }
    }
}

/// What no request may have, or lack. One look at each field costs less than to look up all that may be wrong.
fn check_message(request: &Request<Body>) -> Result<(), Error> {
    let (mut loops, mut codings, mut unchunked, mut look_alike) = (false, 0, false, false);
    let (mut host, mut hosts) = (None, 0);
    for (name, value) in request.headers() {
        match name.as_str() {
            "via" => loops |= is_ours(value),
            // hyper undoes chunks, and would drop the name of any other transfer coding with them.
            "transfer-encoding" => {
                codings += 1;
                unchunked |= !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
            }
            // Some servers take an underscore for a hyphen, and would read the message in another way.
            "content_length" | "transfer_encoding" => look_alike = true,
            "host" => {
                hosts += 1;
                host = Some(value);
            }
            _ => {}
        }
    }
    if loops {
        return Err(Error::Loop);
    }
    if unchunked || codings > 1 {
        return Err(Error::TransferCoding);
    }
    if look_alike {
        return Err(Error::LookAlike);
    }
    // RFC 9112 section 3.2. Which of two is meant, nobody can say.
    match host {
        _ if hosts > 1 => Err(Error::SeveralHosts),
        Some(host) if !is_host(host) => Err(Error::BadHost),
        // CONNECT names it in its target, and there are clients that leave it at that.
        None if request.method() != Method::CONNECT && must_name_host(request) => {
            Err(Error::BadHost)
        }
        _ => Ok(()),
    }
}

/// HTTP/2 names it in a field of its own.
fn must_name_host(request: &Request<Body>) -> bool {
    match request.version() {
        Version::HTTP_2 => request.uri().authority().is_none(),
        version => version == Version::HTTP_11,
    }
}

/// A host and perhaps a port, or nothing (RFC 9110 section 7.2). Of several with commas between them, nobody can say which is meant.
fn is_host(value: &HeaderValue) -> bool {
    // As nearly all are written.
    if is_plain_host(value.as_bytes()) {
        return true;
    }
    let is_one = |host: &Authority| {
        let port = host.as_str().strip_prefix(host.host());
        host.port_u16().is_some() || matches!(port, Some("" | ":"))
    };
    value.is_empty()
        || !value.as_bytes().iter().any(|byte| b"@,".contains(byte))
            && Authority::try_from(value.as_bytes()).is_ok_and(|host| is_one(&host))
}

/// A name or an IPv4 address, and perhaps a port.
fn is_plain_host(value: &[u8]) -> bool {
    let of_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    let length = value.iter().take_while(|byte| of_name(byte)).count();
    let is_port = match &value[length..] {
        [b':', port @ ..] => {
            let more = |port: u16, digit: &u8| {
                let digit = char::from(*digit).to_digit(10)?;
                port.checked_mul(10)?.checked_add(digit as u16)
            };
            port.iter().try_fold(0, more).is_some()
        }
        rest => rest.is_empty(),
    };
    length > 0 && is_port
}

/// A tunnel was opened for one host: the certificate vouched for it, and for no other.
fn agree(tunnel: &Target, authority: Option<&Authority>, headers: &HeaderMap) -> Result<(), Error> {
    let named = match (authority, headers.get(HOST)) {
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => Authority::try_from(host.as_bytes()).map_err(|_| Error::OtherHost)?,
        (None, None) => return Ok(()),
    };
    match Target::of(&named, Some(tunnel.port)) {
        Ok(named) if named == *tunnel => Ok(()),
        _ => Err(Error::OtherHost),
    }
}

/// RFC 9112 section 3.2.2: the target's authority counts, whatever Host says. HTTP/2 has it in :authority.
fn name_host(request: &mut Request<Body>, tunnel: Option<&Target>) -> Result<(), Error> {
    let name = match (request.uri().authority(), tunnel) {
        (Some(authority), _) if authority.as_str().contains('@') => return Err(Error::BadTarget),
        (Some(authority), _) => authority.to_string(),
        (None, Some(tunnel)) if !request.headers().contains_key(HOST) => tunnel.host.to_string(),
        _ => return Ok(()),
    };
    if let Ok(host) = HeaderValue::from_maybe_shared(Bytes::from(name)) {
        request.headers_mut().insert(HOST, host);
    }
    Ok(())
}
