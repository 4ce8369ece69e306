//! The API's side: a pooled client that verifies whom it speaks to, with a deadline for every wait.

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::TRANSFER_ENCODING;
use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body::Body as _;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::net::TcpStream;
use tower::util::MapResponse;
use tower::{Service, ServiceExt as _};

use super::body::{Body, BodyError, Side, Streaming};
use super::call::{Call, Forward};
use super::connect::Target;
use super::error::Error;
use super::io::Remembering;
use super::pool::{BoxError, Connect, Origin, Patience, Pool, PoolError};
use super::socket::Socket;
use super::stage::Handle;
use crate::config::{self, Config};
use crate::intercept::guard::{ConnectError, Guard};
use crate::intercept::{Denied, HostError};

/// The most connections kept to hosts of the clients' choosing.
const OTHERS: usize = 64;

/// Sends requests to the API.
pub(super) struct Upstream {
    api: Pool<Api>,
    /// Where the API is.
    origin: Origin,
    /// For plain requests to other hosts.
    others: Pool<Guarded>,
    config: Arc<Config>,
}

/// The TLS library refuses its own defaults.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS: {0}")]
pub struct SetupError(#[from] rustls::Error);

impl Upstream {
    /// Prepares connections to `upstream.url`, and to what `guard` allows; none is opened yet.
    pub fn new(config: Arc<Config>, tls: ClientConfig, guard: Guard) -> Self {
        let mut http = HttpConnector::new_with_resolver(Resolver(GaiResolver::new()));
        http.enforce_http(false);
        http.set_nodelay(true);
        // Shared out among the addresses of a name, so that a dead one does not use it all up.
        http.set_connect_timeout(Some(config.upstream.connect_timeout));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http.map_response(socket as IntoSocket));
        // Beyond the wait for an answer, which has an end of its own.
        let stall = config.limits.idle_timeout.saturating_add(config.upstream.response_timeout);
        let connector = Api { https, timeout: config.upstream.connect_timeout, stall };
        let keep_alive = config.upstream.keep_alive;
        let api = Pool::new(connector, keep_alive, config.limits.max_requests);
        let others = Pool::new(Guarded { guard, stall }, keep_alive, OTHERS);
        let config::Upstream { scheme, authority, .. } = &config.upstream;
        let origin = Origin { scheme: scheme.clone(), authority: authority.clone() };
        Self { api, origin, others, config }
    }

    /// Sends a request to `origin` as if that were the API, on a `fresh` connection or any. It is taken out.
    pub async fn ask(
        &self,
        origin: &Origin,
        request: &mut Request<Body>,
        fresh: bool,
    ) -> Result<Response<Body>, Error> {
        let answer = self.through(&self.api, origin, request, fresh).await;
        answer.map_err(|failed| failed.into_error(origin, true))
    }

    /// Sends a plain request to another host.
    async fn ask_other(
        &self,
        target: &Target,
        request: &mut Request<Body>,
        fresh: bool,
    ) -> Result<Response<Body>, Error> {
        let authority = target.to_string().parse().map_err(|_| Error::BadTarget)?;
        let origin = Origin { scheme: Scheme::HTTP, authority };
        let answer = self.through(&self.others, &origin, request, fresh).await;
        answer.map_err(|failed| failed.into_error(&origin, false))
    }

    async fn through<C: Connect>(
        &self,
        pool: &Pool<C>,
        origin: &Origin,
        request: &mut Request<Body>,
        fresh: bool,
    ) -> Result<Response<Body>, Failed> {
        let progress = request.body_mut().stream().map(Streaming::watch);
        let limit = self.config.upstream.response_timeout;
        let patience = Patience { limit, progress: progress.clone() };
        let answer = pool.request(origin, request, patience, fresh).await.map_err(|error| {
            let body = progress.and_then(|progress| progress.error());
            body.map_or_else(|| Failed::from(error), Failed::RequestBody)
        })?;
        // RFC 9110 section 7.8: nobody asked for another protocol, since `Upgrade` ends here.
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let message = "it switched to another protocol unasked".into();
            return Err(Failed::Fault(Fault::Garbage, message));
        }
        if answer.body().size_hint().exact().is_none() && !is_plain(answer.headers()) {
            return Err(Failed::Fault(Fault::Garbage, "its transfer coding is not known".into()));
        }
        let idle = self.config.limits.idle_timeout;
        Ok(answer.map(|body| match body.is_end_stream() {
            true => Body::empty(),
            false => Body::Streaming(Box::new(Streaming::new(body, Side::Upstream, idle))),
        }))
    }
}

impl Handle<Box<Call>> for Upstream {
    type Response = Response<Body>;
    type Error = Error;

    async fn handle(&self, mut call: Box<Call>) -> Result<Response<Body>, Error> {
        let Call { request, forward, fresh, .. } = &mut *call;
        match forward {
            Some(Forward::Elsewhere(target)) => {
                Box::pin(self.ask_other(target, request, *fresh)).await
            }
            Some(Forward::Api) | None => self.ask(&self.origin, request, *fresh).await,
        }
    }
}

/// Why the upstream gave no answer: who is at fault, and in which phase.
#[derive(Debug, thiserror::Error)]
#[error("{host}: {}: {message}", .fault.phase())]
pub(crate) struct UpstreamError {
    /// The authority that was asked.
    pub host: String,
    /// It is `upstream.url`'s.
    pub is_api: bool,
    pub fault: Fault,
    /// The cause in the words of the library that met it. No content, no credentials.
    pub message: String,
}

/// A class of faults, with its name, its status and its token in RFC 9209 section 2.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    ConnectTimeout,
    Dns,
    Refused,
    Unreachable,
    Certificate,
    Tls,
    ResponseTimeout,
    Garbage,
    Terminated,
    /// The upstream had closed the connection before, and never saw the request.
    Stale,
}

impl Fault {
    pub const ALL: [Self; 10] = [
        Self::ConnectTimeout,
        Self::Dns,
        Self::Refused,
        Self::Unreachable,
        Self::Certificate,
        Self::Tls,
        Self::ResponseTimeout,
        Self::Garbage,
        Self::Terminated,
        Self::Stale,
    ];

    /// Its name, the phase in which it comes, and its token.
    const fn facts(self) -> [&'static str; 3] {
        const RESOLVING: &str = "resolving the name";
        const CONNECTING: &str = "connecting";
        const HANDSHAKE: &str = "TLS handshake";
        const WAITING: &str = "waiting for the answer";
        match self {
            Self::ConnectTimeout => ["upstream-connect-timeout", CONNECTING, "connection_timeout"],
            Self::Dns => ["upstream-name-unresolved", RESOLVING, "dns_error"],
            Self::Refused => ["upstream-connection-refused", CONNECTING, "connection_refused"],
            Self::Unreachable => ["upstream-unreachable", CONNECTING, "destination_ip_unroutable"],
            Self::Certificate => {
                ["upstream-certificate-untrusted", HANDSHAKE, "tls_certificate_error"]
            }
            Self::Tls => ["upstream-tls-failed", HANDSHAKE, "tls_protocol_error"],
            Self::ResponseTimeout => {
                ["upstream-response-timeout", WAITING, "http_response_timeout"]
            }
            Self::Garbage => ["upstream-answer-malformed", WAITING, "http_protocol_error"],
            Self::Terminated | Self::Stale => {
                ["upstream-connection-closed", WAITING, "connection_terminated"]
            }
        }
    }

    pub const fn name(self) -> &'static str {
        self.facts()[0]
    }

    pub const fn phase(self) -> &'static str {
        self.facts()[1]
    }

    pub const fn token(self) -> &'static str {
        self.facts()[2]
    }

    pub const fn status(self) -> StatusCode {
        match self {
            Self::ConnectTimeout | Self::ResponseTimeout => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        }
    }

    /// What the operator can do.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Dns => "Check the host in upstream.url and the resolver of this machine.",
            Self::Refused | Self::Unreachable | Self::ConnectTimeout => {
                "Check that upstream.url is right and that this machine may reach it."
            }
            Self::Certificate => {
                "If it has expired or is not valid yet, look at this machine's clock; if its issuer is a \
                 private one, name that in upstream.ca_file; whoever issued it, upstream.url's host must be among its \
                 subjectAltNames."
            }
            Self::Tls => {
                "Check that upstream.url speaks TLS 1.2 or later on that port, and asks for no client certificate."
            }
            Self::Garbage => {
                "If upstream.url's port speaks TLS, the URL has to begin with https. Otherwise the request may have been applied \
                 all the same: look before sending a create again."
            }
            Self::ResponseTimeout | Self::Terminated | Self::Stale => {
                "It may have been applied all the same: look before sending a create again."
            }
        }
    }
}

/// How an attempt ended without an answer.
enum Failed {
    /// The client's body broke off, so the request had to.
    RequestBody(BodyError),
    Denied(Denied),
    Fault(Fault, String),
}

impl Failed {
    fn into_error(self, origin: &Origin, is_api: bool) -> Error {
        let (fault, message) = match self {
            Self::RequestBody(error) => return Error::RequestBody(error),
            Self::Denied(denied) => return Error::Denied(denied),
            Self::Fault(fault, message) => (fault, message),
        };
        let host = origin.authority.to_string();
        Error::Upstream(UpstreamError { host, is_api, fault, message })
    }
}

impl From<PoolError> for Failed {
    fn from(error: PoolError) -> Self {
        let causes = || Causes(Some(&error));
        if let Some(ConnectError::Denied(denied)) = causes().find_map(<dyn StdError>::downcast_ref)
        {
            return Self::Denied(denied.clone());
        }
        let is_late = |cause: &(dyn StdError + 'static)| {
            cause.downcast_ref::<io::Error>().is_some_and(|it| it.kind() == io::ErrorKind::TimedOut)
        };
        match error {
            // Not a word of it, and it took no more of the request.
            PoolError::Exchange { .. } if causes().any(is_late) => {
                return Self::Fault(Fault::ResponseTimeout, "it stopped reading".into());
            }
            PoolError::Exchange { was_stale: true, .. } => {
                return Self::Fault(Fault::Stale, "connection closed before any answer".into());
            }
            PoolError::Late => return Self::Fault(Fault::ResponseTimeout, error.to_string()),
            PoolError::Connect(_) | PoolError::Exchange { .. } => {}
        }
        let tls = causes().find_map(|cause| cause.downcast_ref::<rustls::Error>());
        let message = match tls {
            Some(rustls::Error::InvalidCertificate(error)) => invalid(error).to_owned(),
            // rustls explains that at length, to programmers.
            _ if causes().any(is_eof) => CLOSED.into(),
            _ => causes().last().map(ToString::to_string).unwrap_or_default(),
        };
        Self::Fault(classify(&error, causes), message)
    }
}

fn classify<'e>(error: &PoolError, causes: impl Fn() -> Causes<'e>) -> Fault {
    let guarded = causes().find_map(<dyn StdError>::downcast_ref::<ConnectError>);
    if let Some(ConnectError::Timeout(_)) = guarded {
        return Fault::ConnectTimeout;
    }
    if matches!(guarded, Some(ConnectError::Unresolved(_)))
        || causes().any(|cause| cause.is::<Unresolved>())
    {
        return Fault::Dns;
    }
    let is_connect = matches!(error, PoolError::Connect(_));
    match causes().find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            return Fault::Certificate;
        }
        // In TLS 1.3, said only once the client has done its part.
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            return Fault::Tls;
        }
        Some(_) if is_connect => return Fault::Tls,
        // The request may have been read, and done.
        _ => {}
    }
    if is_connect {
        // One that wraps another is of no kind.
        let mut kinds =
            causes().filter_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()));
        return match kinds.find(|kind| *kind != io::ErrorKind::Other) {
            Some(io::ErrorKind::ConnectionRefused) => Fault::Refused,
            // Of one address among several, or the system's own.
            Some(io::ErrorKind::TimedOut) => Fault::ConnectTimeout,
            Some(
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::InvalidData,
            ) => Fault::Tls,
            _ => Fault::Unreachable,
        };
    }
    match causes().find_map(|cause| cause.downcast_ref::<hyper::Error>()) {
        Some(error) if error.is_parse() => Fault::Garbage,
        _ => Fault::Terminated,
    }
}

/// Whether a message has no transfer coding but chunks, which hyper undoes: it would drop the name of any other with them. Some old
/// servers name that there is none.
fn is_plain(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_plain = |coding: &HeaderValue| {
        let coding = coding.as_bytes();
        coding.eq_ignore_ascii_case(b"chunked") || coding.eq_ignore_ascii_case(b"identity")
    };
    codings.next().is_none_or(is_plain) && codings.next().is_none()
}

const CLOSED: &str = "the connection was closed";

fn is_eof(error: &(dyn StdError + 'static)) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
}

/// What is wrong with a certificate, without a word of what stands in it: whoever made it chose that.
const fn invalid(error: &CertificateError) -> &'static str {
    use CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } => "the certificate has expired",
        E::NotValidYet | E::NotValidYetContext { .. } => "the certificate is not valid yet",
        E::UnknownIssuer => "the certificate's issuer is not trusted",
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "the certificate is for another name than this host's"
        }
        E::Revoked => "the certificate was revoked",
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => "the certificate is not for servers",
        E::BadEncoding | E::BadSignature => {
            "the certificate is malformed, or its signature is wrong"
        }
        _ => "the certificate cannot be verified",
    }
}

/// An error and all that caused it. Looks into an [`io::Error`]'s own cause too.
struct Causes<'e>(Option<&'e (dyn StdError + 'static)>);

impl<'e> Iterator for Causes<'e> {
    type Item = &'e (dyn StdError + 'static);

    fn next(&mut self) -> Option<Self::Item> {
        let cause = self.0?;
        self.0 = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => cause.source(),
        };
        Some(cause)
    }
}

/// Opens connections to hosts of the client's choosing, as far as they are allowed.
struct Guarded {
    guard: Guard,
    /// How long the peer may take nothing of what is written, and say nothing.
    stall: Duration,
}

impl Connect for Guarded {
    type Stream = Socket;

    async fn connect(&self, uri: Uri) -> Result<Remembering<Socket>, BoxError> {
        let host = uri.host().unwrap_or_default().parse();
        let host = host.map_err(|error| ConnectError::Io(io::Error::other::<HostError>(error)))?;
        let stream = self.guard.connect(&host, uri.port_u16().unwrap_or(80)).await?;
        Ok(Remembering::new(Socket::new(stream), self.stall))
    }
}

/// Opens connections to the API, TLS included, within a deadline.
struct Api {
    https: HttpsConnector<MapResponse<HttpConnector<Resolver>, IntoSocket>>,
    timeout: Duration,
    /// How long the peer may take nothing of what is written, and say nothing.
    stall: Duration,
}

impl Connect for Api {
    /// An adapter, since only tokio's traits tell how much was read.
    type Stream = TokioIo<MaybeHttpsStream<TokioIo<Socket>>>;

    async fn connect(&self, uri: Uri) -> Result<Remembering<Self::Stream>, BoxError> {
        let mut https = self.https.clone();
        let connecting = async {
            poll_fn(|cx| https.poll_ready(cx)).await?;
            https.call(uri).await
        };
        match tokio::time::timeout(self.timeout, connecting).await {
            Ok(stream) => Ok(Remembering::new(TokioIo::new(stream?), self.stall)),
            Err(_) => Err(ConnectError::Timeout(self.timeout).into()),
        }
    }
}

type IntoSocket = fn(TokioIo<TcpStream>) -> TokioIo<Socket>;

fn socket(stream: TokioIo<TcpStream>) -> TokioIo<Socket> {
    TokioIo::new(Socket::new(stream.into_inner()))
}

/// The system's resolver, with an error of its own that can be told from a refused connection.
#[derive(Clone)]
struct Resolver(GaiResolver);

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unresolved(io::Error);

impl Service<Name> for Resolver {
    type Response = <GaiResolver as Service<Name>>::Response;
    type Error = Unresolved;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Unresolved>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Unresolved>> {
        self.0.poll_ready(cx).map_err(Unresolved)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolving = self.0.call(name);
        Box::pin(async move { resolving.await.map_err(Unresolved) })
    }
}
